#include "threads.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

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

void futex_wait(std::atomic<uint32_t>& word, uint32_t seen) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& word) {
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

Team::Team(int threads, int max_phases) : phases_(new Phase[max_phases]), max_phases_(max_phases) {
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

void Team::run(const std::vector<int>& tiles, const Tile& tile) {
    const int n = static_cast<int>(tiles.size());
    if (n > max_phases_)
        throw std::logic_error("Team::run: more phases than the team was made for");
    const uint64_t step = step_.load() + 1;
    tile_ = &tile;
    num_phases_ = n;
    for (int p = 0; p < n; ++p) {
        Phase& phase = phases_[p];
        // The old step's ticket goes first: whoever then reads the new target also sees that its step is over.
        phase.ticket.store((step & kStepMask) << 40);
        phase.target.store(phase.done.load() + static_cast<uint32_t>(tiles[p]));
        phase.ticket.store((step & kStepMask) << 40 | static_cast<uint64_t>(tiles[p]) << 20);
    }
    step_.store(step);
    bell_.fetch_add(1);
    if (sleeping_.load() > 0)
        futex_wake_all(bell_);
    work(step, 0, n);
}

void Team::work(uint64_t step, int thread, int num_phases) {
    for (int p = 0; p < num_phases; ++p) {
        Phase& phase = phases_[p];
        uint64_t ticket = phase.ticket.load();
        for (;;) {
            if (ticket >> 40 != (step & kStepMask))
                return; // the step is over
            const uint64_t total = ticket >> 20 & kTwenty, next = ticket & kTwenty;
            if (next >= total)
                break;
            if (!phase.ticket.compare_exchange_weak(ticket, ticket + 1))
                continue;
            // Holding a tile keeps the step from ending, so tile_ and all it refers to are this step's.
            const uint32_t target = phase.target.load();
            (*tile_)(p, static_cast<int>(next), thread);
            if (phase.done.fetch_add(1) + 1 == target && waiting_.load() > 0)
                futex_wake_all(phase.done);
            ticket = phase.ticket.load();
        }
        wait_done(phase, step);
    }
}

void Team::wait_done(Phase& phase, uint64_t step) {
    const auto over = [&] {
        return phase.done.load() == phase.target.load() || phase.ticket.load() >> 40 != (step & kStepMask);
    };
    if (spin_until(over))
        return;
    // Whoever finishes the phase looks at waiting_ after it has counted its tile, so one of the two sees the other.
    waiting_.fetch_add(1);
    for (;;) {
        const uint32_t seen = phase.done.load();
        if (over())
            break;
        futex_wait(phase.done, seen);
    }
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
            work(step, thread, num_phases_.load());
        finished = step;
    }
}

} // namespace seraph
