"""Which implementation serves which device, and how to insist on one."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mtlkernels import _decisions, _dumps, _extension, _torch, _tracing

OPS = ("gated_mixture", "level", "pcgrad", "snr_trans", "snr_aver")
# The public function of an op, where its name is another.
_FUNCTIONS = {"level": "expert_mixture"}
# Ops whose Triton kernels leave float64 to the reference.
_TRITON_WITHOUT_FLOAT64 = tuple(op for op in OPS if op != "pcgrad")
# Ops that have CUDA C++ kernels.
_CUDA = ("pcgrad",)
BACKENDS = ("cpp", "cuda", "triton", "reference")
# NVIDIA GPUs before compute capability 8.0 have no machine code here, and Triton's kernels would spill on them.
MIN_MAJOR = 8

# A plain module variable, not a ContextVar: autograd runs a CUDA backward in a thread of its own, and torch.compile
# guards on it.
_forced: str | None = None
_choices: list[list[str]] = []  # of the blocks that have been entered and not left
_choosing = threading.Lock()
# Ops of which an operator has no C++ kernel.
_without_cpp: set[str] = set()
_references: dict[tuple[str, str], Callable[..., Any]] = {}

# Reasons, as they are logged.
_FIRST, _ASKED = "it comes first there", "use_backend asks for it"


def _find_triton() -> bool:
    """A folder of that name on the path, of models for a server, say, is a package without a file."""
    try:
        found = importlib.util.find_spec("triton")
    except ValueError:  # of a module that somebody has put in its place
        return False
    return found is not None and found.origin is not None


# Looked up once: torch.compile, which traces fast(), cannot look.
_triton_is_there = _find_triton()


def has_triton() -> bool:
    """Whether Triton can be imported; does not import it."""
    return _triton_is_there


def has_cpp(op: str) -> bool:
    """Whether this install has C++ kernels for CPUs for an op."""
    return _extension.loaded() and op not in _without_cpp


def has_cuda(op: str) -> bool:
    """Whether this install has CUDA C++ kernels for an op."""
    return op in _CUDA and _extension.cuda_loaded()


def is_old(gpu: torch.device | None = None) -> bool:
    """Whether a GPU, the current one if None, is older than those that kernels are for: the reference serves it.

    So are all of a build for AMD's, on which nobody has tried the kernels.
    """
    if not torch.cuda.is_available():
        return False
    if torch.version.hip is not None:
        return True
    try:
        return bool(torch.cuda.get_device_properties(gpu).major < MIN_MAJOR)
    except (RuntimeError, AssertionError):  # in a child of a fork, where nothing runs on a GPU
        return False


# Each call of a kernel asks this; compiled code, which cannot look anything up, asks the function above.
_is_old_once = functools.cache(is_old)


def fast(op: str, device: str, dtype: torch.dtype) -> bool:
    """Whether this install has kernels of an op for a type of device and a dtype; of GPUs for the current one.

    Otherwise the reference serves them, which is slower than modules that compute the same. Tensors on "meta" are going
    to be elsewhere: there it is enough that some device has kernels.
    """
    on_cuda = has_cuda(op) or (has_triton() and not (dtype == torch.float64 and op in _TRITON_WITHOUT_FLOAT64))
    if device == "meta":
        return has_cpp(op) or on_cuda
    return has_cpp(op) if device == "cpu" else device == "cuda" and on_cuda and not is_old()


def interpreting() -> bool:
    """Whether Triton kernels run on CPU tensors, in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def backends() -> dict[str, dict[str, tuple[str, ...]]]:
    """The implementations that this install has: function -> device type -> names, the one that is used first.

    ``"cpp"`` are the C++ kernels for CPUs, ``"cuda"`` the CUDA C++ kernels for NVIDIA GPUs, ``"triton"`` the Triton
    kernels for them (float64 mixtures go to the reference), ``"reference"`` is readable PyTorch and serves every device
    and dtype. GPUs before compute capability 8.0 have the reference alone; ``"cuda"`` is said of the current one.
    """
    return {_FUNCTIONS.get(op, op): _by_device(op) for op in OPS}


def _by_device(op: str) -> dict[str, tuple[str, ...]]:
    return {"cpu": _on_cpu(op), "cuda": _on_cuda(op), "other": ("reference",)}


def _on_cpu(op: str) -> tuple[str, ...]:
    found = {"cpp": has_cpp(op), "reference": True, "triton": has_triton() and interpreting()}
    return tuple(name for name, there in found.items() if there)


def _on_cuda(op: str, gpu: torch.device | None = None) -> tuple[str, ...]:
    new = not is_old(gpu)
    found = {"cuda": new and has_cuda(op), "triton": new and has_triton(), "reference": True}
    return tuple(name for name, there in found.items() if there)


def serves(function: str, name: str, dtype: torch.dtype) -> bool:
    """Whether the implementation ``name`` of a function that :func:`backends` lists takes a dtype."""
    op = next((op for op, public in _FUNCTIONS.items() if public == function), function)
    return not (name == "triton" and op in _TRITON_WITHOUT_FLOAT64 and dtype == torch.float64)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every op runs this implementation, or raises; nothing is substituted.

    The choice holds for the whole process; where several threads are in such blocks, the last to enter has chosen. A
    backward pass uses the implementation of its forward pass. PCGrad's functions have derivatives, and rules for
    ``torch.func``, by ``"reference"`` alone.

    Args:
        name: ``"cpp"``, ``"cuda"``, ``"triton"`` or ``"reference"``; see :func:`backends`.

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: there is no implementation of that name.
        RuntimeError: raised by an op in the block that has no such implementation for its device and dtype, or for what
            is made of the call: a trace, a derivative of PCGrad's.
    """
    global _forced
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    if name not in BACKENDS:
        raise ValueError(f"name must be one of {BACKENDS}, got {name!r}")
    _decisions.ask()
    choice = [name]
    try:  # from here on, as a signal may come between any two lines
        with _choosing:
            _choices.append(choice)
            _forced = name
        yield
    finally:
        with _choosing:  # blocks of several threads do not end in the order of their beginning
            _choices[:] = [other for other in _choices if other is not choice]
            _forced = _choices[-1][0] if _choices else None


def forced() -> str | None:
    """The implementation that :func:`use_backend` asks for, or None."""
    return _forced


def register_reference(op: str, direction: str, function: Callable[..., Any]) -> None:
    """Names the PyTorch implementation of one direction of an op."""
    _references[op, direction] = function
    if not _torch.has_kernel(f"mtlkernels::{op}_{direction}", "CPU"):
        _without_cpp.add(op)


def reference_implementation(op: str, direction: str) -> Callable[..., Any]:
    """The PyTorch implementation of one direction of an op."""
    return _references[op, direction]


@functools.cache
def triton_module(op: str) -> Any:
    """An op's Triton launchers; Triton is imported when they are first asked for."""
    return importlib.import_module(f"mtlkernels.ops.{op}.triton")


def triton_implementation(op: str, direction: str) -> Callable[..., Any]:
    """The Triton launcher of one direction of an op."""
    function: Callable[..., Any] = getattr(triton_module(op), direction)
    return function


def runs_triton(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a call there runs Triton's launchers; on a CPU, where they are interpreted."""
    if not has_triton() or (op in _TRITON_WITHOUT_FLOAT64 and dtype == torch.float64):
        return False
    return device.type == "cpu" or (device.type == "cuda" and not _is_old_once(device) and not has_cuda(op))


def _first_tensor(args: Any) -> torch.Tensor:
    each = (arg if isinstance(arg, (list, tuple)) else (arg,) for arg in args)
    return next(value for values in each for value in values if isinstance(value, torch.Tensor))


def cuda_implementation(op: str, direction: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    """What a CUDA call runs: CUDA C++ or Triton, or the reference for what these do not take, and on old GPUs."""
    name = _on_this_gpu(op, direction, args)[0]
    if name == "cuda":
        function: Callable[..., Any] = getattr(_cuda_module(op), direction)
        return function
    return triton_implementation(op, direction) if name == "triton" else reference_implementation(op, direction)


def _cuda_module(op: str) -> Any:
    return importlib.import_module(f"mtlkernels.ops.{op}.cuda")


def _on_this_gpu(op: str, direction: str, args: tuple[Any, ...]) -> tuple[str, str]:
    """The name of what a CUDA call runs, and why."""
    first = _first_tensor(args)
    if _is_old_once(first.device):
        return "reference", f"kernels are for GPUs of compute capability {MIN_MAJOR}.0 and later"
    if has_cuda(op) and _forced != "triton":
        if _forced == "cuda":
            return "cuda", _ASKED
        if _cuda_module(op).takes(direction, args):
            return "cuda", _FIRST
    if not has_triton():
        return "reference", "Triton is not installed"
    if op in _TRITON_WITHOUT_FLOAT64 and first.dtype == torch.float64:
        return "reference", "the Triton kernels take no float64"
    return "triton", _FIRST


def implementation(op: str, direction: str, backend: str | None, like: torch.Tensor) -> Callable[..., Any]:
    """The callable for one direction of an op: the dispatcher's unless ``backend`` names one.

    Args:
        op: the op's name, as its folder under ``mtlkernels/ops``.
        direction: what follows the op's name in the operator's, such as ``"forward"`` or ``"backward"``.
        backend: a name from :data:`BACKENDS`, or None for the dispatcher's choice.
        like: a tensor with the device and dtype of the call.

    Raises:
        RuntimeError: this install has no such implementation for that device and dtype.
    """
    run = _found(op, direction, backend, like)
    if (_decisions.on or _dumps.folder is not None) and not _torch.compiling():
        return _watched(run, op, direction, backend, like)
    return run


def _watched(
    run: Callable[..., Any], op: str, direction: str, backend: str | None, like: torch.Tensor
) -> Callable[..., Any]:
    """An implementation of which it is logged what it is, and whose arguments are saved where it raises."""

    def watched(*args: Any) -> Any:
        name, reason = _taken(op, direction, backend, like, args)
        rows = like.shape[0] if op != "pcgrad" and like.dim() else None
        _decisions.note(_FUNCTIONS.get(op, op), name, reason, like, rows, direction)
        return run(*args) if _dumps.folder is None else _dumps.saving(run, op, direction, name, args)

    return watched


def _taken(op: str, direction: str, backend: str | None, like: torch.Tensor, args: tuple[Any, ...]) -> tuple[str, str]:
    """The name of the implementation that :func:`implementation` finds, and why it is that one."""
    device = like.device.type
    if backend is not None:
        return backend, _ASKED
    if _tracing.counts_flops():
        return "reference", "FlopCounterMode counts PyTorch's own products"
    if device == "cuda":
        return _on_this_gpu(op, direction, args)
    if device == "cpu" and has_cpp(op):
        return "cpp", _FIRST
    if device == "cpu":
        return "reference", f"the C++ kernels are missing: {_extension.load_error()}"
    return "reference", f"there are no kernels for devices of type {device!r}"


def _found(op: str, direction: str, backend: str | None, like: torch.Tensor) -> Callable[..., Any]:
    operator: Callable[..., Any] = getattr(torch.ops.mtlkernels, f"{op}_{direction}").default
    device = like.device.type
    if backend is None and _tracing.counts_flops():  # of whose passes forward came before: it counts the reference
        return _outside_autocast(reference_implementation(op, direction), device)
    if backend is None:
        return operator
    names: tuple[str, ...] = ("reference",)
    if device in ("cpu", "cuda"):
        names = _on_cpu(op) if device == "cpu" else _on_cuda(op, like.device)
    if backend == "triton" and op in _TRITON_WITHOUT_FLOAT64 and like.dtype == torch.float64:
        names = tuple(name for name in names if name != "triton")
    if backend not in names:
        function = _FUNCTIONS.get(op, op)
        raise RuntimeError(
            f"{function} has no {backend!r} implementation for {device!r} and {like.dtype}; it has {names}: ask for"
            " one of these, or see mtlkernels.show_config() for what this install lacks and how to get it"
        )
    if backend == "reference":
        return _outside_autocast(reference_implementation(op, direction), device)
    if device == "cpu" and backend == "triton":
        return _outside_autocast(triton_implementation(op, direction), device)
    return operator


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a kind of device; never for one that has none."""
    if device == "cpu":  # at once, as converted models ask it at each call
        return torch.is_autocast_enabled("cpu")
    # torch.compile traces is_autocast_available from torch 2.11 on, and compiles nothing for a device without autocast
    # but meta tensors.
    compiling = _torch.compiling()
    available = device != "meta" if compiling else torch.amp.autocast_mode.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device)


def _outside_autocast(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Keeps autocast out of an implementation, as the dispatcher does for operators."""
    if not autocast_enabled(device):
        return function

    def run(*args: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run
