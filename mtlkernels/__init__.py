"""Fused kernels for multi-task learning in PyTorch."""

from mtlkernels import _library  # noqa: F401  (defines the operators)
from mtlkernels._backends import backends, use_backend
from mtlkernels.ops.expert_mixture import expert_mixture
from mtlkernels.ops.gated_mixture import gated_mixture
from mtlkernels.routing import Routing

__version__ = "0.1.0"

__all__ = [
    "Routing",
    "backends",
    "expert_mixture",
    "gated_mixture",
    "use_backend",
]
