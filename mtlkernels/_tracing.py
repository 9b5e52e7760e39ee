"""Who looks on while a call is made, and what it has to see: the one place that decides.

A tracer, a mode or a transform sees a call only as far as the call goes through PyTorch's dispatcher. So where anybody
looks on, the short ways past it are closed (:func:`observed`), and the operators travel the whole way. Some cannot do
anything with the operators either: for them a call is plain PyTorch (:func:`needs_plain`), the converted model's own
code or the reference. ``torch.export``, ``make_fx``, ``torch.compile`` and dispatch modes see the operators.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from mtlkernels import _torch

Result = TypeVar("Result")


def observed() -> bool:
    """Whether anything looks on, so that the call has to go through the dispatcher, and tensors may not be memory."""
    return (
        _torch.compiling()
        or _torch.func_transforms_active()
        or _torch.dispatch_stack_length() > 0
        or _torch.is_jit_tracing()
        or _torch.in_dual_level()
        or (_torch.function_stack_length() > 0 and _function_modes())
    )


def needs_plain(*args: Any) -> bool:
    """Whether a call with these arguments has to be plain PyTorch.

    - ``torch.jit.trace``, and the ONNX exporter that is built on it: its tracer has no lists of optional tensors, and
      records the operators as calls that need mtlkernels where the graph is loaded.
    - The ONNX exporter that is built on ``torch.export``: ONNX has no such operators.
    - ``torch.fx.symbolic_trace``: its proxies stand for tensors, but cannot enter an operator.
    - Forward-mode differentiation: the operators have no tangents.
    - ``FlopCounterMode``: it counts the products that it sees.
    """
    if _torch.compiling():
        return torch.onnx.is_in_onnx_export()
    if _torch.is_jit_tracing() or _torch.in_dual_level() or (_torch.dispatch_stack_length() > 0 and counts_flops()):
        return True
    return _torch.is_fx_symbolic_tracing() and holds_proxy(args)


def holds_proxy(value: Any) -> bool:
    """Whether a value of ``torch.fx.symbolic_trace`` is among these, which may lie in lists, tuples and dicts."""
    if isinstance(value, (list, tuple)):
        return any(map(holds_proxy, value))
    if isinstance(value, dict):
        return any(map(holds_proxy, value.values()))
    return isinstance(value, torch.fx.Proxy)


def refuse_proxies(name: str, *args: Any) -> None:
    """Raises where a proxy comes to a function that has to know shapes and dtypes."""
    if holds_proxy(args):
        raise TypeError(
            f"{name} must be called with tensors, got a proxy of torch.fx.symbolic_trace, whose shape and dtype are not"
            " known; use torch.export.export or torch.fx.experimental.proxy_tensor.make_fx"
        )


def counts_flops() -> bool:
    """Whether ``torch.utils.flop_counter.FlopCounterMode`` is on; the module, which imports Triton, is not imported."""
    if _torch.compiling():
        return False
    count = _torch.dispatch_stack_length()
    return count > 0 and any(_is_flop_counter(_torch.dispatch_mode_at(i)) for i in range(count))


def _is_flop_counter(mode: Any) -> bool:
    return type(mode).__module__ == "torch.utils.flop_counter"


def _function_modes() -> bool:
    """Whether a torch-function mode is on but that of ``torch.set_default_device``, which only makes tensors."""
    modes = (_torch.function_mode_at(i) for i in range(_torch.function_stack_length()))
    return any(not isinstance(mode, _torch.DefaultDevice) for mode in modes)


def quietly(check: Callable[..., Result], *args: Any) -> Result:
    """A check's result; ``torch.jit.trace`` warns of each shape that Python reads, though no result hangs on these."""
    if _torch.compiling() or not _torch.is_jit_tracing():
        return check(*args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return check(*args)
