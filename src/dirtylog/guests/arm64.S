// The store loop for arm64 (A64).
//
//     do { store value at base + page * 4096
//          value += step
//          page = (page * mul + add) & mask
//          count -= tick } while (count != 0)
//
// The host sets every register before entry: count = 0 is an idle guest, tick = 0 one that never stops.
// The vCPU halts when it reaches the label halt; isa.py has its offset.
// Registers: x0 page, x1 mul, x2 add, x3 mask, x4 base, x5 value, x6 step, x7 count, x8 tick, x9 scratch
        .text
        .globl _start
_start: cbz     x7, halt
loop:   add     x9, x4, x0, lsl #12
        str     x5, [x9]
        add     x5, x5, x6
        madd    x0, x0, x1, x2
        and     x0, x0, x3
        subs    x7, x7, x8
        b.ne    loop
halt:   b       halt
