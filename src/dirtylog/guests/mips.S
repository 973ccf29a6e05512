# The store loop for mips (MIPS32, big-endian).
#
#     do { store value at base + page * 4096
#          value += step
#          page = (page * mul + add) & mask
#          count -= tick } while (count != 0)
#
# The host sets every register before entry: count = 0 is an idle guest, tick = 0 one that never stops.
# The vCPU halts when it reaches the label halt; isa.py has its offset.
# Registers: $4 page, $5 mul, $6 add, $7 mask, $8 base, $9 value, $10 step, $11 count, $12 tick, $13 scratch
        .set    noreorder
        .set    nomacro
        .text
        .globl  _start
_start: beq     $11, $0, halt
        nop
loop:   sll     $13, $4, 12
        addu    $13, $8, $13
        sw      $9, 0($13)
        addu    $9, $9, $10
        mul     $4, $4, $5
        addu    $4, $4, $6
        and     $4, $4, $7
        subu    $11, $11, $12
        bne     $11, $0, loop
        nop
halt:   beq     $0, $0, halt
        nop
