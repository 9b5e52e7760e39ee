"""How a public function reaches its operator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mtlkernels import _backends, _decisions, _dumps, _extension, _torch, _tracing
from mtlkernels._backends import implementation
from mtlkernels._library import cast_floats


def under_autocast(like: Tensor, *groups: Any) -> Any:
    """The groups of tensors as autocast wants them: a differentiable cast, or the same objects outside autocast."""
    device = like.device.type
    if not _backends.autocast_enabled(device):
        return groups
    dtype = torch.get_autocast_dtype(device)
    if device == "cpu" and _extension.has_module() and not _torch.compiling():
        cast = _extension.function("cast_together")(_flat(groups), dtype)
        if cast is not None:
            return _nested(groups, iter(cast))
    return tuple(cast_floats(group, dtype) for group in groups)


def _flat(value: Any) -> list[Any]:
    """What nested lists and tuples hold, in their order."""
    return [leaf for item in value for leaf in (_flat(item) if isinstance(item, (list, tuple)) else (item,))]


def _nested(value: Any, leaves: Iterator[Any]) -> tuple[Any, ...]:
    """As ``value``, with the next of the leaves in the place of each of its own; tuples for lists."""
    return tuple(_nested(item, leaves) if isinstance(item, (list, tuple)) else next(leaves) for item in value)


def needs_function(*groups: Sequence[Tensor | None]) -> bool:
    """Whether the call goes through the op's autograd Function: derivatives are wanted, and no export looks on.

    torch.compile cannot trace a Function whose arguments want no gradient; there the operator's own rules serve. So
    they do in torch.export, whose strict mode makes of a Function what runs without gradients.
    """
    return not _torch.exporting() and wants_derivatives(*groups)


def wants_derivatives(*groups: Sequence[Tensor | None]) -> bool:
    """Whether a gradient is wanted, or torch.func is at work."""
    if _torch.func_transforms_active() and not _torch.compiling():
        return True
    return _torch.records_gradients() and any(t is not None and t.requires_grad for group in groups for t in group)


def needs_reference(op: str, *groups: Sequence[Tensor | None]) -> bool:
    """Whether derivatives are wanted, of an op whose derivatives and rules for vmap are the reference's alone.

    Raises:
        RuntimeError: :func:`mtlkernels.use_backend` asks for another implementation.
    """
    if not wants_derivatives(*groups):
        return False
    _refuse_others(op, "derivatives and torch.func transforms")
    return True


def _refuse_others(op: str, what: str) -> None:
    """Raises where ``use_backend`` asks for another implementation than the reference, which alone serves here."""
    if _backends.forced() not in (None, "reference"):
        raise RuntimeError(f"{op} has only the reference for {what}, but use_backend asks for {_backends.forced()!r}")


def traced_under_func(op: str) -> bool:
    """Whether torch.compile is tracing the call inside a torch.func transform: then the reference serves.

    There tensors do not tell whether a gradient is wanted, and an operator that is not told gives a wrong one; the
    reference is plain PyTorch, which the transforms and the compiler see through.

    Raises:
        RuntimeError: :func:`mtlkernels.use_backend` asks for another implementation.
    """
    if not (_torch.compiling() and _torch.func_transforms_active()):
        return False
    _refuse_others(op, "torch.func transforms under torch.compile")
    return True


def needs_plain(op: str, *args: Any) -> bool:
    """Whether the call has to be plain PyTorch, see :func:`mtlkernels._tracing.needs_plain`.

    Raises:
        RuntimeError: :func:`mtlkernels.use_backend` asks for another implementation than the reference.
    """
    if not _tracing.needs_plain(*args):
        return False
    _refuse_others(
        op,
        "torch.jit.trace, torch.fx.symbolic_trace, torch.onnx.export, FlopCounterMode and forward-mode differentiation",
    )
    _decisions.note(op, "PyTorch's own operators", "a tracer, FlopCounterMode or forward-mode differentiation looks on")
    return True


def distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors, each object once: torch.compile does not trace a Function that gets one twice. Views stand in."""
    if not _torch.compiling():
        return tensors
    found: list[Tensor | None] = []
    for tensor in tensors:
        again = tensor is not None and any(tensor is other for other in found)
        found.append(tensor.view_as(tensor) if tensor is not None and again else tensor)
    return tuple(found)


def apply(function: Any, *args: Any) -> Any:
    """``function.apply(*args)``, without binding the arguments to the signature, which takes longer than a small op."""
    if _torch.compiling():
        return function.apply(*args)
    held = held_leaves(*args)
    if _torch.func_transforms_active():
        result = function.apply(*args)
    else:
        parent: Any = super(torch.autograd.Function, function)
        result = parent.apply(*_torch.unwrap_dead_wrappers(args))
    del held
    return result


def held_leaves(*args: Any) -> Any:
    """What to hold while a Function is applied to these, among others: the nodes of autograd's graph of their leaves.

    Threads that differentiate by one model wait for each other for ever where PyTorch makes such a node within
    ``apply``.
    """
    if not _extension.has_module():
        return None
    leaves = tuple(map(_torch.innermost, args)) if _torch.func_transforms_active() else args
    return _extension.function("accumulators_of")(leaves)


def run_forward(op: str, backend: str | None, like: Tensor, *args: Any) -> Any:
    """Runs an op's forward operator where no gradient is wanted."""
    return run_operator(op, "forward", backend, like, *args)


def run_operator(op: str, direction: str, backend: str | None, like: Tensor, *args: Any) -> Any:
    """Runs one of an op's operators where no gradient is wanted."""
    run = implementation(op, direction, backend, like)
    if _torch.compiling():
        return run(*args)
    with _torch.below_autograd():  # past the operator's autograd kernel, which is Python
        return run(*args)


def direct_to_cpp(like: Any) -> bool:
    """Whether a call with this tensor may go straight to the C++ operator: nothing wants to see it on its way."""
    return type(like) is Tensor and like.is_cpu and unobserved()


def casts_in_cpp() -> bool:
    """Whether autocast is on for CPUs and a level's C++ casts what it casts.

    What is cast to float16 is left to the checks, as norms may not be folded there.
    """
    on = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
    return on and _extension.has_module()


def unobserved(casting: bool = False) -> bool:
    """Whether calls with plain tensors on a CPU may go straight to the C++ operators.

    ``casting``: those operators see to what autocast casts, if it is on.
    """
    return (
        _extension.loaded()
        and _backends.forced() in (None, "cpp")
        and _dumps.folder is None
        and (casting or not torch.is_autocast_enabled("cpu"))
        and not _tracing.observed()
    )


def replays(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether calls with plain tensors there may go straight to Triton's launchers, past the dispatcher."""
    if device.type == "cpu" and not (_backends.forced() == "triton" and _backends.interpreting()):
        return False
    return (
        _extension.has_module()
        and _backends.forced() in (None, "triton")
        and _dumps.folder is None
        and _backends.runs_triton(op, device, dtype)
        and not _backends.autocast_enabled(device.type)
        and not _tracing.observed()
    )


def why_checked(op: str, like: Tensor) -> str:
    """Why neither :func:`unobserved` nor :func:`replays` lets a call with this tensor pass."""
    kind = like.device.type
    if not _extension.loaded():
        return f"the C++ extension is missing: {_extension.load_error()}"
    if _backends.forced() not in (None, "cpp" if kind == "cpu" else "triton"):
        return f"use_backend asks for {_backends.forced()!r}"
    if _dumps.folder is not None:
        return f"{_dumps.VARIABLE} is set"
    if _backends.autocast_enabled(kind):
        return "autocast is on"
    if _tracing.observed():
        return "a tracer, a mode or a transform looks on"
    return f"there is no direct way for {kind!r} in {like.dtype}"
