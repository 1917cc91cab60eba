// The thread team and the way it shares a step.
//
// A step is a fixed list of phases; a phase is a number of tiles, known before the step starts. Threads take tiles with
// a compare-and-swap on the phase's ticket, which carries the step's number: nobody waits for a thread that holds no
// tile, so one that the kernel has descheduled delays a step by at most the tile it is in, and one that wakes up after
// its step is over finds the ticket changed and takes nothing.
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

    int size() const { return static_cast<int>(workers_.size()) + 1; }

    // Runs every tile of phase 0, then every tile of phase 1, ...: tile(phase, index, thread). tiles[p] < 2^20 is the
    // number of tiles of phase p. Returns when all are done. Not reentrant. `tile` must not throw.
    using Tile = std::function<void(int phase, int index, int thread)>;
    void run(const std::vector<int>& tiles, const Tile& tile);

  private:
    struct alignas(64) Phase {
        std::atomic<uint64_t> ticket{0}; // step << 40 | tiles << 20 | next
        std::atomic<uint32_t> done{0};   // finished tiles, of all steps
        std::atomic<uint32_t> target{0}; // value of `done` that ends the phase
    };

    void work(uint64_t step, int thread, int num_phases);
    void wait_done(Phase& phase, uint64_t step);
    void worker_main(int thread);

    std::unique_ptr<Phase[]> phases_;
    int max_phases_;
    const Tile* tile_ = nullptr; // valid for whoever holds a tile
    std::atomic<int> num_phases_{0};
    std::atomic<uint64_t> step_{0}; // of the step that is running or ran last
    std::atomic<uint32_t> bell_{0}; // low bits of step_, what idle workers sleep on
    std::atomic<int> sleeping_{0};  // workers asleep on the bell
    std::atomic<int> waiting_{0};   // threads asleep on some phase
    std::atomic<bool> quit_{false};
    std::vector<std::thread> workers_;
};

} // namespace seraph
