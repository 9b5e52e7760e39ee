"""The situations in which a conversion is tried."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Enough for batch statistics, few enough for a trial to take no time.
ROWS = 5
# Multiplications of a forward pass that is to show what happens in a large batch.
LARGE_WORK, LARGE_ROWS = 2e8, 1100


@dataclass(frozen=True)
class Situation:
    """How both ways are run once: in training or not, with how many rows, of what size, and whether with gradients.

    ``scale`` is that of the inputs, ``weights`` that of the matrices, ``signed`` whether vectors have numbers of either
    sign, ``special`` whether a row of the inputs is zero and one not a number, which code may look for and refuse, and
    ``wider`` whether inputs have a column more, which code may leave out, ``wanting`` whether they want gradients, and
    ``by_columns`` whether they lie in memory column by column; ``masked`` is whether every other number is zero of
    what is not trained, as masks have it; ``needed`` is False where the original may fail.
    """

    words: str
    training: bool
    rows: int = ROWS
    scale: float = 1.0
    weights: float | None = None
    signed: bool = False
    special: bool = False
    wider: bool = False
    wanting: bool = True
    by_columns: bool = False
    masked: bool = False
    gradients: bool = False
    autocast: bool = False
    needed: bool = True
    dtype: torch.dtype = torch.float64

    @property
    def tolerance(self) -> float:
        """Relative to the largest number; sums of large logits round more."""
        if self.dtype != torch.float64:
            return 0.1 if self.autocast or self.dtype == torch.bfloat16 else 1e-3
        return 1e-9 if self.scale <= 1 and self.weights in (None, 1.0) else 1e-6


# In this order, so that the report names the most ordinary situation in which there is a difference.
SITUATIONS = (
    Situation("in evaluation", False, gradients=True),
    Situation("in training", True, gradients=True),
    Situation("in training on 2 rows", True, rows=2, needed=False),
    Situation("in evaluation on 1 row", False, rows=1, needed=False),
    Situation("in training on 1 row", True, rows=1, needed=False),
    Situation("in evaluation on no rows", False, rows=0, needed=False),
    Situation("in training with small inputs", True, scale=1e-3),
    # Larger than features are that nobody has scaled, as prices and times, which code may cut off.
    Situation("in evaluation with large inputs", False, scale=1e9),
    Situation("in training with large inputs", True, scale=30.0, gradients=True),
    # Where some shares of gates are small: inputs of ordinary size give none below 0.01, and large ones 0 and 1 alone.
    Situation("in evaluation with inputs of size 30", False, scale=30.0, gradients=True),
    Situation("in evaluation with inputs of size 8", False, scale=8.0),
    Situation("under autocast", True, autocast=True),
    Situation("in evaluation with large weights", False, scale=3.0, weights=20.0),
    Situation("in training with large weights", True, scale=3.0, weights=20.0),
    Situation("in evaluation with signed vectors", False, weights=1.0, signed=True, needed=False),
    Situation("in evaluation on many rows", False, rows=LARGE_ROWS, weights=1.0),
    Situation("in training on many rows", True, rows=LARGE_ROWS),
    Situation("in evaluation with rows of zeros and NaN", False, special=True, needed=False),
    Situation("in evaluation with inputs that are wider", False, wider=True, needed=False),
)
# In which rounding hides small differences, and code sees another dtype, or autocast, which leaves float64 alone.
OTHER_DTYPES = (
    Situation("in evaluation in float32", False, weights=1.0, needed=False, dtype=torch.float32),
    Situation("in evaluation in float32 under autocast", False, autocast=True, needed=False, dtype=torch.float32),
    Situation("in evaluation in bfloat16", False, needed=False, dtype=torch.bfloat16),
)
# Inputs as those of a first level are, which are a user's own tensors; and masks. Last, so that the situations above
# keep the numbers that they draw.
LATER = (
    Situation("in evaluation with inputs that want no gradient", False, wanting=False),
    Situation("in training with inputs that want no gradient", True, wanting=False),
    Situation("in evaluation with zeros in buffers and what is frozen", False, weights=1.0, masked=True, needed=False),
    Situation("in evaluation with inputs that lie column by column", False, weights=1.0, by_columns=True, needed=False),
)
AS_IT_IS = Situation("in evaluation with the values that it has", False, scale=2.0, needed=False)
