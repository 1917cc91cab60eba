#include "threads.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <utility>

namespace seraph {
namespace {

constexpr uint64_t kTwenty = (1u << 20) - 1;
constexpr uint64_t kStepMask = (1u << 24) - 1;
constexpr auto kSpin = std::chrono::microseconds(50); // longer than a phase, far shorter than a time slice
// A stall is so many waits in a row that saw no progress. Of a process that is stopped as a whole and goes on later
// only one of them ends meanwhile.
constexpr int kSlices = 10;

void cpu_relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A futex is 32 bits wide: of a 64-bit word it is the low half.
static_assert(std::endian::native == std::endian::little);

// Whether it was woken, or need not wait, before the time was over; without one it waits for ever.
template <class Word>
bool futex_wait(std::atomic<Word>& word, Word seen, std::chrono::nanoseconds time = std::chrono::nanoseconds(0)) {
    const timespec timeout{static_cast<time_t>(time.count() / 1000000000),
                           static_cast<long>(time.count() % 1000000000)};
    return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, static_cast<uint32_t>(seen),
                   time.count() > 0 ? &timeout : nullptr, nullptr, 0) == 0 ||
           errno != ETIMEDOUT;
}

template <class Word>
void futex_wake_all(std::atomic<Word>& word) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
}

int own_id() {
    return static_cast<int>(syscall(SYS_gettid));
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

bool set_of(const std::vector<int>& cpus, cpu_set_t& set) {
    CPU_ZERO(&set);
    for (int cpu : cpus) {
        if (cpu < 0 || cpu >= CPU_SETSIZE)
            return false;
        CPU_SET(cpu, &set);
    }
    return !cpus.empty();
}

// The calling thread runs on these CPUs as long as this lives. Where that cannot be it runs where it did: slower, with
// the same results.
class Pinned {
  public:
    explicit Pinned(const std::vector<int>& cpus) {
        cpu_set_t wanted;
        pinned_ = set_of(cpus, wanted) && sched_getaffinity(0, sizeof before_, &before_) == 0 &&
                  sched_setaffinity(0, sizeof wanted, &wanted) == 0;
    }
    ~Pinned() {
        if (pinned_)
            sched_setaffinity(0, sizeof before_, &before_);
    }
    Pinned(const Pinned&) = delete;
    Pinned& operator=(const Pinned&) = delete;

  private:
    cpu_set_t before_;
    bool pinned_;
};

} // namespace

Team::Team(const TeamLayout& layout, int max_phases)
    : layout_(layout), threads_(0), max_phases_(max_phases),
      slice_(static_cast<int64_t>(layout.stall_seconds / kSlices * 1e9)) {
    if (layout_.threads.empty() || layout_.cpus.size() != layout_.threads.size() || slice_.count() < 1)
        throw std::invalid_argument("Team: expected ranks, CPUs of each, and time to wait for a thread");
    for (int rank = 0; rank < num_ranks(); ++rank) {
        if (threads_of(rank) < 1)
            throw std::invalid_argument("Team: expected a thread for every rank");
        first_thread_.push_back(threads_);
        threads_ += threads_of(rank);
        rank_of_.resize(static_cast<size_t>(threads_), rank);
    }
    first_thread_.push_back(threads_);
    for (int thread = 0; thread < threads_; ++thread) {
        const int first = first_thread(rank_of(thread)), n = threads_of(rank_of(thread));
        for (int i = 0; i < n; ++i)
            order_.push_back(first + (thread - first + i) % n);
        for (int i = n; i < threads_; ++i)
            order_.push_back((first + i) % threads_);
    }
    phases_.reset(new Phase[static_cast<size_t>(max_phases)]);
    shares_.reset(new Share[static_cast<size_t>(max_phases) * static_cast<size_t>(threads_)]);
    pulses_.reset(new Pulse[static_cast<size_t>(threads_)]);
    for (int i = 1; i < threads_; ++i)
        workers_.emplace_back(&Team::worker_main, this, i);
}

Team::~Team() {
    try {
        stop();
    } catch (const Stalled&) { // its message is for who called stop()
    }
}

void Team::stop() {
    auto workers = std::exchange(workers_, {});
    quit_ = true;
    bell_.fetch_add(1);
    futex_wake_all(bell_);
    int missing = -1, idle = 0;
    for (uint32_t ended; !broken_ && missing < 0 && (ended = ended_.load()) < workers.size();) {
        if (futex_wait(ended_, ended, slice_))
            continue;
        for (int t = 1; t < threads_; ++t) {
            if (died(t) || (idle + 1 == kSlices && pulses_[t].id >= 0))
                missing = t;
        }
        ++idle;
    }
    for (auto& worker : workers)
        broken_ || missing >= 0 ? worker.detach() : worker.join();
    if (missing >= 0)
        fail(missing, "the end", slice_.count() * 1e-9 * idle);
}

void Team::run(const std::vector<Work>& work, Tiles tiles, const After& after, PhaseName name) {
    const int n = static_cast<int>(work.size());
    if (n > max_phases_)
        throw std::logic_error("Team::run: more phases than the team was made for");
    if (broken_)
        throw std::logic_error("Team::run: a thread has stalled");
    const Pinned pinned(layout_.cpus.front());
    const uint64_t step = step_.load() + 1;
    pulses_[0].id = own_id();
    tiles_ = std::move(tiles);
    name_ = std::move(name);
    num_phases_ = n;
    // Nothing here needs an order: threads of this step read it after they have read step_, and to those of an older
    // step every word says for itself that their step is over.
    for (int p = 0; p < n; ++p) {
        const auto& [total, grain, of_rank, lent] = work[p];
        phases_[p].grain = grain;
        phases_[p].apart.store(of_rank && !lent, std::memory_order_relaxed);
        phases_[p].left.store(step << 32 | static_cast<uint64_t>(total), std::memory_order_relaxed);
        for (int t = 0; t < threads_; ++t) {
            const int rank = rank_of(t), low = of_rank ? of_rank[rank] : 0;
            const auto size = static_cast<uint64_t>(of_rank ? of_rank[rank + 1] - low : total);
            const auto threads = static_cast<uint64_t>(of_rank ? threads_of(rank) : threads_);
            const auto number = static_cast<uint64_t>(of_rank ? t - first_thread(rank) : t);
            // Rounded up, so that a single tile is the caller's, who is awake.
            const auto bound = [&](uint64_t share) {
                return static_cast<uint64_t>(low) + (size * share + threads - 1) / threads;
            };
            shares_[p * threads_ + t].ticket.store((step & kStepMask) << 40 | bound(number + 1) << 20 | bound(number),
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
    const int* order = &order_[static_cast<size_t>(thread) * threads_];
    const int rank_size = threads_of(rank_of(thread));
    for (int p = 0; p < num_phases; ++p) {
        if (p + 1 < num_phases) { // what the next phase begins with lies in the cache of another core
            __builtin_prefetch(&phases_[p + 1]);
            __builtin_prefetch(&shares_[(p + 1) * threads_ + thread], 1);
        }
        const int num_owners = phases_[p].apart.load(std::memory_order_relaxed) ? rank_size : threads_;
        for (int i = 0; i < num_owners; ++i) {
            if (!compute_share(step, p, order[i], thread))
                return;
        }
        if (!wait_done(p, step, thread))
            return;
        if (after)
            after(p);
    }
}

// Computes what is left of the owner's share; false if the step is over.
bool Team::compute_share(uint64_t step, int p, int owner, int thread) {
    Phase& phase = phases_[p];
    Share& share = shares_[p * threads_ + owner];
    std::atomic<uint64_t>& beats = pulses_[thread].beats;
    uint64_t ticket = share.ticket.load(), done = 0, beat = beats.load(std::memory_order_relaxed) | 1;
    bool current = true;
    beats.store(beat, std::memory_order_relaxed);
    for (;;) {
        if (ticket >> 40 != (step & kStepMask)) {
            current = false; // so done is 0: tiles that are not counted yet keep the step from ending
            break;
        }
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
        beats.store(beat += 2, std::memory_order_relaxed);
        // Holding a tile keeps the step from ending, so tiles_ and all it refers to are this step's.
        tiles_(p, first, last, thread);
        done += static_cast<uint64_t>(last - first);
        ticket = share.ticket.load();
    }
    // Counted once a share: every thread writes this line, and to get it from another core takes as long as a small
    // tile.
    if (done > 0 && (phase.left.fetch_sub(done) & 0xffffffffu) == done && waiting_.load() > 0)
        futex_wake_all(phase.left);
    beats.store(beat & ~uint64_t{1}, std::memory_order_relaxed);
    return current;
}

// Until the phase is over; false if it never will be.
bool Team::wait_done(int p, uint64_t step, int thread) {
    Phase& phase = phases_[p];
    const auto over = [step](uint64_t left) { return (left & 0xffffffffu) == 0 || left >> 32 != (step & 0xffffffffu); };
    if (spin_until([&] { return over(phase.left.load()); }))
        return true;
    // Whoever finishes the phase looks at waiting_ after it has counted its tiles, so one of the two sees the other.
    waiting_.fetch_add(1);
    uint64_t seen = 0;
    int idle = 0;
    for (uint64_t left; !over(left = phase.left.load()) && !broken_;) {
        if (futex_wait(phase.left, left, slice_))
            continue;
        const uint64_t now = progress(phase);
        idle = now == seen ? idle + 1 : 1;
        seen = now;
        const int culprit = culprit_of(p, thread);
        if (culprit < 0 || (idle < kSlices && !died(culprit)))
            continue;
        const double seconds = slice_.count() * 1e-9 * idle;
        if (thread == 0) {
            waiting_.fetch_sub(1);
            fail(culprit, name_ ? name_(p) : std::to_string(p), seconds);
        }
        if (culprit == 0 && layout_.exit_status != 0) {
            const std::string words = describe(0, name_ ? name_(p) : std::to_string(p), seconds).what();
            fprintf(stderr, "%s; this process ends\n", words.c_str());
            _exit(layout_.exit_status);
        }
    }
    waiting_.fetch_sub(1);
    return !broken_;
}

// What changes whenever a thread takes a tile or a share is done.
uint64_t Team::progress(const Phase& phase) const {
    uint64_t sum = phase.left.load();
    for (int t = 0; t < threads_; ++t)
        sum += pulses_[t].beats.load(std::memory_order_relaxed);
    return sum;
}

bool Team::died(int thread) const {
    const int id = pulses_[thread].id;
    return id > 0 && syscall(SYS_tgkill, getpid(), id, 0) != 0 && errno == ESRCH;
}

// For whom a phase waits: who has died, else who is at work on a share, else who has one and does not come; -1 if it is
// over by now.
int Team::culprit_of(int p, int waiter) const {
    for (int t = 0; t < threads_; ++t) {
        if (t != waiter && died(t))
            return t;
    }
    for (int t = 0; t < threads_; ++t) {
        if (t != waiter && (pulses_[t].beats.load(std::memory_order_relaxed) & 1))
            return t;
    }
    for (int t = 0; t < threads_; ++t) {
        const uint64_t ticket = shares_[p * threads_ + t].ticket.load();
        if ((ticket & kTwenty) < (ticket >> 20 & kTwenty))
            return t;
    }
    return -1;
}

Stalled Team::describe(int thread, const std::string& phase, double seconds) const {
    const int rank = rank_of(thread), number = thread - first_thread(rank);
    char time[32];
    snprintf(time, sizeof time, "%.3g", seconds);
    const std::string who = "thread " + std::to_string(number) + " of tensor-parallel rank " + std::to_string(rank);
    return {died(thread) ? who + " has died: " + phase + " waits for it"
                         : who + " has made no progress for " + time + " s: " + phase + " waits for it",
            rank, number, phase, seconds};
}

// From here on nobody takes a tile: the thread may go on one day, and finds nothing but what it holds.
void Team::fail(int thread, const std::string& phase, double seconds) {
    broken_ = true;
    quit_ = true;
    for (int i = 0; i < max_phases_ * threads_; ++i)
        shares_[i].ticket = 0;
    throw describe(thread, phase, seconds);
}

void Team::worker_main(int thread) {
    const int rank = rank_of(thread);
    const std::string name = "seraph-r" + std::to_string(rank) + "t" + std::to_string(thread - first_thread(rank));
    pthread_setname_np(pthread_self(), name.substr(0, 15).c_str());
    pulses_[thread].id = own_id();
    const Pinned pinned(layout_.cpus[rank]);
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
    pulses_[thread].id = -1;
    ended_.fetch_add(1);
    futex_wake_all(ended_);
}

} // namespace seraph
