/* Threads that store without Python's lock, one round after the other: the kernel's transact_test (pagemap_ioctl.c). */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

struct crew {
	char *memory;
	long page_size, pages_each, nthreads;
	pthread_barrier_t begin, end;
	atomic_int over;
	atomic_long next;
	pthread_t threads[];
};

static void *work(void *argument)
{
	struct crew *crew = argument;
	char *mine = crew->memory + crew->pages_each * crew->page_size * atomic_fetch_add(&crew->next, 1);

	for (;;) {
		pthread_barrier_wait(&crew->begin);
		if (atomic_load(&crew->over))
			return NULL;
		for (long page = 0; page < crew->pages_each; page++)
			atomic_fetch_add((_Atomic uint64_t *)(mine + page * crew->page_size), 1);
		pthread_barrier_wait(&crew->end);
	}
}

struct crew *crew_start(char *memory, long page_size, long pages_each, long nthreads)
{
	struct crew *crew = calloc(1, sizeof(*crew) + nthreads * sizeof(pthread_t));

	crew->memory = memory;
	crew->page_size = page_size;
	crew->pages_each = pages_each;
	crew->nthreads = nthreads;
	pthread_barrier_init(&crew->begin, NULL, nthreads + 1);
	pthread_barrier_init(&crew->end, NULL, nthreads + 1);
	for (long thread = 0; thread < nthreads; thread++)
		pthread_create(&crew->threads[thread], NULL, work, crew);
	return crew;
}

void crew_begin(struct crew *crew)
{
	pthread_barrier_wait(&crew->begin);
}

void crew_end(struct crew *crew)
{
	pthread_barrier_wait(&crew->end);
}

void crew_stop(struct crew *crew)
{
	atomic_store(&crew->over, 1);
	pthread_barrier_wait(&crew->begin);
	for (long thread = 0; thread < crew->nthreads; thread++)
		pthread_join(crew->threads[thread], NULL);
	pthread_barrier_destroy(&crew->begin);
	pthread_barrier_destroy(&crew->end);
	free(crew);
}

/* Stores that are special: each to its own page. */
void store_nothing(uint64_t *at)
{
	atomic_fetch_add((_Atomic uint64_t *)at, 0);
}

void store_in_vain(uint64_t *at)
{
	uint64_t expected = ~*at;

	atomic_compare_exchange_strong((_Atomic uint64_t *)at, &expected, 1);
}

void prefetch_for_writing(uint64_t *at)
{
	__builtin_prefetch(at, 1, 3);
}
