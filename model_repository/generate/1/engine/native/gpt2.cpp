// One step of a GPT-2 on a CPU: all rows of a plan, prompt chunks and decoding ones, from token ids to logits.
//
// Between the products everything is float32; rows go into a product, and keys and values into the cache, in the
// weights' own type. Each row is computed by itself, in an order that no other row changes. It knows pointers and sizes;
// who owns the memory, and what the rows mean, its caller knows.

#include <cmath>
#include <memory>

#include "gemm.hpp"
#include "lanes.hpp"
#include "team.hpp"

// The same fields, in the same order, as the structures in gpt2.py.
struct Layer {
    const float *first_scale, *first_shift, *second_scale, *second_shift;
    const void *attend, *project, *widen, *narrow;
    const float *attend_bias, *project_bias, *widen_bias, *narrow_bias;
};

struct Model {
    int32_t layers, width, heads, inner, vocabulary;
    float epsilon;
    const void* tokens;
    const float *positions, *final_scale, *final_shift;
    const Layer* layer;
};

struct Step {
    int32_t rows, wanted_rows, table_width, block_tokens;
    // For each row its token, its position and its row in `tables`; then which rows' logits are wanted.
    const int32_t *ids, *places, *sequences, *wanted, *tables;
    void* const* keys;
    void* const* values;
    float *logits, *hidden;
};

namespace {

template <typename T>
class Gpt2 {
  public:
    explicit Gpt2(const Model& model)
        : model_(model), head_(model.width / model.heads), shares_(model.layers * kPartsOfLayer + kOtherParts) {}

    void step(Team& team, const Step& step) {
        reserve(step.rows, team.size());
        find_runs(step);
        for (auto& share : shares_) share.reset();
        team.run([&](int member) {
            begin_tiles();
            embed(step);
            team.meet();
            for (int layer = 0; layer < model_.layers; layer++) one_layer(team, step, layer, member);
            finish(team, step);
            end_tiles();
        });
    }

  private:
    void reserve(int rows, int members) {
        const size_t padded = (rows + 2 * kTileRows - 1) / (2 * kTileRows) * 2 * kTileRows;
        if (padded <= reserved_) return;
        reserved_ = padded;
        stream_.resize(padded * model_.width);
        queries_.resize(padded * model_.width);
        normal_.resize(padded * model_.width);
        attended_.resize(padded * model_.width);
        widened_.resize(padded * model_.inner);
        blocks_.resize(padded);
        scores_.resize(members);
    }

    // A block of the cache holds, head by head, its tokens' keys as [width][tokens] and their values as [tokens][width]:
    // so one reads sixteen keys, or a value, side by side.
    void keep_key(const Step& step, T* keys, int row, int column, Lanes found) const {
        T sixteen[kLanes];
        store(sixteen, found);
        T* to = keys + blocks_[row] * model_.width * step.block_tokens + step.places[row] % step.block_tokens;
        for (int lane = 0; lane < kLanes; lane++) to[(size_t)(column + lane) * step.block_tokens] = sixteen[lane];
    }

    void keep_value(const Step& step, T* values, int row, int column, Lanes found) const {
        T* of_block = values + blocks_[row] * model_.width * step.block_tokens;
        const int token = step.places[row] % step.block_tokens, head = column / head_;
        store(of_block + ((size_t)head * step.block_tokens + token) * head_ + column % head_, found);
    }

    void embed(const Step& step) {
        const T* tokens = static_cast<const T*>(model_.tokens);
        constexpr int kTogether = FloatOrHalf<T>::kInputs;
        other(0).each(step.rows, [&](int row) {
            const int32_t* table = step.tables + (size_t)step.sequences[row] * step.table_width;
            blocks_[row] = table[step.places[row] / step.block_tokens];
            const int id = step.ids[row];
            const T* packed = tokens + (size_t)(id / kLanes) * model_.width * kLanes + id % kLanes * kTogether;
            const float* place = model_.positions + (size_t)step.places[row] * model_.width;
            float* to = &stream_[(size_t)row * model_.width];
            for (int k = 0; k < model_.width; k++)
                to[k] = value(packed[(size_t)(k / kTogether) * kLanes * kTogether + k % kTogether]) + place[k];
        });
    }

    template <typename Out>
    void normalise(const float* from, const float* scale, const float* shift, Out* to) const {
        const int width = model_.width;
        Lanes total = {}, squares = {};
        for (int k = 0; k < width; k += kLanes) total += load(from + k);
        const float mean = sum(total) / width;
        for (int k = 0; k < width; k += kLanes) {
            const Lanes apart = load(from + k) - mean;
            squares += apart * apart;
        }
        const float inverse = 1.0f / std::sqrt(sum(squares) / width + model_.epsilon);
        for (int k = 0; k < width; k += kLanes)
            store(to + k, (load(from + k) - mean) * inverse * load(scale + k) + load(shift + k));
    }

    void normalise_rows(const Step& step, const float* scale, const float* shift, Share& share) {
        const size_t width = model_.width;
        share.each(step.rows, [&](int row) { normalise(&stream_[row * width], scale, shift, &normal_[row * width]); });
    }

    // Each part of a step is shared out by itself.
    Share& part(int layer, int number) { return shares_[layer * kPartsOfLayer + number]; }
    Share& other(int number) { return shares_[model_.layers * kPartsOfLayer + number]; }

    void one_layer(Team& team, const Step& step, int number, int member) {
        const Layer& layer = model_.layer[number];
        const int width = model_.width;
        normalise_rows(step, layer.first_scale, layer.first_shift, part(number, 0));
        team.meet();
        T *keys = static_cast<T*>(step.keys[number]), *values = static_cast<T*>(step.values[number]);
        const auto* attend_weights = static_cast<const T*>(layer.attend);
        multiply(normal_.data(), step.rows, attend_weights, width, 3 * width, part(number, 1), [&](int row, int block, Lanes found) {
            const int column = block * kLanes;
            found += load(layer.attend_bias + column);
            if (column < width) store(&queries_[(size_t)row * width + column], found);
            else if (column < 2 * width) keep_key(step, keys, row, column - width, found);
            else keep_value(step, values, row, column - 2 * width, found);
        });
        team.meet();
        attend_all<1>(step, keys, values, part(number, 2), scores_[member]);
        team.meet();
        add_product(step, attended_.data(), layer.project, layer.project_bias, width, part(number, 3));
        team.meet();
        normalise_rows(step, layer.second_scale, layer.second_shift, part(number, 4));
        team.meet();
        const auto* widen_weights = static_cast<const T*>(layer.widen);
        multiply(normal_.data(), step.rows, widen_weights, width, model_.inner, part(number, 5), [&](int row, int block, Lanes found) {
            const int column = block * kLanes;
            store(&widened_[(size_t)row * model_.inner + column], gelu(found + load(layer.widen_bias + column)));
        });
        team.meet();
        add_product(step, widened_.data(), layer.narrow, layer.narrow_bias, model_.inner, part(number, 6));
        team.meet();
    }

    // Onto the stream that runs through all layers.
    void add_product(const Step& step, const T* rows, const void* weights, const float* bias, int inputs, Share& share) {
        const int width = model_.width;
        multiply(rows, step.rows, static_cast<const T*>(weights), inputs, width, share, [&](int row, int block, Lanes found) {
            float* to = &stream_[(size_t)row * width + block * kLanes];
            store(to, load(to) + found + load(bias + block * kLanes));
        });
    }

    // With the head's width known to the compiler.
    template <int kParts>
    void attend_all(const Step& step, const T* keys, const T* values, Share& share, std::vector<float>& scores) {
        if constexpr (kParts < kMostParts)
            if (head_ != kParts * kLanes) return attend_all<kParts + 1>(step, keys, values, share, scores);
        share.each((int)runs_.size() * model_.heads, [&](int i) {
            const int row = runs_[i / model_.heads].first, count = runs_[i / model_.heads].second, head = i % model_.heads;
            if (count == kRun) return attend<kParts, kRun>(step, keys, values, row, head, scores);
            for (int n = 0; n < count; n++) attend<kParts, 1>(step, keys, values, row + n, head, scores);
        });
    }

    // Rows that follow one another in a sequence read the same keys and values: so many are attended together.
    void find_runs(const Step& step) {
        runs_.clear();
        for (int row = 0; row < step.rows; row++) {
            const bool follows = row && step.sequences[row] == step.sequences[row - 1] && runs_.back().second < kRun;
            if (follows) runs_.back().second++;
            else runs_.emplace_back(row, 1);
        }
    }

    // One head of rows that follow one another, over all tokens of their sequence up to their own, sixteen at a time as
    // far as a block goes. Each row's numbers come about as they would alone.
    template <int kParts, int kRows>
    void attend(const Step& step, const T* keys, const T* values, int row, int head, std::vector<float>& space) {
        const int tokens = step.block_tokens, shortest = step.places[row] + 1, longest = shortest + kRows - 1;
        const size_t width = model_.width, room = longest + 2 * kLanes;
        if (space.size() < kRows * room) space.resize(2 * kRows * room);
        const float scale = 1.0f / std::sqrt((float)head_), *query = &queries_[row * width + head * head_];
        const int32_t* const table = step.tables + (size_t)step.sequences[row] * step.table_width;
        const size_t in_block = (size_t)head * head_ * tokens, block = width * tokens;
        for (int first = 0; first < longest; first += tokens) {
            const T* of_block = keys + table[first / tokens] * block + in_block;
            for (int token = 0; token < std::min(tokens, longest - first); token += kLanes) {
                // Four sums side by side: one alone would wait for itself.
                Lanes found[kRows][4] = {};
                const T* key = of_block + token;
                for (int k = 0; k < kParts * kLanes; k += 4)
                    for (int i = 0; i < 4; i++, key += tokens) {
                        const Lanes sixteen = load(key);
                        for (int n = 0; n < kRows; n++) found[n][i] += query[n * width + k + i] * sixteen;
                    }
                for (int n = 0; n < kRows; n++)
                    store(&space[n * room + first + token], ((found[n][0] + found[n][1]) + (found[n][2] + found[n][3])) * scale);
            }
        }
        float all[kRows];
        for (int n = 0; n < kRows; n++) all[n] = weigh(&space[n * room], shortest + n);
        Lanes total[kRows][kParts] = {};
        for (int first = 0; first < longest; first += tokens) {
            const T* of_block = values + table[first / tokens] * block + in_block;
            const int count = std::min(tokens, longest - first), common = std::min(tokens, shortest - first);
            const auto add = [&](int token, int from) {
                for (int part = 0; part < kParts; part++) {
                    const Lanes sixteen = load(of_block + (size_t)token * kParts * kLanes + part * kLanes);
                    for (int n = from; n < kRows; n++) total[n][part] += space[n * room + first + token] * sixteen;
                }
            };
            for (int token = 0; token < common; token++) add(token, 0);
            // Beyond the first row's end only the later ones look.
            for (int token = std::max(common, 0); token < count; token++) add(token, first + token + 1 - shortest);
        }
        for (int n = 0; n < kRows; n++)
            for (int part = 0; part < kParts; part++)
                store(&attended_[(row + n) * width + head * head_ + part * kLanes], total[n][part] / all[n]);
    }

    // Scores become weights; their sum.
    static float weigh(float* scores, int length) {
        // What was computed beyond the end counts for nothing.
        store(scores + length, splat(-INFINITY));
        const int padded = (length + kLanes - 1) / kLanes * kLanes;
        Lanes most = load(scores), weights = {};
        for (int token = kLanes; token < padded; token += kLanes) {
            const Lanes found = load(scores + token);
            most = found > most ? found : most;
        }
        const float best = largest(most);
        for (int token = 0; token < padded; token += kLanes) {
            const Lanes found = load(scores + token) - best;
            const Lanes weight = found == splat(-INFINITY) ? Lanes{} : exp(found);
            store(scores + token, weight);
            weights += weight;
        }
        return sum(weights);
    }

    void finish(Team& team, const Step& step) {
        const int width = model_.width;
        other(1).each(step.wanted_rows, [&](int i) {
            float* hidden = step.hidden + (size_t)i * width;
            normalise(&stream_[(size_t)step.wanted[i] * width], model_.final_scale, model_.final_shift, hidden);
            for (int k = 0; k < width; k += kLanes) store(&normal_[(size_t)i * width + k], load(hidden + k));
        });
        team.meet();
        const int outputs = (model_.vocabulary + kLanes - 1) / kLanes * kLanes;
        const auto* tokens = static_cast<const T*>(model_.tokens);
        multiply(normal_.data(), step.wanted_rows, tokens, width, outputs, other(2), [&](int row, int block, Lanes found) {
            const int column = block * kLanes, count = std::min(kLanes, model_.vocabulary - column);
            memcpy(step.logits + (size_t)row * model_.vocabulary + column, &found, count * sizeof(float));
        });
    }

    template <typename Type>
    struct FloatOrHalf {
        static constexpr int kInputs = sizeof(Type) == 2 ? 2 : 1;
    };

    // The widest head: 256.
    static constexpr int kMostParts = 16;
    static constexpr int kRun = 4;
    static constexpr int kPartsOfLayer = 7, kOtherParts = 3;

    const Model model_;
    const int head_;
    std::vector<Share> shares_;
    size_t reserved_ = 0;
    std::vector<float> stream_, queries_;
    std::vector<T> normal_, attended_, widened_;
    // The block that each row's own key and value go to.
    std::vector<size_t> blocks_;
    // The first row and the number of rows that follow one another.
    std::vector<std::pair<int, int>> runs_;
    std::vector<std::vector<float>> scores_;
};

struct Handle {
    Team team;
    std::unique_ptr<Gpt2<float>> in_float;
    std::unique_ptr<Gpt2<bf16>> in_half;
};

}  // namespace

extern "C" {

void* gpt2_open(const Model* model, int halves, int threads) {
    auto* handle = new Handle{Team(threads), nullptr, nullptr};
    if (halves) handle->in_half = std::make_unique<Gpt2<bf16>>(*model);
    else handle->in_float = std::make_unique<Gpt2<float>>(*model);
    return handle;
}

void gpt2_step(void* opened, const Step* step) {
    auto* handle = static_cast<Handle*>(opened);
    if (handle->in_half) handle->in_half->step(handle->team, *step);
    else handle->in_float->step(handle->team, *step);
}

void gpt2_close(void* opened) { delete static_cast<Handle*>(opened); }

}  // extern "C"
