// The store loop for arm (A32).
//
//     do { store value at base + page * 4096
//          value += step
//          page = (page * mul + add) & mask
//          count -= tick } while (count != 0)
//
// The host sets every register before entry: count = 0 is an idle guest, tick = 0 one that never stops.
// The vCPU halts when it reaches the label halt; isa.py has its offset.
// Registers: r0 page, r1 mul, r2 add, r3 mask, r4 base, r5 value, r6 step, r7 count, r8 tick, r9 scratch
        .arch   armv7-a
        .arm
        .text
        .globl _start
_start: cmp     r7, #0
        beq     halt
loop:   add     r9, r4, r0, lsl #12
        str     r5, [r9]
        add     r5, r5, r6
        mul     r9, r0, r1
        add     r0, r9, r2
        and     r0, r0, r3
        subs    r7, r7, r8
        bne     loop
halt:   b       halt
