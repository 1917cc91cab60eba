#include "step_attention.h"

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace seraph {
namespace {

constexpr int kStateHead = 1 + kLanes; // floats of a stored Softmax before its output: max and sums

} // namespace

StepAttention::StepAttention(const std::vector<KvCache>& kv, int num_heads, int window, float softcap, int threads)
    : kv_(kv), first_kv_head_{0}, num_heads_(num_heads), head_dim_(kv.front().head_dim), window_(window),
      threads_(threads), softcap_(softcap),
      outputs_(static_cast<size_t>(threads), std::vector<float>(static_cast<size_t>(2 * kMaxQueries * head_dim_))),
      quants_(static_cast<size_t>(threads), std::vector<int16_t>(static_cast<size_t>(kMaxQueries * head_dim_))) {
    for (const KvCache& of_rank : kv_)
        first_kv_head_.push_back(first_kv_head_.back() + of_rank.num_kv_heads);
    shared_heads_ = num_heads / first_kv_head_.back();
}

Span StepAttention::span_of(int row, int request) const {
    const int position = step_->positions[row];
    return {window_ > 0 ? std::max(position + 1 - window_, 0) : 0,
            step_->causal ? position + 1 : step_->seq_lens[request]};
}

// Which rows attend together and which contexts are split changes no bit of any result, only who computes it.
void StepAttention::plan(const Step& step) {
    const int rows_per_tile = std::max(1, kMaxQueries / shared_heads_);
    const int whole = (step.num_tokens / rows_per_tile + step.num_requests) * first_kv_head_.back();
    const bool may_split = whole < 4 * threads_;
    const int64_t segment_floats = static_cast<int64_t>(num_heads_) * (kStateHead + head_dim_);
    step_ = &step;
    tiles_.clear();
    first_tiles_.clear();
    split_rows_.clear();
    state_at_.resize(std::max(state_at_.size(), static_cast<size_t>(step.num_tokens)));
    int64_t states = 0;
    for (int rank = 0; rank < static_cast<int>(kv_.size()); ++rank) {
        first_tiles_.push_back(num_tiles());
        for (int r = 0; r < step.num_requests; ++r) {
            const int begin = step.query_starts[r], end = step.query_starts[r + 1], length = step.seq_lens[r];
            const bool split = may_split && length - span_of(begin, r).low > kSegment;
            for (int row = begin; row < end; row += rows_per_tile) {
                const int rows = std::min(rows_per_tile, end - row);
                // Spans move on from row to row.
                const int low = span_of(row, r).low / kBlock * kBlock, limit = span_of(row + rows - 1, r).limit;
                const int from = low / kSegment, to = ceil_div(limit, kSegment); // segments
                for (int i = row; split && rank == 0 && i < row + rows; ++i) {
                    split_rows_.push_back({i, from, to});
                    state_at_[i] = states - from * segment_floats;
                    states += (to - from) * segment_floats;
                }
                for (int head = 0; head < kv_[rank].num_kv_heads; ++head) {
                    if (!split) {
                        tiles_.push_back({row, rows, r, rank, head, low, limit, false});
                        continue;
                    }
                    // Segments that one of the rows does not attend leave it an empty state.
                    for (int s = from; s < to; ++s) {
                        const int first = std::max(s * kSegment, low), last = std::min((s + 1) * kSegment, limit);
                        tiles_.push_back({row, rows, r, rank, head, first, last, true});
                    }
                }
            }
        }
    }
    first_tiles_.push_back(num_tiles());
    states_.resize(std::max(states_.size(), static_cast<size_t>(states)));
}

const uint8_t* StepAttention::first_keys(int layer, const Tile& t, int first) const {
    const int32_t* table = step_->block_tables + static_cast<int64_t>(t.request) * step_->max_blocks;
    return kv_[t.rank].keys(table[first / kBlock], layer, t.head);
}

void StepAttention::attend(int layer, int index, const float* qkv, int64_t width, int thread, float* attended) {
    const Tile& t = tiles_[index];
    const KvCache& kv = kv_[t.rank];
    const int d = head_dim_, first_head = (first_kv_head_[t.rank] + t.head) * shared_heads_;
    const int32_t* table = step_->block_tables + static_cast<int64_t>(t.request) * step_->max_blocks;
    float* outputs = outputs_[thread].data();
    const int total = t.rows * shared_heads_;
    for (int done = 0; done < total; done += kMaxQueries) { // more than once only where over 12 heads share one KV head
        const int n = std::min(kMaxQueries, total - done);
        Query queries[kMaxQueries];
        Span spans[kMaxQueries];
        int rows[kMaxQueries], heads[kMaxQueries];
        Softmax segment[kMaxQueries], whole[kMaxQueries];
        for (int i = 0; i < n; ++i) {
            rows[i] = t.row + (done + i) / shared_heads_;
            heads[i] = first_head + (done + i) % shared_heads_;
            const float* query = qkv + rows[i] * width + heads[i] * d;
            queries[i] = kv.int8 ? quantized_query(query, d, quants_[thread].data() + i * d) : Query{query, nullptr, 1};
            spans[i] = span_of(rows[i], t.request);
            segment[i].out = outputs + i * d;
            whole[i].out = outputs + (kMaxQueries + i) * d;
            whole[i].max = -HUGE_VALF;
        }
        for (int first = t.first; first < t.last;) {
            const int next = (first / kSegment + 1) * kSegment;
            const uint8_t* after = next < t.last ? first_keys(layer, t, next)
                                   : index + 1 < num_tiles()
                                       ? first_keys(layer, tiles_[index + 1], tiles_[index + 1].first)
                                       : first_keys(layer, t, first);
            attend_segment(kv, table, layer, t.head, first, queries, spans, n, softcap_, after, segment);
            for (int i = 0; i < n; ++i) {
                if (t.split) {
                    store_state(segment[i], rows[i], heads[i], first / kSegment);
                } else {
                    fold(whole[i], segment[i], d);
                }
            }
            first = next;
        }
        if (t.split)
            continue;
        for (int i = 0; i < n; ++i)
            finish(whole[i], d, attended + (static_cast<int64_t>(rows[i]) * num_heads_ + heads[i]) * d);
    }
}

float* StepAttention::state_of(int row, int head, int segment) {
    const int64_t size = kStateHead + head_dim_;
    return states_.data() + (state_at_[row] + (static_cast<int64_t>(segment) * num_heads_ + head) * size);
}

void StepAttention::store_state(const Softmax& from, int row, int head, int segment) {
    float* to = state_of(row, head, segment);
    to[0] = from.max;
    std::copy_n(from.sum, kLanes, to + 1);
    std::copy_n(from.out, head_dim_, to + kStateHead);
}

// Folds a split row's states in order of position, as attend() does for a row that is not split.
void StepAttention::merge(int i, float* attended) {
    const auto [row, first, last] = split_rows_[i];
    const int d = head_dim_;
    for (int head = 0; head < num_heads_; ++head) {
        float* out = attended + (static_cast<int64_t>(row) * num_heads_ + head) * d;
        Softmax whole, part;
        whole.max = -HUGE_VALF;
        whole.out = out;
        for (int s = first; s < last; ++s) {
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
