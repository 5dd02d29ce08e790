/* Products of bf16 activations with bf16 weights, where the processor multiplies bf16 itself (AVX512_BF16).

   Weights are packed in strips of 48 outputs: [ceil(O / 48), K / 2, 48, 2], zeros after the last output. Products are
   exact and sums are in fp32, in the order of K for every output: a row's result does not depend on other rows. */
#include "linear.h"
#include "floats.h"
#include "threads.h"

#define VECTORS 3 /* of outputs in a strip; with 8 rows they fill 24 of 32 registers */
#define STRIP (VECTORS * LANES)

int octavo_has_linear(void) { return HAS_BF16; }

int64_t octavo_packed_size(int64_t outputs, int64_t inputs) { return (outputs + STRIP - 1) / STRIP * STRIP * inputs; }

/* weight: [O, K], K even; to: octavo_packed_size(O, K) numbers. */
void octavo_pack(uint16_t *to, const uint16_t *weight, int64_t outputs, int64_t inputs) {
    for (int64_t o = 0; o < (outputs + STRIP - 1) / STRIP * STRIP; o++) {
        uint16_t *strip = to + o / STRIP * STRIP * inputs + o % STRIP * 2;
        for (int64_t k = 0; k < inputs; k++)
            strip[k / 2 * 2 * STRIP + k % 2] = o < outputs ? weight[o * inputs + k] : 0;
    }
}

#if HAS_BF16

/* x / (1 + 2^t), t = -2 * log2(e) * sqrt(2 / pi) * (x + 0.044715 * x^3), within 1e-4: bf16 keeps 8 bits of it. */
INLINE vec gelu_tanh(vec x) {
    x = (vec)_mm512_max_ps(_mm512_set1_ps(-1e4f), (__m512)x); /* 0 for what is less; NaN stays */
    __m512 t = (__m512)(x * (-2.3022082f - 0.10294324f * x * x)), bound = _mm512_set1_ps(126.0f);
    t = _mm512_max_ps(_mm512_min_ps(t, bound), -bound);
    __m512 whole = _mm512_roundscale_ps(t, 0);
    vec r = (vec)(t - whole);
    vec power = 1.0f + r * (0.69314718f + r * (0.24022651f + r * (0.05550411f + r * 0.00961813f)));
    vec divisor = 1.0f + (vec)_mm512_scalef_ps((__m512)power, whole);
    vec inverse = (vec)_mm512_rcp14_ps((__m512)divisor);
    return x * inverse * (2.0f - divisor * inverse);
}

/* Bias, activation, residual of 16 outputs of a row; of the first `count` only, at the end. */
INLINE void finish(uint16_t *to, vec x, const struct layer *l, int64_t output, const uint16_t *residual, int count) {
    int part = count < LANES;
    if (l->bias) x += part ? load_part(l->bias + output, count, BF16) : load(l->bias + output, BF16);
    if (l->activation == GELU_TANH) x = gelu_tanh(x);
    if (residual) x += part ? load_part(residual, count, BF16) : load(residual, BF16);
    part ? store_part(to, x, count, BF16) : store_bf16(to, x);
}

/* Some rows by a strip, in registers over all of K. Meanwhile `lines` of the cache lines (a vector each) of every pair
   of inputs are fetched from `ahead` on. */
INLINE void tile(uint16_t *to, const uint16_t *x, const uint16_t *residual, const struct layer *l, int64_t strip,
                 int rows, const uint16_t *ahead, int lines) {
    __m512 sums[8][VECTORS];
    int64_t inputs = l->inputs;
    const uint16_t *weight = l->weight + strip * STRIP * inputs;
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_setzero_ps();
    for (int64_t k = 0; k < inputs; k += 2, weight += 2 * STRIP, ahead += 2 * STRIP) {
        for (int i = 0; i < lines; i++) _mm_prefetch((const void *)(ahead + 2 * LANES * i), _MM_HINT_T1);
        __m512bh columns[VECTORS];
        for (int v = 0; v < VECTORS; v++) columns[v] = (__m512bh)_mm512_loadu_si512(weight + 2 * v * LANES);
        for (int r = 0; r < rows; r++) {
            int32_t pair;
            memcpy(&pair, x + r * inputs + k, sizeof pair);
            for (int v = 0; v < VECTORS; v++)
                sums[r][v] = _mm512_dpbf16_ps(sums[r][v], (__m512bh)_mm512_set1_epi32(pair), columns[v]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) {
            int64_t output = strip * STRIP + v * LANES, at = r * l->outputs + output;
            int64_t left = l->outputs - output;
            if (left >= LANES)
                finish(to + at, (vec)sums[r][v], l, output, residual ? residual + at : 0, LANES);
            else if (left > 0)
                finish(to + at, (vec)sums[r][v], l, output, residual ? residual + at : 0, (int)left);
        }
}

/* All rows by a strip. Where their products take longer than reading weights does, the strip `ahead` is fetched by the
   first 24 of them, evenly: else memory waits for the products and the products for memory. */
INLINE void multiply_strip(const struct product *p, int64_t strip, const uint16_t *ahead) {
    int64_t rows = p->num_rows, outputs = p->layer.outputs, inputs = p->layer.inputs, r = 0;
#define TILE(rows, first, lines)                                                                                       \
    tile(p->to + r * outputs, p->x + r * inputs, p->residual ? p->residual + r * outputs : 0, &p->layer, strip, rows,  \
         ahead + 2 * LANES * (first), lines),                                                                          \
        r += rows
    if (rows >= 24) {
        TILE(8, 0, 1);
        TILE(8, 1, 1);
        TILE(8, 2, 1);
    } else if (rows >= 16) {
        TILE(8, 0, 2);
        TILE(8, 2, 1);
    } else if (rows >= 8) {
        TILE(8, 0, 3);
    }
    while (r + 8 <= rows) TILE(8, 0, 0);
    if (r + 4 <= rows) TILE(4, 0, 0);
    if (r + 2 <= rows) TILE(2, 0, 0);
    if (r < rows) TILE(1, 0, 0);
#undef TILE
}

INLINE int64_t num_strips(const struct layer *l) { return (l->outputs + STRIP - 1) / STRIP; }

struct run {
    int64_t next, end;
};

/* Strips that nobody has yet, one after the other: a thread's share of those that are left. Long runs are read faster;
   they become short towards the end, so that no thread waits for long. At least one, be it beyond the last. */
INLINE struct run take_run(struct product *p) {
    int64_t first = __atomic_load_n(&p->next_strip, __ATOMIC_RELAXED), count;
    do {
        count = (num_strips(&p->layer) - first) / p->num_threads;
        count = count > 1 ? count : 1;
    } while (
        !__atomic_compare_exchange_n(&p->next_strip, &first, first + count, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return (struct run){first, first + count};
}

void multiply_strips(void *product) {
    struct product *p = product;
    int64_t size = STRIP * p->layer.inputs, end = num_strips(&p->layer);
    struct run own = take_run(p);
    for (int64_t strip; (strip = own.next++) < end;) {
        int64_t left = end - __atomic_load_n(&p->next_strip, __ATOMIC_RELAXED);
        /* Not ahead of another thread that would have none. */
        if (own.next == own.end && left > p->num_threads) own = take_run(p);
        int64_t ahead = own.next < own.end && own.next < end ? own.next : strip;
        multiply_strip(p, strip, p->layer.weight + ahead * size);
        if (own.next == own.end) own = take_run(p);
    }
}

#else

void multiply_strips(void *product) {}

#endif

/* See struct product; nothing is computed where octavo_has_linear() is 0. */
void octavo_linear(uint16_t *to, const uint16_t *x, const uint16_t *residual, int64_t num_rows, const uint16_t *weight,
                   const uint16_t *bias, int64_t outputs, int64_t inputs, int activation, int num_threads) {
    struct product p = {{weight, bias, outputs, inputs, activation}, to, x, residual, num_rows, num_threads, 0};
    in_threads(multiply_strips, &p, num_threads);
}
