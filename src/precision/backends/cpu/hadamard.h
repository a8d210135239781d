// Hadamard transforms (precision.transforms.Hadamard): in blocks that are worked on next, and of whole matrices.

#pragma once

#include "vectors.h"

struct Butterflies {  // of precision.transforms.Hadamard; size 0: none
    int32_t size;
    float factor;
    const float* signs;
};

namespace {

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

// `depth` rows, from `row` on, of the 32 columns from `col` on, transformed; zeros where there is nothing.
template <typename T>
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
            for (int k = 0; k < 16; ++k) block[i + k] = finished<T>(group[k], butterflies.factor);
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
            for (int64_t k = 0; k < size; ++k) group[k] = finished<T>(group[k], butterflies.factor);
        }
    }
}

template <typename T>
void hadamard_rows(const T* x, T* out, int64_t rows, int64_t cols, const Butterflies& butterflies) {
    const int64_t size = butterflies.size, complete = cols / size * size;
    const float *signs = butterflies.signs, factor = butterflies.factor;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const T* line = x + row * cols;
        T* target = out + row * cols;
        alignas(64) float block[128], other[128];
        for (int64_t start = 0; start < complete; start += size) {
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
        std::memcpy(target + complete, line + complete, (cols - complete) * sizeof(T));
    }
}

// Transposes a block: row k of the columns col, col + 2, ... is words[0][k], that of the columns between is words[1][k].
// An element has 32 / IN_A_WORD bits, the lower ones of its word or (HIGH) the upper ones. `out` is that of column `col`,
// the columns after it follow in distances of `pitch` bytes.
template <int64_t IN_A_WORD, bool HIGH>
[[gnu::always_inline]] inline void store_block(Words (*words)[DEPTH], int64_t height, int64_t width, char* out,
                                               int64_t pitch) {
    constexpr int64_t BITS = 32 / IN_A_WORD;
    const int64_t lanes[] = {std::min(LANES, (width + 1) / 2), std::min(LANES, width / 2)};
    for (int half = 0; half < 2; ++half) {
        for (int64_t k = height; k < DEPTH; ++k) words[half][k] = Words{};
        for (int64_t i = 0; i < height; i += LANES * IN_A_WORD) {
            Words packed[LANES];
            for (int64_t k = 0; k < LANES; ++k) {
                const Words* from = words[half] + i + k * IN_A_WORD;
                Words word = HIGH ? from[0] >> (32 - BITS) : from[0];
                for (int64_t n = 1; n < IN_A_WORD; ++n)
                    word |= HIGH ? from[n] & 0xffff0000u : from[n] << (n * BITS);
                packed[k] = word;
            }
            transpose_words(packed);
            const int64_t count = (std::min(LANES * IN_A_WORD, height - i) * BITS + 7) / 8;
            char* place = out + half * pitch + i * BITS / 8;
            for (int64_t lane = 0; lane < lanes[half]; ++lane, place += 2 * pitch) {
                if (count == 64)
                    std::memcpy(place, packed + lane, 64);
                else
                    std::memcpy(place, packed + lane, count);
            }
        }
    }
}

// hadamard_rows of the transpose of x [rows, cols]: out [cols, rows], blocks along the rows of x.
template <typename T>
void hadamard_columns(const T* x, T* out, int64_t rows, int64_t cols, const Butterflies& butterflies) {
    constexpr int64_t IN_A_WORD = 4 / sizeof(T);
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row += DEPTH)
        for (int64_t col = 0; col < cols; col += PAIR) {
            Floats blocks[2][DEPTH];
            load_block(x, rows, cols, row, DEPTH, col, butterflies, blocks);
            Words words[2][DEPTH];
            std::memcpy(words, blocks, sizeof words);
            store_block<IN_A_WORD, IN_A_WORD == 2>(words, std::min(DEPTH, rows - row), cols - col,
                                                   reinterpret_cast<char*>(out + col * rows + row), rows * sizeof(T));
        }
}

}  // namespace
