"""The arguments of calls that failed, in files: where the environment variable MTLKERNELS_DUMP names a folder.

Where an implementation raises, its operator, arguments and name are saved there, and the error's message names the
file, which ``python -m mtlkernels replay FILE`` runs again. A TypeError or ValueError, which refuses arguments, is left
as it is. Of a tensor a file has the elements that the call got, and nothing else of its memory. So that every call can
be caught, none takes the direct way to C++ or is replayed on a GPU, which costs some microseconds a call. Compiled code
is not caught. The variable is read when mtlkernels is imported.
"""

from __future__ import annotations

import itertools
import os
import platform
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

VARIABLE = "MTLKERNELS_DUMP"
# What is in a file, and how, has changed as often.
FORMAT = 2
# Those that :func:`decoded` reads.
READABLE = (1, FORMAT)
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


@contextmanager
def paused() -> Iterator[None]:
    """Within the block calls that fail are not saved."""
    global folder
    before, folder = folder, None
    try:
        yield
    finally:
        folder = before


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
        with _new_file(folder, f"{op}_{direction}-{implementation}-{os.getpid()}", number) as file:
            torch.save(content, file)
            path = shlex.quote(file.name)
    except Exception as failure:  # the first error is the one to raise
        return f"(mtlkernels: the call could not be saved in {folder}: {type(failure).__name__}: {failure})"
    return f"(mtlkernels: the call is saved; `python -m mtlkernels replay {path}` runs it again)"


def _new_file(where: Path, stem: str, number: int) -> BinaryIO:
    """A file that was not there, with this number or a later one: in containers processes have the same PID."""
    while True:
        try:
            return (where / f"{stem}-{number}.pt").open("xb")
        except FileExistsError:
            number += 1


def encoded(value: Any) -> Any:
    """An argument as plain data: of a tensor its elements, without what lies between them, and how they lie."""
    if isinstance(value, Tensor):
        tensor = value.detach()
        elements = tensor.as_strided(_unexpanded(tensor.shape, tensor.stride()), tensor.stride())
        return {
            "elements": elements.to("cpu", copy=True, memory_format=torch.contiguous_format),
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
        shape, stride, offset = value["shape"], value["stride"], value["alignment"]
        own = _unexpanded(shape, stride)
        # A file of format 1 has all that lay between the first and the last element.
        elements: Tensor = value["elements"] if "elements" in value else value["tensor"].as_strided(own, stride)
        there = value["device"] if value["device"] != "cuda" or torch.cuda.is_available() else "cpu"
        steps = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        span = steps + 1 if elements.numel() else 0
        memory = torch.empty(offset + span, dtype=elements.dtype, device=there)
        memory.as_strided(own, stride, offset).copy_(elements)
        return memory.as_strided(shape, stride, offset)
    if isinstance(value, list):
        return [decoded(item) for item in value]
    return value


def _unexpanded(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """The shape with a size of 1 where all elements along a dimension are one."""
    return [min(size, 1) if step == 0 else size for size, step in zip(shape, stride, strict=True)]
