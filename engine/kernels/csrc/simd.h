// Sixteen float or int32 lanes, whatever the machine: one AVX-512 register, two AVX2 registers, or a compiler vector.
//
// Every kernel is written once on top of these, so the order of every sum is the same in every build. Only what is
// here may depend on the instruction set. No expression is contracted (-ffp-contract=off): fused means fma().
#pragma once

#include <cstdint>
#include <cstring>

#if defined(SERAPH_ISA_AVX512) || defined(SERAPH_ISA_AVX2)
#include <immintrin.h>
#endif

#define SERAPH_INLINE inline __attribute__((always_inline))

namespace seraph {

constexpr int kLanes = 16;

#if defined(SERAPH_ISA_AVX512)

struct F32 {
    __m512 v;
};
struct I32 {
    __m512i v;
};
using Mask = __mmask16;

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

// 16 int32 in [-128, 127] to bytes.
SERAPH_INLINE void store_i8(int8_t* p, I32 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
SERAPH_INLINE I32 load_i8(const int8_t* p) {
    return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

// The integer dot product of one group: lane c gathers sum(w[c][k] * a[k]) over the group's quads of inputs.
template <int BITS>
struct GroupDot {
    __m512i sum;
    SERAPH_INLINE void start(I32 from) { sum = from.v; }
    SERAPH_INLINE void add(I32 w, I32 a) { sum = _mm512_dpbusd_epi32(sum, w.v, a.v); }
    SERAPH_INLINE I32 finish() const { return {sum}; }
};

#elif defined(SERAPH_ISA_AVX2)

struct F32 {
    __m256 lo, hi;
};
struct I32 {
    __m256i lo, hi;
};
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
SERAPH_INLINE I32 load_i8(const int8_t* p) {
    const __m128i* q = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(q)),
            _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)))};
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

#else // portable: the compiler's own vectors

typedef float VecF __attribute__((vector_size(64)));
typedef int32_t VecI __attribute__((vector_size(64)));
typedef uint32_t VecU __attribute__((vector_size(64)));

struct F32 {
    VecF v;
};
struct I32 {
    VecI v;
};
struct Mask {
    VecI v; // -1 where set
};

SERAPH_INLINE F32 set1(float x) {
    return {VecF{} + x};
}
SERAPH_INLINE F32 zero_f32() {
    return {VecF{}};
}
SERAPH_INLINE F32 load(const float* p) {
    F32 r;
    std::memcpy(&r.v, p, 64);
    return r;
}
SERAPH_INLINE void store(float* p, F32 a) {
    std::memcpy(p, &a.v, 64);
}
SERAPH_INLINE F32 operator+(F32 a, F32 b) {
    return {a.v + b.v};
}
SERAPH_INLINE F32 operator-(F32 a, F32 b) {
    return {a.v - b.v};
}
SERAPH_INLINE F32 operator*(F32 a, F32 b) {
    return {a.v * b.v};
}
SERAPH_INLINE F32 operator/(F32 a, F32 b) {
    return {a.v / b.v};
}
// Not fused: without the instruction a fused multiply-add is a library call. Each build agrees with itself.
SERAPH_INLINE F32 fma(F32 a, F32 b, F32 c) {
    return {a.v * b.v + c.v};
}
SERAPH_INLINE F32 max(F32 a, F32 b) {
    return {a.v > b.v ? a.v : b.v};
}
SERAPH_INLINE F32 min(F32 a, F32 b) {
    return {a.v < b.v ? a.v : b.v};
}
SERAPH_INLINE F32 abs(F32 a) {
    return {reinterpret_cast<VecF>(reinterpret_cast<VecI>(a.v) & 0x7fffffff)};
}
SERAPH_INLINE Mask less(F32 a, F32 b) {
    return {a.v < b.v};
}
SERAPH_INLINE Mask first_lanes(int n) {
    const VecI lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return {lanes < (VecI{} + n)};
}
SERAPH_INLINE F32 select(Mask m, F32 yes, F32 no) {
    return {m.v ? yes.v : no.v};
}

SERAPH_INLINE I32 set1_i32(int32_t x) {
    return {VecI{} + x};
}
SERAPH_INLINE I32 load_i32(const void* p) {
    I32 r;
    std::memcpy(&r.v, p, 64);
    return r;
}
SERAPH_INLINE void store(int32_t* p, I32 a) {
    std::memcpy(p, &a.v, 64);
}
SERAPH_INLINE I32 operator+(I32 a, I32 b) {
    return {a.v + b.v};
}
SERAPH_INLINE F32 to_f32(I32 a) {
    return {__builtin_convertvector(a.v, VecF)};
}
SERAPH_INLINE I32 round_i32(F32 a) {
    // Adding 1.5 * 2^23 leaves the nearest integer (ties to even) in the low mantissa bits, for |a| < 2^22.
    const F32 magic = set1(12582912.0f);
    return {reinterpret_cast<VecI>((a + magic).v) - 0x4b400000};
}
template <int N>
SERAPH_INLINE I32 shift_left(I32 a) {
    return {reinterpret_cast<VecI>(reinterpret_cast<VecU>(a.v) << N)};
}
SERAPH_INLINE F32 as_f32(I32 a) {
    return {reinterpret_cast<VecF>(a.v)};
}

SERAPH_INLINE float f16_to_f32(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
    float magnitude;
    if (rest >= 0x7c00) { // infinity, NaN
        const uint32_t bits = 0x7f800000u | (rest & 0x3ff) << 13;
        std::memcpy(&magnitude, &bits, 4);
    } else if (rest >= 0x400) {
        const uint32_t bits = (rest << 13) + ((127 - 15) << 23);
        std::memcpy(&magnitude, &bits, 4);
    } else { // subnormal: a multiple of 2^-24
        magnitude = static_cast<float>(rest) * 5.9604644775390625e-8f;
    }
    return sign ? -magnitude : magnitude;
}
SERAPH_INLINE F32 load_f16(const uint16_t* p) {
    F32 r;
    for (int i = 0; i < kLanes; ++i)
        r.v[i] = f16_to_f32(p[i]);
    return r;
}
SERAPH_INLINE F32 bf16_even(I32 a) {
    return as_f32(shift_left<16>(a));
}
SERAPH_INLINE F32 bf16_odd(I32 a) {
    return {reinterpret_cast<VecF>(a.v & static_cast<int32_t>(0xffff0000u))};
}
SERAPH_INLINE I32 low_nibbles(I32 a) {
    return {a.v & 0x0f0f0f0f};
}
SERAPH_INLINE I32 high_nibbles(I32 a) {
    return {reinterpret_cast<VecI>((reinterpret_cast<VecU>(a.v) >> 4) & 0x0f0f0f0fu)};
}

SERAPH_INLINE float reduce_add(F32 a) {
    float s[kLanes];
    store(s, a);
    for (int width = 8; width >= 1; width /= 2) {
        for (int i = 0; i < width; ++i)
            s[i] += s[i + width];
    }
    return s[0];
}
SERAPH_INLINE float reduce_max(F32 a) {
    float m = a.v[0];
    for (int i = 1; i < kLanes; ++i)
        m = a.v[i] > m ? a.v[i] : m;
    return m;
}
SERAPH_INLINE int32_t reduce_add(I32 a) {
    int32_t s = 0;
    for (int i = 0; i < kLanes; ++i)
        s += a.v[i];
    return s;
}
SERAPH_INLINE void store_i8(int8_t* p, I32 a) {
    for (int i = 0; i < kLanes; ++i)
        p[i] = static_cast<int8_t>(a.v[i]);
}
SERAPH_INLINE I32 load_i8(const int8_t* p) {
    I32 r;
    for (int i = 0; i < kLanes; ++i)
        r.v[i] = p[i];
    return r;
}

template <int BITS>
struct GroupDot {
    VecI sum;
    SERAPH_INLINE void start(I32 from) { sum = from.v; }
    SERAPH_INLINE void add(I32 w, I32 a) {
        // Byte b of every lane: shifted out of the unsigned weights, sign-extended out of the activations.
        const VecU wu = reinterpret_cast<VecU>(w.v), au = reinterpret_cast<VecU>(a.v);
        sum += reinterpret_cast<VecI>(wu & 255u) * (reinterpret_cast<VecI>(au << 24) >> 24);
        sum += reinterpret_cast<VecI>((wu >> 8) & 255u) * (reinterpret_cast<VecI>(au << 16) >> 24);
        sum += reinterpret_cast<VecI>((wu >> 16) & 255u) * (reinterpret_cast<VecI>(au << 8) >> 24);
        sum += reinterpret_cast<VecI>(wu >> 24) * (a.v >> 24);
    }
    SERAPH_INLINE I32 finish() const { return {sum}; }
};

#endif

// Hides a value's origin from the compiler, so that what is computed from it again is computed again.
SERAPH_INLINE void opaque(I32& a) {
#if defined(SERAPH_ISA_AVX512)
    asm volatile("" : "+v"(a.v));
#elif defined(SERAPH_ISA_AVX2)
    asm volatile("" : "+x"(a.lo), "+x"(a.hi));
#else
    asm volatile("" : "+m"(a.v));
#endif
}

// Four activation bytes to every lane.
SERAPH_INLINE I32 broadcast_quad(const int8_t* p) {
    int32_t quad;
    std::memcpy(&quad, p, 4);
    return set1_i32(quad);
}

// e^x, within 2 ulp of the true value for x <= 88; 0 below -87.
// Range reduction by ln 2 in two parts and a degree-6 polynomial (Cephes expf, Moshier).
SERAPH_INLINE F32 exp(F32 x) {
    const F32 low = set1(-87.0f);
    const Mask underflow = less(x, low);
    const F32 c = min(max(x, low), set1(88.0f));
    const I32 n = round_i32(c * set1(1.44269504088896341f));
    const F32 nf = to_f32(n);
    F32 r = fma(nf, set1(-0.693359375f), c);
    r = fma(nf, set1(2.12194440e-4f), r);
    F32 p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    const F32 y = fma(p, r * r, r) + set1(1.0f);
    const F32 scale = as_f32(shift_left<23>(n + set1_i32(127)));
    return select(underflow, zero_f32(), y * scale);
}

SERAPH_INLINE float exp1(float x) {
    float lanes[kLanes];
    store(lanes, exp(set1(x)));
    return lanes[0];
}

// Round to nearest even; NaN stays a NaN.
SERAPH_INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

} // namespace seraph
