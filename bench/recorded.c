// The target of the recording benchmark, and the least that can log it.
//
// recorded write FILE PAGES DIRTY   maps PAGES pages, touches each, and prints their address. Then, ten times a second, it stores to
//                                   DIRTY of them, drawn at random; meanwhile it adds up 4 KiB, over and over. It counts the sums in
//                                   the first 64-bit word of FILE, until it is killed.
// recorded scan PID START END       ten times a second, takes and arms what PID has written between these addresses, until its input
//                                   ends. It prints the nanoseconds of the calls, and the pages found.

#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "buffers.h"

enum { CAPACITY = 65536, SUMMED = 1024, A_TIME = 16 };

static const int64_t PERIOD = 100000000;

static void check(int failed, const char *what)
{
    if (failed)
        err(1, "%s", what);
}

static uint32_t draw(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 32;
}

static int spin(volatile uint64_t *sums, int64_t npages, int64_t dirty)
{
    uint8_t *memory = mmap(NULL, (npages + 2) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(memory == MAP_FAILED, "mmap");
    // A mapping of its own: with neighbours that may not be written it is not merged with any.
    memory += PAGE;
    check(mprotect(memory, npages * PAGE, PROT_READ | PROT_WRITE), "mprotect");
    madvise(memory, npages * PAGE, MADV_NOHUGEPAGE);
    for (int64_t page = 0; page < npages; page++)
        memory[page * PAGE] = 1;
    printf("%p\n", (void *)memory);
    fflush(stdout);
    static volatile uint32_t numbers[SUMMED];
    uint64_t state = 1;
    for (int64_t next = now();; next += PERIOD) {
        while (now() < next) {
            for (int time = 0; time < A_TIME; time++)
                for (int number = 0; number < SUMMED; number++)
                    numbers[number] += number;
            *sums += A_TIME;
        }
        for (int64_t store = 0; store < dirty; store++)
            ((volatile uint8_t *)memory)[draw(&state) % npages * PAGE]++;
    }
}

static int scan(const char *pid, uint64_t start, uint64_t end)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%s/pagemap", pid);
    int pagemap = open(path, O_RDONLY | O_CLOEXEC);
    check(pagemap < 0, path);
    struct region *vector = calloc(CAPACITY, sizeof *vector);
    int64_t spent = 0, found, pages = 0;
    fcntl(STDIN_FILENO, F_SETFL, O_NONBLOCK);
    char octet;
    while (read(STDIN_FILENO, &octet, 1) != 0) {
        usleep(PERIOD / 1000);
        int64_t nanoseconds = scan_all(pagemap, start, end, vector, CAPACITY, &found);
        errno = -nanoseconds;
        check(nanoseconds < 0, "PAGEMAP_SCAN");
        spent += nanoseconds;
        pages += found;
    }
    printf("%lld %lld\n", (long long)spent, (long long)pages);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc != 5)
        errx(2, "usage: recorded write FILE PAGES DIRTY | scan PID START END");
    prctl(PR_SET_PDEATHSIG, 9);
    if (!strcmp(argv[1], "scan"))
        return scan(argv[2], strtoull(argv[3], NULL, 0), strtoull(argv[4], NULL, 0));
    int file = open(argv[2], O_RDWR | O_CLOEXEC);
    check(file < 0, argv[2]);
    uint64_t *sums = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    check(sums == MAP_FAILED, argv[2]);
    return spin(sums, strtoll(argv[3], NULL, 0), strtoll(argv[4], NULL, 0));
}
