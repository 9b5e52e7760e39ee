"""Fused kernels for multi-task learning in PyTorch."""

from mtlkernels import nn, optim
from mtlkernels._backends import backends, use_backend
from mtlkernels._config import show_config, warn_of_another_source
from mtlkernels._convert import ConversionReport, convert, revert
from mtlkernels._decisions import log_decisions
from mtlkernels._extension import operator_library
from mtlkernels._prepare import prepare
from mtlkernels.ops.gated_mixture import gated_mixture
from mtlkernels.ops.hard_concrete import hard_concrete, l0_penalty
from mtlkernels.ops.level import expert_mixture
from mtlkernels.ops.pcgrad import gram, pcgrad, pcgrad_weights
from mtlkernels.ops.snr_aver import snr_aver
from mtlkernels.ops.snr_trans import snr_trans
from mtlkernels.routing import Routing

__version__ = "0.1.0"

__all__ = [
    "ConversionReport",
    "Routing",
    "backends",
    "convert",
    "expert_mixture",
    "gated_mixture",
    "gram",
    "hard_concrete",
    "l0_penalty",
    "log_decisions",
    "nn",
    "operator_library",
    "optim",
    "pcgrad",
    "pcgrad_weights",
    "prepare",
    "revert",
    "show_config",
    "snr_aver",
    "snr_trans",
    "use_backend",
]

warn_of_another_source()
del warn_of_another_source
