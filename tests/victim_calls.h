/* What a worker of victim.c does in a round: it computes, or makes one system call that sleeps. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/futex.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/resource.h>
#include <sys/rseq.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "victim_registers.h"

enum { SECCOMP_NONE, SECCOMP_FAILS, SECCOMP_KILLS };

struct worker {
    const struct kind *kind;
    long milliseconds;
    int ticked, filter, dispatched;
    int index;
    pid_t tid;
    pthread_t thread, feeder;
    uint64_t seed;
    struct registers in, out;
    struct extended extended_in, extended_out, home;
    long expected;
    volatile unsigned long handled; /* signal handlers that ran in this thread */
    unsigned long sent, received;
    atomic_ulong rounds, spurious, commits;
    atomic_long slowest;
    unsigned long mask;
    char *alternate;
    int fds[2];
    struct pollfd poll;
    fd_set set;
    struct timespec time;
    struct { const void *mask; size_t nbytes; } masked;
    unsigned long blocked;
    int futex, status, queue;
    struct epoll_event event;
    struct io_event io_event;
    struct sembuf operation;
    aio_context_t aio;
    struct io_uring_getevents_arg ring;
    unsigned char octets[64];
    char selector;
};

struct kind {
    const char *name;
    int number; /* of its system call; -1 computes */
    void (*open)(struct worker *);    /* once, in the worker itself */
    void (*prepare)(struct worker *); /* before each round: arguments and the expected result */
    void (*feed)(struct worker *);    /* what another thread does, so that the call ends */
    int timed;                        /* the call itself says for how long */
};

static void complain(struct worker *worker, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void must(int good, const char *what);

static void arguments(struct worker *w, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f) {
    const int places[] = {RDI, RSI, RDX, R10, R8, R9};
    const uint64_t values[] = {a, b, c, d, e, f};
    for (int number = 0; number < 6; number++)
        w->in.general[places[number]] = values[number];
    w->time = (struct timespec){w->milliseconds / 1000, w->milliseconds % 1000 * 1000000};
}

#define AT(x) ((uint64_t)(uintptr_t)(x))

static void open_pipe(struct worker *w) { must(!pipe2(w->fds, O_CLOEXEC), "pipe"); }
static void write_octet(struct worker *w) { must(write(w->fds[1], "x", 1) == 1, "write"); }
static void send_signal(struct worker *w) { syscall(SYS_tgkill, getpid(), w->tid, SIGUSR1); }

static void nanosleep_(struct worker *w) { arguments(w, AT(&w->time), 0, 1, 2, 3, 4); }
static void clock_nanosleep_(struct worker *w) { arguments(w, CLOCK_MONOTONIC, 0, AT(&w->time), 0, 5, 6); }
static void poll_(struct worker *w) {
    w->poll = (struct pollfd){w->fds[0], POLLIN, 0};
    arguments(w, AT(&w->poll), 1, w->milliseconds, 7, 8, 9);
}
static void ppoll_(struct worker *w) {
    w->poll = (struct pollfd){w->fds[0], POLLIN, 0};
    arguments(w, AT(&w->poll), 1, AT(&w->time), AT(&w->blocked), 8, 10);
}
static void select_(struct worker *w) {
    FD_ZERO(&w->set);
    FD_SET(w->fds[0], &w->set);
    arguments(w, w->fds[0] + 1, AT(&w->set), 0, 0, AT(&w->time), 11);
    w->time.tv_nsec /= 1000; /* a timeval */
}
static void pselect_(struct worker *w) {
    w->masked.mask = &w->blocked;
    w->masked.nbytes = 8;
    FD_ZERO(&w->set);
    FD_SET(w->fds[0], &w->set);
    arguments(w, w->fds[0] + 1, AT(&w->set), 0, 0, AT(&w->time), AT(&w->masked));
}
static void futex_(struct worker *w) {
    arguments(w, AT(&w->futex), FUTEX_WAIT_PRIVATE, 0, AT(&w->time), 12, 13);
    w->expected = -ETIMEDOUT;
}
/* As sem_timedwait: until a point of time. */
static void futex_until(struct worker *w) {
    arguments(w, AT(&w->futex), FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG | FUTEX_CLOCK_REALTIME, 0, AT(&w->time), 0, ~0u);
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    long nanoseconds = now.tv_nsec + w->time.tv_nsec;
    w->time = (struct timespec){now.tv_sec + w->time.tv_sec + nanoseconds / 1000000000, nanoseconds % 1000000000};
    w->expected = -ETIMEDOUT;
}
static void read_(struct worker *w) {
    arguments(w, w->fds[0], AT(w->octets), 1, 14, 15, 16);
    w->expected = 1;
}
static void open_timer(struct worker *w) { must((w->fds[0] = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC)) >= 0, "timerfd"); }
static void read_timer(struct worker *w) {
    arguments(w, w->fds[0], AT(w->octets), 8, 17, 18, 19);
    struct itimerspec timer = {{0, 0}, w->time};
    must(!timerfd_settime(w->fds[0], 0, &timer, NULL), "timerfd_settime");
    w->expected = 8;
}
/* A child that sleeps, and exits with 7. One of the round before, whose wait a signal interrupted, is waited for first. */
static void wait_(struct worker *w) {
    while (w->expected > 0 && w->out.general[RAX] != (uint64_t)w->expected && waitpid(w->expected, NULL, 0) < 0 && errno == EINTR)
        ;
    arguments(w, 0, AT(&w->status), 0, 0, 20, 21);
    w->expected = fork();
    must(w->expected >= 0, "fork");
    if (!w->expected) {
        syscall(SYS_nanosleep, &w->time, NULL);
        syscall(SYS_exit_group, 7);
    }
    w->in.general[RDI] = w->expected;
}
static void pause_(struct worker *w) {
    arguments(w, 1, 2, 3, 4, 5, 6);
    w->expected = -EINTR;
}
static void sigsuspend_(struct worker *w) {
    arguments(w, AT(&w->blocked), 8, 3, 4, 5, 6);
    w->expected = -EINTR;
}
static void open_epoll(struct worker *w) {
    open_pipe(w);
    struct epoll_event event = {.events = EPOLLIN};
    must((w->queue = epoll_create1(EPOLL_CLOEXEC)) >= 0 && !epoll_ctl(w->queue, EPOLL_CTL_ADD, w->fds[0], &event), "epoll");
}
static void epoll_wait_(struct worker *w) { arguments(w, w->queue, AT(&w->event), 1, w->milliseconds, 22, 23); }
static void epoll_pwait_(struct worker *w) { arguments(w, w->queue, AT(&w->event), 1, w->milliseconds, AT(&w->blocked), 8); }
static void epoll_pwait2_(struct worker *w) { arguments(w, w->queue, AT(&w->event), 1, AT(&w->time), AT(&w->blocked), 8); }
/* One byte ends each; it is taken away before the next. */
static void epoll_forever(struct worker *w) {
    must(fcntl(w->fds[0], F_SETFL, O_NONBLOCK) == 0 && read(w->fds[0], w->octets, 8) < 9, "pipe");
    arguments(w, w->queue, AT(&w->event), 1, -1, 22, 23);
    w->expected = 1;
}
static void sigtimedwait_(struct worker *w) {
    static const unsigned long awaited = 1ul << (SIGWINCH - 1);
    arguments(w, AT(&awaited), 0, AT(&w->time), 8, 24, 25);
    w->expected = -EAGAIN;
}
static void open_semaphore(struct worker *w) {
    must((w->queue = semget(IPC_PRIVATE, 1, 0600)) >= 0, "semget");
    w->operation = (struct sembuf){0, -1, 0};
}
static void semtimedop_(struct worker *w) {
    arguments(w, w->queue, AT(&w->operation), 1, AT(&w->time), 26, 27);
    w->expected = -EAGAIN;
}
static void semop_(struct worker *w) { arguments(w, w->queue, AT(&w->operation), 1, 0, 28, 29); }
static void post(struct worker *w) { must(!semop(w->queue, &(struct sembuf){0, 1, 0}, 1), "semop"); }
static void set_time_out(struct worker *w) {
    struct timeval time = {w->milliseconds / 1000, w->milliseconds % 1000 * 1000};
    must(!setsockopt(w->fds[0], SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time), "SO_RCVTIMEO");
}
static void open_listener(struct worker *w) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    must((w->fds[0] = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) >= 0, "socket");
    must(!bind(w->fds[0], (struct sockaddr *)&address, sizeof(sa_family_t)) && !listen(w->fds[0], 1), "listen");
    set_time_out(w);
}
static void accept_(struct worker *w) {
    arguments(w, w->fds[0], 0, 0, 0, 30, 31);
    w->expected = -EAGAIN;
}
static void open_sockets(struct worker *w) {
    must(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, w->fds), "socketpair");
    set_time_out(w);
}
static void receive_(struct worker *w) {
    arguments(w, w->fds[0], AT(w->octets), 1, 0, 0, 0);
    w->expected = -EAGAIN;
}
static void open_aio(struct worker *w) { must(!syscall(SYS_io_setup, 4, &w->aio), "io_setup"); }
static void getevents_(struct worker *w) { arguments(w, w->aio, 1, 1, AT(&w->io_event), AT(&w->time), 32); }
static void open_ring(struct worker *w) {
    struct io_uring_params parameters = {0};
    must((w->queue = syscall(SYS_io_uring_setup, 4, &parameters)) >= 0, "io_uring_setup");
    fcntl(w->queue, F_SETFD, FD_CLOEXEC);
}
static void ring_(struct worker *w) {
    w->ring = (struct io_uring_getevents_arg){.ts = AT(&w->time)};
    arguments(w, w->queue, 0, 1, IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG, AT(&w->ring), sizeof w->ring);
    w->expected = -ETIME;
}

/* Signals that carry numbers, which must come in their order, each once. */
static void send_number(struct worker *w) {
    siginfo_t info = {.si_code = SI_QUEUE, .si_value.sival_int = (int)w->sent};
    if (!syscall(SYS_rt_tgsigqueueinfo, getpid(), w->tid, SIGRTMIN, &info))
        w->sent++;
}

/* A counter for each CPU, without atomic operations: it is right only if each sequence that was broken is begun again. */
static struct { unsigned long value, padding[7]; } per_cpu[1024];

static void count_on_this_cpu(struct worker *w) {
    struct rseq *rseq = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
    for (int done = 0; done < 20;) {
        uint32_t cpu = *(volatile uint32_t *)&rseq->cpu_id_start;
        __asm__ goto(".pushsection .data.rel, \"aw\"\n.balign 32\n3: .long 0, 0\n.quad 1f, 2f - 1f, 4f\n.popsection\n"
                     "leaq 3b(%%rip), %%rax\n movq %%rax, 8(%[rseq])\n"
                     "1: cmpl %[cpu], 4(%[rseq])\n jnz %l[again]\n"
                     "movq (%[counter]), %%rax\n movl $3000, %%ecx\n 5: decl %%ecx\n jnz 5b\n"
                     "leaq 1(%%rax), %%rax\n movq %%rax, (%[counter])\n"
                     "2:\n"
                     ".pushsection .text.rseq, \"ax\"\n .long 0x53053053\n 4: jmp %l[again]\n .popsection\n"
                     :
                     : [rseq] "r"(rseq), [cpu] "r"(cpu), [counter] "r"(&per_cpu[cpu].value)
                     : "rax", "rcx", "memory", "cc"
                     : again);
        done++;
        atomic_fetch_add_explicit(&w->commits, 1, memory_order_relaxed);
    again:;
    }
}

static const struct kind kinds[] = {
    {"compute", -1, NULL, NULL, NULL, 0},
    {"sequence", -1, NULL, NULL, send_number, 0},
    {"rseq", -1, NULL, count_on_this_cpu, NULL, 0},
    {"nanosleep", SYS_nanosleep, NULL, nanosleep_, NULL, 1},
    {"clock_nanosleep", SYS_clock_nanosleep, NULL, clock_nanosleep_, NULL, 1},
    {"poll", SYS_poll, open_pipe, poll_, NULL, 1},
    {"ppoll", SYS_ppoll, open_pipe, ppoll_, NULL, 1},
    {"select", SYS_select, open_pipe, select_, NULL, 1},
    {"pselect", SYS_pselect6, open_pipe, pselect_, NULL, 1},
    {"futex", SYS_futex, NULL, futex_, NULL, 1},
    {"futex_until", SYS_futex, NULL, futex_until, NULL, 1},
    {"read", SYS_read, open_pipe, read_, write_octet, 0},
    {"read_timer", SYS_read, open_timer, read_timer, NULL, 1},
    {"wait4", SYS_wait4, NULL, wait_, NULL, 0},
    {"pause", SYS_pause, NULL, pause_, send_signal, 0},
    {"sigsuspend", SYS_rt_sigsuspend, NULL, sigsuspend_, send_signal, 0},
    {"epoll_wait", SYS_epoll_wait, open_epoll, epoll_wait_, NULL, 1},
    {"epoll_pwait", SYS_epoll_pwait, open_epoll, epoll_pwait_, NULL, 1},
    {"epoll_pwait2", 441, open_epoll, epoll_pwait2_, NULL, 1},
    {"epoll_forever", SYS_epoll_wait, open_epoll, epoll_forever, write_octet, 0},
    {"sigtimedwait", SYS_rt_sigtimedwait, NULL, sigtimedwait_, NULL, 1},
    {"semtimedop", SYS_semtimedop, open_semaphore, semtimedop_, NULL, 1},
    {"semop", SYS_semop, open_semaphore, semop_, post, 0},
    {"accept", SYS_accept, open_listener, accept_, NULL, 1},
    {"accept4", SYS_accept4, open_listener, accept_, NULL, 1},
    {"recvfrom", SYS_recvfrom, open_sockets, receive_, NULL, 1},
    {"read_socket", SYS_read, open_sockets, receive_, NULL, 1},
    {"io_getevents", SYS_io_getevents, open_aio, getevents_, NULL, 1},
    {"io_uring_enter", 426, open_ring, ring_, NULL, 1},
};
