"""What the documentation shows is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvm_here import needs_kvm
from uffd_here import needs_uffd

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(
    "page",
    [
        pytest.param("kvm.md", marks=needs_kvm),
        pytest.param("buffers.md", marks=needs_uffd),
        pytest.param("recording.md", marks=needs_uffd),
    ],
)
def test_the_first_program_of_a_page_prints_what_is_shown(page: str, tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert found is not None
    program, output = found.groups()
    assert len(program.splitlines()) <= 40
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == output
