/* Threads that store all over areas of this process, without Python's lock, while one of them discards; all can be told to stand still. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Windows of `window` pages are stored to, which begin `stride` pages apart. */
struct area {
    unsigned char *address;
    long page_size, window, stride, count, discards;
};

struct crew {
    struct area *areas;
    long nareas, nthreads, pause_us;
    int source;
    atomic_int holding, held, over;
    atomic_long next, windows, discards;
    uint64_t seed;
    pthread_t threads[];
};

static uint64_t next(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state * 0x2545F4914F6CDD1D;
}

static long below(uint64_t *state, long limit) { return (long)(next(state) >> 33) % limit; }

static void rest_while_held(struct crew *crew) {
    if (!atomic_load(&crew->holding))
        return;
    atomic_fetch_add(&crew->held, 1);
    while (atomic_load(&crew->holding))
        syscall(SYS_futex, &crew->holding, FUTEX_WAIT, 1, NULL, NULL, 0);
    atomic_fetch_sub(&crew->held, 1);
}

/* The far end of an area is cold: a page that was lost there stays lost for a while. */
static unsigned char *window_of(const struct area *area, uint64_t *state) {
    double cold = (double)below(state, 1 << 20) / (1 << 20);
    return area->address + (long)(cold * cold * (double)area->count) * area->stride * area->page_size;
}

static void store(const struct crew *crew, const struct area *area, uint64_t *state) {
    unsigned char *base = window_of(area, state);
    size_t nbytes = (size_t)(area->window * area->page_size);
    switch (below(state, 8)) {
    case 0:
        memset(base, (int)next(state), nbytes / (size_t)(1 + below(state, 4)));
        break;
    case 1:
        if (pread(crew->source, base, nbytes < 65536 ? nbytes : 65536, below(state, 64) * 4096) < 0)
            abort();
        break;
    case 2: /* one page only, and one byte of it */
        base[below(state, (long)nbytes)] = (unsigned char)next(state);
        break;
    default:
        for (long page = 0; page < area->window; page++) {
            long offset = page * area->page_size + below(state, area->page_size / 8) * 8;
            atomic_fetch_add((_Atomic uint64_t *)(base + offset), next(state) | 1);
        }
    }
}

static void *work(void *argument) {
    struct crew *crew = argument;
    long number = atomic_fetch_add(&crew->next, 1);
    uint64_t state = (crew->seed + (uint64_t)number) * 0x9E3779B97F4A7C15 | 1;

    while (!atomic_load(&crew->over)) {
        const struct area *area = &crew->areas[below(&state, crew->nareas)];
        rest_while_held(crew);
        if (number)
            store(crew, area, &state);
        else if (area->discards) {
            long first = below(&state, area->window), npages = 1 + below(&state, area->window - first);
            madvise(window_of(area, &state) + first * area->page_size, (size_t)(npages * area->page_size), MADV_DONTNEED);
            atomic_fetch_add(&crew->discards, 1);
        }
        atomic_fetch_add(&crew->windows, 1);
        if (!number || !below(&state, 4))
            usleep((useconds_t)below(&state, 2 * crew->pause_us + 1));
    }
    return NULL;
}

struct crew *scribble_start(const struct area *areas, long nareas, long nthreads, int source, long pause_us, uint64_t seed) {
    struct crew *crew = calloc(1, sizeof(*crew) + (size_t)nthreads * sizeof(pthread_t));

    crew->areas = calloc((size_t)nareas, sizeof(*areas));
    memcpy(crew->areas, areas, (size_t)nareas * sizeof(*areas));
    crew->nareas = nareas;
    crew->nthreads = nthreads;
    crew->source = source;
    crew->pause_us = pause_us;
    crew->seed = seed;
    for (long thread = 0; thread < nthreads; thread++)
        pthread_create(&crew->threads[thread], NULL, work, crew);
    return crew;
}

void scribble_hold(struct crew *crew) {
    atomic_store(&crew->holding, 1);
    while (atomic_load(&crew->held) < crew->nthreads)
        usleep(100);
}

void scribble_go(struct crew *crew) {
    atomic_store(&crew->holding, 0);
    syscall(SYS_futex, &crew->holding, FUTEX_WAKE, 1000, NULL, NULL, 0);
    while (atomic_load(&crew->held))
        usleep(100);
}

long scribble_stop(struct crew *crew) {
    long discards;

    atomic_store(&crew->over, 1);
    scribble_go(crew);
    for (long thread = 0; thread < crew->nthreads; thread++)
        pthread_join(crew->threads[thread], NULL);
    discards = atomic_load(&crew->discards);
    free(crew->areas);
    free(crew);
    return discards;
}
