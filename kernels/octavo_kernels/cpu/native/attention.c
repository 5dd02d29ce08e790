/* Attention of single queries over the paged cache, and cache writes. The specification is reference.paged_attention.
   A query's result depends on its own blocks only, with the same bits whatever else is in the batch. */
#include "attention.h"
#include "floats.h"
#include "threads.h"

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
    pair[0] = SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    pair[1] = SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

INLINE void restore(vec pair[2], int type) {
    vec a = pair[0], b = pair[1];
    if (type != BF16) return;
    pair[0] = SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    pair[1] = SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

/* The sums of 16 vectors, in order: each step adds halves of groups of lanes, for two vectors at once. */
INLINE vec sums(vec x[16]) {
    for (int i = 0; i < 8; i++)
        x[i] = SHUFFLE(x[i], x[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               SHUFFLE(x[i], x[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++)
        x[i] = SHUFFLE(x[i], x[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               SHUFFLE(x[i], x[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        x[i] = SHUFFLE(x[i], x[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               SHUFFLE(x[i], x[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return SHUFFLE(x[0], x[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           SHUFFLE(x[0], x[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
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
    float most = greatest(scores, length);
    vec total = {0};
    for (int s = 0; s < length; s += LANES) {
        vec weight = exponential(load(scores + s, FP32) - most);
        total += weight;
        store(scores + s, weight, FP32);
    }
    return sum(total);
}

/* What a query attends to. */
struct sequence {
    const int32_t *table;
    int length;
};

/* How many of its tokens are in its block b: all of a block's, fewer at the end, 0 beyond it. */
INLINE int tokens_in(const struct sequence *s, int b, int block_size) {
    int left = s->length - b * block_size;
    return left < 0 ? 0 : left < block_size ? left : block_size;
}

/* Fetches a head's keys or values of block b, if that is not full. Heads of full blocks lie one behind the other, which
   the processor foresees better than it is told; the pieces of others do not. */
INLINE void expect(const struct cache *c, int values, const struct sequence *s, int b, int head) {
    int count = tokens_in(s, b, c->block_size);
    if (count == 0 || count == c->block_size) return;
    const char *from = piece(c, values, s->table[b], head), *end = from + count * c->head_size * size_of(c->type);
    for (; from < end; from += 64) __builtin_prefetch(from, 0, 2);
}

/* One query's heads `first` to `last` - 1: block by block, as they lie in memory. scores: [heads, width]; next: what
   the query after this one attends to. */
INLINE void attend(char *to, const char *from, int qkv_type, const struct cache *c, struct sequence own,
                   struct sequence next, int first, int last, float scale, float v_scale, float *scores, int64_t width,
                   int head_size, int type) {
    int whole = head_size / LANES, rest = head_size % LANES, vectors = whole + (rest > 0);
    int step = LANES * size_of(qkv_type), line = head_size * size_of(qkv_type), size = c->block_size, count;
    vec numbers[(last - first) * vectors]; /* queries, then outputs */
    float totals[last - first];
    for (int h = first; h < last; h++) {
        vec *query = numbers + (h - first) * vectors;
        for (int v = 0; v < whole; v++) query[v] = load(from + h * line + v * step, qkv_type) * scale;
        if (rest) query[whole] = load_part(from + h * line + whole * step, rest, qkv_type) * scale;
        for (int v = 0; v + 2 <= whole; v += 2) order(query + v, type);
    }
    for (int b = 0; (count = tokens_in(&own, b, size)); b++) {
        int is_last = own.length <= (b + 1) * size;
        for (int h = first; h < last; h++) {
            expect(c, is_last, &own, is_last ? 0 : b + 1, h);
            score(scores + (h - first) * width + b * size, numbers + (h - first) * vectors,
                  piece(c, 0, own.table[b], h), count, head_size, type);
        }
    }
    for (int h = 0; h < last - first; h++) totals[h] = soften(scores + h * width, own.length);
    memset(numbers, 0, sizeof numbers);
    for (int b = 0; (count = tokens_in(&own, b, size)); b++) {
        int is_last = own.length <= (b + 1) * size;
        for (int h = first; h < last; h++) {
            expect(c, !is_last, is_last ? &next : &own, is_last ? 0 : b + 1, h);
            weigh(numbers + (h - first) * vectors, scores + (h - first) * width + b * size,
                  piece(c, 1, own.table[b], h), count, head_size, type);
        }
    }
    for (int h = first; h < last; h++) {
        vec *output = numbers + (h - first) * vectors, factor = splat(v_scale / totals[h - first]);
        for (int v = 0; v + 2 <= whole; v += 2) restore(output + v, type);
        for (int v = 0; v < whole; v++) store(to + h * line + v * step, output[v] * factor, qkv_type);
        if (rest) store_part(to + h * line + whole * step, output[whole] * factor, rest, qkv_type);
    }
}

INLINE struct sequence sequence_of(const struct attention *a, int64_t piece) {
    const struct queries *q = &a->queries;
    int64_t i = piece / a->parts;
    if (i >= q->count) return (struct sequence){0, 0};
    return (struct sequence){q->tables + q->rows[i] * q->table_width, q->lengths[i]};
}

INLINE void attend_piece(const struct attention *a, int64_t piece, int64_t next, float *scores) {
    const struct cache *c = &a->cache;
    int64_t part = piece % a->parts, token = a->queries.tokens[piece / a->parts];
    int first = part * c->heads / a->parts, last = (part + 1) * c->heads / a->parts;
    int64_t width = (int64_t)c->heads * c->head_size * size_of(a->qkv_type);
    const char *from = a->qkv + token * 3 * width;
    char *to = a->output + token * width;
#define ATTEND(size, type)                                                                                             \
    attend(to, from, a->qkv_type, c, sequence_of(a, piece), sequence_of(a, next), first, last, a->scale, a->v_scale,   \
           scores, a->scores_width, size, type)
#define ATTEND_TYPE(type)                                                                                              \
    case type:                                                                                                         \
        if (c->head_size == 64) ATTEND(64, type);                                                                      \
        else ATTEND(c->head_size, type);                                                                               \
        break
    switch (c->type) {
        ATTEND_TYPE(FP32);
        ATTEND_TYPE(BF16);
        ATTEND_TYPE(FP8);
    }
}

void attend_pieces(void *attention) {
    struct attention *a = attention;
    float *scores = a->scores + take(&a->next_thread) * a->cache.heads * a->scores_width;
    int64_t end = a->queries.count * a->parts, next;
    for (int64_t i = take(&a->next_piece); i < end; i = next) {
        int enough = end - i > 2 * (int64_t)a->num_threads; /* to take one ahead; else another thread would have none */
        next = enough ? take(&a->next_piece) : end;
        attend_piece(a, i, next, scores);
        if (!enough) next = take(&a->next_piece);
    }
}

/* Few queries are divided, so that all threads have something to do. */
int64_t parts_for(int64_t num_queries, int heads, int num_threads) {
    if (num_queries >= 4 * (int64_t)num_threads) return 1;
    return heads < num_threads ? heads : num_threads;
}

/* See struct attention. */
void octavo_attend(char *output, const char *qkv, int qkv_type, char *data, int cache_type, int64_t num_blocks,
                   int heads, int block_size, int head_size, const int32_t *tokens, const int32_t *rows,
                   const int32_t *lengths, int64_t num_queries, const int32_t *tables, int64_t table_width, float scale,
                   float v_scale, float *scores, int64_t scores_width, int num_threads) {
    struct attention a = {
        {data, cache_type, num_blocks, heads, block_size, head_size},
        output,
        qkv,
        qkv_type,
        {tokens, rows, lengths, num_queries, tables, table_width},
        scale,
        v_scale,
        scores,
        scores_width,
        parts_for(num_queries, heads, num_threads),
        num_threads,
        0,
        0,
    };
    in_threads(attend_pieces, &a, num_threads);
}

INLINE void write_token(const struct writing *w, int64_t t) {
    const struct cache *c = &w->cache;
    int from_size = size_of(w->qkv_type), to_size = size_of(c->type), heads = c->heads, head_size = c->head_size;
    int64_t block = w->slots[t] / c->block_size, offset = w->slots[t] % c->block_size;
    for (int line = 0; line < 2 * heads; line++) { /* all heads' keys, then all heads' values */
        const char *from = w->qkv + ((t * 3 + 1) * heads + line) * head_size * from_size;
        char *to = piece(c, line / heads, block, line % heads) + offset * head_size * to_size;
        float scale = line < heads ? w->k_scale : w->v_scale;
        int d = 0, rest = head_size % LANES;
        if (scale == 1 && c->type == w->qkv_type) {
            memcpy(to, from, (size_t)head_size * to_size);
            continue;
        }
        for (; d + LANES <= head_size; d += LANES)
            store(to + d * to_size, load(from + d * from_size, w->qkv_type) / scale, c->type);
        if (rest)
            store_part(to + d * to_size, load_part(from + d * from_size, rest, w->qkv_type) / scale, rest, c->type);
    }
}

void write_tokens(void *writing) {
    struct writing *w = writing;
    for (int64_t t; (t = take(&w->next_token)) < w->num_tokens;) write_token(w, t);
}

/* See struct writing. */
void octavo_write(const char *qkv, int qkv_type, char *data, int cache_type, int64_t num_blocks, int heads,
                  int block_size, int head_size, const int64_t *slots, int64_t num_tokens, float k_scale, float v_scale,
                  int num_threads) {
    struct writing w = {
        {data, cache_type, num_blocks, heads, block_size, head_size},
        qkv,
        qkv_type,
        slots,
        num_tokens,
        k_scale,
        v_scale,
        0,
    };
    in_threads(write_tokens, &w, num_tokens > 1 ? num_threads : 1);
}
