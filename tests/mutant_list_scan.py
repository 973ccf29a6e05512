"""Mutants of the scan and of the descriptors: the traps of PAGEMAP_SCAN (L1 to L7 in test_caller_traps.py), forks."""

from __future__ import annotations

from mutant import Mutant

_TRAPS = "test_caller_traps.py"
_SCAN = "test_pagemap_scan.py"
_INTERRUPTS = "test_uffd_interrupts.py"
_GET = f"{_INTERRUPTS}::test_a_get_interrupted_anywhere_loses_nothing_and_arms_everything"
_SEEN = "test_mutants_seen_in_memory.py"


def _pagemap(name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, like, "linux/pagemap.py", old, new, tests)


def _uffd(name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, like, "linux/userfaultfd.py", old, new, tests)


def _buffer(name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, like, "linux/buffer_port.py", old, new, tests)


SCAN = (
    _pagemap(
        "a-failed-scan-is-forgotten",
        "trap L1, L2",
        "            left = np.flatnonzero(self._ends)\n            if len(left):\n",
        "            left = np.flatnonzero(self._ends)\n            if not len(left):\n",
        f"{_TRAPS}::test_l2_what_an_error_leaves_in_the_vector_is_delivered",
    ),
    _pagemap(
        "a-scan-in-flight-is-noted-late",
        "trap L1, interrupted",
        """\
            self._in_flight = True
            count = self._pagemap.ioctl(abi.PAGEMAP_SCAN, argument, "cannot scan %#x to %#x", start, end)
""",
        """\
            count = self._pagemap.ioctl(abi.PAGEMAP_SCAN, argument, "cannot scan %#x to %#x", start, end)
            self._in_flight = True
""",
        _GET,
    ),
    _pagemap(
        "the-vector-is-cleared-before-delivery",
        "trap L1, interrupted",
        "                deliver(self._vector[:count])\n                ends[:count] = 0\n",
        "                taken = self._vector[:count].copy()\n                ends[:count] = 0\n                deliver(taken)\n",
        _GET,
    ),
    _pagemap(
        "the-vector-is-never-cleared",
        "trap L2: what is stale is news",
        "                deliver(self._vector[:count])\n                ends[:count] = 0\n",
        "                deliver(self._vector[:count])\n",
        f"{_SEEN}::test_after_an_error_nothing_is_reported_that_was_delivered_before",
    ),
    _pagemap(
        "no-check-of-the-watch",
        "trap L3",
        "        argument.flags = Scan.WP_MATCHING | Scan.CHECK_WPASYNC\n",
        "        argument.flags = Scan.WP_MATCHING\n",
        f"{_TRAPS}::test_l3_every_scan_checks_that_the_memory_is_watched",
    ),
    _pagemap(
        "nothing-is-armed",
        "step 2 left out",
        "        argument.flags = Scan.WP_MATCHING | Scan.CHECK_WPASYNC\n",
        "        argument.flags = Scan.CHECK_WPASYNC\n",
        f"{_SCAN}::test_a_hundred_toggles_are_each_seen",
    ),
    _pagemap(
        "a-full-vector-is-the-end",
        "trap L5",
        "            start = walked if careful or count == len(ends) else argument.end\n",
        "            start = argument.end\n",
        f"{_SCAN}::test_a_short_vector_loses_nothing",
    ),
    _pagemap(
        "a-full-vector-is-the-end-if-not-careful",
        "trap L5",
        "            start = walked if careful or count == len(ends) else argument.end\n",
        "            start = walked if careful else argument.end\n",
        f"{_TRAPS}::test_l5_a_scan_goes_on_where_the_vector_was_full",
    ),
    _pagemap(
        "a-scan-that-stays-goes-on",
        "trap L6",
        "            if walked <= start:\n",
        "            if walked < start:\n",
        f"{_TRAPS}::test_l6_a_part_of_a_huge_page_is_tracked_as_the_whole",
    ),
    _pagemap(
        "written-and-present",
        "trap L7",
        "        argument.category_inverted, argument.category_mask = 0, Category.WRITTEN\n",
        "        argument.category_inverted, argument.category_mask = 0, Category.WRITTEN | Category.PRESENT\n",
        f"{_TRAPS}::test_l7_written_is_all_that_is_asked_for",
    ),
    _pagemap(
        "a-long-scan-ends-with-its-first-call",
        "KVM 53eac7a8f8cf",
        "        while start < end:\n            argument.start",
        "        if start < end:\n            argument.start",
        f"{_SCAN}::test_a_scan_longer_than_one_call_goes_on",
    ),
    _buffer(
        "a-fork-keeps-the-port",
        "a fork keeps descriptors",
        "os.register_at_fork(after_in_child=BufferPort.forget)\n",
        "",
        "test_lone_process.py::test_a_fork_takes_nothing_of_its_parents",
    ),
    Mutant(
        "a-fork-keeps-the-descriptors",
        "a fork keeps descriptors",
        "linux/descriptor.py",
        "os.register_at_fork(after_in_child=UnsharedDescriptor.close_all)\n",
        "",
        ("test_lone_process.py::test_a_fork_takes_nothing_of_its_parents",),
    ),
    _buffer(
        "the-last-stop-keeps-the-descriptors",
        "a userfaultfd keeps memory armed",
        "            super().stop_logging(slot)\n            if not self._watched:\n                self.close()\n",
        "            super().stop_logging(slot)\n",
        "test_track.py::test_the_last_log_closes_the_descriptors_and_the_next_opens_them",
    ),
    _uffd(
        "the-marks-are-not-taken-away",
        "mremap drops a watch, not the marks",
        "        self.ioctl(abi.UFFDIO_WRITEPROTECT, argument,",
        "        (abi.UFFDIO_WRITEPROTECT, argument,",
        "test_lost_watch.py::test_what_was_not_moved_is_still_watched",
    ),
    _uffd(
        "a-program-that-is-executed-keeps-the-descriptor",
        "a fork keeps descriptors",
        "FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | abi.UFFD_USER_MODE_ONLY\n",
        "FLAGS = os.O_NONBLOCK | abi.UFFD_USER_MODE_ONLY\n",
        f"{_SEEN}::test_a_program_that_is_executed_has_no_descriptor_of_a_log",
    ),
)
