// The bare loops, as a library that is called on the memory of the process that measures.

#include "buffers.h"

int64_t store(void *memory, const int64_t *pages, int64_t count, uint8_t value)
{
    return store_to(memory, pages, count, value);
}

int64_t scan(int pagemap, uint64_t start, uint64_t end, struct region *vector, uint64_t capacity, int64_t *found)
{
    return scan_all(pagemap, start, end, vector, capacity, found);
}
