"""KVM from Python: one type per kind of descriptor, typed exits, and the kernel's dirty logs as ports of the generic one."""
