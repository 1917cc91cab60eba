// What of a decoder's weights and KV memory is whose, where it is divided among tensor-parallel ranks.
#include <algorithm>
#include <cstring>
#include <vector>

#include "decoder.h"

namespace seraph {

void Decoder::make_memory(int num_blocks, bool kv_int8) {
    for (int rank = 0; rank < team_.num_ranks(); ++rank) {
        const int heads = team_.part(shape_.num_kv_heads, rank + 1) - team_.part(shape_.num_kv_heads, rank);
        kv_.push_back({nullptr, shape_.num_layers, heads, shape_.head_dim, kv_int8});
        kv_pages_.push_back(std::make_unique<Pages>(kv_.back().block_bytes() * num_blocks));
        kv_.back().data = kv_pages_.back()->as<uint8_t>();
    }
}

// What is divided among ranks: all weights but a router's, which every row reads whole, and the embedding, of which a
// token reads one row.
std::vector<Projection*> Decoder::divided_weights() {
    std::vector<Projection*> all;
    for (DecoderLayer& layer : weights_.layers) {
        all.insert(all.end(), {&layer.qkv, &layer.o});
        if (layer.experts.empty())
            all.insert(all.end(), {&layer.gate_up, &layer.down});
        for (Expert& expert : layer.experts)
            all.insert(all.end(), {&expert.gate_up, &expert.down});
    }
    all.push_back(&weights_.head);
    return all;
}

// All outputs of a projection can be read by every rank once its phase is over. So they are divided by their number,
// whatever they mean: of three KV heads one of two ranks attends two, but each projects one and a half.
void Decoder::divide_weights() {
    for (Projection* w : divided_weights())
        w->divide(team_, false);
    for (DecoderLayer& layer : weights_.layers) {
        layer.gate_up.divide(team_, true); // a strip is 32 gates and their ups, which are multiplied
        for (Expert& expert : layer.experts) {
            expert.gate_up.divide(team_, true);
            expert.down.divide(team_, true);
        }
    }
    weights_.head.divide(team_, true);
}

void Decoder::copy_weights() {
    other_work_ = "the copy of the weights";
    copies_ = std::make_unique<RankCopies>();
    copies_->make(divided_weights(), team_);
}

void Decoder::copy_blocks(const int32_t* pairs, int n) {
    const auto copy = [this, pairs, n](int, int rank, int, int) {
        const int64_t bytes = kv_[rank].block_bytes();
        for (int i = 0; i < n; ++i) {
            std::memcpy(kv_[rank].data + pairs[2 * i + 1] * bytes, kv_[rank].data + pairs[2 * i] * bytes,
                        static_cast<size_t>(bytes));
        }
    };
    if (team_.num_ranks() == 1)
        return copy(0, 0, 1, 0);
    // Each rank copies its own: a block may be written here for the first time.
    other_work_ = "the copy of KV blocks";
    std::vector<int> bounds;
    for (int rank = 0; rank <= team_.num_ranks(); ++rank)
        bounds.push_back(rank);
    team_.run({{team_.num_ranks(), 1, bounds.data()}}, copy);
}

} // namespace seraph
