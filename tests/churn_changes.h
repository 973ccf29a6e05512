/* What the churner of churn.c does to mappings: one change after the other, of a place, a length and a sort chosen at random. */
#include "churn_ground.h"

static int all(long first, long npages, enum kind kind) {
    for (long page = first; page < first + npages; page++)
        if (kind_of[page] != kind)
            return 0;
    return 1;
}

static void become(long first, long npages, enum kind kind) { memset(kind_of + first, kind, (size_t)npages); }

static void drop(long first, long npages) {
    must(!munmap(GROUND + first * PAGE, (size_t)(npages * PAGE)), "munmap");
    become(first, npages, NOTHING);
}

static void map(long first, long npages, int flags, int fd, long offset, enum kind kind) {
    void *where = GROUND + first * PAGE;
    must(mmap(where, (size_t)(npages * PAGE), PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, offset * PAGE) == where, "mmap");
    become(first, npages, kind);
}

/* A failure may come after part of it was done: then both places become holes. */
static void move(uint64_t *state, long first, long npages, int flags) {
    long target = below(state, NPAGES - npages);
    enum kind kind = kind_of[first];
    if ((target < first + npages && first < target + npages) || (kind != ANONYMOUS && kind != PRIVATE_FILE) || !all(first, npages, kind))
        return;
    size_t nbytes = (size_t)(npages * PAGE);
    if (mremap(GROUND + first * PAGE, nbytes, nbytes, MREMAP_MAYMOVE | MREMAP_FIXED | flags, GROUND + target * PAGE) == MAP_FAILED) {
        drop(first, npages);
        drop(target, npages);
        return;
    }
    become(target, npages, kind);
    if (!flags)
        become(first, npages, NOTHING);
}

static void resize(long first, long npages, long new_npages) {
    enum kind kind = kind_of[first];
    if ((kind != ANONYMOUS && kind != PRIVATE_FILE) || !all(first, npages, kind) || first + new_npages > NPAGES)
        return;
    if (mremap(GROUND + first * PAGE, (size_t)(npages * PAGE), (size_t)(new_npages * PAGE), 0) == MAP_FAILED)
        return;
    if (new_npages < npages)
        become(first + new_npages, npages - new_npages, NOTHING);
    else
        become(first + npages, new_npages - npages, kind);
}

static long use_stack(uint64_t *state, long depth) {
    volatile char frame[4000];
    frame[below(state, sizeof frame)] = (char)next(state);
    return depth ? use_stack(state, depth - 1) + frame[7] : 0;
}

/* To private memory only: what a child writes to shared memory is not seen. */
static void fork_and_write(uint64_t *state) {
    pid_t child = fork();
    if (!child) {
        for (int number = 0; number < 50; number++)
            if (!sigsetjmp(escape, 0))
                store(state, heap + below(state, HEAP_PAGES - 8) * PAGE, 8);
        _exit(0);
    }
    while (child > 0 && waitpid(child, NULL, 0) < 0 && errno == EINTR)
        ;
}

static void *live_briefly(void *argument) {
    uint64_t state = (uint64_t)argument;
    use_stack(&state, 20);
    return NULL;
}

static void change(uint64_t *state) {
    long npages = 1 + below(state, 1 << (1 + below(state, 9))), first = below(state, NPAGES - npages);
    unsigned char *where = GROUND + first * PAGE;
    size_t nbytes = (size_t)(npages * PAGE);
    pthread_t brief;
    switch (below(state, 24)) {
    case 0: case 1: case 2: case 3:
        map(first, npages, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0, ANONYMOUS);
        break;
    case 4: case 5:
        drop(first, npages);
        break;
    case 6:
        mprotect(where, nbytes, PROT_READ);
        break;
    case 7: case 8: case 9:
        mprotect(where, nbytes, PROT_READ | PROT_WRITE);
        break;
    case 10:
        mprotect(where, nbytes, below(state, 2) ? PROT_NONE : PROT_READ | PROT_WRITE | PROT_EXEC);
        break;
    case 11: case 12:
        if (all(first, npages, ANONYMOUS))
            madvise(where, nbytes, MADV_DONTNEED);
        break;
    case 13: case 14:
        move(state, first, npages, 0);
        break;
    case 15:
        if (all(first, npages, ANONYMOUS))
            move(state, first, npages, MREMAP_DONTUNMAP);
        break;
    case 16:
        resize(first, npages, below(state, 2) ? npages * 2 : (npages + 1) / 2);
        break;
    case 17:
        map(first, npages, MAP_PRIVATE, below(state, 2) ? source : disk_source, below(state, 64), PRIVATE_FILE);
        break;
    case 18: /* every page of these files has its one place */
        map(first, npages, MAP_SHARED, below(state, 2) ? memory_file : disk_file, first, SHARED_FILE);
        break;
    case 19: {
        long target = below(state, HEAP_PAGES);
        must(!brk(heap + target * PAGE), "brk");
        break;
    }
    case 20:
        use_stack(state, below(state, 400));
        break;
    case 21: /* transparent huge pages */
        first = below(state, NPAGES / HUGE_PAGES) * HUGE_PAGES;
        map(first, HUGE_PAGES, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0, ANONYMOUS);
        madvise(GROUND + first * PAGE, (size_t)(HUGE_PAGES * PAGE), MADV_HUGEPAGE);
        break;
    case 22:
        if (!below(state, 8))
            fork_and_write(state);
        else if (all(first, npages, ANONYMOUS))
            madvise(where, nbytes, 23 /* MADV_POPULATE_WRITE */);
        break;
    default:
        if (!pthread_create(&brief, NULL, live_briefly, (void *)next(state)))
            pthread_join(brief, NULL);
    }
    atomic_fetch_add(&changes, 1);
}
