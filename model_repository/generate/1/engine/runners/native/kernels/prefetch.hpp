// Prefetches of weights that are spread over the steps of a pass, so that memory is read while products are computed: a burst
// of prefetches fills the processor's queue of cache misses, and the loads behind it wait.
//
// Layout: a step multiplies one line of 64 bytes of each block of outputs (fma.hpp).
// ISA variants: none. A prefetch changes no result: the tests of gemm.hpp. It knows addresses, not what lies there.
#pragma once

#include <cstddef>
#include <cstdint>

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

// Two streams of bytes. Each step prefetches kLines lines into a cache of level kLevel, of one stream and then of the other; a stream
// advances by `stride` bytes at a time.
template <int kLines, int kLevel>
struct SpreadPrefetch {
    const char *from, *other;
    int stride;

    __attribute__((always_inline)) void operator()() {
        for (int line = 0; line < kLines; line++) {
            __builtin_prefetch(from, 0, 4 - kLevel);
            const char* const next = from + stride;
            from = other;
            other = next;
        }
    }
    __attribute__((always_inline)) void begin_tile(int) {}
};

// A stream for each of kStreams blocks of outputs: each step prefetches a line of each, and advances by `stride` bytes.
template <int kStreams>
struct StreamPrefetch {
    const char* from[kStreams];
    int stride;

    __attribute__((always_inline)) void operator()() {
        for (const char*& line : from) {
            __builtin_prefetch(line, 0, 2);
            line += stride;
        }
    }
    __attribute__((always_inline)) void begin_tile(int) {}
};

// The streams of a pass over one or two neighbouring blocks of outputs, which run ahead of the weights that are read: from the
// tile at input `turn` on they are beyond the end of their blocks, in those that the thread reads next. Into the second-level
// cache: the first one tracks fewer misses at once, and what one core reads of memory is their number by the time of one.
template <int kBlocks>
struct BlockPrefetch : SpreadPrefetch<kBlocks, 2> {
    int turn;
    size_t skipped;

    __attribute__((always_inline)) void begin_tile(int input) {
        if (input != turn) return;
        this->from += skipped;
        this->other += skipped;
    }
};

// The lines of a block, as far ahead of those that are read as memory takes to bring them, kLines for each part of it that is read.
// Beyond the block's end follow those of the next block, which the thread reads next. Into the second-level cache, like those of
// BlockPrefetch. Without branches: those of a pass of one row would take longer than its products.
template <int kLines>
struct AheadPrefetch {
    static constexpr size_t kAhead = 6144, kLine = 64;
    const uint8_t *from, *next;
    const size_t advance;

    // A pass whose weights are in a cache already prefetches the block's beginning again.
    AheadPrefetch(const uint8_t* block, bool from_memory) : from(block), next(block), advance(from_memory ? kLines * kLine : 0) {}

    // The next parts follow from here on.
    __attribute__((always_inline)) void seek(const uint8_t* read) { if (advance) next = read + kAhead; }
    __attribute__((always_inline)) void begin_part() {
        from = next;
        next += advance;
    }
    // Of a part's lines those of one of its steps.
    __attribute__((always_inline)) void operator()(int step, int steps) const {
        for (int line = kLines * step / steps; line < kLines * (step + 1) / steps; line++) __builtin_prefetch(from + line * kLine, 0, 2);
    }
};

// Ranges of memory that a pass prefetches beside weights, two lines at each step: what is read when its sums are complete, and
// then what the next operation begins with.
struct PrefetchList {
    struct Range {
        const char *from, *end;
    };
    static constexpr int kMost = 512;
    Range ranges[kMost];
    int count = 0;
    // Whether only the last passes prefetch them: the others' rows and weights would displace what is read early. And whether
    // passes have prefetched them.
    bool late = false, taken = false;

    PrefetchList() {}
    // A copy has none: each thread's are its own.
    PrefetchList(const PrefetchList&) {}

    void clear() { count = 0, late = taken = false; }
    void add(const char* from, size_t bytes) {
        if (count && ranges[count - 1].end == from) ranges[count - 1].end += bytes;
        else if (count < kMost) ranges[count++] = {from, from + bytes};
    }
};

struct ListedPrefetch : SpreadPrefetch<1, 1> {
    static constexpr int kListedLines = 2;
    PrefetchList::Range range;
    const PrefetchList::Range *next, *last;

    __attribute__((always_inline)) void operator()() {
        SpreadPrefetch<1, 1>::operator()();
        for (int i = 0; i < kListedLines; i++) {
            if (range.from < range.end) __builtin_prefetch(range.from, 0, 2), range.from += 64;
            else if (next != last) range = *next++;
        }
    }
};
