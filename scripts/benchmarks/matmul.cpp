// Times the kernels' matmul: y[r][o] = sum over k of x[r][k] * w[o][k], for several forms of weights and numbers of rows,
// beside the read bandwidth and the peak of products of the same run. matmul.py compiles it with the kernels' flags and
// prints a table.
//
// Weights: in large pages, kMatrices matrices of kOutputs x kInputs, read one after the other: together more than a last-level cache.
// Output, a line for each measurement: name, rows, bytes of its weights, operations, and seconds for one matrix of each run.
// Two such processes can take turns, run by run: the argument `turns` names two pipes' ends and a number of runs. Before a run a
// process reads a byte of the first pipe, and afterwards writes it to the second one, which the other process reads.
// ISA variants: those of gemm.hpp, int8.hpp and grouped.hpp.

#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <sys/mman.h>
#include <unistd.h>

#include "gemm.hpp"
#include "grouped.hpp"
#include "int8.hpp"

namespace {

constexpr int kInputs = 2048, kOutputs = 8192, kMatrices = 6, kAllRows = 512;
constexpr int kBlocks = kOutputs / kVecSize;
constexpr size_t kWeights = (size_t)kInputs * kOutputs;
double seconds_each = 0.4;

// Numbers in large pages where the system has them, as a model's weights lie (large_pages.py).
template <typename T>
class Weights {
  public:
    explicit Weights(size_t size) : size_(size) {
        const size_t bytes = (size * sizeof(T) + kLargePage - 1) / kLargePage * kLargePage;
        numbers_.reset(static_cast<T*>(std::aligned_alloc(kLargePage, bytes)));
        if (!numbers_) std::abort();
        madvise(numbers_.get(), bytes, MADV_HUGEPAGE);
    }
    size_t size() const { return size_; }
    T* data() const { return numbers_.get(); }
    T& operator[](size_t i) const { return numbers_.get()[i]; }

  private:
    static constexpr size_t kLargePage = 2 << 20;
    struct Free {
        void operator()(T* memory) const { std::free(memory); }
    };
    std::unique_ptr<T, Free> numbers_;
    size_t size_;
};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// The pipes of turns, if there are any, and the number of runs.
struct Turns {
    int from = -1, to = -1, runs = 0;

    void begin() const {
        char byte;
        if (from >= 0 && read(from, &byte, 1) != 1) std::abort();
    }
    // After its last run the other process has ended.
    void end() const {
        if (to >= 0) [[maybe_unused]] const ssize_t written = write(to, "", 1);
    }
} turns;

// The seconds of each run, of runs that fill `seconds_each`, or of as many as have turns.
std::vector<double> seconds_of(const std::function<void()>& run) {
    std::vector<double> seconds;
    if (!turns.runs) run();
    const double deadline = now() + seconds_each;
    while (turns.runs ? (int)seconds.size() < turns.runs : now() < deadline || seconds.size() < 3) {
        turns.begin();
        const double start = now();
        run();
        seconds.push_back(now() - start);
        turns.end();
    }
    return seconds;
}

void report(const char* name, int rows, const std::vector<double>& seconds, int matrices, size_t bytes, double operations) {
    std::printf("%s %d %zu %.0f", name, rows, bytes, operations);
    for (const double each : seconds) std::printf(" %.9f", each / matrices);
    std::printf("\n");
    std::fflush(stdout);
}

// For each number of rows, calls `prepare(rows)`, and on each thread, for work items of at most `row_limit` rows and two blocks,
// `multiply(matrix, first row, row count, block, blocks, sums)`.
template <typename Prepare, typename Multiply>
void time_form(
    const char* name, ThreadPool& pool, size_t bytes, int row_limit, const std::vector<int>& row_counts, Prepare prepare,
    Multiply multiply
) {
    AlignedVector<float> outputs((size_t)kAllRows * kOutputs);
    std::vector<WorkQueue> queues(kMatrices);
    for (const int rows : row_counts) {
        prepare(rows);
        const auto multiply_item = [&](int matrix, int first, int count, int block, bool pair, Claim& claim) {
            alignas(kCacheLine) RowSums sums[kAllRows + kTileRows];
            multiply(matrix, first, count, block, 1 + pair, sums);
            if (!claim.acquire()) return;
            for (int row = 0; row < count; row++)
                for (int n = 0; n <= pair; n++)
                    store(&outputs[(size_t)(first + row) * kOutputs + (block + n) * kVecSize], load(sums[row][n]));
        };
        const std::vector<double> seconds = seconds_of([&] {
            for (auto& queue : queues) queue.reset(pool.size());
            pool.run([&](int) {
                begin_matmul_tiles();
                for (int matrix = 0; matrix < kMatrices; matrix++)
                    for_each_block_pair(
                        rows, row_limit, kBlocks, queues[matrix], [&](int first, int count, int block, bool pair, Claim& claim) {
                            multiply_item(matrix, first, count, block, pair, claim);
                        });
                end_tiles();
            });
        });
        report(name, rows, seconds, kMatrices, bytes, 2.0 * rows * kWeights);
    }
}

template <typename T>
void fill_random(T* to, size_t count) {
    std::mt19937 generator(1);
    std::normal_distribution<float> normal;
    AlignedVector<float> sample(1 << 16);
    for (size_t i = 0; i < sample.size(); i++) sample[i] = normal(generator);
    for (size_t i = 0; i < count; i += kVecSize) store(to + i, load(&sample[i * 17 % (sample.size() - kVecSize)]));
}

template <typename T>
void set_rows(Rows<T>& rows, int count) {
    rows.begin(count, kInputs, RowLayout::kTiles);
    AlignedVector<float> numbers(kInputs);
    fill_random(numbers.data(), kInputs);
    for (int row = 0; row < count; row++)
        for (int k = 0; k < kInputs; k += kVecSize) store(rows.at(row, k), load(&numbers[k]));
}

// Times a form of weights whose matrices are `matrix_of(number)`.
template <typename T, typename MatrixOf>
void time_packed_form(const char* name, ThreadPool& pool, size_t bytes, const std::vector<int>& row_counts, MatrixOf matrix_of) {
    Rows<T> rows;
    const auto prepare = [&](int count) { set_rows(rows, count); };
    const int limit = rows_per_item<RowType<T>>(kInputs, kMaxRows);
    time_form(
        name, pool, bytes, limit, row_counts, prepare, [&](int matrix, int first, int count, int block, int blocks, RowSums* sums) {
            multiply_blocks(rows, first, count, matrix_of(matrix), block, blocks, sums, nullptr);
        });
}

template <typename T>
void time_full(const char* name, ThreadPool& pool, const std::vector<int>& row_counts) {
    Weights<T> weights(kMatrices * kWeights);
    fill_random(weights.data(), weights.size());
    time_packed_form<T>(name, pool, kWeights * sizeof(T), row_counts, [&](int matrix) -> PackedWeights<T> {
        return {&weights[matrix * kWeights], nullptr, nullptr, UpperBytes(0)};
    });
}

void time_packed(ThreadPool& pool, const std::vector<int>& row_counts) {
    AlignedVector<bf16> weights(kWeights);
    fill_random(weights.data(), weights.size());
    const auto* bits = reinterpret_cast<const uint16_t*>(weights.data());
    const size_t bytes = kWeights / 2 * 3;
    Weights<uint8_t> tiles(kMatrices * bytes);
    std::vector<Outlier> outliers(kWeights / 64);
    std::vector<int64_t> offsets(kBlocks + 1);
    const int pairs = choose_exponent_pairs(bits, kWeights);
    const int64_t count = pack_bf16(
        bits, kBlocks, kInputs, ExponentPairs(pairs), tiles.data(), outliers.data(), offsets.data(), outliers.size(), 1);
    if (count < 0 || !kCanUnpack) return;
    for (int matrix = 1; matrix < kMatrices; matrix++) memcpy(&tiles[matrix * bytes], tiles.data(), bytes);
    const size_t all_bytes = bytes + count * sizeof(Outlier);
    time_packed_form<bf16>("12-bit", pool, all_bytes, row_counts, [&](int matrix) -> PackedWeights<bf16> {
        return {&tiles[matrix * bytes], outliers.data(), offsets.data(), UpperBytes(pairs)};
    });
}

void time_int8(ThreadPool& pool, const std::vector<int>& row_counts) {
    Weights<int8_t> weights(kMatrices * kWeights);
    for (size_t i = 0; i < weights.size(); i++) weights[i] = (int8_t)((int)(i * 2654435761u >> 24) / 2);
    Rows<float> numbers;
    Int8Rows rows;
    rows.reserve(kAllRows, kInputs);
    const auto prepare = [&](int count) {
        set_rows(numbers, count);
        for (int row = 0; row < count; row++) rows.quantize(numbers, row);
    };
    const int limit = rows_per_item<int8_t>(kInputs, kMaxInt8Rows);
    time_form(
        "int8", pool, kWeights, limit, row_counts, prepare,
        [&](int matrix, int first, int count, int block, int blocks, RowSums* sums) {
            const int8_t* const from = &weights[matrix * kWeights + (size_t)block * kInputs * kVecSize];
            multiply_int8_blocks(rows, first, count, from, kInputs, blocks, sums);
        });
}

// Weights in groups, of any bytes.
void time_grouped(const char* name, GroupedForm form, ThreadPool& pool, const std::vector<int>& row_counts) {
    form.complete();
    const size_t block_bytes = form.record_offset(kInputs);
    Weights<uint8_t> weights(kMatrices * kBlocks * block_bytes);
    for (size_t i = 0; i < weights.size(); i++) weights[i] = (uint8_t)(i * 2654435761u >> 26);
    std::vector<GroupedBlock> blocks(kMatrices * kBlocks);
    for (size_t n = 0; n < blocks.size(); n++) blocks[n] = {&weights[n * block_bytes], &form};
    Rows<float> numbers;
    GroupedRows rows;
    rows.reserve(kAllRows, kInputs);
    const auto prepare = [&](int count) {
        set_rows(numbers, count);
        for (int row = 0; row < count; row++) rows.quantize(numbers, row, GroupedRows::tile_for(count));
    };
    const size_t bytes = kBlocks * block_bytes;
    int tile = 0;
    const auto prepare_tiles = [&](int count) { tile = GroupedRows::tile_for(count), prepare(count); };
    const int limit = grouped_rows_per_item(kInputs);
    time_form(
        name, pool, bytes, limit, row_counts, prepare_tiles,
        [&](int matrix, int first, int count, int block, int some, RowSums* sums) {
            const GroupedBlock* const from = &blocks[(size_t)matrix * kBlocks + block];
            GroupedBlocks(rows, tile, kInputs, from, some).multiply(first, count, sums);
        });
}

// Bytes that all threads read in a pass, each a contiguous part.
void time_read(ThreadPool& pool) {
    Weights<float> numbers((size_t)1 << 27);
    fill_random(numbers.data(), numbers.size());
    std::vector<float> sums(pool.size());
    const size_t part = numbers.size() / pool.size() / 256 * 256;
    const std::vector<double> seconds = seconds_of([&] {
        pool.run([&](int thread) {
            Reg16 totals[8] = {};
            const float* from = &numbers[thread * part];
            for (size_t i = 0; i < part; i += 8 * kVecSize)
                for (int n = 0; n < 8; n++) totals[n] += load_regs(from + i + n * kVecSize);
            Vec16 total = {};
            for (const Reg16& each : totals) total += (Vec16)each;
            sums[thread] = reduce_add(total);
        });
    });
    if (std::isnan(sums[0])) std::abort();
    report("read", 0, seconds, 1, part * pool.size() * sizeof(float), 0);
}

// The peak of products: independent accumulators in registers, which are kRegisters together. `add` adds to one of them.
template <typename Register, typename Add>
void time_peak(const char* name, ThreadPool& pool, int products, Add add) {
    constexpr int kRepeats = 1 << 20, kSums = 12;
    std::vector<Register> results(pool.size());
    const std::vector<double> seconds = seconds_of([&] {
        pool.run([&](int thread) {
            Register totals[kSums] = {};
            for (int i = 0; i < kRepeats; i++)
#pragma GCC unroll 16
                for (int n = 0; n < kSums; n++) {
                    add(totals[n]);
                    asm volatile("" : "+v"(totals[n]));
                }
            results[thread] = totals[0];
        });
    });
    report(name, 0, seconds, 1, 0, 2.0 * products * kSums * kRepeats * pool.size());
}

#ifdef __AVX512F__
typedef Vec16 PeakRegister;
#else
typedef Reg PeakRegister;
#endif
constexpr int kPeakLanes = sizeof(PeakRegister) / sizeof(float);

void time_float_peak(const char* name, ThreadPool& pool) {
    PeakRegister weights = {}, numbers = {};
    asm volatile("" : "+v"(weights), "+v"(numbers));
    time_peak<PeakRegister>(name, pool, kPeakLanes, [=](PeakRegister& total) { total += numbers * weights; });
}

void time_bf16_peak(ThreadPool& pool) {
#ifdef __AVX512BF16__
    time_peak<Vec16>("bf16-peak", pool, 32, [](Vec16& total) {
        total = (Vec16)_mm512_dpbf16_ps((__m512)total, __m512bh{}, __m512bh{});
    });
#else
    time_float_peak("bf16-peak", pool);
#endif
}

void time_int8_peak(ThreadPool& pool) {
#if defined(__AVX512VNNI__)
    time_peak<Vec16i>("int8-peak", pool, 64, [](Vec16i& total) {
        total = (Vec16i)_mm512_dpbusd_epi32((__m512i)total, __m512i{}, __m512i{});
    });
#elif defined(__AVX512BW__)
    time_peak<Vec16i>("int8-peak", pool, 64, [](Vec16i& total) {
        __m512i row = {};
        asm volatile("" : "+v"(row));
        total += (Vec16i)_mm512_madd_epi16(_mm512_maddubs_epi16(row, row), _mm512_set1_epi16(1));
    });
#elif defined(__AVX2__)
    time_peak<RegInt>("int8-peak", pool, 32, [](RegInt& total) {
        __m256i row = {};
        asm volatile("" : "+v"(row));
        total += (RegInt)_mm256_madd_epi16(_mm256_maddubs_epi16(row, row), _mm256_set1_epi16(1));
    });
#else
    time_float_peak("int8-peak", pool);
#endif
}

}  // namespace

int main(int argc, char** argv) {
    const int threads = std::atoi(argv[1]);
    seconds_each = std::atof(argv[2]);
    const std::string forms = argv[3];
    std::signal(SIGPIPE, SIG_IGN);
    std::sscanf(argv[4], "%d,%d,%d", &turns.from, &turns.to, &turns.runs);
    std::vector<int> row_counts;
    for (int i = 5; i < argc; i++) row_counts.push_back(std::atoi(argv[i]));
    ThreadPool pool(threads);
    time_read(pool);
    if (forms.find('f') != std::string::npos) {
        time_float_peak("float32-peak", pool);
        time_full<float>("float32", pool, row_counts);
    }
    if (forms.find('b') != std::string::npos || forms.find('p') != std::string::npos)
        time_bf16_peak(pool);
    if (forms.find('b') != std::string::npos) time_full<bf16>("bf16", pool, row_counts);
    if (forms.find('p') != std::string::npos) time_packed(pool, row_counts);
    const bool has_groups = forms.find_first_of("4k568") != std::string::npos;
    if (forms.find('i') != std::string::npos || has_groups) time_int8_peak(pool);
    if (forms.find('i') != std::string::npos) time_int8(pool, row_counts);
    // As Q4_0, Q4_K, Q5_0, Q6_K and Q8_0 have them.
    if (forms.find('4') != std::string::npos) time_grouped("4-bit", {4, 32, 0, 0, 0, 8, 0, {}, 0, 0, 0}, pool, row_counts);
    if (forms.find('k') != std::string::npos) time_grouped("4-bit-k", {4, 32, 1, 1, 0, 0, 0, {}, 0, 0, 0}, pool, row_counts);
    if (forms.find('5') != std::string::npos) time_grouped("5-bit", {5, 32, 0, 0, 0, 16, 0, {}, 0, 0, 0}, pool, row_counts);
    if (forms.find('6') != std::string::npos) time_grouped("6-bit", {6, 16, 1, 0, 0, 32, 0, {}, 0, 0, 0}, pool, row_counts);
    if (forms.find('8') != std::string::npos) time_grouped("8-bit", {8, 32, 0, 0, 0, 128, 0, {}, 0, 0, 0}, pool, row_counts);
    time_read(pool);
}
