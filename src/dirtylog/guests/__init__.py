"""Guest programs: assembly source, the assembled bytes, and the Makefile target (guests) that rebuilds them."""
