// The projection of bfloat16 weights. Activations stay float32 and a weight widens exactly, so the only roundings are
// those of the sums. (vdpbf16ps would issue as many instructions for twice the inputs, but rounds activations to
// bfloat16 and flushes denormals: another definition.)
#include "matmul.h"
#include "simd.h"

namespace seraph {
namespace {

// What one block of sums spans: rows times vectors of 16 outputs that stay in registers together, enough of them to
// hide the latency of a multiply-add. AVX2 has half as many registers of half the width.
#if defined(SERAPH_ISA_AVX512)
constexpr int kBlockRows = 8, kUnroll = 8;
constexpr int block_vectors(int /*rows*/) {
    return 2;
}
#elif defined(SERAPH_ISA_AVX2)
constexpr int kBlockRows = 4, kUnroll = 8;
constexpr int block_vectors(int rows) {
    return rows <= 2 ? 2 : 1;
}
#else
constexpr int kBlockRows = 2, kUnroll = 1;
constexpr int block_vectors(int /*rows*/) {
    return 1;
}
#endif

constexpr int kHalf = kStrip / 2;
constexpr int kPairs = kGroup / 2; // rows of 128 bytes of one half of a cell: two inputs of each of its 32 outputs

// One group for R rows and block_vectors(R) * 16 outputs: their sum over the group, in order, is added to `out`.
template <int R>
SERAPH_INLINE void cell_block(const uint16_t* weights, const float* x, int64_t k, float* out) {
    constexpr int kVectors = block_vectors(R);
    F32 sum[R][kVectors];
    const float* rows[R];
#pragma GCC unroll kUnroll
    for (int r = 0; r < R; ++r) {
        rows[r] = x + r * k;
#pragma GCC unroll kUnroll
        for (int v = 0; v < kVectors; ++v)
            sum[r][v] = zero_f32();
    }
#pragma GCC unroll 1
    for (int pair = 0; pair < kPairs; ++pair) {
        I32 w[kVectors];
        F32 even[kVectors], odd[kVectors];
#pragma GCC unroll kUnroll
        for (int v = 0; v < kVectors; ++v) {
            w[v] = load_i32(weights + (pair * kHalf + v * kLanes) * 2);
            even[v] = bf16_even(w[v]);
        }
#pragma GCC unroll kUnroll
        for (int r = 0; r < R; ++r) {
            const F32 a = set1(rows[r][2 * pair]);
#pragma GCC unroll kUnroll
            for (int v = 0; v < kVectors; ++v)
                sum[r][v] = fma(even[v], a, sum[r][v]);
        }
#pragma GCC unroll kUnroll
        for (int v = 0; v < kVectors; ++v)
            odd[v] = bf16_odd(w[v]);
#pragma GCC unroll kUnroll
        for (int r = 0; r < R; ++r) {
            const F32 a = set1(rows[r][2 * pair + 1]);
#pragma GCC unroll kUnroll
            for (int v = 0; v < kVectors; ++v)
                sum[r][v] = fma(odd[v], a, sum[r][v]);
        }
    }
#pragma GCC unroll kUnroll
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll kUnroll
        for (int v = 0; v < kVectors; ++v) {
            float* to = out + r * kStrip + v * kLanes;
            store(to, load(to) + sum[r][v]);
        }
    }
    asm volatile("" ::: "memory"); // keeps one group's sums from being carried to the next on the stack
}

template <int R>
SERAPH_INLINE void cell_blocks(const uint16_t* weights, const float* x, int64_t k, float* out) {
    for (int c = 0; c < kHalf; c += block_vectors(R) * kLanes)
        cell_block<R>(weights + c * 2, x, k, out + c);
}

// One half of one cell for R rows, in blocks; the first of them brings the cell into the cache.
template <int R>
SERAPH_INLINE void cell_half(const uint16_t* weights, const float* x, int64_t k, float* out) {
    int row = 0;
    for (; row + kBlockRows <= R; row += kBlockRows)
        cell_blocks<kBlockRows>(weights, x + row * k, k, out + row * kStrip);
    if constexpr (R % kBlockRows != 0)
        cell_blocks<R % kBlockRows>(weights, x + row * k, k, out + row * kStrip);
}

// Cells are read in the order of their bytes, as those of quants are.
template <int R>
void strip_rows(const Matrix& w, const uint8_t* strip, int first_half, int last_half, const float* x, float* out) {
    for (int r = 0; r < R; ++r) {
        for (int c = first_half * kHalf; c < last_half * kHalf; c += kLanes)
            store(out + r * kStrip + c, zero_f32());
    }
    const int groups = w.num_groups(), k = w.k; // read once: a cell's barrier makes the compiler forget w
    const uint16_t* cell = reinterpret_cast<const uint16_t*>(strip);
    for (int g = 0; g < groups; ++g, cell += kStrip * kGroup) {
        for (int half = first_half; half < last_half; ++half)
            cell_half<R>(cell + half * kHalf * kGroup, x + g * kGroup, k, out + half * kHalf);
    }
}

using StripRows = void (*)(const Matrix&, const uint8_t*, int, int, const float*, float*);
constexpr StripRows kStripRows[kMaxRows + 1] = {nullptr,       strip_rows<1>, strip_rows<2>,
                                                strip_rows<3>, strip_rows<4>, strip_rows<5>,
                                                strip_rows<6>, strip_rows<7>, strip_rows<8>};

} // namespace

void project_strip_bf16(const Matrix& w, int strip, int first_half, int last_half, const float* x, int row, int rows,
                        float* out) {
    kStripRows[rows](w, w.data + strip * w.strip_bytes(), first_half, last_half, x + static_cast<int64_t>(row) * w.k,
                     out);
}

} // namespace seraph
