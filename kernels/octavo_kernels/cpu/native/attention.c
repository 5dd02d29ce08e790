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

/* Scores of one query with `count` keys of a block. */
INLINE void score(float *scores, const vec *query, const char *keys, int count, int head_size, int type) {
    int step = head_size * size_of(type), whole = head_size / LANES, rest = head_size % LANES;
    for (int s = 0; s < count; s++, keys += step) {
        vec dot = {0};
        for (int v = 0; v < whole; v++) dot += query[v] * load(keys + v * LANES * size_of(type), type);
        if (rest) dot += query[whole] * load_part(keys + whole * LANES * size_of(type), rest, type);
        scores[s] = sum(dot);
    }
}

/* `vectors` of 16 columns, held in registers over all tokens. */
INLINE void weigh_columns(vec *output, const float *weights, const char *values, int count, int step, int vectors,
                          int type) {
    vec own[4];
    for (int v = 0; v < vectors; v++) own[v] = output[v];
    for (int s = 0; s < count; s++, values += step)
        for (int v = 0; v < vectors; v++) own[v] += weights[s] * load(values + v * LANES * size_of(type), type);
    for (int v = 0; v < vectors; v++) output[v] = own[v];
}

/* Adds a block's values by their weights. */
INLINE void weigh(vec *output, const float *weights, const char *values, int count, int head_size, int type) {
    int step = head_size * size_of(type), width = LANES * size_of(type), v = 0;
    for (; v + 4 <= head_size / LANES; v += 4)
        weigh_columns(output + v, weights, values + v * width, count, step, 4, type);
    for (; v < head_size / LANES; v++)
        weigh_columns(output + v, weights, values + v * width, count, step, 1, type);
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

#define MOST_VECTORS 16 /* heads of up to 256 */

INLINE void attend(char *to, const char *from, int qkv_type, const struct cache *c, const int32_t *table, int length,
                   int head, float scale, float v_scale, float *scores, int head_size, int type) {
    vec query[MOST_VECTORS], output[MOST_VECTORS] = {{0}};
    int whole = head_size / LANES, rest = head_size % LANES, width = LANES * size_of(qkv_type);
    for (int v = 0; v < whole; v++) query[v] = load(from + v * width, qkv_type) * scale;
    if (rest) query[whole] = load_part(from + whole * width, rest, qkv_type) * scale;
    for (int b = 0, at = 0; at < length; b++, at += c->block_size) {
        int count = length - at < c->block_size ? length - at : c->block_size;
        score(scores + at, query, piece(c, 0, table[b], head), count, head_size, type);
    }
    float total = soften(scores, length);
    for (int b = 0, at = 0; at < length; b++, at += c->block_size) {
        int count = length - at < c->block_size ? length - at : c->block_size;
        weigh(output, scores + at, piece(c, 1, table[b], head), count, head_size, type);
    }
    for (int v = 0; v < whole; v++) store(to + v * width, output[v] / total * v_scale, qkv_type);
    if (rest) store_part(to + whole * width, output[whole] / total * v_scale, rest, qkv_type);
}

/* qkv: [T, 3 * heads * head_size], output: [T, heads * head_size], both of qkv_type. Query i is token tokens[i], whose
   row of `tables` (table_width wide) is rows[i]; it sees lengths[i] tokens. Scores are multiplied by `scale`, which
   includes the keys', the result by v_scale. scores: [num_threads, scores_width] fp32,
   scores_width a multiple of 16 that is at least the greatest length. */
void octavo_attend(char *output, const char *qkv, int qkv_type, char *data, int cache_type, int64_t num_blocks,
                   int heads, int block_size, int head_size, const int32_t *tokens, const int32_t *rows,
                   const int32_t *lengths, int num_queries, const int32_t *tables, int64_t table_width, float scale,
                   float v_scale, float *scores, int64_t scores_width, int num_threads) {
    struct cache c = {data, cache_type, num_blocks, heads, block_size, head_size};
    int width = head_size * size_of(qkv_type);
#pragma omp parallel num_threads(num_threads)
    {
        extern int omp_get_thread_num(void);
        float *own = scores + omp_get_thread_num() * scores_width;
#pragma omp for schedule(dynamic, 4)
        for (int64_t i = 0; i < (int64_t)num_queries * heads; i++) {
            int q = i / heads, head = i % heads;
            int64_t token = tokens[q];
            const char *from = qkv + (token * 3 * heads + head) * width;
            char *to = output + (token * heads + head) * width;
            const int32_t *table = tables + rows[q] * table_width;
#define ATTEND(size, type) \
    attend(to, from, qkv_type, &c, table, lengths[q], head, scale, v_scale, own, size, type)
#define ATTEND_TYPE(type)                                                      \
    case type:                                                                 \
        if (head_size == 64) ATTEND(64, type);                                 \
        else ATTEND(head_size, type);                                          \
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
