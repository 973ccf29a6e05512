// The store loop for x86 (64-bit mode).
//
//     do { store value at base + page * 4096
//          value += step
//          page = (page * mul + add) & mask
//          count -= tick } while (count != 0)
//
// The host sets every register before entry: count = 0 is an idle guest, tick = 0 one that never stops.
// The vCPU halts when it reaches the label halt; isa.py has its offset.
// Registers: rsi page, r8 mul, r9 add, rdx mask, rdi base, rax value, rbx step, rcx count, r10 tick, r11 scratch
        .intel_syntax noprefix
        .text
        .globl _start
_start: test    rcx, rcx
        jz      halt
loop:   mov     r11, rsi
        shl     r11, 12
        mov     [rdi + r11], rax
        add     rax, rbx
        imul    rsi, r8
        add     rsi, r9
        and     rsi, rdx
        sub     rcx, r10
        jnz     loop
halt:   hlt
