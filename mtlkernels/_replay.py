"""``python -m mtlkernels replay``: a call that was saved where it failed, see :mod:`mtlkernels._dumps`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from mtlkernels import _backends, _dumps
from mtlkernels.ops.level.spec import LevelSpec
from mtlkernels.testing import tensors_in


@_dumps.paused()  # the variable may still be set, and the call would be saved once more
def run(path: Path, out: TextIO) -> int:
    """Runs the call by its implementation and by the reference, and prints how far their results are apart.

    Returns:
        The exit status: 0 where the call did not fail, 1 where it failed again, 2 where it could not be run.
    """
    say = functools.partial(print, file=out, flush=True)
    try:
        saved = torch.load(path, weights_only=True)
    except Exception as error:  # of any kind, as the file may be anything
        say(f"{path} cannot be read: {type(error).__name__}: {error}")
        return 2
    number = saved.get("format") if isinstance(saved, dict) else None
    if not isinstance(number, int):
        say(f"{path} is not a call that mtlkernels has saved")
        return 2
    if number not in _dumps.READABLE:
        formats = " and ".join(map(str, _dumps.READABLE))
        say(f"{path} must be of a format that this version of mtlkernels reads, {formats}, got {number}")
        return 2
    op, direction, name = saved["op"], saved["direction"], saved["implementation"]
    arguments = {key: _dumps.decoded(value) for key, value in saved["arguments"].items()}
    say(f"{op}_{direction} by {name}, saved with {_versions(saved['versions'])} on {saved['machine']}:")
    say(f"  {saved['error']}")
    if op == "level":
        say(f"  {LevelSpec.decoded(arguments['spec'], arguments['numbers'])}")
    for key, value in arguments.items():
        say(f"  {key}: {_described(value)}")
    args = list(arguments.values())
    try:
        own = _implementation(op, direction, name, args)
    except RuntimeError as error:
        say(f"{name} cannot be run here: {error}")
        return 2
    found, failed = _tried(say, name, own, args)
    exact, reference_failed = _tried(say, "reference", _backends.reference_implementation(op, direction), args)
    if not (failed or reference_failed):
        _compare(say, list(tensors_in(found)), list(tensors_in(exact)))
    return 1 if failed else 0


def _implementation(op: str, direction: str, name: str, args: list[Any]) -> Callable[..., Any]:
    like = next(tensors_in(args))
    return _backends.implementation(op, direction, name, like)


def _tried(say: Callable[..., None], name: str, function: Callable[..., Any], args: list[Any]) -> tuple[Any, bool]:
    try:
        with torch.no_grad():
            result = function(*args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:  # whatever an implementation raises is what one wants to know
        say(f"{name} fails: {type(error).__name__}: {error}")
        return None, True
    say(f"{name} does not fail")
    return result, False


def _compare(say: Callable[..., None], found: list[Tensor], exact: list[Tensor]) -> None:
    if [tuple(t.shape) for t in found] != [tuple(t.shape) for t in exact]:
        say(f"results have the shapes {_described(found)}, those of the reference {_described(exact)}")
        return
    for i, (got, want) in enumerate(zip(found, exact, strict=True)):
        if want.numel() == 0:
            continue
        distance = float((got.double() - want.double()).abs().max())
        scale = float(want.double().abs().max())
        say(f"result {i} {_described(got)}: {distance:.3g} from the reference's, whose largest value is {scale:.3g}")


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        where = "" if value.is_cpu else f" on {value.device}"
        lies = "" if value.is_contiguous() else f" with strides {list(value.stride())}"
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{lies}{where}"
    if isinstance(value, list) and any(isinstance(item, Tensor) for item in value):
        return f"[{', '.join(map(_described, value))}]"
    return repr(value)


def _versions(versions: dict[str, str]) -> str:
    return " and ".join(f"{name} {version}" for name, version in versions.items())
