"""An explorer of interleavings: the real code as logical threads, one step at a time, in every order that can matter."""
