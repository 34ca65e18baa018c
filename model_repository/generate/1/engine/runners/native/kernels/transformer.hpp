// One step of a decoder on a CPU: all rows of a plan, prompt chunks and decoding ones, from token ids to logits. GPT-2 with
// its kin and Llama with its own are one here: they differ in how rows are normalised, in how a token's place is told, and
// in the gate of the inner layer.
//
// Between the products everything is float32; rows go into a product, and keys and values into the cache, in the
// model's type. That is the weights' own, or stands beside weights of eight bits: for those, rows become such too. Each
// row is computed by itself, in an order that no other row changes. It knows pointers and sizes; who owns the memory, and
// what the rows mean, its caller knows.
#pragma once

#include <cmath>

#include "attention.hpp"
#include "clock.hpp"
#include "gemm.hpp"
#include "lanes.hpp"
#include "model.hpp"
#include "octets.hpp"
#include "rows.hpp"
#include "step.hpp"
#include "team.hpp"

class Decoder {
  public:
    virtual ~Decoder() = default;
    virtual void step(Team& team, const Step& step) = 0;
    virtual void project(Team& team, const Project& project) = 0;
};

// T is the type of rows, keys and values, W that of weights.
template <typename T, typename W>
class Transformer : public Decoder {
  public:
    explicit Transformer(const Model& model)
        : model_(model), attention_(model.heads, model.shared, model.head_width),
          query_width_(model.heads * model.head_width), key_width_(query_width_ / model.shared),
          shares_(model.layers * kPartsOfLayer + kOtherParts), roundings_(shares_.size()) {}

    void step(Team& team, const Step& step) override {
        reserve(step.rows);
        attention_.begin(step, team.size());
        for (auto& share : shares_) share.reset();
        for (auto& share : roundings_) share.reset();
        clock_ = Clock(step.spent);
        progress_ = step.progress;
        team.run([&](int member) {
            begin_tiles();
            embed(step);
            end_part(member, kOther);
            for (int layer = 0; layer < model_.layers; layer++) one_layer(step, layer, member);
            finish(step, member);
            end_tiles();
        });
    }

    // Rows of earlier steps, in the last parts of a step.
    void project(Team& team, const Project& project) override {
        reserve(project.rows);
        for (int number : {1, 2}) shares_[other(number)].reset(), roundings_[other(number)].reset();
        clock_ = Clock(project.spent);
        progress_ = project.progress;
        const int width = model_.width;
        team.run([&](int member) {
            begin_tiles();
            shares_[other(1)].each(project.rows, [&](int i) {
                const float* hidden = project.hidden + (size_t)project.numbers[i] * width;
                for (int k = 0; k < width; k += kLanes) store(normal_.at(i, k), load(hidden + k));
            });
            end_part(member, kOther);
            make_logits(project.rows, project.logits, project.stride);
            end_part(member, kLogits);
            end_tiles();
        });
    }

  private:
    // The first member looks at the clock, and tells that one more part is done.
    void end_part(int member, Kind kind) {
        if (member) return;
        clock_.lap(kind);
        __atomic_fetch_add(progress_, 1, __ATOMIC_RELAXED);
    }

    void reserve(int rows) {
        const size_t padded = (rows + kTileRows - 1) / kTileRows * kTileRows;
        if (padded <= reserved_) return;
        reserved_ = padded;
        stream_.resize(padded * model_.width);
        queries_.resize(padded * query_width_);
        const bool in_tiles = !kOctets && tiles_compute<T>();
        normal_.reserve(padded, model_.width, in_tiles);
        attended_.reserve(padded, query_width_, in_tiles);
        widened_.reserve(padded, model_.inner, in_tiles);
        if (kOctets) octets_.reserve(padded, std::max({model_.width, model_.inner, query_width_}));
        if (!model_.turns) return;
        keys_.resize(padded * key_width_);
        turned_.resize(padded * model_.head_width);
    }

    // Each part of a step is shared out by itself.
    int part(int layer, int number) const { return layer * kPartsOfLayer + number; }
    int other(int number) const { return model_.layers * kPartsOfLayer + number; }

    void embed(const Step& step) {
        const int width = model_.width;
        shares_[other(0)].each(step.rows, [&](int row) {
            const int place = step.places[row];
            float* to = &stream_[(size_t)row * width];
            take_token(step.ids[row], to);
            if (model_.turns) return find_turns(row, place);
            for (int k = 0; k < width; k += kLanes)
                store(to + k, load(to + k) + load(model_.positions + (size_t)place * width + k));
        });
    }

    // A token's embedding is one output of the matrix that may be the output layer too.
    void take_token(int id, float* to) const {
        const int width = model_.width, block = id / kLanes, lane = id % kLanes;
        constexpr int kTogether = sizeof(float) / sizeof(W);
        const auto take = [&](const W* packed, int from, int end, float scale) {
            for (int k = from; k < end; k++)
                to[k] = value(packed[((k - from) / kTogether * kLanes + lane) * kTogether + k % kTogether]) * scale;
        };
        if constexpr (kOctets) {
            const W* tokens = static_cast<const W*>(model_.tokens.values);
            take(tokens + (size_t)block * in_steps(width) * kLanes, 0, width, model_.tokens.scales[id]);
        } else {
            const Packed<W> packed = packed_of(model_.tokens);
            Near<W> weights(packed, width, block, 1, true);
            weights.begin(0, width);
            for (int k = 0; k < width; k += kTileInputs) {
                weights.reach(k);
                take(weights.block(0) + weights.offset(k), k, k + kTileInputs, 1.0f);
            }
        }
    }

    static Packed<W> packed_of(const Weights& weights) {
        return {weights.values, weights.strays, weights.begins, CodeBook(weights.highest)};
    }

    // The cosines of a place's angles, and then their sines.
    void find_turns(int row, int place) {
        const int half = model_.head_width / 2;
        float* to = &turned_[(size_t)row * model_.head_width];
        for (int i = 0; i < half; i++) {
            const float angle = place * model_.turns[i];
            to[i] = std::cos(angle);
            to[half + i] = std::sin(angle);
        }
    }

    // `done(column, sixteen numbers)` takes them.
    template <typename Done>
    void normalise(const float* from, int width, const float* scale, const float* shift, Done done) const {
        Lanes total = {}, squares = {};
        if (shift)
            for (int k = 0; k < width; k += kLanes) total += load(from + k);
        const float mean = sum(total) / width;
        for (int k = 0; k < width; k += kLanes) {
            const Lanes apart = load(from + k) - mean;
            squares += apart * apart;
        }
        const float inverse = 1.0f / std::sqrt(sum(squares) / width + model_.epsilon);
        for (int k = 0; k < width; k += kLanes) {
            const Lanes found = (load(from + k) - mean) * inverse * load(scale + k);
            done(k, shift ? found + load(shift + k) : found);
        }
    }

    void normalise_rows(const Step& step, const float* scale, const float* shift, int part) {
        const size_t width = model_.width;
        shares_[part].each(step.rows, [&](int row) {
            normalise(&stream_[row * width], width, scale, shift, [&](int k, Lanes found) { store(normal_.at(row, k), found); });
        });
    }

    void one_layer(const Step& step, int number, int member) {
        const Layer& layer = model_.layer[number];
        normalise_rows(step, layer.first_scale, layer.first_shift, part(number, 0));
        end_part(member, kOther);
        T *keys = static_cast<T*>(step.keys[number]), *values = static_cast<T*>(step.values[number]);
        project_in(step, layer, keys, values, part(number, 1));
        end_part(member, kProducts);
        if (model_.turns) {
            turn(step, layer, keys, part(number, 2));
            end_part(member, kOther);
        }
        attention_.attend(keys, values, queries_.data(), attended_, shares_[part(number, 3)], member);
        end_part(member, kAttention);
        add_product(step, attended_, layer.project, part(number, 4));
        end_part(member, kProducts);
        normalise_rows(step, layer.second_scale, layer.second_shift, part(number, 5));
        end_part(member, kOther);
        widen(step, layer.widen, part(number, 6));
        end_part(member, kProducts);
        add_product(step, widened_, layer.narrow, part(number, 7));
        end_part(member, kProducts);
    }

    void project_in(const Step& step, const Layer& layer, T* keys, T* values, int part) {
        const int outputs = query_width_ + 2 * key_width_;
        times(normal_, step.rows, layer.attend, outputs, part, [&](int row, int column, Lanes found) {
            if (column < query_width_) return store(&queries_[(size_t)row * query_width_ + column], found);
            column -= query_width_;
            if (column >= key_width_) return attention_.keep_value(values, row, column - key_width_, found);
            if (model_.turns) return store(&keys_[(size_t)row * key_width_ + column], found);
            attention_.keep_key(keys, row, column, found);
        });
    }

    // Queries and keys by their places; the keys go into the cache only then.
    void turn(const Step& step, const Layer& layer, T* keys, int part) {
        const int width = model_.head_width, all = (query_width_ + key_width_) / width;
        shares_[part].each(step.rows * all, [&](int i) {
            const int row = i / all, head = i % all;
            if (head < model_.heads) return turn_head(&queries_[(size_t)row * query_width_ + head * width], row, layer.query_scale);
            const int first = (head - model_.heads) * width;
            float* key = &keys_[(size_t)row * key_width_ + first];
            turn_head(key, row, layer.key_scale);
            for (int k = 0; k < width; k += kLanes) attention_.keep_key(keys, row, first + k, load(key + k));
        });
    }

    void turn_head(float* head, int row, const float* scale) const {
        const int width = model_.head_width, half = width / 2;
        if (scale) normalise(head, width, scale, nullptr, [&](int k, Lanes found) { store(head + k, found); });
        const float* turned = &turned_[(size_t)row * width];
        for (int k = 0; k < half; k += kLanes) {
            const Lanes cosines = load(turned + k), sines = load(turned + half + k);
            const Lanes first = load(head + k), second = load(head + half + k);
            store(head + k, first * cosines - second * sines);
            store(head + half + k, second * cosines + first * sines);
        }
    }

    void widen(const Step& step, const Weights& weights, int part) {
        const size_t inner = model_.inner;
        if (!model_.gated)
            return times(normal_, step.rows, weights, inner, part, [&](int row, int column, Lanes found) {
                store(widened_.at(row, column), gelu(found));
            });
        // A row's gate comes just before what it lets through.
        Lanes gate = {};
        times(normal_, step.rows, weights, 2 * inner, part, [&](int row, int column, Lanes found) {
            if (column % (2 * kLanes) == 0) gate = silu(found);
            else store(widened_.at(row, column / (2 * kLanes) * kLanes), gate * found);
        });
    }

    // Onto the stream that runs through all layers.
    void add_product(const Step& step, const Rows<T>& rows, const Weights& weights, int part) {
        const int width = model_.width;
        times(rows, step.rows, weights, width, part, [&](int row, int column, Lanes found) {
            float* to = &stream_[(size_t)row * width + column];
            store(to, load(to) + found);
        });
    }

    // `done(row, column, sixteen numbers)` takes them, the bias added.
    template <typename Done>
    void times(const Rows<T>& rows, int count, const Weights& weights, int outputs, int part, Done done) {
        const auto take = [&](int row, int block, Lanes found) {
            done(row, block * kLanes, weights.bias ? found + load(weights.bias + block * kLanes) : found);
        };
        if constexpr (kOctets) {
            const int inputs = rows.inputs();
            roundings_[part].each(count, [&](int row) { octets_.round(rows.at(row), row, inputs); });
            const W* values = static_cast<const W*>(weights.values);
            multiply(octets_, count, values, weights.scales, inputs, outputs, shares_[part], take);
        } else multiply(rows, count, packed_of(weights), outputs, shares_[part], take);
    }

    void finish(const Step& step, int member) {
        const int width = model_.width;
        shares_[other(1)].each(step.logit_count + step.hidden_count, [&](int i) {
            const int n = i - step.logit_count, row = n < 0 ? step.logit_rows[i] : step.hidden_rows[n];
            float* hidden = n < 0 ? nullptr : step.hidden + (size_t)n * width;
            // One piece of code for both, so that projecting a hidden state gives the same bits as the step.
            const auto keep = [&](int k, Lanes found) {
                if (hidden) store(hidden + k, found);
                else store(normal_.at(i, k), found);
            };
            normalise(&stream_[(size_t)row * width], width, model_.final_scale, model_.final_shift, keep);
        });
        end_part(member, kOther);
        make_logits(step.logit_count, step.logits, step.stride);
        shares_[other(3)].each(step.logit_count, [&](int row) {
            const Best best = best_of(step.logits + (size_t)row * step.stride, model_.vocabulary);
            step.best[row] = best.value;
            step.best_ids[row] = best.place;
        });
        end_part(member, kLogits);
    }

    // Of the first rows in `normal_`.
    void make_logits(int count, float* logits, int stride) {
        const int outputs = (model_.vocabulary + kLanes - 1) / kLanes * kLanes;
        times(normal_, count, model_.output, outputs, other(2), [&](int row, int column, Lanes found) {
            store(logits + (size_t)row * stride + column, found);
        });
    }

    static constexpr bool kOctets = sizeof(W) == 1;
    static constexpr int kPartsOfLayer = 8, kOtherParts = 4;

    const Model model_;
    Attention<T> attention_;
    const int query_width_, key_width_;
    // Of each part; and, where it is a product, of the rows that are rounded for it.
    std::vector<Share> shares_, roundings_;
    size_t reserved_ = 0;
    Clock clock_;
    uint64_t* progress_ = nullptr;
    Numbers<float> stream_, queries_, keys_, turned_;
    Rows<T> normal_, attended_, widened_;
    // The rows of the product that is computed, for weights of eight bits.
    Octets octets_;
};
