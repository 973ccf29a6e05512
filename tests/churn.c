/* A process that lets nobody look at its memory in peace: threads store all over it, while another maps, unmaps, moves, discards and
 * protects under their hands, and signals come a thousand times a second.
 *
 *     churn WRITERS SEED FOLDER PAUSE
 *
 * The playground is at a place of its own, so that nothing else is ever mapped where it has holes. A store that finds a hole is an
 * expected fault, and given up. What a tracker cannot see is left out: no page of a file is mapped twice, and private mappings of
 * files and huge pages of hugetlbfs are not discarded. FOLDER is on a disk; between two changes PAUSE microseconds pass, on average.
 *
 * It says `ready`, and obeys: `hold` returns `held` when every thread stands still, `go` lets them run, `count` says how many changes
 * and stores there were. It ends with its input. */

#include "churn_changes.h"

#include <linux/futex.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/time.h>

static unsigned char alternate[MAX_WRITERS + 1][1 << 16]; /* stacks for signals */
static atomic_ulong alarms;
static int nthreads;
static long pause_us;
static atomic_int held, holding;

static void fault(int number) {
    (void)number;
    siglongjmp(escape, 1);
}

static void alarmed(int number) {
    (void)number;
    atomic_fetch_add(&alarms, 1);
}

static void rest_while_held(void) {
    if (!atomic_load(&holding))
        return;
    atomic_fetch_add(&held, 1);
    while (atomic_load(&holding))
        syscall(SYS_futex, &holding, FUTEX_WAIT, 1, NULL, NULL, 0);
    atomic_fetch_sub(&held, 1);
}

static void use_alternate_stack(int thread) {
    stack_t stack = {.ss_sp = alternate[thread], .ss_size = sizeof alternate[thread]};
    must(!sigaltstack(&stack, NULL), "sigaltstack");
}

static void *write_all_the_time(void *argument) {
    uint64_t state = (uint64_t)argument;
    use_alternate_stack((int)(state & 0xFF));
    for (;;) {
        rest_while_held();
        if (!sigsetjmp(escape, 0)) {
            long npages = 1 + below(&state, 48);
            unsigned char *base = window(&state, npages);
            store(&state, base, npages);
        }
        if (!below(&state, 3))
            usleep((useconds_t)below(&state, 1500));
    }
    return NULL;
}

static void tick(long microseconds) {
    struct itimerval every = {{0, microseconds}, {0, microseconds}};
    setitimer(ITIMER_REAL, &every, NULL);
}

static void *obey(void *unused) {
    char order[16];
    (void)unused;
    for (;;) {
        ssize_t got = read(0, order, sizeof order);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            _exit(0);
        if (order[0] == 'h') {
            atomic_store(&holding, 1);
            tick(0);
            while (atomic_load(&held) < nthreads)
                usleep(100);
            must(write(1, "held\n", 5) == 5, "write");
        } else if (order[0] == 'g') {
            atomic_store(&holding, 0);
            syscall(SYS_futex, &holding, FUTEX_WAKE, 1000, NULL, NULL, 0);
            tick(1000);
            must(write(1, "gone\n", 5) == 5, "write");
        } else
            dprintf(1, "%lu %lu %lu\n", atomic_load(&changes), atomic_load(&stores), atomic_load(&alarms));
    }
}

static int file_in(const char *folder) {
    int fd = open(folder, O_TMPFILE | O_RDWR, 0600);
    must(fd >= 0 && !ftruncate(fd, 2 * NPAGES * PAGE), folder);
    return fd;
}

int main(int count, char **given) {
    must(count == 5, "churn WRITERS SEED FOLDER PAUSE");
    uint64_t state = strtoull(given[2], NULL, 0) * 0x9E3779B97F4A7C15 | 1;
    int nwriters = atoi(given[1]);
    pthread_t thread;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    nthreads = nwriters + 1;
    pause_us = atol(given[4]);
    source = memfd_create("source", 0), memory_file = memfd_create("shared", 0);
    must(!ftruncate(source, 2 * NPAGES * PAGE) && !ftruncate(memory_file, NPAGES * PAGE), "memfd");
    disk_file = file_in(given[3]), disk_source = file_in(given[3]);
    for (long page = 0; page < NPAGES + 64; page++) {
        uint64_t value = next(&state);
        must(pwrite(source, &value, sizeof value, page * PAGE) > 0 && pwrite(disk_source, &value, sizeof value, page * PAGE) > 0, "pwrite");
    }
    void *volatile small = malloc(1000); /* what malloc needs of the heap lies below what is churned */
    free(small);
    heap = (unsigned char *)(((uintptr_t)sbrk(0) + PAGE - 1) / PAGE * PAGE);
    map(0, NPAGES, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0, ANONYMOUS);
    has_huge = mmap(HUGE_GROUND, (size_t)(HUGES * HUGE_PAGES * PAGE), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_FIXED_NOREPLACE, -1, 0) != MAP_FAILED;
    struct sigaction action = {.sa_handler = fault, .sa_flags = SA_ONSTACK | SA_NODEFER};
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
    action.sa_handler = alarmed;
    sigaction(SIGALRM, &action, NULL);
    use_alternate_stack(0);
    for (uint64_t number = 1; number <= (uint64_t)nwriters; number++)
        must(!pthread_create(&thread, NULL, write_all_the_time, (void *)((next(&state) & ~0xFFUL) | number)), "pthread_create");
    must(!pthread_create(&thread, NULL, obey, NULL), "pthread_create");
    tick(1000);
    must(write(1, "ready\n", 6) == 6, "write");
    for (;;) {
        rest_while_held();
        if (!sigsetjmp(escape, 0))
            change(&state);
        usleep((useconds_t)below(&state, 2 * pause_us + 1));
    }
}
