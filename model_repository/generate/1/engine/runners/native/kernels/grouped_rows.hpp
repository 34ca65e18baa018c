// Activation rows in bytes for weights in groups. Over each group of 32 inputs
//   x = scale * xq + low,  xq from 1 to 255,  scale = (max x - min x) / 254,  low = min x - scale
// One-sided groups, which are usual, have half of the error that signed bytes with a scale of max |x| / 127 give. A few groups,
// those with outliers, have most of a row's error. They keep a remainder in bytes as well, with a group's layout:
//   x = scale * xq + low + scale / 254 * (remainder - 128)   if scale ** 2 > kRemainderRatio * mean of scale ** 2 over the row's groups
// Where vpmaddubsw multiplies (kByteMiddle, grouped_form.hpp), signed bytes are xq - 128 and remainder - 128, and low is what 0 stands
// for; these bytes as they are lie beside them, and lowest is what their 0 stands for.
//
// Layout: tiles of rows that are multiplied together, [row / tile][group], each:
//   [row % tile][32] bytes, or [row % tile][2][32] signed and unsigned ones; then [row % tile][6] in float32: scale, low, lowest, and
//   sums of the (signed) bytes: of the first 16, of the other 16, of all
// So a tile of AMX begins at a cache line. Remainders lie likewise, and for
// each row and 256 inputs a bit for each group that has one. Without one its fields are 0.
// Inputs are padded with zeros to a multiple of 256.
// ISA variants: those of simd.hpp; a tile has 16 rows for AMX, 12 with AVX-512 and 4 otherwise, or fewer for few rows.
// Test: tests/inference/test_grouped.py. It knows no weights.
#pragma once

#include <algorithm>
#include <cstddef>

#include "amx.hpp"
#include "fma.hpp"
#include "grouped_form.hpp"
#include "rows.hpp"
#include "simd.hpp"

// Rows of a pass at most.
constexpr int kGroupedPassRows = kAccumulators == 16 ? 12 : 4;
#ifdef __AMX_BF16__
constexpr int kGroupedTile = kTileRows, kGroupedRowsPerPass = 8;
#else
constexpr int kGroupedTile = kGroupedPassRows, kGroupedRowsPerPass = kGroupedPassRows;
#endif

// Lower ones cost more time than they gain: rows that are multiplied together share the groups with remainders.
constexpr float kRemainderRatio = 6;

inline int padded_to_super(int inputs) { return (inputs + kSuperInputs - 1) / kSuperInputs * kSuperInputs; }

// A group of the rows from one on, in their tile.
struct ByteGroup {
    enum Field { kScale, kLow, kLowest, kSums16, kSums32 = kSums16 + kRowGroup / 16, kFields = kSums32 + kRowGroup / 32 };
    // Of a row.
    static constexpr int kNumberBytes = kRowGroup * (kByteMiddle ? 2 : 1), kBytes = kNumberBytes + kFields * sizeof(float);
    uint8_t* numbers;
    float* fields;
    int tile;

    uint8_t* row(int i) const { return numbers + i * kNumberBytes; }
    // With kByteMiddle, the bytes of a row that are not signed.
    uint8_t* unsigned_row(int i) const { return row(i) + kRowGroup; }
    float& field(int field, int i) const { return fields[i * kFields + field]; }
    // Of the rows that follow in each group.
    ByteGroup skip_rows(int rows) const { return {row(rows), fields + rows * kFields, tile}; }
    // The group that many groups later.
    ByteGroup skip_groups(int count) const {
        const int bytes = count * tile * kBytes;
        return {numbers + bytes, reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(fields) + bytes), tile};
    }
};

// Groups of some rows over a chunk of inputs, in the order in which they are added up: whole ones, then remainders. Rows without
// one add zeros to sums that are never -0, which changes no bit.
struct ByteGroups {
    ByteGroup whole, remainder;
    // Bit i: one of the rows has a remainder of group i.
    unsigned flags;
    int whole_count;

    int count() const { return whole_count + __builtin_popcount(flags); }
    // Calls `task(k, group)` for each: that of the chunk's inputs from k on.
    template <typename Task>
    TRITONLM_INLINE void for_each(Task task) const {
        unsigned left = flags;
        ByteGroup group = whole;
        for (int i = 0, number = 0, end = count(); i < end; i++) {
            task(number * kRowGroup, group);
            if (++number < whole_count && i < whole_count) {
                group = group.skip_groups(1);
            } else if (left) {
                number = __builtin_ctz(left);
                left &= left - 1;
                group = remainder.skip_groups(number);
            }
        }
    }
};

class GroupedRows {
  public:
    void reserve(size_t rows, int inputs) {
        const size_t tiles = (rows + kGroupedTile - 1) / kGroupedTile;
        const size_t groups = tiles * kGroupedTile * (padded_to_super(inputs) / kRowGroup);
        if (bytes_.size() >= groups * ByteGroup::kBytes) return;
        bytes_.resize(groups * ByteGroup::kBytes);
        remainders_.resize(groups * ByteGroup::kBytes);
        flags_.resize(groups / kFlags);
    }

    // The rows of a tile, for this many rows.
    static int tile_for(int rows) { return pass_rows(rows, kGroupedTile); }

    template <typename T>
    void quantize(const Rows<T>& from, int row, int tile) {
        const int inputs = from.inputs(), padded = padded_to_super(inputs);
        float squares = 0;
        for (int k = 0; k < padded; k += kRowGroup) {
            const ByteGroup whole = group(row, inputs, k, tile);
            quantize_group(Numbers(from, row, k), whole);
            squares += whole.field(ByteGroup::kScale, 0) * whole.field(ByteGroup::kScale, 0);
        }
        const float limit = kRemainderRatio * squares / ((inputs + kRowGroup - 1) / kRowGroup);
        for (int k = 0; k < padded; k += kSuperInputs) {
            unsigned flags = 0;
            for (int i = 0; i < kFlags; i++) {
                const int input = k + i * kRowGroup;
                const ByteGroup whole = group(row, inputs, input, tile), rest = remainder(row, inputs, input, tile);
                const float scale = whole.field(ByteGroup::kScale, 0);
                if (scale * scale > limit) {
                    quantize_remainder(Numbers(from, row, input), whole, rest);
                    flags |= 1u << i;
                } else {
                    for (int field = 0; field < ByteGroup::kFields; field++) rest.field(field, 0) = 0;
                }
            }
            flags_[flag_index(row, inputs, k)] = flags;
        }
    }

    // Of the group of inputs from k on; one type for `quantize`, which writes, and for matmuls, which read.
    ByteGroup group(int row, int inputs, int k, int tile) const { return group_of(bytes_, row, inputs, k, tile); }
    ByteGroup remainder(int row, int inputs, int k, int tile) const { return group_of(remainders_, row, inputs, k, tile); }

    // The groups of `count` rows over `inputs_of_chunk` inputs from k on, a multiple of 256.
    ByteGroups groups(int row, int count, int inputs, int k, int inputs_of_chunk, int tile) const {
        const int groups = inputs_of_chunk / kRowGroup;
        unsigned flags = 0;
        for (int i = 0; i < count; i++) flags |= flags_[flag_index(row + i, inputs, k)];
        // Rows of a pass beyond the last one have flags of other rows and other inputs: here there may be no such group.
        flags &= (1u << groups) - 1;
        return {group(row, inputs, k, tile), remainder(row, inputs, k, tile), flags, groups};
    }

  private:
    static constexpr int kFlags = kSuperInputs / kRowGroup, kParts = kRowGroup / kVecSize;

    // The numbers of a group of inputs, with zeros beyond the last one.
    struct Numbers {
        Reg16 parts[kParts] = {};

        template <typename T>
        Numbers(const Rows<T>& from, int row, int k) {
            for (int i = 0; i < kParts; i++)
                if (const int column = k + i * kVecSize; column < from.inputs()) parts[i] = load_regs(from.at(row, column));
        }
    };

    static size_t flag_index(int row, int inputs, int k) {
        return (size_t)row * (padded_to_super(inputs) / kSuperInputs) + k / kSuperInputs;
    }

    static ByteGroup group_of(const AlignedVector<uint8_t>& bytes, int row, int inputs, int k, int tile) {
        const size_t number = (size_t)(row / kGroupedTile) * (padded_to_super(inputs) / kRowGroup) + k / kRowGroup;
        uint8_t* const from = const_cast<uint8_t*>(&bytes[number * tile * ByteGroup::kBytes]);
        return ByteGroup{from, reinterpret_cast<float*>(from + tile * ByteGroup::kNumberBytes), tile}.skip_rows(row % kGroupedTile);
    }

    static constexpr float kSteps = 254.0f;
    static constexpr int kLeast = 1 - kByteMiddle, kMiddle = 128 - kByteMiddle;

    // A group with a NaN gets the scale NaN, and so do its results.
    static void quantize_group(const Numbers& numbers, const ByteGroup& to) {
        Reg16 lower = numbers.parts[0], upper = lower;
        bool has_nan = false;
        for (const Reg16& part : numbers.parts) {
            lower = min(part, lower);
            upper = max(part, upper);
            has_nan |= any_nan(part);
        }
        const float low = -reduce_max(-1.0f * lower), high = reduce_max(upper);
        const float scale = has_nan ? __builtin_nanf("") : (high - low) / kSteps;
        const float inverse = scale > 0.0f ? 1 / scale : 0.0f;
        Numbers steps = numbers;
        for (Reg16& part : steps.parts) part = map_floats([&](auto x) { return (x - low) * inverse; }, part);
        store_bytes(steps, kLeast, to);
        set_range(to, scale, low - kLeast * scale);
    }

    static void set_range(const ByteGroup& to, float scale, float low) {
        to.field(ByteGroup::kScale, 0) = scale;
        to.field(ByteGroup::kLow, 0) = low;
        to.field(ByteGroup::kLowest, 0) = low - kByteMiddle * scale;
    }

    // What `whole` has left of a group.
    static void quantize_remainder(const Numbers& numbers, const ByteGroup& whole, const ByteGroup& to) {
        const float scale = whole.field(ByteGroup::kScale, 0), low = whole.field(ByteGroup::kLow, 0), fine = scale / kSteps;
        Numbers steps = numbers;
        for (int i = 0; i < kParts; i++) {
            const Reg16i bytes = map_ints([](auto x) { return kByteMiddle ? x : x & 255; }, load_bytes(whole.row(0) + i * kVecSize));
            steps.parts[i] = map_floats(
                [&](auto x, auto xq) { return (x - low - scale * xq) * (1 / fine); }, numbers.parts[i], to_floats(bytes));
        }
        store_bytes(steps, kMiddle, to);
        set_range(to, fine, -kMiddle * fine);
    }

    // Rounds the numbers and adds `offset`, and stores the bytes and their sums.
    static void store_bytes(const Numbers& numbers, int offset, const ByteGroup& to) {
        int sums[kParts];
        for (int i = 0; i < kParts; i++) {
            const Reg16i rounded = round_to_ints(numbers.parts[i], offset);
            ::store_bytes(to.row(0) + i * kVecSize, rounded);
            if (kByteMiddle) ::store_bytes(to.unsigned_row(0) + i * kVecSize, map_ints([](auto x) { return x + kByteMiddle; }, rounded));
            sums[i] = reduce_add(rounded);
            to.field(ByteGroup::kSums16 + i, 0) = (float)sums[i];
        }
        for (int i = 0; i < kParts / 2; i++) to.field(ByteGroup::kSums32 + i, 0) = (float)(sums[2 * i] + sums[2 * i + 1]);
    }

    AlignedVector<uint8_t> bytes_, remainders_, flags_;
};
