#include "attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "simd.h"

namespace seraph {

namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// The scales behind one head's keys, or values, of 8 bits.
template <class Byte>
auto* scales_of(Byte* side, int head_dim) {
    using Scale = std::conditional_t<std::is_const_v<Byte>, const float, float>;
    return reinterpret_cast<Scale*>(side + head_dim * kBlock);
}

constexpr float kMost8 = 127.0f, kMost16 = 32767.0f; // levels of quants to either side of zero

float largest_size(const float* x, int n) {
    F32 top = zero_f32();
    for (int i = 0; i < n; i += kLanes)
        top = max(top, abs(load(x + i)));
    return reduce_max(top);
}

// Quants x / scale of one vector, float32 [head_dim], put where at(d) says; returns the scale.
template <class At>
float quantize(const float* x, int head_dim, const At& at) {
    const float amax = largest_size(x, head_dim);
    const F32 levels = set1(levels_per_unit(amax, kMost8));
    for (int d = 0; d < head_dim; d += kLanes) {
        int8_t quants[kLanes];
        store_i8(quants, round_i32(load(x + d) * levels));
        for (int i = 0; i < kLanes; ++i)
            *at(d + i) = quants[i];
    }
    return amax / kMost8;
}

// A line that is read soon, into the second-level cache: the first has few places for lines that are on their way, and
// while those are taken, what is at hand waits behind what comes from memory.
SERAPH_INLINE void fetch(const uint8_t* line) {
    __builtin_prefetch(line, 0, 2);
}

// Of 32 lanes those outside [begin, end) become `other`.
SERAPH_INLINE void only(F32& a, F32& b, int begin, int end, float other) {
    if (end < kBlock) {
        a = select(first_lanes(std::min(end, kLanes)), a, set1(other));
        b = select(first_lanes(std::max(end - kLanes, 0)), b, set1(other));
    }
    if (begin > 0) {
        a = select(first_lanes(std::min(begin, kLanes)), set1(other), a);
        b = select(first_lanes(std::max(begin - kLanes, 0)), set1(other), b);
    }
}

// The scales behind one head's keys, or values, of 8 bits, fetched.
SERAPH_INLINE void fetch_scales(const uint8_t* side, int head_dim) {
    for (int at = 0; at < kBlock * static_cast<int>(sizeof(float)); at += 64)
        fetch(side + head_dim * kBlock + at);
}

// scores[i * 32 + t] = query i . key t, for the 32 tokens of a block, dimension by dimension. Meanwhile the keys that
// come next, `ahead`, are fetched: a block's few kilobytes are too short for the machine to notice that they are read
// from front to back, so without this every block begins with waiting.
template <int N, bool INT8>
void score_block(const uint8_t* keys, const uint8_t* ahead, int head_dim, const Query* const* queries, float* scores) {
    if constexpr (INT8) {
        // Sums of 16-bit products are exact: up to 512 dimensions of 127 * 32767 fit 32 bits. Many queries go over half
        // the tokens at a time, or their sums would not all stay in registers.
        constexpr int kVectors = N <= 6 ? 2 : 1;
        const float* scales = scales_of(keys, head_dim);
        fetch_scales(ahead, head_dim);
        for (int first = 0; first < 2; first += kVectors) {
            I32 dots[N][kVectors];
#pragma GCC unroll 12
            for (int i = 0; i < N; ++i) {
                for (int v = 0; v < kVectors; ++v)
                    dots[i][v] = set1_i32(0);
            }
#pragma GCC unroll 2
            for (int pair = 0; pair < head_dim / 2; ++pair) {
                I32 k[kVectors];
                for (int v = 0; v < kVectors; ++v)
                    k[v] = load_i8_pairs(reinterpret_cast<const int8_t*>(keys) + pair * 64 + (first + v) * 32);
                if (first == 0)
                    fetch(ahead + pair * 64);
#pragma GCC unroll 12
                for (int i = 0; i < N; ++i) {
                    const I32 q = broadcast_pair(queries[i]->quants + 2 * pair);
                    for (int v = 0; v < kVectors; ++v)
                        dots[i][v] = dot_pairs(dots[i][v], k[v], q);
                }
            }
#pragma GCC unroll 12
            for (int i = 0; i < N; ++i) {
                for (int v = 0; v < kVectors; ++v) {
                    const int at = (first + v) * kLanes;
                    store(scores + i * kBlock + at, to_f32(dots[i][v]) * load(scales + at) * set1(queries[i]->scale));
                }
            }
        }
        return;
    }
    F32 s[N][2];
#pragma GCC unroll 12
    for (int i = 0; i < N; ++i)
        s[i][0] = s[i][1] = zero_f32();
    for (int pair = 0; pair < head_dim / 2; ++pair) {
        fetch(ahead + pair * 128);
        fetch(ahead + pair * 128 + 64);
        const I32 k0 = load_i32(keys + pair * 128), k1 = load_i32(keys + pair * 128 + 64);
        const F32 even0 = bf16_even(k0), even1 = bf16_even(k1), odd0 = bf16_odd(k0), odd1 = bf16_odd(k1);
#pragma GCC unroll 12
        for (int i = 0; i < N; ++i) {
            const F32 q0 = set1(queries[i]->values[2 * pair]), q1 = set1(queries[i]->values[2 * pair + 1]);
            s[i][0] = fma(q1, odd0, fma(q0, even0, s[i][0]));
            s[i][1] = fma(q1, odd1, fma(q0, even1, s[i][1]));
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < N; ++i) {
        store(scores + i * kBlock, s[i][0]);
        store(scores + i * kBlock + kLanes, s[i][1]);
    }
}

// out[i][d] += sum over t < counts[i] of weights[i * 32 + t] * value[t][d], for D * 16 dimensions from `d` on. Tokens
// past a query's count are not multiplied by zero but not read: their memory may hold anything.
template <int N, int D>
SERAPH_INLINE void weigh_values(const uint8_t* values, const uint8_t* ahead, int head_dim, int d, const float* weights,
                                const int* counts, int least, Softmax* const* states) {
    F32 o[N][D];
#pragma GCC unroll 12
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
        for (int c = 0; c < D; ++c)
            o[i][c] = load(states[i]->out + d + c * kLanes);
    }
    const auto pairs = [&](int token, int c) SERAPH_INLINE_LAMBDA {
        return load_i32(values + (token / 2 * head_dim + d + c * kLanes) * 4);
    };
    int t = 0;
    for (; t + 2 <= least; t += 2) {
#pragma GCC unroll 4
        for (int c = 0; c < D; ++c) {
            const I32 v = pairs(t, c);
            fetch(ahead + (t / 2 * head_dim + d + c * kLanes) * 4);
            const F32 even = bf16_even(v), odd = bf16_odd(v);
#pragma GCC unroll 12
            for (int i = 0; i < N; ++i) {
                o[i][c] =
                    fma(set1(weights[i * kBlock + t + 1]), odd, fma(set1(weights[i * kBlock + t]), even, o[i][c]));
            }
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
        for (int c = 0; c < D; ++c)
            store(states[i]->out + d + c * kLanes, o[i][c]);
    }
    // The ragged ends, query by query, in the same order of tokens.
    for (int i = 0; i < N; ++i) {
        for (int u = t; u < counts[i]; ++u) {
            for (int c = 0; c < D; ++c) {
                float* out = states[i]->out + d + c * kLanes;
                const F32 v = u % 2 ? bf16_odd(pairs(u, c)) : bf16_even(pairs(u, c));
                store(out, fma(set1(weights[i * kBlock + u]), v, load(out)));
            }
        }
    }
}

// The same of 8-bit values and 16-bit weights, [N][32] and a scale each, whose sums are exact. A weight past a query's
// count is zero, which makes any byte nothing: no pair of tokens from `most` on is read.
template <int N, int D>
SERAPH_INLINE void weigh_quants(const uint8_t* values, const uint8_t* ahead, int head_dim, int d,
                                const int16_t* weights, const float* scales, int most, Softmax* const* states) {
    I32 sums[N][D];
#pragma GCC unroll 12
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
        for (int c = 0; c < D; ++c)
            sums[i][c] = set1_i32(0);
    }
#pragma GCC unroll 4
    for (int t = 0; t < most; t += 2) {
        const int at = (t / 2 * head_dim + d) * 2;
#pragma GCC unroll 4
        for (int c = 0; c < D; ++c) {
            const I32 v = load_i8_pairs(reinterpret_cast<const int8_t*>(values) + at + c * 2 * kLanes);
            if (c % 2 == 0) // of 32 bytes each
                fetch(ahead + at + c * 2 * kLanes);
#pragma GCC unroll 12
            for (int i = 0; i < N; ++i)
                sums[i][c] = dot_pairs(sums[i][c], v, broadcast_pair(weights + i * kBlock + t));
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
        for (int c = 0; c < D; ++c) {
            float* out = states[i]->out + d + c * kLanes;
            store(out, fma(to_f32(sums[i][c]), set1(scales[i]), load(out)));
        }
    }
}

// One block for N queries: scores, running softmax, weighted values. Query i attends tokens [begins[i], counts[i]), at
// least one. The next block's keys and values are fetched on the way.
template <int N, bool INT8>
void attend_block(const uint8_t* keys, const uint8_t* values, const uint8_t* keys_ahead, const uint8_t* values_ahead,
                  int head_dim, float softcap, const Query* const* queries, const int* begins, const int* counts,
                  Softmax* const* states) {
    alignas(64) float weights[N * kBlock];
    alignas(64) int16_t quants[INT8 ? N * kBlock : 1];
    float scales[N];
    score_block<N, INT8>(keys, keys_ahead, head_dim, queries, weights);
    int least = kBlock, most = 0;
    for (int i = 0; i < N; ++i) {
        float* w = weights + i * kBlock;
        Softmax& state = *states[i];
        least = std::min(least, counts[i]);
        most = std::max(most, counts[i]);
        F32 s0 = load(w), s1 = load(w + kLanes);
        if (softcap > 0) {
            s0 = softcapped(s0, softcap);
            s1 = softcapped(s1, softcap);
        }
        only(s0, s1, begins[i], counts[i], kMinusInf);
        const float top = reduce_max(max(s0, s1));
        F32 sum = load(state.sum);
        if (top > state.max) {
            if (state.max != kMinusInf) { // rescaling by exactly 1 is skipped: the same bits
                const F32 shrink = exp(set1(state.max - top));
                sum = sum * shrink;
                for (int d = 0; d < head_dim; d += kLanes)
                    store(state.out + d, load(state.out + d) * shrink);
            }
            state.max = top;
        }
        const F32 shift = set1(state.max);
        F32 p0 = exp(s0 - shift), p1 = exp(s1 - shift);
        only(p0, p1, begins[i], counts[i], 0.0f);
        store(state.sum, sum + (p0 + p1));
        store(w, p0);
        store(w + kLanes, p1);
    }
    if constexpr (INT8)
        fetch_scales(values_ahead, head_dim);
    // A loop of its own, for each turn is one long chain: so those of several queries overlap.
    for (int i = 0; INT8 && i < N; ++i) {
        const float* value_scales = scales_of(values, head_dim);
        F32 p0 = load(weights + i * kBlock) * load(value_scales),
            p1 = load(weights + i * kBlock + kLanes) * load(value_scales + kLanes);
        only(p0, p1, 0, counts[i], 0.0f); // what lies past the count may have any scale
        const float amax = reduce_max(max(p0, p1));
        const F32 levels = set1(levels_per_unit(amax, kMost16));
        store_i16(quants + i * kBlock, round_i32(p0 * levels));
        store_i16(quants + i * kBlock + kLanes, round_i32(p1 * levels));
        scales[i] = amax / kMost16;
    }
    constexpr int kDims = N <= 3 ? 4 : N <= 6 ? 2 : 1; // enough independent sums to hide the latency of one
    const auto weigh = [&]<int D>(std::integral_constant<int, D>, int d) SERAPH_INLINE_LAMBDA {
        if constexpr (INT8)
            weigh_quants<N, D>(values, values_ahead, head_dim, d, quants, scales, most, states);
        else
            weigh_values<N, D>(values, values_ahead, head_dim, d, weights, counts, least, states);
    };
    int d = 0;
    for (; d + kDims * kLanes <= head_dim; d += kDims * kLanes)
        weigh(std::integral_constant<int, kDims>(), d);
    for (; d < head_dim; d += kLanes)
        weigh(std::integral_constant<int, 1>(), d);
    // Of a block that is not full the rest of the next one's lines have not been passed.
    const int pair_bytes = (INT8 ? 2 : 4) * head_dim;
    for (int at = (INT8 ? most + 1 : least) / 2 * pair_bytes; at < kBlock / 2 * pair_bytes; at += 64)
        fetch(values_ahead + at);
}

using AttendBlock = void (*)(const uint8_t*, const uint8_t*, const uint8_t*, const uint8_t*, int, float,
                             const Query* const*, const int*, const int*, Softmax* const*);

// attend_block of 1, 2, ... kMaxQueries queries.
template <bool INT8, int... LESS>
constexpr std::array<AttendBlock, kMaxQueries> attend_blocks(std::integer_sequence<int, LESS...>) {
    return {attend_block<LESS + 1, INT8>...};
}

} // namespace

void KvCache::write(int block, int layer, int head, int slot, const float* key, const float* value) const {
    uint8_t *k = keys(block, layer, head), *v = values(block, layer, head);
    const auto key_at = [&](int d) { return (d / 2 * kBlock + slot) * 2 + d % 2; };
    const auto value_at = [&](int d) { return (slot / 2 * head_dim + d) * 2 + slot % 2; };
    if (int8) {
        int8_t *k8 = reinterpret_cast<int8_t*>(k), *v8 = reinterpret_cast<int8_t*>(v);
        scales_of(k, head_dim)[slot] = quantize(key, head_dim, [&](int d) { return k8 + key_at(d); });
        scales_of(v, head_dim)[slot] = quantize(value, head_dim, [&](int d) { return v8 + value_at(d); });
        return;
    }
    uint16_t *k16 = reinterpret_cast<uint16_t*>(k), *v16 = reinterpret_cast<uint16_t*>(v);
    // Rounded many at a time, then spread.
    uint16_t lanes[kLanes];
    for (int d = 0; d < head_dim; d += kLanes) {
        store_bf16(lanes, load(key + d));
        for (int i = 0; i < kLanes; i += 2)
            std::memcpy(k16 + key_at(d + i), lanes + i, 2 * sizeof(uint16_t));
        store_bf16(lanes, load(value + d));
        for (int i = 0; i < kLanes; ++i)
            v16[value_at(d + i)] = lanes[i];
    }
}

void KvCache::write_two(int block, int layer, int head, int slot, const float* two_keys, const float* two_values,
                        int stride) const {
    if (int8) {
        write(block, layer, head, slot, two_keys, two_values);
        write(block, layer, head, slot + 1, two_keys + stride, two_values + stride);
        return;
    }
    uint16_t* k16 = reinterpret_cast<uint16_t*>(keys(block, layer, head));
    uint16_t* v16 = reinterpret_cast<uint16_t*>(values(block, layer, head)) + slot * head_dim;
    uint16_t lanes[2][kLanes];
    for (int d = 0; d < head_dim; d += kLanes) {
        store_bf16(lanes[0], load(two_keys + d));
        store_bf16(lanes[1], load(two_keys + stride + d));
        for (int i = 0; i < kLanes; i += 2) { // the two tokens' pairs of dims lie side by side
            uint16_t* to = k16 + ((d + i) / 2 * kBlock + slot) * 2;
            std::memcpy(to, lanes[0] + i, 2 * sizeof(uint16_t));
            std::memcpy(to + 2, lanes[1] + i, 2 * sizeof(uint16_t));
        }
        store_bf16_pairs(v16 + 2 * d, load(two_values + d), load(two_values + stride + d));
    }
}

Query quantized_query(const float* x, int head_dim, int16_t* quants) {
    const float amax = largest_size(x, head_dim);
    const F32 levels = set1(levels_per_unit(amax, kMost16));
    for (int d = 0; d < head_dim; d += kLanes)
        store_i16(quants + d, round_i32(load(x + d) * levels));
    return {x, quants, amax / kMost16};
}

void attend_segment(const KvCache& kv, const int32_t* block_table, int layer, int head, int first, const Query* queries,
                    const Span* spans, int num_queries, float softcap, const uint8_t* after, Softmax* states) {
    constexpr auto kCounts = std::make_integer_sequence<int, kMaxQueries>();
    static constexpr auto kBf16 = attend_blocks<false>(kCounts), kInt8 = attend_blocks<true>(kCounts);
    const auto& attend = kv.int8 ? kInt8 : kBf16;
    int last = 0;
    for (int i = 0; i < num_queries; ++i) {
        states[i].max = kMinusInf;
        std::fill_n(states[i].sum, kLanes, 0.0f);
        std::fill_n(states[i].out, kv.head_dim, 0.0f);
        last = std::max(last, spans[i].limit);
    }
    last = std::min(last, first / kSegment * kSegment + kSegment);
    for (int position = first; position < last; position += kBlock) {
        // Queries whose span ends before this block, or begins after it, drop out of it.
        const Query* q[kMaxQueries];
        int begins[kMaxQueries], counts[kMaxQueries], n = 0;
        Softmax* live[kMaxQueries];
        for (int i = 0; i < num_queries; ++i) {
            const int begin = std::max(spans[i].low - position, 0);
            const int count = std::min(std::min(spans[i].limit, last) - position, kBlock);
            if (count <= begin)
                continue;
            q[n] = queries + i;
            live[n] = states + i;
            begins[n] = begin;
            counts[n++] = count;
        }
        if (n == 0)
            continue;
        const int block = block_table[position / kBlock];
        const uint8_t* next =
            position + kBlock < last ? kv.keys(block_table[position / kBlock + 1], layer, head) : after;
        attend[n - 1](kv.keys(block, layer, head), kv.values(block, layer, head), next, next + kv.side_bytes(),
                      kv.head_dim, softcap, q, begins, counts, live);
    }
}

void fold(Softmax& into, const Softmax& from, int head_dim) {
    if (from.max == kMinusInf)
        return;
    if (into.max == kMinusInf) {
        into.max = from.max;
        std::copy_n(from.sum, kLanes, into.sum);
        std::copy_n(from.out, head_dim, into.out);
        return;
    }
    const float top = std::max(into.max, from.max);
    const F32 a = exp(set1(into.max - top)), b = exp(set1(from.max - top));
    store(into.sum, fma(load(from.sum), b, load(into.sum) * a));
    for (int d = 0; d < head_dim; d += kLanes)
        store(into.out + d, fma(load(from.out + d), b, load(into.out + d) * a));
    into.max = top;
}

void finish(const Softmax& state, int head_dim, float* out) {
    if (state.max == kMinusInf) {
        std::fill_n(out, head_dim, 0.0f);
        return;
    }
    const F32 inverse = set1(1.0f / reduce_add(load(state.sum)));
    for (int d = 0; d < head_dim; d += kLanes)
        store(out + d, load(state.out + d) * inverse);
}

} // namespace seraph
