// Quantization on CPUs: the same codes and scales as precision/quantize.py, bit for bit, in a few passes over memory.
//
// Plain C symbols, called through ctypes; every shape is checked by the caller. Matrices are [rows, cols], contiguous,
// with the contraction last. Compiled without contraction of a * b + c: every float operation rounds once.
//
// No result depends on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

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

// The code of x * scale. `uniform` is read only if STOCHASTIC.
template <bool STOCHASTIC>
inline uint8_t code_of(float y, const Format& f, float uniform) {
    const int m = f.mantissa_bits;
    const uint32_t sign = as_bits(y) >> 31;
    const float magnitude = std::fabs(y);
    const bool nan = magnitude != magnitude;
    const float a = magnitude < f.max ? magnitude : f.max;
    int32_t e = int32_t(as_bits(a) >> 23);
    e = std::max(f.min_exponent + 127, std::min(e, std::max(f.min_exponent, f.max_exponent) + 127));
    float r;
    if (STOCHASTIC) {
        const float scaled = a * as_float(uint32_t(254 + m - e) << 23);
        const float floor = std::floor(scaled);
        const float q = floor + (uniform < scaled - floor ? 1.0f : 0.0f);
        r = q * as_float(uint32_t(e - m) << 23);
    } else {
        const float c = as_float(uint32_t(e + 23 - m) << 23);
        r = (a + c) - c;
    }
    const int bias = 1 - f.min_exponent;
    const int32_t normal = int32_t(as_bits(r) >> (23 - m)) - ((127 - bias) << m);
    const int32_t small = int32_t(std::min(r * as_float(uint32_t(127 + m - f.min_exponent) << 23), float(1 << m)));
    int32_t code = r < as_float(uint32_t(127 + f.min_exponent) << 23) ? small : normal;
    code |= int32_t(sign << (f.bits - 1));
    const int32_t max_code = int32_t(as_bits(f.max) >> (23 - m)) - ((127 - bias) << m);
    return uint8_t(nan ? (f.nan_code >= 0 ? f.nan_code : max_code) : code);
}

inline float value_of(uint8_t stored, const Format& f, int32_t max_code) {
    const int m = f.mantissa_bits, bias = 1 - f.min_exponent;
    const int32_t magnitude = stored & ((1 << (f.bits - 1)) - 1);
    const float normal = as_float(uint32_t(magnitude + ((127 - bias) << m)) << (23 - m));
    const float small = float(magnitude) * as_float(uint32_t(127 + f.min_exponent - m) << 23);
    float value = magnitude < (1 << m) ? small : normal;
    if (f.nan_code >= 0) value = magnitude > max_code + f.has_inf ? NAN : value;
    if (f.has_inf) value = magnitude == max_code + 1 ? INFINITY : value;
    return (stored >> (f.bits - 1)) & 1 ? -value : value;
}

// The amax of each tile, as bits of |x| compared as integers: a NaN is larger than everything.
template <typename T>
void amax_tiles(const T* x, float* out, int64_t rows, int64_t cols, int64_t tall, int64_t wide) {
    const int64_t grid_rows = (rows + tall - 1) / tall, grid_cols = (cols + wide - 1) / wide;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < grid_rows; ++i) {
        uint32_t* target = reinterpret_cast<uint32_t*>(out) + i * grid_cols;
        std::memset(target, 0, grid_cols * 4);
        for (int64_t row = i * tall; row < std::min(rows, (i + 1) * tall); ++row) {
            const T* line = x + row * cols;
            for (int64_t j = 0; j < grid_cols; ++j) {
                const int64_t end = std::min(cols, (j + 1) * wide);
                uint32_t top = 0;
#pragma omp simd reduction(max : top)
                for (int64_t k = j * wide; k < end; ++k) top = std::max(top, as_bits(widen(line[k])) & 0x7fffffffu);
                target[j] = std::max(target[j], top);
            }
        }
    }
}

template <typename T, bool STOCHASTIC>
void encode_rows(const T* x, const float* scales, uint8_t* codes, int64_t rows, int64_t cols, int64_t tall,
                 int64_t wide, Format format, const Noise& noise) {
    const int64_t grid_cols = (cols + wide - 1) / wide;
    const int64_t bytes = format.bits == 4 ? (cols + 1) / 2 : cols;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        alignas(64) uint8_t buffer[SEGMENT];
        alignas(64) float y[SEGMENT], uniform[SEGMENT];
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
            uint8_t* target = format.bits == 4 ? buffer : codes + row * bytes + start;
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) target[i] = code_of<STOCHASTIC>(y[i], format, uniform[i]);
            if (format.bits == 4) {
                if (count % 2) buffer[count] = 0;
                uint8_t* packed = codes + row * bytes + start / 2;
                for (int64_t i = 0; i < (count + 1) / 2; ++i)
                    packed[i] = uint8_t((buffer[2 * i] & 0xf) | (buffer[2 * i + 1] << 4));
            }
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
                 int64_t wide, Format format) {
    const int64_t grid_cols = (cols + wide - 1) / wide;
    const int64_t bytes = format.bits == 4 ? (cols + 1) / 2 : cols;
    const int32_t max_code =
        int32_t(as_bits(format.max) >> (23 - format.mantissa_bits)) - ((126 + format.min_exponent) << format.mantissa_bits);
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        alignas(64) uint8_t buffer[SEGMENT];
        const float* row_factors = factors + row / tall * grid_cols;
        for (int64_t start = 0; start < cols; start += SEGMENT) {
            const int64_t count = std::min(SEGMENT, cols - start);
            const uint8_t* source = codes + row * bytes + start;
            if (format.bits == 4) {
                const uint8_t* packed = codes + row * bytes + start / 2;
                for (int64_t i = 0; i < (count + 1) / 2; ++i) {
                    buffer[2 * i] = packed[i] & 0xf;
                    if (2 * i + 1 < SEGMENT) buffer[2 * i + 1] = packed[i] >> 4;
                }
                source = buffer;
            }
            T* target = out + row * cols + start;
            for (int64_t k = 0; k < count;) {
                const int64_t tile = (start + k) / wide;
                const int64_t end = std::min(count, (tile + 1) * wide - start);
                const float factor = row_factors[tile];
#pragma omp simd
                for (int64_t i = k; i < end; ++i) narrow(value_of(source[i], format, max_code) * factor, target + i);
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

}  // namespace

extern "C" {

// dtype: 0 float32, 1 bf16. tall, wide: extents of a tile, at least 1.
void tile_amax(const void* x, float* out, int64_t rows, int64_t cols, int64_t tall, int64_t wide, int32_t dtype) {
    if (dtype)
        amax_tiles(static_cast<const bf16*>(x), out, rows, cols, tall, wide);
    else
        amax_tiles(static_cast<const float*>(x), out, rows, cols, tall, wide);
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

void hadamard(const void* x, void* out, int64_t rows, int64_t cols, const float* signs, int64_t size, float factor,
              int32_t dtype) {
    if (dtype)
        hadamard_rows(static_cast<const bf16*>(x), static_cast<bf16*>(out), rows, cols, signs, size, factor);
    else
        hadamard_rows(static_cast<const float*>(x), static_cast<float*>(out), rows, cols, signs, size, factor);
}

}  // extern "C"
