"""Whether fused evaluation pays: with the kernels of the place where a module is, and on so few rows."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtlkernels import _backends, _extension, _torch
from mtlkernels.ops._call import casts_in_cpp
from mtlkernels.ops._fusing import FOLD_ROWS, TURN_ROWS, Rows, may_fold

# Of an instance: fused evaluation also where it does not pay. In its __dict__, so that copies and pickles have it.
FORCE = "_mtlkernels_force"
# Stands for all operators of a level, whose kernels come together.
_OP = "level"
# On fewer rows than these, training with batch norm is as fast by modules, measured with the models below; and one
# operator for all mixing saves nothing where the experts' modules are called, with torch-rechub's and deepctr-torch's
# PLE. Experts of bare matrices may be one product for all in own code: measured with baddbmm of a stacked parameter.
NORM_ROWS, MIXING_ROWS, BARE_MIXING_ROWS = 4, 256, 1024
# Rows from which on something pays on a CPU: where no gradient is wanted, in evaluation with gradients, in training.
# Measured with an MMoE of 3 and of 4 experts (64, 32) on 64 features, and of 12 experts (256, 128) on 416, on one
# thread.
LAYER_NORM_ROWS = 8, 16, 16
# Of PReLU; with a norm NORM_ROWS decides.
SLOPES_ROWS = 0, 16, 16
# Under autocast to float16, where each call casts all parameters and is checked in Python.
AUTOCAST_ROWS = 8
# A level in parts has several such calls, and one more for the mixing; its batch norms take statistics, or are folded
# in a way that gradients flow through, for each of the parts. For narrow experts, of fewer weights than SMALL_EXPERT,
# that takes as long, and fusing saves less.
PARTS_ROWS = 64, 256, 128
NORMED_PARTS_ROWS = 64, 1024, 128
SMALL_PARTS_ROWS = 1024, 1024, 768
SMALL_EXPERT = 1 << 16

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


class Size(NamedTuple):
    """What pays in a call of some rows.

    ``fused``: anything. ``rows``: what the operator may do. ``layer_norm``: layer norms in it. ``parts``: a level in
    more calls than one; ``normed_parts``: one with batch norms; ``small_parts``: one of narrow experts. ``mixing``: one
    operator for all mixing where the experts' modules are called, ``bare_mixing`` where they are of bare matrices; what
    the compiler makes of the library's own mixing is as fast at any size.
    """

    rows: Rows = Rows()
    layer_norm: bool = True
    parts: bool = True
    normed_parts: bool = True
    small_parts: bool = True
    mixing: bool = True
    bare_mixing: bool = True
    fused: bool = True


def size_of_call(x: Tensor | None, training: bool, is_input: bool = True) -> Size:
    """What pays with such a tensor in a module of that mode; all where none tells how many rows there are.

    ``is_input``: it is the level's, and so tells whether that wants a gradient.
    """
    if x is None or _any_size:
        return Size()
    if _torch.compiling():
        return Size(mixing=False)
    differentiated = torch.is_grad_enabled()
    rows, mode = x.shape[0], (1 + training if differentiated else 0)
    casts = x.is_cpu and _backends.autocast_enabled("cpu") and not casts_in_cpp()
    return Size(
        Rows(
            fold=may_fold(x) and not (casts and rows < FOLD_ROWS),
            fold_small=may_fold(x, 0) and not (casts and rows < FOLD_ROWS),
            normalize=rows >= NORM_ROWS,
            turn=rows >= (TURN_ROWS if differentiated else FOLD_ROWS) or not x.is_cpu,
            slopes=rows >= SLOPES_ROWS[mode] or not x.is_cpu,
            constant=not casts and not (differentiated and (x.requires_grad or not is_input)),
        ),
        layer_norm=rows >= LAYER_NORM_ROWS[mode] or not x.is_cpu,
        parts=rows >= PARTS_ROWS[mode] or not x.is_cpu,
        normed_parts=rows >= NORMED_PARTS_ROWS[mode] or not x.is_cpu,
        small_parts=rows >= SMALL_PARTS_ROWS[mode] or not x.is_cpu,
        mixing=rows >= MIXING_ROWS,
        bare_mixing=rows >= BARE_MIXING_ROWS,
        fused=rows >= AUTOCAST_ROWS or not casts,
    )


class TooFewRows:
    """Calls of a module with so few rows that its own code is as fast: the next ones need not read the module.

    It is read again after some of them, as it may have become one that is faster fused; after twice as many each time,
    as reading takes longer than a call of few rows.
    """

    _FIRST_CALLS, _MOST_CALLS = 64, 1024

    def __init__(self) -> None:
        self._most: dict[Hashable, int] = {}
        # Of each key, how many calls there were since one was read, and after how many the next one is.
        self._pauses: dict[Hashable, list[int]] = {}

    def note(self, key: Hashable, rows: int) -> None:
        """A call was read; ``key`` tells calls apart beside their rows."""
        self._most[key] = max(rows, self._most.get(key, 0))

    def are(self, key: Hashable, rows: int) -> bool:
        """Whether a call need not be read."""
        if rows > self._most.get(key, -1):
            return False
        pause = self._pauses.setdefault(key, [0, self._FIRST_CALLS])
        pause[0] += 1
        if pause[0] >= pause[1]:
            pause[:] = 0, min(2 * pause[1], self._MOST_CALLS)
            self._most.pop(key, None)
            return False
        return True


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
