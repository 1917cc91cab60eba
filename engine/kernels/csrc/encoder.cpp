#include "encoder.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iterator>
#include <utility>

#include "simd.h"

namespace seraph {

Encoder::Encoder(const EncoderShape& shape, EncoderWeights weights, const KvCache& kv, Team& team)
    : shape_(shape), weights_(std::move(weights)), team_(team),
      positions_(static_cast<size_t>(shape.max_position) * shape.hidden),
      types_(static_cast<size_t>(shape.num_types) * shape.hidden), kv_(kv),
      attention_({kv}, shape.num_heads, 0, 0.0f, team.size()), own_(static_cast<size_t>(team.size())) {
    for (const EncoderLayer& layer : weights_.layers)
        (layer.down.w.quantized() ? gated_quants_wanted_ : gated_floats_wanted_) = true;
    for (int p = 0; p < shape.max_position; ++p)
        dequantize_row(weights_.positions, p, positions_.data() + static_cast<int64_t>(p) * shape.hidden);
    for (int t = 0; t < shape.num_types; ++t)
        dequantize_row(weights_.types, t, types_.data() + static_cast<int64_t>(t) * shape.hidden);
}

void Encoder::begin(const EncoderBatch& batch) {
    const int tokens = batch.num_tokens, hidden = shape_.hidden;
    batch_ = batch;
    next_layer_ = 0;
    positions_of_.resize(static_cast<size_t>(tokens));
    text_of_.resize(static_cast<size_t>(tokens));
    seq_lens_.resize(static_cast<size_t>(batch.num_texts));
    int longest = 0;
    for (int r = 0; r < batch.num_texts; ++r) {
        seq_lens_[r] = batch.starts[r + 1] - batch.starts[r];
        longest = std::max(longest, seq_lens_[r]);
        for (int t = batch.starts[r]; t < batch.starts[r + 1]; ++t) {
            positions_of_[t] = t - batch.starts[r];
            text_of_[t] = r;
        }
    }
    const int max_blocks = ceil_div(longest, kBlock);
    block_tables_.resize(static_cast<size_t>(batch.num_texts) * max_blocks);
    for (int r = 0, next = 0; r < batch.num_texts; ++r) {
        for (int i = 0; i < ceil_div(seq_lens_[r], kBlock); ++i)
            block_tables_[static_cast<size_t>(r) * max_blocks + i] = next++;
    }
    step_ = {};
    step_.num_tokens = tokens;
    step_.num_requests = batch.num_texts;
    step_.max_blocks = max_blocks;
    step_.token_ids = batch.token_ids;
    step_.positions = positions_of_.data();
    step_.query_starts = batch.starts;
    step_.seq_lens = seq_lens_.data();
    step_.block_tables = block_tables_.data();
    step_.causal = false;
    attention_.plan(step_);
    const auto grow = [](std::vector<float>& v, int64_t size) {
        if (static_cast<int64_t>(v.size()) < size)
            v.resize(static_cast<size_t>(size));
    };
    grow(x_, static_cast<int64_t>(tokens) * hidden);
    grow(qkv_, static_cast<int64_t>(tokens) * 3 * hidden);
    grow(attended_, static_cast<int64_t>(tokens) * hidden);
    shared_.make_room(tokens, hidden, 0);
    gated_.make_room(tokens, gated_quants_wanted_ ? shape_.intermediate : 0,
                     gated_floats_wanted_ ? shape_.intermediate : 0);
    for (Activations& own : own_)
        own.make_room(shape_.num_labels > 0 ? kMaxRows : 0, hidden, 0);
}

bool Encoder::run(int layers) {
    const int most = (team_.max_phases() - 2) / (kLeastPhases - 2);
    for (; layers > most; layers -= most) {
        if (run_some(most))
            return true;
    }
    return run_some(layers);
}

bool Encoder::run_some(int layers) {
    const int last = std::min(next_layer_ + layers, shape_.num_layers);
    phases_.clear();
    if (next_layer_ == 0)
        phases_.push_back({Op::kEmbed, 0});
    for (int i = next_layer_; i < last; ++i) {
        for (Op op : {Op::kQkv, Op::kStore, Op::kAttend, Op::kQuantize, Op::kOut, Op::kAttnNorm, Op::kUp, Op::kDown,
                      Op::kFfnNorm})
            phases_.push_back({op, i});
    }
    const bool done = last == shape_.num_layers;
    if (done)
        phases_.push_back({Op::kAnswer, 0});
    work_.clear();
    for (const Phase& phase : phases_)
        work_.push_back(work_of(phase));
    next_layer_ = last;
    using Clock = std::chrono::steady_clock;
    Team::After after;
    if (profiling_) {
        after = [this, before = Clock::now()](int phase) mutable {
            const Clock::time_point now = Clock::now();
            op_seconds_[static_cast<int>(phases_[static_cast<size_t>(phase)].op)] +=
                std::chrono::duration<double>(now - before).count();
            before = now;
        };
    }
    team_.run(
        work_,
        [this](int phase, int first, int last, int thread) {
            for (int tile = first; tile < last; ++tile)
                compute(phases_[static_cast<size_t>(phase)], tile, thread);
        },
        after, [this](int phase) { return name_of(phases_[static_cast<size_t>(phase)].op); });
    return done;
}

void Encoder::profile(bool on) {
    profiling_ = on;
    std::fill(std::begin(op_seconds_), std::end(op_seconds_), 0.0);
}

std::string Encoder::name_of(Op op) {
    static constexpr const char* kNames[] = {"embed",     "qkv", "store", "attend",   "quantize", "out",
                                             "attn_norm", "up",  "down",  "ffn_norm", "answer"};
    static_assert(std::size(kNames) == static_cast<size_t>(Op::kCount));
    return kNames[static_cast<size_t>(op)];
}

std::vector<std::pair<std::string, double>> Encoder::phase_seconds() const {
    std::vector<std::pair<std::string, double>> all;
    for (int i = 0; i < static_cast<int>(Op::kCount); ++i)
        all.emplace_back(name_of(static_cast<Op>(i)), op_seconds_[i]);
    return all;
}

const Affine& Encoder::projection_of(const Phase& phase) const {
    const EncoderLayer& layer = weights_.layers[static_cast<size_t>(phase.layer)];
    return phase.op == Op::kQkv   ? layer.qkv
           : phase.op == Op::kOut ? layer.o
           : phase.op == Op::kUp  ? layer.up
                                  : layer.down;
}

Team::Work Encoder::work_of(const Phase& phase) const {
    const int tokens = batch_.num_tokens, row_tiles = ceil_div(tokens, kRowsPerTile);
    const EncoderLayer& layer = weights_.layers[static_cast<size_t>(phase.layer)];
    switch (phase.op) {
    case Op::kQkv:
    case Op::kOut:
    case Op::kUp:
    case Op::kDown:
        return {projection_of(phase).w.num_strips() * ceil_div(tokens, tile_rows(tokens, team_.size())), 1};
    case Op::kAttend:
        return {attention_.num_tiles(), 1};
    case Op::kQuantize:
        return {layer.o.w.quantized() || attention_.num_split_rows() > 0 ? row_tiles : 0, 1};
    case Op::kAnswer:
        return {ceil_div(batch_.num_texts, kMaxRows), 1};
    default:
        return {row_tiles, 1};
    }
}

void Encoder::compute(const Phase& phase, int tile, int thread) {
    const size_t i = static_cast<size_t>(phase.layer);
    const EncoderLayer& layer = weights_.layers[i];
    switch (phase.op) {
    case Op::kEmbed:
        return embed(tile);
    case Op::kStore:
        return store_keys(tile);
    case Op::kAttend:
        return attention_.attend(0, tile, qkv_.data(), 3 * shape_.hidden, thread, attended_.data());
    case Op::kQuantize:
        return quantize_attended(tile, layer.o.w);
    case Op::kAttnNorm:
        return norm_tile(tile, layer.attn_norm, &layer.up.w);
    case Op::kFfnNorm:
        return norm_tile(tile, layer.ffn_norm,
                         i + 1 < weights_.layers.size() ? &weights_.layers[i + 1].qkv.w : nullptr);
    case Op::kAnswer:
        return answer(tile, thread);
    default:
        return project(phase, tile);
    }
}

void Encoder::embed(int tile) {
    const int n = shape_.hidden, end = std::min((tile + 1) * kRowsPerTile, batch_.num_tokens);
    for (int row = tile * kRowsPerTile; row < end; ++row) {
        float* x = x_.data() + static_cast<int64_t>(row) * n;
        const float* position = positions_.data() + static_cast<int64_t>(positions_of_[row]) * n;
        const float* type = types_.data() + static_cast<int64_t>(batch_.types[row]) * n;
        dequantize_row(weights_.embed, batch_.token_ids[row], x);
        for (int i = 0; i < n; i += kLanes)
            store(x + i, (load(x + i) + load(type + i)) + load(position + i));
    }
    norm_tile(tile, weights_.embed_norm, &weights_.layers.front().qkv.w);
}

// LayerNorm (Ba et al., 2016) of x, float32 [hidden]; `out` may be x.
void Encoder::norm(const float* x, const LayerNorm& how, float* out) const {
    const int n = shape_.hidden;
    F32 sum = zero_f32(), squares = zero_f32();
    for (int i = 0; i < n; i += kLanes)
        sum = sum + load(x + i);
    const F32 mean = set1(reduce_add(sum) / static_cast<float>(n));
    for (int i = 0; i < n; i += kLanes) {
        const F32 from_mean = load(x + i) - mean;
        squares = fma(from_mean, from_mean, squares);
    }
    const F32 scale = set1(1.0f / std::sqrt(reduce_add(squares) / static_cast<float>(n) + shape_.norm_eps));
    for (int i = 0; i < n; i += kLanes)
        store(out + i, fma((load(x + i) - mean) * scale, load(how.weight + i), load(how.bias + i)));
}

// The norms of some rows, in their place, and quantized where `next`, which reads them, wants that.
void Encoder::norm_tile(int tile, const LayerNorm& how, const Matrix* next) {
    const int n = shape_.hidden, row = tile * kRowsPerTile, rows = std::min(kRowsPerTile, batch_.num_tokens - row);
    float* x = x_.data() + static_cast<int64_t>(row) * n;
    for (int r = 0; r < rows; ++r)
        norm(x + r * n, how, x + r * n);
    if (next && next->quantized())
        quantize_rows(x, n, shared_.quants(), row, rows);
}

// Folds the softmax scale into the queries and writes keys and values into their blocks, head by head, for a block of
// all heads is more than a core's nearest cache holds.
void Encoder::store_keys(int tile) {
    const int n = shape_.hidden, d = kv_.head_dim, begin = tile * kRowsPerTile;
    const int end = std::min(begin + kRowsPerTile, batch_.num_tokens);
    const F32 scale = set1(shape_.query_scale);
    int blocks[kRowsPerTile];
    for (int row = begin; row < end; ++row) {
        const int entry = text_of_[row] * step_.max_blocks + positions_of_[row] / kBlock;
        blocks[row - begin] = block_tables_[entry];
    }
    for (int h = 0; h < shape_.num_heads; ++h) {
        for (int row = begin; row < end; ++row) {
            float* query = qkv_.data() + static_cast<int64_t>(row) * 3 * n + h * d;
            const auto scale_query = [&](float* x) {
                for (int i = 0; i < d; i += kLanes)
                    store(x + i, load(x + i) * scale);
            };
            scale_query(query);
            const int block = blocks[row - begin], slot = positions_of_[row] % kBlock;
            if (slot % 2 == 0 && row + 1 < end && positions_of_[row + 1] == positions_of_[row] + 1) {
                kv_.write_two(block, 0, h, slot, query + n, query + 2 * n, 3 * n);
                scale_query(query + 3 * n);
                ++row;
            } else {
                kv_.write(block, 0, h, slot, query + n, query + 2 * n);
            }
        }
    }
}

// Rows whose contexts were split become whole, and all rows are quantized where w, which reads them, wants that.
void Encoder::quantize_attended(int tile, const Matrix& w) {
    const int row = tile * kRowsPerTile, end = std::min(row + kRowsPerTile, batch_.num_tokens);
    for (int i = 0; i < attention_.num_split_rows(); ++i) {
        if (attention_.split_row(i) >= row && attention_.split_row(i) < end)
            attention_.merge(i, attended_.data());
    }
    if (w.quantized())
        quantize_rows(attended_.data() + static_cast<int64_t>(row) * w.k, w.k, shared_.quants(), row, end - row);
}

void Encoder::project(const Phase& phase, int tile) {
    const Matrix& w = projection_of(phase).w;
    const int tokens = batch_.num_tokens, size = tile_rows(tokens, team_.size()), strips = w.num_strips();
    const int begin = tile / strips * size, strip = tile % strips;
    InputRows x{shared_.quants(), x_.data()};
    if (phase.op == Op::kOut)
        x.values = attended_.data();
    else if (phase.op == Op::kDown)
        x = {gated_.quants(), gated_.values.data()};
    alignas(64) float out[kMaxRows * kStrip];
    // What the epilogue writes is fetched, to be written, before the pass, as in Decoder::project().
    const auto fetch = [&](int row, int rows) {
        if (phase.op == Op::kUp && gated_quants_wanted_) {
            for (int c = 0; c < kStrip && strip * kStrip + c < w.n; c += kGroup)
                fetch_group(w.n, gated_.quants(), row, (strip * kStrip + c) / kGroup);
            return;
        }
        float* to = phase.op == Op::kQkv ? qkv_.data() : phase.op == Op::kUp ? gated_.values.data() : x_.data();
        for (int r = row; r < row + rows; ++r) {
            for (int c = 0; c < kStrip; c += kLanes)
                __builtin_prefetch(to + static_cast<int64_t>(r) * w.n + strip * kStrip + c, 1);
        }
    };
    project_tile(w, strip, 0, 2, x, begin, std::min(size, tokens - begin), out, fetch,
                 [&](int row, int rows) { epilogue(phase, row, rows, strip * kStrip, out); });
}

// A strip whose first column is `column`, for `rows` rows from `row` on; y float32 [rows, 64] is used up.
void Encoder::epilogue(const Phase& phase, int row, int rows, int column, float* y) {
    const auto& [w, bias] = projection_of(phase);
    const int end = std::min(kStrip, w.n - column); // a multiple of kGroup
    for (int r = 0; r < rows; ++r) {
        float* out = y + r * kStrip;
        float* to = phase.op == Op::kQkv ? qkv_.data() : x_.data();
        to += static_cast<int64_t>(row + r) * w.n + column;
        for (int c = 0; c < end; c += kLanes) {
            const F32 sum = load(out + c) + load(bias + column + c);
            if (phase.op == Op::kQkv)
                store(to + c, sum);
            else if (phase.op != Op::kUp)
                store(to + c, load(to + c) + sum);
            else if (shape_.activation == EncoderActivation::kGelu)
                store(out + c, gelu(sum));
            else
                store(out + c, shape_.activation == EncoderActivation::kSilu ? silu(sum) : gelu_tanh(sum));
        }
    }
    if (phase.op != Op::kUp)
        return;
    const bool quantized = weights_.layers[static_cast<size_t>(phase.layer)].down.w.quantized();
    for (int c = 0; c < end; c += kGroup) {
        if (quantized && rows == kMaxRows) {
            quantize_groups(y + c, kStrip, w.n, gated_.quants(), row, (column + c) / kGroup);
            continue;
        }
        for (int r = 0; r < rows; ++r) {
            if (quantized)
                quantize_group(y + r * kStrip + c, w.n, gated_.quants(), row + r, (column + c) / kGroup);
            else
                std::copy_n(y + r * kStrip + c, kGroup,
                            gated_.values.data() + static_cast<int64_t>(row + r) * w.n + column + c);
        }
    }
}

// The one vector that a text's rows become, float32 [hidden].
void Encoder::pool(int text, float* out) const {
    const int n = shape_.hidden, begin = batch_.starts[text], end = batch_.starts[text + 1];
    const bool first = shape_.pooling == Pooling::kCls || shape_.num_labels > 0;
    std::copy_n(x_.data() + static_cast<int64_t>(begin) * n, n, out);
    if (!first) {
        for (int row = begin + 1; row < end; ++row) {
            for (int i = 0; i < n; i += kLanes)
                store(out + i, load(out + i) + load(x_.data() + static_cast<int64_t>(row) * n + i));
        }
        const F32 count = set1(static_cast<float>(end - begin));
        for (int i = 0; i < n; i += kLanes)
            store(out + i, load(out + i) / count);
    }
    if (!shape_.normalize || shape_.num_labels > 0)
        return;
    F32 squares = zero_f32();
    for (int i = 0; i < n; i += kLanes)
        squares = fma(load(out + i), load(out + i), squares);
    const F32 length = set1(std::max(std::sqrt(reduce_add(squares)), 1e-12f));
    for (int i = 0; i < n; i += kLanes)
        store(out + i, load(out + i) / length);
}

// The answers to kMaxRows texts.
void Encoder::answer(int tile, int thread) {
    const int n = shape_.hidden, text = tile * kMaxRows, texts = std::min(kMaxRows, batch_.num_texts - text);
    float* out = batch_.out + static_cast<int64_t>(text) * shape_.output_size();
    if (shape_.num_labels == 0) {
        for (int r = 0; r < texts; ++r)
            pool(text + r, out + r * n);
        return;
    }
    std::vector<float> pooled(static_cast<size_t>(texts) * n), dense(pooled.size());
    for (int r = 0; r < texts; ++r)
        pool(text + r, pooled.data() + r * n);
    apply(weights_.pooler, pooled.data(), texts, own_[thread], dense.data());
    for (size_t i = 0; i < dense.size(); i += kLanes)
        store(dense.data() + i, softcapped(load(dense.data() + i), 1.0f)); // tanh
    apply(weights_.classifier, dense.data(), texts, own_[thread], out);
}

// y [rows, n] of x [rows, k] through a module, for up to kMaxRows rows.
void Encoder::apply(const Affine& module, const float* x, int rows, Activations& room, float* y) const {
    const auto& [w, bias] = module;
    alignas(64) float out[kMaxRows * kStrip];
    if (w.quantized())
        quantize_rows(x, w.k, room.quants(), 0, rows);
    for (int strip = 0; strip < w.num_strips(); ++strip) {
        const int column = strip * kStrip, end = std::min(kStrip, w.n - column);
        project_strip(w, strip, 0, 2, {room.quants(), x}, 0, rows, out);
        for (int r = 0; r < rows; ++r) {
            for (int c = 0; c < end; ++c)
                y[static_cast<int64_t>(r) * w.n + column + c] = out[r * kStrip + c] + bias[column + c];
        }
    }
}

} // namespace seraph
