// AdamW over codecs (precision/states/codecs.py): decode, update in float32, encode, in one pass over a row.
//
// Plain C symbols, called through ctypes; every shape is checked by the caller. Compiled without contraction of
// a * b + c: every float operation rounds once. No result depends on the number of threads.
// flags: -O2 -fvect-cost-model=dynamic -ffp-contract=off

#include <vector>

#include "formats.h"

enum Kind : int32_t { FP32 = 0, BF16 = 1, KAHAN = 2, SCALED = 3, DYNAMIC = 4, EXPANDED = 5 };
enum Which { M, V, W };  // the moments and the weights

// A codec. block 0: one scale for the tensor. values, middles: [256], or [256][128] of EXPANDED; limits: [256].
struct Codec {
    int32_t kind, block, stochastic;
    float floor;
    Format format;
    const float *values, *middles, *limits;
};

// The parts of one tensor [rows, cols] in one codec: plain values or codes; scales; residual or powers.
struct Encoded {
    void* codes;
    float* scales;
    void* extra;
    uint32_t key0, key1;
    float amax;  // of the new values on all ranks, where one scale serves the tensor
};

// One parameter. weight: the parameter, where `states[W]` are master weights of their own, or null.
struct Update {
    int64_t rows, cols;
    uint64_t row_offset;
    const void* grad;
    void* weight;
    int32_t grad_bf16, weight_bf16, decays, torch_root;
    float decay, lerp, beta2, square, correction, eps, step;
    Codec codecs[3];  // of M, V and W
    Encoded states[3];
};

NARROWGAUGE_SIZE_OF(Codec)
NARROWGAUGE_SIZE_OF(Encoded)
NARROWGAUGE_SIZE_OF(Update)

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

inline bool per_tensor(const Codec& codec) { return codec.kind == SCALED && codec.block == 0; }

inline float decode_scale(const Codec& codec, float amax) {
    const float a = amax < codec.floor ? codec.floor : amax;
    return a / codec.format.max;
}

// The values of a row: in x, or where they lie already, if they do.
float* decode_row(const Codec& codec, const Encoded& encoded, float tensor_scale, int64_t row, int64_t cols, float* x,
                  int32_t* code) {
    const int64_t start = row * cols;
    if (codec.kind == FP32) return static_cast<float*>(encoded.codes) + start;
    if (codec.kind == BF16 || codec.kind == KAHAN) {
        const bf16* source = static_cast<const bf16*>(encoded.codes) + start;
        for (int64_t i = 0; i < cols; ++i) x[i] = widen(source[i]);
        if (codec.kind == KAHAN) {
            const bf16* rest = static_cast<const bf16*>(encoded.extra) + start;
            for (int64_t i = 0; i < cols; ++i) x[i] += widen(rest[i]);
        }
        return x;
    }
    const uint8_t* bytes = static_cast<const uint8_t*>(encoded.codes) + start;
    const int64_t block = codec.block > 0 ? codec.block : cols, blocks = (cols + block - 1) / block;
    const float* scales = encoded.scales + row * blocks;
    if (codec.kind == SCALED) {
        const Grid grid(codec.format);
        if (codec.format.bits > 8) {
            const uint16_t* source = static_cast<const uint16_t*>(encoded.codes) + start;
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
            const float* values = codec.values + 128 * int64_t(static_cast<uint8_t*>(encoded.extra)[row * blocks + b]);
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

void encode_row(const Codec& codec, const Encoded& encoded, uint64_t row_offset, int64_t row, int64_t cols, const float* x,
                float* uniform, int32_t* code) {
    const int64_t start = row * cols;
    if (codec.stochastic) {
        const Noise noise{1, 0, encoded.key0, encoded.key1, row_offset, nullptr};
        const uint32_t hash = row_hash(noise, uint64_t(row));
#pragma omp simd
        for (int64_t i = 0; i < cols; ++i) {
            const uint32_t element = fmix32((hash + uint32_t(i) * 0x9E3779B9u) ^ encoded.key1);
            uniform[i] = float(int32_t(element >> 8)) * 0x1p-24f;
        }
    }
    if (codec.kind == FP32) return;  // x is its place
    if (codec.kind == BF16 || codec.kind == KAHAN) {
        bf16* target = static_cast<bf16*>(encoded.codes) + start;
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
            bf16* rest = static_cast<bf16*>(encoded.extra) + start;
            for (int64_t i = 0; i < cols; ++i) {
                const float high = widen(target[i]);
                const bool finite = (as_bits(high) & 0x7fffffffu) < 0x7f800000u;
                narrow(finite ? x[i] - high : 0.0f, rest + i);
            }
        }
        return;
    }
    uint8_t* bytes = static_cast<uint8_t*>(encoded.codes) + start;
    const int64_t block = codec.block > 0 ? codec.block : cols, blocks = (cols + block - 1) / block;
    float* scales = encoded.scales + row * blocks;
    if (codec.kind == SCALED) {
        const Grid grid(codec.format);
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t first = b * block, end = std::min(cols, first + block);
            const float top = codec.block > 0 ? as_float(amax_bits(x, first, end)) : encoded.amax;
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
        uint16_t* target = static_cast<uint16_t*>(encoded.codes) + start;
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
        static_cast<uint8_t*>(encoded.extra)[row * blocks + b] = uint8_t(power);
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
// FP32 states are changed in place, with `dry` never. Without `weights`, these are left out.
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
    float *m = decode_row(u.codecs[M], u.states[M], scales[M], row, cols, r.m.data(), r.code.data());
    float *v = decode_row(u.codecs[V], u.states[V], scales[V], row, cols, r.v.data(), r.code.data()), *w = r.w.data();
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
    w = decode_row(u.codecs[W], u.states[W], scales[W], row, cols, w, r.code.data());
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
    for (const Which i : {M, V, W}) scales[i] = per_tensor(u.codecs[i]) ? *u.states[i].scales : 0.0f;
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
            const bool wanted[3] = {per_tensor(u.codecs[M]), per_tensor(u.codecs[V]), per_tensor(u.codecs[W])};
            if (!wanted[M] && !wanted[V] && !wanted[W]) continue;
            float scales[3];
            read_scales(u, scales);
            uint32_t top[3] = {0, 0, 0};
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < u.rows; ++i) {
                const Values x = update_row(u, scales, i, row, root, true, wanted[W]);
                const float* values[3] = {x.m, x.v, x.w};
                for (int j = 0; j < 3; ++j)
                    if (wanted[j]) top[j] = std::max(top[j], amax_bits(values[j], 0, u.cols));
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
                const float* values[3] = {x.m, x.v, x.w};
                for (const Which j : {M, V, W})
                    encode_row(u.codecs[j], u.states[j], u.row_offset, i, u.cols, values[j], row.uniform.data(),
                               row.code.data());
                if (u.weight == nullptr) continue;
                const float top = u.states[W].amax == INFINITY ? NAN : decode_scale(u.codecs[W], u.states[W].amax);
                const float* w = decode_row(u.codecs[W], u.states[W], top, i, u.cols, row.w.data(), row.code.data());
                if (u.weight_bf16) {
                    bf16* target = static_cast<bf16*>(u.weight) + i * u.cols;
                    for (int64_t j = 0; j < u.cols; ++j) narrow(w[j], target + j);
                } else {
                    std::memcpy(static_cast<float*>(u.weight) + i * u.cols, w, u.cols * 4);
                }
            }
        }
    }
    for (int64_t k = 0; k < count; ++k)
        for (const Which i : {M, V, W}) {
            const Codec& codec = updates[k].codecs[i];
            const Encoded& state = updates[k].states[i];
            if (per_tensor(codec)) *state.scales = state.amax == INFINITY ? NAN : decode_scale(codec, state.amax);
        }
}

}  // extern "C"
