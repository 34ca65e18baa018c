// The buffers that operations read and write (Buffer in program.hpp), for all rows of a step.
//
// Layout: float32 buffers are [rows][width]; the inputs of matmuls are Rows<T>. The rows that a matmul reads are as wide as its
// inputs, so there is a kInner for each width that the program uses.
// ISA variants: none. Test: tests/inference/test_native_families.py. It knows no operations but their sizes.
#pragma once

#include <algorithm>
#include <cstring>
#include <list>
#include <vector>

#include "amx.hpp"
#include "program.hpp"
#include "rows.hpp"
#include "simd.hpp"

template <typename T>
class Buffers {
  public:
    // `layout`: that of the Rows. `with_values`: whether there is a buffer of values.
    Buffers(const Program& program, RowLayout layout, bool with_values)
        : hidden_size_(program.hidden_size), query_width_(program.num_heads * program.head_dim),
          key_width_(query_width_ / program.heads_per_kv), layout_(layout), with_values_(with_values) {
        for (int n = 0; n < program.op_count; n++)
            if (program.ops[n].kind == OpKind::kMatmul) add_inner(*static_cast<const MatmulOp*>(program.ops[n].arguments));
    }

    // Room for this many rows, a multiple of 16.
    void reserve(size_t count) {
        for (auto* buffer : {&residual_, &branch_}) buffer->resize(count * hidden_size_);
        queries_.resize(count * query_width_);
        keys_.resize(count * key_width_);
        if (with_values_) values_.resize(count * key_width_);
    }

    // Lays out the Rows for a step of this many rows.
    void begin(int count) {
        for (Rows<T>* buffer : {&normed_, &second_normed_}) buffer->begin(count, hidden_size_, layout_);
        attended_.begin(count, query_width_, layout_);
        for (Rows<T>& buffer : inner_) buffer.begin(count, buffer.inputs(), layout_);
    }

    // These rows, in ascending order, become rows 0, 1, …. kAttended and kInner lose their contents.
    void keep(const std::vector<int>& kept) {
        for (const Buffer buffer : {Buffer::kResidual, Buffer::kBranch, Buffer::kQueries})
            for (size_t n = 0; n < kept.size(); n++)
                memmove(floats(buffer, n), floats(buffer, kept[n]), width(buffer) * sizeof(float));
        for (Rows<T>* buffer : {&normed_, &second_normed_}) buffer->keep(kept);
        attended_.begin((int)kept.size(), query_width_, layout_);
        for (Rows<T>& buffer : inner_) buffer.begin((int)kept.size(), buffer.inputs(), layout_);
    }

    float* floats(Buffer buffer, size_t row = 0) {
        const size_t first = row * width(buffer);
        switch (buffer) {
            case Buffer::kBranch: return &branch_[first];
            case Buffer::kQueries: return &queries_[first];
            case Buffer::kKeys: return &keys_[first];
            default: return &residual_[first];
        }
    }

    // A row's values, until they are quantized; no operation reads them.
    float* values(size_t row = 0) { return &values_[row * key_width_]; }

    // `width` distinguishes the kInner.
    Rows<T>& rows(Buffer buffer, int width) {
        switch (buffer) {
            case Buffer::kSecondNormed: return second_normed_;
            case Buffer::kAttended: return attended_;
            case Buffer::kInner: return *find_inner(width);
            default: return normed_;
        }
    }

    int width(Buffer buffer) const {
        if (buffer == Buffer::kQueries || buffer == Buffer::kAttended) return query_width_;
        return buffer == Buffer::kKeys ? key_width_ : hidden_size_;
    }

  private:
    void add_inner(const MatmulOp& op) {
        const int width = op.weights.outputs / (1 + op.gated);
        if (op.to == Buffer::kInner && find_inner(width) == inner_.end()) inner_.emplace_back().begin(0, width, layout_);
    }

    typename std::list<Rows<T>>::iterator find_inner(int width) {
        return std::find_if(inner_.begin(), inner_.end(), [&](const Rows<T>& rows) { return rows.inputs() == width; });
    }

    const int hidden_size_, query_width_, key_width_;
    const RowLayout layout_;
    const bool with_values_;
    AlignedVector<float> residual_, branch_, queries_, keys_, values_;
    Rows<T> normed_, second_normed_, attended_;
    std::list<Rows<T>> inner_;
};
