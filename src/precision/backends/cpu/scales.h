// How scales come from amaxes (precision.scaling), where that needs nothing but the tensor's own amax.

#pragma once

#include "vectors.h"

struct Rule {
    int32_t kind, pow2, nan_decodes;  // nan_decodes: a NaN's decode scale is NaN
    float eps, top, limit;            // of Fp32; top: what the tensor's amax is mapped to, in TwoLevel, too
    float inverse_max;                // 1 / max of the elements
    int32_t tiny_exponent;            // of the elements
    Format block;
};

namespace {

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

}  // namespace
