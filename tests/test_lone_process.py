"""Forks, threads and privileges of a process that tracks its memory: each scene in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dirtylog.linux.userfaultfd import DEVICE
from uffd_here import needs_uffd

pytestmark = needs_uffd
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its privileges")
needs_device = pytest.mark.skipif(not os.access(DEVICE, os.R_OK | os.W_OK), reason=f"{DEVICE} cannot be opened")

_PROGRAM = Path(__file__).with_name("lone_process.py")


def play(scene: str, *numbers: int) -> None:
    # Python since 3.12 warns of a fork with threads about, which is the subject here.
    command = [
        sys.executable,
        "-W",
        "error",
        "-W",
        "ignore:This process:DeprecationWarning",
        str(_PROGRAM),
        scene,
        *map(str, numbers),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "nothing was left for the garbage collector to close"


@pytest.mark.parametrize(
    "scene",
    [
        "child_gets_from_its_parents_log",
        "child_that_keeps_the_descriptors_takes_its_parents_pages",
        "child_tracks_on_its_own",
        "child_of_a_process_that_is_getting",
        "program_that_is_started_inherits_nothing",
    ],
)
def test_a_fork_takes_nothing_of_its_parents(scene: str) -> None:
    play(scene)


def test_threads_that_store_and_get_never_wait_for_each_other_for_ever() -> None:
    play("threads_store_and_get")


@pytest.mark.parametrize("left", range(5))
def test_a_process_that_was_out_of_descriptors_is_not_told_so_for_ever(left: int) -> None:
    play("out_of_descriptors_for_a_while", left)


@needs_root
@pytest.mark.parametrize("scene", ["nobody_tracks", "nobody_who_was_root_compares"])
def test_a_process_without_privileges(scene: str) -> None:
    play(scene)


@needs_device
def test_the_device_is_the_second_way_to_a_userfaultfd() -> None:
    play("without_the_system_call_the_device_will_do")


@needs_root
def test_where_there_is_no_userfaultfd_memory_is_compared() -> None:
    play("without_any_userfaultfd_there_is_comparing")
