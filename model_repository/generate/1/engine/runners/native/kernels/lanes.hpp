// Sixteen floats at a time, in the compiler's own vectors: AVX-512, AVX2 or whatever the machine has. A bfloat16 is the
// upper half of a float. Nothing here knows of models.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));

constexpr int kLanes = 16;

struct bf16 {
    uint16_t bits;
};

// Memory in which sixteen floats never lie across two cache lines: those take twice as long.
template <typename T>
struct InLines {
    typedef T value_type;
    InLines() = default;
    template <typename Other>
    InLines(const InLines<Other>&) {}
    T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))); }
    void deallocate(T* memory, size_t) { ::operator delete(memory, std::align_val_t(64)); }
    bool operator==(const InLines&) const { return true; }
    bool operator!=(const InLines&) const { return false; }
};

template <typename T>
using Numbers = std::vector<T, InLines<T>>;

inline Lanes splat(float x) { return Lanes{} + x; }

inline Lanes load(const float* from) {
    Lanes v;
    memcpy(&v, from, sizeof v);
    return v;
}

inline Lanes load(const bf16* from) {
    Halves h;
    memcpy(&h, from, sizeof h);
    return (Lanes)(__builtin_convertvector(h, Words) << 16);
}

inline void store(float* to, Lanes v) { memcpy(to, &v, sizeof v); }

// Rounded to nearest, ties to even; what is not a number stays none.
inline void store(bf16* to, Lanes v) {
    Words bits = (Words)v;
    Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Halves h = __builtin_convertvector(v == v ? rounded : (bits >> 16) | 0x40, Halves);
    memcpy(to, &h, sizeof h);
}

// Sixteen numbers that are added to again and again, in as many of the machine's own vectors as that takes. Those the
// compiler keeps in registers, and a wider one in memory, where each sum waits for the one before.
#ifdef __AVX512F__
typedef Lanes Sixteen;
typedef Ints SixteenInts;

template <typename T>
Sixteen sixteen(const T* from) {
    return load(from);
}

// Sixteen pairs of bfloat16: the first of each, and the second.
inline void split_pairs(const bf16* from, Sixteen& first, Sixteen& second) {
    Words pairs;
    memcpy(&pairs, from, sizeof pairs);
    first = (Lanes)(pairs << 16);
    second = (Lanes)(pairs & 0xffff0000u);
}
#else
#ifdef __AVX__
constexpr int kPart = 8;
#else
constexpr int kPart = 4;
#endif
constexpr int kParts = kLanes / kPart;
typedef float Part __attribute__((vector_size(4 * kPart)));
typedef int32_t IntsPart __attribute__((vector_size(4 * kPart)));
typedef uint32_t WordsPart __attribute__((vector_size(4 * kPart)));
typedef uint16_t HalvesPart __attribute__((vector_size(2 * kPart)));

template <typename OfPart, typename Whole>
struct InParts {
    OfPart parts[kParts];

    InParts& operator+=(const InParts& other) {
        for (int i = 0; i < kParts; i++) parts[i] += other.parts[i];
        return *this;
    }
    operator Whole() const {
        Whole v;
        memcpy(&v, parts, sizeof v);
        return v;
    }
};
typedef InParts<Part, Lanes> Sixteen;
typedef InParts<IntsPart, Ints> SixteenInts;

inline Sixteen operator*(float x, Sixteen v) {
    for (Part& part : v.parts) part *= x;
    return v;
}

inline Sixteen operator+(Sixteen v, const Sixteen& other) { return v += other; }

inline Sixteen sixteen(const float* from) {
    Sixteen v;
    for (int i = 0; i < kParts; i++) memcpy(&v.parts[i], from + i * kPart, sizeof(Part));
    return v;
}

inline Sixteen sixteen(const bf16* from) {
    Sixteen v;
    for (int i = 0; i < kParts; i++) {
        HalvesPart halves;
        memcpy(&halves, from + i * kPart, sizeof halves);
        v.parts[i] = (Part)(__builtin_convertvector(halves, WordsPart) << 16);
    }
    return v;
}

inline void split_pairs(const bf16* from, Sixteen& first, Sixteen& second) {
    for (int i = 0; i < kParts; i++) {
        WordsPart pairs;
        memcpy(&pairs, from + 2 * i * kPart, sizeof pairs);
        first.parts[i] = (Part)(pairs << 16);
        second.parts[i] = (Part)(pairs & 0xffff0000u);
    }
}

inline void store(float* to, const Sixteen& v) {
    for (int i = 0; i < kParts; i++) memcpy(to + i * kPart, &v.parts[i], sizeof(Part));
}
#endif

// So many of them find room in the registers, beside what is added to them.
#ifdef __AVX512F__
constexpr int kSumsInRegisters = 16;
#else
constexpr int kSumsInRegisters = 4;
#endif

inline float value(float x) { return x; }

inline float value(int8_t x) { return x; }

inline float value(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

inline float sum(Lanes v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    for (int half = kLanes / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
#endif
}

inline float largest(Lanes v) {
    float found = v[0];
    for (int i = 1; i < kLanes; i++) found = v[i] > found ? v[i] : found;
    return found;
}

// The largest of so many numbers, and the first place that holds it. Where one is not a number, none is the largest.
struct Best {
    float value;
    int64_t place;
};

inline Best best_of(const float* from, int count) {
    const int whole = count / kLanes * kLanes;
    Lanes most = splat(-__builtin_inff());
    Ints at = {}, strange = {};
    for (int i = 0; i < whole; i += kLanes) {
        const Lanes found = load(from + i);
        at = found > most ? Ints{} + i : at;
        most = found > most ? found : most;
        strange |= found != found;
    }
    Best best = {-__builtin_inff(), 0};
    bool none = false;
    for (int lane = 0; lane < kLanes; lane++) {
        none |= strange[lane] != 0;
        const int64_t place = at[lane] + lane;
        if (most[lane] > best.value || (most[lane] == best.value && place < best.place)) best = {most[lane], place};
    }
    for (int i = whole; i < count; i++) {
        none |= from[i] != from[i];
        if (from[i] > best.value) best = {from[i], i};
    }
    return none ? Best{__builtin_nanf(""), 0} : best;
}

// e to the x, to about one unit in the last place; below -87 it is 0 as far as a sum can tell.
inline Lanes exp(Lanes x) {
    x = x < splat(-87.0f) ? splat(-87.0f) : x;
    x = x > splat(88.0f) ? splat(88.0f) : x;
    // Adding this leaves the nearest whole number in the lowest bits.
    constexpr float kMagic = 12582912.0f;
    Lanes shifted = x * 1.44269504f + kMagic;
    Lanes n = shifted - kMagic;
    Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Lanes p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Words power = ((Words)shifted - 0x4b400000 + 127) << 23;
    return p * (Lanes)power;
}

// One over x, to the last place but one; several times as fast as a division.
inline Lanes inverse(Lanes x) {
#ifdef __AVX512F__
    const Lanes near = (Lanes)_mm512_rcp14_ps((__m512)x);
    return near * (2.0f - x * near);
#else
    return 1.0f / x;
#endif
}

inline Lanes silu(Lanes x) { return x * inverse(1.0f + exp(-x)); }

// GELU in its tanh form, which is x times the logistic function of twice the tanh's argument.
inline Lanes gelu(Lanes x) {
    Lanes twice = 1.5957691216f * (x + 0.044715f * x * x * x);
    return x * inverse(1.0f + exp(-twice));
}
