// Log-probabilities of a row's tokens. The definitions stand in engine/kernels/batch.py (LogprobArrays).
#pragma once

#include <cstdint>

namespace seraph {

// Rows and what is wanted of them; all pointers are arrays of LogprobArrays, checked before they come here.
struct Logprobs {
    int most;               // of the largest that any row may want
    const int32_t* counts;  // [R], so many of the largest; -1: nothing of this row
    const int32_t* targets; // [R], the row's token where it is given, -1 where it is chosen
    int32_t* tokens;        // out [R, 1 + most], the row's token, then the largest; -1 where there is none
    float* logprobs;        // out [R, 1 + most], theirs
    int32_t* ranks;         // out [R], of the row's token

    bool wants(int r) const { return counts[r] >= 0; }
};

// Writes row r's part, whose token is `token` (-1: it has none) and whose raw logits are float32 [vocab].
void write_logprobs(const Logprobs& wanted, int r, int32_t token, const float* logits, int vocab);

} // namespace seraph
