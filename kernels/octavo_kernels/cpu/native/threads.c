/* torch's OpenMP library is called by the addresses of its functions: `#pragma omp` would be calls to the library of
   this file's compiler, which may be another one.

   Bound to cores, each thread binds itself, at the start of its first region since: a thread that the library starts
   later, for a caller of its own or after a smaller team, would share the core of the one that started it. */
#define _GNU_SOURCE
#include "threads.h"

#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sched.h>
#endif

typedef void parallel(void (*body)(void *), void *data, unsigned num_threads, unsigned flags);
typedef int thread_num(void);

static parallel *run;
static void (*wait_for_all)(void);
static thread_num *number;

/* GOMP_parallel, GOMP_barrier and omp_get_thread_num, of libgomp; LLVM's and Intel's libraries have them, too. */
void octavo_use_threads(parallel *gomp_parallel, void (*gomp_barrier)(void), thread_num *omp_get_thread_num) {
    run = gomp_parallel;
    wait_for_all = gomp_barrier;
    number = omp_get_thread_num;
}

static struct {
    char *masks;
    int num_masks, turn; /* turn: of octavo_bind; 0 before the first */
    int64_t mask_size, num_failed;
} bound;
static _Thread_local int last_turn;

static void bind_this_thread(void) {
    if (last_turn == bound.turn) return;
    last_turn = bound.turn;
#ifdef __linux__
    const char *mask = bound.masks + number() % bound.num_masks * bound.mask_size;
    if (!sched_setaffinity(0, bound.mask_size, (const cpu_set_t *)mask)) return;
#endif
    take(&bound.num_failed);
}

struct region {
    void (*body)(void *);
    void *data;
};

static void run_bound(void *data) {
    struct region *region = data;
    bind_this_thread();
    region->body(region->data);
}

void in_threads(void (*body)(void *), void *data, int num_threads) {
    struct region region = {body, data};
    if (num_threads <= 1) {
        bind_this_thread();
        body(data);
    } else if (bound.turn)
        run(run_bound, &region, num_threads, 0);
    else
        run(body, data, num_threads, 0);
}

static void count(void *data) { take(data); }

/* Thread i of every team runs on the cores of mask i % num_masks only; masks: [num_masks, mask_size] bytes, as of
   sched_setaffinity. Returns how many threads of a team of num_threads were bound. */
int octavo_bind(const char *masks, int num_masks, int64_t mask_size, int num_threads) {
    int64_t num_there = 0;
    free(bound.masks);
    bound.masks = memcpy(malloc(num_masks * mask_size), masks, num_masks * mask_size);
    bound.num_masks = num_masks;
    bound.mask_size = mask_size;
    bound.num_failed = 0;
    bound.turn++;
    in_threads(count, &num_there, num_threads);
    return (int)(num_there - bound.num_failed);
}

void meet(int num_threads) {
    if (num_threads > 1) wait_for_all();
}
