// simd.h for AVX2 with FMA and F16C: two registers hold the sixteen lanes. Included by simd.h alone.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace seraph {

struct F32 {
    __m256 lo, hi;
};
struct I32 {
    __m256i lo, hi;
};
constexpr int kRegisters = 8; // that hold sixteen lanes

struct Mask {
    __m256 lo, hi;
};

SERAPH_INLINE F32 zero_f32() {
    return {_mm256_setzero_ps(), _mm256_setzero_ps()};
}
SERAPH_INLINE F32 set1(float x) {
    return {_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
SERAPH_INLINE F32 load(const float* p) {
    return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
SERAPH_INLINE void store(float* p, F32 a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
SERAPH_INLINE F32 operator+(F32 a, F32 b) {
    return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
SERAPH_INLINE F32 operator-(F32 a, F32 b) {
    return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
SERAPH_INLINE F32 operator*(F32 a, F32 b) {
    return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
SERAPH_INLINE F32 operator/(F32 a, F32 b) {
    return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
SERAPH_INLINE F32 fma(F32 a, F32 b, F32 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
SERAPH_INLINE F32 max(F32 a, F32 b) {
    return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
SERAPH_INLINE F32 min(F32 a, F32 b) {
    return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
SERAPH_INLINE F32 abs(F32 a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
SERAPH_INLINE Mask less(F32 a, F32 b) {
    return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
SERAPH_INLINE Mask first_lanes(int n) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes)),
            _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lanes))};
}
// Bit i is lane i.
SERAPH_INLINE uint32_t lanes_of(Mask m) {
    return static_cast<uint32_t>(_mm256_movemask_ps(m.lo)) | static_cast<uint32_t>(_mm256_movemask_ps(m.hi)) << 8;
}
SERAPH_INLINE F32 select(Mask m, F32 yes, F32 no) {
    return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}

SERAPH_INLINE I32 set1_i32(int32_t x) {
    return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
}
SERAPH_INLINE I32 load_i32(const void* p) {
    const __m256i* q = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
SERAPH_INLINE void store(int32_t* p, I32 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.hi);
}
SERAPH_INLINE I32 operator+(I32 a, I32 b) {
    return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
SERAPH_INLINE F32 to_f32(I32 a) {
    return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)};
}
SERAPH_INLINE I32 round_i32(F32 a) {
    return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)};
}
template <int N>
SERAPH_INLINE I32 shift_left(I32 a) {
    return {_mm256_slli_epi32(a.lo, N), _mm256_slli_epi32(a.hi, N)};
}
SERAPH_INLINE F32 as_f32(I32 a) {
    return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)};
}
SERAPH_INLINE I32 as_i32(F32 a) {
    return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)};
}

SERAPH_INLINE F32 load_f16(const uint16_t* p) {
    const __m128i* q = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
SERAPH_INLINE F32 bf16_even(I32 a) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(a.lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(a.hi, 16))};
}
SERAPH_INLINE F32 bf16_odd(I32 a) {
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm256_castsi256_ps(_mm256_and_si256(a.lo, high)), _mm256_castsi256_ps(_mm256_and_si256(a.hi, high))};
}
SERAPH_INLINE I32 low_nibbles(I32 a) {
    const __m256i m = _mm256_set1_epi8(15);
    return {_mm256_and_si256(a.lo, m), _mm256_and_si256(a.hi, m)};
}
SERAPH_INLINE I32 high_nibbles(I32 a) {
    const __m256i m = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(a.lo, 4), m), _mm256_and_si256(_mm256_srli_epi16(a.hi, 4), m)};
}

SERAPH_INLINE float reduce_add(F32 a) {
    __m256 s = _mm256_add_ps(a.lo, a.hi);
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
SERAPH_INLINE float reduce_max(F32 a) {
    __m256 s = _mm256_max_ps(a.lo, a.hi);
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
SERAPH_INLINE int32_t reduce_add(I32 a) {
    __m256i s = _mm256_add_epi32(a.lo, a.hi);
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}
SERAPH_INLINE void store_i8(int8_t* p, I32 a) {
    // Packing works within 128-bit halves; the permutation puts the four quarters back in order.
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
SERAPH_INLINE void store_i16(int16_t* p, I32 a) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
}
// To bfloat16, as to_bf16(), in the low half of each lane.
SERAPH_INLINE __m256i rounded_bf16(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a), high = _mm256_srli_epi32(bits, 16);
    const __m256i half = _mm256_add_epi32(_mm256_and_si256(high, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
}
SERAPH_INLINE void store_bf16(uint16_t* p, F32 a) {
    const __m256i packed = _mm256_packus_epi32(rounded_bf16(a.lo), rounded_bf16(a.hi));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
SERAPH_INLINE void store_bf16_pairs(uint16_t* p, F32 even, F32 odd) {
    const auto pairs = [](__m256 a, __m256 b) SERAPH_INLINE_LAMBDA {
        return _mm256_or_si256(rounded_bf16(a), _mm256_slli_epi32(rounded_bf16(b), 16));
    };
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pairs(even.lo, odd.lo));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + kLanes), pairs(even.hi, odd.hi));
}
SERAPH_INLINE I32 load_i8_pairs(const int8_t* p) {
    const __m128i* q = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(q)), _mm256_cvtepi8_epi16(_mm_loadu_si128(q + 1))};
}
SERAPH_INLINE I32 dot_pairs(I32 sum, I32 a, I32 b) {
    return sum + I32{_mm256_madd_epi16(a.lo, b.lo), _mm256_madd_epi16(a.hi, b.hi)};
}

template <int BITS>
struct GroupDot;

// Nibbles: a pair of products is at most 2 * 15 * 127 = 3810, so a whole group (8 pairs) fits 16 bits.
template <>
struct GroupDot<4> {
    __m256i lo, hi;
    I32 base;
    SERAPH_INLINE void start(I32 from) {
        base = from;
        lo = hi = _mm256_setzero_si256();
    }
    SERAPH_INLINE void add(I32 w, I32 a) {
        lo = _mm256_add_epi16(lo, _mm256_maddubs_epi16(w.lo, a.lo));
        hi = _mm256_add_epi16(hi, _mm256_maddubs_epi16(w.hi, a.hi));
    }
    SERAPH_INLINE I32 finish() const {
        const __m256i ones = _mm256_set1_epi16(1);
        return base + I32{_mm256_madd_epi16(lo, ones), _mm256_madd_epi16(hi, ones)};
    }
};

// Whole bytes would saturate maddubs: the nibbles are summed apart, w = 16 * high + low.
template <>
struct GroupDot<8> {
    GroupDot<4> low, high;
    SERAPH_INLINE void start(I32 from) {
        low.start(from);
        high.start(set1_i32(0));
    }
    SERAPH_INLINE void add(I32 w, I32 a) {
        low.add(low_nibbles(w), a);
        high.add(high_nibbles(w), a);
    }
    SERAPH_INLINE I32 finish() const { return low.finish() + shift_left<4>(high.finish()); }
};

} // namespace seraph
