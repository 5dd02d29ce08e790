/* Attention of single queries over the paged cache, and cache writes. The specification is reference.paged_attention.

   The cache of a layer is [2, num_blocks, heads, block_size, head_size]. A query's result depends on its own blocks
   only, with the same bits whatever else is in the batch. */
#include "floats.h"

struct cache {
    char *data;
    int type;
    int64_t num_blocks;
    int heads, block_size, head_size;
};

INLINE char *piece(const struct cache *c, int values, int64_t block, int head) {
    int64_t line = ((values * c->num_blocks + block) * c->heads + head) * c->block_size;
    return c->data + line * c->head_size * size_of(c->type);
}

/* Two vectors of a head's numbers. Of bf16 the even and the odd ones, which takes no shuffle; else one after the other:
   queries are brought into the same order, outputs out of it. */
INLINE void load_pair(vec pair[2], const char *from, int type) {
    if (type == BF16) {
        bits both;
        memcpy(&both, from, sizeof both);
        pair[0] = (vec)(both << 16);
        pair[1] = (vec)(both & 0xffff0000);
    } else {
        pair[0] = load(from, type);
        pair[1] = load(from + LANES * size_of(type), type);
    }
}

INLINE void order(vec pair[2], int type) {
    vec a = pair[0], b = pair[1];
    if (type != BF16) return;
    pair[0] = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    pair[1] = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

INLINE void restore(vec pair[2], int type) {
    vec a = pair[0], b = pair[1];
    if (type != BF16) return;
    pair[0] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    pair[1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

/* The sums of 16 vectors, in order: each step adds halves of groups of lanes, for two vectors at once. */
INLINE vec sums(vec x[16]) {
    for (int i = 0; i < 8; i++)
        x[i] = __builtin_shufflevector(x[i], x[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(x[i], x[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        x[i] = __builtin_shufflevector(x[i], x[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               __builtin_shufflevector(x[i], x[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        x[i] = __builtin_shufflevector(x[i], x[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               __builtin_shufflevector(x[i], x[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return __builtin_shufflevector(x[0], x[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           __builtin_shufflevector(x[0], x[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

/* The products, lane by lane, of a query with one key. */
INLINE vec products(const vec *query, const char *key, int head_size, int type) {
    int width = LANES * size_of(type), v = 0;
    vec dot = {0}, pair[2];
    for (; v + 2 <= head_size / LANES; v += 2) {
        load_pair(pair, key + v * width, type);
        dot += query[v] * pair[0];
        dot += query[v + 1] * pair[1];
    }
    if (v < head_size / LANES) {
        dot += query[v] * load(key + v * width, type);
        v++;
    }
    if (head_size % LANES) dot += query[v] * load_part(key + v * width, head_size % LANES, type);
    return dot;
}

/* Scores of one query with `count` keys of a block; writes a multiple of 16. */
INLINE void score(float *scores, const vec *query, const char *keys, int count, int head_size, int type) {
    int step = head_size * size_of(type);
    for (int s = 0; s < count; s += LANES, keys += LANES * step) {
        vec dots[LANES];
        if (count - s >= LANES)
            for (int i = 0; i < LANES; i++) dots[i] = products(query, keys + i * step, head_size, type);
        else
            for (int i = 0; i < LANES; i++)
                dots[i] = i < count - s ? products(query, keys + i * step, head_size, type) : splat(0);
        store(scores + s, sums(dots), FP32);
    }
}

/* Four vectors, or two, of the output's columns, in registers over a block's tokens: sums of sums lose less. */
INLINE void weigh_columns(vec *output, const float *weights, const char *values, int count, int step, int vectors,
                          int type) {
    vec own[4], pair[2];
    for (int v = 0; v < vectors; v++) own[v] = splat(0);
    for (int s = 0; s < count; s++, values += step)
        for (int v = 0; v < vectors; v += 2) {
            load_pair(pair, values + v * LANES * size_of(type), type);
            own[v] += weights[s] * pair[0];
            own[v + 1] += weights[s] * pair[1];
        }
    for (int v = 0; v < vectors; v++) output[v] += own[v];
}

/* Adds a block's values by their weights. */
INLINE void weigh(vec *output, const float *weights, const char *values, int count, int head_size, int type) {
    int step = head_size * size_of(type), width = LANES * size_of(type), v = 0;
    for (; v + 4 <= head_size / LANES; v += 4)
        weigh_columns(output + v, weights, values + v * width, count, step, 4, type);
    for (; v + 2 <= head_size / LANES; v += 2)
        weigh_columns(output + v, weights, values + v * width, count, step, 2, type);
    for (int s = 0; v < head_size / LANES && s < count; s++)
        output[v] += weights[s] * load(values + s * step + v * width, type);
    v += v < head_size / LANES;
    for (int s = 0; head_size % LANES && s < count; s++)
        output[v] += weights[s] * load_part(values + s * step + v * width, head_size % LANES, type);
}

/* Scores become e^(score - greatest); returns their sum. `scores` has room for a multiple of 16. */
INLINE float soften(float *scores, int length) {
    for (int s = length; s % LANES; s++) scores[s] = -__builtin_inff();
    vec most = load(scores, FP32);
    for (int s = LANES; s < length; s += LANES) most = choose(load(scores + s, FP32) > most, load(scores + s, FP32), most);
    float greatest = most[0];
    for (int i = 1; i < LANES; i++) greatest = most[i] > greatest ? most[i] : greatest;
    vec total = {0};
    for (int s = 0; s < length; s += LANES) {
        vec weight = exponential(load(scores + s, FP32) - greatest);
        total += weight;
        store(scores + s, weight, FP32);
    }
    return sum(total);
}

/* One query's heads `first` to `last` - 1: block by block, as they lie in memory. scores: [heads, width]. */
INLINE void attend(char *to, const char *from, int qkv_type, const struct cache *c, const int32_t *table, int length,
                   int first, int last, float scale, float v_scale, float *scores, int64_t width, int head_size,
                   int type) {
    int whole = head_size / LANES, rest = head_size % LANES, vectors = whole + (rest > 0);
    int step = LANES * size_of(qkv_type), line = head_size * size_of(qkv_type);
    vec numbers[(last - first) * vectors]; /* queries, then outputs */
    float totals[last - first];
    for (int h = first; h < last; h++) {
        vec *query = numbers + (h - first) * vectors;
        for (int v = 0; v < whole; v++) query[v] = load(from + h * line + v * step, qkv_type) * scale;
        if (rest) query[whole] = load_part(from + h * line + whole * step, rest, qkv_type) * scale;
        for (int v = 0; v + 2 <= whole; v += 2) order(query + v, type);
    }
    for (int b = 0, at = 0; at < length; b++, at += c->block_size) {
        int count = length - at < c->block_size ? length - at : c->block_size;
        for (int h = first; h < last; h++)
            score(scores + (h - first) * width + at, numbers + (h - first) * vectors, piece(c, 0, table[b], h), count,
                  head_size, type);
    }
    for (int h = 0; h < last - first; h++) totals[h] = soften(scores + h * width, length);
    memset(numbers, 0, sizeof numbers);
    for (int b = 0, at = 0; at < length; b++, at += c->block_size) {
        int count = length - at < c->block_size ? length - at : c->block_size;
        for (int h = first; h < last; h++)
            weigh(numbers + (h - first) * vectors, scores + (h - first) * width + at, piece(c, 1, table[b], h), count,
                  head_size, type);
    }
    for (int h = first; h < last; h++) {
        vec *output = numbers + (h - first) * vectors, factor = splat(v_scale / totals[h - first]);
        for (int v = 0; v + 2 <= whole; v += 2) restore(output + v, type);
        for (int v = 0; v < whole; v++) store(to + h * line + v * step, output[v] * factor, qkv_type);
        if (rest) store_part(to + h * line + whole * step, output[whole] * factor, rest, qkv_type);
    }
}

/* qkv: [T, 3 * heads * head_size], output: [T, heads * head_size], both of qkv_type. Query i is token tokens[i], whose
   row of `tables` (table_width wide) is rows[i]; it sees lengths[i] tokens. Scores are multiplied by `scale`, which
   includes the keys', the result by v_scale. scores: fp32 [num_threads, heads, scores_width], scores_width a multiple
   of 16 that is at least the greatest length. */
void octavo_attend(char *output, const char *qkv, int qkv_type, char *data, int cache_type, int64_t num_blocks,
                   int heads, int block_size, int head_size, const int32_t *tokens, const int32_t *rows,
                   const int32_t *lengths, int num_queries, const int32_t *tables, int64_t table_width, float scale,
                   float v_scale, float *scores, int64_t scores_width, int num_threads) {
    struct cache c = {data, cache_type, num_blocks, heads, block_size, head_size};
    int width = heads * head_size * size_of(qkv_type);
    int parts = num_queries >= 4 * num_threads || num_threads == 1 ? 1 : heads < num_threads ? heads : num_threads;
#pragma omp parallel num_threads(num_threads)
    {
        extern int omp_get_thread_num(void);
        float *own = scores + omp_get_thread_num() * heads * scores_width;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < (int64_t)num_queries * parts; i++) {
            int q = i / parts, first = i % parts * heads / parts, last = (i % parts + 1) * heads / parts;
            int64_t token = tokens[q];
            const char *from = qkv + token * 3 * width;
            char *to = output + token * width;
            const int32_t *table = tables + rows[q] * table_width;
#define ATTEND(size, type)                                                                                          \
    attend(to, from, qkv_type, &c, table, lengths[q], first, last, scale, v_scale, own, scores_width, size, type)
#define ATTEND_TYPE(type)                                                                                           \
    case type:                                                                                                      \
        if (head_size == 64) ATTEND(64, type);                                                                      \
        else ATTEND(head_size, type);                                                                               \
        break
            switch (cache_type) {
                ATTEND_TYPE(FP32);
                ATTEND_TYPE(BF16);
                ATTEND_TYPE(FP16);
                ATTEND_TYPE(FP8);
            }
        }
    }
}

/* Keys over k_scale and values over v_scale, of qkv [T, 3 * heads * head_size], to the slots (block * block_size +
   offset) of slot_mapping [T]. */
void octavo_write(const char *qkv, int qkv_type, char *data, int cache_type, int64_t num_blocks, int heads,
                  int block_size, int head_size, const int64_t *slot_mapping, int64_t num_tokens, float k_scale, float v_scale,
                  int num_threads) {
    struct cache c = {data, cache_type, num_blocks, heads, block_size, head_size};
    int from_width = head_size * size_of(qkv_type), to_width = head_size * size_of(cache_type);
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int64_t t = 0; t < num_tokens; t++) {
        int64_t block = slot_mapping[t] / block_size, offset = slot_mapping[t] % block_size;
        for (int line = 0; line < 2 * heads; line++) { /* all heads' keys, then all heads' values */
            const char *from = qkv + ((t * 3 + 1) * heads + line) * from_width;
            char *to = piece(&c, line / heads, block, line % heads) + offset * to_width;
            float scale = line < heads ? k_scale : v_scale;
            int d = 0;
            for (; d + LANES <= head_size; d += LANES)
                store(to + d * size_of(cache_type), load(from + d * size_of(qkv_type), qkv_type) / scale, cache_type);
            if (d < head_size)
                store_part(to + d * size_of(cache_type),
                           load_part(from + d * size_of(qkv_type), head_size - d, qkv_type) / scale, head_size - d, cache_type);
        }
    }
}
