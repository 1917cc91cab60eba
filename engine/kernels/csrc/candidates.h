// The tokens of a row that may still be drawn, and what selections leave of them. Included by sampler.cpp alone.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <utility>
#include <vector>

#include "sampler.h"
#include "simd.h"

namespace seraph {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr int kRun = 1024;   // tokens that are searched, and whose weights are summed, together
constexpr int kCuts = 3;     // cuts of one pass of a selection
constexpr int kSorted = 256; // tokens left between two cuts that are sorted at last
constexpr int kSample = 128; // tokens from which a selection guesses its first cuts

// The tokens that may be drawn, by rising id. Arrays are padded to whole vectors with tokens that may not.
class Candidates {
  public:
    // weights[t] = e^((logit - largest) / temperature), 0 where forbidden or below `floor`; none yet where `later`,
    // when keep_count() follows and leaves fewer to compute.
    Candidates(const float* logits, int vocab, float largest, float temperature, float floor, bool later,
               SamplerScratch& scratch)
        : padded_((vocab + kLanes - 1) / kLanes * kLanes), largest_(largest), temperature_(temperature),
          scratch_(scratch) {
        scratch.keys.resize(static_cast<size_t>(padded_));
        scratch.weights.resize(static_cast<size_t>(padded_));
        scratch.runs.resize(static_cast<size_t>((padded_ + kRun - 1) / kRun));
        keys_ = scratch.keys.data();
        weights_ = scratch.weights.data();
        const F32 least = set1(floor), inf = set1(HUGE_VALF);
        float tail[kLanes];
        std::fill_n(tail, kLanes, kMinusInf);
        std::copy(logits + (padded_ == vocab ? padded_ : padded_ - kLanes), logits + vocab, tail);
        F32 smallest = inf;
        const auto key_of = [&](int i) SERAPH_INLINE_LAMBDA {
            const F32 x = load(i + kLanes <= vocab ? logits + i : tail);
            const F32 key = select(less(x, inf), x, set1(kMinusInf));
            smallest = min(smallest, select(less(set1(kMinusInf), key), key, inf));
            store(keys_ + i, key);
            return key;
        };
        if (later) {
            for (int i = 0; i < padded_; i += kLanes)
                key_of(i);
        } else {
            each_run([&](int i) {
                F32 w = weight_of(key_of(i));
                w = select(less(w, least), zero_f32(), w);
                store(weights_ + i, w);
                return w;
            });
        }
        float lanes[kLanes];
        store(lanes, smallest);
        smallest_ = *std::min_element(lanes, lanes + kLanes);
    }

    // The top_k best; equal logits by rising id.
    void keep_count(int top_k) { keep<false>(top_k); }

    // The fewest best that carry `top_p` of the mass.
    void keep_mass(double top_p) { keep<true>(top_p * total_); }

    void drop_below(float floor) {
        const F32 least = set1(floor);
        each_run([&](int i) {
            const F32 w = weights_left(i);
            const F32 kept = select(less(w, least), zero_f32(), w);
            store(weights_ + i, kept);
            return kept;
        });
        least_key_ = kMinusInf;
    }

    // The first token whose running sum of weights, in order of ids, passes u times the whole.
    int32_t draw(double u) const {
        const double target = u * total_;
        double before = 0;
        int last_positive = -1;
        for (int from = 0; from < padded_; from += kRun) {
            const double sum = least_key_ == kMinusInf ? scratch_.runs[from / kRun] : run_left(from);
            const bool here = before + sum > target;
            if (here || from + kRun >= padded_) {
                double running = before;
                for (int i = from; i < std::min(from + kRun, padded_); ++i) {
                    if (weights_[i] == 0 || keys_[i] < least_key_)
                        continue;
                    last_positive = i;
                    running += static_cast<double>(weights_[i]);
                    if (running > target)
                        return token_at(i);
                }
                // Summed in another order the run fell short by a rounding: its last token.
                if (here && last_positive >= 0)
                    return token_at(last_positive);
            }
            before += sum;
        }
        for (int i = padded_ - 1; i >= 0; --i) {
            if (weights_[i] > 0 && keys_[i] >= least_key_)
                return token_at(i);
        }
        return -1;
    }

  private:
    // Calls f(i) for every vector, sums what it returns, and keeps each run's sum for `draw`. A run is summed in float
    // lanes: 64 additions, whose rounding is far below the 2^-24 that u is drawn with.
    template <class F>
    void each_run(const F& f) {
        total_ = 0;
        for (int from = 0; from < padded_; from += kRun) {
            F32 sum = zero_f32();
            const int end = std::min(from + kRun, padded_);
            for (int i = from; i < end; i += kLanes)
                sum = sum + f(i);
            const double run = static_cast<double>(reduce_add(sum));
            scratch_.runs[from / kRun] = run;
            total_ += run;
        }
    }

    F32 weight_of(F32 key) const { return exp((key - set1(largest_)) / set1(temperature_)); }

    // The weights from i on of what a selection by mass has left.
    F32 weights_left(int i) const {
        return select(less(load(keys_ + i), set1(least_key_)), zero_f32(), load(weights_ + i));
    }

    double run_left(int from) const {
        F32 sum = zero_f32();
        for (int i = from; i < std::min(from + kRun, padded_); i += kLanes)
            sum = sum + weights_left(i);
        return static_cast<double>(reduce_add(sum));
    }

    int32_t token_at(int i) const { return ids_ ? ids_[i] : i; }

    // Puts the `count` tokens at the rising places `at` together: what follows goes over them alone.
    void compact(const int32_t* at, int count) {
        std::vector<int32_t>& ids = scratch_.ids;
        padded_ = (count + kLanes - 1) / kLanes * kLanes;
        ids.resize(std::max(ids.size(), static_cast<size_t>(padded_)));
        for (int i = 0; i < count; ++i) { // nothing is written that is still to be read
            ids[i] = token_at(at[i]);
            keys_[i] = keys_[at[i]];
        }
        std::fill(keys_ + count, keys_ + padded_, kMinusInf);
        ids_ = ids.data();
        each_run([&](int i) {
            const F32 w = weight_of(load(keys_ + i));
            store(weights_ + i, w);
            return w;
        });
    }

    struct Measure {
        double count[kCuts] = {}, mass[kCuts] = {};
    };

    // Of the tokens at or above each of the cuts, among the first `size` of `keys` and `weights`.
    template <bool MASS>
    static Measure measure(const float* keys, const float* weights, int size, const float* cuts) {
        Measure all;
        const F32 one = set1(1.0f);
        for (int from = 0; from < size; from += kRun) {
            F32 count[kCuts], mass[kCuts], cut[kCuts];
            for (int c = 0; c < kCuts; ++c) {
                count[c] = mass[c] = zero_f32();
                cut[c] = set1(cuts[c]);
            }
            const int end = std::min(from + kRun, size);
            for (int i = from; i < end; i += kLanes) {
                const F32 key = load(keys + i);
                F32 w;
                if constexpr (MASS)
                    w = load(weights + i);
#pragma GCC unroll 3
                for (int c = 0; c < kCuts; ++c) {
                    const Mask below = less(key, cut[c]);
                    count[c] = select(below, count[c], count[c] + one);
                    if constexpr (MASS)
                        mass[c] = select(below, mass[c], mass[c] + w);
                }
            }
            for (int c = 0; c < kCuts; ++c) {
                all.count[c] += static_cast<double>(reduce_add(count[c]));
                if constexpr (MASS)
                    all.mass[c] += static_cast<double>(reduce_add(mass[c]));
            }
        }
        return all;
    }

    // Copies the tokens from `low` to below `high`, at most `most`, together: what further passes look at.
    template <bool MASS>
    void gather(float low, float high, double most) {
        std::vector<int32_t>& tokens = scratch_.tokens;
        tokens.resize(static_cast<size_t>(most));
        const F32 from = set1(low), to = set1(high);
        int32_t* next = tokens.data();
        for (int i = 0; i < padded_; i += kLanes) {
            const F32 key = load(keys_ + i);
            for (uint32_t bits = lanes_of(less(key, to)) & ~lanes_of(less(key, from)); bits; bits &= bits - 1)
                *next++ = i + std::countr_zero(bits);
        }
        const size_t count = static_cast<size_t>(next - tokens.data()), size = (count + kLanes - 1) / kLanes * kLanes;
        tokens.resize(count);
        scratch_.near_keys.resize(size);
        scratch_.near_weights.resize(size);
        float *keys = scratch_.near_keys.data(), *weights = scratch_.near_weights.data();
        std::fill(keys + count, keys + size, kMinusInf);
        std::fill(weights + count, weights + size, 0.0f);
        for (size_t i = 0; i < count; ++i) {
            keys[i] = keys_[tokens[i]];
            if constexpr (MASS)
                weights[i] = weights_[tokens[i]];
        }
    }

    // Keeps the best tokens until their count, or mass, reaches `target`; equal logits by rising id.
    //
    // Nothing is sorted but what lies between two cuts, `low` and `high`, that a few passes bring so close together
    // that few tokens are left between them: the target is reached at or above `low` and not above `high`.
    template <bool MASS>
    void keep(double target) {
        float low = smallest_, high = std::nextafter(largest_, HUGE_VALF);
        const float all = high;
        double count_low = num_left_, count_high = 0, above = 0;
        bool gathered = false;
        double gathered_count = 0, gathered_mass = 0; // of what is not gathered, though at or above `low`
        float cuts[kCuts];
        bool guessed = guess<MASS>(target, cuts);
        for (int round = 0; count_low - count_high > kSorted && std::nextafter(low, high) < high; ++round) {
            if (!gathered && count_low <= padded_ / 16) {
                gather<MASS>(low, all, count_low);
                gathered = true;
            } else if (!gathered && count_low - count_high <= padded_ / 8) {
                gather<MASS>(low, high, count_low - count_high);
                gathered = true;
                gathered_count = count_high;
                gathered_mass = above;
            }
            for (int c = 0; c < kCuts && !guessed; ++c)
                cuts[c] = between(low, high, c + 1, round % 4 == 3);
            guessed = false;
            const Measure m = gathered ? measure<MASS>(scratch_.near_keys.data(), scratch_.near_weights.data(),
                                                       static_cast<int>(scratch_.near_keys.size()), cuts)
                                       : measure<MASS>(keys_, weights_, padded_, cuts);
            for (int c = 0; c < kCuts; ++c) {
                const double count = gathered_count + m.count[c], reached = MASS ? gathered_mass + m.mass[c] : count;
                if (reached >= target) {
                    low = cuts[c];
                    count_low = count;
                } else {
                    high = cuts[c];
                    count_high = count;
                    above = reached;
                    break;
                }
            }
        }
        if (!gathered)
            count_low <= padded_ / 16 ? gather<MASS>(low, all, count_low)
                                      : gather<MASS>(low, high, count_low - count_high);
        // Of those at `low` or above, which are all gathered where they are few, those from `high` on are kept anyway.
        std::vector<int32_t>&tokens = scratch_.tokens, &nearest = scratch_.nearest;
        nearest.clear();
        std::copy_if(tokens.begin(), tokens.end(), std::back_inserter(nearest),
                     [&](int t) { return keys_[t] >= low && keys_[t] < high; });
        if (std::nextafter(low, high) < high) {
            std::sort(nearest.begin(), nearest.end(),
                      [&](int a, int b) { return keys_[a] != keys_[b] ? keys_[a] > keys_[b] : a < b; });
        }
        size_t kept = 0;
        while (kept < nearest.size() && (above < target || (kept == 0 && count_high == 0))) {
            above += MASS ? static_cast<double>(weights_[nearest[kept]]) : 1.0;
            ++kept;
        }
        for (size_t i = kept; i < nearest.size(); ++i)
            keys_[nearest[i]] = kMinusInf;
        smallest_ = low;
        num_left_ = count_high + static_cast<double>(kept);
        if (gathered_count == 0 && count_low <= padded_ / 16) {
            std::erase_if(tokens, [&](int t) { return keys_[t] < low; });
            return compact(tokens.data(), static_cast<int>(tokens.size()));
        }
        if constexpr (MASS) { // nothing looks at keys afterwards, and a draw seldom at all weights
            least_key_ = low;
            total_ = above;
            return;
        }
        const F32 from = set1(low);
        each_run([&](int i) {
            const F32 key = load(keys_ + i);
            const Mask dropped = less(key, from);
            const F32 w = select(dropped, zero_f32(), weight_of(key));
            store(keys_ + i, select(dropped, set1(kMinusInf), key));
            store(weights_ + i, w);
            return w;
        });
    }

    // The first cuts of a selection, rising, from how the target lies among a few tokens; false where all are few. Most
    // often what is left between two of them is little enough to be gathered.
    template <bool MASS>
    bool guess(double target, float* cuts) const {
        const int stride = padded_ / kSample;
        if (stride < 8)
            return false;
        std::array<std::pair<float, float>, kSample> sample; // keys and weights
        double mass = 0;
        for (int i = 0; i < kSample; ++i) {
            sample[i] = {keys_[i * stride], MASS ? weights_[i * stride] : 1.0f};
            mass += static_cast<double>(sample[i].second);
        }
        std::sort(sample.begin(), sample.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
        const double share = target / (MASS ? total_ : static_cast<double>(padded_)) * mass;
        int at = 0;
        for (double above = static_cast<double>(sample[0].second); above < share && at < kSample - 1;)
            above += static_cast<double>(sample[++at].second);
        const int margin = 4 + at * (kSample - at) / (8 * kSample);
        const int ranks[kCuts] = {at + margin, at, at - margin};
        for (int c = 0; c < kCuts; ++c) {
            const float key = sample[std::clamp(ranks[c], 0, kSample - 1)].first;
            cuts[c] = std::clamp(key, std::nextafter(smallest_, largest_), largest_);
        }
        return true;
    }

    // Cut c of kCuts between two floats, apart from both where there is room: evenly by value, or by number of floats,
    // which ends however the logits lie.
    static float between(float low, float high, int c, bool by_order) {
        float cut = low + (high - low) * (static_cast<float>(c) / (kCuts + 1));
        if (by_order || !(cut > low && cut < high)) {
            const int64_t a = ordinal(low), b = ordinal(high);
            cut = from_ordinal(a + (b - a) * c / (kCuts + 1));
        }
        return std::max(cut, std::nextafter(low, high));
    }
    // Floats in order as integers.
    static int64_t ordinal(float x) {
        int32_t bits;
        std::memcpy(&bits, &x, 4);
        return bits >= 0 ? bits : -static_cast<int64_t>(bits & 0x7fffffff);
    }
    static float from_ordinal(int64_t n) {
        const int32_t bits = static_cast<int32_t>(n >= 0 ? n : (-n) | 0x80000000ll);
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }

    int padded_;
    float largest_, smallest_; // of the finite logits that are left
    float temperature_;
    float least_key_ = kMinusInf; // what a selection by mass left is at or above it; others' weights are still there
    SamplerScratch& scratch_;
    float *keys_, *weights_;       // logits, -inf where forbidden; their weights
    const int32_t* ids_ = nullptr; // their tokens, where they are not all of them
    double total_ = 0;
    double num_left_ = padded_; // tokens that may be left; what is forbidden counts, at first
};

} // namespace seraph
