"""Assembles the guest programs with the cross binutils: as a script, writes the bytes beside their sources."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import find_tool

GUESTS = Path(__file__).parents[1] / "src" / "dirtylog" / "guests"

TARGETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "x86": ("x86_64", ("--64",)),
    "arm": ("arm", ()),
    "arm64": ("aarch64", ()),
    "mips": ("mips", ("-EB", "-mips32")),
    "ppc32": ("powerpc", ("-a32",)),
    "ppc64": ("powerpc64", ("-a64",)),
    "riscv64": ("riscv64", ("-march=rv64imafdc",)),
    "s390x": ("s390x", ()),
}
"""Program: (binutils target, assembler options)."""


def missing_tool(program: str) -> str | None:
    """Return the name of what is missing to assemble a program, or None."""
    target, _ = TARGETS[program]
    tools = (find_tool(target, tool) for tool in ("as", "ld", "objcopy", "nm"))
    return None if all(tools) else f"binutils for {target}"


def assemble(program: str) -> tuple[bytes, int]:
    """Return a program's bytes and the offset of its label halt."""
    target, options = TARGETS[program]

    def run(tool: str, *arguments: str) -> str:
        path = find_tool(target, tool)
        assert path is not None, f"{missing_tool(program)} is not installed"
        return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout

    with tempfile.TemporaryDirectory() as directory:
        stem = str(Path(directory, program))
        run("as", *options, "-o", f"{stem}.o", str(GUESTS / f"{program}.S"))
        run("ld", "-Ttext=0", "-e", "_start", "-o", f"{stem}.elf", f"{stem}.o")
        run("objcopy", "-O", "binary", "-j", ".text", f"{stem}.elf", f"{stem}.bin")
        symbols = {line.split()[-1]: int(line.split()[0], 16) for line in run("nm", f"{stem}.elf").splitlines()}
        return Path(f"{stem}.bin").read_bytes(), symbols["halt"]


if __name__ == "__main__":
    for name in TARGETS:
        lacks = missing_tool(name)
        if lacks:
            sys.exit(f"cannot assemble {name}: {lacks} is not installed")
        code, halt = assemble(name)
        (GUESTS / f"{name}.bin").write_bytes(code)
        print(f"{name}: {len(code)} bytes, halt at {halt:#x}")
