"""What of this host bounds a guest."""

from __future__ import annotations

import os


def host_memory() -> int | None:
    """Return the host's memory in bytes, or None where it cannot be told."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
