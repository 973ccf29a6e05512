/* Where churn.c churns, and the stores: to the playground, to the heap, to huge pages. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096L
#define HUGE_PAGES 512L
#define NPAGES 16384L
#define GROUND ((unsigned char *)0x100000000000)
#define HUGE_GROUND ((unsigned char *)0x180000000000)
#define HEAP_PAGES 2048L
#define HUGES 2L
#define MAX_WRITERS 16

enum kind { NOTHING, ANONYMOUS, PRIVATE_FILE, SHARED_FILE };

static unsigned char kind_of[NPAGES]; /* the churner's alone */
static unsigned char *heap;
static int source, memory_file, disk_file, disk_source, has_huge;
static atomic_ulong stores, changes;
static _Thread_local sigjmp_buf escape; /* out of a store that finds nothing */

static uint64_t next(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state * 0x2545F4914F6CDD1D;
}

static long below(uint64_t *state, long limit) { return (long)(next(state) >> 33) % limit; }

static void must(int good, const char *what) {
    if (!good) {
        perror(what);
        _exit(3);
    }
}

/* A window to store to: cold pages are visited once in seconds, so that one that was lost stays lost for a while. */
static unsigned char *window(uint64_t *state, long npages) {
    long choice = below(state, 100);
    if (choice < 8)
        return heap + below(state, HEAP_PAGES - npages) * PAGE;
    if (choice < 10 && has_huge)
        return HUGE_GROUND + below(state, HUGES * HUGE_PAGES - npages) * PAGE;
    double cold = (double)below(state, 1 << 20) / (1 << 20);
    return GROUND + (long)(cold * cold * cold * (double)(NPAGES - npages)) * PAGE;
}

static void store(uint64_t *state, unsigned char *base, long npages) {
    switch (below(state, 8)) {
    case 0:
        memset(base, (int)next(state), (size_t)(npages * PAGE));
        break;
    case 1: /* the kernel's own stores */
        if (pread(source, base + below(state, PAGE), (size_t)(npages * PAGE / 2), below(state, 64) * PAGE) < 0 && errno != EFAULT)
            must(0, "pread");
        break;
    case 2: /* across the border of two pages */
        for (long page = 1; page < npages; page++) {
            uint64_t value = next(state);
            memcpy(base + page * PAGE - 4, &value, sizeof value);
        }
        break;
    default:
        for (long page = 0; page < npages; page++) {
            atomic_fetch_add((_Atomic uint64_t *)(base + page * PAGE + below(state, PAGE / 8) * 8), next(state) | 1);
            atomic_fetch_add_explicit(&stores, 1, memory_order_relaxed);
        }
    }
}
