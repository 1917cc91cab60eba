// simd.h for AVX-512 with VNNI: one register holds the sixteen lanes. Included by simd.h alone.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace seraph {

struct F32 {
    __m512 v;
};
struct I32 {
    __m512i v;
};
using Mask = __mmask16;

constexpr int kRegisters = 32; // that hold sixteen lanes

SERAPH_INLINE F32 zero_f32() {
    return {_mm512_setzero_ps()};
}
SERAPH_INLINE F32 set1(float x) {
    return {_mm512_set1_ps(x)};
}
SERAPH_INLINE F32 load(const float* p) {
    return {_mm512_loadu_ps(p)};
}
SERAPH_INLINE void store(float* p, F32 a) {
    _mm512_storeu_ps(p, a.v);
}
SERAPH_INLINE F32 operator+(F32 a, F32 b) {
    return {_mm512_add_ps(a.v, b.v)};
}
SERAPH_INLINE F32 operator-(F32 a, F32 b) {
    return {_mm512_sub_ps(a.v, b.v)};
}
SERAPH_INLINE F32 operator*(F32 a, F32 b) {
    return {_mm512_mul_ps(a.v, b.v)};
}
SERAPH_INLINE F32 operator/(F32 a, F32 b) {
    return {_mm512_div_ps(a.v, b.v)};
}
SERAPH_INLINE F32 fma(F32 a, F32 b, F32 c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
SERAPH_INLINE F32 max(F32 a, F32 b) {
    return {_mm512_max_ps(a.v, b.v)};
}
SERAPH_INLINE F32 min(F32 a, F32 b) {
    return {_mm512_min_ps(a.v, b.v)};
}
SERAPH_INLINE F32 abs(F32 a) {
    return {_mm512_abs_ps(a.v)};
}
SERAPH_INLINE Mask less(F32 a, F32 b) {
    return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ);
}
SERAPH_INLINE Mask first_lanes(int n) {
    return static_cast<Mask>((1u << n) - 1u);
}
// Bit i is lane i.
SERAPH_INLINE uint32_t lanes_of(Mask m) {
    return m;
}
SERAPH_INLINE F32 select(Mask m, F32 yes, F32 no) {
    return {_mm512_mask_blend_ps(m, no.v, yes.v)};
}

SERAPH_INLINE I32 set1_i32(int32_t x) {
    return {_mm512_set1_epi32(x)};
}
SERAPH_INLINE I32 load_i32(const void* p) {
    return {_mm512_loadu_si512(p)};
}
SERAPH_INLINE void store(int32_t* p, I32 a) {
    _mm512_storeu_si512(p, a.v);
}
SERAPH_INLINE I32 operator+(I32 a, I32 b) {
    return {_mm512_add_epi32(a.v, b.v)};
}
SERAPH_INLINE F32 to_f32(I32 a) {
    return {_mm512_cvtepi32_ps(a.v)};
}
SERAPH_INLINE I32 round_i32(F32 a) {
    return {_mm512_cvtps_epi32(a.v)};
} // to nearest, ties to even
template <int N>
SERAPH_INLINE I32 shift_left(I32 a) {
    return {_mm512_slli_epi32(a.v, N)};
}
SERAPH_INLINE F32 as_f32(I32 a) {
    return {_mm512_castsi512_ps(a.v)};
}
SERAPH_INLINE I32 as_i32(F32 a) {
    return {_mm512_castps_si512(a.v)};
}

SERAPH_INLINE F32 load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// A register of bf16 pairs: `even` are the low, `odd` the high halves of its 16 lanes.
SERAPH_INLINE F32 bf16_even(I32 a) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))};
}
SERAPH_INLINE F32 bf16_odd(I32 a) {
    return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
SERAPH_INLINE I32 low_nibbles(I32 a) {
    return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))};
}
SERAPH_INLINE I32 high_nibbles(I32 a) {
    return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))};
}

SERAPH_INLINE float reduce_add(F32 a) {
    __m256 s = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
SERAPH_INLINE float reduce_max(F32 a) {
    return _mm512_reduce_max_ps(a.v);
}
SERAPH_INLINE int32_t reduce_add(I32 a) {
    return _mm512_reduce_add_epi32(a.v);
}
// Eight reductions at once: lane r of the lower eight is that of rows[r]. Two registers become one in every round, so
// there are half as many shuffles as in eight reductions by themselves.
template <class Join>
SERAPH_INLINE __m512 reduce_rows(const __m512 (&rows)[8], const Join& join) {
    __m512 two[4]; // rows i and i + 1, half and half
    for (int i = 0; i < 4; ++i) {
        two[i] = join(_mm512_shuffle_f32x4(rows[2 * i], rows[2 * i + 1], 0x44),
                      _mm512_shuffle_f32x4(rows[2 * i], rows[2 * i + 1], 0xee));
    }
    __m512 four[2]; // rows i to i + 3, a quarter each
    for (int i = 0; i < 2; ++i) {
        four[i] = join(_mm512_shuffle_f32x4(two[2 * i], two[2 * i + 1], 0x88),
                       _mm512_shuffle_f32x4(two[2 * i], two[2 * i + 1], 0xdd));
    }
    // Quarter i: rows i and i + 4 in turn.
    const __m512 pairs = join(_mm512_unpacklo_ps(four[0], four[1]), _mm512_unpackhi_ps(four[0], four[1]));
    const __m512 all = join(pairs, _mm512_permute_ps(pairs, 0x4e));
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0), all);
}
SERAPH_INLINE F32 reduce_max(const F32 (&rows)[8]) {
    __m512 v[8];
    for (int r = 0; r < 8; ++r)
        v[r] = rows[r].v;
    return {reduce_rows(v, [](__m512 a, __m512 b) SERAPH_INLINE_LAMBDA { return _mm512_max_ps(a, b); })};
}
SERAPH_INLINE I32 reduce_add(const I32 (&rows)[8]) {
    __m512 v[8];
    for (int r = 0; r < 8; ++r)
        v[r] = _mm512_castsi512_ps(rows[r].v);
    const auto add = [](__m512 a, __m512 b) SERAPH_INLINE_LAMBDA {
        return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
    };
    return {_mm512_castps_si512(reduce_rows(v, add))};
}

// 16 int32 in [-128, 127] to bytes.
SERAPH_INLINE void store_i8(int8_t* p, I32 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
// 16 int32 in [-32768, 32767] to two bytes each.
SERAPH_INLINE void store_i16(int16_t* p, I32 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}
// To bfloat16, as to_bf16(), in the low half of each lane.
SERAPH_INLINE __m512i rounded_bf16(F32 a) {
    const __m512i bits = _mm512_castps_si512(a.v), high = _mm512_srli_epi32(bits, 16);
    const __m512i half = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), rounded, quiet);
}
SERAPH_INLINE void store_bf16(uint16_t* p, F32 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded_bf16(a)));
}
SERAPH_INLINE void store_bf16_pairs(uint16_t* p, F32 even, F32 odd) {
    _mm512_storeu_si512(p, _mm512_or_si512(rounded_bf16(even), _mm512_slli_epi32(rounded_bf16(odd), 16)));
}
// 32 bytes to int16, a pair in every lane.
SERAPH_INLINE I32 load_i8_pairs(const int8_t* p) {
    return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// In every lane sum + the dot product of two pairs of int16.
SERAPH_INLINE I32 dot_pairs(I32 sum, I32 a, I32 b) {
    return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)};
}

// The integer dot product of one group: lane c gathers sum(w[c][k] * a[k]) over the group's quads of inputs.
template <int BITS>
struct GroupDot {
    __m512i sum;
    SERAPH_INLINE void start(I32 from) { sum = from.v; }
    SERAPH_INLINE void add(I32 w, I32 a) { sum = _mm512_dpbusd_epi32(sum, w.v, a.v); }
    SERAPH_INLINE I32 finish() const { return {sum}; }
};

} // namespace seraph
