// Whether a step's arrays can be computed as they stand: what engine/kernels/validate.py checks, without its messages.
// It runs on every step, and native code trusts it: an index that passes here cannot leave the memory it points into.
#pragma once

#include <cstdint>

#include "logprobs.h"
#include "sampler.h"
#include "step.h"

namespace seraph {

// What a program and its previous step allow.
struct StepLimits {
    int vocab, max_position, num_blocks;
    int previous_rows; // tokens that a deferred token id may refer to
};

// The counts of `step` are those of its arrays; query_starts has one more than requests. Sampling is apart.
bool fits(const Step& step, const StepLimits& limits);

// What `rows` rows want of log-probabilities; out arrays are not looked at.
bool fits(const Logprobs& wanted, int rows, int vocab);

// Sizes of the arrays whose lengths their starts tell.
struct SamplingSizes {
    int64_t history, bias;
};

// Each array of `how` has one entry for each of `rows` rows, starts one more.
bool fits(const Sampling& how, int rows, int vocab, const SamplingSizes& sizes);

} // namespace seraph
