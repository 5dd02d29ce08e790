/* The largest logit of each row, and where it is. */
#include "floats.h"
#include "threads.h"

/* Index of a row's largest number, the first of equals; of its first NaN, if there is one. */
INLINE int64_t largest(const char *row, int64_t width, int type) {
    int size = size_of(type), rest = width % LANES;
    int64_t whole = width - rest;
    vec best = splat(-__builtin_inff());
    ints block = {0}, unordered = {0};
    for (int64_t i = 0; i < whole; i += LANES) {
        vec x = load(row + i * size, type);
        ints more = x > best;
        best = choose(more, x, best);
        block = (more & (int32_t)(i / LANES)) | (~more & block);
        unordered |= x != x;
    }
    int64_t found = 0;
    float most = -__builtin_inff();
    int nan = 0;
    for (int lane = 0; lane < LANES; lane++) {
        int64_t at = (int64_t)block[lane] * LANES + lane;
        nan |= unordered[lane];
        if (whole && (best[lane] > most || (best[lane] == most && at < found))) {
            most = best[lane];
            found = at;
        }
    }
    for (int64_t i = nan ? 0 : whole; i < width; i++) {
        float x = load_part(row + i * size, 1, type)[0];
        if (x != x) return i;
        if (x > most) {
            most = x;
            found = i;
        }
    }
    return found;
}

struct rows {
    int32_t *index;
    float *value;
    const char *x;
    int64_t num_rows, width, next;
    int type;
};

static void search_rows(void *data) {
    struct rows *p = data;
    for (int64_t r; (r = take(&p->next)) < p->num_rows;) {
        const char *row = p->x + r * p->width * size_of(p->type);
        p->index[r] = (int32_t)(p->type == BF16 ? largest(row, p->width, BF16) : largest(row, p->width, FP32));
        p->value[r] = load_part(row + p->index[r] * (int64_t)size_of(p->type), 1, p->type)[0];
    }
}

/* index, value: [M]; x: [M, N] of `type`, fp32 or bf16; 0 < N < 2^31. */
void octavo_argmax(int32_t *index, float *value, const char *x, int64_t num_rows, int64_t width, int type,
                   int num_threads) {
    struct rows rows = {index, value, x, num_rows, width, 0, type};
    in_threads(search_rows, &rows, num_rows > 1 ? num_threads : 1);
}
