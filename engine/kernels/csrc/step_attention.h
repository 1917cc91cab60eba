// The attention of one step: which rows attend together, which contexts several threads share, and how what they found
// is put together again.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"
#include "step.h"

namespace seraph {

// The attention of the layers that look equally far back: over the last `window` positions, or, at 0, over all.
class StepAttention {
  public:
    // `kv`: each rank's, whose heads follow those of the rank before. `softcap`: see attend_segment().
    StepAttention(const std::vector<KvCache>& kv, int num_heads, int window, float softcap, int threads);

    int window() const { return window_; }

    // Cuts a step into tiles. `step` must stay until the last of them is done.
    void plan(const Step& step);

    int num_tiles() const { return static_cast<int>(tiles_.size()); }
    // Tiles of the heads of rank r: from first_tiles()[r] to first_tiles()[r + 1].
    const int* first_tiles() const { return first_tiles_.data(); }

    // Tile `index` of `layer`: rotated queries in the first num_heads * head_dim floats of each row of qkv (rows are
    // `width` floats apart) to attended [tokens, num_heads * head_dim]. Split rows are left for merge().
    void attend(int layer, int index, const float* qkv, int64_t width, int thread, float* attended);

    // Rows whose contexts were split, ascending; all of their tiles must be done before merge().
    int num_split_rows() const { return static_cast<int>(split_rows_.size()); }
    int split_row(int i) const { return split_rows_[i].row; }
    void merge(int i, float* attended);

  private:
    // Query rows [row, row + rows) of one request, KV head `head` of a rank's, positions from `first`, the beginning of
    // a block, to `last`.
    struct Tile {
        int32_t row, rows, request, rank, head, first, last;
        bool split; // several tiles share the rows: states are left for merge()
    };
    struct SplitRow {
        int32_t row, first, last; // its states' segments
    };

    // The positions that row `row`, of request `request`, attends.
    Span span_of(int row, int request) const;
    // The keys of the block with position `first`, a multiple of kBlock, of a tile's request and head.
    const uint8_t* first_keys(int layer, const Tile& t, int first) const;
    float* state_of(int row, int head, int segment);
    void store_state(const Softmax& from, int row, int head, int segment);

    std::vector<KvCache> kv_;                                    // [ranks]
    std::vector<int> first_kv_head_;                             // [ranks + 1]
    int num_heads_, head_dim_, shared_heads_, window_, threads_; // shared_heads_: query heads of a KV head
    float softcap_;
    const Step* step_ = nullptr;
    std::vector<Tile> tiles_;
    std::vector<int> first_tiles_; // [ranks + 1]
    std::vector<SplitRow> split_rows_;
    std::vector<int64_t> state_at_;            // [tokens] where the state of a split row's segment 0 would be
    std::vector<float> states_;                // of split rows: [segment][head][kStateHead + head_dim]
    std::vector<std::vector<float>> outputs_;  // [threads][2 * kMaxQueries * head_dim]
    std::vector<std::vector<int16_t>> quants_; // [threads][kMaxQueries * head_dim], queries beside keys of int8
};

} // namespace seraph
