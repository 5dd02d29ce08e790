/* The threads of torch: one pool for both, since two would spin against each other. */
#ifndef OCTAVO_THREADS_H
#define OCTAVO_THREADS_H

#include <stdint.h>

/* Runs body(data) in num_threads threads at once, this one among them. num_threads is 1 or torch's number: libgomp ends
   the threads that a smaller team leaves over, and the next region would have to start them again. */
__attribute__((visibility("hidden"))) void in_threads(void (*body)(void *), void *data, int num_threads);

/* Within `body`: waits until all its threads are here. */
__attribute__((visibility("hidden"))) void meet(int num_threads);

/* A number that no other thread gets: 0, 1, ... */
static inline int64_t take(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

#endif
