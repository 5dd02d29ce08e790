/* torch's OpenMP library is called by the address of its function: `#pragma omp` would be calls to the library of this
   file's compiler, which may be another one. */
#include "threads.h"

typedef void parallel(void (*body)(void *), void *data, unsigned num_threads, unsigned flags);

static parallel *run;
static void (*wait_for_all)(void);

/* GOMP_parallel and GOMP_barrier, of libgomp; LLVM's and Intel's libraries have them, too. */
void octavo_use_threads(parallel *gomp_parallel, void (*gomp_barrier)(void)) {
    run = gomp_parallel;
    wait_for_all = gomp_barrier;
}

void in_threads(void (*body)(void *), void *data, int num_threads) {
    if (num_threads > 1)
        run(body, data, num_threads, 0);
    else
        body(data);
}

void meet(int num_threads) {
    if (num_threads > 1) wait_for_all();
}
