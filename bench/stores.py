"""What logging costs the guest: a store to a page that is dirty already, and the first store to a page in a round."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dirtylog.dirty_log import DirtyLog
from dirtylog.emulated.arch import PORTS
from dirtylog.emulated.isa import ISAS
from dirtylog.guests.programs import Pattern
from loops import BareLoop, LoggedLoop, UnicornError
from report import Section, Spread, Target, alternate

if TYPE_CHECKING:
    from dirtylog.emulated.isa import Isa

HIT_PORTS = ("x86", "arm", "arm64", "mips", "ppc-pv", "ppc-hv", "riscv", "s390")
"""One port for each instruction set that Unicorn has."""

_HOT_PAGES = 16
_SWEPT_PAGES = 16384
# The first Unicorn of a process has been seen to run some per cent slower than all later ones, whatever it runs.
_warm_up: list[BareLoop] = []


def hits(*, quick: bool) -> Section:
    """Measure stores that hit the TLB."""
    stores, pairs, rounds, laps = (200_000, 2, 5, 2) if quick else (400_000, 3, 5, 3)
    section = Section(
        "1. A store to a page that is already dirty in this round",
        f"{stores} stores a lap, in turn to {_HOT_PAGES} pages that were all dirtied before; a round is {laps} laps of a logged "
        "guest and as many of a bare unicorn.Uc that has no hook, interleaved; "
        f"{rounds} rounds each of {pairs} pairs of fresh guests.",
    )
    pattern = Pattern(base=0, mask=_HOT_PAGES - 1, count=stores)
    _warm_up.append(BareLoop(ISAS["x86"], _HOT_PAGES, pattern))
    _warm_up[0].lap()
    for arch in HIT_PORTS:
        isa = ISAS[PORTS[arch].isa]
        logged_ns: list[float] = []
        bare_ns: list[float] = []
        virtual_tlb = False
        for pair in range(pairs):
            # Where in memory a guest lands costs it a per cent or two: neither side may always be made first.
            if pair % 2:
                logged, bare = LoggedLoop(arch, _HOT_PAGES, pattern), _anchor(isa, pattern)
            else:
                bare, logged = _anchor(isa, pattern), LoggedLoop(arch, _HOT_PAGES, pattern)
            virtual_tlb = bare.virtual_tlb
            with DirtyLog(logged.memory) as log:
                logged.lap()
                for _ in range(rounds):
                    seconds = {"logged": 0.0, "bare": 0.0}
                    for _, name in alternate(("logged", "bare"), laps):
                        seconds[name] += logged.lap() if name == "logged" else bare.lap()
                    logged_ns.append(seconds["logged"] / stores / laps * 1e9)
                    bare_ns.append(seconds["bare"] / stores / laps * 1e9)
                assert log.get(0).count() == _HOT_PAGES
                assert bare.contents() == logged.contents()
            logged.memory.close()
        section.rows.append(
            {
                "instruction set": isa.name,
                "logged, ns": Spread.of(logged_ns),
                "bare, ns": Spread.of(bare_ns),
                "ratio": Spread.of(one / other for one, other in zip(logged_ns, bare_ns, strict=True)),
                "anchor's TLB": "virtual" if virtual_tlb else "default",
            }
        )
    values = section.values("instruction set", "ratio")
    section.targets.append(Target("a store to a dirty page at most 1.05 times bare Unicorn's", 1.05, "times", values))
    return section


def _anchor(isa: Isa, pattern: Pattern) -> BareLoop:
    """Return a bare guest in the TLB mode that Unicorn starts with, or where the program cannot run in that, in virtual mode.

    Unicorn 2.1 has such a case: its ppc64 loses MSR[HV] at reset, and then translates no address in real mode
    (unicorn-engine/unicorn pull request 2340).
    """
    bare = BareLoop(isa, _HOT_PAGES, pattern)
    try:
        bare.lap()
    except UnicornError:
        bare = BareLoop(isa, _HOT_PAGES, pattern, virtual_tlb=True)
        bare.lap()
    return bare


def first_stores(*, quick: bool) -> Section:
    """Measure stores that miss the TLB and are the first to their page since the last get."""
    rounds = 3 if quick else 11
    section = Section(
        "2. The first store to a page in a round",
        f"{_SWEPT_PAGES} stores a lap, each to another page of memory touched before, with a get and a flush before every lap. "
        "The anchor is the least that a miss can cost in Python: the same laps in a bare unicorn.Uc whose TLB-fill hook returns "
        "the address that it was asked for (for trace, the trace CPU's store that hits its TLB). "
        f"{rounds} rounds, interleaved.",
    )
    pattern = Pattern(base=0, mask=_SWEPT_PAGES - 1, count=_SWEPT_PAGES)
    for arch, port in PORTS.items():
        isa = ISAS.get(port.isa)
        logged = LoggedLoop(arch, _SWEPT_PAGES, pattern)
        bare = None if isa is None else BareLoop(isa, _SWEPT_PAGES, pattern, virtual_tlb=True)
        us: dict[str, list[float]] = {"logged": [], "anchor": []}
        with DirtyLog(logged.memory) as log:
            logged.lap()
            if bare is not None:
                bare.lap()
            # The trace CPU's anchor is a second lap on the same TLB, so it comes after the first, always.
            order = alternate(("anchor", "logged"), rounds) if bare else ((i, n) for i in range(rounds) for n in us)
            for _, name in order:
                if name == "logged":
                    assert log.get(0).count() == _SWEPT_PAGES
                    logged.flush()
                    seconds = logged.lap()
                elif bare is not None:
                    bare.flush()
                    seconds = bare.lap()
                else:
                    seconds = logged.lap()
                us[name].append(seconds / _SWEPT_PAGES * 1e6)
        logged.memory.close()
        pairs = list(zip(us["logged"], us["anchor"], strict=True))
        section.rows.append(
            {
                "port": arch,
                "instruction set": port.isa,
                "first store, us": Spread.of(us["logged"]),
                "anchor, us": Spread.of(us["anchor"]),
                "difference, us": Spread.of(first - least for first, least in pairs),
                "ratio": Spread.of(first / least for first, least in pairs),
            }
        )
    values = section.values("port", "first store, us")
    section.targets.append(Target("a first store to a page at most 8 us", 8, "us", values))
    return section
