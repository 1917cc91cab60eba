// A decoder compiled for this build: packed weights, KV memory, scratch, and the list of phases one step walks.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "attention.h"
#include "matmul.h"
#include "sampler.h"
#include "step.h"
#include "step_attention.h"
#include "threads.h"

namespace seraph {

struct DecoderShape {
    int num_layers, hidden, num_heads, num_kv_heads, head_dim, intermediate, vocab;
    float norm_eps;
};

struct DecoderLayer {
    const float *attn_norm, *ffn_norm; // [hidden]
    Matrix qkv, o, gate_up, down;
};

struct DecoderWeights {
    Matrix embed, head; // the same matrix where tied
    const float* final_norm;
    const float *rope_cos, *rope_sin; // [positions, head_dim / 2], as many as any step's positions
    std::vector<DecoderLayer> layers;
};

class Decoder {
  public:
    // `kv` is zeroed memory, owned by the caller as the weights are.
    Decoder(const DecoderShape& shape, DecoderWeights weights, const KvCache& kv, int threads);

    // Computes one step. Token ids below 0 refer to `previous`, the tokens that the step before chose.
    void run(const Step& step, const int32_t* previous);

    int threads() const { return team_.size(); }

    // From now on, or no longer, steps add up the seconds that each kind of phase takes; those so far are forgotten.
    void profile(bool on);
    // Of every kind of phase by name, in the order of a step; "prepare" is what precedes the first.
    std::vector<std::pair<std::string, double>> phase_seconds() const;

  private:
    enum class Op {
        kEmbed,
        kAttnNorm,
        kQkv,
        kRope,
        kAttend,
        kMerge,
        kOut,
        kFfnNorm,
        kGateUp,
        kDown,
        kFinal,
        kHead,
        kSample,
        kCount
    };
    struct Phase {
        Op op;
        int layer;
        const Matrix* w; // of a projection; of a phase before it, the one whose input it makes
    };
    // Rows of one projection's input, in either form, and the per-thread copies that small steps make for themselves.
    struct Activations {
        std::vector<int8_t> q;
        std::vector<float> scale, scaled_sum;
        std::vector<int32_t> start;
        std::vector<float> values;
        void make_room(int64_t rows, int quants, int floats); // so many inputs a row in each form; never shrinks
        QuantRows quants();
    };

    void prepare(const Step& step);
    int rows_of_tile(Op op, int rows) const;
    Team::Work work_of(const Phase& phase) const;
    void compute(int phase, int first, int last, int thread);

    void embed(int token);
    void norm(const float* x, const float* weight, float* out) const;
    void norm_rows(const float* x, const float* weight, const Matrix& w, Activations& to, int row, int rows, int thread);
    void norm_tile(const float* weight, const Matrix& w, int tile, int thread);
    InputRows input_of(int phase, int thread);
    void project(int phase, int first, int last, int thread);
    void epilogue(Op op, int layer, const Matrix& w, int row, int rows, int column, int from, int to, int thread,
                  const float* y);
    void rope(int layer, int tile, int thread);
    void merge(const Matrix& w, int index);
    void final_row(int row, int thread);
    void sample(int row, int thread);

    DecoderShape shape_;
    DecoderWeights weights_;
    KvCache kv_;
    std::vector<Phase> phases_;
    int widest_quants_ = 0, widest_floats_ = 0;                      // inputs of a row that phases prepare in each form
    bool gated_quants_wanted_ = false, gated_floats_wanted_ = false; // by some layer's down
    Team team_;
    StepAttention attention_;

    bool profiling_ = false;
    double prepare_seconds_ = 0, op_seconds_[static_cast<int>(Op::kCount)] = {};

    // Of the step that runs.
    Step step_{};
    const int32_t* previous_ = nullptr;
    bool own_activations_ = false; // few rows: each thread makes a projection's input for itself, a phase is saved
    std::vector<Team::Work> work_; // [phases]
    std::vector<float> x_, qkv_, attended_;   // [tokens, ...]
    std::vector<float> logits_;               // [rows, vocab], where the caller wants none
    std::vector<uint8_t> takes_best_;         // [rows] whether of a row's logits only the best are kept, ...
    std::vector<Best> bests_;                 // [threads, rows] ... here
    int64_t logits_stride_ = 0;               // floats from one row of logits to the next
    std::vector<int32_t> request_of_;         // [tokens]
    Activations shared_, gated_;              // gated_: what down reads, made group by group
    std::vector<Activations> own_;            // [threads]
    std::vector<int> own_phase_;              // [threads] the phase own_ was filled for
    std::vector<std::vector<float>> scratch_; // [threads]
    std::vector<SamplerScratch> sampler_;     // [threads]
};

} // namespace seraph
