# The store loop for ppc (32-bit, big-endian).
#
#     do { store value at base + page * 4096
#          value += step
#          page = (page * mul + add) & mask
#          count -= tick } while (count != 0)
#
# The host sets every register before entry: count = 0 is an idle guest, tick = 0 one that never stops.
# The vCPU halts when it reaches the label halt; isa.py has its offset.
# Registers: r3 page, r4 mul, r5 add, r6 mask, r7 base, r8 value, r9 step, r10 count, r11 tick, r12 scratch
        .text
        .globl  _start
_start: cmpwi   10, 0
        beq     halt
loop:   slwi    12, 3, 12
        stwx    8, 7, 12
        add     8, 8, 9
        mullw   3, 3, 4
        add     3, 3, 5
        and     3, 3, 6
        subf.   10, 11, 10
        bne     loop
halt:   b       halt
