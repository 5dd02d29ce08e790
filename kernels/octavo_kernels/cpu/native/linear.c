/* Products of bf16 activations with bf16 weights, where the processor multiplies bf16 itself (AVX512_BF16).

   Weights are packed in strips of 48 outputs: [ceil(O / 48), K / 2, 48, 2], zeros after the last output. Products are
   exact and sums are in fp32, in the order of K for every output: a row's result does not depend on other rows. */
#include "floats.h"
#include "threads.h"

#define VECTORS 3 /* of outputs in a strip; with 8 rows they fill 24 of 32 registers */
#define STRIP (VECTORS * LANES)

enum activation { NONE = 0, GELU_TANH = 1 }; /* as in __init__.py */

/* Clang 16 crashes over a number for all lanes that is taken as bf16. */
#if defined(__AVX512BF16__) && !(defined(__clang__) && __clang_major__ < 17)
#define HAS_LINEAR 1
#else
#define HAS_LINEAR 0
#endif

int octavo_has_linear(void) { return HAS_LINEAR; }

int64_t octavo_packed_size(int64_t outputs, int64_t inputs) { return (outputs + STRIP - 1) / STRIP * STRIP * inputs; }

/* weight: [O, K], K even; to: octavo_packed_size(O, K) numbers. */
void octavo_pack(uint16_t *to, const uint16_t *weight, int64_t outputs, int64_t inputs) {
    for (int64_t o = 0; o < (outputs + STRIP - 1) / STRIP * STRIP; o++) {
        uint16_t *strip = to + o / STRIP * STRIP * inputs + o % STRIP * 2;
        for (int64_t k = 0; k < inputs; k++) strip[k / 2 * 2 * STRIP + k % 2] = o < outputs ? weight[o * inputs + k] : 0;
    }
}

#if HAS_LINEAR

struct layer {
    const uint16_t *weight, *bias; /* packed; [O] or NULL */
    int64_t outputs, inputs;
    int activation;
};

INLINE vec gelu_tanh(vec x) {
    vec inner = x * (1.5957691216f + 0.0713548163f * x * x); /* 2 * sqrt(2 / pi) * (x + 0.044715 * x^3) */
    return x / (1.0f + exponential(-inner));
}

/* Bias, activation, residual of 16 outputs of a row; of the first `count` only, at the end. */
INLINE void finish(uint16_t *to, vec x, const struct layer *l, int64_t output, const uint16_t *residual, int count) {
    int part = count < LANES;
    if (l->bias) x += part ? load_part(l->bias + output, count, BF16) : load(l->bias + output, BF16);
    if (l->activation == GELU_TANH) x = gelu_tanh(x);
    if (residual) x += part ? load_part(residual, count, BF16) : load(residual, BF16);
    part ? store_part(to, x, count, BF16) : store(to, x, BF16);
}

/* Some rows by a strip, in registers over all of K. */
INLINE void tile(uint16_t *to, const uint16_t *x, const uint16_t *residual, const struct layer *l, int64_t strip,
                 int rows) {
    __m512 sums[8][VECTORS];
    int64_t inputs = l->inputs;
    const uint16_t *weight = l->weight + strip * STRIP * inputs;
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_setzero_ps();
    for (int64_t k = 0; k < inputs; k += 2, weight += 2 * STRIP) {
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

struct product {
    struct layer layer;
    uint16_t *to;
    const uint16_t *x, *residual;
    int64_t num_rows, num_strips, next_strip;
};

static void multiply_strips(void *data) {
    struct product *p = data;
    int64_t outputs = p->layer.outputs, inputs = p->layer.inputs;
    for (int64_t strip; (strip = take(&p->next_strip)) < p->num_strips;) {
        int64_t r = 0;
#define TILE(rows)                                                                                                     \
    tile(p->to + r * outputs, p->x + r * inputs, p->residual ? p->residual + r * outputs : 0, &p->layer, strip, rows)
        for (; r + 8 <= p->num_rows; r += 8) TILE(8);
        for (; r + 4 <= p->num_rows; r += 4) TILE(4);
        for (; r + 2 <= p->num_rows; r += 2) TILE(2);
        for (; r < p->num_rows; r++) TILE(1);
    }
}

/* to = activation(x @ weight.T + bias) + residual. x: [M, K], to and residual: [M, O], bf16; residual may be `to`. */
void octavo_linear(uint16_t *to, const uint16_t *x, const uint16_t *residual, int64_t num_rows, const uint16_t *weight,
                   const uint16_t *bias, int64_t outputs, int64_t inputs, int activation, int num_threads) {
    int64_t num_strips = (outputs + STRIP - 1) / STRIP;
    struct product p = {{weight, bias, outputs, inputs, activation}, to, x, residual, num_rows, num_strips, 0};
    in_threads(multiply_strips, &p, num_threads);
}

#else

void octavo_linear(uint16_t *to, const uint16_t *x, const uint16_t *residual, int64_t num_rows, const uint16_t *weight,
                   const uint16_t *bias, int64_t outputs, int64_t inputs, int activation, int num_threads) {}

#endif
