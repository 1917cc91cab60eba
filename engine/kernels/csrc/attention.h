// Paged grouped-query attention over keys and values of bfloat16 or 8-bit quants.
#pragma once

#include <cstdint>

namespace seraph {

constexpr int kBlock = 32;      // tokens of a KV block
constexpr int kSegment = 512;   // positions whose softmax is computed apart: split points are absolute, so fixed
constexpr int kMaxQueries = 12; // query vectors that share one pass over the keys and values

// KV memory: [block][layer][kv head][keys, then values], so that a block is one contiguous copy. A tensor-parallel rank
// has one of its own for its heads.
//
// bf16: keys are [head_dim / 2][32 tokens][2 dims], values [32 / 2][head_dim][2 tokens]: in both, one register of pairs
// widens to two registers of floats. int8: the same with bytes, of which a register of pairs widens to one of 16-bit
// pairs; after either lie the 32 tokens' scales, float32: a key is its quants times its scale, and so is a value.
struct KvCache {
    uint8_t* data;
    int num_layers, num_kv_heads, head_dim;
    bool int8;

    // Bytes of one KV head's keys, or values, in a block.
    int64_t side_bytes() const {
        return static_cast<int64_t>(kBlock) * (int8 ? head_dim + static_cast<int>(sizeof(float)) : 2 * head_dim);
    }
    int64_t block_bytes() const { return static_cast<int64_t>(num_layers) * num_kv_heads * 2 * side_bytes(); }
    uint8_t* keys(int block, int layer, int head) const {
        return data + block * block_bytes() + (static_cast<int64_t>(layer) * num_kv_heads + head) * 2 * side_bytes();
    }
    uint8_t* values(int block, int layer, int head) const { return keys(block, layer, head) + side_bytes(); }

    // Writes one token's key and value, float32 [head_dim] each, into its slot.
    void write(int block, int layer, int head, int slot, const float* key, const float* value) const;
    // The same of the tokens of slots `slot`, which is even, and `slot` + 1, `stride` floats apart: values of bfloat16
    // lie pair by pair, and so are written twice as fast.
    void write_two(int block, int layer, int head, int slot, const float* keys, const float* values, int stride) const;
};

// Softmax state of one query vector: running maximum, 16 partial sums, unnormalized output.
struct Softmax {
    float max;
    float sum[16];
    float* out; // [head_dim]
};

// One query vector in the form that the cache's keys multiply: float32 [head_dim] beside keys of bf16, beside those of
// int8 quants of 16 bits, [head_dim], and their scale.
struct Query {
    const float* values;
    const int16_t* quants;
    float scale;
};

// The query x, float32 [head_dim], beside keys of int8; its quants are written to `quants`.
Query quantized_query(const float* x, int head_dim, int16_t* quants);

// The positions that a query attends: [low, limit).
struct Span {
    int low, limit;
};

// One segment, or what lies of it from `first`, the beginning of a block, on, for up to kMaxQueries query vectors that
// share a KV head. Query i attends what of spans[i] lies there; where that is nothing it is left untouched. Scores are
// bounded by `softcap`, see softcapped(), unless it is 0. States are started here. Meanwhile the keys and values of the
// block at `after`, which is attended next, are fetched.
void attend_segment(const KvCache& kv, const int32_t* block_table, int layer, int head, int first, const Query* queries,
                    const Span* spans, int num_queries, float softcap, const uint8_t* after, Softmax* states);

// Folds segment state `from` into `into` (empty when into.max is -inf). Folding in order of position gives the same
// bits wherever it is done.
void fold(Softmax& into, const Softmax& from, int head_dim);

// out = into.out / sum. A state that attended nothing gives zeros.
void finish(const Softmax& state, int head_dim, float* out);

} // namespace seraph
