// The thread team and the way it shares a step.
//
// A step is a fixed list of phases; a phase is a number of tiles, known before the step starts. Every thread has a
// share of each phase, a range of neighbouring tiles, which it takes from the front with a compare-and-swap: what
// neighbours read lies side by side in memory, and a thread that reads on where it stopped is served twice as fast as
// one that starts anew with every tile. Who is through with its share takes single tiles from the back of another's. So
// nobody waits for a thread that holds no tile: one that the kernel has descheduled delays a step by at most what it
// holds. The words that shares and phases consist of carry the step's number: a thread that wakes up after its step is
// over finds them changed and takes nothing.
//
// Threads form tensor-parallel ranks, which may run on a NUMA node each. What a rank reads of the weights lies on its
// node, so the tiles of some phases are divided among the ranks first, and nobody takes those of another rank. Ranks
// share one memory: when a phase is over, all that any of them has written can be read by all.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace seraph {

// Of what a team consists, and how patient it is with its threads.
struct TeamLayout {
    std::vector<int> threads;           // [ranks] of each, at least 1
    std::vector<std::vector<int>> cpus; // [ranks] where they run; empty: anywhere
    double stall_seconds = 10;          // a step waits so long for a thread that makes no progress
    // Nobody can tell a stalled caller that it is stalled: whether the others write so to standard error and end the
    // process, with this status, unless it is 0.
    int exit_status = 0;

    static TeamLayout of(int threads) { return {{threads}, {{}}}; }
};

// A thread has stalled or died. Its team can run no further step, and what the thread may still write must stay.
struct Stalled : std::runtime_error {
    Stalled(const std::string& message, int rank, int thread, std::string phase, double seconds)
        : std::runtime_error(message), rank(rank), thread(thread), phase(std::move(phase)), seconds(seconds) {}
    int rank, thread;  // of the rank's
    std::string phase; // the step's that waits for it
    double seconds;    // without progress
};

class Team {
  public:
    // What people call a phase.
    using PhaseName = std::function<std::string(int phase)>;

    // The thread that calls run() is number 0, the first of rank 0. At most `max_phases` phases a step.
    Team(const TeamLayout& layout, int max_phases);
    Team(int threads, int max_phases) : Team(TeamLayout::of(threads), max_phases) {} // one rank
    // Ends the threads; frees beneath one that has stalled: whoever minds calls stop() first.
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return threads_; }
    int max_phases() const { return max_phases_; }
    int num_ranks() const { return static_cast<int>(layout_.threads.size()); }
    int rank_of(int thread) const { return rank_of_[thread]; }
    int first_thread(int rank) const { return first_thread_[rank]; } // that of num_ranks() is size()
    int threads_of(int rank) const { return layout_.threads[rank]; }
    // The first of a rank's part of n things, which are divided as the threads are.
    int part(int n, int rank) const {
        return static_cast<int>((static_cast<int64_t>(n) * first_thread_[rank] + threads_ - 1) / threads_);
    }

    // The tiles of a phase, less than 2^20; a thread computes up to `grain` neighbours of its share at a time. Those
    // from of_rank[r] to of_rank[r + 1] are rank r's share; of any rank's where that is null. Ranks keep to their own,
    // unless tiles are `lent` to who is through.
    struct Work {
        int tiles, grain;
        const int* of_rank = nullptr; // [ranks + 1]
        bool lent = false;
    };
    // Computes the tiles [first, last) of a phase.
    using Tiles = std::function<void(int phase, int first, int last, int thread)>;

    // Runs every tile of phase 0, then every tile of phase 1, ... Returns when all are done. Not reentrant. `tiles`
    // must not throw. `after`, where there is one, is called by the calling thread when a phase is over. Throws Stalled
    // when a thread does not go on, and from then on always; `name` is for its words.
    using After = std::function<void(int phase)>;
    void run(const std::vector<Work>& work, Tiles tiles, const After& after = {}, PhaseName name = {});

    // Ends the threads; there are no more steps. Throws Stalled where one does not end. After any Stalled it leaves
    // them alone.
    void stop();

    // Whether a thread has stalled or died.
    bool broken() const { return broken_; }

  private:
    struct alignas(64) Share {
        std::atomic<uint64_t> ticket{0}; // step << 40 | end << 20 | next: the tiles [next, end) nobody has taken yet
    };
    struct alignas(64) Phase {
        std::atomic<uint64_t> left{0}; // step << 32 | tiles that are not done
        int grain = 1;
        std::atomic<bool> apart{false}; // ranks keep to their own shares
    };
    struct alignas(64) Pulse {
        std::atomic<uint64_t> beats{0}; // tiles taken << 1 | whether the thread is at work on a share
        std::atomic<int> id{0};         // gettid(); 0 until it runs, -1 once it has ended
    };
    void compute(uint64_t step, int thread, int num_phases, const After& after);
    bool compute_share(uint64_t step, int phase, int owner, int thread);
    bool wait_done(int phase, uint64_t step, int thread);
    uint64_t progress(const Phase& phase) const;
    bool died(int thread) const;
    int culprit_of(int phase, int waiter) const;
    [[noreturn]] void fail(int thread, const std::string& phase, double seconds);
    Stalled describe(int thread, const std::string& phase, double seconds) const;
    void worker_main(int thread);

    TeamLayout layout_;
    int threads_, max_phases_;
    std::chrono::nanoseconds slice_; // of the time that a step waits for a thread
    std::vector<int> rank_of_, first_thread_;
    std::vector<int> order_; // [threads][threads] whose shares a thread looks at: its own, its rank's, the others'
    std::unique_ptr<Phase[]> phases_;
    std::unique_ptr<Share[]> shares_; // [phases][threads]
    std::unique_ptr<Pulse[]> pulses_; // [threads]
    Tiles tiles_;                     // valid for whoever holds a tile
    PhaseName name_;                  // of this step's phases
    std::atomic<int> num_phases_{0};
    std::atomic<uint64_t> step_{0}; // of the step that is running or ran last
    std::atomic<uint32_t> bell_{0}; // low bits of step_, what idle workers sleep on
    std::atomic<int> sleeping_{0};  // workers asleep on the bell
    std::atomic<int> waiting_{0};   // threads asleep on some phase
    std::atomic<bool> quit_{false}, broken_{false};
    std::atomic<uint32_t> ended_{0}; // workers
    std::vector<std::thread> workers_;
};

} // namespace seraph
