// What a caller asks of one step: the same fields, in the same order, as the structure in structures.py.
#pragma once

#include <cstdint>

struct Step {
    int32_t rows, wanted_rows, table_width, block_tokens;
    // From one row of logits to the next.
    int32_t stride;
    // For each row its token, its position and its row in `tables`; then which rows' logits are wanted.
    const int32_t *ids, *places, *sequences, *wanted, *tables;
    void* const* keys;
    void* const* values;
    float *logits, *hidden;
    // For each row of logits its largest number, and whose it is.
    float* best;
    int64_t* best_ids;
    // Where the seconds of each kind of part are added up; null where nobody asks.
    double* spent;
    // Advanced by one for each part of a step that is done: whoever watches can tell slow from hung.
    uint64_t* progress;
};
