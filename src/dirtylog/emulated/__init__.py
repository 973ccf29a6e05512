"""The software machine: guest CPUs, second-stage tables, TLB requests. Its ports are in :mod:`dirtylog.emulated.arch`."""
