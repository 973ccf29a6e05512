"""What the documentation shows is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from kvm_here import needs_kvm

DOCS = Path(__file__).parents[1] / "docs"


@needs_kvm
def test_the_program_in_kvm_md_prints_what_is_shown() -> None:
    found = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", (DOCS / "kvm.md").read_text(), re.DOTALL)
    assert found is not None
    program, output = found.groups()
    assert len(program.splitlines()) <= 40
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == output
