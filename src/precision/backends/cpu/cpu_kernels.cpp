// Quantization on CPUs: the same codes and scales as precision/quantize.py, bit for bit, in a few passes over memory.
//
// Plain C symbols, called through ctypes; every shape is checked by the caller. Matrices are [rows, cols], contiguous,
// with the contraction last. Compiled without contraction of a * b + c: every float operation rounds once.
// flags: -O2 -fvect-cost-model=dynamic -ffp-contract=off
//
// No result depends on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using bf16 = uint16_t;
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

}  // namespace

extern "C" {

// A number format as precision.formats describes it.
struct Format {
    int32_t bits, mantissa_bits, min_exponent, max_exponent, nan_code;  // nan_code -1: there is none
    int32_t has_inf;
    float max;
};

// Where rounding noise comes from; on = 0: nearest even.
struct Noise {
    int32_t on, transposed;
    uint32_t key0, key1;
    uint64_t row_offset;
};

}  // extern "C"

namespace {

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

template <typename T, bool STOCHASTIC>
void encode_rows(const T* x, const float* scales, uint8_t* codes, int64_t rows, int64_t cols, int64_t tall,
                 int64_t wide, const Format& format, const Noise& noise) {
    const Grid grid(format);
    const bool pairs = format.bits == 4;
    const int64_t grid_cols = (cols + wide - 1) / wide;
    const int64_t bytes = format.bits == 4 ? (cols + 1) / 2 : cols;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        alignas(64) float y[SEGMENT], uniform[SEGMENT];
        alignas(64) int32_t code[SEGMENT];
        const float* row_scales = scales + row / tall * grid_cols;
        const uint32_t hash = STOCHASTIC && !noise.transposed ? row_hash(noise, uint64_t(row)) : 0;
        for (int64_t start = 0; start < cols; start += SEGMENT) {
            const int64_t count = std::min(SEGMENT, cols - start);
            const T* line = x + row * cols + start;
            for (int64_t k = 0; k < count;) {  // tile by tile, so that the scale is a constant of the inner loop
                const int64_t tile = (start + k) / wide;
                const int64_t end = std::min(count, (tile + 1) * wide - start);
                const float scale = row_scales[tile];
#pragma omp simd
                for (int64_t i = k; i < end; ++i) y[i] = widen(line[i]) * scale;
                k = end;
            }
            if (STOCHASTIC) {
                if (noise.transposed) {  // the noise of element (row, col) is that of (col, row)
                    for (int64_t i = 0; i < count; ++i) {
                        const uint64_t place = uint64_t(start + i) + noise.row_offset;
                        const uint32_t h = fmix32(fmix32(uint32_t(place) ^ noise.key0) + uint32_t(place >> 32));
                        const uint32_t element = fmix32((h + uint32_t(row) * 0x9E3779B9u) ^ noise.key1);
                        uniform[i] = float(int32_t(element >> 8)) * 0x1p-24f;
                    }
                } else {
#pragma omp simd
                    for (int64_t i = 0; i < count; ++i) {
                        const uint32_t element = fmix32((hash + uint32_t(start + i) * 0x9E3779B9u) ^ noise.key1);
                        uniform[i] = float(int32_t(element >> 8)) * 0x1p-24f;
                    }
                }
            }
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) code[i] = code_of<STOCHASTIC>(y[i], grid, uniform[i]);
            if (!pairs) {
                uint8_t* target = codes + row * bytes + start;
#pragma omp simd
                for (int64_t i = 0; i < count; ++i) target[i] = uint8_t(code[i]);
                continue;
            }
            if (count % 2) code[count] = 0;
            uint8_t* target = codes + row * bytes + start / 2;
#pragma omp simd
            for (int64_t i = 0; i < (count + 1) / 2; ++i) target[i] = uint8_t(code[2 * i] | code[2 * i + 1] << 4);
        }
    }
}

template <typename T>
void encode_any(const T* x, const float* scales, uint8_t* codes, int64_t rows, int64_t cols, int64_t tall,
                int64_t wide, const Format& format, const Noise& noise) {
    if (noise.on)
        encode_rows<T, true>(x, scales, codes, rows, cols, tall, wide, format, noise);
    else
        encode_rows<T, false>(x, scales, codes, rows, cols, tall, wide, format, noise);
}

template <typename T>
void values_rows(const uint8_t* codes, const float* factors, T* out, int64_t rows, int64_t cols, int64_t tall,
                 int64_t wide, const Format& format) {
    const Grid grid(format);
    const bool pairs = format.bits == 4;
    const int64_t grid_cols = (cols + wide - 1) / wide;
    const int64_t bytes = pairs ? (cols + 1) / 2 : cols;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        alignas(64) int32_t code[SEGMENT];
        alignas(64) float value[SEGMENT];
        const float* row_factors = factors + row / tall * grid_cols;
        for (int64_t start = 0; start < cols; start += SEGMENT) {
            const int64_t count = std::min(SEGMENT, cols - start);
            if (pairs) {
                const uint8_t* source = codes + row * bytes + start / 2;
#pragma omp simd
                for (int64_t i = 0; i < (count + 1) / 2; ++i) {
                    code[2 * i] = source[i] & 0xf;
                    code[2 * i + 1] = source[i] >> 4;
                }
            } else {
                const uint8_t* source = codes + row * bytes + start;
#pragma omp simd
                for (int64_t i = 0; i < count; ++i) code[i] = source[i];
            }
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) value[i] = value_of(code[i], grid);
            T* target = out + row * cols + start;
            for (int64_t k = 0; k < count;) {
                const int64_t tile = (start + k) / wide;
                const int64_t end = std::min(count, (tile + 1) * wide - start);
                const float factor = row_factors[tile];
#pragma omp simd
                for (int64_t i = k; i < end; ++i) narrow(value[i] * factor, target + i);
                k = end;
            }
        }
    }
}

template <typename T>
void transpose_blocks(const T* x, T* out, int64_t rows, int64_t cols) {
    constexpr int64_t B = 32;
#pragma omp parallel for schedule(static)
    for (int64_t j = 0; j < cols; j += B)
        for (int64_t i = 0; i < rows; i += B) {
            const int64_t height = std::min(B, rows - i), width = std::min(B, cols - j);
            T block[B][B];
            for (int64_t a = 0; a < height; ++a)
                for (int64_t b = 0; b < width; ++b) block[b][a] = x[(i + a) * cols + j + b];
            for (int64_t b = 0; b < width; ++b) std::memcpy(out + (j + b) * rows + i, block[b], height * sizeof(T));
        }
}

template <typename T>
void hadamard_rows(const T* x, T* out, int64_t rows, int64_t cols, const float* signs, int64_t size, float factor) {
    const int64_t whole = cols / size * size;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const T* line = x + row * cols;
        T* target = out + row * cols;
        alignas(64) float block[128], other[128];
        for (int64_t start = 0; start < whole; start += size) {
            for (int64_t i = 0; i < size; ++i) block[i] = widen(line[start + i]) * signs[i];
            for (int64_t stride = 1; stride < size; stride *= 2) {
                for (int64_t i = 0; i < size; i += 2 * stride)
                    for (int64_t k = i; k < i + stride; ++k) {
                        const float u = block[k], v = block[k + stride];
                        other[k] = u + v;
                        other[k + stride] = u - v;
                    }
                std::memcpy(block, other, size * sizeof(float));
            }
            for (int64_t i = 0; i < size; ++i) narrow(block[i] * factor, target + start + i);
        }
        std::memcpy(target + whole, line + whole, (cols - whole) * sizeof(T));
    }
}

// hadamard_rows of the transpose of x [rows, cols]: out [cols, rows], blocks along the rows of x.
template <typename T>
void hadamard_columns(const T* x, T* out, int64_t rows, int64_t cols, const float* signs, int64_t size, float factor) {
    constexpr int64_t B = 32;
    const int64_t groups = (rows + size - 1) / size;
#pragma omp parallel for schedule(static)
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = group * size, height = std::min(size, rows - first);
        alignas(64) float block[128][B];
        T turned[B][128];
        for (int64_t j = 0; j < cols; j += B) {
            const int64_t width = std::min(B, cols - j);
            if (height < size) {  // ragged: as it is
                for (int64_t i = 0; i < height; ++i)
                    for (int64_t b = 0; b < width; ++b) out[(j + b) * rows + first + i] = x[(first + i) * cols + j + b];
                continue;
            }
            for (int64_t i = 0; i < size; ++i) {
                const T* line = x + (first + i) * cols + j;
                const float sign = signs[i];
                for (int64_t b = width; b < B; ++b) block[i][b] = 0.0f;
#pragma omp simd
                for (int64_t b = 0; b < width; ++b) block[i][b] = widen(line[b]) * sign;
            }
            for (int64_t stride = 1; stride < size; stride *= 2)
                for (int64_t i = 0; i < size; i += 2 * stride)
                    for (int64_t k = i; k < i + stride; ++k)
#pragma omp simd
                        for (int64_t b = 0; b < B; ++b) {
                            const float u = block[k][b], v = block[k + stride][b];
                            block[k][b] = u + v;
                            block[k + stride][b] = u - v;
                        }
            for (int64_t i = 0; i < size; ++i)
                for (int64_t b = 0; b < width; ++b) narrow(block[i][b] * factor, &turned[b][i]);
            for (int64_t b = 0; b < width; ++b) std::memcpy(out + (j + b) * rows + first, turned[b], size * sizeof(T));
        }
    }
}

// Sixteen elements at a time. The compiler splits these vectors where a CPU has narrower ones.

constexpr int64_t LANES = 16;
using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));

inline Floats load(const bf16* source) {
    Halves halves;
    std::memcpy(&halves, source, sizeof halves);
    return Floats(__builtin_convertvector(halves, Words) << 16);
}
inline Floats load(const float* source) {
    Floats floats;
    std::memcpy(&floats, source, sizeof floats);
    return floats;
}

// Thirty-two neighbours: those in even places, and those in odd ones. BF16 numbers come apart so in two instructions.
constexpr int64_t PAIR = 2 * LANES;
struct Pair {
    Floats even, odd;
};

inline Pair load_pair(const bf16* source) {
    Words both;
    std::memcpy(&both, source, sizeof both);
    return {Floats(both << 16), Floats(both & 0xffff0000u)};
}
inline Pair load_pair(const float* source) {
    const Ints even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    const Floats low = load(source), high = load(source + LANES);
    return {__builtin_shuffle(low, high, even), __builtin_shuffle(low, high, even + 1)};
}
template <typename T>
inline Pair load_pair(const T* source, int64_t count) {  // the rest is zero
    if (count >= PAIR) return load_pair(source);
    T buffer[PAIR] = {};
    std::memcpy(buffer, source, count * sizeof(T));
    return load_pair(buffer);
}

// Nearest even. What comes from BF16 numbers has NaNs with lower bits of zero, and those stay NaNs.
inline Floats rounded_to(Floats x, const bf16*) {
    const Words bits = Words(x);
    return Floats((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u);
}
inline Floats rounded_to(Floats x, const float*) { return x; }

// As code_of and value_of above, in the same steps. An element is q spacings of the grid around it: above the smallest
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

inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }
inline Ints smaller(Ints a, Ints b) { return a < b ? a : b; }

inline Ints ceiling(Floats x) {  // of numbers from 0 to 2^31
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
    return Ints(__builtin_ia32_cvtps2dq512_mask(x, Ints{}, -1, 0x0a));  // up, without exceptions
#else
    const Ints down = __builtin_convertvector(x, Ints);
    return down - Ints(__builtin_convertvector(down, Floats) < x);
#endif
}

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
        for (size_t i = 0; i < rows.size(); ++i) rows[i] = by_col ? uint32_t(i) * 0x9E3779B9u : row_hash(noise, i);
        for (size_t i = 0; i < cols.size(); ++i) {
            const size_t place = i / PAIR * PAIR + i % PAIR / 2 + i % 2 * LANES;
            cols[place] = by_col ? row_hash(noise, i) : uint32_t(i) * 0x9E3779B9u;
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

struct Butterflies {  // of precision.transforms.Hadamard; size 0: none
    int32_t size;
    float factor;
    const float* signs;
};

template <int STRIDE>
[[gnu::always_inline]] inline void butterfly(Floats* group) {
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k)
        if (!(k & STRIDE)) {
            const Floats u = group[k], v = group[k + STRIDE];
            group[k] = u + v;
            group[k + STRIDE] = u - v;
        }
}

[[gnu::always_inline]] inline void sixteen_butterflies(Floats* group, const float* signs) {
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) group[k] *= signs[k];
    butterfly<1>(group);
    butterfly<2>(group);
    butterfly<4>(group);
    butterfly<8>(group);
}

constexpr int64_t DEPTH = 128;  // rows in memory that are worked on at once, 32 columns wide

// v * factor as a transformed tensor of type T holds it.
template <typename T>
inline Floats finished(Floats v, float factor) {
    return rounded_to(v * factor, static_cast<const T*>(nullptr));
}

// `depth` rows, from `row` on, of the 32 columns from `col` on; zeros where there is nothing. Transformed, and
// `finished` if FINISH.
template <bool FINISH, typename T>
[[gnu::noinline]] void load_block(const T* x, int64_t rows, int64_t cols, int64_t row, int64_t depth, int64_t col,
                                  const Butterflies& butterflies, Floats (*blocks)[DEPTH]) {
    const int64_t height = std::min(depth, rows - row), width = cols - col;
    const T* source = x + row * cols + col;
    // The rows of the next blocks lie in one piece, but are read in strides, which no hardware foresees.
    if (row + DEPTH + depth <= rows) {
        const char* next = reinterpret_cast<const char*>(x + (row + DEPTH) * cols + col * depth);
        for (size_t i = 0; i < std::min(PAIR, width) * depth * sizeof(T); i += 64) __builtin_prefetch(next + i, 0, 2);
    }
    const int64_t size = butterflies.size, ready = size == 16 && width >= PAIR ? height / 16 * 16 : 0;
    for (int64_t i = ready; i < height; ++i) {
        const Pair pair = load_pair(source + i * cols, width);
        blocks[0][i] = pair.even;
        blocks[1][i] = pair.odd;
    }
    for (int half = 0; half < 2; ++half) {
        Floats* block = blocks[half];
        for (int64_t i = height; i < depth; ++i) block[i] = Floats{};
        for (int64_t i = 0; size == 16 && i + 16 <= height; i += 16) {
            Floats group[16];
#pragma GCC unroll 16
            for (int k = 0; k < 16; ++k) {
                if (i >= ready) {
                    group[k] = block[i + k];
                    continue;
                }
                const Pair pair = load_pair(source + (i + k) * cols);
                group[k] = half ? pair.odd : pair.even;
            }
            sixteen_butterflies(group, butterflies.signs);
#pragma GCC unroll 16
            for (int k = 0; k < 16; ++k)
                block[i + k] = FINISH ? finished<T>(group[k], butterflies.factor) : group[k];
        }
        for (int64_t i = 0; size && size != 16 && i + size <= height; i += size) {
            Floats* group = block + i;
            for (int64_t k = 0; k < size; ++k) group[k] *= butterflies.signs[k];
            for (int64_t stride = 1; stride < size; stride *= 2)
                for (int64_t j = 0; j < size; j += 2 * stride)
                    for (int64_t k = j; k < j + stride; ++k) {
                        const Floats u = group[k], v = group[k + stride];
                        group[k] = u + v;
                        group[k + stride] = u - v;
                    }
            for (int64_t k = 0; FINISH && k < size; ++k) group[k] = finished<T>(group[k], butterflies.factor);
        }
    }
}

template <int STRIDE>
inline void exchange(Words* v) {  // of pairs of vectors and of lanes that are STRIDE apart
#define NARROWGAUGE_LANES(L) \
    {L(0), L(1), L(2), L(3), L(4), L(5), L(6), L(7), L(8), L(9), L(10), L(11), L(12), L(13), L(14), L(15)}
#define NARROWGAUGE_LOW(lane) (lane & STRIDE ? 16 + (lane ^ STRIDE) : lane)
#define NARROWGAUGE_HIGH(lane) (lane & STRIDE ? 16 + lane : lane ^ STRIDE)
    constexpr Words low = NARROWGAUGE_LANES(NARROWGAUGE_LOW), high = NARROWGAUGE_LANES(NARROWGAUGE_HIGH);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
        if (!(i & STRIDE)) {
            const Words a = v[i], b = v[i + STRIDE];
            v[i] = __builtin_shuffle(a, b, low);
            v[i + STRIDE] = __builtin_shuffle(a, b, high);
        }
}

// 16 x 16 words, transposed in place.
inline void transpose_words(Words* v) {
    exchange<8>(v);
    exchange<4>(v);
    exchange<2>(v);
    exchange<1>(v);
}

// The amaxes of tiles of 16 or 32 BF16 numbers of a row, 16 tiles at a time: neighbours meet until one is left.
using Lanes32 = uint16_t __attribute__((vector_size(64)));

inline Lanes32 halved(Lanes32 a, Lanes32 b) {
    const Lanes32 even = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                          32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    const Lanes32 one = __builtin_shuffle(a, b, even), other = __builtin_shuffle(a, b, even + 1);
    return one > other ? one : other;
}

template <int VECTORS>
inline void amax_sixteen(const bf16* line, float* out) {
    Lanes32 v[VECTORS];
    std::memcpy(v, line, sizeof v);
    for (int i = 0; i < VECTORS; ++i) v[i] &= 0x7fff;
    for (int n = VECTORS; n > 1; n /= 2)
        for (int i = 0; i < n / 2; ++i) v[i] = halved(v[2 * i], v[2 * i + 1]);
    const Lanes32 last = halved(v[0], v[0]);
    Halves top;
    std::memcpy(&top, &last, sizeof top);
    const Words words = __builtin_convertvector(top, Words) << 16;
    std::memcpy(out, &words, sizeof words);
}

template <int64_t WIDE>
inline void amax_narrow(const bf16* line, float* out, int64_t cols) {
    int64_t start = 0;
    for (; start + LANES * WIDE <= cols; start += LANES * WIDE, out += LANES) amax_sixteen<WIDE / 2>(line + start, out);
    if (start == cols) return;
    bf16 rest[LANES * WIDE] = {};
    float tops[LANES];
    std::memcpy(rest, line + start, (cols - start) * sizeof(bf16));
    amax_sixteen<WIDE / 2>(rest, tops);
    std::memcpy(out, tops, (cols - start + WIDE - 1) / WIDE * sizeof(float));
}

inline void amax_line(const bf16* line, float* out, int64_t cols, int64_t wide) {
    if (wide == 16 && cols > 16) return amax_narrow<16>(line, out, cols);
    if (wide == 32 && cols > 32) return amax_narrow<32>(line, out, cols);
    int64_t tile = 0;
    for (; tile * wide < cols; ++tile) {
        const int64_t end = std::min(cols, (tile + 1) * wide);
        int64_t k = tile * wide;
        Lanes32 many = {};
        for (; k + 32 <= end; k += 32) {
            Lanes32 v;
            std::memcpy(&v, line + k, sizeof v);
            v &= 0x7fff;
            many = many > v ? many : v;
        }
        bf16 lanes[32], top = 0;
        std::memcpy(lanes, &many, sizeof lanes);
        for (const bf16 lane : lanes) top = std::max(top, lane);
        for (; k < end; ++k) top = std::max(top, bf16(line[k] & 0x7fff));
        out[tile] = as_float(uint32_t(top) << 16);
    }
}

inline void amax_line(const float* line, float* out, int64_t cols, int64_t wide) {
    for (int64_t tile = 0; tile * wide < cols; ++tile) {
        const int64_t end = std::min(cols, (tile + 1) * wide);
        uint32_t top = 0;
#pragma omp simd reduction(max : top)
        for (int64_t k = tile * wide; k < end; ++k) top = std::max(top, as_bits(line[k]) & 0x7fffffffu);
        out[tile] = as_float(top);
    }
}

inline void largest(float* top, const float* line, int64_t cols) {
#pragma omp simd
    for (int64_t k = 0; k < cols; ++k) {
        const uint32_t a = as_bits(top[k]), b = as_bits(line[k]) & 0x7fffffffu;
        top[k] = as_float(a > b ? a : b);
    }
}
inline void largest(bf16* top, const bf16* line, int64_t cols) {
    int64_t k = 0;
    for (; k + 32 <= cols; k += 32) {
        Lanes32 a, b;
        std::memcpy(&a, top + k, sizeof a);
        std::memcpy(&b, line + k, sizeof b);
        b &= 0x7fff;
        a = a > b ? a : b;
        std::memcpy(top + k, &a, sizeof a);
    }
    for (; k < cols; ++k) top[k] = std::max(top[k], bf16(line[k] & 0x7fff));
}

// The amaxes of a row of tiles, of the rows [first, last), by bits of |x| compared as integers: a NaN is larger than
// everything. top [cols] is scratch, if there is more than one row.
template <typename T>
void amax_band(const T* x, int64_t cols, int64_t first, int64_t last, T* top, float* out, int64_t wide) {
    if (last - first == 1) return amax_line(x + first * cols, out, cols, wide);
    std::fill(top, top + cols, T(0));
    for (int64_t row = first; row < last; ++row) largest(top, x + row * cols, cols);
    amax_line(top, out, cols, wide);
}

template <typename T>
void amax_tiles(const T* x, float* out, int64_t rows, int64_t cols, int64_t tall, int64_t wide) {
    const int64_t grid_rows = (rows + tall - 1) / tall, grid_cols = (cols + wide - 1) / wide;
#pragma omp parallel
    {
        std::vector<T> top(tall > 1 ? cols : 0);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < grid_rows; ++i)
            amax_band(x, cols, i * tall, std::min(rows, (i + 1) * tall), top.data(), out + i * grid_cols, wide);
    }
}

template <typename T>
float amax_of(const T* x, int64_t count) {
    constexpr int64_t PART = 1 << 14;
    uint32_t top = 0;
#pragma omp parallel for schedule(static) reduction(max : top)
    for (int64_t start = 0; start < count; start += PART) {
        float part;
        amax_line(x + start, &part, std::min(PART, count - start), PART);
        top = std::max(top, as_bits(part));
    }
    return as_float(top);
}

// Of what butterflies of size 16 make of the columns. Rounding is monotone: that of the largest will do.
template <typename T>
float amax_of_butterflies(const T* x, int64_t rows, int64_t cols, const float* signs, float factor) {
    int32_t result = 0;
#pragma omp parallel for schedule(static) reduction(max : result)
    for (int64_t row = 0; row < rows; row += 16) {
        const int64_t height = std::min<int64_t>(16, rows - row);
        Ints top = {};
        for (int64_t col = 0; col < cols; col += PAIR) {
            Floats even[16] = {}, odd[16] = {};
            const char* next = reinterpret_cast<const char*>(x + (row + 16) * cols + col * 16);
            if (row + 32 <= rows)
                for (size_t i = 0; i < std::min(PAIR, cols - col) * 16 * sizeof(T); i += 64)
                    __builtin_prefetch(next + i);
            for (int64_t i = 0; i < height; ++i) {
                const Pair pair = load_pair(x + (row + i) * cols + col, cols - col);
                even[i] = pair.even, odd[i] = pair.odd;
            }
            if (height == 16) {
                sixteen_butterflies(even, signs);
                sixteen_butterflies(odd, signs);
            }
            for (int64_t i = 0; i < 16; ++i)
                top = larger(top, larger(Ints(even[i]) & 0x7fffffff, Ints(odd[i]) & 0x7fffffff));
        }
        if (height == 16) top = Ints(finished<T>(Floats(top), factor));
        int32_t lanes[LANES];
        std::memcpy(lanes, &top, sizeof lanes);
        for (const int32_t lane : lanes) result = std::max(result, lane);
    }
    return as_float(uint32_t(result));
}

// out [cols, rows / wide]: the amaxes of tiles as round_columns has them. Rounding is monotone: that of the largest will
// do. A ragged last group of rows is not transformed.
template <typename T>
void amax_butterflies(const T* x, float* out, int64_t rows, int64_t cols, int64_t wide, const Butterflies& butterflies) {
    const int64_t grid_cols = (rows + wide - 1) / wide, span = std::max(wide, DEPTH), step = std::min(wide, DEPTH);
    const int64_t size = butterflies.size, whole = rows / size * size;
#pragma omp parallel for schedule(static)
    for (int64_t start = 0; start < rows; start += span)
        for (int64_t col = 0; col < cols; col += PAIR) {
            Floats blocks[2][DEPTH];
            Ints tops[2] = {};
            for (int64_t first = start; first < std::min(rows, start + span); first += DEPTH) {
                load_block<false>(x, rows, cols, first, DEPTH, col, butterflies, blocks);
                for (int64_t n = 0; n < 2 * DEPTH; n += step) {
                    const int64_t half = n / DEPTH, i = n % DEPTH;
                    if (first + i >= rows) continue;
                    Ints plain = {}, transformed = {}, &top = tops[half];
                    for (int64_t k = i; k < i + step; ++k) {
                        const Ints magnitude = Ints(blocks[half][k]) & 0x7fffffff;
                        Ints& most = first + k < whole ? transformed : plain;
                        most = larger(most, magnitude);
                    }
                    transformed = Ints(finished<T>(Floats(transformed), butterflies.factor));
                    top = larger(larger(wide < DEPTH ? Ints{} : top, plain), transformed);
                    float lanes[LANES];
                    std::memcpy(lanes, &top, sizeof lanes);
                    for (int64_t lane = 0, at = col + half; lane < LANES && at < cols; ++lane, at += 2)
                        out[at * grid_cols + (first + i) / wide] = lanes[lane];
                }
            }
        }
}

// out [cols, rows / wide]: the amaxes of tiles as round_columns has them, 16 tiles of a column at a time.
template <typename T>
void amax_columns(const T* x, float* out, int64_t rows, int64_t cols, int64_t wide) {
    const int64_t grid_cols = (rows + wide - 1) / wide;
#pragma omp parallel
    {
        std::vector<T> top(LANES * cols);
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < grid_cols; tile += LANES) {
            const int64_t count = std::min(LANES, grid_cols - tile);
            std::fill(top.begin(), top.end(), T(0));
            for (int64_t row = tile * wide; row < std::min(rows, (tile + count) * wide); ++row)
                largest(top.data() + (row / wide - tile) * cols, x + row * cols, cols);
            for (int64_t col = 0; col < cols; ++col)
                for (int64_t i = 0; i < count; ++i) out[col * grid_cols + tile + i] = widen(top[i * cols + col]);
        }
    }
}

// Scales of PowerOfTwo in mode RCEIL: their codes, and what elements are multiplied by.
void powers(const float* amax, uint8_t* codes, float* encode, int64_t count, float inverse_max) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        const int32_t bits = int32_t(as_bits(amax[i] * inverse_max));
        const int32_t exponent = bits >> 23, mantissa = bits & 0x7fffff;
        const int32_t up = (mantissa > (exponent == 0 ? 0x400000 : 0)) & (exponent < 254);
        const int32_t finite = exponent + up < 254 ? exponent + up : 254;
        const int32_t code = (bits & 0x7fffffff) > 0x7f800000 ? 255 : finite;
        const int32_t field = 254 - code;
        codes[i] = uint8_t(code);
        encode[i] = as_float(field > 0 ? uint32_t(field) << 23 : field < 0 ? 0x7fc00000u : 1u << 22);
    }
}

// Powers of two relative to the one with the code `centre`.
void relative_powers(const uint8_t* codes, float* factors, int64_t count, int32_t centre, int32_t tiny_exponent) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        const int32_t shifted = 127 + int32_t(codes[i]) - centre;
        const float factor = shifted + tiny_exponent < 1 ? 0.0f : as_float(uint32_t(shifted) << 23);
        factors[i] = codes[i] == 255 ? NAN : factor;
    }
}

// How scales come from amaxes (precision.scaling), where that needs nothing but the tensor's own amax.
enum Scaling : int32_t {
    GIVEN = 0,      // they are there already
    TENSOR = 1,     // Fp32, one for the tensor
    RCEIL = 2,      // PowerOfTwo in that mode
    TWO_LEVEL = 3,  // TwoLevel of the tensor
};

}  // namespace

extern "C" {

struct Rule {
    int32_t kind, pow2, nan_decodes;  // nan_decodes: a NaN's decode scale is NaN
    float eps, top, limit;            // of Fp32; top: what the tensor's amax is mapped to, in TwoLevel, too
    float inverse_max;                // 1 / max of the elements
    int32_t tiny_exponent;            // of the elements
    Format block;
};

// A matrix [rows, cols] in memory. dtype: 0 float32, 1 bf16. columns: it is read along its columns, as the transpose of
// what is quantized, after the butterflies; tiles are then 1 x wide.
struct Source {
    const void* x;
    int64_t rows, cols, tall, wide;
    int32_t dtype, columns;
    Butterflies butterflies;
};

}  // extern "C"

namespace {

// The rule once the tensor's amax is known.
struct Level {
    Rule rule;
    float scale = 1, decode = 1;  // of the tensor
    int32_t centre = 1;           // code of the largest power of two

    Level(const Rule& r, float amax) : rule(r) {
        if (r.kind == TENSOR) {
            const float a = amax < r.eps ? r.eps : amax;
            float s = r.top / a;
            s = std::fabs(s) == INFINITY ? r.limit : s;
            s = s < 0x1p-126f ? 0x1p-126f : s;
            s = a > 0 && a < INFINITY ? s : 1.0f;
            scale = r.pow2 ? as_float(as_bits(s) & 0x7f800000u) : s;
            decode = a != a && r.nan_decodes ? NAN : 1.0f / scale;
        } else if (r.kind == TWO_LEVEL) {
            const float s = std::min(r.top / amax, 3.40282346638528859812e+38f);
            scale = amax == 0 || s == 0 ? 1.0f : s;
            const bool exact = amax > 0 && amax < INFINITY && scale < 3.40282346638528859812e+38f;
            decode = exact ? amax / r.top : 1.0f / scale;
        } else if (r.kind == RCEIL) {
            uint8_t code;
            float encode;
            powers(&amax, &code, &encode, 1, r.inverse_max);
            centre = std::max<int32_t>(code, 1);
            decode = as_float(uint32_t(centre) << 23);
        }
    }

    // For the amaxes of n tiles: codes of their scales (null: not wanted), what elements are multiplied by before and
    // after rounding (null: not wanted of powers of two). All but the codes have room for, and are of, whole vectors.
    [[gnu::noinline]] void scales(const float* amax, int64_t n, uint8_t* codes, float* encode, float* factor) const {
        uint8_t stored[SEGMENT];
        for (int64_t start = 0; start < n; start += SEGMENT) {
            const int64_t wanted = std::min(SEGMENT, n - start), count = (wanted + LANES - 1) / LANES * LANES;
            if (rule.kind == TWO_LEVEL) {
                two_level(amax + start, stored, encode + start, factor + start, count);
            } else {
                powers(amax + start, stored, encode + start, count, rule.inverse_max);
                if (factor) relative_powers(stored, factor + start, count, centre, rule.tiny_exponent);
            }
            if (codes) std::memcpy(codes + start, stored, wanted);
        }
    }

    // TwoLevel, steps 2 and 3.
    void two_level(const float* amax, uint8_t* codes, float* encode, float* factor, int64_t count) const {
        const Grid grid(rule.block);
        const float c = scale * rule.inverse_max, inverse = 1.0f / scale, most = rule.block.max;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
            const float scaled = amax[i] * c;
            const float clamped = scaled > most ? most : scaled;  // a NaN stays one
            const int32_t code = code_of<false>(clamped, grid, 0.0f);
            const float value = value_of(code, grid), e = 1.0f / (value * inverse);
            codes[i] = uint8_t(code);
            factor[i] = value;
            encode[i] = e > 3.40282346638528859812e+38f ? 3.40282346638528859812e+38f : e;
        }
    }
};

// Scales and factors [grid rows, grid cols] where they are given; factors may be null.
struct Given {
    const float *scales, *factors;
};

// out [rows, cols] from x [rows, cols], and the codes of scales if `stored` is not null. `wide` is a multiple of 16, or
// the whole of a row.
template <typename T, bool STOCHASTIC, Kind KIND>
void round_rows(const T* x, const Given given, const Level* level, char* out, uint8_t* stored, const Source& s,
                const Rounder& rounder, const Hashes& hashes) {
    const int64_t rows = s.rows, cols = s.cols, tall = s.tall, wide = s.wide;
    const int64_t grid_cols = (cols + wide - 1) / wide, sixteens = (cols + LANES - 1) / LANES;
    const int64_t pitch = bytes_of(KIND, cols);
    const bool whole = level && level->rule.kind == TENSOR;
    const bool single = tall == 1, one = whole || (!level && tall >= rows);
    const int64_t height = single || one ? 16 : tall, bands = (rows + height - 1) / height;
#pragma omp parallel
    {
        std::vector<float> amax(height * grid_cols + LANES), encode(amax.size()), factor(amax.size(), 1.0f);
        std::vector<float> scales(height * sixteens + LANES), factors(scales.size(), 1.0f);
        std::vector<T> top(single || !level || whole ? 0 : cols);
        if (whole) std::fill(scales.begin(), scales.end(), level->scale);
#pragma omp for schedule(static)
        for (int64_t band = 0; band < bands; ++band) {
            const int64_t first = band * height, last = std::min(rows, first + height);
            const int64_t start = (one ? 0 : first / tall) * grid_cols, lines = single ? last - first : 1;
            const float *before = given.scales + start, *after = given.factors + start;
            if (level && !whole) {
                if (single && cols % wide == 0)  // no tile crosses the end of a row
                    amax_line(x + first * cols, amax.data(), lines * cols, wide);
                for (int64_t i = 0; single && cols % wide && i < lines; ++i)
                    amax_line(x + (first + i) * cols, amax.data() + i * grid_cols, cols, wide);
                if (!single) amax_band(x, cols, first, last, top.data(), amax.data(), wide);
                level->scales(amax.data(), lines * grid_cols, stored ? stored + start : nullptr, encode.data(),
                              KIND == VALUES || level->rule.kind == TWO_LEVEL ? factor.data() : nullptr);
                before = encode.data(), after = factor.data();
            }
            const bool multiplies = KIND == VALUES && (level ? !whole : given.factors != nullptr);
            for (int64_t i = 0; !whole && i < lines; ++i) {
                spread(before + i * grid_cols, cols, wide, scales.data() + i * sixteens);
                if (multiplies) spread(after + i * grid_cols, cols, wide, factors.data() + i * sixteens);
            }
            for (int64_t row = first; row < last; ++row) {
                const int64_t line = single && !whole ? (row - first) * sixteens : 0;
                if (level && !whole && row + height < rows) {  // what the next amaxes are of
                    const char* next = reinterpret_cast<const char*>(x + (row + height) * cols);
                    for (size_t i = 0; i < cols * sizeof(T); i += 64) __builtin_prefetch(next + i, 0, 2);
                }
                round_line<T, STOCHASTIC, KIND>(x + row * cols, scales.data() + line, factors.data() + line,
                                                out + row * pitch, cols, rounder, STOCHASTIC ? hashes.rows[row] : 0,
                                                hashes);
            }
        }
    }
}

// out [cols, rows], the transpose of x [rows, cols]; tiles are `wide` elements of a column of x. `wide` divides DEPTH or
// is a multiple of it, and divides it where a level is given.
template <typename T, bool STOCHASTIC, Kind KIND>
void round_columns(const T* x, const Given given, const Level* level, char* out, uint8_t* stored, const Source& s,
                   const Rounder& rounder, const Hashes& hashes) {
    constexpr int64_t IN_A_WORD = KIND == VALUES ? 2 : KIND == BYTES ? 4 : 8, BITS = 32 / IN_A_WORD;
    const int64_t rows = s.rows, cols = s.cols, wide = s.wide;
    const int64_t grid_cols = (rows + wide - 1) / wide, pitch = bytes_of(KIND, rows), step = std::min(wide, DEPTH);
    const Butterflies butterflies = s.butterflies;
    const int64_t depth = std::max<int64_t>(step, butterflies.size);  // powers of two
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < rows; first += DEPTH)
        for (int64_t col = 0; col < cols; col += PAIR) {
            const int64_t height = std::min(DEPTH, rows - first);
            for (int64_t next = col + PAIR; next < std::min(cols, col + 2 * PAIR); ++next)  // what is written next
                for (int64_t i = 0; i < bytes_of(KIND, height); i += 64)
                    __builtin_prefetch(out + next * pitch + bytes_of(KIND, first) + i, 1, 2);
            const Rounder local = rounder;  // else every store might change it
            const uint32_t key = hashes.key;
            const uint32_t *hash_rows = hashes.rows.data() + first, *hash_cols = hashes.cols.data() + col;
            // Lanes of half 0 are the columns col, col + 2, ..., those of half 1 the ones between.
            const int64_t lanes[] = {std::min(LANES, (cols - col + 1) / 2), std::min(LANES, (cols - col) / 2)};
            Words words[2][DEPTH];
            Floats blocks[2][DEPTH];
            for (int64_t row = 0; row < height; row += step) {
                alignas(64) float scales[PAIR], factors[PAIR];
                const int64_t tile = (first + row) / wide, end = std::min(step, height - row);
                if (row % depth == 0) load_block<true>(x, rows, cols, first + row, depth, col, butterflies, blocks);
                const Floats* in[] = {blocks[0] + row % depth, blocks[1] + row % depth};
                if (level) {
                    alignas(64) float amax[PAIR];
                    uint8_t codes[PAIR];
                    for (int half = 0; half < 2; ++half) {
                        Ints top = {};
                        for (int64_t k = 0; k < step; ++k) top = larger(top, Ints(in[half][k]) & 0x7fffffff);
                        std::memcpy(amax + half * LANES, &top, sizeof top);
                    }
                    level->scales(amax, PAIR, codes, scales, factors);
                    for (int64_t i = 0; stored && i < std::min(PAIR, cols - col); ++i)
                        stored[(col + i) * grid_cols + tile] = codes[i / 2 + i % 2 * LANES];
                } else {
                    std::fill(scales, scales + PAIR, 0.0f);
                    std::fill(factors, factors + PAIR, 1.0f);
                    for (int64_t i = 0; i < std::min(PAIR, cols - col); ++i) {
                        const int64_t place = (col + i) * grid_cols + tile, at = i / 2 + i % 2 * LANES;
                        scales[at] = given.scales[place];
                        if (given.factors) factors[at] = given.factors[place];
                    }
                }
                for (int half = 0; half < 2; ++half) {
                    const Floats scale = load(scales + half * LANES), factor = load(factors + half * LANES);
                    const Floats* block = in[half];
                    Words* to = words[half] + row;
                    Ints seen = {};
                    for (int64_t k = 0; k < end; ++k) {
                        const Words noise =
                            STOCHASTIC ? Hashes::of(hash_rows[row + k], hash_cols + half * LANES, key) : Words{};
                        const Floats y = block[k] * scale;
                        const Words made = rounded<STOCHASTIC, KIND != VALUES>(y, local, noise, factor, seen);
                        to[k] = KIND == VALUES ? made : finished_code(made, y, local);
                    }
                    if (has_nan(seen))
                        for (int64_t k = 0; k < end; ++k) {
                            const Floats y = block[k] * scale;
                            const Words nan = KIND == VALUES ? Words(as_float(uint32_t(local.nan_value)) * factor)
                                                             : Words{} + uint32_t(local.nan_code);
                            to[k] = y != y ? nan : to[k];
                        }
                }
            }
            for (int half = 0; half < 2; ++half) {
                for (int64_t k = height; k < DEPTH; ++k) words[half][k] = Words{};
                for (int64_t i = 0; i < height; i += LANES * IN_A_WORD) {
                    Words packed[LANES];
                    for (int64_t k = 0; k < LANES; ++k) {
                        const Words* from = words[half] + i + k * IN_A_WORD;
                        Words word = KIND == VALUES ? from[0] >> 16 : from[0];
                        for (int64_t n = 1; n < IN_A_WORD; ++n)
                            word |= KIND == VALUES ? from[n] & 0xffff0000u : from[n] << (n * BITS);
                        packed[k] = word;
                    }
                    transpose_words(packed);
                    const int64_t count = bytes_of(KIND, std::min(LANES * IN_A_WORD, height - i));
                    char* place = out + (col + half) * pitch + bytes_of(KIND, first + i);
                    for (int64_t lane = 0; lane < lanes[half]; ++lane, place += 2 * pitch) {
                        if (count == 64)
                            std::memcpy(place, packed + lane, 64);
                        else
                            std::memcpy(place, packed + lane, count);
                    }
                }
            }
        }
}

struct Rounding {
    Given given;
    const Level* level;
    void* out;
    uint8_t* stored;
    const Format* format;
    const Noise* noise;
};

template <typename T, bool STOCHASTIC, Kind KIND>
void round_kind(const Source& s, const Rounding& r) {
    const Rounder rounder(*r.format);
    const Hashes hashes(*r.noise, s.rows, s.cols, s.columns);
    auto* round = s.columns ? round_columns<T, STOCHASTIC, KIND> : round_rows<T, STOCHASTIC, KIND>;
    round(static_cast<const T*>(s.x), r.given, r.level, static_cast<char*>(r.out), r.stored, s, rounder, hashes);
}

template <typename T, bool STOCHASTIC>
void round_as(const Source& s, const Rounding& r, bool values) {
    if (values)
        round_kind<T, STOCHASTIC, VALUES>(s, r);
    else if (r.format->bits == 4)
        round_kind<T, STOCHASTIC, NIBBLES>(s, r);
    else
        round_kind<T, STOCHASTIC, BYTES>(s, r);
}

void round_any(const Source& s, const Rounding& r, bool values) {
    if (s.dtype)
        r.noise->on ? round_as<bf16, true>(s, r, values) : round_as<bf16, false>(s, r, values);
    else
        r.noise->on ? round_as<float, true>(s, r, values) : round_as<float, false>(s, r, values);
}

template <typename T>
float measured(const Source& s) {
    const T* x = static_cast<const T*>(s.x);
    if (s.butterflies.size)
        return amax_of_butterflies(x, s.rows, s.cols, s.butterflies.signs, s.butterflies.factor);
    return amax_of(x, s.rows * s.cols);
}

}  // namespace

extern "C" {

// dtype: 0 float32, 1 bf16. tall, wide: extents of a tile, at least 1.
void tile_amax(const void* x, float* out, int64_t rows, int64_t cols, int64_t tall, int64_t wide, int32_t dtype) {
    if (dtype)
        amax_tiles(static_cast<const bf16*>(x), out, rows, cols, tall, wide);
    else
        amax_tiles(static_cast<const float*>(x), out, rows, cols, tall, wide);
}

void source_amax(const Source* s, float* out) {
    const bf16* narrow = static_cast<const bf16*>(s->x);
    const float* wide = static_cast<const float*>(s->x);
    if (!s->columns)
        tile_amax(s->x, out, s->rows, s->cols, s->tall, s->wide, s->dtype);
    else if (s->butterflies.size && s->dtype)
        amax_butterflies(narrow, out, s->rows, s->cols, s->wide, s->butterflies);
    else if (s->butterflies.size)
        amax_butterflies(wide, out, s->rows, s->cols, s->wide, s->butterflies);
    else if (s->dtype)
        amax_columns(narrow, out, s->rows, s->cols, s->wide);
    else
        amax_columns(wide, out, s->rows, s->cols, s->wide);
}

// The codes of round(x * scale), or with `values` BF16 round(x * scale) * factor (null: 1), which must be exact there.
void round_source(const Source* s, const float* scales, const float* factors, void* out, const Format* format,
                  const Noise* noise, int32_t values) {
    round_any(*s, {{scales, factors}, nullptr, out, nullptr, format, noise}, values);
}

// The same with scales by a rule, all of them written to `stored` (null: not wanted); butterflies are of size 16, tiles
// in columns divide 128. tensor_amax: null for that of x. factor: what is left to the tensor. Returns 1, with nothing
// done, where a tensor's amax is not finite.
int32_t quantize_source(const Source* s, const Rule* rule, const float* tensor_amax, void* out, uint8_t* stored,
                        float* factor, const Format* format, const Noise* noise, int32_t values) {
    float amax = tensor_amax ? *tensor_amax : 0;
    if (s->butterflies.size || (!tensor_amax && (rule->kind != RCEIL || values))) {
        const float now = s->dtype ? measured<bf16>(*s) : measured<float>(*s);
        if (!(now < INFINITY)) return 1;
        amax = tensor_amax ? amax : now;
    }
    if (rule->kind == TWO_LEVEL && !(amax < INFINITY)) return 1;
    const Level level(*rule, amax);
    *factor = level.decode;
    round_any(*s, {{nullptr, nullptr}, &level, out, stored, format, noise}, values);
    return 0;
}

void encode(const void* x, const float* scales, uint8_t* codes, int64_t rows, int64_t cols, int64_t tall, int64_t wide,
            const Format* format, const Noise* noise, int32_t dtype) {
    if (dtype)
        encode_any(static_cast<const bf16*>(x), scales, codes, rows, cols, tall, wide, *format, *noise);
    else
        encode_any(static_cast<const float*>(x), scales, codes, rows, cols, tall, wide, *format, *noise);
}

// out = code value * factor of its tile, one rounding to bf16 or float32.
void values(const uint8_t* codes, const float* factors, void* out, int64_t rows, int64_t cols, int64_t tall,
            int64_t wide, const Format* format, int32_t dtype) {
    if (dtype)
        values_rows(codes, factors, static_cast<bf16*>(out), rows, cols, tall, wide, *format);
    else
        values_rows(codes, factors, static_cast<float*>(out), rows, cols, tall, wide, *format);
}

void transpose(const void* x, void* out, int64_t rows, int64_t cols, int32_t bytes) {
    if (bytes == 1)
        transpose_blocks(static_cast<const uint8_t*>(x), static_cast<uint8_t*>(out), rows, cols);
    else if (bytes == 2)
        transpose_blocks(static_cast<const uint16_t*>(x), static_cast<uint16_t*>(out), rows, cols);
    else
        transpose_blocks(static_cast<const uint32_t*>(x), static_cast<uint32_t*>(out), rows, cols);
}

// columns: x is [cols, rows], the transpose of what is transformed. out is [rows, cols].
void hadamard(const void* x, void* out, int64_t rows, int64_t cols, const float* signs, int64_t size, float factor,
              int32_t dtype, int32_t columns) {
    if (dtype && columns)
        hadamard_columns(static_cast<const bf16*>(x), static_cast<bf16*>(out), cols, rows, signs, size, factor);
    else if (columns)
        hadamard_columns(static_cast<const float*>(x), static_cast<float*>(out), cols, rows, signs, size, factor);
    else if (dtype)
        hadamard_rows(static_cast<const bf16*>(x), static_cast<bf16*>(out), rows, cols, signs, size, factor);
    else
        hadamard_rows(static_cast<const float*>(x), static_cast<float*>(out), rows, cols, signs, size, factor);
}

// precision.quantize.operand for powers of two: the factor of each tile relative to the largest, 0 where its smallest
// value would not be a BF16 normal; returns the code of the largest, at least 1.
int32_t centred_factors(const uint8_t* codes, float* factors, int64_t count, int32_t tiny_exponent) {
    int32_t centre = 1;
#pragma omp parallel for simd reduction(max : centre) schedule(static)
    for (int64_t i = 0; i < count; ++i) centre = std::max(centre, codes[i] == 255 ? 0 : int32_t(codes[i]));
    relative_powers(codes, factors, count, centre, tiny_exponent);
    return centre;
}

}  // extern "C"

// ---- AdamW over codecs (precision/codecs.py): decode, update in float32, encode, in one pass over a row ----

extern "C" {

enum Kind : int32_t { FP32 = 0, BF16 = 1, KAHAN = 2, SCALED = 3, DYNAMIC = 4, EXPANDED = 5 };

// A codec. block 0: one scale for the tensor. values, middles: [256], or [256][128] of EXPANDED; limits: [256].
struct Codec {
    int32_t kind, block, stochastic;
    float floor;
    Format format;
    const float *values, *middles, *limits;
};

// What one codec keeps of one tensor [rows, cols]: plain values or codes; scales; residual or powers.
struct Kept {
    void* codes;
    float* scales;
    void* extra;
    uint32_t key0, key1;
    float amax;  // of the new values on all ranks, where one scale serves the tensor
};

// One parameter. weight: what is written beside a master that is kept elsewhere, or null.
struct Update {
    int64_t rows, cols;
    uint64_t row_offset;
    const void* grad;
    void* weight;
    int32_t grad_bf16, weight_bf16, decays, torch_root;
    float decay, lerp, beta2, square, correction, eps, step;
    Codec m, v, w;
    Kept m_kept, v_kept, w_kept;
};

}  // extern "C"

namespace {

// Square roots of a row; null for IEEE's. MKL's, which torch calls, are not all rounded correctly.
using Root = void (*)(int32_t count, const float* x, float* out, int64_t mode);
constexpr int64_t ROOT_MODE = 0x140102;  // high accuracy, subnormals kept, errors ignored: what torch asks of MKL

// Scratch of one thread for rows of up to `cols` elements.
struct Row {
    std::vector<float> grad, m, v, w, uniform;  // `uniform` also holds square roots
    std::vector<int32_t> code;

    explicit Row(int64_t cols) : grad(cols), m(cols), v(cols), w(cols), uniform(cols), code(cols) {}
};

inline float decode_scale(const Codec& codec, float amax) {
    const float a = amax < codec.floor ? codec.floor : amax;
    return a / codec.format.max;
}

// The values of a row: in x, or where they lie already, if they do.
float* decode_row(const Codec& codec, const Kept& kept, float tensor_scale, int64_t row, int64_t cols, float* x,
                  int32_t* code) {
    const int64_t start = row * cols;
    if (codec.kind == FP32) return static_cast<float*>(kept.codes) + start;
    if (codec.kind == BF16 || codec.kind == KAHAN) {
        const bf16* source = static_cast<const bf16*>(kept.codes) + start;
        for (int64_t i = 0; i < cols; ++i) x[i] = widen(source[i]);
        if (codec.kind == KAHAN) {
            const bf16* rest = static_cast<const bf16*>(kept.extra) + start;
            for (int64_t i = 0; i < cols; ++i) x[i] += widen(rest[i]);
        }
        return x;
    }
    const uint8_t* bytes = static_cast<const uint8_t*>(kept.codes) + start;
    const int64_t block = codec.block > 0 ? codec.block : cols, blocks = (cols + block - 1) / block;
    const float* scales = kept.scales + row * blocks;
    if (codec.kind == SCALED) {
        const Grid grid(codec.format);
        if (codec.format.bits > 8) {
            const uint16_t* source = static_cast<const uint16_t*>(kept.codes) + start;
#pragma omp simd
            for (int64_t i = 0; i < cols; ++i) code[i] = source[i];
        } else {
#pragma omp simd
            for (int64_t i = 0; i < cols; ++i) code[i] = bytes[i];
        }
        for (int64_t b = 0; b < blocks; ++b) {
            const float scale = codec.block > 0 ? scales[b] : tensor_scale;
            const int64_t end = std::min(cols, (b + 1) * block);
#pragma omp simd
            for (int64_t i = b * block; i < end; ++i) x[i] = value_of(code[i], grid) * scale;
        }
        return x;
    }
    for (int64_t b = 0; b < blocks; ++b) {
        const float scale = scales[b];
        const int64_t end = std::min(cols, (b + 1) * block);
        if (codec.kind == DYNAMIC) {
            const float* values = codec.values;
#pragma omp simd
            for (int64_t i = b * block; i < end; ++i) x[i] = values[bytes[i]] * scale;
        } else {
            const float* values = codec.values + 128 * int64_t(static_cast<uint8_t*>(kept.extra)[row * blocks + b]);
#pragma omp simd
            for (int64_t i = b * block; i < end; ++i) {
                const int32_t stored = bytes[i];
                const float share = as_float(as_bits(values[stored & 127]) ^ (uint32_t(stored >> 7) << 31));
                x[i] = share * scale;
            }
        }
    }
    return x;
}

inline uint32_t amax_bits(const float* x, int64_t start, int64_t end) {
    uint32_t top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = start; i < end; ++i) top = std::max(top, as_bits(x[i]) & 0x7fffffffu);
    return top;
}

// place[i] = how many of SIZE - 1 ascending middles are below y[i]; SIZE a power of two. A search step for all elements
// at a time: nothing is guessed wrong, and lookups of different elements overlap.
template <int32_t SIZE>
void places_of(const float* y, int32_t* place, int64_t count, const float* middles) {
    for (int64_t i = 0; i < count; ++i) place[i] = 0;
    for (int32_t step = SIZE / 2; step > 0; step /= 2) {
        const float* from = middles + step - 1;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) place[i] += from[place[i]] < y[i] ? step : 0;
    }
}

// The share of its block's amax; 0 in a block of zeros, and where it is NaN.
inline float share_of(float x, float top) {
    const float y = x / top;
    return top > 0.0f && y == y ? y : 0.0f;
}

void write_bytes(const int32_t* code, uint8_t* target, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) target[i] = uint8_t(code[i]);
}

void encode_row(const Codec& codec, const Kept& kept, uint64_t row_offset, int64_t row, int64_t cols, const float* x,
                float* uniform, int32_t* code) {
    const int64_t start = row * cols;
    if (codec.stochastic) {
        const Noise noise{1, 0, kept.key0, kept.key1, row_offset};
        const uint32_t hash = row_hash(noise, uint64_t(row));
#pragma omp simd
        for (int64_t i = 0; i < cols; ++i) {
            const uint32_t element = fmix32((hash + uint32_t(i) * 0x9E3779B9u) ^ kept.key1);
            uniform[i] = float(int32_t(element >> 8)) * 0x1p-24f;
        }
    }
    if (codec.kind == FP32) return;  // x is where it is kept
    if (codec.kind == BF16 || codec.kind == KAHAN) {
        bf16* target = static_cast<bf16*>(kept.codes) + start;
        if (codec.stochastic) {
#pragma omp simd
            for (int64_t i = 0; i < cols; ++i) {  // saturates, but an infinity stays one
                const uint32_t bits = as_bits(x[i]), magnitude = bits & 0x7fffffffu;
                const uint32_t a = magnitude < 0x7f7f0000u ? magnitude : 0x7f7f0000u;
                const uint32_t up = uniform[i] < float(int32_t(a & 0xffff)) * 0x1p-16f ? 1 : 0;
                const uint32_t finite = ((a >> 16) + up) | (bits >> 31 << 15);
                const uint32_t special = magnitude > 0x7f800000u ? 0x7fc0u : bits >> 16;
                code[i] = int32_t(magnitude >= 0x7f800000u ? special : finite);
            }
#pragma omp simd
            for (int64_t i = 0; i < cols; ++i) target[i] = bf16(code[i]);
            return;
        }
        for (int64_t i = 0; i < cols; ++i) narrow(x[i], target + i);
        if (codec.kind == KAHAN) {
            bf16* rest = static_cast<bf16*>(kept.extra) + start;
            for (int64_t i = 0; i < cols; ++i) {
                const float high = widen(target[i]);
                const bool finite = (as_bits(high) & 0x7fffffffu) < 0x7f800000u;
                narrow(finite ? x[i] - high : 0.0f, rest + i);
            }
        }
        return;
    }
    uint8_t* bytes = static_cast<uint8_t*>(kept.codes) + start;
    const int64_t block = codec.block > 0 ? codec.block : cols, blocks = (cols + block - 1) / block;
    float* scales = kept.scales + row * blocks;
    if (codec.kind == SCALED) {
        const Grid grid(codec.format);
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t first = b * block, end = std::min(cols, first + block);
            const float top = codec.block > 0 ? as_float(amax_bits(x, first, end)) : kept.amax;
            const float scale = decode_scale(codec, top), inverse = 1.0f / scale;
            if (codec.block > 0) scales[b] = top == INFINITY ? NAN : scale;
            if (codec.stochastic) {
#pragma omp simd
                for (int64_t i = first; i < end; ++i) code[i] = code_of<true>(x[i] * inverse, grid, uniform[i]);
            } else {
#pragma omp simd
                for (int64_t i = first; i < end; ++i) code[i] = code_of<false>(x[i] * inverse, grid, 0.0f);
            }
        }
        if (codec.format.bits <= 8) return write_bytes(code, bytes, cols);
        uint16_t* target = static_cast<uint16_t*>(kept.codes) + start;
#pragma omp simd
        for (int64_t i = 0; i < cols; ++i) target[i] = uint16_t(code[i]);
        return;
    }
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = b * block, end = std::min(cols, first + block);
        const float top = as_float(amax_bits(x, first, end));
        scales[b] = top;
        if (codec.kind == DYNAMIC) {
#pragma omp simd
            for (int64_t i = first; i < end; ++i) uniform[i] = share_of(x[i], top);
            places_of<256>(uniform + first, code + first, end - first, codec.middles);
            continue;
        }
        float least = INFINITY;
#pragma omp simd reduction(min : least)
        for (int64_t i = first; i < end; ++i) {
            const float magnitude = std::fabs(x[i]);
            const float above = magnitude == 0.0f ? INFINITY : magnitude;
            least = above < least ? above : least;
        }
        const float ratio = top > 0.0f ? top / least : 1.0f;
        int32_t power = 255 - int32_t(std::lower_bound(codec.limits, codec.limits + 256, ratio) - codec.limits);
        power = ratio != ratio || power < 0 ? 0 : power;
        static_cast<uint8_t*>(kept.extra)[row * blocks + b] = uint8_t(power);
#pragma omp simd
        for (int64_t i = first; i < end; ++i) uniform[i] = std::fabs(share_of(x[i], top));
        places_of<128>(uniform + first, code + first, end - first, codec.middles + 128 * power);
#pragma omp simd
        for (int64_t i = first; i < end; ++i)
            code[i] = (code[i] < 126 ? code[i] : 126) | (share_of(x[i], top) < 0.0f ? 128 : 0);
    }
    write_bytes(code, bytes, cols);
}

// The new moments and weights of a row, in float32; operation by operation as torch's AdamW (foreach=False) does them.
// Where they are kept as they are, in their own place; with `dry` never. With `dry`, weights are left out if !weights.
struct Values {
    float *m, *v, *w;
};

inline float* copied(const float* x, float* to, int64_t cols) {
    if (x != to) std::memcpy(to, x, cols * 4);
    return to;
}

Values update_row(const Update& u, const float scales[3], int64_t row, Row& r, Root root, bool dry, bool weights) {
    const int64_t cols = u.cols;
    const float* g = static_cast<const float*>(u.grad) + row * cols;
    if (u.grad_bf16) {
        const bf16* source = static_cast<const bf16*>(u.grad) + row * cols;
        for (int64_t i = 0; i < cols; ++i) r.grad[i] = widen(source[i]);
        g = r.grad.data();
    }
    float *m = decode_row(u.m, u.m_kept, scales[0], row, cols, r.m.data(), r.code.data());
    float *v = decode_row(u.v, u.v_kept, scales[1], row, cols, r.v.data(), r.code.data()), *w = r.w.data();
    if (dry) m = copied(m, r.m.data(), cols), v = copied(v, r.v.data(), cols);
    const float beta2 = u.beta2, square = u.square;
    if (std::fabs(u.lerp) < 0.5f) {
        const float weight = u.lerp;
#pragma omp simd
        for (int64_t i = 0; i < cols; ++i) m[i] = std::fma(weight, g[i] - m[i], m[i]);
    } else {
        const float weight = u.lerp - 1.0f;
#pragma omp simd
        for (int64_t i = 0; i < cols; ++i) m[i] = std::fma(weight, g[i] - m[i], g[i]);
    }
#pragma omp simd
    for (int64_t i = 0; i < cols; ++i) v[i] = std::fma(square * g[i], g[i], v[i] * beta2);
    if (!weights) return {m, v, w};
    w = decode_row(u.w, u.w_kept, scales[2], row, cols, w, r.code.data());
    if (dry) w = copied(w, r.w.data(), cols);
    const float decay = u.decays ? u.decay : 1.0f, correction = u.correction, eps = u.eps, step = u.step;
    if (root != nullptr && u.torch_root) {
        float* roots = r.uniform.data();
        root(int32_t(cols), v, roots, ROOT_MODE);
#pragma omp simd
        for (int64_t i = 0; i < cols; ++i) w[i] = w[i] * decay + step * m[i] / (roots[i] / correction + eps);
    } else {
#pragma omp simd
        for (int64_t i = 0; i < cols; ++i) w[i] = w[i] * decay + step * m[i] / (std::sqrt(v[i]) / correction + eps);
    }
    return {m, v, w};
}

inline void read_scales(const Update& u, float scales[3]) {
    const Kept* kept[3] = {&u.m_kept, &u.v_kept, &u.w_kept};
    const Codec* codecs[3] = {&u.m, &u.v, &u.w};
    for (int i = 0; i < 3; ++i) scales[i] = codecs[i]->kind == SCALED && codecs[i]->block == 0 ? *kept[i]->scales : 0.0f;
}

int64_t widest(const Update* updates, int64_t count) {
    int64_t cols = 1;
    for (int64_t k = 0; k < count; ++k) cols = std::max(cols, updates[k].cols);
    return cols;
}

}  // namespace

extern "C" {

// amaxes[k][3]: of the new m, v and weights of update k, where one scale serves the tensor. Writes nothing else: the
// second pass computes the same values again, which costs less than keeping them.
void adam_amaxes(const Update* updates, int64_t count, float* amaxes, Root root) {
    uint32_t* target = reinterpret_cast<uint32_t*>(amaxes);
    std::memset(target, 0, count * 12);
    const int64_t cols = widest(updates, count);
#pragma omp parallel
    {
        Row row(cols);
        for (int64_t k = 0; k < count; ++k) {
            const Update& u = updates[k];
            const bool whole[3] = {u.m.kind == SCALED && !u.m.block, u.v.kind == SCALED && !u.v.block,
                                   u.w.kind == SCALED && !u.w.block};
            if (!whole[0] && !whole[1] && !whole[2]) continue;
            float scales[3];
            read_scales(u, scales);
            uint32_t top[3] = {0, 0, 0};
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < u.rows; ++i) {
                const Values x = update_row(u, scales, i, row, root, true, whole[2]);
                const float* values[3] = {x.m, x.v, x.w};
                for (int j = 0; j < 3; ++j)
                    if (whole[j]) top[j] = std::max(top[j], amax_bits(values[j], 0, u.cols));
            }
#pragma omp critical
            for (int j = 0; j < 3; ++j) target[3 * k + j] = std::max(target[3 * k + j], top[j]);
        }
    }
}

void adam_update(const Update* updates, int64_t count, Root root) {
    const int64_t cols = widest(updates, count);
    std::vector<float> before(3 * count);  // the scales that are about to be overwritten
    for (int64_t k = 0; k < count; ++k) read_scales(updates[k], before.data() + 3 * k);
#pragma omp parallel
    {
        Row row(cols);
        for (int64_t k = 0; k < count; ++k) {
            const Update& u = updates[k];
            const float* scales = before.data() + 3 * k;
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < u.rows; ++i) {
                const Values x = update_row(u, scales, i, row, root, false, true);
                encode_row(u.m, u.m_kept, u.row_offset, i, u.cols, x.m, row.uniform.data(), row.code.data());
                encode_row(u.v, u.v_kept, u.row_offset, i, u.cols, x.v, row.uniform.data(), row.code.data());
                encode_row(u.w, u.w_kept, u.row_offset, i, u.cols, x.w, row.uniform.data(), row.code.data());
                if (u.weight == nullptr) continue;
                const float top = u.w_kept.amax == INFINITY ? NAN : decode_scale(u.w, u.w_kept.amax);
                const float* w = decode_row(u.w, u.w_kept, top, i, u.cols, row.w.data(), row.code.data());
                if (u.weight_bf16) {
                    bf16* target = static_cast<bf16*>(u.weight) + i * u.cols;
                    for (int64_t j = 0; j < u.cols; ++j) narrow(w[j], target + j);
                } else {
                    std::memcpy(static_cast<float*>(u.weight) + i * u.cols, w, u.cols * 4);
                }
            }
        }
    }
    for (int64_t k = 0; k < count; ++k) {
        const Update& u = updates[k];
        const Kept* kept[3] = {&u.m_kept, &u.v_kept, &u.w_kept};
        const Codec* codecs[3] = {&u.m, &u.v, &u.w};
        for (int i = 0; i < 3; ++i)
            if (codecs[i]->kind == SCALED && codecs[i]->block == 0)
                *kept[i]->scales = kept[i]->amax == INFINITY ? NAN : decode_scale(*codecs[i], kept[i]->amax);
    }
}

}  // extern "C"
