#include "check.h"

#include <cmath>
#include <limits>

#include "attention.h"

namespace seraph {
namespace {

bool within(int32_t value, int64_t low, int64_t high) {
    return value >= low && value < high;
}

// Rows of token ids one after another: starts rise from 0 to the number of tokens, all in the vocabulary.
bool ragged(const int32_t* starts, int rows, const int32_t* tokens, int64_t num_tokens, int vocab) {
    if (starts[0] != 0 || starts[rows] != num_tokens)
        return false;
    for (int r = 0; r < rows; ++r) {
        if (starts[r + 1] < starts[r])
            return false;
    }
    for (int64_t i = 0; i < num_tokens; ++i) {
        if (!within(tokens[i], 0, vocab))
            return false;
    }
    return true;
}

} // namespace

bool fits(const Step& step, const StepLimits& limits) {
    const int tokens = step.num_tokens, requests = step.num_requests;
    if (tokens < 1 || requests < 1)
        return false;
    for (int t = 0; t < tokens; ++t) {
        if (!within(step.token_ids[t], -static_cast<int64_t>(limits.previous_rows), limits.vocab))
            return false;
    }
    const int32_t* starts = step.query_starts;
    if (starts[0] != 0 || starts[requests] != tokens)
        return false;
    for (int r = 0; r < requests; ++r) {
        if (starts[r + 1] <= starts[r] || starts[r + 1] > tokens)
            return false;
        const int count = starts[r + 1] - starts[r], length = step.seq_lens[r];
        if (length < count || length > limits.max_position)
            return false;
        for (int i = 0; i < count; ++i) {
            if (step.positions[starts[r] + i] != length - count + i)
                return false;
        }
        const int blocks = ceil_div(length, kBlock);
        if (blocks > step.max_blocks)
            return false;
        const int32_t* table = step.block_tables + static_cast<int64_t>(r) * step.max_blocks;
        for (int i = 0; i < blocks; ++i) {
            if (!within(table[i], 0, limits.num_blocks))
                return false;
        }
    }
    for (int r = 0; r < step.num_rows; ++r) {
        if (!within(step.logits_rows[r], r == 0 ? 0 : step.logits_rows[r - 1] + int64_t{1}, tokens))
            return false;
    }
    return true;
}

bool fits(const Logprobs& wanted, int rows, int vocab) {
    for (int r = 0; r < rows; ++r) {
        if (!within(wanted.counts[r], -1, int64_t{wanted.most} + 1) || !within(wanted.targets[r], -1, vocab))
            return false;
    }
    return true;
}

// Comparisons are written so that NaN fails them.
bool fits(const Sampling& how, int rows, int vocab, const SamplingSizes& sizes) {
    for (int r = 0; r < rows; ++r) {
        // A sum is finite only where each term is.
        const float sum =
            how.temperature[r] + how.repetition_penalty[r] + how.presence_penalty[r] + how.frequency_penalty[r];
        if (!(how.temperature[r] >= 0 && how.top_p[r] > 0 && how.top_p[r] <= 1 && how.min_p[r] >= 0 &&
              how.min_p[r] <= 1 && how.repetition_penalty[r] > 0 && how.position[r] >= 0 && std::isfinite(sum)))
            return false;
    }
    if (!ragged(how.history_starts, rows, how.history_tokens, sizes.history, vocab) ||
        !ragged(how.bias_starts, rows, how.bias_tokens, sizes.bias, vocab))
        return false;
    for (int r = 0; r < rows; ++r) {
        const int32_t output = how.history_output_starts[r];
        if (output < how.history_starts[r] || output > how.history_starts[r + 1])
            return false;
    }
    for (int64_t i = 0; i < sizes.bias; ++i) {
        if (!(how.bias_values[i] < std::numeric_limits<float>::infinity()))
            return false;
    }
    return true;
}

} // namespace seraph
