"""A serving copy of a model: what can be kept from one call to the next is kept, as nobody writes to it any more."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mtlkernels import _extension
from mtlkernels._convert.classes import SERVES_ONLY, original_class
from mtlkernels.nn.level import TrunkLevel
from mtlkernels.nn.snr import SNR, CompactSNR
from mtlkernels.ops._checks import DTYPES, refuse_training

Model = TypeVar("Model", bound=nn.Module)


def prepare(model: Model) -> Model:
    """A copy of ``model`` for serving, which keeps the weights of its fused levels in the form that the kernels want.

    Everywhere else a call uses the values that are in memory then, so that weights are brought into that form again and
    again, between their products. Where that takes time, on a CPU with AMX in float32 with 33 rows and more, if layers
    are not narrow, and in float16 with 9 and more, a prepared copy does it once. Elsewhere nothing is kept and it is as
    fast as ``model``; it gives the same numbers.

    The copy owns its parameters: what trains ``model`` afterwards does not reach it; make another one then. It is in
    evaluation mode and its parameters require no gradients. A call in training mode is an error, and so is
    one, where something is kept, after one of its weights was written to in a way that PyTorch counts (an optimizer
    that is not fused, ``load_state_dict``, an operator in place). A write that nothing counts, such as through
    ``.data`` or NumPy, is not seen then: do not write to the copy; nor can its parameters be swapped
    (``torch.utils.swap_tensors``). What is kept goes with the copy.

    Args:
        model: a module with trunks of :mod:`mtlkernels.nn`, one that :func:`mtlkernels.convert` has converted, or one
            that calls :func:`mtlkernels.expert_mixture` with its own parameters.

    Returns:
        The copy, of the model's class.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        RuntimeError: raised by calls of the copy, as said above.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    with torch.inference_mode(False):  # of tensors that are made under it nothing counts what is written to them
        prepared = copy.deepcopy(model).eval().requires_grad_(False)
    _declare(prepared)
    refusing = False
    for module in prepared.modules():
        if isinstance(module, (TrunkLevel, SNR, CompactSNR)):
            module._serves_only = refusing = True
        elif original_class(type(module)) is not None:
            vars(module)[SERVES_ONLY] = refusing = True
    if not refusing:
        prepared.register_forward_pre_hook(_refuse_training)
    return prepared


def _declare(model: nn.Module) -> None:
    """Tells the C++ kernels that nobody writes to the matrices in ``model`` any more."""
    plain = (p for p in model.parameters() if type(p) is nn.Parameter and p.dtype in DTYPES and _lies_on_cpu(p))
    matrices = [p for p in plain if p.dim() == 2]
    if _extension.has_module() and matrices:
        _extension.function("keep_prepared")(matrices)


def _lies_on_cpu(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.layout == torch.strided


def _refuse_training(module: nn.Module, args: Any) -> None:
    """For a model that calls operators itself; modules of this package and converted ones refuse it themselves."""
    if module.training:
        refuse_training()
