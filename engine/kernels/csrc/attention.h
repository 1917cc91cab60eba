// Paged grouped-query attention over bf16 keys and values.
#pragma once

#include <cstdint>

namespace seraph {

constexpr int kBlock = 32;      // tokens of a KV block
constexpr int kSegment = 512;   // positions whose softmax is computed apart: split points are absolute, so fixed
constexpr int kMaxQueries = 12; // query vectors that share one pass over the keys and values

// KV memory: bf16 [block][layer][kv head][2][head_dim * 32], so that a block is one contiguous copy. Keys are
// [head_dim / 2][32 tokens][2 dims], values [32 / 2][head_dim][2 tokens]: in both, one register of pairs widens to two
// registers of floats.
struct KvCache {
    uint16_t* data;
    int num_layers, num_kv_heads, head_dim;

    int64_t head_size() const { return static_cast<int64_t>(head_dim) * kBlock; }
    int64_t block_size() const { return static_cast<int64_t>(num_layers) * num_kv_heads * 2 * head_size(); }
    uint16_t* keys(int block, int layer, int head) const {
        return data + block * block_size() + (static_cast<int64_t>(layer) * num_kv_heads + head) * 2 * head_size();
    }
    uint16_t* values(int block, int layer, int head) const { return keys(block, layer, head) + head_size(); }
};

// Writes one token's key and value, float32 [head_dim] each, into its slot.
void write_kv(uint16_t* keys, uint16_t* values, int head_dim, int slot, const float* key, const float* value);

// Softmax state of one query vector: running maximum, 16 partial sums, unnormalized output.
struct Softmax {
    float max;
    float sum[16];
    float* out; // [head_dim]
};

// One segment for up to kMaxQueries query vectors that share a KV head. Query i attends positions [first, limits[i]),
// cut to the segment that starts at `first`; limits[i] <= first leaves it untouched. States are started here.
void attend_segment(const KvCache& kv, const int32_t* block_table, int layer, int head, int first,
                    const float* const* queries, const int* limits, int num_queries, Softmax* states);

// Folds segment state `from` into `into` (empty when into.max is -inf). Folding in order of position gives the same
// bits wherever it is done.
void fold(Softmax& into, const Softmax& from, int head_dim);

// out = into.out / sum. A state that attended nothing gives zeros.
void finish(const Softmax& state, int head_dim, float* out);

} // namespace seraph
