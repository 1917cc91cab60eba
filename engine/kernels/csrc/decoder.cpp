#include "decoder.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iterator>

#include "simd.h"

namespace seraph {
namespace {

constexpr int kOwnRows = 4;       // up to here every thread quantizes a projection's input for itself
constexpr int kPageFloats = 1024; // floats of a page of memory

// Of phases, in the order of Op.
constexpr const char* kNames[] = {"embed", "attn_norm", "qkv",    "rope",     "attend", "merge",
                                  "out",   "ffn_norm",  "router", "dispatch", "gather", "gate_up",
                                  "down",  "combine",   "final",  "head",     "sample"};

template <class T>
void grow(std::vector<T>& v, int64_t size) {
    if (static_cast<int64_t>(v.size()) < size)
        v.resize(static_cast<size_t>(size));
}

} // namespace

Decoder::Decoder(const DecoderShape& shape, DecoderWeights weights, int num_blocks, bool kv_int8,
                 const TeamLayout& layout)
    : shape_(shape), weights_(std::move(weights)), team_(layout, 13 * shape.num_layers + 4) {
    const auto threads = static_cast<size_t>(team_.size());
    own_.resize(threads);
    own_phase_.resize(threads);
    scratch_.resize(threads);
    sampler_.resize(threads);
    make_memory(num_blocks, kv_int8);
    divide_weights();
    for (const DecoderLayer& layer : weights_.layers) {
        size_t at = 0;
        while (at < attentions_.size() && attentions_[at].window() != layer.window)
            ++at;
        if (at == attentions_.size())
            attentions_.emplace_back(kv_, shape.num_heads, layer.window, shape.attention_softcap, team_.size());
        attention_at_.push_back(at);
        post_norms_ |= layer.post_attn_norm || layer.post_ffn_norm;
    }
    const auto add = [this](Op op, int layer, const Projection* w) { phases_.push_back({op, layer, w}); };
    add(Op::kEmbed, 0, &weights_.embed);
    for (int i = 0; i < shape.num_layers; ++i) {
        const DecoderLayer& layer = weights_.layers[i];
        add(Op::kAttnNorm, i, &layer.qkv);
        add(Op::kQkv, i, &layer.qkv);
        add(Op::kRope, i, nullptr);
        add(Op::kAttend, i, nullptr);
        add(Op::kMerge, i, &layer.o);
        add(Op::kOut, i, &layer.o);
        if (layer.experts.empty()) {
            add(Op::kFfnNorm, i, &layer.gate_up);
            add(Op::kGateUp, i, &layer.gate_up);
            add(Op::kDown, i, &layer.down);
            continue;
        }
        const Expert& first = layer.experts.front();
        add(Op::kFfnNorm, i, &first.gate_up);
        add(Op::kRoute, i, &layer.router);
        add(Op::kDispatch, i, nullptr);
        add(Op::kGather, i, &first.gate_up);
        add(Op::kGateUp, i, &first.gate_up);
        add(Op::kDown, i, &first.down);
        add(Op::kCombine, i, nullptr);
    }
    add(Op::kFinal, 0, &weights_.head);
    add(Op::kHead, 0, &weights_.head);
    add(Op::kSample, 0, nullptr);
    work_.resize(phases_.size());
    first_tiles_.resize(phases_.size() * (static_cast<size_t>(team_.num_ranks()) + 1));
    // What attention leaves is float32 already: a matrix of bfloat16 reads it where it lies. The gate leaves either.
    for (const auto& [op, layer, w] : phases_) {
        if (op == Op::kQkv || op == Op::kOut || op == Op::kGateUp || op == Op::kHead) {
            if (w->quantized())
                widest_quants_ = std::max(widest_quants_, w->k);
            if ((!w->quantized() && op != Op::kOut) || (op == Op::kGateUp && shape.num_experts > 0))
                widest_floats_ = std::max(widest_floats_, w->k); // a router reads floats
        } else if (op == Op::kDown) {
            (w->quantized() ? gated_quants_wanted_ : gated_floats_wanted_) = true;
        }
    }
}

void Decoder::run(const Step& step, const int32_t* previous) {
    using Clock = std::chrono::steady_clock;
    Clock::time_point last = profiling_ ? Clock::now() : Clock::time_point();
    const auto lap = [&](double& to) {
        const Clock::time_point now = Clock::now();
        to += std::chrono::duration<double>(now - last).count();
        last = now;
    };
    previous_ = previous;
    other_work_ = nullptr;
    prepare(step);
    Team::After after;
    if (profiling_) {
        lap(prepare_seconds_);
        after = [&](int phase) { lap(op_seconds_[static_cast<int>(phases_[phase].op)]); };
    }
    team_.run(
        work_, [this](int phase, int first, int last, int thread) { compute(phase, first, last, thread); }, after,
        [this](int phase) { return name_of(phase); });
}

void Decoder::profile(bool on) {
    profiling_ = on;
    prepare_seconds_ = 0;
    std::fill(std::begin(op_seconds_), std::end(op_seconds_), 0.0);
}

std::vector<std::pair<std::string, double>> Decoder::phase_seconds() const {
    static_assert(std::size(kNames) == static_cast<size_t>(Op::kCount));
    std::vector<std::pair<std::string, double>> all{{"prepare", prepare_seconds_}};
    for (size_t i = 0; i < std::size(kNames); ++i)
        all.emplace_back(kNames[i], op_seconds_[i]);
    return all;
}

std::string Decoder::name_of(int phase) const {
    if (other_work_)
        return other_work_;
    const auto [op, layer, w] = phases_[phase];
    const bool of_layer = op != Op::kEmbed && op != Op::kFinal && op != Op::kHead && op != Op::kSample;
    return std::string("phase ") + kNames[static_cast<int>(op)] +
           (of_layer ? " of layer " + std::to_string(layer) : std::string());
}

void Decoder::prepare(const Step& step) {
    const DecoderShape& s = shape_;
    const int64_t tokens = step.num_tokens, rows = step.num_rows;
    const int q_size = s.num_heads * s.head_dim;
    step_ = step;
    if (step.sampling) { // the caller's may be gone before a stalled thread is
        sampling_ = *step.sampling;
        step_.sampling = &sampling_;
    }
    if (step.logprobs) {
        logprobs_ = *step.logprobs;
        step_.logprobs = &logprobs_;
    }
    // A norm that changes the residual stream must happen once.
    own_activations_ = step.num_tokens <= kOwnRows && !post_norms_ && s.num_experts == 0;
    const int64_t choices = tokens * s.experts_per_token;
    // Each expert's rows begin a block of kMaxRows.
    const int64_t routed = choices + (kMaxRows - 1) * std::min<int64_t>(s.num_experts, choices);
    grow(x_, tokens * s.hidden);
    grow(branch_, post_norms_ ? tokens * s.hidden : 0);
    grow(qkv_, tokens * weights_.layers[0].qkv.n);
    grow(attended_, tokens * q_size);
    gated_.make_room(std::max(tokens, routed), gated_quants_wanted_ ? s.intermediate : 0,
                     gated_floats_wanted_ ? s.intermediate : 0);
    if (routed > 0) {
        routed_.make_room(routed, s.hidden, s.hidden);
        grow(routed_out_, routed * s.hidden);
        grow(routing_.expert, choices);
        grow(routing_.weight, choices);
        grow(routing_.row_of, choices);
        grow(routing_.token_of, QuantRows::whole(routed));
        grow(routing_.first, s.num_experts);
        grow(routing_.count, s.num_experts);
    }
    grow(request_of_, tokens);
    shared_.make_room(std::max(tokens, rows), widest_quants_, widest_floats_);
    if (own_activations_) {
        for (auto& own : own_)
            own.make_room(kOwnRows, widest_quants_, widest_floats_);
    }
    for (auto& scratch : scratch_)
        grow(scratch, std::max(kRowsPerTile * s.hidden, s.head_dim));
    logits_stride_ = s.vocab;
    takes_best_.assign(static_cast<size_t>(rows), 0);
    if (rows > 0 && !step.logits && step.sampling) {
        for (int r = 0; r < rows; ++r)
            takes_best_[r] = takes_best(*step.sampling, r) && !(step.logprobs && step.logprobs->wants(r));
        // Not a multiple of a page apart, where a strip of many rows would share a few lines of the caches.
        logits_stride_ = ceil_div(s.vocab, kPageFloats) * static_cast<int64_t>(kPageFloats) + kPageFloats / 16;
        grow(logits_, rows * logits_stride_);
        bests_.assign(static_cast<size_t>(rows * team_.size()), Best());
    }
    for (int r = 0; r < step.num_requests; ++r) {
        std::fill(request_of_.begin() + step.query_starts[r], request_of_.begin() + step.query_starts[r + 1], r);
    }
    for (StepAttention& attention : attentions_)
        attention.plan(step_);
    std::fill(own_phase_.begin(), own_phase_.end(), -1);
    for (size_t p = 0; p < phases_.size(); ++p)
        work_[p] = work_of(static_cast<int>(p));
}

// The head leaves next to nothing of its rows, so all threads may share them, and read its weights once.
int Decoder::rows_of_tile(Op op, int rows, int rank) const {
    return tile_rows(rows, op == Op::kHead ? 1 : team_.threads_of(rank));
}

// Tiles that each rank keeps to itself, count(rank) of them.
template <class Count>
Team::Work Decoder::divided(int phase, int grain, const Count& count) {
    int* first = &first_tiles_[static_cast<size_t>(phase) * (static_cast<size_t>(team_.num_ranks()) + 1)];
    first[0] = 0;
    for (int rank = 0; rank < team_.num_ranks(); ++rank)
        first[rank + 1] = first[rank] + count(rank);
    return {first[team_.num_ranks()], grain, first, false};
}

Team::Work Decoder::work_of(int number) {
    const Phase& phase = phases_[number];
    const int row_tiles = ceil_div(step_.num_tokens, kRowsPerTile);
    // Few rows: a tile is half a strip, so that no thread waits long for another. A thread takes both halves of a strip
    // together wherever it can, for every other half of each cell streams from memory at less than half the pace.
    const auto projection = [&](int rows, bool halves) -> Team::Work {
        const auto& shards = phase.w->shards;
        if (halves && rows <= kMaxRows)
            return divided(number, 2, [&](int rank) { return shards[rank].last_half - shards[rank].first_half; });
        return divided(number, 1, [&](int rank) {
            return shards[rank].strips.num_strips() * ceil_div(rows, rows_of_tile(phase.op, rows, rank));
        });
    };
    const bool wants_logits = step_.num_rows > 0 && (step_.logits || step_.sampling);
    const int choices = step_.num_tokens * shape_.experts_per_token, active = std::min(choices, shape_.num_experts);
    const auto of_experts = [&] { // at most
        return divided(number, 1, [&](int rank) { return active * phase.w->shards[rank].strips.num_strips(); });
    };
    switch (phase.op) {
    case Op::kEmbed:
        return {step_.num_tokens, 1};
    case Op::kAttnNorm:
    case Op::kFfnNorm:
        return {own_activations_ ? 0 : row_tiles, 1};
    case Op::kRope: // writes a rank's KV memory
        return divided(number, 1, [&](int rank) { return kv_[rank].num_kv_heads > 0 ? row_tiles : 0; });
    case Op::kAttend: { // KV heads cannot always be divided evenly
        const StepAttention& attention = attention_of(phase.layer);
        return {attention.num_tiles(), 1, attention.first_tiles(), true};
    }
    case Op::kMerge:
        return {own_activations_ || !phase.w->quantized() ? attention_of(phase.layer).num_split_rows() : row_tiles, 1};
    case Op::kQkv:
    case Op::kOut:
        return projection(step_.num_tokens, true);
    case Op::kDown:
        return shape_.num_experts > 0 ? of_experts() : projection(step_.num_tokens, true);
    case Op::kGateUp: // its epilogue needs a strip's two halves, gate and up
        return shape_.num_experts > 0 ? of_experts() : projection(step_.num_tokens, false);
    case Op::kRoute:
    case Op::kCombine:
        return {row_tiles, 1};
    case Op::kDispatch:
        return {1, 1};
    case Op::kGather: // which experts have rows is not known yet: tiles past the last row do nothing
        return {choices / kMaxRows + active, 1};
    case Op::kFinal:
        return {wants_logits || step_.hidden ? step_.num_rows : 0, 1};
    case Op::kHead:
        return projection(wants_logits ? step_.num_rows : 0, false);
    case Op::kSample:
        return {step_.sampling ? step_.num_rows : 0, 1};
    case Op::kCount:
        break;
    }
    return {0, 1};
}

void Decoder::compute(int phase, int first, int last, int thread) {
    const auto [op, i, w] = phases_[phase];
    const DecoderLayer& layer = weights_.layers[i];
    switch (op) {
    case Op::kEmbed:
        return embed(first);
    case Op::kAttnNorm:
        return norm_tile(phase, first, thread);
    case Op::kRope: {
        const int rank = team_.rank_of(thread);
        return rope(i, first - work_[phase].of_rank[rank], rank, thread);
    }
    case Op::kAttend:
        return attention_of(i).attend(i, first, qkv_.data(), layer.qkv.n, thread, attended_.data());
    case Op::kMerge:
        return merge(attention_of(i), *w, first);
    case Op::kFfnNorm:
        return norm_tile(phase, first, thread);
    case Op::kRoute:
        return route(i, first);
    case Op::kDispatch:
        return dispatch();
    case Op::kGather:
        return gather(first, w->quantized());
    case Op::kCombine:
        return combine(i, first);
    case Op::kQkv:
    case Op::kOut:
    case Op::kGateUp:
    case Op::kDown:
    case Op::kHead:
        return project(phase, first, last, thread);
    case Op::kFinal:
        return final_row(first, thread);
    case Op::kSample:
        return sample(first, thread);
    case Op::kCount:
        break;
    }
}

void Decoder::embed(int token) {
    int32_t id = step_.token_ids[token];
    if (id < 0)
        id = std::max(previous_[-1 - id], 0);
    float* x = x_.data() + static_cast<int64_t>(token) * shape_.hidden;
    dequantize_row(weights_.embed, id, x);
    if (shape_.embedding_scale != 1.0f) {
        for (int i = 0; i < shape_.hidden; ++i)
            x[i] *= shape_.embedding_scale;
    }
}

// RMSNorm (Zhang and Sennrich, 2019) of x, float32 [n]; `out` may be x.
void Decoder::norm(const float* x, const float* weight, int n, float* out) const {
    F32 sum = zero_f32();
    for (int i = 0; i < n; i += kLanes) {
        const F32 v = load(x + i);
        sum = fma(v, v, sum);
    }
    const F32 scale = set1(1.0f / std::sqrt(reduce_add(sum) / static_cast<float>(n) + shape_.norm_eps));
    for (int i = 0; i < n; i += kLanes)
        store(out + i, load(x + i) * scale * load(weight + i));
}

// The `rows` <= kRowsPerTile rows from `row` on of `to` = the norms of x, in the form that w reads.
void Decoder::norm_rows(const float* x, const float* weight, const Matrix& w, Activations& to, int row, int rows,
                        int thread) {
    const int n = shape_.hidden;
    const bool keep = !w.quantized() || shape_.num_experts > 0; // a router reads them too
    float* normed = keep ? to.values.data() + static_cast<int64_t>(row) * n : scratch_[thread].data();
    for (int r = 0; r < rows; ++r)
        norm(x + r * n, weight, n, normed + r * n);
    if (w.quantized())
        quantize_rows(normed, n, to.quants(), row, rows);
}

// Row `row` of the residual stream, after what a layer adds to it, if that waits to be normed.
const float* Decoder::stream_row(const float* post_norm, int row, int thread) {
    const int n = shape_.hidden;
    float* x = x_.data() + static_cast<int64_t>(row) * n;
    if (post_norm) {
        float* normed = scratch_[thread].data();
        norm(branch_.data() + static_cast<int64_t>(row) * n, post_norm, n, normed);
        for (int i = 0; i < n; i += kLanes)
            store(x + i, load(x + i) + load(normed + i));
    }
    return x;
}

void Decoder::norm_tile(int phase, int tile, int thread) {
    const auto [op, i, w] = phases_[phase];
    const DecoderLayer& layer = weights_.layers[i];
    const bool attention = op == Op::kAttnNorm;
    const float* before = !attention ? layer.post_attn_norm : i > 0 ? weights_.layers[i - 1].post_ffn_norm : nullptr;
    const int row = tile * kRowsPerTile, rows = std::min(kRowsPerTile, step_.num_tokens - row);
    for (int r = row; r < row + rows; ++r)
        stream_row(before, r, thread);
    norm_rows(x_.data() + static_cast<int64_t>(row) * shape_.hidden, attention ? layer.attn_norm : layer.ffn_norm, *w,
              shared_, row, rows, thread);
}

// The input of a projection in the form that its matrix reads: what the phase before it made, or, in a small step, what
// this thread makes for itself at its first tile. Both run the same code on the same rows.
InputRows Decoder::input_of(int phase, int thread) {
    const auto [op, i, w] = phases_[phase];
    const DecoderLayer& layer = weights_.layers[i];
    if (op == Op::kDown)
        return {gated_.quants(), gated_.values.data()};
    if (op == Op::kGateUp && !layer.experts.empty())
        return {routed_.quants(), routed_.values.data()};
    if (op == Op::kHead)
        return {shared_.quants(), step_.hidden ? step_.hidden : shared_.values.data()};
    if (!w->quantized() && op == Op::kOut)
        return {{}, attended_.data()};
    if (!own_activations_)
        return {shared_.quants(), shared_.values.data()};
    Activations& own = own_[thread];
    const float* from = op == Op::kOut ? attended_.data() : x_.data();
    if (own_phase_[thread] != phase) {
        if (op == Op::kOut) {
            quantize_rows(from, w->k, own.quants(), 0, step_.num_tokens);
        } else {
            const float* weight = op == Op::kQkv ? layer.attn_norm : layer.ffn_norm;
            norm_rows(from, weight, *w, own, 0, step_.num_tokens, thread);
        }
        own_phase_[thread] = phase;
    }
    return {own.quants(), own.values.data()};
}

// Tiles of a projection: a strip of the rank's, or what is the rank's of it, times tile_rows() rows, or, where the
// grain is two, halves of one. Between a pass and its epilogue its sums lie in `out`: whatever is added to a projection
// before its epilogue is added there.
void Decoder::project(int phase, int first, int last, int thread) {
    const auto [op, layer, matrix] = phases_[phase];
    const auto& experts = weights_.layers[layer].experts;
    const bool routed = (op == Op::kGateUp || op == Op::kDown) && !experts.empty();
    const int rank = team_.rank_of(thread), tile = first - work_[phase].of_rank[rank];
    const int strips = matrix->shards[rank].strips.num_strips();
    if (routed && tile / strips >= static_cast<int>(routing_.active.size()))
        return;
    const int expert = routed ? routing_.active[static_cast<size_t>(tile / strips)] : 0;
    const Projection& w = !routed ? *matrix : op == Op::kGateUp ? experts[expert].gate_up : experts[expert].down;
    const Shard& shard = w.shards[rank];
    const int num_rows = op == Op::kHead ? step_.num_rows : step_.num_tokens;
    const int size = rows_of_tile(op, num_rows, rank);
    const bool halves = work_[phase].grain == 2; // of all rows
    const int own = halves ? first / 2 - shard.first_strip() : tile % strips, chunk = halves ? 0 : tile / strips;
    const int first_half = halves ? first % 2 : shard.begin_of(own);
    const int last_half = halves ? last - first / 2 * 2 : shard.end_of(own);
    const int strip = shard.first_strip() + own;
    const int begin = routed ? routing_.first[expert] : chunk * size;
    const int count = routed ? routing_.count[expert] : std::min(size, num_rows - begin);
    const InputRows x = input_of(phase, thread);
    alignas(64) float out[kMaxRows * kStrip];
    // What the epilogue writes other threads have read: to own its lines takes as long as to read them, and stores wait
    // for that one by one, so they are fetched before the pass.
    const auto fetch = [&](int row, int rows) {
        if (op == Op::kGateUp && gated_quants_wanted_)
            return fetch_group(shape_.intermediate, gated_.quants(), row, strip);
        float* to = op == Op::kQkv                      ? qkv_.data()
                    : op != Op::kOut && op != Op::kDown ? nullptr
                    : routed                            ? routed_out_.data()
                    : post_norms_                       ? branch_.data()
                                                        : x_.data();
        for (int r = row; to && r < row + rows; ++r) {
            for (int c = first_half * 32; c < last_half * 32; c += kLanes)
                __builtin_prefetch(to + static_cast<int64_t>(r) * w.n + strip * kStrip + c, 1);
        }
    };
    project_tile(shard.strips, own, first_half, last_half, x, begin, count, out, fetch, [&](int row, int rows) {
        epilogue(op, layer, w, row, rows, strip * kStrip, first_half * 32, last_half * 32, thread, out);
    });
}

// Columns [from, to) of a strip whose first column is `column`, for `rows` rows from `row` on; y float32 [rows, 64] is
// used up.
void Decoder::epilogue(Op op, int layer, const Matrix& w, int row, int rows, int column, int from, int to, int thread,
                       float* y) {
    const int end = std::min(to, w.n - column);
    switch (op) {
    case Op::kQkv: {
        const float* bias = weights_.layers[layer].qkv_bias;
        for (int r = row; r < row + rows; ++r, y += kStrip) {
            float* to = qkv_.data() + static_cast<int64_t>(r) * w.n + column;
            std::copy(y + from, y + std::max(from, end), to + from);
            for (int c = from; bias && c < end; ++c)
                to[c] += bias[column + c];
        }
        return;
    }
    case Op::kOut:
    case Op::kDown: {
        const DecoderLayer& at = weights_.layers[layer];
        const bool routed = op == Op::kDown && !at.experts.empty();
        const bool waits = routed || (op == Op::kOut ? at.post_attn_norm : at.post_ffn_norm); // for what adds it
        for (int r = row; r < row + rows; ++r, y += kStrip) {
            float* x = (routed ? routed_out_ : waits ? branch_ : x_).data() + static_cast<int64_t>(r) * w.n + column;
            if (waits)
                std::copy(y + from, y + std::max(from, end), x + from);
            for (int c = from; !waits && c < end; ++c)
                x[c] += y[c];
        }
        return;
    }
    case Op::kGateUp: {
        // A strip is 32 gates and their 32 ups: what it makes is one group of the next projection's input.
        static_assert(kStrip / 2 == kGroup);
        const int k = shape_.intermediate;
        const DecoderLayer& at = weights_.layers[layer];
        const bool quantized = (at.experts.empty() ? at.down : at.experts.front().down).quantized();
        const bool gelu = shape_.activation == Activation::kGeluTanh;
        float groups[kMaxRows * kGroup];
        float* gated = quantized ? groups : gated_.values.data() + static_cast<int64_t>(row) * k + column / 2;
        const int stride = quantized ? kGroup : k;
        for (int r = 0; r < rows; ++r, y += kStrip) {
            for (int c = 0; c < kGroup; c += kLanes) {
                const F32 gate = load(y + c), up = load(y + kGroup + c);
                store(gated + r * stride + c, (gelu ? gelu_tanh(gate) : silu(gate)) * up);
            }
        }
        if (quantized && rows == kMaxRows)
            return quantize_groups(groups, kGroup, k, gated_.quants(), row, column / kStrip);
        // A loop of its own: a row is one long chain of operations, so those of several overlap.
        for (int r = 0; quantized && r < rows; ++r)
            quantize_group(groups + r * kGroup, k, gated_.quants(), row + r, column / kStrip);
        return;
    }
    case Op::kHead:
        for (int r = row; r < row + rows; ++r, y += kStrip) {
            for (int c = 0; shape_.final_softcap > 0 && c < kStrip; c += kLanes)
                store(y + c, softcapped(load(y + c), shape_.final_softcap));
            if (takes_best_[r]) {
                better_of(y, end, column, bests_[static_cast<size_t>(thread) * step_.num_rows + r]);
            } else {
                float* logits = step_.logits ? step_.logits : logits_.data();
                std::copy(y, y + end, logits + r * logits_stride_ + column);
            }
        }
        return;
    default:
        return;
    }
}

// Norms a rank's heads of queries and keys where the model wants that, turns them (Su et al., 2021, half-split lanes),
// folds the softmax scale into the queries and writes keys and values into their blocks.
void Decoder::rope(int layer, int tile, int rank, int thread) {
    const int d = shape_.head_dim, half = shape_.rope_dim / 2;
    const int q_size = shape_.num_heads * d, kv_size = shape_.num_kv_heads * d;
    const KvCache& kv = kv_[rank];
    const int first_kv = team_.part(shape_.num_kv_heads, rank), group = shape_.num_heads / shape_.num_kv_heads;
    const auto& [cosines, sines] = weights_.layers[layer].rope;
    const float *q_norm = weights_.layers[layer].q_norm, *k_norm = weights_.layers[layer].k_norm;
    float* key = scratch_[thread].data();
    const int end = std::min((tile + 1) * kRowsPerTile, step_.num_tokens);
    for (int row = tile * kRowsPerTile; row < end; ++row) {
        float* qkv = qkv_.data() + static_cast<int64_t>(row) * (q_size + 2 * kv_size);
        const int position = step_.positions[row];
        const float* cos = cosines + static_cast<int64_t>(position) * half;
        const float* sin = sines + static_cast<int64_t>(position) * half;
        const auto rotate = [&](const float* from, float factor, float* to) {
            int i = 0;
            for (; i + kLanes <= half; i += kLanes) {
                const F32 low = load(from + i), high = load(from + half + i), c = load(cos + i), s = load(sin + i);
                store(to + i, (low * c - high * s) * set1(factor));
                store(to + half + i, (high * c + low * s) * set1(factor));
            }
            for (; i < half; ++i) {
                const float low = from[i], high = from[half + i];
                to[i] = (low * cos[i] - high * sin[i]) * factor;
                to[half + i] = (high * cos[i] + low * sin[i]) * factor;
            }
            for (i = 2 * half; i < d; ++i)
                to[i] = from[i] * factor;
        };
        for (int h = first_kv * group; h < (first_kv + kv.num_kv_heads) * group; ++h) {
            if (q_norm)
                norm(qkv + h * d, q_norm, d, qkv + h * d);
            rotate(qkv + h * d, shape_.attention_scale, qkv + h * d);
        }
        const int32_t* table = step_.block_tables + static_cast<int64_t>(request_of_[row]) * step_.max_blocks;
        const int block = table[position / kBlock];
        for (int h = 0; h < kv.num_kv_heads; ++h) {
            float* stored = qkv + q_size + (first_kv + h) * d;
            if (k_norm)
                norm(stored, k_norm, d, stored);
            rotate(stored, 1.0f, key);
            kv.write(block, layer, h, position % kBlock, key, stored + kv_size);
        }
    }
}

// Rows whose contexts were split become whole, and all rows are quantized where w, which reads them, wants that and the
// threads do not do so for themselves.
void Decoder::merge(StepAttention& attention, const Matrix& w, int index) {
    if (own_activations_ || !w.quantized())
        return attention.merge(index, attended_.data());
    const int begin = index * kRowsPerTile, end = std::min(begin + kRowsPerTile, step_.num_tokens);
    for (int i = 0; i < attention.num_split_rows(); ++i) {
        if (attention.split_row(i) >= begin && attention.split_row(i) < end)
            attention.merge(i, attended_.data());
    }
    quantize_rows(attended_.data() + static_cast<int64_t>(begin) * w.k, w.k, shared_.quants(), begin, end - begin);
}

void Decoder::final_row(int row, int thread) {
    const int n = shape_.hidden;
    const float* x = stream_row(weights_.layers.back().post_ffn_norm, step_.logits_rows[row], thread);
    if (!step_.hidden)
        return norm_rows(x, weights_.final_norm, weights_.head, shared_, row, 1, thread);
    float* normed = step_.hidden + static_cast<int64_t>(row) * n;
    norm(x, weights_.final_norm, n, normed);
    if (weights_.head.quantized())
        quantize_rows(normed, n, shared_.quants(), row, 1);
}

void Decoder::sample(int row, int thread) {
    const int32_t given = step_.logprobs ? step_.logprobs->targets[row] : -1;
    if (takes_best_[row] && given < 0) {
        Best best;
        for (int t = 0; t < team_.size(); ++t) {
            const Best& of_thread = bests_[static_cast<size_t>(t) * step_.num_rows + row];
            if (of_thread.before(best))
                best = of_thread;
        }
        step_.chosen[row] = best.token;
        return;
    }
    const float* logits = (step_.logits ? step_.logits : logits_.data()) + row * logits_stride_;
    int32_t& chosen = step_.chosen[row];
    chosen = given >= 0 ? given : sample_row(*step_.sampling, row, logits, shape_.vocab, sampler_[thread]);
    if (step_.logprobs && step_.logprobs->wants(row))
        write_logprobs(*step_.logprobs, row, chosen, logits, shape_.vocab);
}

} // namespace seraph
