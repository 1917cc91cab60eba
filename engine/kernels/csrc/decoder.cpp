#include "decoder.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iterator>

#include "simd.h"

namespace seraph {
namespace {

constexpr int kOwnRows = 4;       // up to here every thread quantizes a projection's input for itself
constexpr int kRowsPerTile = 8;   // of the row-wise phases
constexpr int kPageFloats = 1024; // floats of a page of memory

template <class T>
void grow(std::vector<T>& v, int64_t size) {
    if (static_cast<int64_t>(v.size()) < size)
        v.resize(static_cast<size_t>(size));
}

} // namespace

void Decoder::Activations::make_room(int64_t rows, int quants, int floats) {
    const int64_t whole = QuantRows::whole(rows), groups = quants / kGroup;
    grow(q, whole * quants);
    grow(scale, whole * groups);
    grow(scaled_sum, whole * groups);
    grow(start, whole * groups);
    grow(values, rows * floats);
}

QuantRows Decoder::Activations::quants() {
    return {q.data(), scale.data(), scaled_sum.data(), start.data()};
}

Decoder::Decoder(const DecoderShape& shape, DecoderWeights weights, const KvCache& kv, int threads)
    : shape_(shape), weights_(std::move(weights)), kv_(kv), team_(threads, 9 * shape.num_layers + 4),
      attention_(kv_, shape.num_heads, threads), own_(static_cast<size_t>(threads)),
      own_phase_(static_cast<size_t>(threads)), scratch_(static_cast<size_t>(threads)),
      sampler_(static_cast<size_t>(threads)) {
    const auto add = [this](Op op, int layer, const Matrix* w) { phases_.push_back({op, layer, w}); };
    add(Op::kEmbed, 0, &weights_.embed);
    for (int i = 0; i < shape.num_layers; ++i) {
        const DecoderLayer& layer = weights_.layers[i];
        add(Op::kAttnNorm, i, &layer.qkv);
        add(Op::kQkv, i, &layer.qkv);
        add(Op::kRope, i, nullptr);
        add(Op::kAttend, i, nullptr);
        add(Op::kMerge, i, &layer.o);
        add(Op::kOut, i, &layer.o);
        add(Op::kFfnNorm, i, &layer.gate_up);
        add(Op::kGateUp, i, &layer.gate_up);
        add(Op::kDown, i, &layer.down);
    }
    add(Op::kFinal, 0, &weights_.head);
    add(Op::kHead, 0, &weights_.head);
    add(Op::kSample, 0, nullptr);
    work_.resize(phases_.size());
    // What attention leaves is float32 already: a matrix of bfloat16 reads it where it lies. The gate leaves either.
    for (const auto& [op, layer, w] : phases_) {
        if (op == Op::kQkv || op == Op::kOut || op == Op::kGateUp || op == Op::kHead) {
            if (w->quantized())
                widest_quants_ = std::max(widest_quants_, w->k);
            else if (op != Op::kOut)
                widest_floats_ = std::max(widest_floats_, w->k);
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
    prepare(step);
    Team::After after;
    if (profiling_) {
        lap(prepare_seconds_);
        after = [&](int phase) { lap(op_seconds_[static_cast<int>(phases_[phase].op)]); };
    }
    team_.run(
        work_, [this](int phase, int first, int last, int thread) { compute(phase, first, last, thread); }, after);
}

void Decoder::profile(bool on) {
    profiling_ = on;
    prepare_seconds_ = 0;
    std::fill(std::begin(op_seconds_), std::end(op_seconds_), 0.0);
}

std::vector<std::pair<std::string, double>> Decoder::phase_seconds() const {
    static constexpr const char* kNames[] = {"embed",    "attn_norm", "qkv",  "rope",  "attend", "merge", "out",
                                             "ffn_norm", "gate_up",   "down", "final", "head",   "sample"};
    static_assert(std::size(kNames) == static_cast<size_t>(Op::kCount));
    std::vector<std::pair<std::string, double>> all{{"prepare", prepare_seconds_}};
    for (size_t i = 0; i < std::size(kNames); ++i)
        all.emplace_back(kNames[i], op_seconds_[i]);
    return all;
}

void Decoder::prepare(const Step& step) {
    const DecoderShape& s = shape_;
    const int64_t tokens = step.num_tokens, rows = step.num_rows;
    const int q_size = s.num_heads * s.head_dim;
    step_ = step;
    own_activations_ = step.num_tokens <= kOwnRows;
    grow(x_, tokens * s.hidden);
    grow(qkv_, tokens * weights_.layers[0].qkv.n);
    grow(attended_, tokens * q_size);
    gated_.make_room(tokens, gated_quants_wanted_ ? s.intermediate : 0, gated_floats_wanted_ ? s.intermediate : 0);
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
            takes_best_[r] = takes_best(*step.sampling, r);
        // Not a multiple of a page apart, where a strip of many rows would share a few lines of the caches.
        logits_stride_ = ceil_div(s.vocab, kPageFloats) * static_cast<int64_t>(kPageFloats) + kPageFloats / 16;
        grow(logits_, rows * logits_stride_);
        bests_.assign(static_cast<size_t>(rows * team_.size()), Best());
    }
    for (int r = 0; r < step.num_requests; ++r) {
        std::fill(request_of_.begin() + step.query_starts[r], request_of_.begin() + step.query_starts[r + 1], r);
    }
    attention_.plan(step_);
    std::fill(own_phase_.begin(), own_phase_.end(), -1);
    for (size_t p = 0; p < phases_.size(); ++p)
        work_[p] = work_of(phases_[p]);
}

// The head leaves next to nothing of its rows, so all threads may share them, and read its weights once.
int Decoder::rows_of_tile(Op op, int rows) const {
    return tile_rows(rows, op == Op::kHead ? 1 : team_.size());
}

Team::Work Decoder::work_of(const Phase& phase) const {
    const int row_tiles = ceil_div(step_.num_tokens, kRowsPerTile);
    // Few rows: a tile is half a strip, so that no thread waits long for another. A thread takes both halves of a strip
    // together wherever it can, for every other half of each cell streams from memory at less than half the pace.
    const auto projection = [&](int rows, bool halves) -> Team::Work {
        if (halves && rows <= kMaxRows)
            return {2 * phase.w->num_strips(), 2};
        return {phase.w->num_strips() * ceil_div(rows, rows_of_tile(phase.op, rows)), 1};
    };
    const bool wants_logits = step_.num_rows > 0 && (step_.logits || step_.sampling);
    switch (phase.op) {
    case Op::kEmbed:
        return {step_.num_tokens, 1};
    case Op::kAttnNorm:
    case Op::kFfnNorm:
        return {own_activations_ ? 0 : row_tiles, 1};
    case Op::kRope:
        return {row_tiles, 1};
    case Op::kAttend:
        return {attention_.num_tiles(), 1};
    case Op::kMerge:
        return {own_activations_ || !phase.w->quantized() ? attention_.num_split_rows() : row_tiles, 1};
    case Op::kQkv:
    case Op::kOut:
    case Op::kDown:
        return projection(step_.num_tokens, true);
    case Op::kGateUp: // its epilogue needs a strip's two halves, gate and up
        return projection(step_.num_tokens, false);
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
        return norm_tile(layer.attn_norm, *w, first, thread);
    case Op::kRope:
        return rope(i, first, thread);
    case Op::kAttend:
        return attention_.attend(i, first, qkv_.data(), layer.qkv.n, thread, attended_.data());
    case Op::kMerge:
        return merge(*w, first);
    case Op::kFfnNorm:
        return norm_tile(layer.ffn_norm, *w, first, thread);
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
    dequantize_row(weights_.embed, id, x_.data() + static_cast<int64_t>(token) * shape_.hidden);
}

// RMSNorm (Zhang and Sennrich, 2019) of one row, float32 [hidden].
void Decoder::norm(const float* x, const float* weight, float* out) const {
    const int n = shape_.hidden;
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
    float* normed = w.quantized() ? scratch_[thread].data() : to.values.data() + static_cast<int64_t>(row) * n;
    for (int r = 0; r < rows; ++r)
        norm(x + r * n, weight, normed + r * n);
    if (w.quantized())
        quantize_rows(normed, n, to.quants(), row, rows);
}

void Decoder::norm_tile(const float* weight, const Matrix& w, int tile, int thread) {
    const int row = tile * kRowsPerTile, rows = std::min(kRowsPerTile, step_.num_tokens - row);
    norm_rows(x_.data() + static_cast<int64_t>(row) * shape_.hidden, weight, w, shared_, row, rows, thread);
}

// The input of a projection in the form that its matrix reads: what the phase before it made, or, in a small step, what
// this thread makes for itself at its first tile. Both run the same code on the same rows.
InputRows Decoder::input_of(int phase, int thread) {
    const auto [op, i, w] = phases_[phase];
    const DecoderLayer& layer = weights_.layers[i];
    if (op == Op::kDown)
        return {gated_.quants(), gated_.values.data()};
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

// Tiles of a projection: a strip times tile_rows() rows, or, where the grain is two, halves of one. Between a pass
// and its epilogue its sums lie in `out`: whatever is added to a projection before its epilogue is added there.
void Decoder::project(int phase, int first, int last, int thread) {
    const auto [op, layer, matrix] = phases_[phase];
    const Matrix& w = *matrix;
    const int num_rows = op == Op::kHead ? step_.num_rows : step_.num_tokens;
    const int size = rows_of_tile(op, num_rows);
    const bool halves = work_[phase].grain == 2; // of all rows
    const int strip = halves ? first / 2 : first % w.num_strips(), chunk = halves ? 0 : first / w.num_strips();
    const int first_half = halves ? first % 2 : 0, last_half = halves ? last - 2 * strip : 2;
    const int begin = chunk * size, count = std::min(size, num_rows - begin);
    const InputRows x = input_of(phase, thread);
    alignas(64) float out[kMaxRows * kStrip];
    // What the epilogue writes other threads have read: to own its lines takes as long as to read them, and stores wait
    // for that one by one, so they are fetched before the pass.
    const auto fetch = [&](int row, int rows) {
        if (op == Op::kGateUp && weights_.layers[layer].down.quantized())
            return fetch_group(shape_.intermediate, gated_.quants(), row, strip);
        float* to = op == Op::kQkv ? qkv_.data() : op == Op::kOut || op == Op::kDown ? x_.data() : nullptr;
        for (int r = row; to && r < row + rows; ++r) {
            for (int c = first_half * 32; c < last_half * 32; c += kLanes)
                __builtin_prefetch(to + static_cast<int64_t>(r) * w.n + strip * kStrip + c, 1);
        }
    };
    project_tile(w, strip, first_half, last_half, x, begin, count, out, fetch, [&](int row, int rows) {
        epilogue(op, layer, w, row, rows, strip * kStrip, first_half * 32, last_half * 32, thread, out);
    });
}

// Columns [from, to) of a strip whose first column is `column`, for `rows` rows from `row` on; y float32 [rows, 64].
void Decoder::epilogue(Op op, int layer, const Matrix& w, int row, int rows, int column, int from, int to, int thread,
                       const float* y) {
    const int end = std::min(to, w.n - column);
    switch (op) {
    case Op::kQkv:
        for (int r = row; r < row + rows; ++r, y += kStrip)
            std::copy(y + from, y + std::max(from, end), qkv_.data() + static_cast<int64_t>(r) * w.n + column + from);
        return;
    case Op::kOut:
    case Op::kDown:
        for (int r = row; r < row + rows; ++r, y += kStrip) {
            float* x = x_.data() + static_cast<int64_t>(r) * w.n + column;
            for (int c = from; c < end; ++c)
                x[c] += y[c];
        }
        return;
    case Op::kGateUp: {
        // A strip is 32 gates and their 32 ups: what it makes is one group of the next projection's input.
        static_assert(kStrip / 2 == kGroup);
        const int k = shape_.intermediate;
        const bool quantized = weights_.layers[layer].down.quantized();
        float groups[kMaxRows * kGroup];
        float* gated = quantized ? groups : gated_.values.data() + static_cast<int64_t>(row) * k + column / 2;
        const int stride = quantized ? kGroup : k;
        for (int r = 0; r < rows; ++r, y += kStrip) {
            for (int c = 0; c < kGroup; c += kLanes) {
                const F32 gate = load(y + c), one = set1(1.0f);
                // Beside one, e^-87 is as good as zero.
                store(gated + r * stride + c, gate / (one + exp_within(zero_f32() - gate)) * load(y + kGroup + c));
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

// Turns queries and keys (Su et al., 2021, half-split lanes), folds the softmax scale into the queries and writes
// keys and values into their blocks.
void Decoder::rope(int layer, int tile, int thread) {
    const int d = shape_.head_dim, half = d / 2, q_size = shape_.num_heads * d, kv_size = shape_.num_kv_heads * d;
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    float* key = scratch_[thread].data();
    const int end = std::min((tile + 1) * kRowsPerTile, step_.num_tokens);
    for (int row = tile * kRowsPerTile; row < end; ++row) {
        float* qkv = qkv_.data() + static_cast<int64_t>(row) * (q_size + 2 * kv_size);
        const int position = step_.positions[row];
        const float* cos = weights_.rope_cos + static_cast<int64_t>(position) * half;
        const float* sin = weights_.rope_sin + static_cast<int64_t>(position) * half;
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
        };
        for (int h = 0; h < shape_.num_heads; ++h)
            rotate(qkv + h * d, scale, qkv + h * d);
        const int32_t* table = step_.block_tables + static_cast<int64_t>(request_of_[row]) * step_.max_blocks;
        const int block = table[position / kBlock];
        for (int h = 0; h < shape_.num_kv_heads; ++h) {
            rotate(qkv + q_size + h * d, 1.0f, key);
            kv_.write(block, layer, h, position % kBlock, key, qkv + q_size + kv_size + h * d);
        }
    }
}

// Rows whose contexts were split become whole, and all rows are quantized where w, which reads them, wants that and the
// threads do not do so for themselves.
void Decoder::merge(const Matrix& w, int index) {
    if (own_activations_ || !w.quantized())
        return attention_.merge(index, attended_.data());
    const int begin = index * kRowsPerTile, end = std::min(begin + kRowsPerTile, step_.num_tokens);
    for (int i = 0; i < attention_.num_split_rows(); ++i) {
        if (attention_.split_row(i) >= begin && attention_.split_row(i) < end)
            attention_.merge(i, attended_.data());
    }
    quantize_rows(attended_.data() + static_cast<int64_t>(begin) * w.k, w.k, shared_.quants(), begin, end - begin);
}

void Decoder::final_row(int row, int thread) {
    const int n = shape_.hidden;
    const float* x = x_.data() + static_cast<int64_t>(step_.logits_rows[row]) * n;
    if (!step_.hidden)
        return norm_rows(x, weights_.final_norm, weights_.head, shared_, row, 1, thread);
    float* normed = step_.hidden + static_cast<int64_t>(row) * n;
    norm(x, weights_.final_norm, normed);
    if (weights_.head.quantized())
        quantize_rows(normed, n, shared_.quants(), row, 1);
}

void Decoder::sample(int row, int thread) {
    if (takes_best_[row]) {
        Best best;
        for (int t = 0; t < team_.size(); ++t) {
            const Best& of_thread = bests_[static_cast<size_t>(t) * step_.num_rows + row];
            if (of_thread.before(best))
                best = of_thread;
        }
        step_.chosen[row] = best.token;
        return;
    }
    const float* logits = step_.logits ? step_.logits : logits_.data();
    step_.chosen[row] = sample_row(*step_.sampling, row, logits + row * logits_stride_, shape_.vocab, sampler_[thread]);
}

} // namespace seraph
