// Activation rows in int8 for weights in groups. Over each group of 32 inputs
//   x = scale * xq + middle,  scale = (max x - min x) / 254,  middle = (max x + min x) / 2
// One-sided groups, which are usual, have half of the error that a scale of max |x| / 127 gives. A few groups, those with outliers,
// have most of a row's error. They keep a remainder in int8 as well, with a group's layout and a middle of 0:
//   x = scale * xq + middle + scale / 254 * remainder   if scale ** 2 > kRemainderRatio * mean of scale ** 2 over the row's groups
//
// Layout: tiles of rows that are multiplied together, [row / tile][group], each:
//   [row % tile][32] numbers in int8; then [5][row % tile] in float32: scale, middle, and sums of the quantized x: of the first
//   16, of the other 16, of all 32
// So what a group's rows have of each lies side by side, and a tile of AMX begins at a cache line. Remainders lie likewise, and for
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

// Inputs of a group of a row, and rows of a pass at most.
constexpr int kRowGroup = 32, kGroupedPassRows = kAccumulators == 16 ? 12 : 4;
#ifdef __AMX_BF16__
constexpr int kGroupedTile = kTileRows, kGroupedRowsPerPass = 8;
#else
constexpr int kGroupedTile = kGroupedPassRows, kGroupedRowsPerPass = kGroupedPassRows;
#endif

// Lower ones cost more time than they gain: rows that are multiplied together share the groups with remainders.
constexpr float kRemainderRatio = 6;

inline int padded_to_super(int inputs) { return (inputs + kSuperInputs - 1) / kSuperInputs * kSuperInputs; }

// A group of the rows from one on, in their tile.
struct Int8Group {
    enum Field { kScale, kMiddle, kFirstSum, kSecondSum, kSum, kFields };
    // Of a row.
    static constexpr int kBytes = kRowGroup + kFields * sizeof(float);
    int8_t* numbers;
    float* fields;
    int tile;

    int8_t* row(int i) const { return numbers + i * kRowGroup; }
    float& field(Field field, int i) const { return fields[field * tile + i]; }
    // Of the rows that follow in each group.
    Int8Group skip_rows(int rows) const { return {row(rows), fields + rows, tile}; }
    // The group that many groups later.
    Int8Group skip_groups(int count) const {
        const int bytes = count * tile * kBytes;
        return {numbers + bytes, fields + bytes / sizeof *fields, tile};
    }
};

// Groups of some rows over a chunk of inputs, in the order in which they are added up: whole ones, then remainders. Rows without
// one add zeros to sums that are never -0, which changes no bit.
struct Int8Groups {
    Int8Group whole, remainder;
    // Bit i: one of the rows has a remainder of group i.
    unsigned flags;
    int whole_count;

    int count() const { return whole_count + __builtin_popcount(flags); }
    // Calls `task(k, group)` for each: that of the chunk's inputs from k on.
    template <typename Task>
    TRITONLM_INLINE void for_each(Task task) const {
        unsigned left = flags;
        for (int i = 0, end = count(); i < end; i++) {
            const bool is_whole = i < whole_count;
            const int number = is_whole ? i : __builtin_ctz(left);
            left &= is_whole ? ~0u : left - 1;
            task(number * kRowGroup, (is_whole ? whole : remainder).skip_groups(number));
        }
    }
};

class GroupedRows {
  public:
    void reserve(size_t rows, int inputs) {
        const size_t tiles = (rows + kGroupedTile - 1) / kGroupedTile;
        const size_t groups = tiles * kGroupedTile * (padded_to_super(inputs) / kRowGroup);
        if (bytes_.size() >= groups * Int8Group::kBytes) return;
        bytes_.resize(groups * Int8Group::kBytes);
        remainders_.resize(groups * Int8Group::kBytes);
        flags_.resize(groups / kFlags);
    }

    // The rows of a tile, for this many rows.
    static int tile_for(int rows) { return pass_rows(rows, kGroupedTile); }

    template <typename T>
    void quantize(const Rows<T>& from, int row, int tile) {
        const int inputs = from.inputs(), padded = padded_to_super(inputs);
        float squares = 0;
        for (int k = 0; k < padded; k += kRowGroup) {
            const Int8Group whole = group(row, inputs, k, tile);
            quantize_group(Halves(from, row, k), whole);
            squares += whole.field(Int8Group::kScale, 0) * whole.field(Int8Group::kScale, 0);
        }
        const float limit = kRemainderRatio * squares / ((inputs + kRowGroup - 1) / kRowGroup);
        for (int k = 0; k < padded; k += kSuperInputs) {
            unsigned flags = 0;
            for (int i = 0; i < kFlags; i++) {
                const int input = k + i * kRowGroup;
                const Int8Group whole = group(row, inputs, input, tile), rest = remainder(row, inputs, input, tile);
                const float scale = whole.field(Int8Group::kScale, 0);
                if (scale * scale > limit) {
                    quantize_remainder(Halves(from, row, input), whole, rest);
                    flags |= 1u << i;
                } else {
                    set_fields(rest, 0, 0, 0, 0);
                }
            }
            flags_[flag_index(row, inputs, k)] = flags;
        }
    }

    // Of the group of inputs from k on; one type for `quantize`, which writes, and for matmuls, which read.
    Int8Group group(int row, int inputs, int k, int tile) const { return group_of(bytes_, row, inputs, k, tile); }
    Int8Group remainder(int row, int inputs, int k, int tile) const { return group_of(remainders_, row, inputs, k, tile); }

    // The groups of `count` rows over `inputs_of_chunk` inputs from k on, a multiple of 256.
    Int8Groups groups(int row, int count, int inputs, int k, int inputs_of_chunk, int tile) const {
        unsigned flags = 0;
        for (int i = 0; i < count; i++) flags |= flags_[flag_index(row + i, inputs, k)];
        return {group(row, inputs, k, tile), remainder(row, inputs, k, tile), flags, inputs_of_chunk / kRowGroup};
    }

  private:
    static constexpr int kFlags = kSuperInputs / kRowGroup;

    // The numbers of a group of inputs, with zeros beyond the last one.
    struct Halves {
        Vec16 halves[2] = {};

        template <typename T>
        Halves(const Rows<T>& from, int row, int k) {
            for (int half = 0; half < 2; half++)
                if (const int column = k + half * kVecSize; column < from.inputs()) halves[half] = load(from.at(row, column));
        }
        const Vec16& operator[](int half) const { return halves[half]; }
    };

    static size_t flag_index(int row, int inputs, int k) {
        return (size_t)row * (padded_to_super(inputs) / kSuperInputs) + k / kSuperInputs;
    }

    static Int8Group group_of(const AlignedVector<int8_t>& bytes, int row, int inputs, int k, int tile) {
        const size_t number = (size_t)(row / kGroupedTile) * (padded_to_super(inputs) / kRowGroup) + k / kRowGroup;
        int8_t* const from = const_cast<int8_t*>(&bytes[number * tile * Int8Group::kBytes]);
        return Int8Group{from, reinterpret_cast<float*>(from + tile * kRowGroup), tile}.skip_rows(row % kGroupedTile);
    }

    static void set_fields(const Int8Group& to, float scale, float middle, float first_sum, float second_sum) {
        const float fields[Int8Group::kFields] = {scale, middle, first_sum, second_sum, first_sum + second_sum};
        for (int n = 0; n < Int8Group::kFields; n++) to.field((Int8Group::Field)n, 0) = fields[n];
    }

    // What `whole` has left of a group.
    static void quantize_remainder(const Halves& halves, const Int8Group& whole, const Int8Group& to) {
        const float scale = whole.field(Int8Group::kScale, 0), middle = whole.field(Int8Group::kMiddle, 0);
        const float fine = scale / (2 * kMost);
        float sums[2];
        for (int half = 0; half < 2; half++) {
            Vec16b numbers;
            memcpy(&numbers, whole.row(0) + half * kVecSize, sizeof numbers);
            const Vec16 rest = halves[half] - middle - scale * __builtin_convertvector(numbers, Vec16);
            sums[half] = fine * (float)round_to_bytes(rest * (1 / fine), to.row(0) + half * kVecSize);
        }
        set_fields(to, fine, 0, sums[0], sums[1]);
    }

    // The sum of the rounded numbers.
    static int round_to_bytes(Vec16 numbers, int8_t* to) {
        const Vec16i rounded = (Vec16i)(numbers + kRoundToInt) - kRoundToIntBits;
        const Vec16b bytes = __builtin_convertvector(rounded, Vec16b);
        memcpy(to, &bytes, sizeof bytes);
        return reduce_add(rounded);
    }

    static constexpr float kMost = 127.0f;

    // A group with a NaN gets the scale NaN, and so do its results.
    static void quantize_group(const Halves& halves, const Int8Group& to) {
        const Vec16 lower = halves[0] < halves[1] ? halves[0] : halves[1], upper = halves[0] < halves[1] ? halves[1] : halves[0];
        const float low = -reduce_max(-lower), high = reduce_max(upper);
        const bool has_nan = any_nan(halves[0]) || any_nan(halves[1]);
        const float scale = has_nan ? __builtin_nanf("") : (high - low) / (2 * kMost), middle = (high + low) / 2;
        const float inverse = scale > 0.0f ? 1 / scale : 0.0f;
        float sums[2];
        for (int half = 0; half < 2; half++) {
            const int sum = round_to_bytes((halves[half] - middle) * inverse, to.row(0) + half * kVecSize);
            sums[half] = scale * (float)sum + kVecSize * middle;
        }
        set_fields(to, scale, middle, sums[0], sums[1]);
    }

    AlignedVector<int8_t> bytes_, remainders_;
    AlignedVector<uint8_t> flags_;
};
