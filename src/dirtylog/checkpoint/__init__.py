"""Checkpoints of memory, incremental ones: docs/checkpoint.md for users and maintainers."""
