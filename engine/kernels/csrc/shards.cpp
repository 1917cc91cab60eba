#include "shards.h"

#include <cstring>

namespace seraph {

void Projection::divide(const Team& team, bool whole_strips) {
    shards.clear();
    const auto bound = [&](int rank) {
        return whole_strips ? 2 * team.part(num_strips(), rank) : team.part(2 * num_strips(), rank);
    };
    for (int rank = 0; rank < team.num_ranks(); ++rank) {
        const int first = bound(rank), last = bound(rank + 1);
        const int begin = first / 2, end = std::max((last + 1) / 2, begin);
        Matrix strips = *this;
        strips.data += begin * strip_bytes();
        strips.n = first < last ? std::min(n - begin * kStrip, (end - begin) * kStrip) : 0;
        shards.push_back({strips, first, last});
    }
}

void RankCopies::make(const std::vector<Projection*>& projections, Team& team) {
    const int ranks = team.num_ranks();
    for (int rank = 0; rank < ranks; ++rank) {
        int64_t bytes = 0;
        for (const Projection* projection : projections)
            bytes += projection->shards[rank].strips.nbytes();
        pages_.push_back(std::make_unique<Pages>(bytes));
        to_.push_back(pages_.back()->as<uint8_t>());
    }
    first_strips_.resize(static_cast<size_t>(ranks) + 1);
    for (Projection* projection : projections) {
        const int64_t bytes = projection->strip_bytes();
        for (int rank = 0; rank < ranks; ++rank)
            first_strips_[rank + 1] = first_strips_[rank] + projection->shards[rank].strips.num_strips();
        team.run({{first_strips_[ranks], 1, first_strips_.data()}},
                 [this, projection, bytes, &team](int, int first, int last, int thread) {
                     const int rank = team.rank_of(thread), strip = first - first_strips_[rank];
                     std::memcpy(to_[rank] + strip * bytes, projection->shards[rank].strips.data + strip * bytes,
                                 static_cast<size_t>((last - first) * bytes));
                 });
        for (int rank = 0; rank < ranks; ++rank) {
            Matrix& strips = projection->shards[rank].strips;
            strips.data = to_[rank];
            to_[rank] += strips.nbytes();
        }
    }
}

} // namespace seraph
