// Rounding of whole matrices, read along rows or columns.

#pragma once

#include "amax.h"
#include "rounding.h"
#include "scales.h"

// A matrix [rows, cols] in memory. dtype: 0 float32, 1 bf16. columns: it is read along its columns, as the transpose of
// what is quantized, after the butterflies; tiles are then 1 x wide.
struct Source {
    const void* x;
    int64_t rows, cols, tall, wide;
    int32_t dtype, columns;
    Butterflies butterflies;
};

namespace {

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
    constexpr int64_t IN_A_WORD = KIND == VALUES ? 2 : KIND == BYTES ? 4 : 8;
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
            store_block<IN_A_WORD, KIND == VALUES>(words, height, cols - col, out + col * pitch + bytes_of(KIND, first),
                                                   pitch);
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

// call(a number of the type that `dtype` names)
template <typename Call>
auto typed(int32_t dtype, const Call& call) {
    return dtype ? call(bf16()) : call(float());
}

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
    typed(s.dtype, [&](auto zero) {
        using T = decltype(zero);
        r.noise->on ? round_as<T, true>(s, r, values) : round_as<T, false>(s, r, values);
    });
}

float tensor_amax_of(const Source& s) {
    return typed(s.dtype, [&](auto zero) {
        const auto* x = static_cast<const decltype(zero)*>(s.x);
        if (s.butterflies.size)
            return amax_of_butterflies(x, s.rows, s.cols, s.butterflies.signs, s.butterflies.factor);
        return amax_of(x, s.rows * s.cols);
    });
}

}  // namespace
