// Quantization on CPUs: the same codes and scales as precision/quantize.py, bit for bit, in a few passes over memory.
//
// Plain C symbols, called through ctypes; every shape is checked by the caller. Matrices are [rows, cols], contiguous,
// with the contraction last. Compiled without contraction of a * b + c: every float operation rounds once.
// flags: -O2 -fvect-cost-model=dynamic -ffp-contract=off
//
// No result depends on the number of threads.

#include "matrices.h"

namespace {

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

}  // namespace

NARROWGAUGE_SIZE_OF(Format)
NARROWGAUGE_SIZE_OF(Noise)
NARROWGAUGE_SIZE_OF(Butterflies)
NARROWGAUGE_SIZE_OF(Rule)
NARROWGAUGE_SIZE_OF(Source)

extern "C" {

void source_amax(const Source* s, float* out) {
    typed(s->dtype, [&](auto zero) {
        const auto* x = static_cast<const decltype(zero)*>(s->x);
        if (!s->columns)
            amax_tiles(x, out, s->rows, s->cols, s->tall, s->wide);
        else if (s->butterflies.size)
            amax_butterflies(x, out, s->rows, s->cols, s->wide, s->butterflies);
        else
            amax_columns(x, out, s->rows, s->cols, s->wide);
    });
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
        const float now = tensor_amax_of(*s);
        if (!(now < INFINITY)) return 1;
        amax = tensor_amax ? amax : now;
    }
    if (rule->kind == TWO_LEVEL && !(amax < INFINITY)) return 1;
    const Level level(*rule, amax);
    *factor = level.decode;
    round_any(*s, {{nullptr, nullptr}, &level, out, stored, format, noise}, values);
    return 0;
}

// out = code value * factor of its tile, one rounding to bf16 or float32.
void values(const uint8_t* codes, const float* factors, void* out, int64_t rows, int64_t cols, int64_t tall,
            int64_t wide, const Format* format, int32_t dtype) {
    typed(dtype, [&](auto zero) {
        values_rows(codes, factors, static_cast<decltype(zero)*>(out), rows, cols, tall, wide, *format);
    });
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
    typed(dtype, [&](auto zero) {
        using T = decltype(zero);
        const T* source = static_cast<const T*>(x);
        T* target = static_cast<T*>(out);
        if (columns)
            hadamard_columns(source, target, cols, rows, {int32_t(size), factor, signs});
        else
            hadamard_rows(source, target, rows, cols, signs, size, factor);
    });
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
