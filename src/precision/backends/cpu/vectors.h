// Sixteen elements at a time. The compiler splits these vectors where a CPU has narrower ones.

#pragma once

#include "formats.h"

namespace {

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

}  // namespace
