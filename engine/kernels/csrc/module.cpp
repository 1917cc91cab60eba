// The Python face of one build. What engine/kernels/validate.py refuses of a step is refused here, before anything is
// written; what comes rarely was checked there.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "decoder.h"
#include "encoder.h"
#include "gather.h"
#include "logprobs.h"
#include "matmul.h"
#include "probe.h"
#include "sampler.h"

namespace nb = nanobind;

namespace seraph {
namespace {

template <class T>
using Array = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
using Ints = Array<const int32_t>;
using Floats = Array<const float>;
using Bytes = Array<const uint8_t>;

// (data, outputs, inputs, bits, has mins)
using PackedMatrix = std::tuple<Bytes, int, int, int, bool>;

Matrix matrix_of(const PackedMatrix& packed) {
    const auto& [data, n, k, bits, min] = packed;
    const Matrix m{data.data(), n, k, bits, min};
    if (static_cast<int64_t>(data.size()) != m.nbytes()) {
        throw std::invalid_argument("packed matrix: expected " + std::to_string(m.nbytes()) + " bytes, got " +
                                    std::to_string(data.size()));
    }
    return m;
}

// Whether an array has just these dimensions.
template <class T, class... Sizes>
bool shaped(const Array<T>& array, Sizes... sizes) {
    if (array.ndim() != sizeof...(sizes))
        return false;
    size_t axis = 0;
    return ((array.shape(axis++) == static_cast<size_t>(sizes)) && ...);
}

template <class T>
int64_t length(const std::optional<Array<T>>& array) {
    return array && array->ndim() > 0 ? static_cast<int64_t>(array->shape(0)) : 0;
}

// SamplingArrays, in the order of its fields.
struct PySampling {
    Floats temperature;
    Ints top_k;
    Floats top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
    Array<const uint64_t> seed;
    Ints choice, position, history_starts, history_output_starts, history_tokens, bias_starts, bias_tokens;
    Floats bias_values;
    std::optional<Ints> again;

    Sampling view() const {
        return {temperature.data(),
                top_k.data(),
                top_p.data(),
                min_p.data(),
                repetition_penalty.data(),
                presence_penalty.data(),
                frequency_penalty.data(),
                seed.data(),
                choice.data(),
                position.data(),
                history_starts.data(),
                history_output_starts.data(),
                history_tokens.data(),
                bias_starts.data(),
                bias_tokens.data(),
                bias_values.data(),
                again ? again->data() : nullptr};
    }

    bool fits(int rows, int vocab) const {
        for (const Floats* each :
             {&temperature, &top_p, &min_p, &repetition_penalty, &presence_penalty, &frequency_penalty}) {
            if (!shaped(*each, rows))
                return false;
        }
        for (const Ints* each : {&top_k, &choice, &position, &history_output_starts}) {
            if (!shaped(*each, rows))
                return false;
        }
        return shaped(seed, rows) && shaped(history_starts, rows + 1) && shaped(bias_starts, rows + 1) &&
               shaped(history_tokens, history_tokens.size()) && shaped(bias_tokens, bias_tokens.size()) &&
               shaped(bias_values, bias_tokens.size()) && (!again || shaped(*again, rows)) &&
               seraph::fits(view(), rows, vocab,
                            {static_cast<int64_t>(history_tokens.size()), static_cast<int64_t>(bias_tokens.size())});
    }
};

// LogprobArrays, in the order of its fields.
struct PyLogprobs {
    Ints counts, targets;
    Array<int32_t> tokens;
    Array<float> logprobs;
    Array<int32_t> ranks;

    Logprobs view() const {
        return {tokens.ndim() == 2 ? static_cast<int>(tokens.shape(1)) - 1 : -1,
                counts.data(),
                targets.data(),
                tokens.data(),
                logprobs.data(),
                ranks.data()};
    }

    bool fits(int rows, int vocab) const {
        const Logprobs wanted = view();
        return wanted.most >= 0 && shaped(counts, rows) && shaped(targets, rows) &&
               shaped(tokens, rows, 1 + wanted.most) && shaped(logprobs, rows, 1 + wanted.most) &&
               shaped(ranks, rows) && seraph::fits(wanted, rows, vocab);
    }
};

// Of a thread that has stalled: its rank, its number there, the phase that waits for it, seconds.
std::optional<std::tuple<int, int, std::string, double>> told(const std::optional<Stalled>& stalled) {
    if (!stalled)
        return std::nullopt;
    return std::tuple(stalled->rank, stalled->thread, stalled->phase, stalled->seconds);
}

class Program {
  public:
    // Tensors by the names of DecoderSpec.tensor_shapes; of every layer its window and which of `ropes` it turns by.
    Program(const DecoderShape& shape, const std::map<std::string, Floats>& vectors,
            const std::map<std::string, PackedMatrix>& matrices, const std::vector<int>& windows,
            const std::vector<std::pair<Floats, Floats>>& ropes, const std::vector<int>& rope_of, int num_blocks,
            bool kv_int8, const TeamLayout& layout, bool copy_weights)
        : shape_(shape), num_blocks_(num_blocks), ropes_(ropes) {
        const auto vector = [&](const std::string& name) -> const float* {
            const auto found = vectors.find(name);
            if (found == vectors.end())
                return nullptr;
            vectors_.push_back(found->second);
            return found->second.data();
        };
        const auto matrix = [&](const std::string& name) {
            bytes_.push_back(std::get<0>(matrices.at(name)));
            return matrix_of(matrices.at(name));
        };
        DecoderWeights w;
        w.embed = matrix("embed");
        w.head = matrices.count("head") ? matrix("head") : w.embed;
        w.final_norm = vector("final_norm");
        for (int i = 0; i < shape.num_layers; ++i) {
            const std::string at = "layers." + std::to_string(i) + ".";
            DecoderLayer layer{};
            layer.attn_norm = vector(at + "attn_norm");
            layer.ffn_norm = vector(at + "ffn_norm");
            layer.post_attn_norm = vector(at + "post_attn_norm");
            layer.post_ffn_norm = vector(at + "post_ffn_norm");
            layer.q_norm = vector(at + "q_norm");
            layer.k_norm = vector(at + "k_norm");
            layer.qkv_bias = vector(at + "qkv_bias");
            layer.qkv = matrix(at + "qkv");
            layer.o = matrix(at + "o");
            if (shape.num_experts > 0) {
                layer.router = matrix(at + "router");
                for (int e = 0; e < shape.num_experts; ++e) {
                    const std::string expert = at + "experts." + std::to_string(e) + ".";
                    layer.experts.push_back({matrix(expert + "gate_up"), matrix(expert + "down")});
                    const Expert &first = layer.experts.front(), &last = layer.experts.back();
                    if (first.gate_up.quantized() != last.gate_up.quantized() ||
                        first.down.quantized() != last.down.quantized() || layer.router.quantized())
                        throw std::invalid_argument("Program: experts of a layer that read different inputs");
                }
            } else {
                layer.gate_up = matrix(at + "gate_up");
                layer.down = matrix(at + "down");
            }
            layer.window = windows.at(static_cast<size_t>(i));
            const auto& [cos, sin] = ropes_.at(static_cast<size_t>(rope_of.at(static_cast<size_t>(i))));
            layer.rope = {cos.data(), sin.data()};
            w.layers.push_back(std::move(layer));
        }
        if (vectors_.size() != vectors.size() || bytes_.size() != matrices.size())
            throw std::invalid_argument("Program: tensors that no layer has");
        decoder_ = std::make_unique<Decoder>(shape, std::move(w), num_blocks, kv_int8, layout);
        if (copy_weights)
            guard([&] { decoder_->copy_weights(); });
    }

    ~Program() {
        try {
            close();
        } catch (const Stalled&) { // what it may write stays
        }
    }
    Program(const Program&) = delete;
    Program& operator=(const Program&) = delete;

    // False, and nothing is written, for what check_batch in engine/kernels/validate.py refuses.
    bool step(Ints token_ids, Ints positions, Ints query_starts, Ints seq_lens, Ints block_tables, Ints logits_rows,
              bool causal, const PySampling* sampling, const PyLogprobs* wanted, std::optional<Array<float>> logits,
              std::optional<Array<float>> hidden, Array<int32_t> chosen) {
        Decoder& decoder = open();
        again_.reset();
        Step step{};
        step.num_tokens = static_cast<int>(token_ids.size());
        step.num_requests = static_cast<int>(seq_lens.size());
        step.num_rows = static_cast<int>(logits_rows.size());
        step.max_blocks = block_tables.ndim() == 3 ? static_cast<int>(block_tables.shape(2)) : 0;
        if (!shaped(token_ids, step.num_tokens) || !shaped(positions, step.num_tokens) ||
            !shaped(query_starts, step.num_requests + 1) || !shaped(seq_lens, step.num_requests) ||
            !shaped(block_tables, 1, step.num_requests, step.max_blocks) || !shaped(logits_rows, step.num_rows) ||
            (logits && !shaped(*logits, step.num_rows, shape_.vocab)) ||
            (hidden && !shaped(*hidden, step.num_rows, shape_.hidden)) || !shaped(chosen, sampling ? step.num_rows : 0))
            return false;
        step.token_ids = token_ids.data();
        step.positions = positions.data();
        step.query_starts = query_starts.data();
        step.seq_lens = seq_lens.data();
        step.block_tables = block_tables.data();
        step.logits_rows = logits_rows.data();
        step.causal = causal;
        Sampling how{};
        if (sampling) {
            how = sampling->view();
            step.sampling = &how;
        }
        Logprobs logprobs{};
        if (wanted) {
            logprobs = wanted->view();
            step.logprobs = &logprobs;
        }
        step.logits = logits ? logits->data() : nullptr;
        step.hidden = hidden ? hidden->data() : nullptr;
        step.chosen = chosen.data();
        nb::gil_scoped_release release;
        const StepLimits limits{shape_.vocab, static_cast<int>(ropes_.front().first.shape(0)), num_blocks_,
                                static_cast<int>(previous_.size())};
        if (!fits(step, limits) || (sampling && !sampling->fits(step.num_rows, shape_.vocab)) ||
            (wanted && !(sampling && wanted->fits(step.num_rows, shape_.vocab))))
            return false;
        guard([&] { decoder.run(step, previous_.data()); }, token_ids, positions, query_starts, seq_lens, block_tables,
              logits_rows, logits, hidden, chosen, sampling ? std::optional(*sampling) : std::nullopt,
              wanted ? std::optional(*wanted) : std::nullopt);
        previous_.assign(step.chosen, step.chosen + (sampling ? step.num_rows : 0));
        if (sampling && sampling->again)
            again_.emplace(*sampling, wanted ? std::optional(*wanted) : std::nullopt, logits);
        return true;
    }

    // Another token for a row of the last step; another thread may ask for another row.
    int32_t choose_again(int row, Array<const uint32_t> mask) {
        const Decoder& decoder = open();
        if (!again_ || row < 0 || row >= static_cast<int>(previous_.size()) || !again_->sampling.again->data()[row] ||
            !shaped(mask, (shape_.vocab + 31) / 32))
            throw std::invalid_argument("choose_again: not what the last step was asked");
        const auto& [sampling, wanted, logits] = *again_;
        nb::gil_scoped_release release;
        const float* kept = logits ? logits->data() + int64_t{row} * shape_.vocab : decoder.kept_logits(row);
        thread_local SamplerScratch scratch;
        const int32_t chosen = sample_row(sampling.view(), row, kept, shape_.vocab, scratch, mask.data());
        if (wanted && wanted->view().wants(row))
            write_logprobs(wanted->view(), row, chosen, kept, shape_.vocab);
        return previous_[static_cast<size_t>(row)] = chosen;
    }

    void copy_blocks(Ints pairs) {
        Decoder& decoder = open();
        guard([&] { decoder.copy_blocks(pairs.data(), static_cast<int>(pairs.size() / 2)); }, pairs);
    }

    void profile(bool on) { open().profile(on); }

    std::vector<std::pair<std::string, double>> phase_seconds() { return open().phase_seconds(); }

    // Of the thread that has stalled: its rank, its number there, the phase that waits for it, seconds.
    std::optional<std::tuple<int, int, std::string, double>> stalled() const { return told(stalled_); }

    void close() {
        if (decoder_)
            guard([&] { decoder_->stop(); });
        if (decoder_ && decoder_->team().broken()) // in the work of another program: what it may write stays
            keep();
        decoder_.reset();
    }

    // What an encoder may run on between two steps.
    Team& team() { return open().team(); }

  private:
    Decoder& open() {
        if (stalled_)
            throw *stalled_;
        if (!decoder_)
            throw std::runtime_error("the program is closed");
        return *decoder_;
    }

    // Does what may throw Stalled. Then all that the stalled thread may still read or write, these arrays among it,
    // stays for good: nobody owns it any more.
    template <class Work, class... Arrays>
    void guard(const Work& work, const Arrays&... arrays) {
        try {
            work();
        } catch (const Stalled& stalled) {
            stalled_.emplace(stalled);
            keep(arrays...);
            throw;
        }
    }

    template <class... Arrays>
    void keep(const Arrays&... arrays) {
        [[maybe_unused]] const auto* kept =
            new auto(std::make_tuple(decoder_.release(), std::move(vectors_), std::move(bytes_), std::move(ropes_),
                                     std::move(previous_), arrays...));
    }

    DecoderShape shape_;
    int num_blocks_;
    std::vector<Floats> vectors_; // kept alive: the decoder points into them
    std::vector<Bytes> bytes_;
    std::vector<std::pair<Floats, Floats>> ropes_; // cos and sin, [positions, rope_dim / 2] each
    std::unique_ptr<Decoder> decoder_;
    std::optional<Stalled> stalled_;
    std::vector<int32_t> previous_;
    // What rows of the last step are chosen again from, if it keeps any: arrays that it has checked.
    struct Again {
        PySampling sampling;
        std::optional<PyLogprobs> logprobs;
        std::optional<Array<float>> logits;
    };
    std::optional<Again> again_;
};

class EncoderProgram {
  public:
    // Tensors by the names of EncoderSpec.tensor_shapes. It runs on the team of the decoder of `beside`, between its
    // steps, or, where that is null, on one of its own.
    EncoderProgram(const EncoderShape& shape, const std::map<std::string, Floats>& vectors,
                   const std::map<std::string, PackedMatrix>& matrices, int max_tokens, const TeamLayout& layout,
                   Program* beside)
        : shape_(shape), max_tokens_(max_tokens), beside_(beside),
          own_team_(beside ? nullptr : std::make_unique<Team>(layout, kMaxPhases)) {
        for (const auto& [name, vector] : vectors)
            vectors_.push_back(vector);
        for (const auto& [name, packed] : matrices)
            bytes_.push_back(std::get<0>(packed));
        const auto matrix = [&](const std::string& name) { return matrix_of(matrices.at(name)); };
        const auto affine = [&](const std::string& name) -> Affine {
            return {matrix(name), vectors.at(name + "_bias").data()};
        };
        const auto norm = [&](const std::string& name) -> LayerNorm {
            return {vectors.at(name).data(), vectors.at(name + "_bias").data()};
        };
        EncoderWeights w{matrix("embed"), matrix("positions"), matrix("types"), norm("embed_norm"), {}, {}, {}};
        for (int i = 0; i < shape.num_layers; ++i) {
            const std::string at = "layers." + std::to_string(i) + ".";
            w.layers.push_back({affine(at + "qkv"), affine(at + "o"), affine(at + "up"), affine(at + "down"),
                                norm(at + "attn_norm"), norm(at + "ffn_norm")});
        }
        if (shape.num_labels > 0) {
            w.pooler = affine("pooler");
            w.classifier = affine("classifier");
        }
        KvCache kv{nullptr, 1, shape.num_heads, shape.hidden / shape.num_heads, false};
        kv_ = std::make_unique<Pages>(kv.block_bytes() * max_tokens);
        kv.data = kv_->as<uint8_t>();
        encoder_ = std::make_unique<Encoder>(shape, std::move(w), kv, beside ? beside->team() : *own_team_);
    }

    ~EncoderProgram() {
        try {
            close();
        } catch (const Stalled&) { // what it may write stays
        }
    }
    EncoderProgram(const EncoderProgram&) = delete;
    EncoderProgram& operator=(const EncoderProgram&) = delete;

    // False, and nothing changes, for arrays that check_texts in engine/kernels/validate.py refuses.
    bool begin(Ints token_ids, Ints types, Ints starts, Array<float> out) {
        Encoder& encoder = open();
        const int tokens = static_cast<int>(token_ids.size()), texts = static_cast<int>(starts.size()) - 1;
        if (tokens < 1 || tokens > max_tokens_ || texts < 1 || !shaped(token_ids, tokens) || !shaped(types, tokens) ||
            !shaped(starts, texts + 1) || !shaped(out, texts, shape_.output_size()) || starts.data()[0] != 0 ||
            starts.data()[texts] != tokens)
            return false;
        for (int r = 0; r < texts; ++r) {
            const int64_t length = static_cast<int64_t>(starts.data()[r + 1]) - starts.data()[r];
            if (length < 1 || length > shape_.max_position)
                return false;
        }
        for (int t = 0; t < tokens; ++t) {
            const int32_t id = token_ids.data()[t], type = types.data()[t];
            if (id < 0 || id >= shape_.vocab || type < 0 || type >= shape_.num_types)
                return false;
        }
        token_ids_ = token_ids;
        types_ = types;
        starts_ = starts;
        out_ = out;
        running_ = true;
        encoder.begin({tokens, texts, token_ids.data(), types.data(), starts.data(), out.data()});
        return true;
    }

    bool run(int layers) {
        Encoder& encoder = open();
        if (!running_ || layers < 1)
            throw std::invalid_argument("run: expected a batch that was begun and at least one layer");
        {
            nb::gil_scoped_release release;
            guard([&] { running_ = !encoder.run(layers); });
        }
        if (!running_) {
            token_ids_.reset();
            types_.reset();
            starts_.reset();
            out_.reset();
        }
        return !running_;
    }

    void profile(bool on) { open().profile(on); }

    std::vector<std::pair<std::string, double>> phase_seconds() { return open().phase_seconds(); }

    // As Program::stalled().
    std::optional<std::tuple<int, int, std::string, double>> stalled() const { return told(stalled_); }

    void close() {
        running_ = false;
        if (encoder_ && own_team_)
            guard([&] { encoder_->stop(); });
        encoder_.reset();
        own_team_.reset();
        kv_.reset();
    }

  private:
    static constexpr int kMaxPhases = 256;

    // As in Program.
    template <class Work>
    void guard(const Work& work) {
        try {
            work();
        } catch (const Stalled& stalled) {
            stalled_.emplace(stalled);
            [[maybe_unused]] const auto* kept = new auto(std::make_tuple(
                encoder_.release(), own_team_.release(), kv_.release(), std::move(vectors_), std::move(bytes_),
                std::move(token_ids_), std::move(types_), std::move(starts_), std::move(out_)));
            throw;
        }
    }

    Encoder& open() {
        if (stalled_)
            throw *stalled_;
        if (beside_)
            beside_->team(); // throws where it is closed, or has stalled
        if (!encoder_)
            throw std::runtime_error("the program is closed");
        return *encoder_;
    }

    EncoderShape shape_;
    int max_tokens_;
    Program* beside_;
    std::vector<Floats> vectors_; // kept alive, as the matrices' bytes: the encoder points into them
    std::vector<Bytes> bytes_;
    std::unique_ptr<Pages> kv_;
    std::unique_ptr<Team> own_team_;
    std::unique_ptr<Encoder> encoder_;
    std::optional<Stalled> stalled_;
    bool running_ = false;
    std::optional<Ints> token_ids_, types_, starts_; // of the batch that is computed
    std::optional<Array<float>> out_;
};

// y float32 [M, n] = x float32 [M, k] through the projection, with one thread, `rows` at a time.
void matmul(const PackedMatrix& packed, Floats x, int rows, Array<float> y) {
    const Matrix w = matrix_of(packed);
    const int m = static_cast<int>(x.size()) / w.k;
    if (rows < 1 || rows > kMaxRows || static_cast<int64_t>(x.size()) != static_cast<int64_t>(m) * w.k ||
        static_cast<int64_t>(y.size()) != static_cast<int64_t>(m) * w.n) {
        throw std::invalid_argument("matmul: shapes do not fit");
    }
    nb::gil_scoped_release release;
    const size_t groups = static_cast<size_t>(kMaxRows) * static_cast<size_t>(w.num_groups());
    std::vector<int8_t> q(groups * kGroup);
    std::vector<float> scale(groups), scaled_sum(groups);
    std::vector<int32_t> start(groups);
    alignas(64) float out[kMaxRows * kStrip];
    for (int row = 0; row < m; row += rows) {
        const float* values = x.data() + static_cast<int64_t>(row) * w.k;
        const InputRows input{{q.data(), scale.data(), scaled_sum.data(), start.data()}, values};
        const int count = std::min(rows, m - row);
        if (w.quantized())
            quantize_rows(values, w.k, input.quants, 0, count);
        for (int strip = 0; strip < w.num_strips(); ++strip) {
            const int columns = std::min(kStrip, w.n - strip * kStrip);
            project_strip(w, strip, 0, 2, input, 0, count, out);
            for (int r = 0; r < count; ++r) {
                std::copy_n(out + r * kStrip, columns, y.data() + static_cast<int64_t>(row + r) * w.n + strip * kStrip);
            }
        }
    }
}

// One token for each row of logits float32 [rows, vocab]; with masks, uint32 [rows, vocab / 32], the one drawn again.
void sample(Floats logits, const PySampling& how, Array<int32_t> chosen, std::optional<Array<const uint32_t>> masks) {
    const int rows = static_cast<int>(chosen.size());
    if (rows < 1 || logits.size() % chosen.size() != 0)
        throw std::invalid_argument("sample: shapes do not fit");
    const int vocab = static_cast<int>(logits.size() / chosen.size()), words = (vocab + 31) / 32;
    if (masks && !shaped(*masks, rows, words))
        throw std::invalid_argument("sample: the masks' shape does not fit");
    const Sampling sampling = how.view();
    nb::gil_scoped_release release;
    SamplerScratch scratch;
    for (int r = 0; r < rows; ++r) {
        const uint32_t* mask = masks ? masks->data() + static_cast<int64_t>(r) * words : nullptr;
        chosen.data()[r] =
            sample_row(sampling, r, logits.data() + static_cast<int64_t>(r) * vocab, vocab, scratch, mask);
    }
}

// Log-probabilities of rows of logits float32 [rows, vocab]; every row's token must be given.
void logprobs(Floats logits, const PyLogprobs& wanted) {
    const int rows = static_cast<int>(wanted.counts.size());
    if (logits.ndim() != 2 || !wanted.fits(rows, static_cast<int>(logits.shape(1))) ||
        logits.shape(0) != static_cast<size_t>(rows))
        throw std::invalid_argument("logprobs: shapes do not fit");
    const int vocab = static_cast<int>(logits.shape(1));
    const Logprobs view = wanted.view();
    for (int r = 0; r < rows; ++r) {
        if (view.wants(r))
            write_logprobs(view, r, view.targets[r], logits.data() + static_cast<int64_t>(r) * vocab, vocab);
    }
}

// Seconds that a team of `threads` needs for `turns` projections of m rows, cycling through `copies` matrices that lie
// one after another in `packed`.
double time_matmul(const PackedMatrix& packed, int copies, int m, int turns, int threads) {
    const auto& [data, n, k, bits, min] = packed;
    Matrix w{data.data(), n, k, bits, min};
    if (m < 1 || copies < 1 || turns < 1 || threads < 1 || static_cast<int64_t>(data.size()) != w.nbytes() * copies) {
        throw std::invalid_argument("time_matmul: expected copies * nbytes bytes and positive counts");
    }
    nb::gil_scoped_release release;
    const size_t groups = static_cast<size_t>(QuantRows::whole(m)) * static_cast<size_t>(w.num_groups());
    std::vector<int8_t> q(groups * kGroup, 3);
    std::vector<float> scale(groups, 0.01f), scaled_sum(groups, 0.01f);
    std::vector<int32_t> start(groups, 0);
    const std::vector<float> values(q.size(), 0.03f);
    const InputRows x{{q.data(), scale.data(), scaled_sum.data(), start.data()}, values.data()};
    Team team(threads, turns);
    const int size = tile_rows(m, threads), strips = w.num_strips();
    const std::vector<Team::Work> work(static_cast<size_t>(turns), {strips * ((m + size - 1) / size), 1});
    const Team::Tiles tiles = [&](int turn, int index, int, int) {
        Matrix mine = w;
        mine.data += turn % copies * w.nbytes();
        alignas(64) float out[kMaxRows * kStrip];
        const int begin = index / strips * size;
        project_tile(
            mine, index % strips, 0, 2, x, begin, std::min(size, m - begin), out, [](int, int) {}, [](int, int) {});
    };
    const auto now = [] { return std::chrono::steady_clock::now(); };
    const auto start_time = now();
    team.run(work, tiles);
    return std::chrono::duration<double>(now() - start_time).count();
}

} // namespace

NB_MODULE(SERAPH_MODULE, m) {
    nb::enum_<Activation>(m, "Activation").value("silu", Activation::kSilu).value("gelu_tanh", Activation::kGeluTanh);
    nb::class_<DecoderShape>(m, "DecoderShape")
        .def(nb::init<int, int, int, int, int, int, int, int, float, float, float, float, float, Activation, int, int,
                      bool>(),
             nb::arg("num_layers"), nb::arg("hidden"), nb::arg("num_heads"), nb::arg("num_kv_heads"),
             nb::arg("head_dim"), nb::arg("rope_dim"), nb::arg("intermediate"), nb::arg("vocab"), nb::arg("norm_eps"),
             nb::arg("embedding_scale"), nb::arg("attention_scale"), nb::arg("attention_softcap"),
             nb::arg("final_softcap"), nb::arg("activation"), nb::arg("num_experts"), nb::arg("experts_per_token"),
             nb::arg("normalize_experts"));
    nb::class_<PySampling>(m, "Sampling")
        .def(nb::init<Floats, Ints, Floats, Floats, Floats, Floats, Floats, Array<const uint64_t>, Ints, Ints, Ints,
                      Ints, Ints, Ints, Ints, Floats, std::optional<Ints>>(),
             nb::arg("temperature").noconvert(), nb::arg("top_k").noconvert(), nb::arg("top_p").noconvert(),
             nb::arg("min_p").noconvert(), nb::arg("repetition_penalty").noconvert(),
             nb::arg("presence_penalty").noconvert(), nb::arg("frequency_penalty").noconvert(),
             nb::arg("seed").noconvert(), nb::arg("choice").noconvert(), nb::arg("position").noconvert(),
             nb::arg("history_starts").noconvert(), nb::arg("history_output_starts").noconvert(),
             nb::arg("history_tokens").noconvert(), nb::arg("bias_starts").noconvert(),
             nb::arg("bias_tokens").noconvert(), nb::arg("bias_values").noconvert(),
             nb::arg("again").noconvert().none());
    nb::class_<PyLogprobs>(m, "Logprobs")
        .def(nb::init<Ints, Ints, Array<int32_t>, Array<float>, Array<int32_t>>(), nb::arg("counts").noconvert(),
             nb::arg("targets").noconvert(), nb::arg("tokens").noconvert(), nb::arg("logprobs").noconvert(),
             nb::arg("ranks").noconvert());
    nb::exception<Stalled>(m, "Stalled", PyExc_RuntimeError);
    nb::class_<TeamLayout>(m, "TeamLayout")
        .def(nb::init<std::vector<int>, std::vector<std::vector<int>>, double, int>(), nb::arg("threads"),
             nb::arg("cpus"), nb::arg("stall_seconds"), nb::arg("exit_status"));
    nb::class_<Program>(m, "Program")
        .def(nb::init<const DecoderShape&, const std::map<std::string, Floats>&,
                      const std::map<std::string, PackedMatrix>&, const std::vector<int>&,
                      const std::vector<std::pair<Floats, Floats>>&, const std::vector<int>&, int, bool,
                      const TeamLayout&, bool>(),
             nb::arg("shape"), nb::arg("vectors"), nb::arg("matrices"), nb::arg("windows"), nb::arg("ropes"),
             nb::arg("rope_of"), nb::arg("num_blocks"), nb::arg("kv_int8"), nb::arg("layout"), nb::arg("copy_weights"))
        // What has another type is not converted, which would be a copy, but refused.
        .def("step", &Program::step, nb::arg("token_ids").noconvert(), nb::arg("positions").noconvert(),
             nb::arg("query_starts").noconvert(), nb::arg("seq_lens").noconvert(), nb::arg("block_tables").noconvert(),
             nb::arg("logits_rows").noconvert(), nb::arg("causal"), nb::arg("sampling").none(),
             nb::arg("logprobs").none(), nb::arg("logits").noconvert().none(), nb::arg("hidden").noconvert().none(),
             nb::arg("chosen").noconvert())
        .def("choose_again", &Program::choose_again, nb::arg("row"), nb::arg("mask").noconvert())
        .def("copy_blocks", &Program::copy_blocks, nb::arg("pairs"))
        .def("profile", &Program::profile, nb::arg("on"))
        .def("phase_seconds", &Program::phase_seconds)
        .def("stalled", &Program::stalled)
        .def("close", &Program::close, nb::call_guard<nb::gil_scoped_release>());
    nb::enum_<EncoderActivation>(m, "EncoderActivation")
        .value("gelu", EncoderActivation::kGelu)
        .value("gelu_tanh", EncoderActivation::kGeluTanh)
        .value("silu", EncoderActivation::kSilu);
    nb::enum_<Pooling>(m, "Pooling").value("mean", Pooling::kMean).value("cls", Pooling::kCls);
    nb::class_<EncoderShape>(m, "EncoderShape")
        .def(nb::init<int, int, int, int, int, int, int, int, float, float, EncoderActivation, Pooling, bool>(),
             nb::arg("num_layers"), nb::arg("hidden"), nb::arg("num_heads"), nb::arg("intermediate"), nb::arg("vocab"),
             nb::arg("max_position"), nb::arg("num_types"), nb::arg("num_labels"), nb::arg("norm_eps"),
             nb::arg("query_scale"), nb::arg("activation"), nb::arg("pooling"), nb::arg("normalize"));
    nb::class_<EncoderProgram>(m, "EncoderProgram")
        .def(nb::init<const EncoderShape&, const std::map<std::string, Floats>&,
                      const std::map<std::string, PackedMatrix>&, int, const TeamLayout&, Program*>(),
             nb::arg("shape"), nb::arg("vectors"), nb::arg("matrices"), nb::arg("max_tokens"), nb::arg("layout"),
             nb::arg("beside").none(), nb::keep_alive<1, 7>())
        .def("begin", &EncoderProgram::begin, nb::arg("token_ids").noconvert(), nb::arg("types").noconvert(),
             nb::arg("starts").noconvert(), nb::arg("out").noconvert())
        .def("run", &EncoderProgram::run, nb::arg("layers"))
        .def("profile", &EncoderProgram::profile, nb::arg("on"))
        .def("phase_seconds", &EncoderProgram::phase_seconds)
        .def("stalled", &EncoderProgram::stalled)
        .def("close", &EncoderProgram::close, nb::call_guard<nb::gil_scoped_release>());
    m.def("matmul", &matmul, nb::arg("matrix"), nb::arg("x"), nb::arg("rows"), nb::arg("y"));
    m.def("sample", &sample, nb::arg("logits"), nb::arg("how"), nb::arg("chosen"), nb::arg("masks") = nb::none());
    m.def("logprobs", &logprobs, nb::arg("logits"), nb::arg("wanted"));
    m.def("time_matmul", &time_matmul, nb::arg("matrix"), nb::arg("copies"), nb::arg("m"), nb::arg("turns"),
          nb::arg("threads"));
    m.def("time_gather", &time_gather, nb::arg("bytes"), nb::arg("layout"), nb::arg("turns"),
          nb::call_guard<nb::gil_scoped_release>());
    m.def("time_copy", &time_copy, nb::arg("bytes"), nb::arg("turns"), nb::call_guard<nb::gil_scoped_release>());
    m.def("read_bandwidth", &read_bandwidth, nb::arg("bytes"), nb::arg("threads"),
          nb::call_guard<nb::gil_scoped_release>());
    m.def("int8_rate", &int8_rate, nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>());
    m.def("float32_rate", &float32_rate, nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>());
    m.def("bf16_rate", &bf16_rate, nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>());
    m.def("cpu_supports", &cpu_supports, nb::arg("isa"));
    m.def("uniform", &uniform, nb::arg("seed"), nb::arg("choice"), nb::arg("position"), nb::arg("again") = 0);
}

} // namespace seraph
