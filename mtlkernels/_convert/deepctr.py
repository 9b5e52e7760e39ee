"""deepctr-torch: ``PLE`` and ``MMOE``.

Both hold experts and gates as ``DNN`` modules, [Linear → (BatchNorm1d) → activation → Dropout] a layer, and call them
one by one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from deepctr_torch.inputs import combined_dnn_input
from deepctr_torch.layers import DNN
from deepctr_torch.layers.activation import Identity
from deepctr_torch.models.multitask import MMOE, PLE
from torch import Tensor, nn

from mtlkernels._convert.chains import Chain
from mtlkernels._convert.classes import Converted, Converter
from mtlkernels._convert.evaluation import evaluate
from mtlkernels._convert.level import Level, examine_parts, prepare, replaced_line, width_of
from mtlkernels._convert.report import Line
from mtlkernels._convert.trial import disagreement
from mtlkernels.routing import Routing

_VERSIONS = ("0.3.0",)


def _chain(dnn: Any) -> Chain:
    """The modules of a DNN; anything else stands for itself."""
    if type(dnn) is not DNN:
        return dnn
    modules = dnn._modules  # attribute look-ups by nn.Module.__getattr__ show when one row is served
    dropout = modules["dropout"]
    columns = [modules[name]._modules.values() for name in ("linears", *(["bn"] if dnn.use_bn else []))]
    chain: list[Any] = []
    for *parts, activation in zip(*columns, modules["activation_layers"]._modules.values(), strict=True):
        chain += parts if type(activation) is Identity else [*parts, activation]
        chain.append(dropout)
    return chain


def _children(model: Any, name: str, level: int) -> Any:
    """The sub-modules of ``model.<name>[level]``."""
    return model._modules[name]._modules[str(level)]._modules.values()


def _ple_experts(model: Any, level: int) -> list[Any]:
    """A level's experts in the order of ``Routing.cgc``.

    deepctr-torch makes as many shared experts as a task has specific ones, and evaluates the first
    ``shared_expert_num`` of them.
    """
    experts = [dnn for task in _children(model, "specific_experts", level) for dnn in task._modules.values()]
    (shared,) = _children(model, "shared_experts", level)
    return experts + list(shared._modules.values())[: model.shared_expert_num]


def _ple_gates(model: Any, level: int, shared_gate: bool) -> list[Chain]:
    """The gates of a level: the tasks' and perhaps the shared one."""
    finals = list(_children(model, "specific_gate_dnn_final_layer", level))
    hidden: list[Chain] = [[]] * (len(finals) + shared_gate)
    if len(model.gate_dnn_hidden_units) > 0:
        hidden = [
            _chain(dnn) for task in _children(model, "specific_gate_dnn", level) for dnn in task._modules.values()
        ]
        if shared_gate:
            hidden.append(_chain(model._modules["shared_gate_dnn"]._modules[str(level)]))
    if shared_gate:
        finals.append(model._modules["shared_gate_dnn_final_layer"]._modules[str(level)])
    return [[dnn, final] for dnn, final in zip(hidden, finals, strict=True)]


_SHARED_GATE = ("shared_gate_dnn", "shared_gate_dnn_final_layer")
_PLE_PARTS = ("specific_experts", "shared_experts", "specific_gate_dnn", "specific_gate_dnn_final_layer", *_SHARED_GATE)


def _ple_parts(model: Any, level: int) -> Iterator[Any]:
    """The modules of a level."""
    for name in _PLE_PARTS:
        if name in model._modules:
            yield model._modules[name]._modules[str(level)]


def _ple_level(level: int, shared_gate: bool) -> Level:
    def routing(model: Any) -> Routing:
        specific, shared = model.specific_expert_num, model.shared_expert_num
        return Routing.cgc(model.num_tasks, specific, shared, shared_gate=shared_gate)

    return Level(
        experts=lambda model: map(_chain, _ple_experts(model, level)),
        gates=lambda model: _ple_gates(model, level, shared_gate),
        routing=routing,
        parts=lambda model: _ple_parts(model, level),
    )


def _mmoe_gates(model: Any) -> list[Chain]:
    finals = list(model._modules["gate_dnn_final_layer"]._modules.values())
    if len(model.gate_dnn_hidden_units) == 0:
        return finals
    return [[_chain(dnn), final] for dnn, final in zip(model.gate_dnn, finals, strict=True)]


_MMOE_PARTS = ("expert_dnn", "gate_dnn", "gate_dnn_final_layer")
_MMOE_LEVEL = Level(
    experts=lambda model: map(_chain, model._modules["expert_dnn"]._modules.values()),
    gates=_mmoe_gates,
    routing=lambda model: Routing.mmoe(model.num_experts, model.num_tasks),
    parts=lambda model: (model._modules.get(name) for name in _MMOE_PARTS),
)


class FusedPLE(Converted):
    """``PLE`` with its levels as :class:`FusedLevel` has them; its plan: a Routing a level, None for one left alone."""

    def cgc_net(self: Any, inputs: Sequence[Tensor], level_num: int) -> list[Tensor]:
        """T + 1 streams [B, D] → T [B, H], and the shared one [B, H] below the last level."""
        routing: Routing | None = self._mtlkernels_plan[level_num]
        parts = None
        if routing is not None:
            level = _ple_level(level_num, routing.num_gates > self.num_tasks)
            parts = prepare(level, self, routing, inputs[0])
        if parts is None:
            original: list[Tensor] = super().cgc_net(inputs, level_num)  # type: ignore[misc]
            return original
        # The shared gate, where there is one, is the last and reads the last stream.
        return list(evaluate(parts, inputs))


class FusedMMOE(Converted):
    """``MMOE`` with its experts and gates as :class:`FusedLevel` has them; its plan is the Routing."""

    def forward(self: Any, X: Tensor) -> Tensor:  # noqa: N803 (the library's name, which callers may use)
        """Features [B, F], as deepctr-torch lays them out → predictions [B, T]."""
        parts = prepare(_MMOE_LEVEL, self, self._mtlkernels_plan, X)
        if parts is None:
            original: Tensor = super().forward(X)  # type: ignore[misc]
            return original
        x = combined_dnn_input(*self.input_from_feature_columns(X, self.dnn_feature_columns, self.embedding_dict))
        return _predictions(self, evaluate(parts, [x]))


def _predictions(model: Any, mixed: Sequence[Tensor]) -> Tensor:
    """What MMOE makes of the gates' mixtures."""
    towers = model.tower_dnn if len(model.tower_dnn_hidden_units) > 0 else [None] * model.num_tasks
    predictions = [
        out(final(hidden if tower is None else tower(hidden)))
        for hidden, tower, final, out in zip(mixed, towers, model.tower_dnn_final_layer, model.out, strict=True)
    ]
    return torch.cat(predictions, -1)


def _refusal(model: nn.Module, library_class: type, method: str) -> str | None:
    """Why nothing of this model can be replaced, as far as its class tells."""
    version = sys.modules["deepctr_torch"].__version__
    if version not in _VERSIONS:
        return f"deepctr-torch {version} is not known, {', '.join(_VERSIONS)} is"
    if getattr(type(model), method) is not getattr(library_class, method) or method in vars(model):
        return f"{method} is not that of deepctr-torch"
    return None


def _plain(value: Any) -> bool:
    """Whether an attribute is a setting, and no table of features, optimizer or the like."""
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _left_out(model: Any, parts: Iterable[str]) -> list[str]:
    """What a trial does without: all modules but ``parts``, and all that is no setting."""
    settings = (name for name, value in vars(model).items() if name[0] != "_" and name != "training")
    names = [name for name in settings if not _plain(getattr(model, name))]
    return names + [name for name, part in model._modules.items() if part is not None and name not in parts]


def _trial_ple(level: Level, number: int, model: nn.Module, routing: Routing) -> str | None:
    """What a trial of one level finds wrong."""

    def arguments(other: Any, rows: int, generator: torch.Generator) -> tuple[Any, ...]:
        shape = (rows, width_of(level, other))
        streams = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(other.num_tasks + 1)]
        return (streams,)

    def original(other: Any, streams: list[Tensor]) -> Any:
        return other.cgc_net(streams, number)[: routing.num_gates]

    def fused(other: Any, streams: list[Tensor]) -> list[Tensor]:
        return list(evaluate(prepare(level, other, routing, streams[0]), streams))  # type: ignore[arg-type]

    lists = [name for name in _PLE_PARTS if name in model._modules]
    others = [f"{name}.{i}" for name in lists for i in model._modules[name]._modules if i != str(number)]  # type: ignore
    # The statistics of a shared gate that nobody reads are not brought up to date.
    ignored = [f"{name}.{number}" for name in _SHARED_GATE] if routing.num_gates == model.num_tasks else []
    without = [*_left_out(model, _PLE_PARTS), *others]
    return disagreement(model, fused, arguments, original=original, without=without, ignored=ignored)


def _trial_mmoe(model: nn.Module, routing: Routing) -> str | None:
    """What a trial finds wrong, of copies that take the network's input itself."""

    def arguments(other: Any, rows: int, generator: torch.Generator) -> tuple[Any, ...]:
        return (torch.randn(rows, width_of(_MMOE_LEVEL, other), generator=generator, dtype=torch.float64),)

    def original(other: Any, x: Tensor) -> Any:
        vars(other)["input_from_feature_columns"] = _dense
        return other(x)

    def fused(other: Any, x: Tensor) -> Tensor:
        vars(other)["input_from_feature_columns"] = _dense
        return _predictions(other, evaluate(prepare(_MMOE_LEVEL, other, routing, x), [x]))  # type: ignore[arg-type]

    parts = (*_MMOE_PARTS, "tower_dnn", "tower_dnn_final_layer", "out")
    return disagreement(model, fused, arguments, original=original, without=_left_out(model, parts))


def _dense(x: Tensor, *columns: Any) -> tuple[list[Tensor], list[Tensor]]:
    """In the place of ``input_from_feature_columns``: no embeddings, one dense feature."""
    return [], [x]


def _plan_level(
    level: Level, model: nn.Module, path: str, part: str, tried: Callable[[nn.Module, Routing], str | None]
) -> tuple[Routing | None, Line]:
    """What becomes of one level."""
    routing = examine_parts(level, model, level.routing(model))
    reason = routing if isinstance(routing, str) else tried(model, routing)
    if isinstance(routing, str) or reason is not None:
        return None, Line("left alone", path, part, str(reason))
    return routing, replaced_line(level, model, path, part)


def _plan_ple(module: nn.Module, path: str) -> tuple[Any, list[Line]]:
    model: Any = module
    specific, shared = model.specific_expert_num, model.shared_expert_num
    refusal = _refusal(model, PLE, "cgc_net")
    if refusal is None and shared < 1:
        refusal = "without shared experts nothing trains its shared gates"
    if refusal is None and shared > specific:
        refusal = f"shared_expert_num is {shared}, but deepctr-torch made {specific}, as many as specific_expert_num"
    if refusal is not None:
        return None, [Line("left alone", path, type(model).__name__, refusal)]
    # The library evaluates the last level's shared gate too, and its own forward ignores it.
    needs_last = type(model).forward is not PLE.forward or "forward" in vars(model)
    routings: list[Routing | None] = []
    lines = []
    for level in range(model.num_levels):
        described = _ple_level(level, needs_last or level < model.num_levels - 1)
        routing, line = _plan_level(
            described,
            model,
            path,
            f"{type(model).__name__} level {level}",
            functools.partial(_trial_ple, described, level),
        )
        lines.append(line)
        routings.append(routing)
    return (tuple(routings) if any(routings) else None), lines


def _plan_mmoe(module: nn.Module, path: str) -> tuple[Any, list[Line]]:
    model: Any = module
    refusal = _refusal(model, MMOE, "forward")
    if refusal is not None:
        return None, [Line("left alone", path, type(model).__name__, refusal)]
    routing, line = _plan_level(_MMOE_LEVEL, model, path, type(model).__name__, _trial_mmoe)
    return routing, [line]


CONVERTERS = {
    "deepctr_torch.models.multitask.ple.PLE": Converter(_plan_ple, FusedPLE),
    "deepctr_torch.models.multitask.mmoe.MMOE": Converter(_plan_mmoe, FusedMMOE),
}
