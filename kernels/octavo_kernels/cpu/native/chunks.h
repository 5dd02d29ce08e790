#ifndef OCTAVO_CHUNKS_H
#define OCTAVO_CHUNKS_H

#include "attention.h"

/* Chunk i is tokens starts[i] to ends[i] - 1, the last of the lengths[i] that row rows[i] of `tables` has by then.
   scratch: of each thread, scratch_bytes(width, head_size) bytes. */
struct chunks {
    const int32_t *starts, *ends, *lengths, *rows;
    int64_t count;
    const int32_t *tables;
    int64_t table_width;
    char *scratch;
    int64_t width; /* at least the greatest length, a multiple of 64 */
};

/* As struct attention, of bf16. */
struct chunk_attention {
    struct cache cache;
    uint16_t *output;
    const uint16_t *qkv;
    struct chunks chunks;
    float scale, v_scale;
    int64_t next_piece, next_thread;
};

/* All threads together. */
__attribute__((visibility("hidden"))) void attend_chunks(void *chunk_attention);

#endif
