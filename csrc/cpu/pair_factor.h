// What products of pairs of bfloat16 multiply.
#pragma once

#include "ahead.h"
#include "panels.h"

namespace mtlk {
namespace MTLK_ISA {

constexpr int64_t kPairStep = 32;                  // of the depth, one tile
constexpr int64_t kPairTile = kGroup * kPairStep;  // elements of a tile

// Two neighbouring tiles of a factor, or one, each with its planes behind it; from one step of the depth to the next it
// moves on by `step` elements. The rows of a tile are `row` elements apart: a tile lies in one piece, or is a window of
// a wider matrix.
struct PairFactor {
  const BFloat16 *first, *second;
  int64_t step;
  bool both;
  int64_t row = kPairStep;
};

}  // namespace MTLK_ISA
}  // namespace mtlk
