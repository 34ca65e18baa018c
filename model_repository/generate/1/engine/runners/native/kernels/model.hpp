// A model as its caller hands it over: the same fields, in the same order, as the structures in structures.py. What a
// family does not have is null.
#pragma once

#include <cstdint>

#include "tight.hpp"

struct Weights {
    const void* values;
    // Of weights of eight bits.
    const float* scales;
    const float* bias;
    // Of weights that lie tight: the strays, where those of each block begin, and the highest exponent with a code.
    const Stray* strays;
    const int64_t* begins;
    int32_t highest;
};

// A normalisation without a shift is that by the root of the mean square.
struct Layer {
    const float *first_scale, *first_shift, *second_scale, *second_shift;
    // Of each head's queries and keys, where they are normalised.
    const float *query_scale, *key_scale;
    // Queries, keys and values in one; a gated inner layer's gate and rest by turns, sixteen outputs each.
    Weights attend, project, widen, narrow;
};

struct Model {
    int32_t layers, width, heads, shared, head_width, inner, gated, vocabulary;
    float epsilon;
    // The output layer may be the tokens' embedding itself.
    Weights tokens, output;
    // Where a token stands is added to it, or turns its queries and keys: so far for each place, half a head of them.
    const float *positions, *turns;
    const float *final_scale, *final_shift;
    const Layer* layer;
};
