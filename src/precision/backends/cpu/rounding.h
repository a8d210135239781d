// Rounding of vectors: codes, or the values that they stand for.

#pragma once

#include <vector>

#include "vectors.h"

namespace {

// As code_of and value_of of formats.h, in the same steps. An element is q spacings of the grid around it: above the smallest
// normal exponent q counts from 2^m, so that exponent and mantissa add up to the code, a carry included.
struct Rounder {
    int32_t m, max_bits, low_bits, code_offset, nan_code, nan_value, sign_right;
    explicit Rounder(const Format& f)
        : m(f.mantissa_bits),
          max_bits(int32_t(as_bits(f.max))),
          low_bits((f.min_exponent + 127) << 23),
          code_offset((f.min_exponent + 127) << f.mantissa_bits),
          nan_code(f.nan_code >= 0 ? f.nan_code : Grid(f).max_code),
          nan_value(f.nan_code >= 0 ? 0x7fc00000 : max_bits),
          sign_right(32 - f.bits) {}
};

// Codes without their signs, of which `code_offset` is still to be taken; or the bits of value * factor. `hash` is read
// if STOCHASTIC: its upper 24 bits are the noise. A NaN comes out as anything, and shows in `seen`, the largest magnitude
// so far: `mend` then writes what it should have been.
template <bool STOCHASTIC, bool CODES>
inline Words rounded(Floats y, const Rounder& r, Words hash, Floats factor, Ints& seen) {
    const Words bits = Words(y);
    const Ints magnitude = Ints(bits & 0x7fffffff);
    seen = larger(seen, magnitude);
    const Ints a = smaller(magnitude, r.max_bits - Ints{});
    const Ints e = larger(a & 0x7f800000, r.low_bits - Ints{});
    Ints q;
    Floats value;
    if (STOCHASTIC) {
        // Spacings in units of 2^-24, plus noise that carries if it is below their fraction, which is rounded up: noise
        // is whole.
        const Ints spacings = ceiling(Floats(a) * Floats(((278 + r.m) << 23) - e));
        q = Ints((Words(spacings) + (~hash >> 8)) >> 24);
        if (!CODES) value = __builtin_convertvector(q, Floats) * Floats(e - (r.m << 23));
    } else {
        const Floats c = Floats(e + ((23 - r.m) << 23)), sum = Floats(a) + c;
        q = Ints(sum) - Ints(c);
        if (!CODES) value = sum - c;
    }
    if (CODES) return Words(q + (e >> (23 - r.m)));
    return Words(Floats(Words(value) | (bits & 0x80000000u)) * factor);
}

inline Words finished_code(Words code, Floats y, const Rounder& r) {
    return (code - uint32_t(r.code_offset)) | (Words(y) & 0x80000000u) >> r.sign_right;
}

inline bool has_nan(Ints seen) {
    int32_t lanes[LANES], top = 0;
    std::memcpy(lanes, &seen, sizeof lanes);
    for (const int32_t lane : lanes) top = std::max(top, lane);
    return top > 0x7f800000;
}

// The noise of an element is a hash of a sum: one part for its row, one for its column in memory.
struct Hashes {
    std::vector<uint32_t> rows, cols;
    uint32_t key = 0;

    // transposed: the quantized matrix's rows are the columns in memory. cols: as Pair has them, to whole pairs.
    Hashes(const Noise& noise, int64_t num_rows, int64_t num_cols, bool transposed) {
        if (!noise.on) return;
        key = noise.key1;
        rows.resize(num_rows);
        cols.resize((num_cols + PAIR - 1) / PAIR * PAIR);
        const bool by_col = (noise.transposed != 0) != transposed;  // which the noise calls rows
        const size_t counted = by_col ? num_cols : num_rows;
        const auto row_hash_of = [&](size_t i) {
            return row_hash(noise, noise.rows && i < counted ? uint64_t(noise.rows[i]) : i);
        };
        for (size_t i = 0; i < rows.size(); ++i) rows[i] = by_col ? uint32_t(i) * 0x9E3779B9u : row_hash_of(i);
        for (size_t i = 0; i < cols.size(); ++i) {
            const size_t place = i / PAIR * PAIR + i % PAIR / 2 + i % 2 * LANES;
            cols[place] = by_col ? row_hash_of(i) : uint32_t(i) * 0x9E3779B9u;
        }
    }

    static Words of(uint32_t row, const uint32_t* col, uint32_t key) {
        Words h;
        std::memcpy(&h, col, sizeof h);
        h = (h + row) ^ key;
        h ^= h >> 16;
        h *= 0x85EBCA6Bu;
        h ^= h >> 13;
        h *= 0xC2B2AE35u;
        return h ^ h >> 16;
    }
};

enum Kind { VALUES, BYTES, NIBBLES };  // what is written: BF16, codes of 8 bits, codes of 4 bits

// Bytes that n elements take.
inline int64_t bytes_of(Kind kind, int64_t n) { return kind == VALUES ? 2 * n : kind == BYTES ? n : (n + 1) / 2; }

// What `rounded` made of a pair of vectors.
template <Kind KIND>
inline void put(Words even, Words odd, const Pair& y, const Rounder& r, char* target) {
    using Bytes = uint8_t __attribute__((vector_size(16)));
    constexpr int SHIFT = KIND == BYTES ? 8 : 4;
    if (KIND == VALUES) {
        const Words both = even >> 16 | (odd & 0xffff0000u);
        std::memcpy(target, &both, sizeof both);
        return;
    }
    const uint32_t offset = uint32_t(r.code_offset), sign = 0x80000000u >> r.sign_right;
    Words both = even + (odd << SHIFT) - (offset + (offset << SHIFT));
    both |= Words(y.even) >> r.sign_right & sign;
    both |= Words(y.odd) >> (r.sign_right - SHIFT) & sign << SHIFT;
    if (KIND == BYTES) {
        const Halves halves = __builtin_convertvector(both, Halves);
        std::memcpy(target, &halves, sizeof halves);
    } else {
        const Bytes bytes = __builtin_convertvector(both, Bytes);
        std::memcpy(target, &bytes, sizeof bytes);
    }
}

// Writes element `place` of a row where y is NaN.
template <Kind KIND>
inline void mend(float y, const Rounder& r, float factor, char* row, int64_t place) {
    if (!(y != y)) return;
    if (KIND == VALUES) {
        const bf16 value = bf16(as_bits(as_float(uint32_t(r.nan_value)) * factor) >> 16);
        std::memcpy(row + 2 * place, &value, 2);
    } else if (KIND == BYTES) {
        row[place] = char(r.nan_code);
    } else {
        const int shift = place % 2 * 4;
        row[place / 2] = char((row[place / 2] & ~(0xf << shift)) | r.nan_code << shift);
    }
}

// The scales of a row's tiles, once for every sixteen elements, among which two tiles never meet.
inline void spread(const float* tiles, int64_t cols, int64_t wide, float* out) {
    const int64_t count = (cols + LANES - 1) / LANES, each = std::min(count, (wide + LANES - 1) / LANES);
    if (each == 1) return void(std::memcpy(out, tiles, count * sizeof(float)));
    if (each == 2)
        for (int64_t i = 0; i + 1 < count; i += 2) out[i] = out[i + 1] = tiles[i / 2];
    if (each == 2 && count % 2) out[count - 1] = tiles[count / 2];
    for (int64_t i = 0; each > 2 && i < count; i += each, ++tiles)
        std::fill(out + i, out + std::min(count, i + each), *tiles);
}

// For a pair of vectors from the scales of either sixteen: each has half of its lanes in both.
inline Floats of_sixteens(const float* two) {
    const Ints halves = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    return __builtin_shuffle(load(two), halves);
}

template <typename T, bool STOCHASTIC, Kind KIND>
void round_line(const T* line, const float* scales, const float* factors, char* target, int64_t cols,
                const Rounder& rounder, uint32_t hash, const Hashes& hashes) {
    const Rounder local = rounder;  // else every store might change it
    const uint32_t key = hashes.key, *hash_cols = hashes.cols.data();
    Ints seen = {};
    for (int64_t k = 0; k < cols; k += PAIR) {
        const Pair x = load_pair(line + k, cols - k);
        const Floats scale = of_sixteens(scales + k / LANES);
        const Floats factor = KIND == VALUES ? of_sixteens(factors + k / LANES) : Floats{};
        const Words noise[] = {STOCHASTIC ? Hashes::of(hash, hash_cols + k, key) : Words{},
                               STOCHASTIC ? Hashes::of(hash, hash_cols + k + LANES, key) : Words{}};
        const Pair y = {x.even * scale, x.odd * scale};
        const Words even = rounded<STOCHASTIC, KIND != VALUES>(y.even, local, noise[0], factor, seen);
        const Words odd = rounded<STOCHASTIC, KIND != VALUES>(y.odd, local, noise[1], factor, seen);
        if (cols - k >= PAIR) {
            put<KIND>(even, odd, y, local, target + bytes_of(KIND, k));
        } else {
            char buffer[64];
            put<KIND>(even, odd, y, local, buffer);
            if (KIND == NIBBLES && cols % 2) buffer[(cols - k) / 2] &= 0xf;
            std::memcpy(target + bytes_of(KIND, k), buffer, bytes_of(KIND, cols - k));
        }
    }
    if (has_nan(seen))
        for (int64_t k = 0; k < cols; ++k)
            mend<KIND>(widen(line[k]) * scales[k / LANES], local, factors[k / LANES], target, k);
}

}  // namespace
