"""``dirtylog run``: log a guest, round by round."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dirtylog.cli import arguments
from dirtylog.cli.command import Command
from dirtylog.cli.exits import ExitCode, exit_code_of
from dirtylog.dirty_log import DirtyLog
from dirtylog.errors import DirtyLogError, InvalidArgumentError
from dirtylog.guests.image import Image
from dirtylog.guests.programs import PROGRAMS
from dirtylog.observe.heatmap import HeatMap
from dirtylog.observe.rounds import rounds
from dirtylog.options import MAX_ENTRIES, Backing, Log
from dirtylog.size import format_size
from dirtylog.target import DEFAULT_SIZE, open_target

if TYPE_CHECKING:
    import argparse

    from dirtylog.emulated.machine import EmulatedMemory
    from dirtylog.kvm.memory import KvmMemory
    from dirtylog.observe.rounds import Round

SCHEMA = "dirtylog/run/1"
_MB = 1e6


class Run(Command):
    """Log a guest or process, round by round.

    TARGET is kvm[:PROGRAM] or emu:ARCH[:PROGRAM]. "dirtylog check" says what works here; the programs are sweep (page after
    page), random (every page once a period, in pseudo-random order), hotset (a few pages over and over; the last of several
    vCPUs sweeps the rest) and idle. In JSON, "runs" are [first guest frame number, number of pages].
    """

    example: ClassVar[str] = "dirtylog run emu:arm64:hotset --vcpus 2 --rounds 5 --interval 0.1"

    @staticmethod
    def prepare(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of run."""
        parser.add_argument("target", metavar="TARGET", help=f"kvm[:PROGRAM] or emu:ARCH[:PROGRAM]; PROGRAM: {', '.join(PROGRAMS)}")
        parser.add_argument(
            "--size", type=arguments.size, default=DEFAULT_SIZE, help="the guest's memory, such as 256MiB (default: %(default)s)"
        )
        parser.add_argument("--vcpus", type=arguments.count, default=1, metavar="N", help="1 to 8 (default: %(default)s)")
        parser.add_argument("--rounds", type=arguments.count, default=10, metavar="N", help="how many (default: %(default)s)")
        parser.add_argument(
            "--interval", type=arguments.seconds, default=0.1, metavar="SECONDS", help="length of a round (default: %(default)s)"
        )
        formats = parser.add_mutually_exclusive_group()
        formats.add_argument("--json", action="store_true", help="print one JSON document at the end")
        formats.add_argument("--jsonl", action="store_true", help="print one JSON object a round, at once")
        parser.add_argument(
            "--heatmap", type=Path, metavar="FILE", help="write a picture of pages against rounds (.png, .svg, .pdf)"
        )
        parser.add_argument("-f", "--force", action="store_true", help="replace FILE if it exists")
        kvm = parser.add_argument_group("KVM guests")
        kvm.add_argument(
            "--log",
            choices=[log.value for log in Log],
            help="the kernel's log: a bitmap that a get takes and protects (the default), one that is cleared apart, or rings",
        )
        kvm.add_argument(
            "--backing",
            choices=[backing.value for backing in Backing],
            help="what the guest's memory is made of (default: anonymous)",
        )
        kvm.add_argument(
            "--ring-entries", type=arguments.count, metavar="N", help=f"length of each vCPU's ring (default: {MAX_ENTRIES})"
        )
        image = parser.add_argument_group("a program of your own")
        image.add_argument("--image", type=Path, metavar="FILE", help="an ELF file or a raw image to run instead of PROGRAM")
        image.add_argument("--load", type=arguments.address, metavar="ADDR", help="where to load a raw image (default: 0)")
        image.add_argument(
            "--entry",
            type=arguments.address,
            metavar="ADDR",
            help="where to enter it (default: as ELF says, or where it lies)",
        )
        image.add_argument("--halt", type=arguments.address, metavar="ADDR", help="the address at which a vCPU halts")

    def run(self, args: argparse.Namespace) -> ExitCode:
        """Open the target, log it, and print what was found."""
        if args.heatmap is not None:
            arguments.check_output(args.heatmap, force=args.force)
        image = None
        if args.image is not None:
            image = Image.read(args.image, load=args.load, entry=args.entry, halt=args.halt)
        elif (args.load, args.entry, args.halt) != (None, None, None):
            raise InvalidArgumentError("--load, --entry and --halt go with --image")
        choices = {"log": args.log, "backing": args.backing, "ring_entries": args.ring_entries}
        with open_target(args.target, size=args.size, vcpus=args.vcpus, image=image, **choices) as memory, DirtyLog(memory) as log:
            report = _report(args, memory)
            report.begin()
            picture = _picture(memory)
            status = ExitCode.DONE
            memory.resume()
            try:
                for found in rounds(log, args.rounds, args.interval):
                    report.add(found)
                    for slot, dirty in found.dirty.items():
                        if slot.npages == picture.npages:
                            picture.add(dirty, found.seconds)
                            break
                    memory.check()
            except KeyboardInterrupt:
                status = ExitCode.INTERRUPTED
            except DirtyLogError as error:
                print(f"dirtylog: {error}", file=sys.stderr)
                status = exit_code_of(error)
            memory.pause()
            report.end(status)
            if args.heatmap is not None and status is not ExitCode.INTERRUPTED:
                picture.save(args.heatmap, f"{args.target}, {args.vcpus} vCPU{'s' * (args.vcpus > 1)}")
                print(f"wrote {args.heatmap}", file=sys.stderr)
            return status


def _picture(memory: EmulatedMemory | KvmMemory) -> HeatMap:
    largest = max(memory.slots, key=lambda slot: slot.npages)
    return HeatMap(largest.npages, largest.page_size)


def _facts(args: argparse.Namespace, memory: EmulatedMemory | KvmMemory) -> dict[str, Any]:
    """Return what every result names."""
    return {
        "schema": SCHEMA,
        "target": args.target,
        "port": memory.port.name,
        "exactness": memory.exactness.value,
        "page_size": next(iter(memory.slots)).page_size,
        "blind_spots": list(memory.blind_spots),
    }


def _round(found: Round) -> dict[str, Any]:
    return {
        "round": found.number,
        "seconds": found.seconds,
        "get_seconds": found.get_seconds,
        "dirty_pages": found.dirty_pages,
        "dirty_bytes": found.dirty_bytes,
        "runs": found.runs().tolist(),
    }


class _Text:
    """A line a round, for people."""

    def __init__(self, args: argparse.Namespace, memory: EmulatedMemory | KvmMemory) -> None:
        self._args, self._memory = args, memory
        self._rounds = self._pages = self._bytes = 0
        self._seconds = self._get_seconds = 0.0

    def begin(self) -> None:
        facts = _facts(self._args, self._memory)
        nbytes = sum(slot.nbytes for slot in self._memory.slots if not slot.readonly)
        vcpus = len(self._memory.vcpus)
        print(
            f"{facts['target']}: port {facts['port']} ({facts['exactness']}), page size {facts['page_size']}, "
            f"{format_size(nbytes)}, {vcpus} vCPU{'s' * (vcpus > 1)}"
        )
        print(f"{'round':>6} {'seconds':>9} {'dirty pages':>12} {'MB/s':>9} {'runs':>7} {'get ms':>8}", flush=True)

    def add(self, found: Round) -> None:
        self._rounds, self._pages, self._bytes = found.number, self._pages + found.dirty_pages, self._bytes + found.dirty_bytes
        self._seconds, self._get_seconds = self._seconds + found.seconds, self._get_seconds + found.get_seconds
        rate = found.dirty_bytes / _MB / found.seconds
        print(
            f"{found.number:>6} {found.seconds:>9.3f} {found.dirty_pages:>12} {rate:>9.1f} {len(found.runs()):>7} "
            f"{found.get_seconds * 1e3:>8.3f}",
            flush=True,
        )

    def end(self, status: ExitCode) -> None:
        rate = self._bytes / _MB / self._seconds if self._seconds else 0.0
        print(
            f"{'total':>6} {self._seconds:>9.3f} {self._pages:>12} {rate:>9.1f} {'':>7} {self._get_seconds * 1e3:>8.3f}"
            f"{'' if status is ExitCode.DONE else f'   (ended early, exit {int(status)})'}"
        )
        print(", ".join(f"{name.replace('_', ' ')} {count}" for name, count in asdict(self._memory.stats).items()))
        for blind in self._memory.blind_spots:
            print(f"blind spot: {blind}")


class _Lines:
    """A JSON object a round."""

    def __init__(self, args: argparse.Namespace, memory: EmulatedMemory | KvmMemory) -> None:
        self._facts = _facts(args, memory)

    def begin(self) -> None:
        pass

    def add(self, found: Round) -> None:
        print(json.dumps(self._facts | _round(found)), flush=True)

    def end(self, status: ExitCode) -> None:
        pass


class _Document:
    """One JSON document at the end."""

    def __init__(self, args: argparse.Namespace, memory: EmulatedMemory | KvmMemory) -> None:
        self._memory = memory
        self._facts = _facts(args, memory)
        self._rounds: list[dict[str, Any]] = []

    def begin(self) -> None:
        pass

    def add(self, found: Round) -> None:
        self._rounds.append(_round(found))

    def end(self, status: ExitCode) -> None:
        memory = self._memory
        document = self._facts | {
            "vcpus": len(memory.vcpus),
            "slots": [
                {"id": slot.id, "base_gfn": slot.base_gfn, "npages": slot.npages, "readonly": slot.readonly}
                for slot in memory.slots
            ],
            "complete": status is ExitCode.DONE,
            "rounds": self._rounds,
            "total": {
                "seconds": sum(found["seconds"] for found in self._rounds),
                "get_seconds": sum(found["get_seconds"] for found in self._rounds),
                "dirty_pages": sum(found["dirty_pages"] for found in self._rounds),
                "dirty_bytes": sum(found["dirty_bytes"] for found in self._rounds),
            },
        }
        print(json.dumps(document | asdict(memory.stats)))


def _report(args: argparse.Namespace, memory: EmulatedMemory | KvmMemory) -> _Text | _Lines | _Document:
    if args.json:
        return _Document(args, memory)
    return _Lines(args, memory) if args.jsonl else _Text(args, memory)
