"""What a KVM guest needs to know of the architecture that it runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dirtylog.kvm.system import KvmSystem
    from dirtylog.kvm.vcpu import KvmVcpu


class Rom(NamedTuple):
    """What a guest starts from and cannot write: tables, and a program behind them."""

    address: int
    data: bytes
    program: int
    """Guest-physical address of the program."""


class ReadyState(Protocol):
    """A state of one vCPU that can be restored fast."""

    def restore(self) -> None:
        """Set it. The vCPU must not be running, and no access may be left to be completed."""


class Architecture(Protocol):
    """The hooks of one architecture. Addresses are guest-physical and guests see memory where it lies."""

    isa: ClassVar[str]
    """The instruction set of its guests, as :mod:`dirtylog.guests` names its store loop."""
    ring_offset_pages: ClassVar[int]
    """KVM_DIRTY_LOG_PAGE_OFFSET: where in the vcpu descriptor the dirty ring lies."""
    ring_alone_loses_pages: ClassVar[bool]
    """Whether a dirty ring is only whole together with KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP."""
    hole: ClassVar[tuple[int, int]]
    """Guest-physical addresses from and to which no memory may lie."""
    loop_registers: ClassVar[tuple[str, ...]]
    """The registers that hold the store loop's page, mul, add, mask, base, value, step, count and tick."""

    stack_register: ClassVar[str]

    def make_rom(self, address: int, reach: int, program: bytes) -> Rom:
        """Return tables under which a guest can use every address below ``reach`` (at least 16 GiB), to lie at ``address``."""

    def start(self, system: KvmSystem, vcpu: KvmVcpu, rom: Rom, entry: int, registers: dict[str, int]) -> None:
        """Set every register of a new vCPU so that it begins at ``entry`` with these in its registers, the others 0."""

    def save(self, system: KvmSystem, vcpu: KvmVcpu) -> object:
        """Return the whole state of a vCPU that does not run."""

    def restore(self, vcpu: KvmVcpu, state: object) -> None:
        """Set the whole state of a vCPU that does not run to one that was saved."""

    def registers_of(self, state: object) -> dict[str, str]:
        """Return a saved state as registers by name, in hexadecimal: what a checkpoint keeps."""

    def state_of(self, kind: str, registers: Mapping[str, str]) -> object:
        """Return the state of these registers, or raise :class:`InvalidArgumentError` where such a vCPU has others."""

    def make_ready(self, vcpu: KvmVcpu, state: object) -> ReadyState:
        """Return a saved state of this vCPU made ready to be restored often."""

    def pc(self, vcpu: KvmVcpu) -> int:
        """Return the address of the next instruction of a vCPU that does not run."""
