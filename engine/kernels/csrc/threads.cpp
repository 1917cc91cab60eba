#include "threads.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <stdexcept>

namespace seraph {
namespace {

constexpr uint64_t kTwenty = (1u << 20) - 1;
constexpr uint64_t kStepMask = (1u << 24) - 1;
constexpr auto kSpin = std::chrono::microseconds(50); // longer than a phase, far shorter than a time slice

void cpu_relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A futex is 32 bits wide: of a 64-bit word it is the low half.
static_assert(std::endian::native == std::endian::little);

template <class Word>
void futex_wait(std::atomic<Word>& word, Word seen) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, static_cast<uint32_t>(seen), nullptr,
            nullptr, 0);
}

template <class Word>
void futex_wake_all(std::atomic<Word>& word) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
}

// Spins until `ready` holds or the spin time is over; the clock is read every 64 turns.
template <class Ready>
bool spin_until(const Ready& ready) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    for (int turn = 0;; ++turn) {
        if (ready())
            return true;
        cpu_relax();
        if (turn % 64 == 63 && std::chrono::steady_clock::now() > end)
            return false;
    }
}

} // namespace

Team::Team(int threads, int max_phases)
    : threads_(threads), max_phases_(max_phases), phases_(new Phase[static_cast<size_t>(max_phases)]),
      shares_(new Share[static_cast<size_t>(max_phases) * static_cast<size_t>(threads)]) {
    for (int i = 1; i < threads; ++i)
        workers_.emplace_back(&Team::worker_main, this, i);
}

Team::~Team() {
    quit_ = true;
    bell_.fetch_add(1);
    futex_wake_all(bell_);
    for (auto& worker : workers_)
        worker.join();
}

void Team::run(const std::vector<Work>& work, const Tiles& tiles, const After& after) {
    const int n = static_cast<int>(work.size());
    if (n > max_phases_)
        throw std::logic_error("Team::run: more phases than the team was made for");
    const uint64_t step = step_.load() + 1;
    tiles_ = &tiles;
    num_phases_ = n;
    // Nothing here needs an order: threads of this step read it after they have read step_, and to those of an older
    // step every word says for itself that their step is over.
    for (int p = 0; p < n; ++p) {
        const auto total = static_cast<uint64_t>(work[p].tiles);
        phases_[p].grain = work[p].grain;
        phases_[p].left.store(step << 32 | total, std::memory_order_relaxed);
        for (int t = 0; t < threads_; ++t) {
            // Rounded up, so that a single tile is the caller's, who is awake.
            const auto bound = [&](uint64_t share) { return (total * share + threads_ - 1) / threads_; };
            const uint64_t begin = bound(t), end = bound(t + 1);
            shares_[p * threads_ + t].ticket.store((step & kStepMask) << 40 | end << 20 | begin,
                                                   std::memory_order_relaxed);
        }
    }
    step_.store(step);
    bell_.fetch_add(1);
    if (sleeping_.load() > 0)
        futex_wake_all(bell_);
    compute(step, 0, n, after);
}

void Team::compute(uint64_t step, int thread, int num_phases, const After& after) {
    for (int p = 0; p < num_phases; ++p) {
        if (p + 1 < num_phases) { // what the next phase begins with lies in the cache of another core
            __builtin_prefetch(&phases_[p + 1]);
            __builtin_prefetch(&shares_[(p + 1) * threads_ + thread], 1);
        }
        for (int i = 0; i < threads_; ++i) {
            if (!compute_share(step, p, (thread + i) % threads_, thread))
                return;
        }
        wait_done(phases_[p], step);
        if (after)
            after(p);
    }
}

// Computes what is left of the owner's share; false if the step is over.
bool Team::compute_share(uint64_t step, int p, int owner, int thread) {
    Phase& phase = phases_[p];
    Share& share = shares_[p * threads_ + owner];
    uint64_t ticket = share.ticket.load(), done = 0;
    for (;;) {
        if (ticket >> 40 != (step & kStepMask))
            return false; // so done is 0: tiles that are not counted yet keep the step from ending
        const int next = static_cast<int>(ticket & kTwenty), end = static_cast<int>(ticket >> 20 & kTwenty);
        if (next >= end)
            break;
        int first, last;
        if (owner == thread) { // up to the next multiple of the grain
            first = next;
            last = std::min(end, next - next % phase.grain + phase.grain);
        } else {
            first = end - 1;
            last = end;
        }
        const uint64_t taken = owner == thread ? ticket + static_cast<uint64_t>(last - first) : ticket - (1u << 20);
        if (!share.ticket.compare_exchange_weak(ticket, taken))
            continue;
        // Holding a tile keeps the step from ending, so tiles_ and all it refers to are this step's.
        (*tiles_)(p, first, last, thread);
        done += static_cast<uint64_t>(last - first);
        ticket = share.ticket.load();
    }
    // Counted once a share: every thread writes this line, and to get it from another core takes as long as a small
    // tile.
    if (done > 0 && (phase.left.fetch_sub(done) & 0xffffffffu) == done && waiting_.load() > 0)
        futex_wake_all(phase.left);
    return true;
}

void Team::wait_done(Phase& phase, uint64_t step) {
    const auto over = [step](uint64_t left) { return (left & 0xffffffffu) == 0 || left >> 32 != (step & 0xffffffffu); };
    if (spin_until([&] { return over(phase.left.load()); }))
        return;
    // Whoever finishes the phase looks at waiting_ after it has counted its tiles, so one of the two sees the other.
    waiting_.fetch_add(1);
    for (uint64_t left; !over(left = phase.left.load());)
        futex_wait(phase.left, left);
    waiting_.fetch_sub(1);
}

void Team::worker_main(int thread) {
    uint64_t finished = 0;
    while (!quit_) {
        const auto rung = [&] { return step_.load() != finished || quit_.load(); };
        if (!spin_until(rung)) {
            sleeping_.fetch_add(1);
            const uint32_t seen = bell_.load();
            if (!rung())
                futex_wait(bell_, seen);
            sleeping_.fetch_sub(1);
            continue;
        }
        const uint64_t step = step_.load();
        if (!quit_)
            compute(step, thread, num_phases_.load(), {});
        finished = step;
    }
}

} // namespace seraph
