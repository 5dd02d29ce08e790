#ifndef OCTAVO_NORM_H
#define OCTAVO_NORM_H

#include <stdint.h>

/* Layer norm of bf16 rows; the specification is reference.layer_norm. to, x: [M, E]; weight, bias: [E]. */
struct norm {
    uint16_t *to;
    const uint16_t *x, *weight, *bias;
    int64_t num_rows, width;
    float eps;
    int64_t next_rows;
};

/* All threads together. */
__attribute__((visibility("hidden"))) void normalize_rows(void *norm);

#endif
