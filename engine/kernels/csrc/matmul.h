// Projections: int8 activations times packed 4- or 8-bit weights, float32 activations times bfloat16 weights (the
// layout is engine/kernels/layout.py).
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace seraph {

constexpr int kStrip = 64;    // outputs of one strip
constexpr int kGroup = 32;    // inputs that share a scale
constexpr int kMaxRows = 8;   // activation rows that share one pass over the weights
constexpr int kTileRows = 64; // activation rows of one unit of work, at most

struct Matrix {
    const uint8_t* data;
    int n, k; // outputs, inputs
    int bits; // 4 or 8: quants; 16: bfloat16
    bool min; // quants: Correction.MIN, else ZERO_POINT

    bool quantized() const { return bits != 16; }
    int num_strips() const { return (n + kStrip - 1) / kStrip; }
    int num_groups() const { return k / kGroup; }
    int value_bytes() const { return kStrip * kGroup * bits / 8; }
    int cell_bytes() const { return value_bytes() + kStrip * 2 * (!quantized() ? 0 : min ? 2 : 1); }
    int64_t strip_bytes() const { return static_cast<int64_t>(num_groups()) * cell_bytes(); }
    int64_t nbytes() const { return num_strips() * strip_bytes(); }
};

// Rows of activations as a matrix of quants reads them, kMaxRows of them together, group by group: a pass over the
// weights reads its activations in the order they lie in memory, at offsets that are known when it is compiled. There
// is room for whole blocks of rows.
struct QuantRows {
    int8_t* q;         // [rows / 8][k / 32][8][32]
    float* scale;      // [rows / 8][k / 32][8] largest magnitude of the group / 127
    float* scaled_sum; // [rows / 8][k / 32][8] scale * sum(q), what MIN multiplies
    int32_t* start;    // [rows / 8][k / 32][8] -8 * sum(q), where a ZERO_POINT sum starts (times 16 for 8 bits)

    // Where a group of a row lies, in groups from the first.
    static int64_t place(int k, int row, int group) {
        return (static_cast<int64_t>(row / kMaxRows) * (k / kGroup) + group) * kMaxRows + row % kMaxRows;
    }
    // Rows that there is room for where there is room for `rows`.
    static int64_t whole(int64_t rows) { return (rows + kMaxRows - 1) / kMaxRows * kMaxRows; }
};

// The input of a projection, in the form that its matrix reads.
struct InputRows {
    QuantRows quants;
    const float* values; // [rows, k], what a matrix of bfloat16 reads
};

// Rows of one projection's input, in either form, that grow as steps need them.
struct Activations {
    std::vector<int8_t> q;
    std::vector<float> scale, scaled_sum;
    std::vector<int32_t> start;
    std::vector<float> values;
    void make_room(int64_t rows, int quants, int floats); // so many inputs a row in each form; never shrinks
    QuantRows quants();
};

// 32 values x into group `group` of row `row` of `to`, whose rows have k values.
void quantize_group(const float* x, int k, const QuantRows& to, int row, int group);
// The same of the kMaxRows rows from `row`, a multiple of kMaxRows, on, which lie `stride` floats apart: faster than
// one by one.
void quantize_groups(const float* x, int stride, int k, const QuantRows& to, int row, int group);
// Fetches the lines that quantize_group() changes for the rows of a block of kMaxRows, to be written.
void fetch_group(int k, const QuantRows& to, int row, int group);
// x, float32 [rows, k], into the rows from `row` on of `to`.
void quantize_rows(const float* x, int k, const QuantRows& to, int row, int rows);

// What a pass over a strip fetches meanwhile: `step` bytes a group.
struct Ahead {
    const uint8_t* from = nullptr;
    int step = 0;
    bool near = false; // into the first-level cache, else the second
};

// Of pass number `pass` of `passes`, of up to kMaxRows rows each, over a strip.
Ahead ahead_of(const Matrix& w, int strip, int pass, int passes, int rows);

// out[r * 64 + c] = row r times output c of a strip, for `rows` <= kMaxRows rows from `row` on, a multiple of kMaxRows.
// Only the 32-output halves [first_half, last_half) of the strip are computed. Each output's sum runs over the groups
// in order (and that of bfloat16 over each group's inputs in order), whatever `rows` is: that is what makes a row's
// result independent of its batch.
void project_strip(const Matrix& w, int strip, int first_half, int last_half, const InputRows& x, int row, int rows,
                   float* out, Ahead ahead = {});
void project_strip_bf16(const Matrix& w, int strip, int first_half, int last_half, const float* x, int row, int rows,
                        float* out); // where project_strip goes with bfloat16

// `count` rows of a strip from `begin` on, in passes; before(row, rows) precedes each, then(row, rows), which finds
// their sums in `out`, follows it. A thread goes on with the next strip.
template <class Before, class Then>
void project_tile(const Matrix& w, int strip, int first_half, int last_half, const InputRows& x, int begin, int count,
                  float* out, const Before& before, const Then& then) {
    const int passes = (count + kMaxRows - 1) / kMaxRows;
    for (int pass = 0; pass < passes; ++pass) {
        const int row = begin + pass * kMaxRows, rows = std::min(kMaxRows, begin + count - row);
        before(row, rows);
        project_strip(w, strip, first_half, last_half, x, row, rows, out, ahead_of(w, strip, pass, passes, rows));
        then(row, rows);
    }
}

// Rows of one unit of work of a projection of `rows` rows, a multiple of kMaxRows and at most kTileRows. Units of the
// same rows lie side by side, strip after strip. Where there are rows enough every thread has its own, so that what one
// phase makes of them the next finds in the same core's caches.
int tile_rows(int rows, int threads);

// Row `n` of the matrix, dequantized, float32 [k].
void dequantize_row(const Matrix& w, int n, float* out);

} // namespace seraph
