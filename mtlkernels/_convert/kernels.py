"""Whether fused evaluation pays where a module is: by the reference it would be slower than the module's own code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mtlkernels import _backends, _extension

# Of an instance: fused evaluation also where it does not pay. In its __dict__, so that copies and pickles have it.
FORCE = "_mtlkernels_force"
# Stands for all operators of a level, whose kernels come together.
_OP = "level"


def pays(module: Any, rows: Tensor | None) -> bool:
    """Whether a converted module is evaluated fused in a call with the tensor ``rows``, one of its inputs.

    Without one the module's parameters tell the device.

    Also where someone asks for an implementation by its name: they get that one or an error.
    """
    if rows is not None and rows.is_cpu and _extension.loaded():  # at once, as in most calls
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
