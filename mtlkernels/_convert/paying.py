"""Whether fused evaluation pays: with the kernels of the place where a module is, and on so few rows."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mtlkernels import _backends, _extension
from mtlkernels.ops._fusing import FOLD_ROWS, Rows, may_fold

# Of an instance: fused evaluation also where it does not pay. In its __dict__, so that copies and pickles have it.
FORCE = "_mtlkernels_force"
# Stands for all operators of a level, whose kernels come together.
_OP = "level"
# Measured with torch-rechub's and deepctr-torch's PLE: on fewer rows than these, training with batch norm is as fast by
# modules, and one operator for all mixing saves nothing where the experts' modules are called.
NORM_ROWS, MIXING_ROWS = 16, 256

_any_size = 0  # how many trials are at work, each in a thread of its own
_lock = threading.Lock()


@contextlib.contextmanager
def at_any_size() -> Iterator[None]:
    """Fused evaluation on however few rows: for trials, which want to see it. Other threads get right numbers too."""
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(step: int) -> None:
    global _any_size
    with _lock:
        _any_size += step


def in_trial() -> bool:
    """Whether :func:`at_any_size` is at work."""
    return _any_size > 0


def rows_of(x: Tensor | None) -> Rows:
    """What the rows of a call with such a tensor allow; all where none tells how many there are."""
    if x is None or _any_size or torch.compiler.is_compiling():
        return Rows()
    rows = x.shape[0]
    return Rows(may_fold(x), rows >= NORM_ROWS, rows >= FOLD_ROWS)


def mixing_pays(x: Tensor | None) -> bool:
    """Whether one operator for all mixing saves time where the experts' modules are called.

    What the compiler makes of the library's own mixing is as fast at any size.
    """
    return x is None or _any_size > 0 or (not torch.compiler.is_compiling() and x.shape[0] >= MIXING_ROWS)


def pays(module: Any, rows: Tensor | None) -> bool:
    """Whether a converted module is evaluated fused in a call with the tensor ``rows``, one of its inputs.

    Without one the module's parameters tell the device.

    Also where someone asks for an implementation by its name: they get that one or an error.
    """
    if (rows is not None and rows.is_cpu and _extension.loaded()) or _any_size:  # at once, as in most calls
        return True
    if getattr(module, FORCE, False) or _backends.forced() is not None:
        return True
    # The input may be codes, so the weights tell the dtype.
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    dtype = torch.float32 if first is None else first.dtype
    place = rows if rows is not None else first
    return place is not None and _backends.fast(_OP, place.device.type, dtype)


def slower(module: nn.Module) -> str | None:
    """Why fused evaluation would be slower than a module's own code where its parameters are, and what to do."""
    if _backends.forced() is not None:
        return None
    places = dict.fromkeys((p.device.type, p.dtype) for p in module.parameters() if p.is_floating_point())
    without = next((place for place in places if not _backends.fast(_OP, *place)), None)
    if without is None:
        return None
    from mtlkernels import _diagnosis

    device, dtype = without
    words = f"fused it would be slower on {device!r}: {_diagnosis.no_kernels(device, dtype)}"
    if device == "cpu" and torch.cuda.is_available() and _backends.fast(_OP, "cuda", dtype):
        words += "; there are kernels for its GPU, so convert the model there"
    return f"{words}; mk.convert(model, force=True) converts it all the same"
