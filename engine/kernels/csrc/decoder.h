// A decoder compiled for this build: packed weights, KV memory, scratch, and the list of phases one step walks.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "attention.h"
#include "logprobs.h"
#include "matmul.h"
#include "pages.h"
#include "sampler.h"
#include "shards.h"
#include "step.h"
#include "step_attention.h"
#include "threads.h"

namespace seraph {

enum class Activation { kSilu, kGeluTanh };

// The numbers of engine/models/spec.py's DecoderSpec, which says what they mean.
struct DecoderShape {
    int num_layers, hidden, num_heads, num_kv_heads, head_dim, rope_dim, intermediate, vocab;
    float norm_eps, embedding_scale, attention_scale, attention_softcap, final_softcap; // caps: 0 for none
    Activation activation;
    int num_experts, experts_per_token; // 0: no experts
    bool normalize_experts;
};

// cos and sin of each rotated pair's angle, [positions, rope_dim / 2], as many as any step's positions.
struct RopeTable {
    const float *cos, *sin;
};

struct Expert {
    Projection gate_up, down;
};

// Vectors that a model has not are null. Where there are experts, gate_up and down are theirs alone.
struct DecoderLayer {
    const float *attn_norm, *ffn_norm;           // [hidden] before attention and before the gate
    const float *post_attn_norm, *post_ffn_norm; // [hidden] of what they add to the residual stream
    const float *q_norm, *k_norm;                // [head_dim] of each head, before it is turned
    const float* qkv_bias;                       // [q_size + 2 * kv_size]
    Projection qkv, o, gate_up, down;
    Projection router; // [num_experts, hidden], bfloat16, not divided
    std::vector<Expert> experts;
    int window; // positions that a token attends, itself included; 0: all
    RopeTable rope;
};

struct DecoderWeights {
    Projection embed, head; // the same matrix where tied; embed is not divided
    const float* final_norm;
    std::vector<DecoderLayer> layers;
};

class Decoder {
  public:
    // Weights are the caller's, and used where they lie.
    Decoder(const DecoderShape& shape, DecoderWeights weights, int num_blocks, bool kv_int8, const TeamLayout& layout);

    // What follows throws Stalled. Then this decoder and all that it was given, weights and steps, must stay as long as
    // the process: the thread may go on one day.

    // From now on every rank reads a copy of its own of the weights it computes with, on its NUMA node.
    void copy_weights();

    // Computes one step. Token ids below 0 refer to `previous`, the tokens that the step before chose.
    void run(const Step& step, const int32_t* previous);

    // The last step's logits of a row that the sampler was to keep, float32 [vocab].
    const float* kept_logits(int row) const { return logits_.data() + row * logits_stride_; }

    // Copies blocks, [n] pairs of (from, to).
    void copy_blocks(const int32_t* pairs, int n);

    // Ends the threads; there are no more steps.
    void stop() { team_.stop(); }

    // What another program may run on between two steps.
    Team& team() { return team_; }

    // From now on, or no longer, steps add up the seconds that each kind of phase takes; those so far are forgotten.
    void profile(bool on);
    // Of every kind of phase by name, in the order of a step; "prepare" is what precedes the first.
    std::vector<std::pair<std::string, double>> phase_seconds() const;

  private:
    static constexpr int kRowsPerTile = 8; // of the row-wise phases

    enum class Op {
        kEmbed,
        kAttnNorm,
        kQkv,
        kRope,
        kAttend,
        kMerge,
        kOut,
        kFfnNorm,
        kRoute,
        kDispatch,
        kGather,
        kGateUp,
        kDown,
        kCombine,
        kFinal,
        kHead,
        kSample,
        kCount
    };
    struct Phase {
        Op op;
        int layer;
        const Projection*
            w; // of a projection; of a phase before it, the one whose input it makes; of experts, the first's
    };
    // Which rows of a step go to which expert. Rows of one expert lie together, in the order of tokens, from a multiple
    // of kMaxRows on; there is a row for every token and expert it goes to.
    struct Routing {
        std::vector<int32_t> expert;       // [tokens, experts_per_token], the best first
        std::vector<float> weight;         // [tokens, experts_per_token]
        std::vector<int32_t> row_of;       // [tokens, experts_per_token]
        std::vector<int32_t> token_of;     // [rows], -1 where there is none
        std::vector<int32_t> active;       // experts that have rows
        std::vector<int32_t> first, count; // [num_experts]
        int num_rows = 0;
    };

    void prepare(const Step& step);
    std::string name_of(int phase) const;
    void make_memory(int num_blocks, bool kv_int8);
    std::vector<Projection*> divided_weights();
    void divide_weights();
    int rows_of_tile(Op op, int rows, int rank) const;
    template <class Count>
    Team::Work divided(int phase, int grain, const Count& count);
    Team::Work work_of(int phase);
    void compute(int phase, int first, int last, int thread);

    void embed(int token);
    void norm(const float* x, const float* weight, int n, float* out) const;
    const float* stream_row(const float* post_norm, int row, int thread);
    void norm_rows(const float* x, const float* weight, const Matrix& w, Activations& to, int row, int rows,
                   int thread);
    void norm_tile(int phase, int tile, int thread);
    InputRows input_of(int phase, int thread);
    void project(int phase, int first, int last, int thread);
    void epilogue(Op op, int layer, const Matrix& w, int row, int rows, int column, int from, int to, int thread,
                  float* y);
    void route(int layer, int tile);
    void dispatch();
    void gather(int tile, bool quantized);
    void combine(int layer, int tile);
    void rope(int layer, int tile, int rank, int thread);
    StepAttention& attention_of(int layer) { return attentions_[attention_at_[layer]]; }
    void merge(StepAttention& attention, const Matrix& w, int index);
    void final_row(int row, int thread);
    void sample(int row, int thread);

    DecoderShape shape_;
    DecoderWeights weights_;
    std::vector<Phase> phases_;
    int widest_quants_ = 0, widest_floats_ = 0;                      // inputs of a row that phases prepare in each form
    bool gated_quants_wanted_ = false, gated_floats_wanted_ = false; // by some layer's down
    bool post_norms_ = false;                                        // what a layer adds is normed first
    const char* other_work_ = nullptr;                               // what the team does if it is no step
    Team team_;
    std::vector<std::unique_ptr<Pages>> kv_pages_; // [ranks]
    std::vector<KvCache> kv_;                      // [ranks] of each rank's KV heads
    std::unique_ptr<RankCopies> copies_;           // of the weights, where ranks have their own
    std::vector<StepAttention> attentions_;        // one for each window
    std::vector<size_t> attention_at_;             // [layers] which one

    bool profiling_ = false;
    double prepare_seconds_ = 0, op_seconds_[static_cast<int>(Op::kCount)] = {};

    // Of the step that runs.
    Step step_{};
    Sampling sampling_{};
    Logprobs logprobs_{};
    const int32_t* previous_ = nullptr;
    bool own_activations_ = false; // few rows: each thread makes a projection's input for itself, a phase is saved
    std::vector<Team::Work> work_; // [phases]
    std::vector<int> first_tiles_; // [phases][ranks + 1] of each rank, where ranks keep to their own
    std::vector<float> x_, qkv_, attended_;   // [tokens, ...]
    std::vector<float> branch_;               // [tokens, hidden] what is to be normed and added to x_ before it is read
    std::vector<float> logits_;               // [rows, vocab], where the caller wants none
    std::vector<uint8_t> takes_best_;         // [rows] whether of a row's logits only the best are kept, ...
    std::vector<Best> bests_;                 // [threads, rows] ... here
    int64_t logits_stride_ = 0;               // floats from one row of logits to the next
    std::vector<int32_t> request_of_;         // [tokens]
    Activations shared_, gated_;              // gated_: what down reads, made group by group
    Routing routing_;                         // of the layer that is computed, ...
    Activations routed_;                      // ... what its experts read ...
    std::vector<float> routed_out_;           // ... and what they leave, [rows, hidden]
    std::vector<Activations> own_;            // [threads]
    std::vector<int> own_phase_;              // [threads] the phase own_ was filled for
    std::vector<std::vector<float>> scratch_; // [threads]
    std::vector<SamplerScratch> sampler_;     // [threads]
};

} // namespace seraph
