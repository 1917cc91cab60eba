// The phases of a decoder's layers that have several experts in place of one feed-forward.
#include <algorithm>
#include <vector>

#include "decoder.h"
#include "simd.h"

namespace seraph {

// The experts of some tokens: those with the largest logits of the router, of equal ones the first. Their weights are
// the softmax of all logits, or, normalized, of theirs alone.
void Decoder::route(int layer, int tile) {
    const Matrix& w = weights_.layers[layer].router;
    const int experts = shape_.num_experts, wanted = shape_.experts_per_token;
    const int begin = tile * kRowsPerTile, rows = std::min(kRowsPerTile, step_.num_tokens - begin);
    std::vector<float> logits(static_cast<size_t>(kRowsPerTile) * w.num_strips() * kStrip);
    alignas(64) float out[kMaxRows * kStrip];
    const int width = w.num_strips() * kStrip;
    for (int strip = 0; strip < w.num_strips(); ++strip) {
        project_strip(w, strip, 0, 2, {{}, shared_.values.data()}, begin, rows, out);
        for (int r = 0; r < rows; ++r)
            std::copy_n(out + r * kStrip, kStrip, logits.data() + static_cast<int64_t>(r) * width + strip * kStrip);
    }
    std::vector<uint8_t> taken(static_cast<size_t>(experts));
    for (int r = 0; r < rows; ++r) {
        const float* row = logits.data() + static_cast<int64_t>(r) * width;
        int32_t* chosen = routing_.expert.data() + static_cast<int64_t>(begin + r) * wanted;
        float* weights = routing_.weight.data() + static_cast<int64_t>(begin + r) * wanted;
        std::fill(taken.begin(), taken.end(), uint8_t{0});
        for (int slot = 0; slot < wanted; ++slot) {
            int best = -1;
            for (int e = 0; e < experts; ++e) {
                if (!taken[static_cast<size_t>(e)] && (best < 0 || row[e] > row[best]))
                    best = e;
            }
            taken[static_cast<size_t>(best)] = 1;
            chosen[slot] = best;
            weights[slot] = exp1(row[best] - row[chosen[0]]);
        }
        float sum = 0;
        if (shape_.normalize_experts) {
            for (int slot = 0; slot < wanted; ++slot)
                sum += weights[slot];
        } else {
            for (int e = 0; e < experts; ++e)
                sum += exp1(row[e] - row[chosen[0]]);
        }
        for (int slot = 0; slot < wanted; ++slot)
            weights[slot] /= sum;
    }
}

void Decoder::dispatch() {
    Routing& r = routing_;
    const int choices = step_.num_tokens * shape_.experts_per_token;
    std::fill_n(r.count.begin(), shape_.num_experts, 0);
    for (int i = 0; i < choices; ++i)
        ++r.count[r.expert[i]];
    r.active.clear();
    r.num_rows = 0;
    for (int e = 0; e < shape_.num_experts; ++e) {
        r.first[e] = r.num_rows;
        if (r.count[e] > 0)
            r.active.push_back(e);
        r.num_rows += static_cast<int>(QuantRows::whole(r.count[e]));
    }
    std::fill_n(r.token_of.begin(), r.num_rows, -1);
    std::vector<int32_t> next(r.first);
    for (int i = 0; i < choices; ++i) {
        r.row_of[i] = next[r.expert[i]]++;
        r.token_of[r.row_of[i]] = i / shape_.experts_per_token;
    }
}

// The inputs of kMaxRows rows of the experts, copied from those of their tokens.
void Decoder::gather(int tile, bool quantized) {
    const int n = shape_.hidden, groups = n / kGroup;
    const QuantRows from = shared_.quants(), to = routed_.quants();
    for (int row = tile * kMaxRows; row < std::min((tile + 1) * kMaxRows, routing_.num_rows); ++row) {
        const int token = routing_.token_of[row];
        if (token < 0)
            continue;
        if (!quantized) {
            std::copy_n(shared_.values.data() + static_cast<int64_t>(token) * n, n,
                        routed_.values.data() + static_cast<int64_t>(row) * n);
            continue;
        }
        for (int g = 0; g < groups; ++g) {
            const int64_t source = QuantRows::place(n, token, g), target = QuantRows::place(n, row, g);
            std::copy_n(from.q + source * kGroup, kGroup, to.q + target * kGroup);
            to.scale[target] = from.scale[source];
            to.scaled_sum[target] = from.scaled_sum[source];
            to.start[target] = from.start[source];
        }
    }
}

// What its experts make of a token, the best one's first.
void Decoder::combine(int layer, int tile) {
    const int n = shape_.hidden, wanted = shape_.experts_per_token;
    const bool waits = weights_.layers[layer].post_ffn_norm;
    const int end = std::min((tile + 1) * kRowsPerTile, step_.num_tokens);
    for (int token = tile * kRowsPerTile; token < end; ++token) {
        float* x = (waits ? branch_ : x_).data() + static_cast<int64_t>(token) * n;
        const int32_t* rows = routing_.row_of.data() + static_cast<int64_t>(token) * wanted;
        const float* weights = routing_.weight.data() + static_cast<int64_t>(token) * wanted;
        for (int i = 0; i < n; i += kLanes) {
            F32 sum = zero_f32();
            for (int slot = 0; slot < wanted; ++slot)
                sum =
                    fma(set1(weights[slot]), load(routed_out_.data() + static_cast<int64_t>(rows[slot]) * n + i), sum);
            store(x + i, waits ? sum : load(x + i) + sum);
        }
    }
}

} // namespace seraph
