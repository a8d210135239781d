// Absolute maxima of tiles, by bits of |x| compared as integers: a NaN is larger than everything.

#pragma once

#include <vector>

#include "hadamard.h"

namespace {

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

}  // namespace
