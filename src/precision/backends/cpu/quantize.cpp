// Quantization on CPUs: the same codes and scales as precision/quantize.py, bit for bit, in a few passes over memory.
//
// Plain C symbols, called through ctypes; every shape is checked by the caller. Matrices are [rows, cols], contiguous,
// with the contraction last. Compiled without contraction of a * b + c: every float operation rounds once.
// flags: -O2 -fvect-cost-model=dynamic -ffp-contract=off
//
// No result depends on the number of threads.

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
                if (row % depth == 0) load_block(x, rows, cols, first + row, depth, col, butterflies, blocks);
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
        if (s->columns)
            amax_columns(x, out, s->rows, s->cols, s->wide);
        else
            amax_tiles(x, out, s->rows, s->cols, s->tall, s->wide);
    });
}

// The codes of round(x * scale), or with `values` BF16 round(x * scale) * factor (null: 1), which must be exact there.
void round_source(const Source* s, const float* scales, const float* factors, void* out, const Format* format,
                  const Noise* noise, int32_t values) {
    round_any(*s, {{scales, factors}, nullptr, out, nullptr, format, noise}, values);
}

// The same with scales by a rule, all of them written to `stored` (null: not wanted); tiles in columns divide 128. tensor_amax: null for that of x. factor: what is left to the tensor. Returns 1, with nothing
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
void hadamard(const void* x, void* out, int64_t rows, int64_t cols, const Butterflies* butterflies, int32_t dtype,
              int32_t columns) {
    typed(dtype, [&](auto zero) {
        using T = decltype(zero);
        const T* source = static_cast<const T*>(x);
        T* target = static_cast<T*>(out);
        if (columns)
            hadamard_columns(source, target, cols, rows, *butterflies);
        else
            hadamard_rows(source, target, rows, cols, *butterflies);
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
