#include "matmul.h"

#include <cmath>
#include <cstring>

#include "simd.h"

namespace seraph {

void Activations::make_room(int64_t rows, int quants_of_row, int floats) {
    const auto grow = [](auto& v, int64_t size) {
        if (static_cast<int64_t>(v.size()) < size)
            v.resize(static_cast<size_t>(size));
    };
    const int64_t whole = QuantRows::whole(rows), groups = quants_of_row / kGroup;
    grow(q, whole * quants_of_row);
    grow(scale, whole * groups);
    grow(scaled_sum, whole * groups);
    grow(start, whole * groups);
    grow(values, rows * floats);
}

QuantRows Activations::quants() {
    return {q.data(), scale.data(), scaled_sum.data(), start.data()};
}

void quantize_group(const float* x, int k, const QuantRows& to, int row, int group) {
    const F32 a = load(x), b = load(x + kLanes);
    const float amax = reduce_max(max(abs(a), abs(b)));
    const F32 levels = set1(levels_per_unit(amax, 127.0f));
    const I32 qa = round_i32(a * levels), qb = round_i32(b * levels);
    const int64_t at = QuantRows::place(k, row, group);
    int8_t* q = to.q + at * kGroup;
    store_i8(q, qa);
    store_i8(q + kLanes, qb);
    const int32_t sum = reduce_add(qa + qb);
    const float scale = amax / 127.0f;
    to.scale[at] = scale;
    to.scaled_sum[at] = scale * static_cast<float>(sum);
    to.start[at] = -8 * sum;
}

void quantize_groups(const float* x, int stride, int k, const QuantRows& to, int row, int group) {
    static_assert(kMaxRows == 8);
    F32 largest[kMaxRows];
    for (int r = 0; r < kMaxRows; ++r)
        largest[r] = max(abs(load(x + r * stride)), abs(load(x + r * stride + kLanes)));
    const F32 amax = reduce_max(largest);
    alignas(64) float levels[kLanes], scale[kLanes], scaled_sum[kLanes];
    alignas(64) int32_t sum[kLanes];
    store(levels, levels_per_unit(amax, 127.0f));
    const int64_t at = QuantRows::place(k, row, group);
    int8_t* q = to.q + at * kGroup;
    I32 sums[kMaxRows];
    for (int r = 0; r < kMaxRows; ++r, x += stride, q += kGroup) {
        const I32 a = round_i32(load(x) * set1(levels[r])), b = round_i32(load(x + kLanes) * set1(levels[r]));
        store_i8(q, a);
        store_i8(q + kLanes, b);
        sums[r] = a + b;
    }
    const I32 total = reduce_add(sums);
    const F32 factor = amax / set1(127.0f);
    store(scale, factor);
    store(scaled_sum, factor * to_f32(total));
    store(sum, total);
    for (int r = 0; r < kMaxRows; ++r) {
        to.scale[at + r] = scale[r];
        to.scaled_sum[at + r] = scaled_sum[r];
        to.start[at + r] = -8 * sum[r];
    }
}

void fetch_group(int k, const QuantRows& to, int row, int group) {
    const int64_t at = QuantRows::place(k, row / kMaxRows * kMaxRows, group);
    for (int line = 0; line < kMaxRows * kGroup; line += 64)
        __builtin_prefetch(to.q + at * kGroup + line, 1);
    __builtin_prefetch(to.scale + at, 1);
    __builtin_prefetch(to.scaled_sum + at, 1);
    __builtin_prefetch(to.start + at, 1);
}

void quantize_rows(const float* x, int k, const QuantRows& to, int row, int rows) {
    for (; rows >= kMaxRows && row % kMaxRows == 0; row += kMaxRows, rows -= kMaxRows, x += kMaxRows * k) {
        for (int g = 0; g < k / kGroup; ++g)
            quantize_groups(x + g * kGroup, k, k, to, row, g);
    }
    for (; rows > 0; ++row, --rows, x += k) {
        for (int g = 0; g < k / kGroup; ++g)
            quantize_group(x + g * kGroup, k, to, row, g);
    }
}

namespace {

constexpr int kRowBytes = kStrip / 2 * 4; // four bytes of each output of a half
constexpr int kFetch = 8 << 10;           // bytes from what an only pass reads to what it fetches meanwhile

// Unrolled, sums stay in registers. A portable build has none wide enough, and unrolling its byte products takes the
// compiler minutes.
#if defined(SERAPH_ISA_PORTABLE)
constexpr int kUnroll = 1;
#else
constexpr int kUnroll = 8;
#endif

// The running sums of one cell's 32-output half.
template <int R>
struct Sums {
    F32 y[R][2];
    SERAPH_INLINE void load_from(const float* out) {
#pragma GCC unroll kUnroll
        for (int r = 0; r < R; ++r) {
            y[r][0] = load(out + r * kStrip);
            y[r][1] = load(out + r * kStrip + kLanes);
        }
    }
    SERAPH_INLINE void store_to(float* out) const {
#pragma GCC unroll kUnroll
        for (int r = 0; r < R; ++r) {
            store(out + r * kStrip, y[r][0]);
            store(out + r * kStrip + kLanes, y[r][1]);
        }
    }
};

// One 32-output half of one cell for R rows, added to `sums`: two vectors of integer sums per row (and chain) stay in
// registers over the group.
template <int BITS, bool MIN, int R>
SERAPH_INLINE void cell_half(const uint8_t* quants, const uint16_t* scales, const uint16_t* mins, const int8_t* q,
                             const float* scale, const float* scaled_sum, const int32_t* start, Sums<R>& sums) {
    // One row alone has too few integer sums to hide the latency of each: every other quad goes to a second chain.
    constexpr int kChains = R == 1 && kRegisters >= 32 ? 2 : 1;
    GroupDot<BITS> dot[R][2][kChains];
#pragma GCC unroll kUnroll
    for (int r = 0; r < R; ++r) {
        I32 from = set1_i32(0);
        if constexpr (!MIN) {
            from = set1_i32(start[r]);
            if constexpr (BITS == 8)
                from = shift_left<4>(from);
        }
        for (int c = 0; c < kChains; ++c) {
            dot[r][0][c].start(c == 0 ? from : set1_i32(0));
            dot[r][1][c].start(c == 0 ? from : set1_i32(0));
        }
    }
    if constexpr (BITS == 4) {
#pragma GCC unroll kUnroll
        for (int octet = 0; octet < 4; ++octet) {
            const I32 w0 = load_i32(quants + octet * kRowBytes), w1 = load_i32(quants + octet * kRowBytes + 64);
            const I32 low0 = low_nibbles(w0), low1 = low_nibbles(w1);
#pragma GCC unroll kUnroll
            for (int r = 0; r < R; ++r) {
                const I32 a = broadcast_quad(q + r * kGroup + octet * 8);
                dot[r][0][0].add(low0, a);
                dot[r][1][0].add(low1, a);
            }
            const I32 high0 = high_nibbles(w0), high1 = high_nibbles(w1);
#pragma GCC unroll kUnroll
            for (int r = 0; r < R; ++r) {
                const I32 a = broadcast_quad(q + r * kGroup + octet * 8 + 4);
                dot[r][0][kChains - 1].add(high0, a);
                dot[r][1][kChains - 1].add(high1, a);
            }
        }
    } else {
#pragma GCC unroll kUnroll
        for (int quad = 0; quad < 8; ++quad) {
            const I32 w0 = load_i32(quants + quad * kRowBytes), w1 = load_i32(quants + quad * kRowBytes + 64);
#pragma GCC unroll kUnroll
            for (int r = 0; r < R; ++r) {
                const I32 a = broadcast_quad(q + r * kGroup + quad * 4);
                dot[r][0][quad % kChains].add(w0, a);
                dot[r][1][quad % kChains].add(w1, a);
            }
        }
    }
    const F32 d0 = load_f16(scales), d1 = load_f16(scales + kLanes);
    F32 m0, m1;
    if constexpr (MIN) {
        m0 = load_f16(mins);
        m1 = load_f16(mins + kLanes);
    }
#pragma GCC unroll kUnroll
    for (int r = 0; r < R; ++r) {
        I32 dot0 = dot[r][0][0].finish(), dot1 = dot[r][1][0].finish();
        if constexpr (kChains == 2) {
            dot0 = dot0 + dot[r][0][1].finish();
            dot1 = dot1 + dot[r][1][1].finish();
        }
        const F32 s = set1(scale[r]);
        F32(&y)[2] = sums.y[r];
        y[0] = fma(to_f32(dot0) * d0, s, y[0]);
        y[1] = fma(to_f32(dot1) * d1, s, y[1]);
        if constexpr (MIN) {
            const F32 t = set1(scaled_sum[r]);
            y[0] = fma(m0, t, y[0]);
            y[1] = fma(m1, t, y[1]);
        }
    }
}

// Cells are read in the order they lie in memory, with one sequential stream per thread.
template <int BITS, bool MIN, int R>
void strip_rows(const Matrix& w, const uint8_t* strip, int first_half, int last_half, const QuantRows& x, int row,
                float* out, Ahead ahead) {
    const int groups = w.num_groups();
    const int quant_bytes = kStrip * kGroup * BITS / 8, half_bytes = quant_bytes / 2;
    const int cell_bytes = w.cell_bytes();
    const auto add_half = [&](int g, int half, Sums<R>& sums) SERAPH_INLINE_LAMBDA {
        const uint8_t* cell = strip + static_cast<int64_t>(g) * cell_bytes;
        const uint16_t* scales = reinterpret_cast<const uint16_t*>(cell + quant_bytes);
        const int64_t at = QuantRows::place(w.k, row, g);
        const int8_t* quads = x.q + at * kGroup;
        // Or GCC computes the address of every quad once for both halves, keeps them all on the stack, and loads each
        // of them before each quad.
        opaque(quads);
        cell_half<BITS, MIN, R>(cell + half * half_bytes, scales + half * 32, scales + kStrip + half * 32, quads,
                                x.scale + at, x.scaled_sum + at, x.start + at, sums);
    };
    const int near = ahead.near ? ahead.step : 0, far = ahead.step - near;
    const auto fetch = [&](int g) SERAPH_INLINE_LAMBDA {
        for (int line = 0; line < far; line += 64)
            __builtin_prefetch(ahead.from + static_cast<int64_t>(g) * far + line, 0, 2);
        for (int line = 0; line < near; line += 64)
            __builtin_prefetch(ahead.from + static_cast<int64_t>(g) * near + line, 0, 3);
    };
    for (int r = 0; r < R; ++r) {
        for (int c = first_half * 32; c < last_half * 32; c += kLanes)
            store(out + r * kStrip + c, zero_f32());
    }
    if constexpr (R <= kRegisters / 16) { // the float sums have registers too
        if (last_half - first_half == 2) {
            Sums<R> left, right;
            left.load_from(out);
            right.load_from(out);
            for (int g = 0; g < groups; ++g) {
                fetch(g);
                add_half(g, 0, left);
                add_half(g, 1, right);
            }
            left.store_to(out);
            right.store_to(out + 32);
            return;
        }
    }
    // The float sums wait in memory, where a load and a store per group cost less than the registers they would take.
    for (int g = 0; g < groups; ++g) {
        fetch(g);
        for (int half = first_half; half < last_half; ++half) {
            Sums<R> sums;
            sums.load_from(out + half * 32);
            add_half(g, half, sums);
            sums.store_to(out + half * 32);
            // Without this GCC carries the float sums of one group over to the next in copies on the stack (predictive
            // commoning), which costs a fifth of the time at 8 rows.
            asm volatile("" ::: "memory");
        }
    }
}

template <int BITS, bool MIN>
void dispatch_rows(const Matrix& w, const uint8_t* strip, int first, int last, const QuantRows& x, int row, int rows,
                   float* out, Ahead ahead) {
    // Eight rows of whole bytes have more sums than sixteen registers hold, as four have not.
    if (BITS == 8 && kRegisters < 32 && rows > 4) {
        dispatch_rows<BITS, MIN>(w, strip, first, last, x, row, 4, out, ahead);
        return dispatch_rows<BITS, MIN>(w, strip, first, last, x, row + 4, rows - 4, out + 4 * kStrip, {});
    }
    switch (rows) {
    case 1:
        return strip_rows<BITS, MIN, 1>(w, strip, first, last, x, row, out, ahead);
    case 2:
        return strip_rows<BITS, MIN, 2>(w, strip, first, last, x, row, out, ahead);
    case 3:
        return strip_rows<BITS, MIN, 3>(w, strip, first, last, x, row, out, ahead);
    case 4:
        return strip_rows<BITS, MIN, 4>(w, strip, first, last, x, row, out, ahead);
    case 5:
        return strip_rows<BITS, MIN, 5>(w, strip, first, last, x, row, out, ahead);
    case 6:
        return strip_rows<BITS, MIN, 6>(w, strip, first, last, x, row, out, ahead);
    case 7:
        return strip_rows<BITS, MIN, 7>(w, strip, first, last, x, row, out, ahead);
    default:
        return strip_rows<BITS, MIN, 8>(w, strip, first, last, x, row, out, ahead);
    }
}

} // namespace

Ahead ahead_of(const Matrix& w, int strip, int pass, int passes, int rows) {
    const uint8_t* own = w.data + strip * w.strip_bytes();
    const int cell = w.cell_bytes();
    // The more there is to compute for each byte, the less far ahead the hardware fetches: without this, from memory, 4
    // rows took a quarter longer and 8 rows of 8-bit weights twice as long. Only one row of those it serves better
    // alone, where registers are so wide that there is next to nothing to compute.
    if (passes == 1)
        return {own + kFetch, w.bits == 4 || rows > 1 || kRegisters < 32 ? cell : 0, false};
    // The strip stays in the first-level cache, or all but, for the passes that follow.
    if (pass == 0)
        return {own + 2 * cell, cell, true};
    // They find it there and have time to fetch the next one, a share each.
    const int step = (cell / (passes - 1) + 63) / 64 * 64;
    return {own + w.strip_bytes() + static_cast<int64_t>(pass - 1) * w.num_groups() * step, step, false};
}

void project_strip(const Matrix& w, int strip, int first_half, int last_half, const InputRows& x, int row, int rows,
                   float* out, Ahead ahead) {
    if (!w.quantized())
        return project_strip_bf16(w, strip, first_half, last_half, x.values, row, rows, out);
    const uint8_t* data = w.data + strip * w.strip_bytes();
    if (w.bits == 4) {
        return w.min ? dispatch_rows<4, true>(w, data, first_half, last_half, x.quants, row, rows, out, ahead)
                     : dispatch_rows<4, false>(w, data, first_half, last_half, x.quants, row, rows, out, ahead);
    }
    return w.min ? dispatch_rows<8, true>(w, data, first_half, last_half, x.quants, row, rows, out, ahead)
                 : dispatch_rows<8, false>(w, data, first_half, last_half, x.quants, row, rows, out, ahead);
}

int tile_rows(int rows, int threads) {
    const auto divided = [](int a, int b) { return (a + b - 1) / b; }; // rounded up
    // A thread with one pass over each strip would be bound by reading them.
    const int own = std::min(threads, rows / (2 * kMaxRows));
    const int chunks = std::max({divided(rows, kTileRows), own, 1});
    return std::max(divided(divided(rows, chunks), kMaxRows), 1) * kMaxRows;
}

void dequantize_row(const Matrix& w, int n, float* out) {
    const int lane = n % kStrip, vector = lane / kLanes;
    const uint8_t* cell = w.data + n / kStrip * w.strip_bytes();
    const int zero_point = w.min ? 0 : 1 << (w.bits - 1);
    for (int g = 0; g < w.num_groups(); ++g, cell += w.cell_bytes(), out += kGroup) {
        const uint8_t* values = cell + lane / 32 * (w.value_bytes() / 2) + lane % 32 * 4;
        if (!w.quantized()) {
            for (int k = 0; k < kGroup; ++k) {
                uint16_t bits;
                std::memcpy(&bits, values + k / 2 * kRowBytes + k % 2 * 2, 2);
                out[k] = from_bf16(bits);
            }
            continue;
        }
        // A vector's 16 scales are converted for one of them: the twin of what the projections read.
        const uint16_t* scales = reinterpret_cast<const uint16_t*>(cell + w.value_bytes()) + vector * kLanes;
        float d[kLanes], m[kLanes] = {};
        store(d, load_f16(scales));
        if (w.min)
            store(m, load_f16(scales + kStrip));
        for (int k = 0; k < kGroup; ++k) {
            int quant;
            if (w.bits == 4) {
                const uint8_t byte = values[k / 8 * kRowBytes + k % 4];
                quant = k % 8 < 4 ? byte & 15 : byte >> 4;
            } else {
                quant = values[k / 4 * kRowBytes + k % 4];
            }
            const float scaled = d[lane % kLanes] * static_cast<float>(quant - zero_point);
            out[k] = w.min ? scaled + m[lane % kLanes] : scaled;
        }
    }
}

} // namespace seraph
