"""Expert mixture on NVIDIA GPUs.

Forward one launch a layer, the last of which mixes as well (or one more launch does, where there are many gates).
Backward one launch for the mixture, one a layer for the gradient of its inputs, and one for all weights and biases.
Parameters, inputs and gradients are read and written where they are; only hidden layers, [E, B, H] each, are scratch.
"""

from __future__ import annotations

from mtlkernels.ops.expert_mixture.triton_backward import backward as backward
from mtlkernels.ops.expert_mixture.triton_forward import forward as forward
