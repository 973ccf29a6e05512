// What the bare loops of the buffer benchmarks share: a store to each of a list of pages, and a scan that arms again.
//
// The structs are declared here, for PAGEMAP_SCAN is younger (Linux 6.7) than many a compiler's headers.
// Sources: Linux include/uapi/linux/userfaultfd.h and include/uapi/linux/fs.h.

#include <errno.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <time.h>

enum { PAGE = 4096, WP_MATCHING = 1, CHECK_WPASYNC = 2, WRITTEN = 2 };

struct region {
    uint64_t start, end, categories;
};

struct scan_argument {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

static const unsigned long SCAN = _IOWR('f', 16, struct scan_argument);

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

// Store one byte to each page; return the nanoseconds that it takes.
static int64_t store_to(volatile uint8_t *memory, const int64_t *pages, int64_t count, uint8_t value)
{
    int64_t begin = now();
    for (int64_t number = 0; number < count; number++)
        memory[pages[number] * PAGE] = value;
    return now() - begin;
}

// Take the written pages and arm them again. Return the nanoseconds of the calls alone, or the negative errno; *found is the number
// of pages.
static int64_t scan_all(int pagemap, uint64_t start, uint64_t end, struct region *vector, uint64_t capacity, int64_t *found)
{
    struct scan_argument argument = {
        .size = sizeof argument, .flags = WP_MATCHING | CHECK_WPASYNC, .start = start, .end = end, .vec = (uintptr_t)vector,
        .vec_len = capacity, .category_mask = WRITTEN, .return_mask = WRITTEN};
    int64_t spent = 0;
    *found = 0;
    while (argument.start < end) {
        int64_t begin = now();
        int count = ioctl(pagemap, SCAN, &argument);
        spent += now() - begin;
        if (count < 0)
            return -errno;
        for (int number = 0; number < count; number++)
            *found += (vector[number].end - vector[number].start) / PAGE;
        argument.start = argument.walk_end;
    }
    return spent;
}
