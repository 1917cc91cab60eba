#include "logprobs.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "sampler.h"
#include "simd.h"

namespace seraph {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr int kRun = 1024; // tokens whose weights are summed in float lanes: 64 additions, far below a logprob's digits

// Raw logits in whole vectors; what is not finite, or past the end, is -inf.
class Row {
  public:
    Row(const float* logits, int vocab) : logits_(logits), whole_(vocab / kLanes * kLanes), vocab_(vocab) {
        std::fill_n(tail_, kLanes, kMinusInf);
        std::copy(logits + whole_, logits + vocab, tail_);
    }

    int size() const { return vocab_; }
    float at(int token) const { return logits_[token]; }
    F32 vector(int from) const {
        const F32 x = load(from < whole_ ? logits_ + from : tail_);
        return select(less(x, set1(HUGE_VALF)), x, set1(kMinusInf));
    }

  private:
    const float* logits_;
    int whole_, vocab_;
    float tail_[kLanes];
};

// Natural logarithm of the sum of e^(logit - largest): runs in a fixed order, their sums in float64.
double log_of_sum(const Row& row, float largest) {
    double total = 0;
    for (int from = 0; from < row.size(); from += kRun) {
        F32 sum = zero_f32();
        const int end = std::min(from + kRun, row.size());
        for (int i = from; i < end; i += kLanes)
            sum = sum + exp(row.vector(i) - set1(largest));
        total += static_cast<double>(reduce_add(sum));
    }
    return std::log(total);
}

// The `count` largest, equal ones by rising id; returns how many there are.
int largest_of(const Row& row, int count, int32_t* tokens, float* logits) {
    int found = 0;
    float least = kMinusInf; // what a logit must exceed; later equals have higher ids
    for (int from = 0; from < row.size() && count > 0; from += kLanes) {
        uint32_t above = lanes_of(less(set1(least), row.vector(from)));
        for (; above != 0; above &= above - 1) {
            const int token = from + std::countr_zero(above);
            const float logit = row.at(token);
            if (!(logit > least))
                continue; // `least` has risen within the vector
            int at = found < count ? found++ : count - 1;
            for (; at > 0 && logits[at - 1] < logit; --at) {
                logits[at] = logits[at - 1];
                tokens[at] = tokens[at - 1];
            }
            logits[at] = logit;
            tokens[at] = token;
            if (found == count)
                least = logits[count - 1];
        }
    }
    return found;
}

// 1 + the tokens that come before a finite one: larger logits, and equal ones of lower ids.
int rank_of(const Row& row, int token) {
    const F32 own = set1(row.at(token));
    int before = 0;
    for (int from = 0; from < row.size(); from += kLanes) {
        const F32 x = row.vector(from);
        const int ahead = std::clamp(token - from, 0, kLanes); // lanes of lower ids
        const uint32_t lower = (uint32_t{1} << ahead) - 1, all = (uint32_t{1} << kLanes) - 1;
        const uint32_t larger = lanes_of(less(own, x)), not_less = ~lanes_of(less(x, own)) & all;
        before += std::popcount((larger & ~lower) | (not_less & lower));
    }
    return 1 + before;
}

} // namespace

void write_logprobs(const Logprobs& wanted, int r, int32_t token, const float* logits, int vocab) {
    const int width = 1 + wanted.most, count = wanted.counts[r];
    int32_t* tokens = wanted.tokens + static_cast<int64_t>(r) * width;
    float* logprobs = wanted.logprobs + static_cast<int64_t>(r) * width;
    std::fill_n(tokens, width, -1);
    std::fill_n(logprobs, width, kMinusInf);
    wanted.ranks[r] = 0;
    const Best best = best_of(logits, vocab);
    if (token < 0 || best.token < 0)
        return;
    const Row row(logits, vocab);
    const double sum = log_of_sum(row, best.logit);
    const auto logprob = [&](float logit) {
        return static_cast<float>((static_cast<double>(logit) - static_cast<double>(best.logit)) - sum);
    };
    const int found = largest_of(row, count, tokens + 1, logprobs + 1);
    for (int i = 1; i <= found; ++i)
        logprobs[i] = logprob(logprobs[i]);
    tokens[0] = token;
    if (std::isfinite(logits[token])) {
        logprobs[0] = logprob(logits[token]);
        wanted.ranks[r] = rank_of(row, token);
    }
}

} // namespace seraph
