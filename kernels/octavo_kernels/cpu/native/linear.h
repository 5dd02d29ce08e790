#ifndef OCTAVO_LINEAR_H
#define OCTAVO_LINEAR_H

#include <stdint.h>

enum activation { NONE = 0, GELU_TANH = 1 }; /* as in __init__.py */

struct layer {
    const uint16_t *weight, *bias; /* packed; [O] or NULL */
    int64_t outputs, inputs;
    int activation;
};

/* to = activation(x @ weight.T + bias) + residual, bf16. x: [M, K]; to, residual: [M, O]; residual may be NULL, or
   `to`. */
struct product {
    struct layer layer;
    uint16_t *to;
    const uint16_t *x, *residual;
    int64_t num_rows;
    int num_threads;
    int64_t next_strip;
};

/* All threads together. */
__attribute__((visibility("hidden"))) void multiply_strips(void *product);

#endif
