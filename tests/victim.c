/* A program that looks after itself: each of its threads knows what all its registers, its stack, its signals and its system calls
 * must be, and complains.
 *
 *     victim [--OPTION[=VALUE]]... KIND[*COUNT][@MILLISECONDS][+ticked][+filter][+dispatched]...
 *
 * Each KIND is a thread (victim_calls.h). It says `thread KIND TID ADDRESS` (of its counter of rounds), then `ready`. Then it obeys:
 *
 *     check     waits until every thread has done two rounds more, and says `ok`, or `bad` and the first complaint
 *     report    says `KIND TID ROUNDS SPURIOUS SLOWEST HANDLED`: EINTRs without a handler, the longest round in microseconds, and
 *               how many signals were handled; then `end`
 *     forget    sets the EINTRs and the longest round to zero, and says `ok`
 *     exec      executes the same program, with the same arguments, from its first thread
 *     exec-other  says `soon`, and does it from another
 *     quit      waits for the threads, says as `check` does, and ends
 *
 * With --single there is one thread, and nobody to obey: on SIGTERM it says `ok` or `bad`, `spurious` and how many, and ends. */

#include "victim_worker.h"

static char **arguments_given;
static atomic_ulong ticks;

static int parse(char *text) {
    char name[32];
    int count = 1, length = (int)strcspn(text, "*@+");
    long milliseconds = 20;
    snprintf(name, sizeof name, "%.*s", length, text);
    char *at = strchr(text, '*'), *time = strchr(text, '@');
    if (at)
        count = atoi(at + 1);
    if (time)
        milliseconds = atol(time + 1);
    for (size_t number = 0; number < sizeof kinds / sizeof *kinds; number++)
        if (!strcmp(kinds[number].name, name)) {
            for (; count; count--) {
                struct worker *w = &workers[nworkers];
                w->index = nworkers++;
                w->kind = &kinds[number];
                w->milliseconds = milliseconds;
                w->ticked = strstr(text, "+ticked") != NULL;
                w->filter = strstr(text, "+filter") != NULL;
                w->dispatched = strstr(text, "+dispatched") != NULL;
            }
            return 1;
        }
    return 0;
}

static void say_verdict(void) {
    printf("%s%s\n", complained ? "bad " : "ok", complained ? complaint : "");
    fflush(stdout);
}

static void check(void) {
    unsigned long before[MAX_WORKERS];
    long deadline = now() + 20000000;
    for (int number = 0; number < nworkers; number++)
        before[number] = workers[number].rounds;
    for (int number = 0; number < nworkers; number++)
        while (workers[number].rounds < before[number] + 2 && !complained) {
            if (now() > deadline)
                complain(&workers[number], "it does nothing any more, after %lu rounds", before[number]);
            usleep(300);
        }
    say_verdict();
}

static void finish(void) {
    stopping = 1;
    for (int number = 0; number < nworkers; number++)
        pthread_join(workers[number].thread, NULL);
    unsigned long counted = 0, committed = 0;
    for (size_t number = 0; number < sizeof per_cpu / sizeof *per_cpu; number++)
        counted += per_cpu[number].value;
    for (int number = 0; number < nworkers; number++)
        committed += workers[number].commits;
    if (counted != committed)
        complain(&workers[0], "restartable sequences counted %lu, but committed %lu", counted, committed);
    say_verdict();
    exit(complained);
}

static void *execute(void *later) {
    if (later)
        usleep(20000);
    execv("/proc/self/exe", arguments_given);
    must(0, "execv");
    return NULL;
}

static void obey(const char *order) {
    pthread_t other;
    if (!strcmp(order, "check"))
        check();
    else if (!strcmp(order, "report") || !strcmp(order, "forget")) {
        for (int number = 0; number < nworkers; number++) {
            struct worker *w = &workers[number];
            if (*order == 'r')
                printf("%s %d %lu %lu %ld %lu\n", w->kind->name, w->tid, w->rounds, w->spurious, w->slowest, w->handled);
            else
                w->spurious = w->slowest = 0;
        }
        puts(*order == 'r' ? "end" : "ok");
    } else if (!strcmp(order, "exec"))
        execute(NULL);
    else if (!strcmp(order, "exec-other")) {
        must(!pthread_create(&other, NULL, execute, arguments_given), "pthread_create");
        puts("soon");
    } else if (!strcmp(order, "quit"))
        finish();
    fflush(stdout);
}

static void *obey_all(void *unused) {
    char order[64];
    (void)unused;
    while (fgets(order, sizeof order, stdin)) {
        order[strcspn(order, "\n")] = 0;
        obey(order);
    }
    _exit(0);
}

/* Threads that live for a moment, and then make another. */
static void *live_briefly(void *unused) {
    pthread_t next;
    sigset_t all;
    (void)unused;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    pthread_detach(pthread_self());
    for (int number = 0; number < 20000; number++)
        atomic_fetch_add_explicit(&ticks, 1, memory_order_relaxed);
    usleep(200);
    while (pthread_create(&next, NULL, live_briefly, NULL))
        usleep(100);
    return NULL;
}

static void take_option(const char *option) {
    const char *equals = strchr(option, '=');
    long value = equals ? atol(equals + 1) : 0;
    pthread_t thread;
    if (!strncmp(option, "seccomp=", 8))
        filter_userfaultfd(!strcmp(equals, "=kill") ? SECCOMP_KILLS : SECCOMP_FAILS);
    else if (!strncmp(option, "spawn=", 6))
        for (; value; value--)
            must(!pthread_create(&thread, NULL, live_briefly, NULL), "pthread_create");
    else if (!strncmp(option, "exec=", 5)) {
        static char left[32];
        snprintf(left, sizeof left, "--exec=%ld", value - 1);
        if (value)
            execl("/proc/self/exe", "victim", left, (char *)NULL);
        say_verdict();
        exit(0);
    } else if (!strncmp(option, "live=", 5)) {
        for (long end = now() + value; now() < end;)
            ;
        exit(0);
    } else if (!strcmp(option, "vfork")) {
        if (!vfork()) {
            char octet;
            _exit(write(1, "ready\n", 6) != 6 || read(0, &octet, 1) != 1);
        }
        say_verdict();
        exit(0);
    }
}

int main(int count, char **given) {
    int single = 0, full = 0, leaves = 0;
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    arguments_given = given;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (unshare(CLONE_NEWIPC)) /* where it may: then its semaphores end with it */
        errno = 0;
    find_extended_mask();
    sigaction(SIGALRM, &action, NULL);
    sigaction(SIGUSR1, &action, NULL);
    sigaction(SIGRTMIN, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    for (int number = 1; number < count; number++)
        if (!strcmp(given[number], "--single"))
            single = 1;
        else if (!strcmp(given[number], "--full"))
            full = 1;
        else if (!strcmp(given[number], "--leaves"))
            leaves = 1;
        else if (!strncmp(given[number], "--", 2))
            take_option(given[number] + 2);
        else
            must(parse(given[number]), given[number]);
    /* Process-wide signals are the workers' own. */
    sigset_t all;
    sigfillset(&all);
    if (!single)
        pthread_sigmask(SIG_SETMASK, &all, NULL);
    for (int number = 0; number < nworkers && !single; number++) {
        must(!pthread_create(&workers[number].thread, NULL, work, &workers[number]), "pthread_create");
        if (workers[number].kind->feed)
            must(!pthread_create(&workers[number].feeder, NULL, feed, &workers[number]), "pthread_create");
        while (!workers[number].rounds)
            usleep(100);
    }
    for (int number = 0; number < nworkers; number++)
        printf("thread %s %d %p\n", workers[number].kind->name, single ? getpid() : workers[number].tid, (void *)&workers[number].rounds);
    printf("ticks %p\n", (void *)&ticks);
    if (full)
        must(!setrlimit(RLIMIT_NOFILE, &(struct rlimit){3, 1024}), "setrlimit");
    puts("ready");
    fflush(stdout);
    if (single) {
        work(&workers[0]);
        say_verdict();
        printf("spurious %lu\n", workers[0].spurious);
        return complained;
    }
    if (leaves) {
        pthread_t other;
        must(!pthread_create(&other, NULL, obey_all, NULL), "pthread_create");
        pthread_exit(NULL);
    }
    obey_all(NULL);
}
