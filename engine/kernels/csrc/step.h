// One step's arrays as C++ reads them.
#pragma once

#include <cstdint>

#include "logprobs.h"
#include "sampler.h"

namespace seraph {

// The arrays of one step, as engine/kernels/batch.py describes them, checked before they come here.
struct Step {
    int num_tokens, num_requests, max_blocks, num_rows;
    const int32_t *token_ids, *positions, *query_starts, *seq_lens, *block_tables, *logits_rows;
    bool causal;
    const Sampling* sampling; // null: nothing is chosen
    float* logits;            // null or [num_rows, vocab]
    float* hidden;            // null or [num_rows, hidden]
    int32_t* chosen;          // [num_rows], written where sampling is given
    const Logprobs* logprobs; // null: none are wanted; never without sampling
};

constexpr int ceil_div(int a, int b) {
    return (a + b - 1) / b;
}

} // namespace seraph
