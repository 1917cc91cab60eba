#include "step_attention.h"

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace seraph {
namespace {

constexpr int kStateHead = 1 + kLanes; // floats of a stored Softmax before its output: max and sums

} // namespace

StepAttention::StepAttention(const KvCache& kv, int num_heads, int threads)
    : kv_(kv), num_heads_(num_heads), threads_(threads),
      outputs_(static_cast<size_t>(threads), std::vector<float>(static_cast<size_t>(2 * kMaxQueries * kv.head_dim))),
      quants_(static_cast<size_t>(threads), std::vector<int16_t>(static_cast<size_t>(kMaxQueries * kv.head_dim))) {}

// Which rows attend together and which contexts are split changes no bit of any result, only who computes it.
void StepAttention::plan(const Step& step) {
    const int shared_heads = num_heads_ / kv_.num_kv_heads;
    const int rows_per_tile = std::max(1, kMaxQueries / shared_heads);
    const int whole = (step.num_tokens / rows_per_tile + step.num_requests) * kv_.num_kv_heads;
    const bool may_split = whole < 4 * threads_;
    step_ = &step;
    tiles_.clear();
    split_rows_.clear();
    state_at_.resize(std::max(state_at_.size(), static_cast<size_t>(step.num_tokens)));
    int64_t states = 0;
    for (int r = 0; r < step.num_requests; ++r) {
        const int begin = step.query_starts[r], end = step.query_starts[r + 1], length = step.seq_lens[r];
        const bool split = may_split && length > kSegment;
        const int segments = ceil_div(length, kSegment);
        for (int row = begin; split && row < end; ++row) {
            split_rows_.push_back({row, segments});
            state_at_[row] = states;
            states += static_cast<int64_t>(segments) * num_heads_ * (kStateHead + kv_.head_dim);
        }
        for (int row = begin; row < end; row += rows_per_tile) {
            const int rows = std::min(rows_per_tile, end - row);
            const int limit = step.causal ? step.positions[row + rows - 1] + 1 : length;
            for (int head = 0; head < kv_.num_kv_heads; ++head) {
                if (!split) {
                    tiles_.push_back({row, rows, r, head, 0, limit, false});
                    continue;
                }
                // Segments past a row's limit leave an empty state, so every one of them gets its tile.
                for (int first = 0; first < length; first += kSegment)
                    tiles_.push_back({row, rows, r, head, first, std::min(first + kSegment, length), true});
            }
        }
    }
    states_.resize(std::max(states_.size(), static_cast<size_t>(states)));
}

const uint8_t* StepAttention::first_keys(int layer, const Tile& t, int first) const {
    const int32_t* table = step_->block_tables + static_cast<int64_t>(t.request) * step_->max_blocks;
    return kv_.keys(table[first / kBlock], layer, t.head);
}

void StepAttention::attend(int layer, int index, const float* qkv, int64_t width, int thread, float* attended) {
    const Tile& t = tiles_[index];
    const int d = kv_.head_dim, shared_heads = num_heads_ / kv_.num_kv_heads;
    const int32_t* table = step_->block_tables + static_cast<int64_t>(t.request) * step_->max_blocks;
    float* outputs = outputs_[thread].data();
    const int total = t.rows * shared_heads;
    for (int done = 0; done < total; done += kMaxQueries) { // more than once only where over 12 heads share one KV head
        const int n = std::min(kMaxQueries, total - done);
        Query queries[kMaxQueries];
        int limits[kMaxQueries], rows[kMaxQueries], heads[kMaxQueries];
        Softmax segment[kMaxQueries], whole[kMaxQueries];
        for (int i = 0; i < n; ++i) {
            rows[i] = t.row + (done + i) / shared_heads;
            heads[i] = t.head * shared_heads + (done + i) % shared_heads;
            const float* query = qkv + rows[i] * width + heads[i] * d;
            queries[i] =
                kv_.int8 ? quantized_query(query, d, quants_[thread].data() + i * d) : Query{query, nullptr, 1};
            limits[i] = step_->causal ? step_->positions[rows[i]] + 1 : step_->seq_lens[t.request];
            segment[i].out = outputs + i * d;
            whole[i].out = outputs + (kMaxQueries + i) * d;
            whole[i].max = -HUGE_VALF;
        }
        for (int first = t.first; first < t.last; first += kSegment) {
            const bool last = first + kSegment >= t.last;
            const uint8_t* after = !last ? first_keys(layer, t, first + kSegment)
                                   : index + 1 < num_tiles()
                                       ? first_keys(layer, tiles_[index + 1], tiles_[index + 1].first)
                                       : first_keys(layer, t, first);
            attend_segment(kv_, table, layer, t.head, first, queries, limits, n, after, segment);
            for (int i = 0; i < n; ++i) {
                if (t.split) {
                    store_state(segment[i], rows[i], heads[i], first / kSegment);
                } else {
                    fold(whole[i], segment[i], d);
                }
            }
        }
        if (t.split)
            continue;
        for (int i = 0; i < n; ++i)
            finish(whole[i], d, attended + (static_cast<int64_t>(rows[i]) * num_heads_ + heads[i]) * d);
    }
}

float* StepAttention::state_of(int row, int head, int segment) {
    const int64_t size = kStateHead + kv_.head_dim;
    return states_.data() + state_at_[row] + (static_cast<int64_t>(segment) * num_heads_ + head) * size;
}

void StepAttention::store_state(const Softmax& from, int row, int head, int segment) {
    float* to = state_of(row, head, segment);
    to[0] = from.max;
    std::copy_n(from.sum, kLanes, to + 1);
    std::copy_n(from.out, kv_.head_dim, to + kStateHead);
}

// Folds a split row's states in order of position, as attend() does for a row that is not split.
void StepAttention::merge(int i, float* attended) {
    const auto [row, segments] = split_rows_[i];
    const int d = kv_.head_dim;
    for (int head = 0; head < num_heads_; ++head) {
        float* out = attended + (static_cast<int64_t>(row) * num_heads_ + head) * d;
        Softmax whole, part;
        whole.max = -HUGE_VALF;
        whole.out = out;
        for (int s = 0; s < segments; ++s) {
            float* state = state_of(row, head, s);
            part.max = state[0];
            std::copy_n(state + 1, kLanes, part.sum);
            part.out = state + kStateHead;
            fold(whole, part, d);
        }
        finish(whole, d, out);
    }
}

} // namespace seraph
