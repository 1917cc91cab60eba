#include "sampler.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <thread>

#include "simd.h"

namespace seraph {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr int kRun = 256; // tokens whose weights are summed before the sums are searched

// Penalties, bias and mask; what is not finite afterwards is forbidden.
void adjust(const Sampling& how, int r, float* logits, int vocab, std::vector<int32_t>& counts) {
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
    if (how.mask_rows && how.mask_rows[r] >= 0) {
        const int m = how.mask_rows[r];
        if (how.mask_ready) {
            std::atomic_ref<int32_t> ready(const_cast<int32_t&>(how.mask_ready[m]));
            while (ready.load(std::memory_order_acquire) == 0)
                std::this_thread::yield();
        }
        const uint32_t* mask = how.masks + static_cast<int64_t>(m) * ((vocab + 31) / 32);
        for (int t = 0; t < vocab; ++t) {
            if (!(mask[t / 32] >> (t % 32) & 1u))
                logits[t] = kMinusInf;
        }
    }
}

// The first token with the largest finite logit, -1 without one.
int32_t best(const float* logits, int vocab) {
    F32 top = set1(kMinusInf);
    const F32 inf = set1(HUGE_VALF);
    int i = 0;
    for (; i + kLanes <= vocab; i += kLanes) {
        const F32 x = load(logits + i);
        top = max(top, select(less(x, inf), x, top)); // NaN and +inf compare false, so they are passed over
    }
    float largest = reduce_max(top);
    for (; i < vocab; ++i) {
        if (logits[i] < HUGE_VALF && logits[i] > largest)
            largest = logits[i];
    }
    if (largest == kMinusInf)
        return -1;
    for (i = 0; logits[i] != largest; ++i) {
    }
    return i;
}

// weights[t] = e^((logit - largest) / temperature), 0 where forbidden or below min_p.
void weigh(const float* logits, int vocab, float largest, float temperature, float min_p, float* weights) {
    const F32 top = set1(largest), t = set1(temperature), floor = set1(min_p), inf = set1(HUGE_VALF);
    for (int i = 0; i < vocab; i += kLanes) {
        float tail[kLanes];
        const int count = std::min(kLanes, vocab - i);
        const float* from = logits + i;
        if (count < kLanes) {
            std::fill_n(tail, kLanes, kMinusInf);
            std::copy_n(from, count, tail);
            from = tail;
        }
        const F32 x = load(from);
        F32 w = exp((x - top) / t);
        w = select(less(x, inf), w, zero_f32());
        w = select(less(w, floor), zero_f32(), w);
        if (count < kLanes) {
            store(tail, w);
            std::copy_n(tail, count, weights + i);
        } else {
            store(weights + i, w);
        }
    }
}

// Zeroes the weights of all but the top_k best tokens, then of all but the fewest best that carry top_p of what is
// left.
//
// Tokens are counted into buckets by how far their logit lies below the best, so that only the one bucket in which a
// limit falls has to be sorted: linear in the vocabulary, exact, ties to the lower id.
void keep_best(const float* logits, int vocab, float largest, float temperature, int top_k, double top_p,
               float* weights) {
    constexpr int kBuckets = 2048;
    constexpr float kPerUnit = kBuckets / 88.0f; // beyond e^-88 a weight is 0 and order no longer matters
    int counts[kBuckets] = {};
    double masses[kBuckets] = {};
    const auto bucket_of = [&](int t) {
        const float distance = (largest - logits[t]) / temperature * kPerUnit;
        return distance < kBuckets - 1 ? static_cast<int>(distance) : kBuckets - 1;
    };
    const auto allowed = [&](int t) { return logits[t] < HUGE_VALF && logits[t] > kMinusInf; };
    for (int t = 0; t < vocab; ++t) {
        if (!allowed(t))
            continue;
        const int b = bucket_of(t);
        ++counts[b];
        masses[b] += static_cast<double>(weights[t]);
    }
    const auto sorted = [&](int bucket) {
        std::vector<int> tokens;
        for (int t = 0; t < vocab; ++t) {
            if (allowed(t) && bucket_of(t) == bucket)
                tokens.push_back(t);
        }
        std::sort(tokens.begin(), tokens.end(),
                  [&](int a, int b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
        return tokens;
    };
    int last = kBuckets - 1; // the last bucket of which anything is kept
    int in_last = counts[last];
    if (top_k > 0) {
        int before = 0;
        for (int b = 0; b < kBuckets; ++b) {
            if (before + counts[b] >= top_k) {
                last = b;
                in_last = top_k - before;
                break;
            }
            before += counts[b];
        }
    }
    std::vector<int> tokens;
    int tokens_bucket = -1;
    if (in_last < counts[last]) {
        tokens = sorted(last);
        tokens_bucket = last;
        masses[last] = 0;
        for (int i = 0; i < in_last; ++i)
            masses[last] += static_cast<double>(weights[tokens[i]]);
    }
    if (top_p < 1) {
        double total = 0, before = 0;
        for (int b = 0; b <= last; ++b)
            total += masses[b];
        const double target = top_p * total;
        for (int b = 0; b <= last; ++b) {
            if (before + masses[b] >= target) {
                if (tokens_bucket != b)
                    tokens = sorted(b);
                const int limit = b == last ? in_last : counts[b];
                int n = 0;
                while (n < limit && before < target)
                    before += static_cast<double>(weights[tokens[n++]]);
                last = b;
                in_last = std::max(n, b == 0 ? 1 : n);
                tokens_bucket = b;
                break;
            }
            before += masses[b];
        }
    }
    for (int t = 0; t < vocab; ++t) {
        if (!allowed(t) || bucket_of(t) > last)
            weights[t] = 0;
    }
    if (tokens_bucket == last) {
        for (size_t i = static_cast<size_t>(in_last); i < tokens.size(); ++i)
            weights[tokens[i]] = 0;
    }
}

// The first token whose running sum of weights, in order of ids, passes u times the whole.
int32_t draw(const float* weights, int vocab, double u) {
    const auto run_sum = [&](int from) {
        double sum = 0;
        for (int t = from; t < std::min(from + kRun, vocab); ++t)
            sum += static_cast<double>(weights[t]);
        return sum;
    };
    double total = 0;
    for (int from = 0; from < vocab; from += kRun)
        total += run_sum(from);
    const double target = u * total;
    double before = 0;
    int32_t last_positive = -1;
    for (int from = 0; from < vocab; from += kRun) {
        const double sum = run_sum(from);
        if (before + sum > target || from + kRun >= vocab) {
            double running = before;
            for (int t = from; t < std::min(from + kRun, vocab); ++t) {
                if (weights[t] == 0)
                    continue;
                last_positive = t;
                running += static_cast<double>(weights[t]);
                if (running > target)
                    return t;
            }
            // Summed in another order the run fell short by a rounding: its last token, or that of a run before it.
            if (before + sum > target && last_positive >= 0)
                return last_positive;
        }
        before += sum;
    }
    for (int t = vocab - 1; t >= 0; --t) {
        if (weights[t] > 0)
            return t;
    }
    return -1;
}

} // namespace

double uniform(uint64_t seed, uint32_t choice, uint32_t position) {
    uint32_t c[4] = {position, choice, 0, 0};
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

int32_t sample_row(const Sampling& how, int r, const float* logits, int vocab, SamplerScratch& scratch) {
    const bool adjusted = how.history_starts[r + 1] > how.history_starts[r] ||
                          how.bias_starts[r + 1] > how.bias_starts[r] || (how.mask_rows && how.mask_rows[r] >= 0);
    if (adjusted) {
        scratch.logits.resize(static_cast<size_t>(vocab));
        scratch.counts.resize(static_cast<size_t>(vocab));
        std::copy_n(logits, vocab, scratch.logits.data());
        adjust(how, r, scratch.logits.data(), vocab, scratch.counts);
        logits = scratch.logits.data();
    }
    const int32_t top = best(logits, vocab);
    const float temperature = how.temperature[r];
    if (top < 0 || temperature == 0)
        return top;
    scratch.weights.resize(static_cast<size_t>(vocab));
    float* weights = scratch.weights.data();
    const bool select = how.top_k[r] > 0 || how.top_p[r] < 1;
    // Selection counts the mass of all tokens, so min_p comes after it.
    weigh(logits, vocab, logits[top], temperature, select ? 0.0f : how.min_p[r], weights);
    if (select) {
        keep_best(logits, vocab, logits[top], temperature, how.top_k[r], static_cast<double>(how.top_p[r]), weights);
        for (int t = 0; t < vocab; ++t) {
            if (weights[t] < how.min_p[r])
                weights[t] = 0;
        }
    }
    return draw(weights, vocab,
                uniform(how.seed[r], static_cast<uint32_t>(how.choice[r]), static_cast<uint32_t>(how.position[r])));
}

} // namespace seraph
