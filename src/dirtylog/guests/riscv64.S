# The store loop for riscv64.
#
#     do { store value at base + page * 4096
#          value += step
#          page = (page * mul + add) & mask
#          count -= tick } while (count != 0)
#
# The host sets every register before entry: count = 0 is an idle guest, tick = 0 one that never stops.
# The vCPU halts when it reaches the label halt; isa.py has its offset.
# Registers: a0 page, a1 mul, a2 add, a3 mask, a4 base, a5 value, a6 step, a7 count, t0 tick, t1 scratch
        .option norvc
        .text
        .globl  _start
_start: beqz    a7, halt
loop:   slli    t1, a0, 12
        add     t1, a4, t1
        sd      a5, 0(t1)
        add     a5, a5, a6
        mul     a0, a0, a1
        add     a0, a0, a2
        and     a0, a0, a3
        sub     a7, a7, t0
        bnez    a7, loop
halt:   j       halt
