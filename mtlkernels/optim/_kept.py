"""What :class:`GramWeighted` keeps from one call to the next."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Kept(NamedTuple):
    """What calls between two exact ones go by.

    Attributes:
        weights: [T], those of the last Gram matrix.
        gram: that matrix, [T, T].
        calls: how many have gone by it, the one that made it among them.
    """

    weights: list[float]
    gram: Tensor
    calls: int

    @property
    def scale(self) -> float:
        """A power of two about as large as the largest weight, which a loss in float16 might not hold."""
        return math.ldexp(1.0, math.frexp(max(map(abs, self.weights)))[1] - 1)


class Memory:
    """All that methods of a wrapper change after it was made, in one object.

    A proxy, such as Lightning makes of every optimizer, inherits the wrapper's methods and looks attributes up in it,
    or has copied them. What such a method assigned to ``self`` would be the proxy's alone; this object is both's.

    Attributes:
        kept: what the next call may go by; None where it is exact.
    """

    def __init__(self) -> None:
        self.kept: Kept | None = None


def kept_of(weights: Tensor, gram: Tensor) -> Kept | None:
    """None where they say nothing of the next batch: not finite, or no gradient at all. Waits for a GPU."""
    if not bool(gram.any() & gram.isfinite().all() & weights.isfinite().all()):
        return None
    return Kept(weights.tolist(), gram.clone(), 1)
