"""``dirtylog check``: what this host can log."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

from dirtylog.cli.command import Command
from dirtylog.cli.exits import ExitCode
from dirtylog.compare import ComparePort
from dirtylog.emulated.arch import PORTS
from dirtylog.emulated.cpu_unicorn import unicorn_version
from dirtylog.emulated.isa import ISAS
from dirtylog.port import ProtectPort

if TYPE_CHECKING:
    import argparse


class Check(Command):
    """Say what this host can log, what not, why, and how to get it.

    Exits 3 when nothing can be logged.
    """

    example: ClassVar[str] = "dirtylog check"

    @staticmethod
    def prepare(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of check."""
        parser.add_argument("--json", action="store_true", help="print one JSON document")

    def run(self, args: argparse.Namespace) -> ExitCode:
        """Print a line for each source."""
        version = unicorn_version()
        kvm, processes = _kvm(), _processes()
        ports = [_facts(name, version) for name in PORTS]
        if args.json:
            print(
                json.dumps({"schema": "dirtylog/check/1", "unicorn": version, "ports": ports, "kvm": kvm, "processes": processes})
            )
        else:
            _print_kvm(kvm)
            _print_processes(processes)
            print(f"\nUnicorn: {version or 'not installed'}")
            print(f"{'target':<15} {'guest CPU':<18} {'logs a page by':<38} {'exactness':<10} available")
            for port in ports:
                print(f"{port['target']:<15} {port['cpu']:<18} {port['how']:<38} {port['exactness']:<10} {_available(port)}")
        return ExitCode.DONE if kvm["available"] or any(port["available"] for port in ports) else ExitCode.CANNOT


def _kvm() -> dict[str, Any]:
    try:
        from dirtylog.kvm.probe import probe_kvm  # noqa: PLC0415 - it needs Linux, and check works everywhere
    except ImportError as error:
        return {
            "available": False,
            "reason": f"KVM is Linux's ({error})",
            "remedy": "use an emulated guest",
            "capabilities": [],
            "logs": [],
        }
    return asdict(probe_kvm())


def _print_kvm(kvm: dict[str, Any]) -> None:
    if kvm["available"]:
        print(f"KVM: {kvm['device']}, interface version {kvm['api_version']}, {kvm['machine']}")
    else:
        print(f"KVM: {_available(kvm)}")
    for cap in kvm["capabilities"]:
        lack = f"; missing: {cap['remedy']}" if cap["remedy"] else ""
        print(f"  {cap['name']:<28} {cap['value']:>8}  {cap['purpose']}{lack}")
    for log in kvm["logs"]:
        print(f"  kvm --log {log['log']:<8} {log['how']:<40} {_available(log) if kvm['available'] else 'no'}")


def _processes() -> dict[str, Any]:
    try:
        from dirtylog.linux.availability import probe_processes  # noqa: PLC0415 - it needs Linux, and check works everywhere
    except ImportError:
        port = {
            "port": ComparePort.name,
            "how": ComparePort.how,
            "targets": "own buffers",
            "exactness": ComparePort.exactness.value,
            "needs": "as much memory again, and the time to read it",
            "blind_spots": ComparePort.blind_spots,
            "available": True,
            "reason": None,
            "remedy": None,
        }
        return {"ports": [port], "facts": []}
    return asdict(probe_processes())


def _print_processes(processes: dict[str, Any]) -> None:
    print("\nProcess memory: dirtylog.track(buffer), dirtylog run pid:N, dirtylog run -- COMMAND")
    for port in processes["ports"]:
        print(f"  --port {port['port']:<11} {port['how']:<44} {port['exactness']:<9} {_available(port)}")
        print(f"  {'':<18} for {port['targets']}; needs {port['needs']}")
    for fact in processes["facts"]:
        lack = f"; {fact['remedy']}" if fact["remedy"] else ""
        print(f"  {fact['name']:<28} {fact['value']:>8}  {fact['purpose']}{lack}")


def _available(port: dict[str, Any]) -> str:
    return "yes" if port["available"] else "; ".join(filter(None, (f"no: {port['reason']}", port["remedy"])))


def _facts(name: str, unicorn: str | None) -> dict[str, Any]:
    port = PORTS[name]
    traced = port.isa not in ISAS
    missing = not traced and unicorn is None
    return {
        "target": f"emu:{name}",
        "port": name,
        "cpu": "trace" if traced else f"Unicorn {port.isa}",
        "how": port.how,
        "generic": "get_dirty_log_protect" if issubclass(port, ProtectPort) else "get_dirty_log",
        "exactness": port.exactness.value,
        "blind_spots": list(port.blind_spots),
        "available": not missing,
        "reason": "Unicorn is not installed" if missing else None,
        "remedy": "pip install 'dirtylog[emu]'" if missing else None,
    }
