#include "sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "candidates.h"
#include "simd.h"

namespace seraph {
namespace {

// Penalties, bias and mask; what is not finite afterwards is forbidden.
void adjust(const Sampling& how, int r, float* logits, int vocab, std::vector<int32_t>& counts, const uint32_t* mask) {
    const int begin = how.history_starts[r], output = how.history_output_starts[r], end = how.history_starts[r + 1];
    const float repetition = how.repetition_penalty[r];
    for (int i = begin; i < end; ++i) {
        const int32_t token = how.history_tokens[i];
        if (counts[token]++ == 0)
            logits[token] = logits[token] > 0 ? logits[token] / repetition : logits[token] * repetition;
    }
    for (int i = begin; i < end; ++i)
        counts[how.history_tokens[i]] = 0;
    for (int i = output; i < end; ++i)
        ++counts[how.history_tokens[i]];
    for (int i = output; i < end; ++i) {
        const int32_t token = how.history_tokens[i];
        if (counts[token] == 0)
            continue; // done at an earlier occurrence
        logits[token] -= how.frequency_penalty[r] * static_cast<float>(counts[token]) + how.presence_penalty[r];
        counts[token] = 0;
    }
    for (int i = how.bias_starts[r]; i < how.bias_starts[r + 1]; ++i)
        logits[how.bias_tokens[i]] += how.bias_values[i];
    for (int t = 0; mask && t < vocab; ++t) {
        if (!(mask[t / 32] >> (t % 32) & 1u))
            logits[t] = kMinusInf;
    }
}

// Whether logits go through adjust() even without a mask: it would leave them as they are.
bool adjusted(const Sampling& how, int r) {
    return how.history_starts[r + 1] > how.history_starts[r] || how.bias_starts[r + 1] > how.bias_starts[r];
}

} // namespace

// The largest of every run, then the first token of the first such run.
Best best_of(const float* logits, int vocab) {
    const F32 inf = set1(HUGE_VALF);
    Best best;
    int at = 0;
    for (int from = 0; from < vocab; from += kRun) {
        const int end = std::min(from + kRun, vocab);
        F32 top = set1(kMinusInf);
        int i = from;
        for (; i + kLanes <= end; i += kLanes) {
            const F32 x = load(logits + i);
            top = max(top, select(less(x, inf), x, top)); // NaN and +inf compare false, so they are passed over
        }
        float here = reduce_max(top);
        for (; i < end; ++i) {
            if (logits[i] < HUGE_VALF && logits[i] > here)
                here = logits[i];
        }
        if (here > best.logit) {
            best.logit = here;
            at = from;
        }
    }
    if (best.logit == kMinusInf)
        return best;
    const F32 largest = set1(best.logit);
    for (; at + kLanes <= vocab; at += kLanes) {
        const F32 x = load(logits + at);
        const uint32_t found = lanes_of(less(x, inf)) & ~lanes_of(less(x, largest));
        if (found != 0) {
            at += std::countr_zero(found);
            break;
        }
    }
    while (logits[at] != best.logit)
        ++at;
    best.token = at;
    return best;
}

void better_of(const float* logits, int count, int first, Best& best) {
    // Nearly always all are below the best of what came before, which a comparison of each tells.
    const F32 least = set1(best.logit);
    bool below = count % kLanes == 0;
    for (int i = 0; i < count && below; i += kLanes)
        below = lanes_of(less(load(logits + i), least)) == (1u << kLanes) - 1;
    if (below)
        return;
    Best here = best_of(logits, count);
    here.token += here.token < 0 ? 0 : first;
    if (here.before(best))
        best = here;
}

bool takes_best(const Sampling& how, int r) {
    return how.temperature[r] == 0 && !adjusted(how, r) && !(how.again && how.again[r]);
}

double uniform(uint64_t seed, uint32_t choice, uint32_t position, uint32_t again) {
    uint32_t c[4] = {position, choice, again, 0};
    uint32_t k[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = 0xD2511F53ull * c[0], p1 = 0xCD9E8D57ull * c[2];
        const uint32_t n[4] = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(p1),
                               static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(p0)};
        std::copy_n(n, 4, c);
        k[0] += 0x9E3779B9u;
        k[1] += 0xBB67AE85u;
    }
    return static_cast<double>(c[0] >> 8) * 0x1p-24;
}

int32_t sample_row(const Sampling& how, int r, const float* logits, int vocab, SamplerScratch& scratch,
                   const uint32_t* mask) {
    if (mask || adjusted(how, r)) {
        scratch.logits.resize(static_cast<size_t>(vocab));
        scratch.counts.resize(static_cast<size_t>(vocab));
        std::copy_n(logits, vocab, scratch.logits.data());
        adjust(how, r, scratch.logits.data(), vocab, scratch.counts, mask);
        logits = scratch.logits.data();
    }
    const int32_t top = best_of(logits, vocab).token;
    const float temperature = how.temperature[r];
    if (top < 0 || temperature == 0)
        return top;
    const bool select = how.top_k[r] > 0 || how.top_p[r] < 1;
    // Selection counts the mass of all tokens, so min_p comes after it.
    const bool by_count = how.top_k[r] > 0 && how.top_k[r] < vocab;
    Candidates left(logits, vocab, logits[top], temperature, select ? 0.0f : how.min_p[r], by_count, scratch);
    if (by_count)
        left.keep_count(how.top_k[r]);
    if (how.top_p[r] < 1)
        left.keep_mass(static_cast<double>(how.top_p[r]));
    if (select && how.min_p[r] > 0)
        left.drop_below(how.min_p[r]);
    return left.draw(uniform(how.seed[r], static_cast<uint32_t>(how.choice[r]), static_cast<uint32_t>(how.position[r]),
                             mask ? 1 : 0));
}

} // namespace seraph
