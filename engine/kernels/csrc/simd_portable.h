// simd.h for any CPU: the compiler's own vectors, lowered to what the baseline has. Included by simd.h alone.
#pragma once

#include <cstring>

#include <cstdint>

namespace seraph {

typedef float VecF __attribute__((vector_size(64)));
typedef int32_t VecI __attribute__((vector_size(64)));
typedef uint32_t VecU __attribute__((vector_size(64)));

struct F32 {
    VecF v;
};
struct I32 {
    VecI v;
};
constexpr int kRegisters = 8; // unknown: few

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
// Bit i is lane i.
SERAPH_INLINE uint32_t lanes_of(Mask m) {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i)
        bits |= static_cast<uint32_t>(m.v[i] & 1) << i;
    return bits;
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
SERAPH_INLINE I32 as_i32(F32 a) {
    return {reinterpret_cast<VecI>(a.v)};
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
SERAPH_INLINE void store_i16(int16_t* p, I32 a) {
    for (int i = 0; i < kLanes; ++i)
        p[i] = static_cast<int16_t>(a.v[i]);
}
SERAPH_INLINE I32 load_i8_pairs(const int8_t* p) {
    I32 r;
    for (int i = 0; i < kLanes; ++i)
        r.v[i] = static_cast<int32_t>(static_cast<uint32_t>(p[2 * i + 1]) << 16 |
                                      (static_cast<uint32_t>(p[2 * i]) & 0xffffu));
    return r;
}
SERAPH_INLINE I32 dot_pairs(I32 sum, I32 a, I32 b) {
    const VecI low_a = reinterpret_cast<VecI>(reinterpret_cast<VecU>(a.v) << 16) >> 16;
    const VecI low_b = reinterpret_cast<VecI>(reinterpret_cast<VecU>(b.v) << 16) >> 16;
    return {sum.v + low_a * low_b + (a.v >> 16) * (b.v >> 16)};
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

} // namespace seraph
