// The other process of the process benchmarks, and the bare loop that reads its memory.

#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, AT_ONCE = 1024 };

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

// Read runs of pages of another process, 1024 at a call, to one place after the other; return the nanoseconds, or -1.
int64_t read_runs(int pid, const struct iovec *runs, int64_t count, char *out)
{
    int64_t begin = now();
    for (int64_t first = 0; first < count; first += AT_ONCE) {
        int64_t number = count - first < AT_ONCE ? count - first : AT_ONCE;
        struct iovec local = {.iov_base = out};
        for (int64_t run = first; run < first + number; run++)
            local.iov_len += runs[run].iov_len;
        if (process_vm_readv(pid, &local, 1, runs + first, number, 0) != (ssize_t)local.iov_len)
            return -1;
        out += local.iov_len;
    }
    return now() - begin;
}

// Map and touch as many pages as the argument says, print their address, and sleep until the input ends.
int main(int argc, char **argv)
{
    size_t nbytes = argc > 1 ? strtoull(argv[1], NULL, 0) * PAGE : 0;
    char *memory = mmap(NULL, nbytes + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return 1;
    // A mapping of its own: with neighbours that may not be written it is not merged with any.
    memory += PAGE;
    mprotect(memory, nbytes, PROT_READ | PROT_WRITE);
    madvise(memory, nbytes, MADV_NOHUGEPAGE);
    for (size_t offset = 0; offset < nbytes; offset += PAGE)
        memory[offset] = 1;
    printf("%p\n", (void *)memory);
    fflush(stdout);
    while (getchar() != EOF)
        ;
    return 0;
}
