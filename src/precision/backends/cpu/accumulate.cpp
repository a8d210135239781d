// Sums of products by the rule of a tensor core: the bits of sum_terms in precision/sums.py.
//
// Plain C symbols, called through ctypes; every shape is checked by the caller. Lanes are sixteen columns of the output.
// Compiled without contraction of a * b + c: every float operation rounds once.
// flags: -O2 -fvect-cost-model=dynamic -ffp-contract=off
//
// No result depends on the number of threads.

#include <vector>

#include "vectors.h"

// promote_every 0: never.
struct Sums {
    int32_t step, bits, significant, least;
    int64_t promote_every;
};

NARROWGAUGE_SIZE_OF(Sums)

namespace {

using Doubles = double __attribute__((vector_size(128)));
using Longs = int64_t __attribute__((vector_size(128)));
constexpr int64_t DEPTH = 128;  // products of sixteen columns that stay in the first cache while rows pass by
constexpr int64_t ROWS = 256;   // that one thread takes at a time
constexpr int64_t GROUP = 15;   // terms below 2^27 that an int32 sums, and one below 2^26
constexpr int32_t ZERO = -4096, BIAS = 127, TINY = -126;

// An operand taken apart [rows, k]: value = significand * 2^exponent, and the exponent of a zero is ZERO.
// factors: of promoted sums, [rows, intervals], or null.
struct Side {
    const float* significands;
    const int32_t* exponents;
    const float* factors;
};

inline Ints splat(int32_t x) { return x - Ints{}; }

inline Ints load(const int32_t* source) {
    Ints ints;
    std::memcpy(&ints, source, sizeof ints);
    return ints;
}

inline bool any(Ints mask) {
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
    return __builtin_ia32_ptestmd512(mask, mask, -1) != 0;
#else
    int64_t words[8], found = 0;
    std::memcpy(words, &mask, sizeof words);
    for (const int64_t word : words) found |= word;
    return found != 0;
#endif
}

// 2^e for e <= 127; 0 below FP32's normal numbers, where it cuts any term to nothing.
inline Floats power(Ints e) { return Floats(larger(e + BIAS, splat(0)) << 23); }

// Sixteen sums so far, taken apart as an operand is.
struct Sum {
    Floats significands;
    Ints exponents;
    explicit Sum(Floats c) {
        const Ints magnitude = Ints(c) & 0x7fffffff, e = (magnitude >> 23) - BIAS;
        const Floats normal = Floats((Ints(c) & 0x807fffff) | 0x3f800000);
        significands = e < TINY ? c * 0x1p126f : normal;
        exponents = magnitude == 0 ? splat(ZERO) : larger(e, splat(TINY));
    }
};

#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
constexpr bool CUTS = true;
inline Floats cut_to_24(Ints x) {  // towards zero
    return Floats(__builtin_ia32_cvtdq2ps512_mask(x, Floats{}, -1, 0x0b));
}
#else
constexpr bool CUTS = false;
inline Floats cut_to_24(Ints) { return {}; }
#endif

// total * 2^-up, cut towards zero to so many significant bits and to a multiple of 2^-149.
inline Floats cut(Doubles total, Ints up, int32_t significant) {
    const Longs mask = ~((int64_t(1) << (53 - significant)) - 1) - Longs{};
    const Longs e = __builtin_convertvector(larger(-up, splat(-1022)), Longs);
    const Doubles value = Doubles(Longs(total) & mask) * Doubles((e + 1023) << 52);
    const Floats y = __builtin_convertvector(value, Floats);
    if (!any(up > -TINY)) return y;
    // Below 2^-126 the conversion has rounded: there are less than 2^23 units of 2^-149.
    const Ints units = __builtin_convertvector(value * 0x1p149, Ints);
    const Doubles exact = __builtin_convertvector(units, Doubles) * 0x1p-149;
    const Ints small = __builtin_convertvector((value < 0x1p-126) & (value > -0x1p-126), Ints);
    return small ? __builtin_convertvector(exact, Floats) : y;
}

// ANY: products of significands, scaled each by its own exponent. The others take products of values, which FP32 holds:
// the exponents of all that are not zero lie in LOW .. HIGH. NARROW: FP32 also holds every sum of a step's terms.
enum Kind { ANY, WIDE, NARROW };
constexpr int32_t LOW = -100, HIGH = 124;

// The sums c after `count` products of a row's terms with those of sixteen columns [count, 16]. a, b: significands of
// ANY, else values.
template <Kind KIND>
inline Floats after(Floats c, const float* a, const int32_t* ea, const float* b, const int32_t* eb, int64_t count,
                    const Sums& rule) {
    const Sum sum(c);
    Ints top = load(eb) + ea[0];
#pragma GCC unroll 8
    for (int64_t j = 1; j < count; ++j) top = larger(top, load(eb + j * LANES) + ea[j]);
    top = larger(larger(top, splat(rule.least)), sum.exponents);
    const Ints up = rule.bits - top, biased = up + BIAS;
    // Beyond 2^127 products are all zeros: else top would be higher.
    const Floats scale = Floats(smaller(biased, splat(2 * BIAS)) << 23);
    Ints group = __builtin_convertvector(sum.significands * power(sum.exponents + up), Ints);
    const auto add = [&](int64_t first, int64_t last) {
#pragma GCC unroll 8
        for (int64_t j = first; j < last; ++j) {
            const Floats product = load(b + j * LANES) * a[j];
            const Floats own = Floats(larger(load(eb + j * LANES) + (biased + ea[j]), splat(0)) << 23);
            group += __builtin_convertvector(product * (KIND == ANY ? own : scale), Ints);
        }
    };
    Floats y;
    if (KIND == NARROW || count <= GROUP) {
        add(0, count);
        const bool normal = KIND != ANY && !any(up > -TINY);
        if (normal && KIND == NARROW) {
            const Ints bits = Ints(__builtin_convertvector(group, Floats)) & -(1 << (24 - rule.significant));
            y = Floats(bits) * Floats((BIAS - up) << 23);
        } else if (normal && CUTS && rule.significant == 24) {
            y = cut_to_24(group) * Floats((BIAS - up) << 23);
        } else {
            y = cut(__builtin_convertvector(group, Doubles), up, rule.significant);
        }
    } else {
        Doubles total = {};
        for (int64_t first = 0; first < count; first += GROUP) {
            add(first, std::min(first + GROUP, count));
            total += __builtin_convertvector(group, Doubles);
            group = Ints{};
        }
        y = cut(total, up, rule.significant);
    }
    return (Ints(c) & 0x7fffffff) == 0x7f800000 ? c : y + 0.0f;
}

// The least and the largest exponent of what is not zero.
struct Range {
    int32_t low = -ZERO, high = ZERO;
    void add(int32_t e) {
        if (e == ZERO) return;
        low = std::min(low, e), high = std::max(high, e);
    }
    bool held() const { return low >= LOW && high <= HIGH; }
    bool held_with(const Range& other) const {
        return held() && other.held() && low + other.low >= LOW && high + other.high <= HIGH;
    }
};

// significand * 2^e, for e that FP32 holds.
inline float value_of(float significand, int32_t e) {
    return significand * as_float(uint32_t(std::min(std::max(e + BIAS, 0), 2 * BIAS)) << 23);
}

// Values of a row.
Range open_row(const Side& side, int64_t row, int64_t k, float* values) {
    Range range;
    for (int64_t j = row * k; j < row * k + k; ++j) {
        range.add(side.exponents[j]);
        *values++ = value_of(side.significands[j], side.exponents[j]);
    }
    return range;
}

// Sixteen rows of b as columns [k, 16]; what is missing are zeros.
struct Panel {
    std::vector<float> significands, values;
    std::vector<int32_t> exponents;
    Range range;
    explicit Panel(int64_t k) : significands(k * LANES), values(k * LANES), exponents(k * LANES) {}

    void fill(const Side& b, int64_t first, int64_t count, int64_t k) {
        range = Range();
        for (int64_t lane = 0; lane < LANES; ++lane)
            for (int64_t j = 0; j < k; ++j) {
                const int64_t from = (first + lane) * k + j, to = j * LANES + lane;
                significands[to] = lane < count ? b.significands[from] : 0.0f;
                exponents[to] = lane < count ? b.exponents[from] : ZERO;
                values[to] = value_of(significands[to], exponents[to]);
                range.add(exponents[to]);
            }
    }
};

// What multiplies promoted sums: a's factor of a row, b's of sixteen columns.
struct Factors {
    const Side &a, &b;
    int64_t intervals, first, count;

    Floats scaled(Floats c, int64_t row, int64_t interval) const {
        float columns[LANES] = {};
        for (int64_t lane = 0; b.factors && lane < count; ++lane)
            columns[lane] = b.factors[(first + lane) * intervals + interval];
        const Floats right = load(columns);
        if (!a.factors) return b.factors ? c * right : c;
        const float left = a.factors[row * intervals + interval];
        return b.factors ? c * (right * left) : c * left;
    }
};

// What the tensor core holds of a row's sixteen sums, and what these are promoted to.
struct Sums16 {
    Floats c, acc;
};

// The products start .. end of a row; `a`, `ea`: of the whole row; `b`: of the panel.
template <Kind KIND>
void sum_row(Sums16& sums, const float* a, const int32_t* ea, const float* b, const Panel& panel, int64_t start,
             int64_t end, int64_t k, int64_t row, const Factors& factors, const Sums& rule) {
    Floats c = sums.c, acc = sums.acc;
    for (int64_t j = start; j < end; j += rule.step) {
        const int64_t length = std::min<int64_t>(rule.step, k - j), done = j + length;
        c = after<KIND>(c, a + j, ea + j, b + j * LANES, &panel.exponents[j * LANES], length, rule);
        if (!rule.promote_every || (done % rule.promote_every && done < k)) continue;
        acc += factors.scaled(c, row, (done - 1) / rule.promote_every);
        c = Floats{};
    }
    sums.c = c, sums.acc = acc;
}

}  // namespace

extern "C" {

// acc [m, n]: what the sums begin with, and then the sums. Significands have so few bits that FP32 holds their products.
// Factors [m or n, intervals] or null, for promote_every alone.
void sum_terms(const float* sa, const int32_t* ea, const float* fa, const float* sb, const int32_t* eb, const float* fb,
               float* acc, int64_t m, int64_t n, int64_t k, const Sums* sums) {
    const Side a = {sa, ea, fa}, b = {sb, eb, fb};
    const Sums rule = *sums;
    const bool promotes = rule.promote_every != 0;
    const bool narrow = (int64_t(rule.step) + 1) << (rule.bits + 2) <= 1 << 24;
    const int64_t depth = std::max<int64_t>(1, DEPTH / rule.step) * rule.step;
    const int64_t intervals = promotes ? (k + rule.promote_every - 1) / rule.promote_every : 0;
    const int64_t panels = (n + LANES - 1) / LANES, bands = (m + ROWS - 1) / ROWS;
    std::vector<float> values(m * k);
    std::vector<Range> ranges(m);
#pragma omp parallel
    {
        Panel panel(k);
        std::vector<Sums16> sums16(ROWS);
        int64_t packed = -1;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < m; ++row) ranges[row] = open_row(a, row, k, &values[row * k]);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < panels * bands; ++task) {
            const int64_t first = task / bands * LANES, count = std::min(LANES, n - first);
            const int64_t top = task % bands * ROWS, bottom = std::min(m, top + ROWS);
            if (first != packed) panel.fill(b, first, count, k);
            packed = first;
            const Factors factors = {a, b, intervals, first, count};
            for (int64_t row = top; row < bottom; ++row) {
                Sums16& target = sums16[row - top] = Sums16();
                std::memcpy(promotes ? &target.acc : &target.c, acc + row * n + first, count * sizeof(float));
            }
            for (int64_t start = 0; start < k; start += depth)
                for (int64_t row = top; row < bottom; ++row) {
                    const bool held = ranges[row].held_with(panel.range);
                    const auto add = !held ? &sum_row<ANY> : narrow ? &sum_row<NARROW> : &sum_row<WIDE>;
                    const float* left = (held ? values.data() : sa) + row * k;
                    const float* right = (held ? panel.values : panel.significands).data();
                    add(sums16[row - top], left, ea + row * k, right, panel, start, std::min(k, start + depth), k, row,
                        factors, rule);
                }
            for (int64_t row = top; row < bottom; ++row) {
                const Sums16& source = sums16[row - top];
                std::memcpy(acc + row * n + first, promotes ? &source.acc : &source.c, count * sizeof(float));
            }
        }
    }
}

}  // extern "C"
