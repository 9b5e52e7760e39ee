"""How operators are defined.

Their schemas are in operators.txt. The C++ library defines them when it is loaded, for programs without Python, and
Python does where there is none. C++ adds implementations (``TORCH_LIBRARY_IMPL`` in ``csrc/cpu``). The reference is the
default kernel of every operator, on every device; CUDA C++ or Triton takes CUDA where it is installed.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtlkernels import _backends, _extension, _torch, _tracing

_library = torch.library.Library("mtlkernels", "DEF")
# What is differentiated in an operator's place, if not its reference.
_formulas: dict[str, Callable[..., Sequence[Tensor]]] = {}
_text = importlib.resources.files("mtlkernels").joinpath("operators.txt").read_text()  # also of a package in a zip
_schemas = {line.partition("(")[0]: line for line in _text.splitlines()}


def cast_floats(value: Any, dtype: torch.dtype) -> Any:
    """Casts the float16, bfloat16 and float32 tensors in ``value`` to ``dtype``, as autocast does; float64 stays."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype != torch.float64 else value
    if isinstance(value, (list, tuple)):
        return [cast_floats(item, dtype) for item in value]
    return value


def cast_first(count: int) -> Callable[..., Any]:
    """For :func:`define`: casts the first ``count`` arguments."""
    return lambda args, dtype: (*(cast_floats(arg, dtype) for arg in args[:count]), *args[count:])


def define(
    name: str,
    fake: Callable[..., Any],
    cast: Callable[..., Any] | None = None,
    formula: Callable[..., Sequence[Tensor]] | None = None,
) -> None:
    """Defines an operator of operators.txt, its fake kernel, and how autocast casts: ``cast(args, dtype)``, if at all.

    Autocast never reaches into an implementation, also not where it casts nothing. ``formula`` is the operator in
    PyTorch's own, for those who differentiate that, where derivatives of the reference are not the operator's.
    """
    op, _, direction = name.rpartition("_")
    if not _torch.has_schema(f"mtlkernels::{name}"):
        _library.define(_schemas[name], tags=(torch.Tag.pt2_compliant_tag,))
    if formula is not None:
        _formulas[name] = formula

    def on_meta(*args: Any) -> Any:
        _check_meta(name, args)
        results = fake(*args)
        _check_wrapper(name, results)
        return results

    torch.library.register_fake(f"mtlkernels::{name}", on_meta, lib=_library)

    def reference(*args: Any) -> Any:
        return _backends.reference_implementation(op, direction)(*args)

    _library.impl(name, reference, "CompositeExplicitAutograd")
    if _backends.has_triton() or _backends.has_cuda(op):

        def cuda(*args: Any) -> Any:
            return _backends.cuda_implementation(op, direction, args)(*args)

        _library.impl(name, cuda, "CUDA")
    for device in ("cpu", "cuda"):

        def autocast(*args: Any, device: str = device) -> Any:
            ready = cast(args, torch.get_autocast_dtype(device)) if cast else args
            with torch.autocast(device, enabled=False):
                return getattr(torch.ops.mtlkernels, name).default(*ready)

        _library.impl(name, autocast, f"Autocast{device.upper()}")


def register_autograd(operator: str, differentiable: Callable[..., Any]) -> None:
    """Gives an operator a derivative: ``differentiable`` takes its arguments and returns what it returns.

    The public functions apply the op's autograd Function themselves; this serves direct calls of the operator, and
    torch.compile of torch.func.vmap, which traces past autograd Functions. Where there is nothing to record on a CPU,
    C++ comes before it. PyTorch's own operators serve transforms of torch.func, which cannot apply a Function within an
    operator, and forward-mode differentiation, for which the Functions have no rule.
    """
    overload = getattr(torch.ops.mtlkernels, operator).default
    op, _, direction = operator.rpartition("_")

    def plain(*args: Any) -> Any:
        formula = _formulas.get(operator)
        return _backends.reference_implementation(op, direction)(*args) if formula is None else list(formula(*args))

    def kernel(keyset: Any, *args: Any) -> Any:
        if _torch.in_dual_level():
            return plain(*args)
        if _tracing.counts_flops():
            return _backends.reference_implementation(op, direction)(*args)
        if torch.is_grad_enabled() and any(_requires_grad(arg) for arg in args):
            return plain(*args) if _torch.func_transforms_active() else differentiable(*args)
        with _torch.below_autograd():
            return overload.redispatch(keyset & _torch.AFTER_AUTOGRAD_KEYS, *args)

    _library.impl(operator, kernel, "Autograd", with_keyset=True)
    if _extension.has_module():
        _extension.function("pass_below_autograd")(operator)


def _requires_grad(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    return isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) and item.requires_grad for item in value)


def _check_meta(operator: str, args: Sequence[Any]) -> None:
    """Refuses tensors of the meta device beside others, with which PyTorch comes to a fake kernel too.

    It would return memory of the others' device that nobody has written to. Stand-ins for tensors are left to those who
    trace.
    """
    tensors = [value for arg in args for value in (arg if isinstance(arg, (list, tuple)) else (arg,))]
    tensors = [value for value in tensors if isinstance(value, Tensor)]
    kinds = {tensor.device.type for tensor in tensors}
    if len(kinds) == 1 or "meta" not in kinds or any(isinstance(tensor, _torch.TRACED) for tensor in tensors):
        return
    schema = getattr(torch.ops.mtlkernels, operator).default._schema
    places: list[tuple[str, torch.device]] = []
    for argument, value in zip((argument.name for argument in schema.arguments), args, strict=True):
        if isinstance(value, Tensor):
            places.append((argument, value.device))
        elif isinstance(value, (list, tuple)):
            places += [(f"{argument}[{i}]", t.device) for i, t in enumerate(value) if isinstance(t, Tensor)]
    first, device = places[0]
    name, other = next((name, other) for name, other in places if other.type != device.type)
    raise ValueError(f"{name} must be on the device of {first}, {device}, got {other}: move one by .to(device)")


def _check_wrapper(operator: str, results: Any) -> None:
    """Refuses what would end the process: PyTorch before 2.14 takes a list of one tensor for the tensor (#190551)."""
    single = isinstance(results, list) and len(results) == 1
    if single and _torch.VERSION < (2, 14) and _torch.lowers_for_cpp_wrapper():
        raise RuntimeError(
            f"mtlkernels::{operator}: expected to return more than one tensor in a graph of Inductor's cpp_wrapper,"
            f" found one, which crashes with PyTorch {torch.__version__}; use PyTorch 2.14, or compile without it"
        )


def empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)
