"""Normalized mixture on NVIDIA GPUs.

Forward one launch a layer and one more for the statistics of its norm, and for those of the activation Dice, one for
what the last layer gives, and the mixture's. Backward the mixture's, a few a layer for the gradient of its
pre-activations, and then as the expert mixture. Pre-activations, [E, B, H] a layer, are what is kept; the layer above
normalizes and activates them as it reads them.
"""

from __future__ import annotations

from mtlkernels.ops.normalized_mixture.triton_backward import backward as backward
from mtlkernels.ops.normalized_mixture.triton_forward import forward as forward
