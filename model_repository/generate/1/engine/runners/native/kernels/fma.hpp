// Accumulators of a matmul in registers, and one step of their sums: the weights of 16 outputs for kInputs inputs, and
// add(total, &x[r][k]).
//
// Layout: a step's weights are [16][kInputs], gemm.hpp's order.
// ISA variants: __AVX512BF16__ multiplies pairs of bfloat16 with vdpbf16ps; otherwise they are converted and accumulated as
// float32, first the even and then the odd input. Test: tests/inference/test_native.py.
#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "bf16_packed.hpp"
#include "rows.hpp"
#include "simd.hpp"

// The sums of a row for two blocks of outputs.
typedef float RowSums[2][kVecSize];

struct FloatStep {
    static constexpr int kInputs = 1;
    Reg16 weights;
    static FloatStep load(const float* from) { return {load_regs(from)}; }
    void add(Reg16& total, const float* row) const { total += *row * weights; }
};

#ifdef __AVX512BF16__
struct PairStep {
    static constexpr int kInputs = 2;
    __m512bh weights;
    static PairStep load(const bf16* from) { return {(__m512bh)load_line(from)}; }
    void add(Vec16& total, const bf16* row) const {
        int32_t pair;
        memcpy(&pair, row, sizeof pair);
        total = (Vec16)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32(pair), weights);
    }
};
#endif

// A step with rows of this type.
template <typename Number>
struct StepOf {
    typedef FloatStep Type;
};
#ifdef __AVX512BF16__
template <>
struct StepOf<bf16> {
    typedef PairStep Type;
};
#else
// The even inputs of a line, and the odd ones.
inline FloatStep even_step(const Line& line) {
#ifdef __AVX512F__
    return {(Vec16)(line << 16)};
#else
    FloatStep step;
    for (int i = 0; i < kRegsPerVec; i++) step.weights.regs[i] = (Reg)(line.regs[i] << 16);
    return step;
#endif
}

inline FloatStep odd_step(const Line& line) {
#ifdef __AVX512F__
    return {(Vec16)(line & 0xffff0000u)};
#else
    FloatStep step;
    for (int i = 0; i < kRegsPerVec; i++) step.weights.regs[i] = (Reg)(line.regs[i] & 0xffff0000u);
    return step;
#endif
}
#endif

// Everything is inlined and unrolled, so that sums are in registers.
#define TRITONLM_INLINE __attribute__((always_inline)) inline

// Sums of kRows rows of a tile (rows.hpp) and kBlocks blocks of outputs.
template <typename Number, int kRows, int kBlocks>
struct Accumulators {
    typedef typename StepOf<Number>::Type Step;
    Reg16 totals[kRows][kBlocks];

    // Adds the products of kSome blocks from n on, with the row numbers at `from`, a line apart. Blocks are the inner loop: a
    // row's number is in a register for a moment only.
    template <int kSome>
    TRITONLM_INLINE void add(int n, const Number* from, const Step (&steps)[kSome]) {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
            for (int j = 0; j < kSome; j++) steps[j].add(totals[i][n + j], from + i * kRowLine<Number>);
    }

    // The same with lines of bfloat16 weights, for two inputs.
    template <int kSome>
    TRITONLM_INLINE void add(int n, const Number* from, const Line (&lines)[kSome]) {
        Step steps[kSome];
#ifdef __AVX512BF16__
        for (int j = 0; j < kSome; j++) steps[j] = {(__m512bh)lines[j]};
        add(n, from, steps);
#else
        for (int j = 0; j < kSome; j++) steps[j] = even_step(lines[j]);
        add(n, from, steps);
        for (int j = 0; j < kSome; j++) steps[j] = odd_step(lines[j]);
        add(n, from + 1, steps);
#endif
    }

    TRITONLM_INLINE void clear() {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
            for (int n = 0; n < kBlocks; n++) totals[i][n] = Reg16{};
    }

    TRITONLM_INLINE void load(const RowSums* sums, int block) {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
            for (int n = 0; n < kBlocks; n++) totals[i][n] = load_regs(sums[i][block + n]);
    }

    TRITONLM_INLINE void save(RowSums* sums, int block) const {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++)
#pragma GCC unroll 4
            for (int n = 0; n < kBlocks; n++) store(sums[i][block + n], totals[i][n]);
    }
};
