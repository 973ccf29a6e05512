"""Buffers of this process: arrays and the like, whose writes are logged."""
