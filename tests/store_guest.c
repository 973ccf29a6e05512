/* The guests' store loop in threads of a process: of this one as a library, of another as a program (with -DPROGRAM). */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE_SHIFT 12

/* The registers of dirtylog.guests.programs.Pattern, in its order. */
struct loop {
	uint64_t page, mul, add, mask, base, value, step, count, tick;
};

struct crew {
	char *memory;
	long nthreads;
	atomic_long next, running;
	atomic_int wanted, over;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	struct loop *loops;
	pthread_t threads[];
};

static void park(struct crew *crew)
{
	pthread_mutex_lock(&crew->lock);
	atomic_fetch_sub(&crew->running, 1);
	pthread_cond_broadcast(&crew->changed);
	while (!atomic_load(&crew->wanted) && !atomic_load(&crew->over))
		pthread_cond_wait(&crew->changed, &crew->lock);
	atomic_fetch_add(&crew->running, 1);
	pthread_mutex_unlock(&crew->lock);
}

static void *work(void *argument)
{
	struct crew *crew = argument;
	struct loop loop = crew->loops[atomic_fetch_add(&crew->next, 1)];

	park(crew);
	for (; loop.count && !atomic_load_explicit(&crew->over, memory_order_relaxed); loop.count -= loop.tick) {
		if (!atomic_load_explicit(&crew->wanted, memory_order_relaxed))
			park(crew);
		*(volatile uint64_t *)(crew->memory + loop.base + (loop.page << PAGE_SHIFT)) = loop.value;
		loop.value += loop.step;
		loop.page = (loop.page * loop.mul + loop.add) & loop.mask;
	}
	pthread_mutex_lock(&crew->lock);
	atomic_fetch_sub(&crew->running, 1);
	crew->nthreads--;
	pthread_cond_broadcast(&crew->changed);
	pthread_mutex_unlock(&crew->lock);
	return NULL;
}

/* Return a crew that stands still. */
struct crew *crew_start(char *memory, const struct loop *loops, long nthreads)
{
	struct crew *crew = calloc(1, sizeof(*crew) + nthreads * sizeof(pthread_t));

	crew->memory = memory;
	crew->loops = calloc(nthreads, sizeof(*loops));
	for (long thread = 0; thread < nthreads; thread++)
		crew->loops[thread] = loops[thread];
	crew->nthreads = nthreads;
	crew->running = nthreads;
	pthread_mutex_init(&crew->lock, NULL);
	pthread_cond_init(&crew->changed, NULL);
	for (long thread = 0; thread < nthreads; thread++)
		pthread_create(&crew->threads[thread], NULL, work, crew);
	return crew;
}

void crew_resume(struct crew *crew)
{
	pthread_mutex_lock(&crew->lock);
	atomic_store(&crew->wanted, 1);
	pthread_cond_broadcast(&crew->changed);
	pthread_mutex_unlock(&crew->lock);
}

void crew_pause(struct crew *crew)
{
	pthread_mutex_lock(&crew->lock);
	atomic_store(&crew->wanted, 0);
	while (atomic_load(&crew->running) > 0)
		pthread_cond_wait(&crew->changed, &crew->lock);
	pthread_mutex_unlock(&crew->lock);
}

long crew_unfinished(struct crew *crew)
{
	return *(volatile long *)&crew->nthreads;
}

void crew_end(struct crew *crew, long nthreads)
{
	atomic_store(&crew->over, 1);
	crew_resume(crew);
	for (long thread = 0; thread < nthreads; thread++)
		pthread_join(crew->threads[thread], NULL);
	free(crew->loops);
	free(crew);
}

#ifdef PROGRAM
/* Pages as the argument; then the registers of each loop. Prints the address, begins when it reads a byte, prints "done" at the end. */
int main(int argc, char **argv)
{
	long npages = strtol(argv[1], NULL, 0), nthreads = (argc - 2) / 9;
	struct loop *loops = calloc(nthreads, sizeof(*loops));
	char *memory = mmap(NULL, (npages + 2) << PAGE_SHIFT, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	for (long index = 0; index < nthreads * 9; index++)
		((uint64_t *)loops)[index] = strtoull(argv[2 + index], NULL, 0);
	/* A mapping of its own: with neighbours that may not be written it cannot be merged with any. */
	memory += 1 << PAGE_SHIFT;
	mprotect(memory, npages << PAGE_SHIFT, PROT_READ | PROT_WRITE);
	printf("%p\n", memory);
	fflush(stdout);
	struct crew *crew = crew_start(memory, loops, nthreads);
	if (getchar() == EOF)
		return 1;
	crew_resume(crew);
	for (long thread = 0; thread < nthreads; thread++)
		pthread_join(crew->threads[thread], NULL);
	puts("done");
	fflush(stdout);
	while (getchar() != EOF)
		;
	return 0;
}
#endif
