// An encoder compiled for this build. A text is computed whole, for each of its tokens attends all of them; a batch is
// its texts one after another, without padding, and can be computed a few layers at a time.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "attention.h"
#include "matmul.h"
#include "step.h"
#include "step_attention.h"
#include "threads.h"

namespace seraph {

enum class EncoderActivation { kGelu, kGeluTanh, kSilu };
enum class Pooling { kMean, kCls };

// The numbers of engine/models/spec.py's EncoderSpec, which says what they mean.
struct EncoderShape {
    int num_layers, hidden, num_heads, intermediate, vocab, max_position, num_types, num_labels;
    float norm_eps, query_scale;
    EncoderActivation activation;
    Pooling pooling;
    bool normalize;

    int output_size() const { return num_labels > 0 ? num_labels : hidden; }
};

struct Affine {
    Matrix w;
    const float* bias; // [w.n]
};

struct LayerNorm {
    const float *weight, *bias; // [hidden]
};

struct EncoderLayer {
    Affine qkv, o, up, down;
    LayerNorm attn_norm, ffn_norm;
};

struct EncoderWeights {
    Matrix embed, positions, types;
    LayerNorm embed_norm;
    std::vector<EncoderLayer> layers;
    Affine pooler, classifier; // without a matrix where there are no labels
};

// Texts one after another: text r owns tokens starts[r] to starts[r + 1] of token_ids and types.
struct EncoderBatch {
    int num_tokens, num_texts;
    const int32_t *token_ids, *types, *starts;
    float* out; // [num_texts, output_size]
};

class Encoder {
  public:
    // `kv`, of one layer, is memory for a block for every token of the largest batch, owned by the caller as the
    // weights are. `team` must outlive the encoder.
    Encoder(const EncoderShape& shape, EncoderWeights weights, const KvCache& kv, Team& team);

    // A team must have room for so many phases at least: one layer is computed at a time where it has no more.
    static constexpr int kLeastPhases = 9 + 2;

    // Begins a batch; its arrays must stay until it is done.
    void begin(const EncoderBatch& batch);
    // Computes the next `layers` layers of the batch, with the first one its embeddings, and after the last one its
    // answers. True once it is done.
    bool run(int layers);

    // Ends the threads of a team that is this encoder's alone.
    void stop() { team_.stop(); }
    const Team& team() const { return team_; }

    // From now on, or no longer, batches add up the seconds that each kind of phase takes; those so far are forgotten.
    void profile(bool on);
    // Of every kind of phase by name, in the order of a batch.
    std::vector<std::pair<std::string, double>> phase_seconds() const;

  private:
    static constexpr int kRowsPerTile = kMaxRows; // of the row-wise phases

    enum class Op { kEmbed, kQkv, kStore, kAttend, kQuantize, kOut, kAttnNorm, kUp, kDown, kFfnNorm, kAnswer, kCount };
    struct Phase {
        Op op;
        int layer;
    };

    static std::string name_of(Op op);
    bool run_some(int layers);
    const Affine& projection_of(const Phase& phase) const;
    Team::Work work_of(const Phase& phase) const;
    void compute(const Phase& phase, int tile, int thread);
    void embed(int tile);
    void store_keys(int tile);
    void quantize_attended(int tile, const Matrix& w);
    void norm(const float* x, const LayerNorm& how, float* out) const;
    void norm_tile(int tile, const LayerNorm& how, const Matrix* next);
    void project(const Phase& phase, int tile);
    void epilogue(const Phase& phase, int row, int rows, int column, float* y);
    void pool(int text, float* out) const;
    void answer(int tile, int thread);
    void apply(const Affine& module, const float* x, int rows, Activations& room, float* y) const;

    EncoderShape shape_;
    EncoderWeights weights_;
    Team& team_;
    std::vector<float> positions_, types_; // [max_position, hidden], [num_types, hidden]
    KvCache kv_;                           // of the layer that is computed
    StepAttention attention_;

    bool gated_quants_wanted_ = false, gated_floats_wanted_ = false; // by some layer's down

    bool profiling_ = false;
    double op_seconds_[static_cast<int>(Op::kCount)] = {};

    // Of the batch that is computed.
    EncoderBatch batch_{};
    Step step_{};
    int next_layer_ = 0;
    std::vector<int32_t> positions_of_, seq_lens_, block_tables_, text_of_;
    std::vector<float> x_, qkv_, attended_; // [tokens, ...]
    Activations shared_, gated_;            // gated_: what down reads
    std::vector<Activations> own_;          // [threads] of the classifier
    std::vector<Phase> phases_;
    std::vector<Team::Work> work_;
};

} // namespace seraph
