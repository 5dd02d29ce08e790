/* All layers of GPT-2 in one section of threads, which meet after each of its parts: no way back to Python, no
   beginning and end of threads between them. Numbers are those of the single functions. */
#include "attention.h"
#include "chunks.h"
#include "floats.h"
#include "linear.h"
#include "norm.h"
#include "threads.h"

/* As in native_blocks.py. scale: of scores, the keys' included. */
struct block {
    const uint16_t *norm_1_weight, *norm_1_bias, *norm_2_weight, *norm_2_bias;
    struct layer qkv, attention_out, mlp_in, mlp_out;
    float scale, k_scale, v_scale;
};

/* As in native_blocks.py. hidden: [T, E], first what goes in, then what comes out; narrow: [T, E], wide: [T, 3 * E],
   inner: [T, n_inner], for what is between. cache: of the first layer; layer_bytes: of each. num_computed: counts
   layers. */
struct step {
    const struct block *blocks;
    int64_t num_layers;
    float eps;
    uint16_t *hidden, *narrow, *wide, *inner;
    int64_t num_tokens;
    struct cache cache;
    int64_t layer_bytes;
    const int64_t *slots;
    struct queries queries;
    float *scores;
    int64_t scores_width;
    struct chunks chunks;
    int64_t *num_computed;
    int num_threads;
};

struct parts {
    struct norm norm_1;
    struct product qkv;
    struct writing write;
    struct attention attend;
    struct chunk_attention attend_chunks;
    struct product attention_out;
    struct norm norm_2;
    struct product mlp_in, mlp_out;
    int64_t threads_through;
};

struct run {
    const struct step *step;
    struct parts *parts; /* of each layer */
};

static struct norm norm_of(const struct step *s, const uint16_t *weight, const uint16_t *bias, int64_t width) {
    return (struct norm){s->narrow, s->hidden, weight, bias, s->num_tokens, width, s->eps, 0};
}

static struct product product_of(const struct step *s, const struct layer *l, uint16_t *to, const uint16_t *x,
                                 const uint16_t *residual) {
    return (struct product){*l, to, x, residual, s->num_tokens, s->num_threads, 0};
}

static struct parts parts_of(const struct step *s, int64_t layer) {
    const struct block *b = s->blocks + layer;
    struct cache cache = s->cache;
    cache.data += layer * s->layer_bytes;
    int64_t parts = parts_for(s->queries.count, cache.heads, s->num_threads), width = b->qkv.inputs;
    char *narrow = (char *)s->narrow, *wide = (char *)s->wide;
    return (struct parts){
        .norm_1 = norm_of(s, b->norm_1_weight, b->norm_1_bias, width),
        .qkv = product_of(s, &b->qkv, s->wide, s->narrow, 0),
        .write = {cache, wide, BF16, s->slots, s->num_tokens, b->k_scale, b->v_scale, 0},
        .attend = {cache, narrow, wide, BF16, s->queries, b->scale, b->v_scale, s->scores, s->scores_width, parts,
                   s->num_threads, 0, 0},
        .attend_chunks = {cache, s->narrow, s->wide, s->chunks, b->scale, b->v_scale, 0, 0},
        .attention_out = product_of(s, &b->attention_out, s->hidden, s->narrow, s->hidden),
        .norm_2 = norm_of(s, b->norm_2_weight, b->norm_2_bias, width),
        .mlp_in = product_of(s, &b->mlp_in, s->inner, s->narrow, 0),
        .mlp_out = product_of(s, &b->mlp_out, s->hidden, s->inner, s->hidden),
    };
}

static void compute(void *data) {
    const struct run *r = data;
    int n = r->step->num_threads;
#define DO(body, part) (body(part), meet(n))
    for (struct parts *p = r->parts; p < r->parts + r->step->num_layers; p++) {
        DO(normalize_rows, &p->norm_1);
        DO(multiply_strips, &p->qkv);
        DO(write_tokens, &p->write);
        attend_pieces(&p->attend);
        DO(attend_chunks, &p->attend_chunks);
        DO(multiply_strips, &p->attention_out);
        DO(normalize_rows, &p->norm_2);
        DO(multiply_strips, &p->mlp_in);
        DO(multiply_strips, &p->mlp_out);
        if (take(&p->threads_through) == 0) __atomic_fetch_add(r->step->num_computed, 1, __ATOMIC_RELAXED);
    }
}

void octavo_blocks(const struct step *step) {
    struct parts parts[step->num_layers];
    struct run run = {step, parts};
    for (int64_t layer = 0; layer < step->num_layers; layer++) parts[layer] = parts_of(step, layer);
    in_threads(compute, &run, step->num_threads);
}
