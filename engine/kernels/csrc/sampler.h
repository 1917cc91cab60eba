// Chooses tokens from logits. The definitions stand in engine/kernels/batch.py (SamplingArrays); all pointers are its
// arrays, checked before they come here.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace seraph {

struct Sampling {
    const float* temperature;
    const int32_t* top_k;
    const float *top_p, *min_p, *repetition_penalty, *presence_penalty, *frequency_penalty;
    const uint64_t* seed;
    const int32_t *choice, *position;
    const int32_t *history_starts, *history_output_starts, *history_tokens;
    const int32_t *bias_starts, *bias_tokens;
    const float* bias_values;
    const int32_t* again; // null: no row
};

// Scratch of one thread.
struct SamplerScratch {
    std::vector<float> logits;        // [vocab]
    std::vector<int32_t> counts;      // [vocab], zero between calls
    std::vector<float> keys, weights; // [vocab, padded to whole vectors]
    std::vector<double> runs;         // sums of weights
    std::vector<int32_t> tokens;      // those close to a limit of a selection, or above it
    std::vector<int32_t> nearest;     // of them, those that are sorted
    std::vector<int32_t> ids;         // those that selections have left
    std::vector<float> near_keys, near_weights;
};

// A token and its logit; a token of -1 where there is none to choose.
struct Best {
    float logit = -std::numeric_limits<float>::infinity();
    int32_t token = -1;

    bool before(const Best& other) const {
        return logit > other.logit || (logit == other.logit && token < other.token && token >= 0);
    }
};

// The first token with the largest finite logit.
Best best_of(const float* logits, int vocab);

// Makes `best` the better of itself and the best of `count` logits, whose tokens are those from `first` on. Parts of a
// row may come in any order.
void better_of(const float* logits, int count, int first, Best& best);

// Whether row r takes the best of its raw logits, so that nothing but the best of each part of them needs to be kept.
bool takes_best(const Sampling& how, int r);

// The token of row r, whose raw logits are float32 [vocab]; -1 where every token is forbidden. With a mask, of one bit
// a token, it is the one that is drawn again.
int32_t sample_row(const Sampling& how, int r, const float* logits, int vocab, SamplerScratch& scratch,
                   const uint32_t* mask = nullptr);

// u in [0, 1), a multiple of 2^-24 that depends on nothing but its arguments: Philox4x32-10 (Salmon et al., SC'11)
// with the seed as key and (position, choice, again, 0) as counter.
double uniform(uint64_t seed, uint32_t choice, uint32_t position, uint32_t again);

} // namespace seraph
