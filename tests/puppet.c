/* A program that does what it is told and nothing else: between two orders it writes only to its stack and to its own data.
 *
 * It says `ready PID SCRATCH`, the address of some memory for strings, and then answers each order with one line:
 *
 *     call NUMBER A B C D E F      makes a system call; its result, negative for an error
 *     fill ADDRESS STEP COUNT BYTE stores a byte COUNT times, STEP bytes apart
 *     touch ADDRESS STEP COUNT     loads bytes; their sum
 *     poke ADDRESS HEX             stores octets
 *     peek ADDRESS COUNT           hex
 *     stack BYTES                  uses so much stack for a moment; the address of its lowest byte
 *     fork ORDER                   has a child do the order and end; its exit status
 *     keep ORDER                   the same in a child that stays, until its parent ends; its process id
 *     thread ADDRESS STEP COUNT    starts a thread that stores all the time
 *     quiet                        ends these threads
 *     leave                        ends the first thread; another one goes on, and answers
 *     execute PATH                 executes another program; only if that fails it answers
 *     exit STATUS
 *
 * Numbers are as C writes them. */

#define _GNU_SOURCE
#include <alloca.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_LINE (1 << 16)
#define MAX_THREADS 16

static char scratch[1 << 16] __attribute__((aligned(4096)));
static char line[MAX_LINE], answer[MAX_LINE], input[MAX_LINE];
static size_t have;
static atomic_int over;
static pthread_t threads[MAX_THREADS];
static int nthreads;

struct area {
    volatile unsigned char *address;
    long step, count;
};
static struct area areas[MAX_THREADS];

static void say(const char *text, size_t length) {
    while (length) {
        ssize_t done = write(1, text, length);
        if (done <= 0)
            _exit(1);
        text += done;
        length -= (size_t)done;
    }
}

static void say_number(long number) { say(answer, (size_t)snprintf(answer, sizeof answer, "%ld\n", number)); }

/* Lines are read by hand, for stdio would have memory of its own come and go. */
static int next_line(void) {
    for (;;) {
        char *end = memchr(input, '\n', have);
        if (end) {
            size_t length = (size_t)(end - input);
            memcpy(line, input, length);
            line[length] = 0;
            have -= length + 1;
            memmove(input, end + 1, have);
            return 1;
        }
        ssize_t got = read(0, input + have, sizeof input - have);
        if (got <= 0)
            return 0;
        have += (size_t)got;
    }
}

static void *store(void *argument) {
    const struct area *area = argument;
    while (!atomic_load(&over))
        for (long number = 0; number < area->count; number++)
            area->address[number * area->step]++;
    return NULL;
}

static long use_stack(long nbytes) {
    volatile char *bottom = alloca((size_t)nbytes);
    for (long offset = nbytes - 1; offset >= 0; offset -= 1024)
        bottom[offset] = 1;
    bottom[0] = 1;
    return (long)bottom;
}

static void obey(char *order);

static void *go_on(void *unused) {
    (void)unused;
    usleep(20000); /* until the first thread is no more */
    say_number(0);
    while (next_line())
        obey(line);
    _exit(0);
}

static void obey_in_child(char *order, int stays) {
    pid_t child = fork();
    int status = 0;
    if (!child) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (dup2(2, 1) < 0)
            _exit(1);
        obey(order);
        while (stays)
            pause();
        _exit(0);
    }
    if (!stays)
        waitpid(child, &status, 0);
    say_number(stays ? child : status);
}

static void peek(const unsigned char *from, long count) {
    char *at = answer;
    for (long number = 0; number < count; number++)
        at += sprintf(at, "%02x", from[number]);
    *at++ = '\n';
    say(answer, (size_t)(at - answer));
}

static void poke(unsigned char *to, const char *hex) {
    for (unsigned octet; sscanf(hex, "%2x", &octet) == 1; hex += 2)
        *to++ = (unsigned char)octet;
}

static void obey(char *order) {
    char *word = strtok(order, " "), *rest = strtok(NULL, "");
    char *at = rest ? rest : "";
    long n[7] = {0};
    int text = !strcmp(word, "fork") || !strcmp(word, "keep") || !strcmp(word, "execute");
    for (int number = 0; number < 7 && !text && *at; number++) {
        n[number] = (long)strtoul(at, &at, 0);
        if (!strcmp(word, "poke"))
            break;
    }
    volatile unsigned char *address = (volatile unsigned char *)n[0];
    if (!strcmp(word, "call")) {
        long result = syscall(n[0], n[1], n[2], n[3], n[4], n[5], n[6]);
        say_number(result == -1 ? -errno : result);
    } else if (!strcmp(word, "fill")) {
        for (long number = 0; number < n[2]; number++)
            address[number * n[1]] = (unsigned char)n[3];
        say_number(0);
    } else if (!strcmp(word, "touch")) {
        long sum = 0;
        for (long number = 0; number < n[2]; number++)
            sum += address[number * n[1]];
        say_number(sum);
    } else if (!strcmp(word, "poke")) {
        poke((unsigned char *)n[0], at + 1);
        say_number(0);
    } else if (!strcmp(word, "peek"))
        peek((const unsigned char *)n[0], n[1]);
    else if (!strcmp(word, "stack"))
        say_number(use_stack(n[0]));
    else if (!strcmp(word, "fork"))
        obey_in_child(rest, 0);
    else if (!strcmp(word, "keep"))
        obey_in_child(rest, 1);
    else if (!strcmp(word, "thread")) {
        areas[nthreads] = (struct area){address, n[1], n[2]};
        say_number(-pthread_create(&threads[nthreads], NULL, store, &areas[nthreads]));
        nthreads++;
    } else if (!strcmp(word, "quiet")) {
        atomic_store(&over, 1);
        while (nthreads)
            pthread_join(threads[--nthreads], NULL);
        atomic_store(&over, 0);
        say_number(0);
    } else if (!strcmp(word, "execute")) {
        execl(rest, rest, (char *)NULL);
        say_number(-errno);
    } else if (!strcmp(word, "leave")) {
        pthread_t other;
        pthread_create(&other, NULL, go_on, NULL);
        pthread_exit(NULL);
    } else if (!strcmp(word, "exit"))
        _exit((int)n[0]);
    else
        say_number(-ENOSYS);
}

int main(void) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    say(answer, (size_t)snprintf(answer, sizeof answer, "ready %d %ld\n", getpid(), (long)scratch));
    while (next_line())
        obey(line);
    return 0;
}
