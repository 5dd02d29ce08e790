#ifndef OCTAVO_ATTENTION_H
#define OCTAVO_ATTENTION_H

#include "floats.h"

/* Of a layer: [2, num_blocks, heads, block_size, head_size]. */
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

/* Keys over k_scale and values over v_scale, of qkv [T, 3 * heads * head_size], go to the slots (block * block_size +
   offset) of slots [T]. */
struct writing {
    struct cache cache;
    const char *qkv;
    int qkv_type;
    const int64_t *slots;
    int64_t num_tokens;
    float k_scale, v_scale;
    int64_t next_token;
};

/* What single queries attend to: query i is token tokens[i], whose row of `tables` (table_width wide) is rows[i]; it
   sees lengths[i] tokens. */
struct queries {
    const int32_t *tokens, *rows, *lengths;
    int64_t count;
    const int32_t *tables;
    int64_t table_width;
};

/* qkv: [T, 3 * heads * head_size], output: [T, heads * head_size], both of qkv_type. Scores are multiplied by `scale`,
   which includes the keys', the result by v_scale. scores: fp32 [threads, heads, scores_width], scores_width a multiple
   of 16 that is at least the greatest length. Pieces are `parts` ranges of heads of each query. */
struct attention {
    struct cache cache;
    char *output;
    const char *qkv;
    int qkv_type;
    struct queries queries;
    float scale, v_scale, *scores;
    int64_t scores_width, parts;
    int num_threads;
    int64_t next_piece, next_thread;
};

/* For struct attention. */
__attribute__((visibility("hidden"))) int64_t parts_for(int64_t num_queries, int heads, int num_threads);

/* All threads together. */
__attribute__((visibility("hidden"))) void write_tokens(void *writing);
__attribute__((visibility("hidden"))) void attend_pieces(void *attention);

#endif
