// Arrays of numbers that begin at a cache line, so that no SIMD vector crosses a line: such a load takes twice as long.
//
// Layout: contiguous. ISA variants: none. Test: tests/inference/test_native.py. In place of std::vector, which the compiler would
// repeat, unrolled, for each type of numbers.
#pragma once

#include <cstddef>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

constexpr size_t kCacheLine = 64;

class AlignedBytes {
  public:
    AlignedBytes() = default;
    AlignedBytes(AlignedBytes&& other) noexcept
        : bytes_(std::exchange(other.bytes_, nullptr)), size_(std::exchange(other.size_, 0)),
          capacity_(std::exchange(other.capacity_, 0)) {}
    AlignedBytes& operator=(AlignedBytes&&) = delete;
    ~AlignedBytes() { release(); }

    char* data() const { return bytes_; }
    size_t size() const { return size_; }

    // New bytes are 0.
    __attribute__((noinline)) void resize(size_t size) {
        if (size > capacity_) {
            char* const bytes = static_cast<char*>(::operator new(size, std::align_val_t(kCacheLine)));
            if (size_) memcpy(bytes, bytes_, size_);
            release();
            bytes_ = bytes;
            capacity_ = size;
        }
        if (size > size_) memset(bytes_ + size_, 0, size - size_);
        size_ = size;
    }

  private:
    void release() { ::operator delete(bytes_, std::align_val_t(kCacheLine)); }

    char* bytes_ = nullptr;
    size_t size_ = 0, capacity_ = 0;
};

template <typename T>
class AlignedVector {
    static_assert(std::is_trivially_copyable_v<T>);

  public:
    AlignedVector() = default;
    explicit AlignedVector(size_t size) { resize(size); }

    void resize(size_t size) { bytes_.resize(size * sizeof(T)); }
    size_t size() const { return bytes_.size() / sizeof(T); }
    T* data() { return reinterpret_cast<T*>(bytes_.data()); }
    const T* data() const { return reinterpret_cast<const T*>(bytes_.data()); }
    T& operator[](size_t i) { return data()[i]; }
    const T& operator[](size_t i) const { return data()[i]; }

  private:
    AlignedBytes bytes_;
};
