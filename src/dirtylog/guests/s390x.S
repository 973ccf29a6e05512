# The store loop for s390x.
#
#     do { store value at base + page * 4096
#          value += step
#          page = (page * mul + add) & mask
#          count -= tick } while (count != 0)
#
# The host sets every register before entry: count = 0 is an idle guest, tick = 0 one that never stops.
# The vCPU halts when it reaches the label halt; isa.py has its offset.
# Registers: %r2 page, %r3 mul, %r4 add, %r5 mask, %r6 base, %r7 value, %r8 step, %r9 count, %r10 tick, %r11 scratch
        .text
        .globl  _start
_start: ltgr    %r9, %r9
        je      halt
loop:   sllg    %r11, %r2, 12
        stg     %r7, 0(%r11, %r6)
        agr     %r7, %r8
        msgr    %r2, %r3
        agr     %r2, %r4
        ngr     %r2, %r5
        sgr     %r9, %r10
        jne     loop
halt:   j       halt
