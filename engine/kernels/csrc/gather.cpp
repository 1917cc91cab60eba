#include "gather.h"

#include <chrono>
#include <cstring>

namespace seraph {
namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

} // namespace

std::vector<double> time_gather(int64_t bytes, const TeamLayout& layout, int turns) {
    Team team(layout, 2 * turns);
    const int ranks = team.num_ranks();
    std::vector<uint8_t> shared(static_cast<size_t>(bytes));
    std::vector<std::vector<uint8_t>> own(static_cast<size_t>(ranks), std::vector<uint8_t>(shared.size(), 1));
    std::vector<int> bounds;
    for (int rank = 0; rank <= ranks; ++rank)
        bounds.push_back(rank);
    const auto part = [&](int rank) { return bytes * rank / ranks; };
    std::vector<double> times{0};
    const Team::Tiles tiles = [&](int phase, int rank, int, int) {
        const int64_t begin = part(rank), end = part(rank + 1);
        uint8_t* mine = own[rank].data();
        if (phase % 2 == 0) {
            std::memcpy(shared.data() + begin, mine + begin, static_cast<size_t>(end - begin));
        } else {
            std::memcpy(mine, shared.data(), static_cast<size_t>(begin));
            std::memcpy(mine + end, shared.data() + end, static_cast<size_t>(bytes - end));
        }
    };
    times.front() = now();
    team.run(std::vector<Team::Work>(static_cast<size_t>(2 * turns), {ranks, 1, bounds.data()}), tiles, [&](int phase) {
        if (phase % 2 == 1)
            times.push_back(now());
    });
    for (size_t i = 0; i + 1 < times.size(); ++i)
        times[i] = times[i + 1] - times[i];
    times.pop_back();
    return times;
}

std::vector<double> time_copy(int64_t bytes, int turns) {
    std::vector<uint8_t> from(static_cast<size_t>(bytes), 1), to(from.size());
    std::vector<double> times;
    for (int turn = 0; turn < turns; ++turn) {
        const double start = now();
        std::memcpy(to.data(), from.data(), from.size());
        asm volatile("" ::"r"(to.data()) : "memory");
        times.push_back(now() - start);
    }
    return times;
}

} // namespace seraph
