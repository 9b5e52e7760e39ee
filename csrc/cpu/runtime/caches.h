// How much a call may leave in the caches.
#pragma once

#include <cstdint>

namespace mtlk {

// What a training step leaves and reads again much later, activations that are saved and gradients of weights, is
// written past the caches where there are as many bytes of it: it would be gone from them before it is read, and other
// things with it. A share of the last-level cache, as large as one core's of a large processor, and at least 1 MiB; of
// an instruction set that was chosen by name 1 MiB, so that a call takes the same way wherever it is tested.
int64_t cached_bytes();

}  // namespace mtlk
