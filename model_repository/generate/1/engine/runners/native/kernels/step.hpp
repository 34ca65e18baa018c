// What a caller asks of one step: the same fields, in the same order, as the structure in structures.py.
#pragma once

#include <cstdint>

struct Step {
    int32_t rows, logit_count, hidden_count, table_width, block_tokens;
    // From one row of logits to the next.
    int32_t stride;
    // For each row its token, its position and its row in `tables`; then which rows' logits, and which rows' last hidden
    // states are wanted.
    const int32_t *ids, *places, *sequences, *logit_rows, *hidden_rows, *tables;
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

// Logits of hidden states that a step gave: logits[i] = output layer(hidden[numbers[i]]), the same bits as in the step.
struct Project {
    int32_t rows;
    // From one row of logits to the next.
    int32_t stride;
    // One row after the other, as wide as the model; then which of them.
    const float* hidden;
    const int32_t* numbers;
    float* logits;
    double* spent;
    uint64_t* progress;
};
