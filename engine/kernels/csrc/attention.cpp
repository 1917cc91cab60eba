#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd.h"

namespace seraph {

void write_kv(uint16_t* keys, uint16_t* values, int head_dim, int slot, const float* key, const float* value) {
    for (int d = 0; d < head_dim; ++d) {
        keys[(d / 2 * kBlock + slot) * 2 + d % 2] = to_bf16(key[d]);
        values[(slot / 2 * head_dim + d) * 2 + slot % 2] = to_bf16(value[d]);
    }
}

namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

// scores[i * 32 + t] = query i . key t, for the 32 tokens of a block. Two dimensions a step, in order.
template <int N>
void score_block(const uint16_t* keys, int head_dim, const float* const* queries, float* scores) {
    F32 s[N][2];
#pragma GCC unroll 12
    for (int i = 0; i < N; ++i)
        s[i][0] = s[i][1] = zero_f32();
    for (int pair = 0; pair < head_dim / 2; ++pair) {
        const I32 k0 = load_i32(keys + pair * 64), k1 = load_i32(keys + pair * 64 + 32);
        const F32 even0 = bf16_even(k0), even1 = bf16_even(k1), odd0 = bf16_odd(k0), odd1 = bf16_odd(k1);
#pragma GCC unroll 12
        for (int i = 0; i < N; ++i) {
            const F32 q0 = set1(queries[i][2 * pair]), q1 = set1(queries[i][2 * pair + 1]);
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

// out[i][d] += sum over t < counts[i] of weights[i * 32 + t] * value[t][d], for D * 16 dimensions from `d` on.
// Tokens past a query's count are not multiplied by zero but not read: their memory may hold anything.
template <int N, int D>
SERAPH_INLINE void weigh_values(const uint16_t* values, int head_dim, int d, const float* weights, const int* counts,
                                int least, Softmax* const* states) {
    F32 o[N][D];
#pragma GCC unroll 12
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
        for (int c = 0; c < D; ++c)
            o[i][c] = load(states[i]->out + d + c * kLanes);
    }
    int t = 0;
    for (; t + 2 <= least; t += 2) {
#pragma GCC unroll 4
        for (int c = 0; c < D; ++c) {
            const I32 v = load_i32(values + (t / 2 * head_dim + d + c * kLanes) * 2);
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
                const I32 v = load_i32(values + (u / 2 * head_dim + d + c * kLanes) * 2);
                store(out, fma(set1(weights[i * kBlock + u]), u % 2 ? bf16_odd(v) : bf16_even(v), load(out)));
            }
        }
    }
}

// One block for N queries: scores, running softmax, weighted values.
template <int N>
void attend_block(const uint16_t* keys, const uint16_t* values, int head_dim, const float* const* queries,
                  const int* counts, Softmax* const* states) {
    alignas(64) float weights[N * kBlock];
    score_block<N>(keys, head_dim, queries, weights);
    int least = kBlock;
    for (int i = 0; i < N; ++i) {
        float* w = weights + i * kBlock;
        Softmax& state = *states[i];
        least = std::min(least, counts[i]);
        F32 s0 = load(w), s1 = load(w + kLanes);
        const Mask valid0 = first_lanes(std::min(counts[i], kLanes)),
                   valid1 = first_lanes(std::max(counts[i] - kLanes, 0));
        if (counts[i] < kBlock) {
            s0 = select(valid0, s0, set1(kMinusInf));
            s1 = select(valid1, s1, set1(kMinusInf));
        }
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
        if (counts[i] < kBlock) {
            p0 = select(valid0, p0, zero_f32());
            p1 = select(valid1, p1, zero_f32());
        }
        store(state.sum, sum + (p0 + p1));
        store(w, p0);
        store(w + kLanes, p1);
    }
    constexpr int kDims = N <= 3 ? 4 : N <= 6 ? 2 : 1; // enough independent sums to hide the latency of one
    int d = 0;
    for (; d + kDims * kLanes <= head_dim; d += kDims * kLanes) {
        weigh_values<N, kDims>(values, head_dim, d, weights, counts, least, states);
    }
    for (; d < head_dim; d += kLanes)
        weigh_values<N, 1>(values, head_dim, d, weights, counts, least, states);
}

using AttendBlock = void (*)(const uint16_t*, const uint16_t*, int, const float* const*, const int*, Softmax* const*);
constexpr AttendBlock kAttendBlock[kMaxQueries + 1] = {
    nullptr,          attend_block<1>,  attend_block<2>, attend_block<3>, attend_block<4>,
    attend_block<5>,  attend_block<6>,  attend_block<7>, attend_block<8>, attend_block<9>,
    attend_block<10>, attend_block<11>, attend_block<12>};

} // namespace

void attend_segment(const KvCache& kv, const int32_t* block_table, int layer, int head, int first,
                    const float* const* queries, const int* limits, int num_queries, Softmax* states) {
    int last = 0;
    for (int i = 0; i < num_queries; ++i) {
        states[i].max = kMinusInf;
        std::fill_n(states[i].sum, kLanes, 0.0f);
        std::fill_n(states[i].out, kv.head_dim, 0.0f);
        last = std::max(last, limits[i]);
    }
    last = std::min(last, first + kSegment);
    for (int position = first; position < last; position += kBlock) {
        // Queries whose sequence ends before this block drop out of it.
        const float* q[kMaxQueries];
        int counts[kMaxQueries], n = 0;
        Softmax* live[kMaxQueries];
        for (int i = 0; i < num_queries; ++i) {
            const int count = std::min(limits[i], last) - position;
            if (count <= 0)
                continue;
            q[n] = queries[i];
            live[n] = states + i;
            counts[n++] = std::min(count, kBlock);
        }
        const int block = block_table[position / kBlock];
        kAttendBlock[n](kv.keys(block, layer, head), kv.values(block, layer, head), kv.head_dim, q, counts, live);
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
