"""Models that ``mk.convert`` knows, small, by a case's sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels._convert import registry
from tests.convert import doubles, homegrown, nextrec
from tests.convert.edits import WIDTH, Edited
from tests.convert.models import by_name, features, fill, mmoe, ple, rechub_mmoe, rechub_ple

NORMS: dict[str, Any] = {"": None, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


@dataclass(frozen=True)
class Sizes:
    """What a model is made with; a library takes of it what it has a setting for."""

    tasks: int = 2
    experts: int = 2
    shared: int = 1
    levels: int = 1
    units: tuple[int, ...] = (4,)
    gate: tuple[int, ...] = ()
    norm: str = ""
    activation: str = "relu"
    rate: float = 0.0

    @property
    def activation_class(self) -> type[nn.Module]:
        return homegrown.ACTIVATIONS[self.activation][1]


# From rows, a seed and a dtype, the arguments of the model.
Inputs = Callable[[int, int, torch.dtype], tuple[Any, ...]]


@dataclass(frozen=True)
class Family:
    """A class of models: how one is made, its arguments, and the names of the modules that a report has to name."""

    make: Callable[[Sizes], Any]
    inputs: Callable[[Sizes], Inputs]
    paths: Callable[[Sizes], Sequence[str]] = lambda sizes: ("",)


def _streams(rows: int, count: int, seed: int, dtype: torch.dtype, width: int = WIDTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, rows, width, generator=generator).to(dtype))


def _one_tensor(sizes: Sizes) -> Inputs:
    return lambda rows, seed, dtype: (_streams(rows, 1, seed, dtype)[0],)


def _one_list(sizes: Sizes) -> Inputs:
    return lambda rows, seed, dtype: (_streams(rows, sizes.tasks + 1, seed, dtype),)


def _list_and_shared(sizes: Sizes) -> Inputs:
    def made(rows: int, seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
        *tasks, shared = _streams(rows, sizes.tasks + 1, seed, dtype)
        return tasks, shared

    return made


def _table(sizes: Sizes) -> Inputs:
    return lambda rows, seed, dtype: (features(rows, seed).to(dtype),)


def _columns(sizes: Sizes) -> Inputs:
    return lambda rows, seed, dtype: (by_name(features(rows, seed).to(dtype)),)


def _codes_and_numbers(sizes: Sizes) -> Inputs:
    def made(rows: int, seed: int, dtype: torch.dtype) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(9, (rows, doubles.RecModel.FIELDS), generator=generator)
        return codes, torch.randn(rows, doubles.RecModel.NUMBERS, generator=generator).to(dtype)

    return made


def _named_tensor(sizes: Sizes) -> Inputs:
    return lambda rows, seed, dtype: ({"x": _streams(rows, 1, seed, dtype, nextrec.WIDTH)[0]},)


def _homegrown_options(sizes: Sizes) -> dict[str, Any]:
    """Stacked weights where experts are many, so that every kind of weight comes up."""
    return {
        "tasks": sizes.tasks,
        "experts": max(sizes.tasks, sizes.experts + sizes.shared),
        "levels": sizes.levels,
        "width": WIDTH,
        "hidden": sizes.units[0],
        "out": sizes.units[-1],
        "deep": len(sizes.units) > 1,
        "activation": sizes.activation,
        "bias": sizes.shared > 1,
        "bias_rank": (),
        "norm": sizes.norm == "batch" and len(sizes.gate) > 0,
        "rate": sizes.rate,
        "act_module": sizes.experts > 1,
        "active_end": sizes.shared > 1,
        "stacked": sizes.experts == 3,
        "linear_layout": sizes.tasks > 1,
        "gate": ("linear", "list", "stacked")[sizes.shared % 3],
        "embedding": sizes.levels > 1,
    }


def _homegrown_inputs(sizes: Sizes) -> Inputs:
    return homegrown.inputs(homegrown.MMoE(_homegrown_options(sizes)))


def _deepctr(sizes: Sizes) -> dict[str, Any]:
    return {
        "task_names": tuple("abc"[: max(2, sizes.tasks)]),
        "expert_dnn_hidden_units": sizes.units,
        "gate_dnn_hidden_units": sizes.gate,
        "dnn_use_bn": bool(sizes.norm),
        "dnn_dropout": sizes.rate,
        "dnn_activation": sizes.activation_class,
    }


def _rechub(sizes: Sizes) -> dict[str, Any]:
    return {
        "tasks": sizes.tasks,
        "dims": sizes.units,
        "dropout": sizes.rate,
        "activation": sizes.activation_class,
    }


def _easyrec(sizes: Sizes) -> dict[str, Any]:
    return {
        "tasks": sizes.tasks,
        "norm": sizes.norm,
        "rate": sizes.rate,
        "activation": sizes.activation_class,
    }


def _fuxictr(sizes: Sizes) -> dict[str, Any]:
    return {"tasks": sizes.tasks, "gate": sizes.gate, "norm": bool(sizes.norm), "rate": sizes.rate}


def _mtreclib_ple(sizes: Sizes) -> nn.Module:
    units = sizes.units * sizes.levels
    return doubles.PLEModel(units, sizes.tasks, sizes.experts, sizes.shared, sizes.rate)


# The smallest first.
FAMILIES: dict[str, Family] = {
    "registered level": Family(lambda sizes: Edited(sizes.norm == "batch", sizes.rate), _one_tensor),
    "easyrec.MMoE": Family(
        lambda s: doubles.MMoE(WIDTH, s.units, s.experts + 1, gate=s.gate, **_easyrec(s)), _one_tensor
    ),
    "fuxictr.MMoE_Layer": Family(
        lambda s: doubles.MMoE_Layer(WIDTH, s.units, experts=s.experts + 1, **_fuxictr(s)), _one_tensor
    ),
    "libmtl.MMoE": Family(lambda s: doubles.LibMTLMMoE(WIDTH, s.units, s.experts + 1, s.tasks), _one_tensor),
    "libmtl.CGC": Family(lambda s: doubles.CGC(WIDTH, s.units, [s.experts, *range(1, s.tasks)], s.shared), _one_tensor),
    "fuxictr.CGC_Layer": Family(
        lambda s: doubles.CGC_Layer(WIDTH, s.units, specific=s.experts, shared=s.shared, **_fuxictr(s)), _one_list
    ),
    "easyrec.ExtractionNet": Family(
        lambda s: doubles.ExtractionNet(
            WIDTH, s.units, specific=(s.experts, 1, 2), shared=s.shared, last=bool(s.gate), **_easyrec(s)
        ),
        _list_and_shared,
    ),
    "mtreclib.MMoE": Family(lambda s: doubles.MMoEModel(s.units, s.tasks, s.experts + 1, s.rate), _codes_and_numbers),
    "mtreclib.PLE": Family(_mtreclib_ple, _codes_and_numbers),
    "nextrec.MMOE": Family(lambda s: nextrec.MMOE(NORMS[s.norm]), _named_tensor),
    "nextrec.PLE": Family(
        lambda s: nextrec.PLE(NORMS[s.norm]),
        lambda s: lambda rows, seed, dtype: (_streams(rows, 1, seed, dtype, nextrec.WIDTH)[0],),
        lambda s: ("cgc_layers.0", "cgc_layers.1"),
    ),
    "registered model": Family(lambda s: homegrown.MMoE(_homegrown_options(s)), _homegrown_inputs),
    "rechub.MMOE": Family(lambda s: rechub_mmoe(experts=s.experts + 1, **_rechub(s)), _columns),
    "rechub.PLE": Family(
        lambda s: rechub_ple(levels=s.levels, specific=s.experts, shared=s.shared, **_rechub(s)),
        _columns,
        lambda s: tuple(f"cgc_layers.{i}" for i in range(s.levels)),
    ),
    "deepctr.MMOE": Family(lambda s: mmoe(num_experts=s.experts + 1, **_deepctr(s)), _table),
    "deepctr.PLE": Family(
        lambda s: ple(
            num_levels=s.levels,
            specific_expert_num=s.experts,
            shared_expert_num=min(s.experts, s.shared),
            **_deepctr(s),
        ),  # fmt: skip
        _table,
    ),
}


def make(family: str, sizes: Sizes, dtype: torch.dtype) -> Any:
    """A model with weights of ordinary size, always the same."""
    return fill(FAMILIES[family].make(sizes)).to(dtype)


@contextlib.contextmanager
def known() -> Iterator[None]:
    """The classes that libraries do not have are registered, and doubles go by their libraries' names."""
    with mock.patch.object(registry, "_registered", {}), nextrec.named_as_the_library():
        mk.convert.register(
            Edited,
            experts=lambda level: level.experts,
            gates=lambda level: level.gates,
            routing=lambda level: mk.Routing.mmoe(len(level.experts), len(level.gates)),
        )
        mk.convert.register(homegrown.MMoE, **homegrown.DESCRIPTION)
        yield
