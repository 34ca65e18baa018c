// The arguments of step_model and project_rows, field by field as in structures.py.
// Layout: arrays are row-major; a row of logits is `logit_stride` floats. ISA variants: none.
// Test: tests/inference/test_native.py.
#pragma once

#include <cstdint>

struct Adapter;

struct Step {
    int32_t rows, logit_count, hidden_count, table_width, block_tokens;
    int32_t logit_stride, adapter_count;
    // For each row its token id, its position and its sequence, a row of `block_tables` [sequences][table_width]. Then the
    // rows whose logits are computed, and those whose final hidden states are.
    const int32_t *ids, *positions, *sequences, *logit_rows, *hidden_rows, *block_tables;
    // The KV cache, and the bytes of one block with the keys and values of all layers: see kv_layout.hpp.
    void* kv_cache;
    int64_t block_bytes;
    // The LoRA adapters of the step (low_rank.hpp): rows adapter_rows[n] to adapter_rows[n + 1] - 1 have adapters[n]. Rows
    // before the first have none.
    const Adapter* const* adapters;
    const int32_t* adapter_rows;
    float *logits, *hidden;
    // The maximum of each row of logits, and its token id.
    float* max_logits;
    int64_t* argmax_ids;
    // Seconds by kind of stage (clock.hpp), or null.
    double* stage_seconds;
    // Incremented after each stage: a watchdog distinguishes a slow step from one that hangs.
    uint64_t* progress;
};

// logits[i] = lm_head(hidden[hidden_rows[i]]), the same bits as the step's own logits.
struct Project {
    int32_t rows;
    int32_t logit_stride;
    // [count][hidden_size], and the indices of the rows to project.
    const float* hidden;
    const int32_t* hidden_rows;
    float* logits;
    double* stage_seconds;
    uint64_t* progress;
};
