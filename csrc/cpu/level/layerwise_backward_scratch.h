// Where a block of the backward pass of a layerwise level keeps its intermediates.
#pragma once

#include "level/chain_backward_kernels.h"
#include "level/layerwise_forward_kernels.h"

namespace mtlk {
namespace MTLK_ISA {

template <typename Engine>
struct LayerwiseBackwardScratch {
  using C = typename Engine::C;
  using Element = typename Engine::Element;
  C *grad_outputs, *probabilities, *z, *tile, *normalized, *centred, *whole, *after, *below, *sums[3], *row_sums[2];
  C *rows, *few[2], *few_panel;
  Element* panel;
  uint16_t* kept;
  int64_t total;

  LayerwiseBackwardScratch(const LevelShape& level, int64_t groups, void* memory) {
    Arena arena(memory);
    const int64_t widest = widest_hidden(level), features = level.widths[level.layers];
    grad_outputs = arena.take<C>(level.gates.count * features * kGroup);
    probabilities = arena.take<C>(level.gates.columns * kGroup);
    z = arena.take<C>(widest * groups * kGroup);
    tile = arena.take<C>(Engine::kRows * Engine::kGroups * kGroup);
    normalized = arena.take<C>(padded_channels(widest) * kGroup);
    centred = arena.take<C>(padded_channels(widest) * kGroup);
    whole = arena.take<C>(padded_channels(widest) * kGroup);
    after = arena.take<C>(features * kGroup);
    below = arena.take<C>(stream_sums<Engine>(level, groups));
    for (C*& sum : sums) sum = arena.take<C>(widest * kGroup);
    for (C*& sum : row_sums) sum = arena.take<C>(groups * kGroup);
    bool dice = false;
    for (int l = 0; l < level.layers; ++l) dice = dice || level.activations[l] == kDice;
    rows = arena.take<C>(dice ? widest * groups * kGroup : 0);
    for (C*& place : few) place = arena.take<C>(kFewRows * few_ld(level));
    few_panel = arena.take<C>(few_ld(level) * kGroup);
    panel = arena.take<Element>(Engine::kGradientIsPanel ? 0 : Engine::panel_size(widest) * groups);
    kept = arena.take<uint16_t>(widest * groups);
    total = arena.taken();
  }
};

}  // namespace MTLK_ISA
}  // namespace mtlk
