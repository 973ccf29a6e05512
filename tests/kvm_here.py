"""Whether tests can make KVM guests here, and what is missing where they cannot."""

from __future__ import annotations

import pytest

from dirtylog.kvm.probe import probe_kvm


def missing_kvm() -> str | None:
    """Return what keeps this machine from making KVM guests, or None."""
    facts = probe_kvm()
    return None if facts.available else f"no KVM guests here: {facts.reason}"


needs_kvm = pytest.mark.skipif(missing_kvm() is not None, reason=missing_kvm() or "")
