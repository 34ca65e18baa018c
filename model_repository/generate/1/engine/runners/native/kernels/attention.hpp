// Attention over the blocks of the cache: each row looks at its sequence's tokens up to its own. A row's numbers come
// about in one order, whichever rows are attended with it. It knows nothing of layers or weights.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "groups.hpp"
#include "lanes.hpp"
#include "layout.hpp"
#include "rows.hpp"
#include "step.hpp"
#include "team.hpp"
#include "tiles.hpp"

template <typename T>
class Attention : public Layout<T> {
  public:
    Attention(int heads, int shared, int width) : Layout<T>(heads, shared, width) {}

    // Before the layers: where each row's own key and value go, and which rows are attended together.
    void begin(const Step& step, int members) {
        Layout<T>::begin(step);
        spaces_.resize(members);
        // More of them together leave fewer pieces of work to go round.
        const int seats = std::clamp(step.rows * heads_ / (2 * members), 1, kTileRows);
        const int most = in_tiles_ ? std::max(1, seats / shared_) : seats;
        groups_.find(step, in_tiles_ ? kTileRows / shared_ : kRun, most);
    }

    // This member's part of all rows and heads: from `queries`, (rows, heads x width), to `attended`.
    void attend(const T* keys, const T* values, const float* queries, Rows<T>& attended, Share& share, int member) {
        with_width<1>([&](auto parts) {
            Space& space = spaces_[member];
            space.shaped = 0;
            // In tiles all heads that share keys and values sit together.
            const int together = in_tiles_ ? shared_ : 1, parts_of_group = heads_ / together;
            share.race(groups_.size() * parts_of_group, [&](int i, Claim& claim) {
                const Group& group = groups_[i / parts_of_group];
                const int* rows = groups_.rows(group);
                const Place at{i % parts_of_group * together, keys, values, queries, &attended, &claim};
#ifdef __AMX_BF16__
                if constexpr (sizeof(T) == sizeof(bf16))
                    if (in_tiles_) return attend_in_tiles<parts()>(at, group, rows, space);
#endif
                if (group.one_sequence && group.count == kRun) return attend_rows<parts(), kRun>(at, rows[0], space);
                // One after another: what they share is still near the core.
                for (int n = 0; n < group.count; n++) attend_rows<parts(), 1>(at, rows[n], space);
            });
            if (space.shaped) begin_tiles();
        });
    }

    // The widest head: 128.
    static constexpr int kMostParts = 8;

  private:
    using Layout<T>::block_, Layout<T>::heads_, Layout<T>::in_block, Layout<T>::in_tiles_, Layout<T>::shared_;
    using Layout<T>::step_, Layout<T>::table_of, Layout<T>::tokens_, Layout<T>::width_;

    struct Place {
        int head;
        const T *keys, *values;
        const float* queries;
        Rows<T>* attended;
        Claim* claim;
    };

    struct Space {
        Numbers<float> scores;
        Numbers<bf16> weights;
        // For how many queries the tiles are shaped; 0: for products.
        int shaped = 0;
    };

    // With the head's width known to the compiler.
    template <int kParts, typename Task>
    void with_width(Task task) {
        if constexpr (kParts < kMostParts)
            if (width_ != kParts * kLanes) return with_width<kParts + 1>(task);
        task(std::integral_constant<int, kParts>());
    }

    template <int kParts, int kRows>
    void attend_rows(const Place& at, int row, Space& space) {
        const int shortest = step_->places[row] + 1, longest = shortest + kRows - 1;
        const size_t stride = (size_t)heads_ * width_, room = (longest + 2 * kLanes) / kLanes * kLanes;
        if (space.scores.size() < kRows * room) space.scores.resize(2 * kRows * room);
        float* const scores = space.scores.data();
        const float scale = 1.0f / std::sqrt((float)width_), *query = at.queries + row * stride + at.head * width_;
        const int32_t* const table = table_of(row);
        for (int first = 0; first < longest; first += tokens_) {
            const T* of_block = at.keys + table[first / tokens_] * block_ + in_block(at.head);
            for (int token = 0; token < std::min(tokens_, longest - first); token += kLanes) {
                // Four sums for each row: one alone would wait for itself.
                Sixteen found[kRows][4];
                constexpr int kSome = std::min(kSide<kRows>, 4);
                for (int i = 0; i < 4; i += kSome)
                    score_some<kParts, kRows, kSome>(query + i, stride, of_block + token + (size_t)i * tokens_, &found[0][i]);
                for (int n = 0; n < kRows; n++)
                    store(scores + n * room + first + token, (found[n][0] + found[n][1]) + (found[n][2] + found[n][3]));
            }
        }
        float all[kRows];
        for (int n = 0; n < kRows; n++) all[n] = weigh(scores + n * room, shortest + n, scale, scores + n * room);
        gather_rows<kParts, kRows, 0>(at, row, scores, room, all);
    }

    // So many sums of each row find room in the registers.
    template <int kRows>
    static constexpr int kSide = std::max(kSumsInRegisters / kRows, 1);

    // Queries by sixteen keys: every fourth number, and so many of the three that follow it.
    template <int kParts, int kRows, int kCount>
    void score_some(const float* query, size_t stride, const T* key, Sixteen* found) const {
        Sixteen some[kRows][kCount] = {};
        for (int k = 0; k < kParts * kLanes; k += 4)
#pragma GCC unroll 4
            for (int i = 0; i < kCount; i++) {
                const Sixteen keys = sixteen(key + (size_t)(k + i) * tokens_);
#pragma GCC unroll 4
                for (int n = 0; n < kRows; n++) some[n][i] += query[n * stride + k + i] * keys;
            }
        for (int n = 0; n < kRows; n++)
            for (int i = 0; i < kCount; i++) found[n * 4 + i] = some[n][i];
    }

    // Values by their weights: so many parts of them for all tokens, and then the next ones.
    template <int kParts, int kRows, int kFirst>
    void gather_rows(const Place& at, int row, const float* weights, size_t room, const float* all) const {
        constexpr int kCount = std::min(kParts - kFirst, kSide<kRows>);
        const int shortest = step_->places[row] + 1, longest = shortest + kRows - 1;
        const int32_t* const table = table_of(row);
        Sixteen total[kRows][kCount] = {};
        for (int first = 0; first < longest; first += tokens_) {
            const T* of_block = at.values + table[first / tokens_] * block_ + in_block(at.head) + kFirst * kLanes;
            const int count = std::min(tokens_, longest - first), common = std::min(tokens_, shortest - first);
            const auto add = [&](int token, int from) {
#pragma GCC unroll 8
                for (int part = 0; part < kCount; part++) {
                    const Sixteen values = sixteen(of_block + (size_t)token * kParts * kLanes + part * kLanes);
#pragma GCC unroll 4
                    for (int n = 0; n < kRows; n++)
                        if (n >= from) total[n][part] += weights[n * room + first + token] * values;
                }
            };
            for (int token = 0; token < common; token++) add(token, 0);
            // Beyond the first row's end only the later ones look.
            for (int token = std::max(common, 0); token < count; token++) add(token, first + token + 1 - shortest);
        }
        for (int n = 0; n < kRows && at.claim->mine(); n++)
            for (int part = 0; part < kCount; part++) {
                const Lanes found = total[n][part];
                store(at.attended->at(row + n, at.head * width_ + (kFirst + part) * kLanes), found / all[n]);
            }
        if constexpr (kFirst + kCount < kParts) gather_rows<kParts, kRows, kFirst + kCount>(at, row, weights, room, all);
    }

#ifdef __AMX_BF16__
    // Up to sixteen seats, one for each row and each of the heads that share keys: first through the blocks that all have
    // in common, then each row through its own. What a shorter one may not see has the weight 0, which changes no sum.
    template <int kParts>
    void attend_in_tiles(const Place& at, const Group& group, const int* rows, Space& space) {
        const int count = group.count * shared_;
        int pieces[kTileRows], most = 0;
        for (int n = 0; n < count; n++) most = std::max(most, pieces[n] = step_->places[rows[n / shared_]] / kLanes + 1);
        const int common = group.one_sequence ? most : group.shared * (tokens_ / kLanes);
        const size_t room = (size_t)(most + 1) * kLanes;
        if (space.scores.size() < kTileRows * room) {
            space.scores.resize(2 * kTileRows * room);
            space.weights.resize(2 * kTileRows * room);
        }
        // For all of them together, and for each by itself beyond.
        const auto go = [&](auto task) {
            task(0, count, 0, common);
            for (int n = 0; n < count && !group.one_sequence; n += shared_) task(n, shared_, common, pieces[n]);
        };
        go([&](int n, int queries, int from, int to) {
            shape(space, queries);
            score<kParts>(at, rows, n, queries, from, to, space.scores.data() + n * room, room);
        });
        float all[kTileRows];
        for (int n = 0; n < count; n++) {
            bf16* weights = space.weights.data() + n * room;
            const float scale = 1.0f / std::sqrt((float)width_);
            all[n] = weigh(space.scores.data() + n * room, step_->places[rows[n / shared_]] + 1, scale, weights);
            for (int piece = pieces[n]; piece < common; piece++) store(weights + piece * kLanes, Lanes{});
        }
        for (int part = 0; part < kParts; part += kPartsTogether) {
            alignas(64) float found[kPartsTogether][kTileRows][kLanes];
            go([&](int n, int queries, int from, int to) {
                shape(space, queries);
                const bf16* weights = space.weights.data() + n * room;
                gather<std::min(kParts, kPartsTogether)>(at, rows[n / shared_], part, from, to, weights, room, &found[0][n]);
            });
            for (int n = 0; n < count && at.claim->mine(); n++) {
                const int row = rows[n / shared_], column = (at.head + n % shared_) * width_;
                for (int i = 0; i < std::min(kParts - part, kPartsTogether); i++)
                    store(at.attended->at(row, column + (part + i) * kLanes), load(found[i][n]) / all[n]);
            }
        }
    }

    static void shape(Space& space, int queries) {
        if (space.shaped != queries) begin_attention_tiles(queries);
        space.shaped = queries;
    }

    // Where a seat's query begins.
    size_t seat(const Place& at, const int* rows, int n) const {
        return ((size_t)rows[n / shared_] * heads_ + at.head + n % shared_) * width_;
    }

    // Where sixteen tokens' keys, or values, of a head begin.
    const T* piece_of(const T* cache, int head, int row, int piece, size_t a_token) const {
        const int token = piece * kLanes;
        return cache + table_of(row)[token / tokens_] * block_ + in_block(head) + token % tokens_ * a_token;
    }

    template <int kParts>
    void score(
        const Place& at, const int* rows, int first, int count, int from, int to, float* scores, size_t room
    ) const {
        alignas(64) bf16 queries[kTileRows][kParts * kLanes];
        for (int n = 0; n < count; n++)
            for (int k = 0; k < width_; k += kLanes)
                store(&queries[n][k], load(at.queries + seat(at, rows, first + n) + k));
        before_tiles();
        const int row = rows[first / shared_];
        for (int piece = from; piece < to; piece++) {
            const T* keys = piece_of(at.keys, at.head, row, piece, 2);
            // Memory answers while this goes on: the values that are weighed next, and the next head's keys after them.
            fetch(piece_of(at.values, at.head, row, piece, width_));
            _tile_zero(0);
            for (int k = 0; k < kParts * kLanes; k += 2 * kLanes) {
                _tile_loadd(1, &queries[0][k], kParts * kLanes * sizeof(bf16));
                _tile_loadd(3, keys + (size_t)k * tokens_, tokens_ * 2 * sizeof(bf16));
                _tile_dpbf16ps(0, 1, 3);
            }
            _tile_stored(0, scores + piece * kLanes, room * sizeof(float));
        }
    }

    // A hint to the processor, into its second cache: right where a block holds sixteen tokens, as by default, and harmless
    // elsewhere.
    void fetch(const T* from) const {
        for (int i = 0; i < width_ * kLanes; i += 64 / sizeof(T)) _mm_prefetch((const char*)(from + i), _MM_HINT_T1);
    }

    // Values by their weights, onto what earlier pieces have found.
    template <int kCount>
    void gather(
        const Place& at, int row, int part, int from, int to, const bf16* weights, size_t room, float (*found)[kLanes]
    ) const {
        const size_t pair = 2 * width_ * sizeof(bf16);
        const int next_head = at.head + shared_;
        before_tiles();
        if (from == 0) {
            clear_sums();
        } else {
            _tile_loadd(0, found, 64);
            if (kCount > 1) _tile_loadd(1, found + kTileRows, 64);
        }
        for (int piece = from; piece < to; piece++) {
            const T* values = piece_of(at.values, at.head, row, piece, width_) + part * 2 * kLanes;
            if (part == 0 && next_head < heads_) fetch(piece_of(at.keys, next_head, row, piece, 2));
            _tile_loadd(2, weights + piece * kLanes, room * sizeof(bf16));
            _tile_loadd(4, values, pair);
            _tile_dpbf16ps(0, 2, 4);
            if constexpr (kCount > 1) {
                _tile_loadd(4, values + 2 * kLanes, pair);
                _tile_dpbf16ps(1, 2, 4);
            }
        }
        _tile_stored(0, found, 64);
        if (kCount > 1) _tile_stored(1, found + kTileRows, 64);
    }
#endif

    // Scores become weights; their sum.
    template <typename Out>
    static float weigh(float* scores, int length, float scale, Out* weights) {
        // What was computed beyond the end counts for nothing.
        store(scores + length, splat(-INFINITY));
        const int padded = (length + kLanes - 1) / kLanes * kLanes;
        Lanes most = load(scores), sums = {};
        for (int token = kLanes; token < padded; token += kLanes) {
            const Lanes found = load(scores + token);
            most = found > most ? found : most;
        }
        const float best = largest(most) * scale;
        for (int token = 0; token < padded; token += kLanes) {
            const Lanes found = load(scores + token) * scale - best;
            const Lanes weight = found == splat(-INFINITY) ? Lanes{} : exp(found);
            store(weights + token, weight);
            sums += weight;
        }
        return sum(sums);
    }

    static constexpr int kRun = 4, kPartsTogether = 2;

    Groups groups_;
    std::vector<Space> spaces_;
};
