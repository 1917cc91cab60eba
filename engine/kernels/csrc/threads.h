// The thread team and the way it shares a step.
//
// A step is a fixed list of phases; a phase is a number of tiles, known before the step starts. Every thread has a
// share of each phase, a range of neighbouring tiles, which it takes from the front with a compare-and-swap: what
// neighbours read lies side by side in memory, and a thread that reads on where it stopped is served twice as fast as
// one that starts anew with every tile. Who is through with its share takes single tiles from the back of another's. So
// nobody waits for a thread that holds no tile: one that the kernel has descheduled delays a step by at most what it
// holds. The words that shares and phases consist of carry the step's number: a thread that wakes up after its step is
// over finds them changed and takes nothing.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace seraph {

class Team {
  public:
    // `threads` in all; the thread that calls run() is number 0. At most `max_phases` phases a step.
    Team(int threads, int max_phases);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return threads_; }

    // The tiles of a phase, less than 2^20; a thread computes up to `grain` neighbours of its share at a time.
    struct Work {
        int tiles, grain;
    };
    // Computes the tiles [first, last) of a phase.
    using Tiles = std::function<void(int phase, int first, int last, int thread)>;

    // Runs every tile of phase 0, then every tile of phase 1, ... Returns when all are done. Not reentrant. `tiles`
    // must not throw. `after`, where there is one, is called by the calling thread when a phase is over.
    using After = std::function<void(int phase)>;
    void run(const std::vector<Work>& work, const Tiles& tiles, const After& after = {});

  private:
    struct alignas(64) Share {
        std::atomic<uint64_t> ticket{0}; // step << 40 | end << 20 | next: the tiles [next, end) nobody has taken yet
    };
    struct alignas(64) Phase {
        std::atomic<uint64_t> left{0}; // step << 32 | tiles that are not done
        int grain = 1;
    };

    void compute(uint64_t step, int thread, int num_phases, const After& after);
    bool compute_share(uint64_t step, int phase, int owner, int thread);
    void wait_done(Phase& phase, uint64_t step);
    void worker_main(int thread);

    int threads_, max_phases_;
    std::unique_ptr<Phase[]> phases_;
    std::unique_ptr<Share[]> shares_; // [phases][threads]
    const Tiles* tiles_ = nullptr;    // valid for whoever holds a tile
    std::atomic<int> num_phases_{0};
    std::atomic<uint64_t> step_{0}; // of the step that is running or ran last
    std::atomic<uint32_t> bell_{0}; // low bits of step_, what idle workers sleep on
    std::atomic<int> sleeping_{0};  // workers asleep on the bell
    std::atomic<int> waiting_{0};   // threads asleep on some phase
    std::atomic<bool> quit_{false};
    std::vector<std::thread> workers_;
};

} // namespace seraph
