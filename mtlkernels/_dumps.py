"""The arguments of calls that failed, in files: where the environment variable MTLKERNELS_DUMP names a folder.

Where an implementation raises, its operator, arguments and name are saved there, and the error's message names the
file, which ``python -m mtlkernels replay FILE`` runs again. A TypeError or ValueError, which refuses arguments, is left
as it is. So that every call can be caught, none takes the direct way to C++ or is replayed on a GPU, which costs some
microseconds a call. Compiled code is not caught. The variable is read when mtlkernels is imported.
"""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VARIABLE = "MTLKERNELS_DUMP"
# What is in a file, and how, has changed as often.
FORMAT = 1
# Of a process, so that a loop that goes on after errors does not fill the disk.
_MAX_FILES = 16

folder: Path | None = Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None
_numbers = itertools.count()


def saving(run: Callable[..., Any], op: str, direction: str, implementation: str, args: Sequence[Any]) -> Any:
    """What an implementation returns for these arguments, which are saved where it raises."""
    try:
        return run(*args)
    except (TypeError, ValueError):
        raise
    except Exception as error:
        _extend(error, _save(error, op, direction, implementation, args))
        raise


def _extend(error: Exception, words: str) -> None:
    """Puts words behind an error's message, whatever class it is of."""
    first, *rest = error.args or ("",)
    error.args = (f"{first}\n{words}", *rest) if isinstance(first, str) else (*error.args, words)


def _save(error: Exception, op: str, direction: str, implementation: str, args: Sequence[Any]) -> str:
    """Saves a call; what to say of it, also where that fails."""
    number = next(_numbers)
    if number >= _MAX_FILES:
        return f"(mtlkernels: not saved, as this process has saved {_MAX_FILES} failed calls)"
    import mtlkernels

    assert folder is not None
    path = folder / f"{op}_{direction}-{implementation}-{os.getpid()}-{number}.pt"
    try:
        schema = getattr(torch.ops.mtlkernels, f"{op}_{direction}").default._schema
        content = {
            "format": FORMAT,
            "op": op,
            "direction": direction,
            "implementation": implementation,
            "error": f"{type(error).__name__}: {error}",
            "versions": {"mtlkernels": mtlkernels.__version__, "torch": str(torch.__version__)},
            "machine": f"{platform.system()} {platform.machine()}",
            "arguments": {a.name: encoded(value) for a, value in zip(schema.arguments, args, strict=True)},
        }
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)
    except Exception as failure:  # the first error is the one to raise
        return f"(mtlkernels: the call could not be saved in {folder}: {type(failure).__name__}: {failure})"
    return f"(mtlkernels: the call is saved; `python -m mtlkernels replay {path}` runs it again)"


def encoded(value: Any) -> Any:
    """An argument as plain data: of a tensor what lies between its first and its last element, and how it lies."""
    if isinstance(value, Tensor):
        tensor = value.detach()
        steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        span = tensor.as_strided((steps + 1 if tensor.numel() else 0,), (1,))
        return {
            "tensor": span.to("cpu", copy=True),
            "dtype": str(tensor.dtype),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "alignment": tensor.data_ptr() % 64 // tensor.element_size(),
            "device": tensor.device.type,
        }
    if isinstance(value, (list, tuple)):
        return [encoded(item) for item in value]
    return value


def decoded(value: Any) -> Any:
    """The inverse, on the device that the tensor was on if this machine has one: at an address as aligned as it was."""
    if isinstance(value, dict):
        span: Tensor = value["tensor"]
        there = value["device"] if value["device"] != "cuda" or torch.cuda.is_available() else "cpu"
        offset: int = value["alignment"]
        memory = torch.empty(offset + span.numel(), dtype=span.dtype, device=there)
        memory[offset:] = span
        return memory.as_strided(value["shape"], value["stride"], offset)
    if isinstance(value, list):
        return [decoded(item) for item in value]
    return value
