// What it costs ranks to see each other's results: the denominator of tensor parallelism.
#pragma once

#include <cstdint>
#include <vector>

#include "threads.h"

namespace seraph {

// Seconds of each of `turns` gathers: every rank writes its part of `bytes`, and reads what the others wrote of them
// once all have written. One thread a rank works. Throws Stalled.
std::vector<double> time_gather(int64_t bytes, const TeamLayout& layout, int turns);

// Seconds of each of `turns` copies of `bytes` by this thread.
std::vector<double> time_copy(int64_t bytes, int turns);

} // namespace seraph
