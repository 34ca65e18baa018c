// Prefetches of weights that are spread over the steps of a pass, so that memory is read while products are computed: a burst
// of prefetches fills the processor's queue of cache misses, and the loads behind it wait.
//
// Layout: a step multiplies one line of 64 bytes of each block of outputs (fma.hpp), or its 48 packed bytes (bf16_packed.hpp).
// ISA variants: none. A prefetch changes no result: the tests of gemm.hpp. It knows addresses, not what lies there.
#pragma once

#include <cstddef>

// Prefetches kBytes bytes into the first-level cache, or the second-level one. always_inline: GCC takes a function that only
// prefetches for one without effects, and drops its calls.
template <int kBytes, int kLevel>
__attribute__((always_inline)) inline void prefetch(const void* from) {
    for (int line = 0; line < kBytes; line += 64) __builtin_prefetch((const char*)from + line, 0, 4 - kLevel);
}

struct NoPrefetch {
    __attribute__((always_inline)) void operator()() {}
    __attribute__((always_inline)) void begin_tile(int) {}
};

// Two streams of bytes. Each step prefetches kLines lines, of one stream and then of the other; a stream advances by `stride`
// bytes at a time.
template <int kLines>
struct SpreadPrefetch {
    const char *from, *other;
    int stride;

    __attribute__((always_inline)) void operator()() {
        for (int line = 0; line < kLines; line++) {
            __builtin_prefetch(from, 0, 3);
            const char* const next = from + stride;
            from = other;
            other = next;
        }
    }
    __attribute__((always_inline)) void begin_tile(int) {}
};

// The streams of a pass over one or two neighbouring blocks of outputs, which run ahead of the weights that are read: from the
// tile at input `turn` on they are beyond the end of their blocks, in those that the thread reads next.
template <int kBlocks>
struct BlockPrefetch : SpreadPrefetch<kBlocks> {
    int turn;
    size_t skipped;

    __attribute__((always_inline)) void begin_tile(int input) {
        if (input != turn) return;
        this->from += skipped;
        this->other += skipped;
    }
};

// Lines of memory that a pass prefetches beside weights, one at each step: what is read when its sums are complete.
struct PrefetchList {
    static constexpr int kMost = 1024;
    const char* lines[kMost];
    int count = 0;
    // Whether passes have prefetched them.
    bool taken = false;

    PrefetchList() {}
    // A copy has none: each thread's are its own.
    PrefetchList(const PrefetchList&) {}

    void clear() { count = 0, taken = false; }
    void add(const void* from, size_t bytes) {
        for (size_t i = 0; i < bytes && count < kMost; i += 64) lines[count++] = (const char*)from + i;
    }
};

struct ListedPrefetch : SpreadPrefetch<1> {
    const char* const* line;
    const char* const* end;

    __attribute__((always_inline)) void operator()() {
        SpreadPrefetch<1>::operator()();
        if (line != end) __builtin_prefetch(*line++, 0, 2);
    }
};
