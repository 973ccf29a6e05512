/* All registers that a thread of x86_64 has, given known values, and looked at after a while of computing or a system call. */

#include <cpuid.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { RAX, RBX, RCX, RDX, RSI, RDI, RBP, R8, R9, R10, R11, R12, R13, R14, R15, GENERAL };
enum { RED_ZONE_WORDS = 16, XSTATE_BYTES = 16384 };

struct registers {
    uint64_t general[GENERAL];
    uint64_t flags;
    uint64_t red_zone[RED_ZONE_WORDS]; /* the 128 bytes below the stack pointer, which no signal handler may touch */
};

struct extended {
    unsigned char bytes[XSTATE_BYTES];
} __attribute__((aligned(64)));

/* x87, SSE, AVX, and the three parts of AVX-512: all that a program computes with. */
enum { X87 = 1, SSE = 2, WANTED = 0xe7 };
uint32_t extended_mask;

/* With spins 0: make the system call that `in` describes. Else: count down, with every register and flag as `in` says. */
void hold_registers(const struct registers *in, struct registers *out, const struct extended *extended_in,
                    struct extended *extended_out, const struct extended *home, uint64_t spins);

__asm__(".text\n"
        ".globl hold_registers\n"
        ".type hold_registers, @function\n"
        "hold_registers:\n"
        "  push %rbx\n  push %rbp\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
        "  push %r8\n  push %rcx\n  push %rsi\n  push %r9\n  push $0\n"
        "  mov %rdx, %r10\n  mov extended_mask(%rip), %eax\n  xor %edx, %edx\n  xrstor64 (%r10)\n"
        "  pushq 120(%rdi)\n  popfq\n" /* from here on nothing changes a flag */
        ".set word, 0\n"
        ".rept 16\n"
        "  mov 128+8*word(%rdi), %rax\n  mov %rax, -128+8*word(%rsp)\n"
        "  .set word, word+1\n"
        ".endr\n"
        "  mov (%rdi), %rax\n  mov 8(%rdi), %rbx\n  mov 24(%rdi), %rdx\n  mov 32(%rdi), %rsi\n  mov 48(%rdi), %rbp\n"
        "  mov 56(%rdi), %r8\n  mov 64(%rdi), %r9\n  mov 72(%rdi), %r10\n  mov 80(%rdi), %r11\n  mov 88(%rdi), %r12\n"
        "  mov 96(%rdi), %r13\n  mov 104(%rdi), %r14\n  mov 112(%rdi), %r15\n  mov 40(%rdi), %rdi\n"
        "  mov 8(%rsp), %rcx\n"
        "  jrcxz 2f\n"
        "1: lea -1(%rcx), %rcx\n  jrcxz 3f\n  jmp 1b\n"
        "2: syscall\n"
        "3: mov %rax, (%rsp)\n  mov 16(%rsp), %rax\n"
        "  mov %rbx, 8(%rax)\n  mov %rcx, 16(%rax)\n  mov %rdx, 24(%rax)\n  mov %rsi, 32(%rax)\n  mov %rdi, 40(%rax)\n"
        "  mov %rbp, 48(%rax)\n  mov %r8, 56(%rax)\n  mov %r9, 64(%rax)\n  mov %r10, 72(%rax)\n  mov %r11, 80(%rax)\n"
        "  mov %r12, 88(%rax)\n  mov %r13, 96(%rax)\n  mov %r14, 104(%rax)\n  mov %r15, 112(%rax)\n"
        "  mov (%rsp), %rbx\n  mov %rbx, (%rax)\n"
        ".set word, 0\n"
        ".rept 16\n"
        "  mov -128+8*word(%rsp), %rbx\n  mov %rbx, 128+8*word(%rax)\n"
        "  .set word, word+1\n"
        ".endr\n"
        "  pushfq\n  popq 120(%rax)\n  cld\n"
        "  mov extended_mask(%rip), %eax\n  xor %edx, %edx\n  mov 24(%rsp), %r10\n  xsave64 (%r10)\n"
        "  mov 32(%rsp), %r10\n  xrstor64 (%r10)\n"
        "  add $40, %rsp\n"
        "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbp\n  pop %rbx\n"
        "  ret\n"
        ".size hold_registers, .-hold_registers\n");

static uint64_t next_pattern(uint64_t *seed) {
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return *seed ^ *seed >> 31;
}

static void find_extended_mask(void) {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    extended_mask = low & WANTED;
}

static void save_extended(struct extended *state) {
    memset(state, 0, sizeof *state);
    __asm__ volatile("xsave64 %0" : "+m"(*state) : "a"(extended_mask), "d"(0));
}

static void component(int number, unsigned *offset, unsigned *nbytes) {
    unsigned none1, none2;
    __cpuid_count(0xd, number, *nbytes, *offset, none1, none2);
}

/* Every register of every unit, with all rounding modes, and sticky exceptions that are masked. */
static void fill_extended(struct extended *state, uint64_t *seed) {
    unsigned char *bytes = state->bytes;
    memset(bytes, 0, 576);
    for (int number = 2; number < 8; number++)
        if (extended_mask & 1u << number) {
            unsigned offset, nbytes;
            component(number, &offset, &nbytes);
            for (unsigned at = 0; at < nbytes; at += 8) {
                uint64_t value = next_pattern(seed);
                memcpy(bytes + offset + at, &value, 8);
            }
        }
    uint16_t control = 0x037f | (next_pattern(seed) & 3) << 10, status = (next_pattern(seed) & 7) << 11 | 0x4700;
    uint32_t mxcsr = 0x1f80 | (next_pattern(seed) & 3) << 13 | (next_pattern(seed) & 0x3f);
    memcpy(bytes, &control, 2);
    memcpy(bytes + 2, &status, 2);
    bytes[4] = 0xff; /* no x87 register is empty */
    memcpy(bytes + 24, &mxcsr, 4);
    for (int number = 0; number < 8; number++) {
        uint64_t significand = next_pattern(seed) | 1ull << 63;
        uint16_t exponent = 0x3f00 | (next_pattern(seed) & 0xff);
        memcpy(bytes + 32 + 16 * number, &significand, 8);
        memcpy(bytes + 40 + 16 * number, &exponent, 2);
    }
    for (int at = 160; at < 416; at += 8) {
        uint64_t value = next_pattern(seed);
        memcpy(bytes + at, &value, 8);
    }
    memcpy(bytes + 512, &(uint64_t){extended_mask}, 8);
}

/* Return what differs, or NULL. The last instruction's address, which AMD's processors do not keep, does not count. */
static const char *extended_difference(const struct extended *want, const struct extended *have) {
    const unsigned char *a = want->bytes, *b = have->bytes;
    if (memcmp(a, b, 5))
        return "the x87 control, status or tag word";
    if (memcmp(a + 24, b + 24, 4))
        return "MXCSR";
    for (int number = 0; number < 8; number++)
        if (memcmp(a + 32 + 16 * number, b + 32 + 16 * number, 10))
            return "an x87 register";
    if (memcmp(a + 160, b + 160, 256))
        return "an xmm register";
    for (int number = 2; number < 8; number++)
        if (extended_mask & 1u << number) {
            unsigned offset, nbytes;
            component(number, &offset, &nbytes);
            if (memcmp(a + offset, b + offset, nbytes))
                return number == 2 ? "the upper half of a ymm register" : number == 5 ? "a mask register" : "a zmm register";
        }
    return NULL;
}

static void fill_registers(struct registers *state, uint64_t *seed) {
    for (int number = 0; number < GENERAL; number++)
        state->general[number] = next_pattern(seed);
    for (int number = 0; number < RED_ZONE_WORDS; number++)
        state->red_zone[number] = next_pattern(seed);
    /* carry, parity, adjust, zero, sign, direction and overflow; one bit is always set, and so are interrupts */
    state->flags = 0x202 | (next_pattern(seed) & 0xcd5);
}

/* Return whether all is as it was. A system call's result is in rax, and it leaves rcx and r11 to itself. */
static int registers_differ(const struct registers *want, const struct registers *have, int called, char *what, size_t nbytes) {
    static const char *const names[] = {"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8",
                                        "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};
    for (int number = 0; number < GENERAL; number++) {
        uint64_t expected = !called && number == RCX ? 0 : want->general[number];
        if (called && (number == RAX || number == RCX || number == R11))
            continue;
        if (have->general[number] != expected) {
            snprintf(what, nbytes, "%s is %#lx, not %#lx", names[number], have->general[number], expected);
            return 1;
        }
    }
    if (have->flags != want->flags) {
        snprintf(what, nbytes, "flags are %#lx, not %#lx", have->flags, want->flags);
        return 1;
    }
    if (memcmp(have->red_zone, want->red_zone, sizeof want->red_zone)) {
        snprintf(what, nbytes, "the red zone was overwritten");
        return 1;
    }
    return 0;
}
