"""Mutants of what stands around the scan: memory mapped anew or moved, holes (trap L8), buffers that share a page."""

from __future__ import annotations

from mutant import Mutant

_TRAPS = "test_caller_traps.py"
_INTERRUPTS = "test_uffd_interrupts.py"
_GET = f"{_INTERRUPTS}::test_a_get_interrupted_anywhere_loses_nothing_and_arms_everything"
_SPARSE = "test_sparse_memory.py"
_REMAPPED = "test_remapped_memory.py"
_SHARED = "test_shared_pages.py"
_SEEN = "test_mutants_seen_in_memory.py"
_L8 = f"{_TRAPS}::test_l8_on_a_kernel_that_does_not_see_them_they_are_looked_for"


def _port(name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, like, "linux/uffd_port.py", old, new, tests)


def _buffer(name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, like, "linux/buffer_port.py", old, new, tests)


def _watch(name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, like, "linux/watch.py", old, new, tests)


WATCH = (
    _port(
        "older-kernels-are-not-probed",
        "trap L8",
        "        return not sees_discarded_tables() or (",
        "        return (",
        _L8,
    ),
    _port(
        "holes-are-not-looked-for",
        "trap L8",
        "        scanner.holes(watch.start, watch.end, lambda regions: self._discarded(watch, regions, gone))\n",
        "",
        f"{_SPARSE}::test_discarded_pages_are_reported_once",
    ),
    _port(
        "a-page-that-has-gone-is-not-armed",
        "trap L8",
        "            for region in watch.regions(words):\n",
        "            for region in watch.regions(words)[:0]:\n",
        f"{_SPARSE}::test_discarded_pages_are_reported_once",
    ),
    _port(
        "what-another-has-armed-is-not-there",
        "trap L8",
        "            scanner.populated(watch.start, watch.end, lambda regions: there.append(watch.words(regions)))\n",
        "",
        f"{_SPARSE}::test_a_log_that_begins_where_another_has_armed_knows_what_is_there",
    ),
    _port(
        "holes-are-armed-before-what-is-there-is-known",
        "a new slot's contents",
        "            scanner.take(watch.start, watch.end, note, anyof=POPULATED, returned=returned)\n",
        "            scanner.take(watch.start, watch.end, note, returned=returned)\n",
        f"{_SPARSE}::test_what_is_not_there_is_neither_reported_nor_given_an_entry",
    ),
    _port(
        "a-remap-is-not-reported",
        "trap L3",
        """\
            except AccessDeniedError:
                self._watch_anew(watch, scanner)
            except TargetGoneError:
""",
        """\
            except AccessDeniedError:
                scanner.settle(self._deliver_anywhere)
            except TargetGoneError:
""",
        f"{_REMAPPED}::test_memory_mapped_over_it_is_reported_as_a_whole",
    ),
    _port(
        "marks-outlive-a-lost-watch",
        "mremap drops a watch, not the marks",
        "            self._descriptors()[0].register_afresh(watch.start, watch.end - watch.start)\n",
        "            self._descriptors()[0].register(watch.start, watch.end - watch.start)\n",
        "test_lost_watch.py::test_what_was_not_moved_is_still_watched",
    ),
    _port(
        "a-start-hides-a-lost-watch",
        "mremap drops a watch, not the marks",
        "                    uffd.register_afresh(start, end - start)\n",
        "                    uffd.register(start, end - start)\n"
        "                uffd.register(watch.start, watch.end - watch.start)\n",
        "test_lost_watch.py::test_another_log_that_begins_now_does_not_hide_it",
    ),
    _port(
        "a-foreign-mapping-is-taken-for-zeros",
        "a file mapped over what was never there",
        "            if watch.populated is not None:\n                self._mark_foreign(watch)\n",
        "",
        f"{_SPARSE}::test_a_file_mapped_over_what_was_never_there_is_reported",
    ),
    _port(
        "an-interrupted-new-watch-is-old",
        "nothing is lost on failure",
        "        watch.new = True\n",
        "",
        f"{_INTERRUPTS}::test_a_get_that_finds_a_file_interrupted_anywhere_loses_nothing",
    ),
    _port(
        "what-cannot-be-watched-is-not-reported",
        "trap L3",
        "            scanner.settle(self._deliver_anywhere)\n            self.mark_all(watch)\n\n    def mark_all",
        "            scanner.settle(self._deliver_anywhere)\n\n    def mark_all",
        f"{_REMAPPED}::test_memory_that_another_userfaultfd_handles_is_reported_always",
    ),
    _port(
        "a-start-scans-over-what-is-left",
        "trap L1, interrupted",
        "            scanner.settle(self._deliver_anywhere)\n            self._watched[slot] = watch\n",
        "            self._watched[slot] = watch\n",
        f"{_INTERRUPTS}::test_what_an_interrupted_get_holds_outlives_what_others_do",
    ),
    _port(
        "a-get-scans-over-what-is-left",
        "trap L1, interrupted",
        "            _, scanner = self._descriptors()\n            scanner.settle(self._deliver_anywhere)\n",
        "            _, scanner = self._descriptors()\n",
        _GET,
    ),
    _port(
        "a-get-takes-its-neighbour-s-pages",
        "two buffers on one page",
        """\
            watch.deliver(regions)
            for neighbour in self._neighbours(watch):
                neighbour.deliver(regions)

        if watch""",
        "            watch.deliver(regions)\n\n        if watch",
        f"{_SHARED}::test_two_bytearrays_on_one_page_are_both_told_of_a_write_to_it",
    ),
    _port(
        "a-start-takes-its-neighbour-s-pages",
        "two buffers on one page",
        "            for neighbour in self._neighbours(watch):\n                neighbour.deliver(regions)\n\n        returned",
        "\n        returned",
        f"{_SHARED}::test_what_was_written_before_a_log_began_is_not_its_own_but_its_neighbours",
    ),
    _port(
        "a-stop-ends-its-neighbour-s-watch",
        "two buffers on one page",
        """\
                for start, end in self._unshared(watch.start, watch.end, watch):
                    self._uffd.unregister(start, end - start)
""",
        "                self._uffd.unregister(watch.start, watch.end - watch.start)\n",
        f"{_SHARED}::test_any_order_of_starts_and_stops_leaves_every_log_exact",
    ),
    _buffer(
        "a-neighbour-must-lie-within",
        "two buffers on one page",
        "if other is not watch and other.start < watch.end and watch.start < other.end",
        "if other is not watch and watch.start <= other.start and other.end <= watch.end",
        f"{_SHARED}::test_any_order_of_starts_and_stops_leaves_every_log_exact",
    ),
    _watch(
        "a-region-beyond-the-slot-is-its-own",
        "two buffers on one page",
        "        if len(regions) and (first[0] < self.start or end[-1] > self.end):\n",
        "        if len(regions) and first[0] < self.start:\n",
        f"{_SHARED}::test_any_order_of_starts_and_stops_leaves_every_log_exact",
    ),
    _watch(
        "a-part-of-a-page-is-none",
        "parts of huge pages",
        "        first, end = first - self.start, end + (((1 << self.shift) - 1) - self.start)\n",
        "        first, end = first - self.start, end - self.start\n",
        f"{_SEEN}::test_a_region_that_ends_in_a_page_has_that_page",
    ),
    _watch(
        "a-bit-before-the-page-is-known-to-be-there",
        "nothing is lost on failure",
        """\
        if self.populated is not None:
            new = DirtyBitmap.from_words(self.slot.npages, words) - self.populated
            if new:
                self.populated |= new
        if self.slot.dirty_bitmap is not None and words:
            self.slot.dirty_bitmap.merge(words)
""",
        """\
        if self.slot.dirty_bitmap is not None and words:
            self.slot.dirty_bitmap.merge(words)
        if self.populated is not None:
            new = DirtyBitmap.from_words(self.slot.npages, words) - self.populated
            if new:
                self.populated |= new
""",
        f"{_SEEN}::test_a_page_is_known_to_be_there_before_its_bit_is_set",
    ),
    _watch(
        "what-comes-later-is-never-there",
        "trap L8",
        "            if new:\n                self.populated |= new\n",
        "",
        f"{_SPARSE}::test_discarded_pages_are_reported_once",
    ),
    Mutant(
        "a-word-that-two-holes-share-is-in-neither",
        "holes of sparse memory",
        "linux/holes.py",
        "    part = ~whole & (first[hole] < start + PAGES_PER_WORD) & (end[hole] > start)\n",
        "    part = ~whole & (first[hole] <= start) & (end[hole] > start)\n",
        ("test_words_of_runs.py::test_the_pages_in_holes_are_found",),
    ),
)
