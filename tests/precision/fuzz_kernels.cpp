// Every kernel on buffers of the exact size, for AddressSanitizer: odd shapes, all ways of reading and writing. The
// kernels' source is included by the build command.

#include <cstdio>
#include <memory>
#include <random>

namespace {

std::mt19937 random_bits(1);

int64_t among(int64_t low, int64_t high) { return low + random_bits() % (high - low + 1); }

struct Buffer {  // malloc'd to the byte
    std::unique_ptr<char[]> bytes;
    explicit Buffer(int64_t size) : bytes(new char[size]) {
        for (int64_t i = 0; i < size; ++i) bytes[i] = char(random_bits());
    }
    template <typename T>
    T* as() {
        return reinterpret_cast<T*>(bytes.get());
    }
};

void one(int64_t rows, int64_t cols) {
    const Format formats[] = {{8, 3, -6, 8, 0x7f, 0, 448.0f}, {8, 2, -14, 15, 0x7e, 1, 57344.0f}, {4, 1, 0, 2, -1, 0, 6.0f}};
    const int64_t tiles[][2] = {{1, 16}, {1, 32}, {1, 128}, {16, 16}, {128, 128}, {1, cols}, {rows, cols}, {3, 5}, {64, cols}};
    const int32_t dtype = among(0, 1);
    const int64_t width = dtype ? 2 : 4;
    Buffer x(rows * cols * width), signs(128 * 4);
    const Format& format = formats[among(0, 2)];
    const int64_t bits = format.bits;
    const auto packed = [&](int64_t r, int64_t c) { return r * (bits == 4 ? (c + 1) / 2 : c); };
    Buffer places(std::max(rows, cols) * 8);  // of rows that do not follow one another
    const Noise noise = {int32_t(among(0, 1)), int32_t(among(0, 1)), 1, 2, uint64_t(among(0, 1)) << 33,
                         among(0, 1) ? places.as<const int64_t>() : nullptr};
    for (const auto& tile : tiles) {
        const int64_t tall = std::max<int64_t>(tile[0], 1), wide = std::max<int64_t>(tile[1], 1);
        const int64_t grid = (rows + tall - 1) / tall * ((cols + wide - 1) / wide);
        Buffer scales(grid * 4), factors(grid * 4), codes(packed(rows, cols)), values_out(rows * cols * width);
        const Source source = {x.as<void>(), rows, cols, tall, wide, dtype, 0, {0, 0, nullptr}};
        source_amax(&source, scales.as<float>());
        values(codes.as<uint8_t>(), factors.as<float>(), values_out.as<void>(), rows, cols, tall, wide, &format, dtype);
        if (wide % 16 && wide < cols) continue;
        Buffer narrow(rows * cols * 2);
        round_source(&source, scales.as<float>(), nullptr, codes.as<void>(), &format, &noise, 0);
        round_source(&source, scales.as<float>(), factors.as<float>(), narrow.as<void>(), &format, &noise, 1);
    }
    for (const int64_t wide : {int64_t(16), int64_t(32), int64_t(128), int64_t(256)}) {
        const int64_t grid = cols * ((rows + wide - 1) / wide);
        Buffer scales(grid * 4), codes(packed(cols, rows)), narrow(rows * cols * 2);
        const Source source = {x.as<void>(), rows, cols, 1, wide, dtype, 1, {0, 0, nullptr}};
        source_amax(&source, scales.as<float>());
        round_source(&source, scales.as<float>(), scales.as<float>(), narrow.as<void>(), &format, &noise, 1);
        round_source(&source, scales.as<float>(), nullptr, codes.as<void>(), &format, &noise, 0);
    }
    const Rule rules[] = {{TENSOR, 0, 0, 0.0f, 448.0f, 1e38f, 0.01f, -9, {}},
                          {RCEIL, 0, 0, 0, 0, 0, 0.01f, -9, {}},
                          {TWO_LEVEL, 0, 0, 0, 2688.0f, 0, 0.1f, -1, formats[0]}};
    for (const bool finite : {false, true}) {
        for (int64_t i = 0; finite && i < rows * cols; ++i)
            dtype ? x.as<uint16_t>()[i] = among(0x3f00, 0x4100) : x.as<uint32_t>()[i] = among(0x3f000000, 0x41000000);
        for (int32_t columns : {0, 1})
            for (const Rule& rule : rules)
                for (const auto& tile : tiles) {
                    const int64_t tall = rule.kind == TENSOR ? rows : columns ? 1 : std::max<int64_t>(tile[0], 1);
                    const int64_t wide = rule.kind == TENSOR ? cols : std::max<int64_t>(tile[1], 1);
                    if (columns ? rule.kind == TENSOR || 128 % wide || wide % 16 : wide % 16 && wide < cols) continue;
                    const int64_t outer = columns ? cols : rows, inner = columns ? rows : cols;
                    const float given = 3.0f;
                    Buffer out(packed(outer, inner)), narrow(rows * cols * 2), factor(4);
                    Buffer stored((outer + tall - 1) / tall * ((inner + wide - 1) / wide));
                    const Source source = {x.as<void>(), rows, cols, tall, wide, dtype, columns,
                                           {columns ? int32_t(among(0, 1) * 16) : 0, 0.5f, signs.as<float>()}};
                    const float* known = rule.kind != RCEIL && among(0, 1) ? &given : nullptr;
                    quantize_source(&source, &rule, known, out.as<void>(), stored.as<uint8_t>(), factor.as<float>(),
                                    &format, &noise, 0);
                    quantize_source(&source, &rule, known, narrow.as<void>(), nullptr, factor.as<float>(), &format,
                                    &noise, 1);
                }
    }
    Buffer turned(rows * cols * width);
    transpose(x.as<void>(), turned.as<void>(), rows, cols, width);
    for (const int32_t columns : {0, 1})
        for (const int32_t size : {2, 16, 32, 128}) {
            const Butterflies butterflies = {size, 0.5f, signs.as<float>()};
            hadamard(x.as<void>(), turned.as<void>(), rows, cols, &butterflies, dtype, columns);
        }
    Buffer codes(rows), scales(rows * 4);
    centred_factors(codes.as<uint8_t>(), scales.as<float>(), rows, -9);
}

}  // namespace

int main() {
    for (const int64_t size : {1, 2, 15, 16, 17, 31, 128, 129}) {
        one(1, size);
        one(size, 1);
        one(size, size);
    }
    for (int i = 0; i < 40; ++i) one(among(1, 300), among(1, 300));
    std::puts("clean");
}
