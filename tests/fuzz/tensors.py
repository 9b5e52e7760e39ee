"""The tensors of a case: made from its seed, in the layouts that it names, between forbidden pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from mtlkernels._backends import interpreting
from mtlkernels.testing import CaseFactory, laid_out
from tests.fuzz.calls import Way, implementations
from tests.fuzz.memory import SIDES, guarded
from tests.fuzz.routings import some_of

DTYPES = ("float32", "bfloat16", "float16", "float64")
LAYOUTS = ("contiguous", "transposed", "strided", "offset", "expanded", "overlapping")
# Those in which no row repeats another, so that statistics over rows have a spread.
SPREAD = ("contiguous", "transposed", "strided", "offset")
ROWS = (1, 2, 0, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 64, 65, 100, 127, 128, 129, 191, 192, 255, 256, 257, 300, 520)
SPECIAL = ("nan", "inf", "-inf")

# Triton's interpreter takes seconds for what takes kernels milliseconds, has no float64, and rounds bfloat16 wrongly.
FEW_ROWS, DTYPES_IN_INTERPRETER = (1, 2, 0, 5, 17, 33, 70), ("float32", "float16")

rows = st.sampled_from(FEW_ROWS if interpreting() else ROWS)
widths = st.one_of(st.integers(1, 20), st.integers(1, 80), st.sampled_from((16, 32, 64, 128)))
widths_or_none = st.one_of(widths, widths, widths, st.just(0))
layouts = st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=3, unique=True).map(tuple)
spread_layouts = st.lists(st.sampled_from(SPREAD), min_size=1, max_size=3, unique=True).map(tuple)
dtypes = st.sampled_from(DTYPES_IN_INTERPRETER if interpreting() else DTYPES)
seeds = st.integers(0, 2**31 - 1)


def ways(op: str, *modes: str) -> st.SearchStrategy[Way]:
    """Each way to call an op, in the usual modes and in others; half of the calls by C++ are on one thread."""
    return st.builds(
        Way,
        implementation=st.sampled_from(implementations(op)),
        threads=st.sampled_from((1, 1, 2, 3, 5, 9)),
        mode=st.sampled_from(("train", "serve", "train", "losses", *modes)),
        side=st.sampled_from(SIDES),
    )


@dataclass(frozen=True, kw_only=True)
class CallCase:
    """What cases of all ops have.

    Attributes:
        way: how the call is made.
        dtype: of the tensors.
        used: the outputs that the losses read.
        layouts: of the tensors, one of these each.
        frozen: the share of tensors that want no gradient.
        special: a number that is not finite, in one element of one argument; "" for none.
        seed: of all that is drawn for the tensors.
    """

    way: Way
    dtype: str = "float32"
    used: tuple[int, ...] = (0,)
    layouts: tuple[str, ...] = ("contiguous",)
    frozen: float = 0.0
    special: str = ""
    seed: int = 0

    def maker(self) -> Maker:
        return Maker(self.seed, of_name(self.dtype), self.layouts, self.way, self.frozen)


def call(draw: st.DrawFn, op: str, outputs: int, *modes: str) -> dict[str, Any]:
    """The fields of a :class:`CallCase` of an op with so many outputs."""
    return {
        "way": draw(ways(op, *modes)),
        "dtype": draw(dtypes),
        "used": draw(some_of(range(outputs))),
        "layouts": draw(layouts),
        "frozen": draw(st.sampled_from((0.0, 0.0, 0.4))),
        "special": draw(st.sampled_from(("", "", "", "", "", *SPECIAL))),
        "seed": draw(seeds),
    }


def of_name(dtype: str) -> torch.dtype:
    found = getattr(torch, dtype)
    assert isinstance(found, torch.dtype)
    return found


def in_layout(values: Tensor, layout: str) -> Tensor:
    if layout == "overlapping":  # each row starts one element behind the one before
        if values.dim() < 2 or not values.numel():
            return values
        outer, width = values.shape[:-1].numel(), values.shape[-1]
        flat = values.flatten()[: outer + width - 1]
        if flat.numel() < outer + width - 1:
            return values
        return flat.as_strided(values.shape, _strides(values.shape))
    return laid_out(values, layout)


def _strides(shape: Sequence[int]) -> list[int]:
    """Of a tensor whose rows, counted over all outer dimensions, start one element apart."""
    strides, rows_within = [1], 1
    for size in reversed(shape[:-1]):
        strides.append(rows_within)
        rows_within *= size
    return strides[::-1]


class Maker(CaseFactory):
    """Makes the tensors of a case of the fuzzer: guarded, in any of the layouts, and some of them without gradients.

    Args:
        seed: of values, layouts and of which tensors are frozen.
        dtype: of the tensors.
        layouts: to choose from.
        way: on which side the nearer forbidden page lies.
        frozen: the share of tensors that want no gradient.
    """

    def __init__(self, seed: int, dtype: torch.dtype, layouts: Sequence[str], way: Way, frozen: float = 0.0) -> None:
        super().__init__(seed, dtype, layouts=layouts)
        self._side = way.side
        self._frozen = frozen if way.trains else 1.0

    def leaf(self, *shape: int, scale: float = 1.0, requires_grad: bool = True) -> Tensor:
        values = torch.randn(shape, generator=self._generator) * scale
        tensor = guarded(in_layout(values.to(self.dtype), self.rng.choice(self.layouts)), self._side)
        return tensor.requires_grad_(requires_grad and self.rng.random() >= self._frozen)

    def put(self, value: str, tensor: Tensor) -> None:
        """A number that is not finite, in some element."""
        if tensor.numel():
            at = [self.rng.randrange(size) for size in tensor.shape]
            tensor.data[tuple(at)] = float(value)
