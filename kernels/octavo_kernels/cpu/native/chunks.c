/* Attention of chunks of prompts over the paged cache, in bf16 products with fp32 sums. A piece of work is a head of a
   chunk: its keys and values are brought into the order of the products once, then six queries at a time get all their
   scores, the softmax, the weighted sum. Weights are rounded to bf16; their total is of what they were before. */
#include "chunks.h"
#include "floats.h"
#include "threads.h"

#define ROWS 6 /* of queries in a tile; with 4 vectors of keys, or of dimensions, they fill 24 of 32 registers */
#define VECTORS 4
#define WIDTH (VECTORS * LANES)

/* Packed keys and values, scores and weights, queries. */
int64_t octavo_scratch_bytes(int64_t width, int64_t head_size) {
    return 2 * width * head_size * 2 + ROWS * width * (4 + 2) + ROWS * head_size * 2;
}

#if HAS_BF16

/* 16 tokens of a head, as bf16; `room` is for those of another type. */
INLINE const uint16_t *tokens_of(const struct cache *c, int values, const int32_t *table, int64_t first, int head,
                                 uint16_t *room, int head_size, int type) {
    const char *from = piece(c, values, table[first / c->block_size], head);
    from += first % c->block_size * head_size * size_of(type);
    if (type == BF16) return (const uint16_t *)from;
    for (int i = 0; i < LANES * head_size; i += LANES) store(room + i, load(from + i * size_of(type), type), BF16);
    return room;
}

/* Keys in vectors of 16: [ceil(length / 16), head_size / 2, 16, 2]. */
INLINE void pack_keys(uint16_t *to, const struct cache *c, const int32_t *table, int64_t length, int head,
                      int head_size, int type) {
    uint16_t room[LANES * head_size];
    __m512i line = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                      _mm512_set1_epi32(head_size / 2));
    for (int64_t s = 0; s < length; s += LANES) {
        const uint16_t *from = tokens_of(c, 0, table, s, head, room, head_size, type);
        for (int d = 0; d < head_size; d += 2, to += 2 * LANES)
            _mm512_storeu_si512(to, _mm512_i32gather_epi32(line, from + d, 4));
    }
}

INLINE __m512i widened(const uint16_t *from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from));
}

/* Values in pairs of tokens: [ceil(length / 2), head_size, 2], zeros beyond the last token. */
INLINE void pack_values(uint16_t *to, const struct cache *c, const int32_t *table, int64_t length, int head,
                        int head_size, int type) {
    uint16_t room[LANES * head_size];
    for (int64_t s = 0; s < length; s += LANES) {
        const uint16_t *from = tokens_of(c, 1, table, s, head, room, head_size, type);
        for (int i = 0; i < LANES && s + i < length; i += 2)
            for (int d = 0; d < head_size; d += LANES, to += 2 * LANES) {
                __m512i both = widened(from + i * head_size + d);
                if (s + i + 1 < length)
                    both = _mm512_or_si512(both, _mm512_slli_epi32(widened(from + (i + 1) * head_size + d), 16));
                _mm512_storeu_si512(to, both);
            }
    }
}

/* to = x @ columns for a tile. x: [ROWS, 2 * pairs], rows `line` apart; columns: vectors `apart`, pairs `step` apart.
   (Tried: one loop for this and linear.c's tile, with rows and vectors as arguments. GCC 12 keeps its sums in memory, and
   it takes twice as long.) */
INLINE void multiply(vec to[ROWS][VECTORS], const uint16_t *x, int64_t line, const uint16_t *columns, int64_t apart,
                     int64_t step, int64_t pairs) {
    __m512 sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++, columns += step) {
        __m512bh own[VECTORS];
        for (int v = 0; v < VECTORS; v++) own[v] = (__m512bh)_mm512_loadu_si512(columns + v * apart);
        for (int r = 0; r < ROWS; r++) {
            int32_t pair;
            memcpy(&pair, x + r * line + 2 * k, sizeof pair);
            for (int v = 0; v < VECTORS; v++)
                sums[r][v] = _mm512_dpbf16_ps(sums[r][v], (__m512bh)_mm512_set1_epi32(pair), own[v]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) to[r][v] = (vec)sums[r][v];
}

/* Weights e^(scale * (score - greatest)) of a query that sees `length` tokens, zeros up to `end`; returns their sum. */
INLINE float weigh_scores(uint16_t *weights, float *scores, int64_t length, int64_t end, float scale) {
    float most = greatest(scores, length);
    vec total = {0};
    for (int64_t s = 0; s < end; s += LANES) {
        vec weight = {0};
        if (s < length) weight = exponential((load(scores + s, FP32) - most) * scale);
        total += weight;
        store_bf16(weights + s, weight);
    }
    return sum(total);
}

struct place {
    uint16_t *keys, *values, *weights, *queries;
    float *scores;
};

INLINE struct place place_in(char *scratch, int64_t width, int head_size) {
    uint16_t *keys = (uint16_t *)scratch, *values = keys + width * head_size;
    float *scores = (float *)(values + width * head_size);
    uint16_t *weights = (uint16_t *)(scores + ROWS * width);
    return (struct place){keys, values, weights, weights + ROWS * width, scores};
}

/* Up to ROWS queries, of which the first sees `length` tokens and each next one more. from, to: [rows], `line` apart. */
INLINE void attend_tile(uint16_t *to, int64_t to_line, const uint16_t *from, int64_t line, int rows, int64_t length,
                        const struct chunk_attention *a, struct place p, int head_size) {
    int64_t width = a->chunks.width, end = length + rows - 1;
    float totals[ROWS];
    vec sums[ROWS][VECTORS];
    memset(p.queries, 0, (size_t)ROWS * head_size * sizeof *p.queries);
    for (int r = 0; r < rows; r++) memcpy(p.queries + r * head_size, from + r * line, 2 * (size_t)head_size);
    for (int64_t s = 0; s < end; s += WIDTH) {
        multiply(sums, p.queries, head_size, p.keys + s * head_size, LANES * head_size, 2 * LANES, head_size / 2);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++) store(p.scores + r * width + s + v * LANES, sums[r][v], FP32);
    }
    for (int r = 0; r < ROWS; r++) {
        int64_t own = r < rows ? length + r : end;
        totals[r] = weigh_scores(p.weights + r * width, p.scores + r * width, own, end, a->scale);
    }
    for (int d = 0; d < head_size; d += WIDTH) {
        multiply(sums, p.weights, width, p.values + 2 * d, 2 * LANES, 2 * head_size, (end + 1) / 2);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < VECTORS; v++)
                store_bf16(to + r * to_line + d + v * LANES, sums[r][v] * (a->v_scale / totals[r]));
    }
}

INLINE void attend_chunk(const struct chunk_attention *a, int64_t i, int head, char *scratch, int head_size, int type) {
    const struct chunks *k = &a->chunks;
    const int32_t *table = k->tables + k->rows[i] * k->table_width;
    int64_t start = k->starts[i], end = k->ends[i], length = k->lengths[i], to_line = a->cache.heads * head_size;
    struct place p = place_in(scratch, k->width, head_size);
    pack_keys(p.keys, &a->cache, table, length, head, head_size, type);
    pack_values(p.values, &a->cache, table, length, head, head_size, type);
    for (int64_t t = start; t < end; t += ROWS) {
        int rows = end - t < ROWS ? (int)(end - t) : ROWS;
        int64_t at = t * to_line + head * head_size, query = 3 * t * to_line + head * head_size;
        int64_t seen = length - (end - t) + 1;
        attend_tile(a->output + at, to_line, a->qkv + query, 3 * to_line, rows, seen, a, p, head_size);
    }
}

void attend_chunks(void *chunk_attention) {
    struct chunk_attention *a = chunk_attention;
    const struct cache *c = &a->cache;
    if (a->chunks.count == 0) return;
    char *scratch = a->chunks.scratch + take(&a->next_thread) * octavo_scratch_bytes(a->chunks.width, c->head_size);
    for (int64_t i; (i = take(&a->next_piece)) < a->chunks.count * c->heads;) {
        int64_t chunk = i / c->heads;
        int head = (int)(i % c->heads);
        if (c->type == BF16 && c->head_size == 64)
            attend_chunk(a, chunk, head, scratch, 64, BF16);
        else if (c->type == BF16)
            attend_chunk(a, chunk, head, scratch, c->head_size, BF16);
        else
            attend_chunk(a, chunk, head, scratch, c->head_size, FP8);
    }
}

#else

void attend_chunks(void *chunk_attention) {}

#endif

/* See struct chunk_attention; head_size is a multiple of 64, cache_type BF16 or FP8. Where octavo_has_linear() is 0
   nothing is computed. */
void octavo_attend_chunks(uint16_t *output, const uint16_t *qkv, char *data, int cache_type, int64_t num_blocks,
                          int heads, int block_size, int head_size, const int32_t *starts, const int32_t *ends,
                          const int32_t *lengths, const int32_t *rows, int64_t num_chunks, const int32_t *tables,
                          int64_t table_width, char *scratch, int64_t width, float scale, float v_scale,
                          int num_threads) {
    struct chunk_attention a = {
        {data, cache_type, num_blocks, heads, block_size, head_size},
        output,
        qkv,
        {starts, ends, lengths, rows, num_chunks, tables, table_width, scratch, width},
        scale,
        v_scale,
        0,
        0,
    };
    in_threads(attend_chunks, &a, num_threads);
}
