// The weight tiles of one or two blocks of 16 outputs, a chunk of inputs at a time: unpacked where they are bf16_packed, and
// small enough to stay in the first-level cache while the activation rows pass.
//
// Layout: weight k of output o of block n lies at block(n)[offset(k) + ...], in gemm.hpp's order [inputs/s][16][s], s = 1
// (float32) or 2 (bfloat16); the chunk is [from, to) of the inputs. Unpacked tiles lie in unpacked_[n][256 * 16].
// ISA variants: none of its own; unpack_tile (bf16_packed.hpp) has them. Tests: tests/inference/test_bf16_packed.py, and
// test_native.py for weights that are not packed. It knows how weights lie, not what is computed with them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "bf16_packed.hpp"
#include "simd.hpp"

// Inputs of a chunk that several passes of rows read, at most: two blocks * 256 inputs * 16 outputs * 2 bytes = 16 KiB of a cache of
// 48 KiB, beside the tiles of rows that are prefetched. Where one pass reads each weight once, nothing has to stay, and the unpacked
// tiles are a ring of 128 inputs.
constexpr int kTileChunkInputs = 256, kRingInputs = 128;

// Inputs of each of some equal chunks of at most `most` inputs: whole tiles.
inline int equal_chunk(int inputs, int most) {
    const int chunks = (inputs + most - 1) / most;
    return (inputs / kTileInputs + chunks - 1) / chunks * kTileInputs;
}

// Inputs of a line of weights that are not packed.
template <typename T>
constexpr int kLineInputs = kCacheLine / sizeof(T) / kVecSize;

// A matrix of weights: bf16_packed if `outlier_offsets` is not null.
template <typename T>
struct PackedWeights {
    const void* values;
    const Outlier* outliers;
    const int64_t* outlier_offsets;
    UpperBytes upper_bytes;

    bool packed() const { return kCanUnpack && sizeof(T) == sizeof(bf16) && outlier_offsets; }
    // Of weights that are not packed.
    const T* block(int n, int inputs) const { return static_cast<const T*>(values) + (size_t)n * inputs * kVecSize; }
};

// The tiles of one bf16_packed block of outputs, read from the first to the last.
class PackedBlock {
  public:
    PackedBlock() = default;
    PackedBlock(const PackedWeights<bf16>& weights, int inputs, int block)
        : tiles_(static_cast<const uint8_t*>(weights.values) + (size_t)block * inputs / kTileInputs * kPackedTileBytes),
          next_(weights.outliers + weights.outlier_offsets[block]),
          end_(weights.outliers + weights.outlier_offsets[block + 1]) {}

    const uint8_t* tile(int input) const { return tiles_ + (size_t)input / kTileInputs * kPackedTileBytes; }

    // Whether the tile at `input`, the next one, has outliers.
    bool has_outliers(int input) const { return next_ < end_ && next_->index < (uint32_t)(input + kTileInputs) * kVecSize; }

    // With kPrefetches a tile further on is prefetched, too.
    template <bool kPrefetches = true>
    void unpack(int input, const UpperBytes& upper_bytes, bf16* to) {
        unpack_tile<kPrefetches>(tile(input), upper_bytes, to);
        for (; has_outliers(input); next_++) to[next_->index - input * kVecSize].bits = next_->bits;
    }

    // Adds the outliers of the tile at `input`, the next one.
    void take_outliers(int input, TileOutliers& to) {
        for (; has_outliers(input); next_++) to.add(next_->index - input * kVecSize, next_->bits);
    }

  private:
    const uint8_t* tiles_;
    const Outlier *next_, *end_;
};

template <typename T>
class TileCache {
  public:
    // `single_pass`: whether each weight is read once only.
    TileCache(const PackedWeights<T>& weights, int inputs, int block, int blocks, bool single_pass)
        : weights_(weights), inputs_(inputs), block_(block), blocks_(blocks),
          chunk_inputs_(single_pass ? inputs : equal_chunk(inputs, kTileChunkInputs)),
          ring_mask_(single_pass && packed() ? kRingInputs - 1 : kNoRing) {
        if constexpr (kPackable)
            for (int n = 0; weights.packed() && n < blocks; n++) packed_[n] = PackedBlock(weights, inputs, block + n);
    }

    int chunk_inputs() const { return chunk_inputs_; }

    // Starts the chunk of inputs [from, to).
    void begin_chunk(int from, int to) {
        from_ = unpacked_end_ = from;
        to_ = to;
        for (int n = 0; n < 2; n++) {
            const int own = std::min(n, blocks_ - 1);
            base_[n] = packed() ? unpacked_[own] : values(own, from);
        }
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

    // The chunk's weights of a block (the first one's again, if there is no second), and an input's offset in them.
    const T* block(int n) const { return base_[n]; }
    size_t offset(int input) const { return (size_t)((input - from_) & ring_mask_) * kVecSize; }

  private:
    static constexpr bool kPackable = sizeof(T) == sizeof(bf16);
    // A mask larger than any number of inputs: offsets do not wrap.
    static constexpr int kNoRing = (1 << 30) - 1;
    // Tiles that are unpacked before they are read, so that their stores are complete.
    static constexpr int kUnpackAhead = 3 * kTileInputs;

    bool packed() const { return weights_.packed(); }
    const T* values(int n, int input) const {
        return weights_.block(block_ + n, inputs_) + (size_t)input * kVecSize;
    }

    void unpack(int n) {
        if constexpr (kPackable) {
            bf16* const to = unpacked_[n] + offset(unpacked_end_);
            if (chunk_inputs_ == inputs_) packed_[n].unpack(unpacked_end_, weights_.upper_bytes, to);
            else packed_[n].template unpack<false>(unpacked_end_, weights_.upper_bytes, to);
        }
    }

    const PackedWeights<T>& weights_;
    const int inputs_, block_, blocks_, chunk_inputs_;
    // Offset of an input in the unpacked tiles: (input - from_) & ring_mask_.
    const int ring_mask_;
    int from_ = 0, to_ = 0, unpacked_end_ = 0;
    const T* base_[2];
    PackedBlock packed_[2];
    alignas(kCacheLine) T unpacked_[2][kPackable ? kTileChunkInputs * kVecSize : 1];
};
