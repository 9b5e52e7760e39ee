// Where the backward pass of a chain keeps its gradients, and a block of it its intermediates.
#pragma once

#include "level/chain_forward_kernels.h"
#include "level/products_below.h"

namespace mtlk {
namespace MTLK_ISA {

// Where the gradients of a chunk lie: layer by layer, those of each expert together.
template <typename Engine>
struct BackwardLayout {
  const LevelShape& level;
  int64_t chunk_rows;  // of a full chunk
  int experts;         // of the chunk's group

  int64_t gradient_block(int l) const {
    return (chunk_rows + Engine::kGradientRows - 1) / Engine::kGradientRows *
           Engine::gradient_size(level.widths[l + 1]);
  }
  // Of the group's expert number `index`.
  int64_t gradient_offset(int l, int index) const {
    int64_t offset = 0;
    for (int i = 0; i < l; ++i) offset += experts * gradient_block(i);
    return offset + index * gradient_block(l);
  }
  int64_t gradients() const {
    int64_t size = 0;
    for (int l = 0; l < level.layers; ++l) size += experts * gradient_block(l);
    return size;
  }
};

inline int stream_count(const LevelShape& level) {
  int count = 0;
  for (int e = 0; e < level.experts; ++e) {
    count = level.expert_inputs[e] >= count ? static_cast<int>(level.expert_inputs[e]) + 1 : count;
  }
  return count;
}

template <typename Engine>
struct ChainBackwardScratch {
  using C = typename Engine::C;
  using Element = typename Engine::Element;
  C *grad_outputs, *probabilities, *inner, *kept, *after, *whole, *below, *tile;
  Element *panel[2], *input;
  Word<C>* signs;
  int64_t total;

  ChainBackwardScratch(const LevelShape& level, int64_t groups, void* memory) {
    Arena arena(memory);
    const int64_t widest = widest_hidden(level), features = level.widths[level.layers];
    int64_t read = 0;
    for (int l = 1; l < level.layers; ++l) read = level.widths[l] > read ? level.widths[l] : read;
    inner = arena.take<C>(level.gates.columns * groups * kGroup);
    kept = arena.take<C>(widest * groups * kGroup);
    after = arena.take<C>(features * kGroup);
    whole = arena.take<C>(features * kGroup);
    below = arena.take<C>(stream_sums<Engine>(level, groups));
    tile = arena.take<C>(Engine::kRows * Engine::kGroups * kGroup);
    const int64_t panels = Engine::kGradientIsPanel ? 0 : Engine::panel_size(widest) * groups;
    panel[0] = arena.take<Element>(panels);
    panel[1] = arena.take<Element>(panels);
    input = arena.take<Element>(Engine::panel_size(read) * groups);
    const int64_t of_last = sign_words_size(features), of_read = sign_words_size(read) * groups;
    signs = arena.take<Word<C>>(of_last > of_read ? of_last : of_read);
    total = arena.taken();
  }

  // Probabilities and outputs' gradients are elsewhere, see BackwardPart; the bytes that they take.
  int64_t point_gates(const LevelShape& level, int64_t groups, void* memory) {
    Arena arena(memory);
    probabilities = arena.take<C>(level.gates.columns * groups * kGroup);
    grad_outputs = arena.take<C>(level.gates.count * level.widths[level.layers] * groups * kGroup);
    return arena.taken();
  }
};

}  // namespace MTLK_ISA
}  // namespace mtlk
