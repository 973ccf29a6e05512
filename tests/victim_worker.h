/* The threads of victim.c, what each checks in every round, and how a complaint is kept. */

#include "victim_calls.h"

#include <asm/prctl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/prctl.h>

enum { MAX_WORKERS = 128, STACK_OCTETS = 2048, ALTERNATE_BYTES = 1 << 16, SPINS = 20000 };

static struct worker workers[MAX_WORKERS];
static int nworkers;
static __thread struct worker *myself;
static atomic_int stopping, complained;
static char complaint[256];

static void must(int good, const char *what) {
    if (!good) {
        printf("bad %s: %s\n", what, strerror(errno));
        fflush(stdout);
        _exit(3);
    }
}

static void complain(struct worker *worker, const char *format, ...) {
    if (atomic_exchange(&complained, 1))
        return;
    char text[200];
    va_list rest;
    va_start(rest, format);
    vsnprintf(text, sizeof text, format, rest);
    va_end(rest);
    snprintf(complaint, sizeof complaint, "%s: %s", worker->kind->name, text);
}

/* Uses what the thread uses, too: floating point registers, and the alternate stack. */
static void handler(int number, siginfo_t *info, void *context) {
    char here;
    int before = errno;
    struct worker *w = myself;
    (void)context;
    if (number == SIGTERM)
        stopping = 1;
    if (w) {
        if (&here < w->alternate || &here >= w->alternate + ALTERNATE_BYTES)
            complain(w, "a signal handler is not on the alternate stack");
        if (number == SIGRTMIN && info->si_value.sival_int != (int)w->received++)
            complain(w, "signal %d came, but %lu was next", info->si_value.sival_int, w->received - 1);
        volatile double sum = 0;
        for (int term = 1; term < 20; term++)
            sum += 1.0 / term;
        w->handled++;
    }
    errno = before;
}

static void check_rest(struct worker *w, const unsigned char *octets) {
    unsigned long mask = 0, base = 0;
    stack_t alternate;
    syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, &mask, 8);
    if (mask != w->mask)
        complain(w, "the signal mask is %#lx, not %#lx", mask, w->mask);
    if (sigaltstack(NULL, &alternate) || alternate.ss_sp != w->alternate || alternate.ss_size != ALTERNATE_BYTES || alternate.ss_flags)
        complain(w, "the alternate stack is %p, %zu, %d", alternate.ss_sp, alternate.ss_size, alternate.ss_flags);
    syscall(SYS_arch_prctl, ARCH_GET_GS, &base);
    if (base != 0x10000ul * (w->index + 1))
        complain(w, "the base of gs is %#lx", base);
    syscall(SYS_arch_prctl, ARCH_GET_FS, &base);
    if (base != AT(pthread_self()))
        complain(w, "the base of fs is %#lx", base);
    for (int number = 0; number < STACK_OCTETS; number++)
        if (octets[number] != (unsigned char)(number * 7 + w->index)) {
            complain(w, "the stack was overwritten");
            break;
        }
}

static long now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000 + time.tv_nsec / 1000;
}

static void do_round(struct worker *w, const unsigned char *octets) {
    int called = w->kind->number >= 0;
    char what[100];
    fill_registers(&w->in, &w->seed);
    fill_extended(&w->extended_in, &w->seed);
    if (!called)
        w->expected = (long)w->in.general[RAX];
    else if (w->kind->prepare != wait_)
        w->expected = 0;
    if (w->kind->prepare)
        w->kind->prepare(w);
    if (called)
        w->in.general[RAX] = w->kind->number;
    unsigned long handled = w->handled;
    long began = now();
    hold_registers(&w->in, &w->out, &w->extended_in, &w->extended_out, &w->home, called ? 0 : SPINS);
    long took = now() - began, result = (long)w->out.general[RAX];
    if (registers_differ(&w->in, &w->out, called, what, sizeof what))
        complain(w, "%s", what);
    const char *difference = extended_difference(&w->extended_in, &w->extended_out);
    if (difference)
        complain(w, "%s changed", difference);
    if (called && result == -EINTR) {
        if (handled == w->handled)
            w->spurious++;
    } else if (result != w->expected)
        complain(w, "the result is %ld, not %ld", result, w->expected);
    else if (w->kind->timed && took < w->milliseconds * 1000 - 1500)
        complain(w, "it slept %ld us, not %ld ms", took, w->milliseconds);
    if (took > w->slowest)
        w->slowest = took;
    check_rest(w, octets);
    w->rounds++;
}

static void filter_userfaultfd(int kind) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, kind == SECCOMP_KILLS ? SECCOMP_RET_KILL_PROCESS : SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    must(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) && !prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), "seccomp");
}

static void *work(void *argument) {
    struct worker *w = argument;
    unsigned char octets[STACK_OCTETS];
    for (int number = 0; number < STACK_OCTETS; number++)
        octets[number] = (unsigned char)(number * 7 + w->index);
    w->alternate = mmap(NULL, ALTERNATE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(!sigaltstack(&(stack_t){.ss_sp = w->alternate, .ss_size = ALTERNATE_BYTES}, NULL), "sigaltstack");
    myself = w;
    w->thread = pthread_self();
    w->seed = w->index + 1;
    /* One signal of its own is blocked; in calls that change the mask another is, too. */
    w->mask = 1ul << (SIGWINCH - 1) | 1ul << (40 + w->index % 20);
    w->blocked = w->mask | 1ul << (SIGUSR2 - 1);
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &w->mask, NULL, 8);
    syscall(SYS_arch_prctl, ARCH_SET_GS, 0x10000ul * (w->index + 1));
    if (w->kind->open)
        w->kind->open(w);
    if (w->filter)
        filter_userfaultfd(SECCOMP_KILLS);
    if (w->dispatched)
        must(!prctl(PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_ON, 0, 0, &w->selector), "syscall user dispatch");
    save_extended(&w->home);
    if (w->ticked) {
        struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGALRM};
        struct itimerspec period = {{0, 1000000}, {0, 1000000}};
        timer_t timer;
        event._sigev_un._tid = (pid_t)syscall(SYS_gettid);
        must(!timer_create(CLOCK_MONOTONIC, &event, &timer) && !timer_settime(timer, 0, &period, NULL), "timer_create");
    }
    w->tid = (pid_t)syscall(SYS_gettid);
    atomic_store(&w->rounds, 1);
    while (!stopping)
        do_round(w, octets);
    return NULL;
}

static void *feed(void *argument) {
    struct worker *w = argument;
    struct timespec pace = {w->milliseconds / 1000, w->milliseconds % 1000 * 1000000};
    while (!w->rounds)
        sched_yield();
    for (;;) {
        nanosleep(&pace, NULL);
        w->kind->feed(w);
    }
    return NULL;
}
