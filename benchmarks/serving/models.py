"""What is served: plain modules with fixed weights, and rows for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import mtlkernels as mk
from benchmarks.peers import library_models
from benchmarks.peers.fused import fused_trunk
from benchmarks.peers.per_expert import PerExpertTrunk
from benchmarks.peers.shape import LEVEL, TWO_LEVELS, TrunkShape


class OneInput(nn.Module):
    """torch-rechub's PLE as a function of one float32 tensor [B, 26], codes and numbers, as every runtime can take."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        codes, numbers = x.split([library_models.SPARSE, library_models.DENSE], 1)
        numbers = numbers.to(next(self.model.parameters()).dtype)
        named = {f"s{i}": column.long() for i, column in enumerate(codes.unbind(1))}
        named |= {f"d{i}": column for i, column in enumerate(numbers.unbind(1))}
        scores: Tensor = self.model(named)
        return scores


@dataclass(frozen=True)
class Model:
    """``modules`` is the model as its user has it, ``fused`` the same by this package, ``rows`` makes an input.

    ``casts``: the input is of the model's dtype; otherwise it stays float32. ``dtypes``: those that the modules run in.
    """

    label: str
    modules: Callable[[], nn.Module]
    fused: Callable[[nn.Module], nn.Module]
    rows: Callable[[int], Tensor]
    casts: bool
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


def _trunk(label: str, shape: TrunkShape) -> Model:
    def modules() -> nn.Module:
        torch.manual_seed(0)
        return PerExpertTrunk(shape).eval()

    def fused(source: nn.Module) -> nn.Module:
        assert isinstance(source, PerExpertTrunk)
        return fused_trunk(shape, source).eval()

    return Model(label, modules, fused, lambda rows: torch.randn(rows, shape.in_features), True)


def _rechub() -> Model:
    def modules() -> nn.Module:
        return OneInput(library_models.MODELS["rechub-PLE"].build()).eval()

    def fused(source: nn.Module) -> nn.Module:
        mk.convert(source)
        return source

    # Its embedding layer gives float32 whatever its weights are.
    return Model("torch-rechub's PLE", modules, fused, library_models.features, False, ("float32",))


MODELS: Mapping[str, Model] = {
    "level": _trunk("one level", LEVEL),
    "ple": _trunk("PLE, two levels", TWO_LEVELS),
    "rechub": _rechub(),
}
