// Fused CPU kernels of the models, BF16 in and out, float32 inside. What each computes stands in plain torch in the
// Python module that calls it, or in its test. Plain C symbols, called through ctypes; every shape is checked by the
// caller.
//
// No result depends on the number of threads: a row, a head or a fixed chunk of rows is one thread's work.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

using bf16 = uint16_t;

inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

inline bf16 to_bf16(float x) {  // nearest even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return bf16((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

// exp(x) within 2 ulp for x <= 88; 0 below -87. Written without branches, so that loops over it become vector code.
inline float fast_exp(float x) {
    float n = std::nearbyintf(x * 1.44269504088896f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = (int32_t(std::max(-126.0f, std::min(127.0f, n))) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return x < -87.0f ? 0.0f : p * scale;
}

}  // namespace

extern "C" {

// ---------------------------------------------------------------------------------------------- cross-entropy
// losses[i] = log sum exp(logits[i]) - logits[i][targets[i]]; log_sums is saved for backward.
void cross_entropy_forward(const bf16* logits, const int64_t* targets, float* losses, float* log_sums, int64_t rows,
                           int64_t vocab) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const bf16* x = logits + row * vocab;
        float top = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < vocab; ++i) top = std::max(top, to_float(x[i]));
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < vocab; ++i) sum += fast_exp(to_float(x[i]) - top);
        bool poisoned = false;  // max drops a NaN; the loss must not
#pragma omp simd reduction(| : poisoned)
        for (int64_t i = 0; i < vocab; ++i) poisoned |= (x[i] & 0x7fff) > 0x7f80;
        log_sums[row] = poisoned ? NAN : top + std::log(sum);
        losses[row] = log_sums[row] - to_float(x[targets[row]]);
    }
}

void cross_entropy_backward(const bf16* logits, const int64_t* targets, const float* log_sums, const float* dlosses,
                            bf16* dlogits, int64_t rows, int64_t vocab) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const bf16* x = logits + row * vocab;
        bf16* dx = dlogits + row * vocab;
        const float shift = log_sums[row], factor = dlosses[row];
#pragma omp simd
        for (int64_t i = 0; i < vocab; ++i) dx[i] = to_bf16(fast_exp(to_float(x[i]) - shift) * factor);
        const int64_t target = targets[row];
        dx[target] = to_bf16((fast_exp(to_float(x[target]) - shift) - 1.0f) * factor);
        if (std::isnan(shift))
            for (int64_t i = 0; i < vocab; ++i) dx[i] = 0x7fc0;
    }
}

// ---------------------------------------------------------------------------------------------- RMSNorm
void rms_norm_forward(const bf16* x, const bf16* weight, bf16* y, float* inverse_rms, int64_t rows, int64_t width,
                      float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const bf16* a = x + row * width;
        bf16* out = y + row * width;
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; ++i) squares += to_float(a[i]) * to_float(a[i]);
        const float inverse = 1.0f / std::sqrt(squares / float(width) + eps);
        inverse_rms[row] = inverse;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) out[i] = to_bf16(to_float(a[i]) * inverse * to_float(weight[i]));
    }
}

// dweight_chunks: [ceil(rows / chunk), width], zeroed by the caller, who sums it over chunks.
void rms_norm_backward(const bf16* x, const bf16* weight, const float* inverse_rms, const bf16* dy, bf16* dx,
                       float* dweight_chunks, int64_t rows, int64_t width, int64_t chunk) {
    const int64_t chunks = (rows + chunk - 1) / chunk;
#pragma omp parallel for schedule(static)
    for (int64_t part = 0; part < chunks; ++part) {
        float* dweight = dweight_chunks + part * width;
        for (int64_t row = part * chunk; row < std::min(rows, (part + 1) * chunk); ++row) {
            const bf16 *a = x + row * width, *g = dy + row * width;
            bf16* out = dx + row * width;
            const float inverse = inverse_rms[row];
            float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < width; ++i) dot += to_float(g[i]) * to_float(weight[i]) * to_float(a[i]);
            const float back = dot * inverse * inverse / float(width);
#pragma omp simd
            for (int64_t i = 0; i < width; ++i) {
                const float value = to_float(a[i]), grad = to_float(g[i]);
                out[i] = to_bf16(inverse * (grad * to_float(weight[i]) - value * back));
                dweight[i] += grad * value * inverse;
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------- SwiGLU
void swiglu_forward(const bf16* gate, const bf16* up, bf16* y, int64_t count) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < count; ++i) {
        const float a = to_float(gate[i]);
        y[i] = to_bf16(a / (1.0f + fast_exp(std::min(-a, 87.0f))) * to_float(up[i]));
    }
}

void swiglu_backward(const bf16* gate, const bf16* up, const bf16* dy, bf16* dgate, bf16* dup, int64_t count) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < count; ++i) {
        const float a = to_float(gate[i]), g = to_float(dy[i]);
        const float sigmoid = 1.0f / (1.0f + fast_exp(std::min(-a, 87.0f)));
        dgate[i] = to_bf16(g * to_float(up[i]) * sigmoid * (1.0f + a * (1.0f - sigmoid)));
        dup[i] = to_bf16(g * a * sigmoid);
    }
}

}  // extern "C"

// ------------------------------------------------------------------------------------------------ attention
#ifdef __AVX512BF16__

namespace {

constexpr int BLOCK = 32;  // queries computed at once: two vectors of 16 lanes
constexpr int LANES = 16;
constexpr int KEYS = 8;  // keys, or rows of V^T, in registers at once

inline __m512 exp512(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(8.3334519073e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    // Exactly 0 for what is masked (-inf); a NaN passes.
    const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(counts, p, n);
}

inline __m512 dot2(__m512 sum, uint32_t pair, const uint32_t* pairs) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(int(pair)), (__m512bh)_mm512_loadu_si512(pairs));
}

inline void store_row(bf16* target, __m512 x) { _mm256_storeu_si256((__m256i*)target, (__m256i)_mm512_cvtneps_pbh(x)); }

// 16 pairs (even, odd), the operand order of dpbf16.
inline void store_pairs(uint32_t* target, __m512 even, __m512 odd) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd)), 16);
    _mm512_storeu_si512(target, _mm512_or_si512(low, high));
}

inline uint32_t pair_of(bf16 low, bf16 high) { return uint32_t(low) | uint32_t(high) << 16; }

struct Shape {
    int64_t batch, positions, heads, kv_heads, head_dim;
};

struct Rope {
    const float *cos, *sin;    // [positions of the table, head_dim / 2], or null for none
    const int64_t* positions;  // [batch, positions], or null for 0, 1, 2 ...
};

template <typename T>
struct Scratch {
    explicit Scratch(size_t count) : data(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64))) {
        std::memset(data, 0, count * sizeof(T));
    }
    ~Scratch() { std::free(data); }
    Scratch(const Scratch&) = delete;
    T* data;
};

// One head's rows, rotated, zero-padded to `padded` rows of 16 * NV.
template <int NV>
void load_head(const bf16* source, int64_t row_stride, int64_t rows, int64_t head_dim, const Rope* rope,
               int64_t sequence, int64_t sequence_length, bf16* target) {
    const int64_t half = head_dim / 2;
    for (int64_t t = 0; t < rows; ++t) {
        const bf16* x = source + t * row_stride;
        bf16* y = target + t * 16 * NV;
        if (rope == nullptr || rope->cos == nullptr) {
            std::memcpy(y, x, head_dim * sizeof(bf16));
            continue;
        }
        const int64_t place = rope->positions ? rope->positions[sequence * sequence_length + t] : t;
        const float *c = rope->cos + place * half, *s = rope->sin + place * half;
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
            const float a = to_float(x[i]), b = to_float(x[i + half]);
            y[i] = to_bf16(a * c[i] - b * s[i]);
            y[i + half] = to_bf16(b * c[i] + a * s[i]);
        }
    }
}

// The gradient of load_head: rotates back, float32 [rows][16 * NV] to bf16.
template <int NV>
void store_head(const float* source, int64_t rows, int64_t head_dim, const Rope& rope, int64_t sequence,
                int64_t sequence_length, int64_t first, bf16* target, int64_t row_stride) {
    const int64_t half = head_dim / 2;
    for (int64_t t = 0; t < rows; ++t) {
        const float* g = source + t * 16 * NV;
        bf16* y = target + t * row_stride;
        if (rope.cos == nullptr) {
            for (int64_t i = 0; i < head_dim; ++i) y[i] = to_bf16(g[i]);
            continue;
        }
        const int64_t row = first + t;
        const int64_t place = rope.positions ? rope.positions[sequence * sequence_length + row] : row;
        const float *c = rope.cos + place * half, *s = rope.sin + place * half;
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
            y[i] = to_bf16(g[i] * c[i] + g[i + half] * s[i]);
            y[i + half] = to_bf16(g[i + half] * c[i] - g[i] * s[i]);
        }
    }
}

// Pairs along the feature, lanes along the row: [16 * NV / 2][BLOCK] from BLOCK rows.
template <int NV>
void pack_features(const bf16* rows, uint32_t* target) {
    for (int d = 0; d < 8 * NV; ++d)
        for (int q = 0; q < BLOCK; ++q) std::memcpy(target + d * BLOCK + q, rows + q * 16 * NV + 2 * d, 4);
}

// Pairs along the row, lanes along the feature: [count / 2][16 * NV].
template <int NV>
void pack_rows(const bf16* rows, int64_t count, uint32_t* target) {
    for (int64_t pair = 0; pair < count / 2; ++pair)
        for (int d = 0; d < 16 * NV; ++d)
            target[pair * 16 * NV + d] = pair_of(rows[2 * pair * 16 * NV + d], rows[(2 * pair + 1) * 16 * NV + d]);
}

// Pairs along the row, rows of the result along the feature: [16 * NV][count / 2], a transpose.
template <int NV>
void pack_transposed(const bf16* rows, int64_t count, uint32_t* target) {
    for (int64_t pair = 0; pair < count / 2; ++pair)
        for (int d = 0; d < 16 * NV; ++d)
            target[d * (count / 2) + pair] =
                pair_of(rows[2 * pair * 16 * NV + d], rows[(2 * pair + 1) * 16 * NV + d]);
}

// KEYS x BLOCK scores: rows[key] . columns[query].
template <int NV>
inline void scores(const bf16* rows, const uint32_t* columns, __m512 (&sum)[KEYS][2]) {
#pragma GCC unroll 8
    for (int i = 0; i < KEYS; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (int d = 0; d < 8 * NV; ++d) {
        const __m512bh first = (__m512bh)_mm512_loadu_si512(columns + d * BLOCK);
        const __m512bh second = (__m512bh)_mm512_loadu_si512(columns + d * BLOCK + LANES);
#pragma GCC unroll 8
        for (int i = 0; i < KEYS; ++i) {
            uint32_t pair;
            std::memcpy(&pair, rows + i * 16 * NV + 2 * d, 4);
            const __m512bh key = (__m512bh)_mm512_set1_epi32(int(pair));
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], key, first);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], key, second);
        }
    }
}

// target[feature][BLOCK] = sum over key pairs [from, to) of transposed[feature][pair] * probabilities[pair][BLOCK].
template <int NV>
void weighted_sum(const uint32_t* transposed, int64_t stride, const uint32_t* probabilities, int64_t from, int64_t to,
                  float* target) {
    for (int d = 0; d < 16 * NV; d += KEYS) {
        __m512 sum[KEYS][2];
#pragma GCC unroll 8
        for (int i = 0; i < KEYS; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
        for (int64_t pair = from; pair < to; ++pair) {
            const __m512bh first = (__m512bh)_mm512_loadu_si512(probabilities + pair * BLOCK);
            const __m512bh second = (__m512bh)_mm512_loadu_si512(probabilities + pair * BLOCK + LANES);
#pragma GCC unroll 8
            for (int i = 0; i < KEYS; ++i) {
                const __m512bh value = (__m512bh)_mm512_set1_epi32(int(transposed[(d + i) * stride + pair]));
                sum[i][0] = _mm512_dpbf16_ps(sum[i][0], value, first);
                sum[i][1] = _mm512_dpbf16_ps(sum[i][1], value, second);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < KEYS; ++i) {
            _mm512_storeu_ps(target + (d + i) * BLOCK, sum[i][0]);
            _mm512_storeu_ps(target + (d + i) * BLOCK + LANES, sum[i][1]);
        }
    }
}

// total[key][feature] += sum over the block's query pairs of weights[key][query] * columns[query pair][feature].
template <int NV>
void accumulate(const bf16* weights, const uint32_t* columns, int64_t from, int64_t to, float* total) {
    constexpr int ROWS = NV >= 8 ? 2 : NV >= 4 ? 4 : 8;
    for (int64_t key = from; key < to; key += ROWS) {
        __m512 sum[ROWS][NV];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sum[i][v] = _mm512_loadu_ps(total + (key + i) * 16 * NV + v * LANES);
        for (int pair = 0; pair < BLOCK / 2; ++pair) {
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; ++i) {
                uint32_t weight;
                std::memcpy(&weight, weights + (key + i) * BLOCK + 2 * pair, 4);
#pragma GCC unroll 8
                for (int v = 0; v < NV; ++v)
                    sum[i][v] = dot2(sum[i][v], weight, columns + pair * 16 * NV + v * LANES);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) _mm512_storeu_ps(total + (key + i) * 16 * NV + v * LANES, sum[i][v]);
    }
}

// Which of a block's queries may see `key`: those at or after it, whose document begins at or before it.
inline __mmask16 visible(int64_t key, __m512i queries, __m512i starts) {
    const __m512i keys = _mm512_set1_epi32(int32_t(key));
    return _mm512_cmple_epi32_mask(keys, queries) & _mm512_cmple_epi32_mask(starts, keys);
}

struct Block {
    __m512i queries[2], starts[2];
    int64_t first_key, all_see_from;  // keys before first_key: no query; [all_see_from, first query]: every query
};

inline Block make_block(int64_t query, const int64_t* starts, int64_t positions) {
    int32_t begins[BLOCK];
    int64_t least = query, most = 0;
    for (int q = 0; q < BLOCK; ++q) {
        begins[q] = starts && query + q < positions ? int32_t(starts[query + q]) : 0;
        if (query + q < positions) {
            least = std::min<int64_t>(least, begins[q]);
            most = std::max<int64_t>(most, begins[q]);
        }
    }
    Block block;
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int v = 0; v < 2; ++v) {
        block.queries[v] = _mm512_add_epi32(lanes, _mm512_set1_epi32(int32_t(query) + v * LANES));
        block.starts[v] = _mm512_loadu_si512(begins + v * LANES);
    }
    block.first_key = least / KEYS * KEYS;
    block.all_see_from = most;
    return block;
}

template <int NV>
void forward_head(const Shape& shape, const bf16* q, const bf16* k, const bf16* v, const Rope& rope,
                  const int64_t* starts, bf16* y, float* log_sums, int64_t sequence, int64_t kv_head) {
    const int64_t length = shape.positions, padded = (length + BLOCK - 1) / BLOCK * BLOCK;
    const int64_t groups = shape.heads / shape.kv_heads;
    const int64_t q_stride = shape.heads * shape.head_dim, k_stride = shape.kv_heads * shape.head_dim;
    const float scale = 1.0f / std::sqrt(float(shape.head_dim));
    Scratch<bf16> keys(padded * 16 * NV), rows(padded * 16 * NV);
    Scratch<uint32_t> values(padded / 2 * 16 * NV), columns(8 * NV * BLOCK), pairs(padded / 2 * BLOCK);
    Scratch<float> logits(padded * BLOCK), sums(16 * NV * BLOCK);
    const int64_t k_offset = sequence * length * k_stride + kv_head * shape.head_dim;
    load_head<NV>(v + k_offset, k_stride, length, shape.head_dim, nullptr, sequence, length, rows.data);
    pack_transposed<NV>(rows.data, padded, values.data);
    load_head<NV>(k + k_offset, k_stride, length, shape.head_dim, &rope, sequence, length, keys.data);
    for (int64_t head = kv_head * groups; head < (kv_head + 1) * groups; ++head) {
        const int64_t q_offset = sequence * length * q_stride + head * shape.head_dim;
        load_head<NV>(q + q_offset, q_stride, length, shape.head_dim, &rope, sequence, length, rows.data);
        float* head_log_sums = log_sums + (sequence * shape.heads + head) * length;
        for (int64_t query = 0; query < length; query += BLOCK) {
            const Block block = make_block(query, starts ? starts + sequence * length : nullptr, length);
            const int64_t end = query + BLOCK;
            pack_features<NV>(rows.data + query * 16 * NV, columns.data);
            __m512 top[2] = {_mm512_set1_ps(-INFINITY), _mm512_set1_ps(-INFINITY)};
            for (int64_t key = block.first_key; key < end; key += KEYS) {
                __m512 sum[KEYS][2];
                scores<NV>(keys.data + key * 16 * NV, columns.data, sum);
                const bool partial = key + KEYS > query || key < block.all_see_from;
#pragma GCC unroll 8
                for (int i = 0; i < KEYS; ++i)
#pragma GCC unroll 2
                    for (int half = 0; half < 2; ++half) {
                        __m512 s = _mm512_mul_ps(sum[i][half], _mm512_set1_ps(scale));
                        if (partial)
                            s = _mm512_mask_blend_ps(visible(key + i, block.queries[half], block.starts[half]),
                                                     _mm512_set1_ps(-INFINITY), s);
                        top[half] = _mm512_max_ps(top[half], s);
                        _mm512_storeu_ps(logits.data + (key + i) * BLOCK + half * LANES, s);
                    }
            }
            __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
            for (int64_t key = block.first_key; key < end; key += 2)
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half) {
                    const float* s = logits.data + key * BLOCK + half * LANES;
                    const __m512 even = exp512(_mm512_sub_ps(_mm512_loadu_ps(s), top[half]));
                    const __m512 odd = exp512(_mm512_sub_ps(_mm512_loadu_ps(s + BLOCK), top[half]));
                    total[half] = _mm512_add_ps(total[half], _mm512_add_ps(even, odd));
                    store_pairs(pairs.data + key / 2 * BLOCK + half * LANES, even, odd);
                }
            weighted_sum<NV>(values.data, padded / 2, pairs.data, block.first_key / 2, end / 2, sums.data);
            float tops[BLOCK], totals[BLOCK];
            for (int half = 0; half < 2; ++half) {
                _mm512_storeu_ps(tops + half * LANES, top[half]);
                _mm512_storeu_ps(totals + half * LANES, total[half]);
            }
            for (int64_t i = 0; i < std::min<int64_t>(BLOCK, length - query); ++i) {
                head_log_sums[query + i] = tops[i] + std::log(totals[i]);
                const float inverse = 1.0f / totals[i];
                bf16* out = y + q_offset + (query + i) * q_stride;
                for (int64_t d = 0; d < shape.head_dim; ++d) out[d] = to_bf16(sums.data[d * BLOCK + i] * inverse);
            }
        }
    }
}

template <int NV>
void backward_head(const Shape& shape, const bf16* q, const bf16* k, const bf16* v, const Rope& rope,
                   const int64_t* starts, const bf16* y, const float* log_sums, const bf16* dy, bf16* dq, bf16* dk,
                   bf16* dv, int64_t sequence, int64_t kv_head) {
    const int64_t length = shape.positions, padded = (length + BLOCK - 1) / BLOCK * BLOCK;
    const int64_t groups = shape.heads / shape.kv_heads;
    const int64_t q_stride = shape.heads * shape.head_dim, k_stride = shape.kv_heads * shape.head_dim;
    const float scale = 1.0f / std::sqrt(float(shape.head_dim));
    Scratch<bf16> keys(padded * 16 * NV), values(padded * 16 * NV), queries(padded * 16 * NV), grads(padded * 16 * NV);
    Scratch<bf16> weights(padded * BLOCK), slopes(padded * BLOCK);
    Scratch<uint32_t> transposed(padded / 2 * 16 * NV), pairs(padded / 2 * BLOCK);
    Scratch<uint32_t> q_columns(8 * NV * BLOCK), dy_columns(8 * NV * BLOCK);
    Scratch<uint32_t> q_rows(BLOCK / 2 * 16 * NV), dy_rows(BLOCK / 2 * 16 * NV);
    Scratch<float> dkeys(padded * 16 * NV), dvalues(padded * 16 * NV), sums(16 * NV * BLOCK), turned(BLOCK * 16 * NV);
    const int64_t k_offset = sequence * length * k_stride + kv_head * shape.head_dim;
    load_head<NV>(v + k_offset, k_stride, length, shape.head_dim, nullptr, sequence, length, values.data);
    load_head<NV>(k + k_offset, k_stride, length, shape.head_dim, &rope, sequence, length, keys.data);
    pack_transposed<NV>(keys.data, padded, transposed.data);
    for (int64_t head = kv_head * groups; head < (kv_head + 1) * groups; ++head) {
        const int64_t q_offset = sequence * length * q_stride + head * shape.head_dim;
        load_head<NV>(q + q_offset, q_stride, length, shape.head_dim, &rope, sequence, length, queries.data);
        load_head<NV>(dy + q_offset, q_stride, length, shape.head_dim, nullptr, sequence, length, grads.data);
        const float* head_log_sums = log_sums + (sequence * shape.heads + head) * length;
        for (int64_t query = 0; query < length; query += BLOCK) {
            const Block block = make_block(query, starts ? starts + sequence * length : nullptr, length);
            const int64_t end = query + BLOCK, real = std::min<int64_t>(BLOCK, length - query);
            pack_features<NV>(queries.data + query * 16 * NV, q_columns.data);
            pack_features<NV>(grads.data + query * 16 * NV, dy_columns.data);
            pack_rows<NV>(queries.data + query * 16 * NV, BLOCK, q_rows.data);
            pack_rows<NV>(grads.data + query * 16 * NV, BLOCK, dy_rows.data);
            float shift[BLOCK], delta[BLOCK];
            for (int64_t i = 0; i < BLOCK; ++i) {
                shift[i] = i < real ? head_log_sums[query + i] : INFINITY;  // a padded query weighs nothing
                delta[i] = 0.0f;
                if (i >= real) continue;
                const bf16 *a = y + q_offset + (query + i) * q_stride, *b = dy + q_offset + (query + i) * q_stride;
                for (int64_t d = 0; d < shape.head_dim; ++d) delta[i] += to_float(a[d]) * to_float(b[d]);
            }
            const __m512 shifts[2] = {_mm512_loadu_ps(shift), _mm512_loadu_ps(shift + LANES)};
            const __m512 deltas[2] = {_mm512_loadu_ps(delta), _mm512_loadu_ps(delta + LANES)};
            for (int64_t key = block.first_key; key < end; key += KEYS) {
                __m512 p[KEYS][2], ds[KEYS][2];
                scores<NV>(keys.data + key * 16 * NV, q_columns.data, p);
                const bool partial = key + KEYS > query || key < block.all_see_from;
#pragma GCC unroll 8
                for (int i = 0; i < KEYS; ++i)
#pragma GCC unroll 2
                    for (int half = 0; half < 2; ++half) {
                        __m512 weight = exp512(_mm512_fmsub_ps(p[i][half], _mm512_set1_ps(scale), shifts[half]));
                        if (partial)
                            weight = _mm512_maskz_mov_ps(
                                visible(key + i, block.queries[half], block.starts[half]), weight);
                        p[i][half] = weight;
                        store_row(weights.data + (key + i) * BLOCK + half * LANES, weight);
                    }
                scores<NV>(values.data + key * 16 * NV, dy_columns.data, ds);
#pragma GCC unroll 8
                for (int i = 0; i < KEYS; ++i)
#pragma GCC unroll 2
                    for (int half = 0; half < 2; ++half) {
                        const __m512 slope = _mm512_mul_ps(p[i][half], _mm512_sub_ps(ds[i][half], deltas[half]));
                        ds[i][half] = _mm512_mul_ps(slope, _mm512_set1_ps(scale));
                        store_row(slopes.data + (key + i) * BLOCK + half * LANES, ds[i][half]);
                    }
#pragma GCC unroll 4
                for (int i = 0; i < KEYS; i += 2)
#pragma GCC unroll 2
                    for (int half = 0; half < 2; ++half)
                        store_pairs(pairs.data + (key + i) / 2 * BLOCK + half * LANES, ds[i][half], ds[i + 1][half]);
            }
            accumulate<NV>(weights.data, dy_rows.data, block.first_key, end, dvalues.data);
            accumulate<NV>(slopes.data, q_rows.data, block.first_key, end, dkeys.data);
            weighted_sum<NV>(transposed.data, padded / 2, pairs.data, block.first_key / 2, end / 2, sums.data);
            for (int64_t i = 0; i < real; ++i)
                for (int64_t d = 0; d < 16 * NV; ++d) turned.data[i * 16 * NV + d] = sums.data[d * BLOCK + i];
            store_head<NV>(turned.data, real, shape.head_dim, rope, sequence, length, query,
                           dq + q_offset + query * q_stride, q_stride);
        }
    }
    const Rope none = {nullptr, nullptr, nullptr};
    store_head<NV>(dkeys.data, length, shape.head_dim, rope, sequence, length, 0, dk + k_offset, k_stride);
    store_head<NV>(dvalues.data, length, shape.head_dim, none, sequence, length, 0, dv + k_offset, k_stride);
}

// call(N, sequence, head) for each head, padded to N = 1, 2, 4 or 8 vectors of 16 features.
template <typename Call>
void for_each_head(const Shape& shape, const Call& call) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t item = 0; item < shape.batch * shape.kv_heads; ++item) {
        const int64_t sequence = item / shape.kv_heads, head = item % shape.kv_heads;
        if (shape.head_dim <= 16)
            call(std::integral_constant<int, 1>(), sequence, head);
        else if (shape.head_dim <= 32)
            call(std::integral_constant<int, 2>(), sequence, head);
        else if (shape.head_dim <= 64)
            call(std::integral_constant<int, 4>(), sequence, head);
        else
            call(std::integral_constant<int, 8>(), sequence, head);
    }
}

}  // namespace

extern "C" {

int has_attention() { return 1; }

// q, y: [B, T, H, D]; k, v: [B, T, K, D]; contiguous bf16. cos, sin: float32 [P, D / 2] or null; positions, starts:
// int64 [B, T] or null: the rotary position of every token, and where in its row the document of every token begins.
void attention_forward(const bf16* q, const bf16* k, const bf16* v, const float* cos, const float* sin,
                       const int64_t* positions, const int64_t* starts, bf16* y, float* log_sums, int64_t batch,
                       int64_t length, int64_t heads, int64_t kv_heads, int64_t head_dim) {
    const Shape shape = {batch, length, heads, kv_heads, head_dim};
    const Rope rope = {cos, sin, positions};
    for_each_head(shape, [&](auto vectors, int64_t sequence, int64_t head) {
        forward_head<vectors()>(shape, q, k, v, rope, starts, y, log_sums, sequence, head);
    });
}

void attention_backward(const bf16* q, const bf16* k, const bf16* v, const float* cos, const float* sin,
                        const int64_t* positions, const int64_t* starts, const bf16* y, const float* log_sums,
                        const bf16* dy, bf16* dq, bf16* dk, bf16* dv, int64_t batch, int64_t length, int64_t heads,
                        int64_t kv_heads, int64_t head_dim) {
    const Shape shape = {batch, length, heads, kv_heads, head_dim};
    const Rope rope = {cos, sin, positions};
    for_each_head(shape, [&](auto vectors, int64_t sequence, int64_t head) {
        backward_head<vectors()>(shape, q, k, v, rope, starts, y, log_sums, dy, dq, dk, dv, sequence, head);
    });
}
}  // extern "C"

#else

extern "C" int has_attention() { return 0; }

#endif
