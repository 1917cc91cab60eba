#include "probe.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <new>
#include <string_view>
#include <thread>
#include <vector>

#include "simd.h"

namespace seraph {
namespace {

double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Runs work(thread) on all threads at once and returns the seconds until the last is done.
double together(int threads, const std::function<void(int)>& work) {
    std::atomic<int> ready{0};
    std::vector<std::thread> team;
    for (int t = 1; t < threads; ++t) {
        team.emplace_back([&, t] {
            ready.fetch_add(1);
            while (ready.load() < threads) {
            }
            work(t);
        });
    }
    while (ready.load() < threads - 1)
        std::this_thread::yield();
    const double start = seconds();
    ready.fetch_add(1);
    work(0);
    for (auto& thread : team)
        thread.join();
    return seconds() - start;
}

} // namespace

double read_bandwidth(int64_t bytes, int threads) {
    const int64_t share = bytes / threads / 256 * 256;
    void* memory =
        mmap(nullptr, static_cast<size_t>(share * threads), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        throw std::bad_alloc();
    madvise(memory, static_cast<size_t>(share * threads), MADV_HUGEPAGE);
    std::memset(memory, 1, static_cast<size_t>(share * threads));
    std::vector<int32_t> sums(static_cast<size_t>(threads));
    const double time = together(threads, [&](int t) {
        const uint8_t* p = static_cast<const uint8_t*>(memory) + t * share;
        I32 a = set1_i32(0), b = a, c = a, d = a;
        for (int64_t i = 0; i < share; i += 256) {
            a = a + load_i32(p + i);
            b = b + load_i32(p + i + 64);
            c = c + load_i32(p + i + 128);
            d = d + load_i32(p + i + 192);
        }
        sums[t] = reduce_add(a + b + (c + d));
    });
    munmap(memory, static_cast<size_t>(share * threads));
    volatile int32_t keep = sums[0];
    (void)keep;
    return static_cast<double>(share * threads) / time * 1e-9;
}

double int8_rate(int threads) {
    constexpr int kChains = 8, kTurns = 200000, kPerTurn = 8;
    std::vector<int32_t> sums(static_cast<size_t>(threads));
    const double time = together(threads, [&](int t) {
        GroupDot<4> dot[kChains];
        for (auto& chain : dot)
            chain.start(set1_i32(t));
        const I32 w = set1_i32(0x01020304);
        I32 a = set1_i32(0x01ff01ff);
        for (int turn = 0; turn < kTurns; ++turn) {
#pragma GCC unroll 8
            for (int i = 0; i < kPerTurn; ++i) {
#pragma GCC unroll 8
                for (int c = 0; c < kChains; ++c) {
                    opaque(a);
                    dot[c].add(w, a);
                }
            }
        }
        I32 sum = set1_i32(0);
        for (auto& chain : dot)
            sum = sum + chain.finish();
        sums[t] = reduce_add(sum);
    });
    volatile int32_t keep = sums[0];
    (void)keep;
    return 2.0 * 64 * kPerTurn * kChains * kTurns * threads / time * 1e-12;
}

double float32_rate(int threads) {
    // Enough chains to hide the latency of a multiply-add, few enough for the registers.
    constexpr int kChains = alignof(F32) == 64 ? 12 : 6, kTurns = 400000, kPerTurn = 4;
    std::vector<float> sums(static_cast<size_t>(threads));
    const double time = together(threads, [&](int t) {
        F32 sum[kChains];
        for (int c = 0; c < kChains; ++c)
            sum[c] = set1(static_cast<float>(t + c));
        const F32 shrink = set1(0.25f), add = set1(0.5f);
        for (int turn = 0; turn < kTurns; ++turn) {
#pragma GCC unroll 8
            for (int i = 0; i < kPerTurn; ++i) {
#pragma GCC unroll 16
                for (int c = 0; c < kChains; ++c)
                    sum[c] = fma(sum[c], shrink, add);
            }
        }
        for (int c = 1; c < kChains; ++c)
            sum[0] = sum[0] + sum[c];
        sums[t] = reduce_add(sum[0]);
    });
    volatile float keep = sums[0];
    (void)keep;
    return 2.0 * kLanes * kPerTurn * kChains * kTurns * threads / time * 1e-12;
}

#if defined(SERAPH_ISA_AVX512)
double bf16_rate(int threads) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512bf16"))
        return 0;
    constexpr int kChains = 8, kTurns = 1000000;
    const double time = together(threads, [](int) {
        const __m512i pairs = _mm512_set1_epi32(0x3c003c00);
        __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
        for (int turn = 0; turn < kTurns; ++turn) {
            // Written out, because the rest of the build does without these instructions.
            asm volatile("vdpbf16ps %8, %8, %0\n\tvdpbf16ps %8, %8, %1\n\tvdpbf16ps %8, %8, %2\n\t"
                         "vdpbf16ps %8, %8, %3\n\tvdpbf16ps %8, %8, %4\n\tvdpbf16ps %8, %8, %5\n\t"
                         "vdpbf16ps %8, %8, %6\n\tvdpbf16ps %8, %8, %7"
                         : "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4), "+v"(s5), "+v"(s6), "+v"(s7)
                         : "v"(pairs));
        }
    });
    return 2.0 * 2 * kLanes * kChains * kTurns * threads / time * 1e-12;
}
#else
double bf16_rate(int) {
    return 0;
}
#endif

bool cpu_supports(const char* isa) {
    const std::string_view name(isa);
    if (name == "portable")
        return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (name == "avx2")
        return avx2;
    if (name == "avx512") {
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni");
    }
#endif
    return false;
}

} // namespace seraph
