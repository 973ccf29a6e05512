"""The ports of the software machine, one file an architecture; :data:`PORTS` names them."""

from dirtylog.emulated.arch.arm import ArmPort
from dirtylog.emulated.arch.arm64 import Arm64Port
from dirtylog.emulated.arch.ia64 import Ia64Port
from dirtylog.emulated.arch.loongarch import LoongArchPort
from dirtylog.emulated.arch.mips import MipsPort
from dirtylog.emulated.arch.ppc_hv import PpcHvPort
from dirtylog.emulated.arch.ppc_pv import PpcPvPort
from dirtylog.emulated.arch.riscv import RiscvPort
from dirtylog.emulated.arch.s390 import S390Port
from dirtylog.emulated.arch.x86 import X86PmlPort, X86Port
from dirtylog.emulated.port import SoftwareProtectPort, SoftwareSyncPort

PORTS: dict[str, type[SoftwareProtectPort | SoftwareSyncPort]] = {
    port.name: port
    for port in (
        X86Port,
        X86PmlPort,
        ArmPort,
        Arm64Port,
        MipsPort,
        RiscvPort,
        LoongArchPort,
        PpcHvPort,
        PpcPvPort,
        S390Port,
        Ia64Port,
    )
}
