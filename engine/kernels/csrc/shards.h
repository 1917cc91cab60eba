// The parts of weights that tensor-parallel ranks compute: each some neighbouring outputs of every projection. An
// output is summed up by one rank as it would be alone, so no bit depends on how many ranks there are.
#pragma once

#include <memory>
#include <vector>

#include "matmul.h"
#include "pages.h"
#include "threads.h"

namespace seraph {

// A rank's part of a matrix: of its 32-output halves of strips [first_half, last_half).
struct Shard {
    Matrix strips; // those that these halves lie in; the first and the last may be another rank's too
    int first_half, last_half;

    int first_strip() const { return first_half / 2; }
    // What of strip number `strip` of these is this rank's: 0 to 2 halves.
    int begin_of(int strip) const { return std::max(first_half - 2 * (first_strip() + strip), 0); }
    int end_of(int strip) const { return std::min(last_half - 2 * (first_strip() + strip), 2); }
};

// A matrix whose outputs ranks share.
struct Projection : Matrix {
    Projection() : Matrix() {}
    Projection(const Matrix& whole) : Matrix(whole) {} // not divided yet

    std::vector<Shard> shards; // [ranks]

    // Divides the outputs as the team's threads are divided, in halves of strips, or in whole ones.
    void divide(const Team& team, bool whole_strips);
};

// Memory of each rank, first written by one of its threads, so that it lies on the rank's NUMA node.
class RankCopies {
  public:
    // Moves the shards of `projections` there. Throws Stalled; then this must stay.
    void make(const std::vector<Projection*>& projections, Team& team);

  private:
    std::vector<std::unique_ptr<Pages>> pages_; // [ranks]
    std::vector<uint8_t*> to_;                  // [ranks] where the next shard goes
    std::vector<int> first_strips_;             // [ranks + 1] of the projection that is copied
};

} // namespace seraph
