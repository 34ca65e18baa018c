// The weight tiles of one or two blocks of 16 outputs, a chunk of inputs at a time: prefetched and unpacked where they are
// bf16_packed, and small enough to stay in the first-level cache while the activation rows pass.
//
// Layout: weight k of output o of block n lies at block(n)[offset(k) + ...], in gemm.hpp's order [inputs/s][16][s], s = 1
// (float32) or 2 (bfloat16); the chunk is [from, to) of the inputs. Unpacked tiles lie in unpacked_[n][384 * 16].
// ISA variants: none of its own; unpack_tile (bf16_packed.hpp) has them. Tests: tests/inference/test_bf16_packed.py, and
// test_native.py for weights that are not packed. It knows how weights lie, not what is computed with them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "bf16_packed.hpp"
#include "simd.hpp"

// Inputs of a chunk that several passes of rows read: 2 blocks * 384 inputs * 16 outputs * 2 bytes = 24 KiB of a 32 or
// 48 KiB cache. Where one pass reads each weight once, nothing has to stay, and the unpacked tiles are a ring of 128 inputs.
constexpr int kChunkInputs = 384, kRingInputs = 128;

// A matrix of weights: bf16_packed if `outlier_offsets` is not null.
template <typename T>
struct PackedWeights {
    const void* values;
    const Outlier* outliers;
    const int64_t* outlier_offsets;
    ExponentTable exponents;
};

template <typename T>
class TileCache {
  public:
    // `single_pass`: whether each weight is read once only.
    TileCache(const PackedWeights<T>& weights, int inputs, int block, int blocks, bool single_pass)
        : weights_(weights), inputs_(inputs), block_(block), blocks_(blocks), chunk_inputs_(single_pass ? inputs : kChunkInputs),
          ring_mask_(single_pass && packed() ? kRingInputs - 1 : kNoRing) {
        for (int n = 0; packed() && n < blocks; n++) outliers_[n] = weights.outliers + weights.outlier_offsets[block + n];
    }

    int chunk_inputs() const { return chunk_inputs_; }

    // Starts the chunk of inputs [from, to).
    void begin_chunk(int from, int to) {
        from_ = unpacked_end_ = from;
        to_ = to;
        for (int n = 0; n < blocks_; n++)
            base_[n] = packed() ? unpacked_[n] : static_cast<const T*>(weights_.values) + index_of(n, from);
    }

    // Makes the tile at this input ready, and unpacks a little ahead: the processor reads memory and accumulates at the same
    // time. Returns the end of the inputs that are ready and contiguous from here.
    int prepare(int input) {
        if (!packed()) return to_;
        for (const int end = std::min(input + kUnpackAhead, to_); unpacked_end_ < end; unpacked_end_ += kTileInputs)
            for (int n = 0; n < blocks_; n++) unpack(n);
        const int ready = unpacked_end_ == to_ ? to_ : input + kTileInputs;
        const int ring_end = from_ + ((input - from_) | ring_mask_) + 1;
        return std::min(ready, ring_end);
    }

    // The chunk's weights of a block, and an input's offset in them.
    const T* block(int n) const { return base_[n]; }
    size_t offset(int input) const { return (size_t)((input - from_) & ring_mask_) * kVecSize; }

  private:
    static constexpr bool kPackable = sizeof(T) == sizeof(bf16);
    // A mask larger than any number of inputs: offsets do not wrap.
    static constexpr int kNoRing = (1 << 30) - 1;
    // Tiles that are unpacked before they are read, so that their stores are complete.
    static constexpr int kUnpackAhead = 3 * kTileInputs;

    bool packed() const { return kPackable && weights_.outlier_offsets; }
    size_t index_of(int n, int input) const { return ((size_t)(block_ + n) * inputs_ + input) * kVecSize; }

    void unpack(int n) {
        if constexpr (kPackable) {
            T* to = unpacked_[n] + offset(unpacked_end_);
            const uint8_t* tile = static_cast<const uint8_t*>(weights_.values) + index_of(n, unpacked_end_) / 2 * 3;
            unpack_tile(tile, weights_.exponents, to);
            const uint32_t first = unpacked_end_ * kVecSize;
            const Outlier* end = weights_.outliers + weights_.outlier_offsets[block_ + n + 1];
            for (; outliers_[n] < end && outliers_[n]->index < first + kTileWeights; outliers_[n]++)
                to[outliers_[n]->index - first].bits = outliers_[n]->bits;
        }
    }

    const PackedWeights<T>& weights_;
    const int inputs_, block_, blocks_, chunk_inputs_;
    // Offset of an input in the unpacked tiles: (input - from_) & ring_mask_.
    const int ring_mask_;
    int from_ = 0, to_ = 0, unpacked_end_ = 0;
    const T* base_[2];
    // The next outlier of each block.
    const Outlier* outliers_[2];
    alignas(kCacheLine) T unpacked_[2][kPackable ? kChunkInputs * kVecSize : 1];
};
