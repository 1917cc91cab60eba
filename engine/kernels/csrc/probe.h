// What this machine can do, measured with this build's own instructions: the denominators of every benchmark.
#pragma once

#include <cstdint>

namespace seraph {

// GB/s of reading `bytes` of memory with `threads` threads, once.
double read_bandwidth(int64_t bytes, int threads);

// Integer operations (a multiply and an add are two) per second of the dot product of 4-bit weights, in TOP/s, from
// registers.
double int8_rate(int threads);

// The same of float32 multiply-adds.
double float32_rate(int threads);

// The same of dot products of bfloat16 pairs, which no kernel uses: activations beside bfloat16 weights are float32. 0
// where this build or this CPU has none.
double bf16_rate(int threads);

// Whether this CPU has the instructions of the named build: "avx512", "avx2", "portable".
bool cpu_supports(const char* isa);

} // namespace seraph
