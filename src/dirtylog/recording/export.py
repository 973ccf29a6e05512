"""A recording in other formats: its runs as CSV or Parquet, or a JSON object a round."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from dirtylog.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import IO

    from numpy.typing import NDArray

    from dirtylog.recording.reader import Recording

SCHEMA = "dirtylog/recording/1"
COLUMNS = ("round", "began", "seconds", "slot", "name", "first_gfn", "address", "npages", "page_size")
"""Of a run: its round, when that began and how long it gathered; the slot's id and name; where the run begins, and its length."""
_ROUNDS_AT_ONCE = 256


def write_csv(recording: Recording, out: IO[str]) -> None:
    """Write a line a run, with a header."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for columns in _tables(recording):
        writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))


def write_jsonl(recording: Recording, out: IO[str]) -> None:
    """Write the facts as the first object, then one a round, with its runs as [first frame number, number of pages] by slot."""
    slots = [
        {
            "slot": number,
            "id": slot.id,
            "name": slot.printable_name,
            "base_gfn": slot.base_gfn,
            "npages": slot.npages,
            "page_size": slot.page_size,
            "address": slot.host_address,
            "permissions": slot.permissions,
        }
        for number, slot in enumerate(recording.slots)
    ]
    marks = [mark._asdict() for mark in recording.marks]
    out.write(json.dumps({"schema": SCHEMA, **recording.facts, "slots": slots, "marks": marks}) + "\n")
    for first, stop, runs in _parts(recording):
        edges = np.searchsorted(runs["round"], np.arange(first, stop + 1))
        for row in range(first, stop):
            found = recording.rounds[row]
            of_round = runs[edges[row - first] : edges[row - first + 1]]
            by_slot = {
                str(number): np.stack((of_slot["first"] + recording.slots[number].base_gfn, of_slot["npages"]), axis=1).tolist()
                for number in np.unique(of_round["slot"]).tolist()
                for of_slot in (of_round[of_round["slot"] == number],)
            }
            record = {
                "round": int(found["number"]),
                "began": float(found["began"]),
                "seconds": float(found["seconds"]),
                "get_seconds": float(found["get_seconds"]),
                "dirty_pages": int(found["pages"]),
                "dirty_bytes": int(found["nbytes"]),
                "runs": by_slot,
            }
            out.write(json.dumps(record) + "\n")


def write_parquet(recording: Recording, path: Path) -> None:
    """Write a table of runs; the facts are in its metadata."""
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra, and slow to import
        from pyarrow import parquet  # noqa: PLC0415 - as above
    except ImportError as error:
        raise UnsupportedError("Parquet needs pyarrow", remedy="install it: pip install 'dirtylog[parquet]'") from error
    writer: Any = None
    try:
        for columns in _tables(recording):
            table = pa.table(columns)
            if writer is None:
                facts = {"dirtylog": json.dumps({"schema": SCHEMA, **recording.facts})}
                writer = parquet.ParquetWriter(path, table.schema.with_metadata(facts), compression="zstd")
            writer.write_table(table.replace_schema_metadata(writer.schema.metadata))
    finally:
        if writer is not None:
            writer.close()


TEXT_FORMATS: dict[str, Callable[[Recording, IO[str]], None]] = {"csv": write_csv, "jsonl": write_jsonl}


def _tables(recording: Recording) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield the runs of some rounds at once, by columns. There is always one table, if an empty one."""
    slots = recording.slots
    names = np.array([slot.printable_name for slot in slots] or [""], object)
    ids, bases, addresses, sizes = (
        np.array([getattr(slot, name) for slot in slots] or [0], np.int64)
        for name in ("id", "base_gfn", "host_address", "page_size")
    )
    for _, _, runs in _parts(recording):
        slot, rounds = runs["slot"], recording.rounds[runs["round"]]
        yield {
            "round": rounds["number"],
            "began": rounds["began"],
            "seconds": rounds["seconds"],
            "slot": ids[slot],
            "name": names[slot],
            "first_gfn": bases[slot] + runs["first"],
            "address": addresses[slot] + runs["first"] * sizes[slot],
            "npages": runs["npages"],
            "page_size": sizes[slot],
        }


def _parts(recording: Recording) -> Iterator[tuple[int, int, NDArray[np.void]]]:
    """Yield (first row, row after the last, runs) of some rounds at once."""
    for first in range(0, max(1, len(recording.rounds)), _ROUNDS_AT_ONCE):
        stop = min(first + _ROUNDS_AT_ONCE, len(recording.rounds))
        yield first, stop, recording.runs_of(first, stop)
