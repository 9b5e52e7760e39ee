"""Dropout's masks as a function of a seed and of a value's place, so that none is stored.

Philox4x32-10 (Salmon et al., SC 2011): the key is the seed, low word first; the counter is (column // 4, row, expert,
layer), and the column modulo 4 chooses one of the four words that come out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def threshold(rate: float) -> int:
    """A value is kept where its word is at least this; with rate 1 no word is."""
    return round(rate * 2**32)


def kept_scale(rate: float) -> float:
    """What kept values are multiplied by."""
    return 0.0 if rate == 1 else 1 / (1 - rate)


def _product(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low word of the 64-bit products, in int64 that never overflows."""
    low = factor * (words & 0xFFFF)
    middle = factor * (words >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words for each counter of four; all are 32-bit values in int64 tensors that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def dropout_factors(
    seed: Tensor, layer: int, experts: Sequence[int], shape: tuple[int, int], rate: float, dtype: torch.dtype
) -> Tensor:
    """For values [E, B, H] of a layer: 0 where one is dropped, 1 / (1 - rate) where it is kept.

    Args:
        seed: one int64.
        layer: the number of the layer.
        experts: the numbers of the E experts.
        shape: B and H.
        rate: the probability of being dropped.
        dtype: of the result.
    """
    rows, width = shape
    key = (seed & _WORD, (seed >> 32) & _WORD)
    columns, lines = (torch.arange(count, device=seed.device) for count in ((width + 3) // 4, rows))
    numbers = torch.tensor(experts, device=seed.device).view(-1, 1, 1)
    zeros = torch.zeros(len(experts), rows, len(columns), dtype=torch.int64, device=seed.device)
    words = philox((zeros + columns, zeros + lines.unsqueeze(1), zeros + numbers, zeros + layer), key)
    kept = torch.stack(words, dim=3).flatten(2)[:, :, :width] >= threshold(rate)
    return kept.to(dtype) * kept_scale(rate)
