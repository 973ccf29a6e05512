"""What every test run says at its end: what of this machine was exercised, and what was not."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chromium import missing_chromium
from kvm_here import missing_kvm

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG = (
    *("test_agent.py", "test_agent_program.py", "test_cli_process_exits.py", "test_freezer.py", "test_injection_failures.py"),
    *("test_injection_races.py", "test_injection_refused.py", "test_launch_signals.py", "test_launch_surroundings.py"),
    *("test_process_left.py", "test_soft_dirty_port.py", "test_compare.py", "test_process_churn.py", "test_cli_process_ends.py"),
    *("test_injection_killed.py", "test_injection.py", "test_launch.py", "test_real_programs.py"),
)
"""Slow, and sensitive to other load: ``make test-long`` runs them."""
collect_ignore = [] if os.environ.get("DIRTYLOG_LONG") else [str(Path(__file__).with_name(name)) for name in LONG]

# Who runs the tests in the background of a script has SIGINT ignored, and so would have what they start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CROSS_TOOLS = ("aarch64", "arm", "mips", "powerpc", "powerpc64", "riscv64", "s390x", "x86_64")


def _resources() -> list[tuple[str, bool, str]]:
    """Return (what, is it here, what it exercises)."""
    kvm = missing_kvm()
    return [
        ("Unicorn", importlib.util.find_spec("unicorn") is not None, "guests of eight instruction sets"),
        ("Matplotlib", importlib.util.find_spec("matplotlib") is not None, "heat maps"),
        ("Plotly", importlib.util.find_spec("plotly") is not None, "report pages"),
        ("Chromium", missing_chromium() is None, "report pages in a browser"),
        ("Textual", importlib.util.find_spec("textual") is not None, "the live view"),
        ("tmux", shutil.which("tmux") is not None, "the live view in a terminal"),
        ("prometheus-client", importlib.util.find_spec("prometheus_client") is not None, "metrics, scraped"),
        ("pyarrow", importlib.util.find_spec("pyarrow") is not None, "recordings as Parquet"),
        ("moto, s3fs", all(map(importlib.util.find_spec, ("moto", "s3fs"))), "copies of stores on an S3 server"),
        *(
            (f"binutils {tool}", find_tool(tool, "as") is not None, "the guest program is what its source says")
            for tool in CROSS_TOOLS
        ),
        ("pyelftools", importlib.util.find_spec("elftools") is not None, "guest images in ELF files"),
        ("KVM", kvm is None, f"guests on the kernel's own logs{'' if kvm is None else f' ({kvm})'}"),
    ]


def find_tool(target: str, name: str) -> str | None:
    """Return the path of a binutils program for a target, or None."""
    for prefix in (f"{target}-linux-gnu-", f"{target}-linux-gnueabihf-"):
        found = shutil.which(prefix + name)
        if found:
            return found
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    terminalreporter.section("exercised on this machine")
    for what, here, exercises in _resources():
        terminalreporter.write_line(f"{'yes' if here else 'NO ':<4} {what:<22} {exercises}")


@pytest.fixture(autouse=True)
def _no_thread_left_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [thread for thread in threading.enumerate() if thread not in before and thread.name.startswith(("vcpu-", "kvm-"))]
    assert not left, f"threads left behind: {left}"
