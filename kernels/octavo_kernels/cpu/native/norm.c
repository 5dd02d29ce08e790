#include "norm.h"
#include "floats.h"
#include "threads.h"

#define ROWS 8 /* taken at once: fewer take less time than a thread takes to begin */

/* Vector i of a row, zeros after its end. */
INLINE vec numbers(const uint16_t *row, int64_t i, int64_t width) {
    int64_t left = width - i * LANES;
    return left >= LANES ? load(row + i * LANES, BF16) : load_part(row + i * LANES, (int)left, BF16);
}

/* Four sums at once: one would wait for itself. */
INLINE float sum_of(const vec *x, int64_t vectors) {
    vec sums[4] = {{0}};
    int64_t i = 0;
    for (; i + 4 <= vectors; i += 4)
        for (int j = 0; j < 4; j++) sums[j] += x[i + j];
    for (; i < vectors; i++) sums[0] += x[i];
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

INLINE float sum_of_squares(const vec *x, int64_t vectors) {
    vec sums[4] = {{0}};
    int64_t i = 0;
    for (; i + 4 <= vectors; i += 4)
        for (int j = 0; j < 4; j++) sums[j] += x[i + j] * x[i + j];
    for (; i < vectors; i++) sums[0] += x[i] * x[i];
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

INLINE void normalize(const struct norm *n, int64_t r) {
    int64_t width = n->width, vectors = (width + LANES - 1) / LANES;
    vec x[vectors];
    for (int64_t i = 0; i < vectors; i++) x[i] = numbers(n->x + r * width, i, width);
    float mean = sum_of(x, vectors) / width;
    for (int64_t i = 0; i < vectors; i++) x[i] -= mean;
    for (int64_t at = width; at % LANES; at++) x[at / LANES][at % LANES] = 0;
    float factor = 1 / __builtin_sqrtf(sum_of_squares(x, vectors) / width + n->eps);
    for (int64_t i = 0; i < vectors; i++) {
        vec y = x[i] * factor * numbers(n->weight, i, width) + numbers(n->bias, i, width);
        uint16_t *to = n->to + r * width + i * LANES;
        int64_t left = width - i * LANES;
        left < LANES ? store_part(to, y, (int)left, BF16) : store(to, y, BF16);
    }
}

void normalize_rows(void *norm) {
    struct norm *s = norm; /* shared: its cache line wanders between the threads with the counter */
    struct norm n = {s->to, s->x, s->weight, s->bias, s->num_rows, s->width, s->eps, 0};
    for (int64_t r; (r = ROWS * take(&s->next_rows)) < n.num_rows;)
        for (int64_t end = r + ROWS < n.num_rows ? r + ROWS : n.num_rows; r < end; r++) normalize(&n, r);
}

/* See struct norm. */
void octavo_norm(uint16_t *to, const uint16_t *x, const uint16_t *weight, const uint16_t *bias, int64_t num_rows,
                 int64_t width, float eps, int num_threads) {
    struct norm n = {to, x, weight, bias, num_rows, width, eps, 0};
    in_threads(normalize_rows, &n, num_rows <= ROWS ? 1 : num_threads);
}
