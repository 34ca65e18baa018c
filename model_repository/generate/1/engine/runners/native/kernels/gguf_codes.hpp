// The codes of GGUF's quantized types, a byte each, from 0 on: what a row of a file's blocks holds of the weights. Scales are read
// elsewhere (gguf_blocks.py).
//
// Layout of a row: blocks of 32 or 256 inputs. Within a block, runs of nibbles hold the first half of a run's inputs in the low
// bits and the other half in the high bits; runs of crumbs, of two bits, hold four quarters. Further bits lie in bytes of their own.
// ISA variants: none, vectors of the compiler: it does not vectorize loops over bytes that may overlap. Test:
// tests/inference/test_grouped.py.
#pragma once

#include <cstdint>
#include <cstring>

// As in gguf_blocks.py. kCodes: a row is codes already.
enum class GgufType : int32_t { kCodes, kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ2_K, kQ3_K, kQ4_K, kQ5_K, kQ6_K, kIQ4_NL, kIQ4_XS, kMXFP4 };

constexpr int kBlockInputs = 32, kSuperBlockInputs = 256;

class GgufCodes {
  public:
    explicit GgufCodes(GgufType type) : type_(type) {}

    // to[i] = code of input k + i, for `count` inputs: 64, or 32 where a row ends with half of 64; k is a multiple of 64.
    void unpack(const uint8_t* row, int k, int count, uint8_t* to) const {
        if (type_ == GgufType::kCodes) {
            memcpy(to, row + k, count);
        } else if (const int bytes = block_bytes()) {
            for (int i = 0; i < count; i += kBlockInputs) unpack_block(row + (size_t)(k + i) / kBlockInputs * bytes, to + i);
        } else {
            unpack_part(row + (size_t)(k / kSuperBlockInputs) * super_block_bytes(), k % kSuperBlockInputs, to);
        }
    }

  private:
    // Of types with blocks of 32 inputs; 0 of others.
    int block_bytes() const {
        switch (type_) {
            case GgufType::kQ4_0: case GgufType::kIQ4_NL: return 18;
            case GgufType::kQ4_1: return 20;
            case GgufType::kQ5_0: return 22;
            case GgufType::kQ5_1: return 24;
            case GgufType::kQ8_0: return 34;
            case GgufType::kMXFP4: return 17;
            default: return 0;
        }
    }

    int super_block_bytes() const {
        switch (type_) {
            case GgufType::kQ2_K: return 84;
            case GgufType::kQ3_K: return 110;
            case GgufType::kQ4_K: return 144;
            case GgufType::kQ5_K: return 176;
            case GgufType::kQ6_K: return 210;
            default: return 136;
        }
    }

    void unpack_block(const uint8_t* block, uint8_t* to) const {
        switch (type_) {
            case GgufType::kQ4_0: case GgufType::kIQ4_NL: return nibbles<16>(block + 2, to);
            case GgufType::kQ4_1: return nibbles<16>(block + 4, to);
            case GgufType::kMXFP4: return nibbles<16>(block + 1, to);
            case GgufType::kQ5_0: nibbles<16>(block + 6, to); return fifth_bits(block + 2, to);
            case GgufType::kQ5_1: nibbles<16>(block + 8, to); return fifth_bits(block + 4, to);
            default:
                for (int i = 0; i < kBlockInputs; i += kBytes) store(to + i, load(block + 2 + i) ^ 0x80);
        }
    }

    // 64 inputs from `first` of a block of 256.
    void unpack_part(const uint8_t* block, int first, uint8_t* to) const {
        const int part = first / 64, half = first / 128;
        switch (type_) {
            case GgufType::kQ2_K: return crumbs<0>(block + 16 + 32 * half, part % 2 * 2, to);
            case GgufType::kQ3_K:
                crumbs<0>(block + 32 + 32 * half, part % 2 * 2, to);
                return add_bits<2>(block, 2 * part, to);
            case GgufType::kQ4_K: return nibbles<32>(block + 16 + 32 * part, to);
            case GgufType::kQ5_K:
                nibbles<32>(block + 48 + 32 * part, to);
                return add_bits<4>(block + 16, 2 * part, to);
            case GgufType::kQ6_K:
                for (int i = 0; i < 64; i += kBytes) store(to + i, load(block + 64 * half + i) >> part % 2 * 4 & 15);
                return crumbs<4>(block + 128 + 32 * half, part % 2 * 2, to);
            default:
                nibbles<16>(block + 8 + 32 * part, to);
                return nibbles<16>(block + 24 + 32 * part, to + 32);
        }
    }

    template <int kRun>
    static void nibbles(const uint8_t* from, uint8_t* to) {
        for (int i = 0; i < kRun; i += kBytes) {
            const Bytes both = load(from + i);
            store(to + i, both & 15);
            store(to + kRun + i, both >> 4);
        }
    }

    // Quarters `quarter` and the next one of a run of 128 inputs, added as bits kBit and kBit + 1; kBit 0 stores them.
    template <int kBit>
    static void crumbs(const uint8_t* from, int quarter, uint8_t* to) {
        for (int n = 0; n < 2; n++)
            for (int i = 0; i < 32; i += kBytes) {
                const Bytes crumb = (load(from + i) >> 2 * (quarter + n) & 3) << kBit;
                store(to + 32 * n + i, kBit ? load(to + 32 * n + i) | crumb : crumb);
            }
    }

    // Bit b of byte i is a further bit of input 32 b + i: of 64 inputs, the bits `bit` and the next one.
    template <int kBit>
    static void add_bits(const uint8_t* from, int bit, uint8_t* to) {
        for (int n = 0; n < 2; n++)
            for (int i = 0; i < 32; i += kBytes)
                store(to + 32 * n + i, load(to + 32 * n + i) | (load(from + i) >> (bit + n) & 1) << kBit);
    }

    static void fifth_bits(const uint8_t* from, uint8_t* to) {
        const Bytes places = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
        for (int i = 0; i < kBlockInputs; i += kBytes, from += 2) {
            const uint8_t a = from[0], b = from[1];
            const Bytes bits = {a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b};
            store(to + i, load(to + i) | ((Bytes)((bits & places) != 0) & 16));
        }
    }

    static constexpr int kBytes = 16;
    typedef uint8_t Bytes __attribute__((vector_size(kBytes)));

    static Bytes load(const uint8_t* from) {
        Bytes bytes;
        memcpy(&bytes, from, kBytes);
        return bytes;
    }
    static void store(uint8_t* to, Bytes bytes) { memcpy(to, &bytes, kBytes); }

    const GgufType type_;
};
