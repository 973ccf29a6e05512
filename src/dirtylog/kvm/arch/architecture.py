"""What a KVM guest needs to know of the architecture that it runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    from dirtylog.kvm.system import KvmSystem
    from dirtylog.kvm.vcpu import KvmVcpu


class Rom(NamedTuple):
    """What a guest starts from and cannot write: tables, and a program behind them."""

    address: int
    data: bytes
    program: int
    """Guest-physical address of the program."""


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

    def pc(self, vcpu: KvmVcpu) -> int:
        """Return the address of the next instruction of a vCPU that does not run."""
