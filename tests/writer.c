/* A program that writes where it is told to, and does what programs do: `writer WORD...` does one thing after the other, then ends
 * with 0. Its arena, private and anonymous, has NPAGES pages at ARENA.
 *
 *     early             nothing: as the first word it has page 255 stored by a constructor, before main begins
 *     store PAGE...     stores to pages of the arena; all stores add 1 to a byte
 *     spin PAGE...      has a thread store to pages, each once a millisecond, to the end
 *     busy PAGE...      has the thread that is told so store to pages without a pause, to the end
 *     share             maps four shared pages at SHARED, and stores to them
 *     sleep MILLISECONDS
 *     say WORD          says it
 *     handle SIGNAL     from now on the signal's handler stores to page 100 + SIGNAL
 *     ignore SIGNAL
 *     daemon SECONDS    has a child, with a session of its own, that sleeps; says `daemon PID`
 *     new-session
 *     exec WORD...      executes itself with these words; `thread-exec` does it from another thread
 *     leave WORD...     ends the first thread; another goes on with these words
 *     elsewhere WORD... goes on with these words in another thread, while the first one sleeps
 *     raise SIGNAL      ends by a signal, dispositions as they were at first
 *     exit STATUS       ends at once
 *     obey              says `ready`, then does the words of each line that it reads, and says `ok`; ends with its input */

#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096
#define NPAGES 256
#define ARENA ((volatile unsigned char *)0x10000000000)
#define SHARED ((volatile unsigned char *)0x20000000000)
#define FIXED_NOREPLACE 0x100000
#define MAX_WORDS 512

static char *program;

struct words {
    int count;
    char *word[MAX_WORDS + 1];
};

static void run(int count, char **word);

static void fail(const char *what) {
    perror(what);
    _exit(99);
}

static void map(volatile unsigned char *where, int npages, int flags) {
    if (mmap((void *)where, (size_t)npages * PAGE, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS | FIXED_NOREPLACE, -1, 0) != where)
        fail("mmap");
}

static void store(int page) { ARENA[page * PAGE]++; }

__attribute__((constructor)) static void before_main(int argc, char **argv) {
    map(ARENA, NPAGES, MAP_PRIVATE);
    if (argc > 1 && !strcmp(argv[1], "early"))
        store(255);
}

static void handler(int number) { store(100 + number); }

static struct words *copy(int count, char **word) {
    struct words *words = calloc(1, sizeof *words);
    words->count = count;
    for (int number = 0; number < count; number++)
        words->word[number] = strdup(word[number]);
    return words;
}

static void *spin(void *argument) {
    struct words *words = argument;
    for (;;) {
        for (int number = 0; number < words->count; number++)
            store(atoi(words->word[number]));
        usleep(1000);
    }
    return NULL;
}

static void execute(int count, char **word) {
    struct words *words = copy(count, word);
    memmove(words->word + 1, words->word, sizeof *words->word * (MAX_WORDS - 1));
    words->word[0] = program;
    fflush(stdout);
    execv("/proc/self/exe", words->word);
    fail("exec");
}

static void *execute_here(void *argument) {
    struct words *words = argument;
    execute(words->count, words->word);
    return NULL;
}

static void *run_here(void *argument) {
    struct words *words = argument;
    run(words->count, words->word);
    fflush(stdout);
    exit(0);
}

static pthread_t thread(void *(*body)(void *), int count, char **word) {
    pthread_t made;
    if (pthread_create(&made, NULL, body, copy(count, word)))
        fail("thread");
    return made;
}

static void have_daemon(int seconds) {
    int child = fork();
    if (!child) {
        setsid();
        sleep(seconds);
        _exit(0);
    }
    printf("daemon %d\n", child);
    fflush(stdout);
}

static void end_by(int number) {
    signal(number, SIG_DFL);
    fflush(stdout);
    raise(number);
    _exit(98);
}

static void obey(void) {
    static char line[1 << 14];
    puts("ready");
    for (fflush(stdout); fgets(line, sizeof line, stdin); fflush(stdout)) {
        struct words *words = calloc(1, sizeof *words);
        for (char *word = strtok(line, " \n"); word && words->count < MAX_WORDS; word = strtok(NULL, " \n"))
            words->word[words->count++] = word;
        run(words->count, words->word);
        free(words);
        puts("ok");
    }
}

static int is_number(const char *word) { return *word >= '0' && *word <= '9'; }

static void run(int count, char **word) {
    for (int at = 0; at < count;) {
        const char *what = word[at++];
        int rest = count - at, numbers = 0;
        char **next = word + at;
        while (numbers < rest && is_number(next[numbers]))
            numbers++;
        if (!strcmp(what, "store")) {
            for (; numbers; numbers--, at++)
                store(atoi(word[at]));
        } else if (!strcmp(what, "spin")) {
            thread(spin, numbers, next);
            at += numbers;
        } else if (!strcmp(what, "busy")) {
            for (;;)
                for (int number = 0; number < numbers; number++)
                    store(atoi(next[number]));
        } else if (!strcmp(what, "share")) {
            map(SHARED, 4, MAP_SHARED);
            for (int page = 0; page < 4; page++)
                SHARED[page * PAGE]++;
        } else if (!strcmp(what, "new-session")) {
            setsid();
        } else if (!strcmp(what, "obey")) {
            obey();
        } else if (!strcmp(what, "exec")) {
            execute(rest, next);
        } else if (!strcmp(what, "thread-exec")) {
            pthread_join(thread(execute_here, rest, next), NULL);
        } else if (!strcmp(what, "leave")) {
            thread(run_here, rest, next);
            pthread_exit(NULL);
        } else if (!strcmp(what, "elsewhere")) {
            pthread_join(thread(run_here, rest, next), NULL);
        } else if (!strcmp(what, "say") && rest) {
            puts(word[at++]);
            fflush(stdout);
        } else if (!strcmp(what, "sleep") && numbers) {
            usleep(atoi(word[at++]) * 1000);
        } else if (!strcmp(what, "handle") && numbers) {
            signal(atoi(word[at++]), handler);
        } else if (!strcmp(what, "ignore") && numbers) {
            signal(atoi(word[at++]), SIG_IGN);
        } else if (!strcmp(what, "daemon") && numbers) {
            have_daemon(atoi(word[at++]));
        } else if (!strcmp(what, "raise") && numbers) {
            end_by(atoi(word[at++]));
        } else if (!strcmp(what, "exit") && numbers) {
            fflush(stdout);
            _exit(atoi(word[at++]));
        } else if (strcmp(what, "early")) {
            fprintf(stderr, "writer: %s?\n", what);
            _exit(97);
        }
    }
}

int main(int argc, char **argv) {
    program = argv[0];
    run(argc - 1, argv + 1);
    return 0;
}
