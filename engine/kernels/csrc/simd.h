// Sixteen float or int32 lanes, whatever the machine: one AVX-512 register, two AVX2 registers, or a compiler vector.
//
// Every kernel is written once on top of these, so the order of every sum is the same in every build. Only what is
// here may depend on the instruction set. No expression is contracted (-ffp-contract=off): fused means fma().
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#define SERAPH_INLINE inline __attribute__((always_inline))
#define SERAPH_INLINE_LAMBDA __attribute__((always_inline))

namespace seraph {

constexpr int kLanes = 16;

} // namespace seraph

#if defined(SERAPH_ISA_AVX512)
#include "simd_avx512.h"
#elif defined(SERAPH_ISA_AVX2)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace seraph {

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

template <class T>
SERAPH_INLINE void opaque(T*& pointer) {
    asm volatile("" : "+r"(pointer));
}

#if !defined(SERAPH_ISA_AVX512)
// Eight reductions: lane r of the lower eight is that of rows[r].
SERAPH_INLINE F32 reduce_max(const F32 (&rows)[8]) {
    float lanes[kLanes] = {};
    for (int r = 0; r < 8; ++r)
        lanes[r] = reduce_max(rows[r]);
    return load(lanes);
}
SERAPH_INLINE I32 reduce_add(const I32 (&rows)[8]) {
    int32_t lanes[kLanes] = {};
    for (int r = 0; r < 8; ++r)
        lanes[r] = reduce_add(rows[r]);
    return load_i32(lanes);
}
#endif

// Four activation bytes to every lane.
SERAPH_INLINE I32 broadcast_quad(const int8_t* p) {
    int32_t quad;
    std::memcpy(&quad, p, 4);
    return set1_i32(quad);
}

// Two 16-bit quants to every lane.
SERAPH_INLINE I32 broadcast_pair(const int16_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, 4);
    return set1_i32(pair);
}

// e^x for x in [-87, 88], else that of the nearer end, within 2 ulp of the true value.
// Range reduction by ln 2 in two parts and a degree-6 polynomial (Cephes expf, Moshier).
SERAPH_INLINE F32 exp_within(F32 x) {
    const F32 c = min(max(x, set1(-87.0f)), set1(88.0f));
    // 1.5 * 2^23, beside which a float32 has no bits left for fractions: the sum is rounded to a whole number, which
    // stands in its low bits.
    const F32 whole = set1(12582912.0f);
    const F32 sum = fma(c, set1(1.44269504088896341f), whole);
    const F32 n = sum - whole;
    F32 r = fma(n, set1(-0.693359375f), c);
    r = fma(n, set1(2.12194440e-4f), r);
    F32 p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    const F32 y = fma(p, r * r, r) + set1(1.0f);
    return y * as_f32(shift_left<23>(as_i32(sum)) + set1_i32(127 << 23));
}

// The same, but 0 below -87.
SERAPH_INLINE F32 exp(F32 x) {
    return select(less(x, set1(-87.0f)), zero_f32(), exp_within(x));
}

// x / (1 + e^-x). Beside one, e^-87 is as good as zero.
SERAPH_INLINE F32 silu(F32 x) {
    return x / (set1(1.0f) + exp_within(zero_f32() - x));
}

// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))), which is x / (1 + e^-2u) where tanh is taken of u (Hendrycks
// and Gimpel, 2016).
SERAPH_INLINE F32 gelu_tanh(F32 x) {
    const F32 inner = fma(x * x * x, set1(0.044715f), x);
    return x / (set1(1.0f) + exp_within(inner * set1(-1.59576912160573f)));
}

// x times the share of the normal distribution that lies below x (GELU), within 7e-5 for |x| <= 12: an odd polynomial
// of x, cut off where the share is next to nothing, fitted so that x times its error is smallest. There is no division
// in it and no exponential, which take twice as long.
SERAPH_INLINE F32 gelu(F32 x) {
    const F32 near = min(max(x, set1(-4.6f)), set1(4.6f)), square = near * near;
    F32 q = set1(2.57726618e-11f);
    q = fma(q, square, set1(-2.91921154e-09f));
    q = fma(q, square, set1(1.45010645e-07f));
    q = fma(q, square, set1(-4.18347599e-06f));
    q = fma(q, square, set1(7.84834629e-05f));
    q = fma(q, square, set1(-0.001018952f));
    q = fma(q, square, set1(0.00952053629f));
    q = fma(q, square, set1(-0.0658775344f));
    q = fma(q, square, set1(0.398652941f));
    return x * fma(q, near, set1(0.5f));
}

// limit * tanh(x / limit): x where it is small beside the limit, and never past it.
SERAPH_INLINE F32 softcapped(F32 x, float limit) {
    const F32 one = set1(1.0f), two = set1(2.0f);
    return set1(limit) * (one - two / (exp_within(two * x / set1(limit)) + one));
}

// Levels of a quant of at most `most` to a unit, for values up to `amax` in size. Zeros, or values so small that the
// quotient overflows, become zeros.
SERAPH_INLINE float levels_per_unit(float amax, float most) {
    const float quotient = most / amax;
    return quotient < std::numeric_limits<float>::infinity() ? quotient : 0.0f;
}
SERAPH_INLINE F32 levels_per_unit(F32 amax, float most) {
    const F32 quotient = set1(most) / amax;
    return select(less(quotient, set1(std::numeric_limits<float>::infinity())), quotient, zero_f32());
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

#if !defined(SERAPH_ISA_AVX512) && !defined(SERAPH_ISA_AVX2)
SERAPH_INLINE void store_bf16(uint16_t* p, F32 a) {
    float lanes[kLanes];
    store(lanes, a);
    for (int i = 0; i < kLanes; ++i)
        p[i] = to_bf16(lanes[i]);
}
#endif

// Two rows in turn, lane by lane: even[0], odd[0], even[1], odd[1], ...
#if !defined(SERAPH_ISA_AVX512) && !defined(SERAPH_ISA_AVX2)
SERAPH_INLINE void store_bf16_pairs(uint16_t* p, F32 even, F32 odd) {
    uint16_t lanes[2][kLanes];
    store_bf16(lanes[0], even);
    store_bf16(lanes[1], odd);
    for (int i = 0; i < 2 * kLanes; ++i)
        p[i] = lanes[i % 2][i / 2];
}
#endif

// Exact: a bfloat16 is the upper half of a float32.
SERAPH_INLINE float from_bf16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}

} // namespace seraph
