// Ways to find out which pages of one's own memory were written, in C: anchors of the buffer benchmarks.
//
// usage: trackers uffd|mprotect|fork PAGES DIRTY < COMMANDS
//
// Makes PAGES pages of memory, and reads the numbers of DIRTY pages (int64) from standard input. Then, for each byte that it reads, a
// round: stores to each of those pages, stores to each of them again, finds the written pages, and arms. Prints the nanoseconds of
// either stores, of finding and arming, and the number of pages that it found.
//
// uffd      userfaultfd's asynchronous write protection, PAGEMAP_SCAN
// mprotect  memory is read-only; a handler of SIGSEGV notes the page and makes it writable; to arm is to protect all
// fork      a child holds the memory as it was, so that what is written is copied; what is this process's alone was written, says
//           /proc/self/pagemap (bit 56); to arm is to end the child and fork another

#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "buffers.h"

enum { CAPACITY = 65536, USER_MODE_ONLY = 1, REGISTER_MODE_WP = 2, EXCLUSIVE = 56 };

struct api {
    uint64_t api, features, ioctls;
};

struct registration {
    uint64_t start, length, mode, ioctls;
};

#ifndef SYS_userfaultfd
#define SYS_userfaultfd __NR_userfaultfd
#endif

static uint8_t *memory;
static int64_t npages;

static void check(int failed, const char *what)
{
    if (failed)
        err(1, "%s", what);
}

static int open_pagemap(void)
{
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    check(pagemap < 0, "/proc/self/pagemap");
    return pagemap;
}

// --- userfaultfd

static int pagemap;
static struct region *vector;

static int64_t uffd_find(int64_t *found)
{
    uint64_t start = (uintptr_t)memory;
    int64_t spent = scan_all(pagemap, start, start + npages * PAGE, vector, CAPACITY, found);
    errno = -spent;
    check(spent < 0, "PAGEMAP_SCAN");
    return spent;
}

static void uffd_begin(void)
{
    int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | USER_MODE_ONLY);
    check(uffd < 0, "userfaultfd");
    // WP_HUGETLBFS_SHMEM, WP_UNPOPULATED, WP_ASYNC: what dirtylog asks for.
    struct api api = {.api = 0xaa, .features = 1 << 12 | 1 << 13 | 1 << 15};
    check(ioctl(uffd, _IOWR(0xaa, 0x3f, struct api), &api), "UFFDIO_API");
    struct registration range = {.start = (uintptr_t)memory, .length = npages * PAGE, .mode = REGISTER_MODE_WP};
    check(ioctl(uffd, _IOWR(0xaa, 0x00, struct registration), &range), "UFFDIO_REGISTER");
    pagemap = open_pagemap();
    vector = calloc(CAPACITY, sizeof *vector);
    memset(vector, 0, CAPACITY * sizeof *vector);
    int64_t found;
    uffd_find(&found);
}

// --- mprotect

static int64_t *noted, count_noted;

static void note(int signal, siginfo_t *info, void *context)
{
    (void)signal, (void)context;
    int64_t page = ((uint8_t *)info->si_addr - memory) / PAGE;
    if (page < 0 || page >= npages || mprotect(memory + page * PAGE, PAGE, PROT_READ | PROT_WRITE))
        _exit(3);
    noted[count_noted++] = page;
}

static int64_t mprotect_find(int64_t *found)
{
    int64_t begin = now();
    *found = count_noted;
    count_noted = 0;
    check(mprotect(memory, npages * PAGE, PROT_READ), "mprotect");
    return now() - begin;
}

static void mprotect_begin(void)
{
    noted = calloc(npages, sizeof *noted);
    struct sigaction action = {.sa_sigaction = note, .sa_flags = SA_SIGINFO};
    check(sigaction(SIGSEGV, &action, NULL), "sigaction");
    int64_t found;
    mprotect_find(&found);
}

// --- fork

static pid_t child;
static uint64_t *entries;

static void make_child(void)
{
    child = fork();
    check(child < 0, "fork");
    if (!child) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;)
            pause();
    }
}

static int64_t fork_find(int64_t *found)
{
    int64_t begin = now();
    *found = 0;
    size_t nbytes = npages * sizeof *entries;
    check(pread(pagemap, entries, nbytes, (uintptr_t)memory / PAGE * sizeof *entries) != (ssize_t)nbytes, "pagemap");
    for (int64_t page = 0; page < npages; page++)
        *found += entries[page] >> EXCLUSIVE & 1;
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    make_child();
    return now() - begin;
}

static void fork_begin(void)
{
    pagemap = open_pagemap();
    entries = calloc(npages, sizeof *entries);
    make_child();
}

static void fork_end(void)
{
    kill(child, SIGKILL);
}

static void nothing(void)
{
}

static const struct tracker {
    const char *name;
    void (*begin)(void);
    int64_t (*find)(int64_t *found);
    void (*end)(void);
} TRACKERS[] = {
    {"uffd", uffd_begin, uffd_find, nothing},
    {"mprotect", mprotect_begin, mprotect_find, nothing},
    {"fork", fork_begin, fork_find, fork_end},
};

int main(int argc, char **argv)
{
    if (argc != 4)
        errx(2, "usage: trackers uffd|mprotect|fork PAGES DIRTY");
    const struct tracker *tracker = TRACKERS;
    while (strcmp(tracker->name, argv[1]))
        if (++tracker == TRACKERS + sizeof TRACKERS / sizeof *TRACKERS)
            errx(2, "%s: not a tracker", argv[1]);
    npages = atoll(argv[2]);
    int64_t dirty = atoll(argv[3]), *pages = malloc(dirty * sizeof *pages);
    if (fread(pages, sizeof *pages, dirty, stdin) != (size_t)dirty)
        errx(2, "no page numbers");

    memory = mmap(NULL, npages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(memory == MAP_FAILED, "mmap");
    madvise(memory, npages * PAGE, MADV_NOHUGEPAGE);
    memset(memory, 1, npages * PAGE);
    tracker->begin();
    for (uint8_t round = 1; getchar() != EOF; round++) {
        int64_t first = store_to(memory, pages, dirty, round), later = store_to(memory, pages, dirty, round), found;
        int64_t find = tracker->find(&found);
        printf("%lld %lld %lld %lld\n", (long long)first, (long long)later, (long long)find, (long long)found);
        fflush(stdout);
    }
    tracker->end();
}
