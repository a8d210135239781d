// Number formats, their codes and their noise, element by element: what both libraries of this folder share.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

using bf16 = uint16_t;

// Python compares the size of each structure that it fills in with its own when it loads a library.
#define NARROWGAUGE_SIZE_OF(S) \
    extern "C" int size_of_##S() { return sizeof(S); }

// A number format as precision.formats describes it.
struct Format {
    int32_t bits, mantissa_bits, min_exponent, max_exponent, nan_code;  // nan_code -1: there is none
    int32_t has_inf;
    float max;
};

// Where rounding noise comes from; on = 0: nearest even. rows: places of rows, or null where they follow one another.
struct Noise {
    int32_t on, transposed;
    uint32_t key0, key1;
    uint64_t row_offset;
    const int64_t* rows;
};

namespace {

constexpr int64_t SEGMENT = 512;  // elements of a row worked on at once: a multiple of 2, so that nibbles pair up

inline float as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline uint32_t as_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float widen(bf16 x) { return as_float(uint32_t(x) << 16); }
inline float widen(float x) { return x; }

inline void narrow(float x, float* target) { *target = x; }
inline void narrow(float x, bf16* target) {  // nearest even; a NaN stays one
    const uint32_t bits = as_bits(x);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *target = bf16((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

inline uint32_t fmix32(uint32_t h) {
    h ^= h >> 16;
    h *= 0x85EBCA6Bu;
    h ^= h >> 13;
    h *= 0xC2B2AE35u;
    return h ^ (h >> 16);
}

inline uint32_t row_hash(const Noise& noise, uint64_t row) {
    row += noise.row_offset;
    return fmix32(fmix32(uint32_t(row) ^ noise.key0) + uint32_t(row >> 32));
}

// The constants of a format, by value: a store to memory can then not be suspected of changing them.
struct Grid {
    int32_t m, low, high, bias_shift, sign_shift, max_code, nan_code, inf_code, code_mask;
    float max, least_normal, to_small, from_small, small_top;

    explicit Grid(const Format& f)
        : m(f.mantissa_bits),
          low(f.min_exponent + 127),
          high(std::max(f.min_exponent, f.max_exponent) + 127),
          bias_shift((126 + f.min_exponent) << f.mantissa_bits),
          sign_shift(f.bits - 1),
          max_code(int32_t(as_bits(f.max) >> (23 - f.mantissa_bits)) - ((126 + f.min_exponent) << f.mantissa_bits)),
          nan_code(f.nan_code),
          inf_code(f.has_inf ? max_code + 1 : 1 << 30),
          code_mask((1 << (f.bits - 1)) - 1),
          max(f.max),
          least_normal(as_float(uint32_t(127 + f.min_exponent) << 23)),
          to_small(as_float(uint32_t(127 + f.mantissa_bits - f.min_exponent) << 23)),
          from_small(as_float(uint32_t(127 + f.min_exponent - f.mantissa_bits) << 23)),
          small_top(float(1 << f.mantissa_bits)) {}
};

// The code of y. `uniform` is read only if STOCHASTIC.
template <bool STOCHASTIC>
inline int32_t code_of(float y, const Grid g, float uniform) {
    const int32_t bits = int32_t(as_bits(y) & 0x7fffffffu), sign = int32_t(as_bits(y) >> 31);
    const float magnitude = as_float(uint32_t(bits));
    const float a = magnitude < g.max ? magnitude : g.max;
    const int32_t exponent = int32_t(as_bits(a)) >> 23;
    const int32_t above = exponent > g.low ? exponent : g.low;
    const int32_t e = above < g.high ? above : g.high;
    float r;
    if (STOCHASTIC) {
        const float scaled = a * as_float(uint32_t(254 + g.m - e) << 23);
        const float whole = float(int32_t(scaled));  // below 2^m + 1: its floor
        const float q = uniform < scaled - whole ? whole + 1.0f : whole;
        r = q * as_float(uint32_t(e - g.m) << 23);
    } else {
        const float c = as_float(uint32_t(e + 23 - g.m) << 23);
        r = (a + c) - c;
    }
    const int32_t normal = (int32_t(as_bits(r)) >> (23 - g.m)) - g.bias_shift;
    const float scaled = r * g.to_small;
    const int32_t small = int32_t(scaled < g.small_top ? scaled : g.small_top);
    const int32_t code = (r < g.least_normal ? small : normal) | (sign << g.sign_shift);
    const int32_t nan = g.nan_code >= 0 ? g.nan_code : g.max_code;
    return bits > 0x7f800000 ? nan : code;
}

inline float value_of(int32_t stored, const Grid g) {
    const int32_t magnitude = stored & g.code_mask;
    const float normal = as_float(uint32_t(magnitude + g.bias_shift) << (23 - g.m));
    const float small = float(magnitude) * g.from_small;
    float value = magnitude < (1 << g.m) ? small : normal;
    value = g.nan_code >= 0 && magnitude > g.max_code ? NAN : value;
    value = magnitude == g.inf_code ? INFINITY : value;
    const uint32_t sign = uint32_t(stored >> g.sign_shift) << 31;
    return as_float(as_bits(value) | sign);
}

}  // namespace
