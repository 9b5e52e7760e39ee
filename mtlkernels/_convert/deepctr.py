"""deepctr-torch: ``PLE`` and ``MMOE``.

Both hold experts and gates as ``DNN`` modules, [Linear → (BatchNorm1d) → activation → Dropout] a layer, and call them
one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepctr_torch.inputs import combined_dnn_input
from deepctr_torch.layers import DNN
from deepctr_torch.layers.activation import Identity
from deepctr_torch.models.multitask import MMOE, PLE
from torch import Tensor, nn

from mtlkernels import _torch
from mtlkernels._convert.chains import Chain
from mtlkernels._convert.description import TrunkDescription
from mtlkernels._convert.levels import LevelDescription
from mtlkernels._convert.planning import Plan, left_alone, plan_trunk
from mtlkernels.routing import Routing

_NUMBERS = tuple(map(str, range(64)))  # as making them anew shows when one row is served


def _chain(dnn: Any) -> Chain:
    """The modules of a DNN; anything else stands for itself."""
    if type(dnn) is not DNN and _torch.class_of(dnn) is not DNN:
        return dnn
    modules: Any = dnn._modules  # attribute look-ups by nn.Module.__getattr__ show when one row is served
    dropout = modules["dropout"]
    columns = [_by_number(modules[name]) for name in ("linears", *(["bn"] if dnn.use_bn else []))]
    chain: list[Any] = []
    for *parts, activation in zip(*columns, _by_number(modules["activation_layers"]), strict=True):
        nothing = isinstance(activation, Identity) and _torch.class_of(activation) is Identity
        chain += parts if nothing else [*parts, activation]
        chain.append(dropout)
    return chain


def _by_number(modules: Any) -> list[Any]:
    """The modules of a list as the library takes them, which is not the order of its keys where one was exchanged."""
    own = modules._modules
    known = len(own) <= len(_NUMBERS)
    return [own[number] for number in (_NUMBERS[: len(own)] if known else map(str, range(len(own))))]


def _at(model: Any, name: str, level: int) -> Any:
    return model._modules[name]._modules[str(level)]


def _ple_experts(model: Any, level: int) -> list[Chain]:
    """A level's experts in the order of ``Routing.cgc``.

    deepctr-torch makes as many shared experts as a task has specific ones, and evaluates the first
    ``shared_expert_num`` of them.
    """
    specific = [dnn for of_task in _by_number(_at(model, "specific_experts", level)) for dnn in _by_number(of_task)]
    shared = _by_number(_by_number(_at(model, "shared_experts", level))[0])[: model.shared_expert_num]
    return [_chain(dnn) for dnn in specific + shared]


def _ple_gates(model: Any, level: int, shared_gate: bool) -> list[Chain]:
    """The gates of a level: the tasks' and perhaps the shared one."""
    finals = _by_number(_at(model, "specific_gate_dnn_final_layer", level))
    hidden: list[Any] = []
    if len(model.gate_dnn_hidden_units) > 0:
        hidden = [_by_number(of_task)[0] for of_task in _by_number(_at(model, "specific_gate_dnn", level))]
    if shared_gate:
        finals.append(_at(model, "shared_gate_dnn_final_layer", level))
        hidden += [_at(model, "shared_gate_dnn", level)] if hidden else []
    return [[_chain(dnn), final] for dnn, final in zip(hidden or [None] * len(finals), finals, strict=True)]


_SHARED_GATE = ("shared_gate_dnn", "shared_gate_dnn_final_layer")
_PLE_PARTS = ("specific_experts", "shared_experts", "specific_gate_dnn", "specific_gate_dnn_final_layer", *_SHARED_GATE)


def _ple_level(level: int, shared_gate: bool) -> LevelDescription:
    def routing(model: Any) -> Routing:
        specific, shared = model.specific_expert_num, model.shared_expert_num
        return Routing.cgc(model.num_tasks, specific, shared, shared_gate=shared_gate)

    return LevelDescription(
        experts=lambda model: _ple_experts(model, level),
        gates=lambda model: _ple_gates(model, level, shared_gate),
        routing=routing,
        parts=lambda model: [_at(model, name, level) for name in _PLE_PARTS if name in model._modules],
        num_streams=lambda model: model.num_tasks + 1,
    )


def _needs_last_gate(model: Any) -> bool:
    """The library evaluates the last level's shared gate too, and its own forward ignores it."""
    return type(model).forward is not PLE.forward or "forward" in vars(model)


_ple_levels: dict[tuple[int, bool], LevelDescription] = {}


def _levels_of_ple(model: Any) -> list[LevelDescription]:
    """The shared gate, where a level has one, is the last and reads the last stream."""
    count, needs_last = model.num_levels, _needs_last_gate(model)
    keys = [(number, needs_last or number < count - 1) for number in range(count)]
    return [_ple_levels.get(key) or _ple_levels.setdefault(key, _ple_level(*key)) for key in keys]


def _plan_ple(module: nn.Module, path: str) -> Plan:
    model: Any = module
    specific, shared = model.specific_expert_num, model.shared_expert_num
    refusal = _method_refusal(model, PLE, "cgc_net")
    if refusal is None and shared < 1:
        refusal = "without shared experts nothing trains its shared gates"
    if refusal is None and shared > specific:
        refusal = f"shared_expert_num is {shared}, but deepctr-torch made {specific}, as many as specific_expert_num"
    if refusal is not None:
        return left_alone(refusal, model, path)
    needs_last = _needs_last_gate(model)
    routings: list[Routing | None] = []
    lines, own_under_autocast = [], False
    for number in range(model.num_levels):
        trunk = _ple_trunk(number, needs_last or number < model.num_levels - 1)
        plan = plan_trunk(trunk, PLE, model, path)
        routings.append(None if plan.routings is None else plan.routings[0])
        lines.append(dataclasses.replace(plan.lines[0], part=f"{type(model).__name__} level {number}"))
        own_under_autocast = own_under_autocast or plan.own_under_autocast
    return Plan(tuple(routings) if any(routings) else None, lines, own_under_autocast)


def _ple_trunk(number: int, shared_gate: bool) -> TrunkDescription:
    """One level for its trial."""

    def trial(model: Any) -> dict[str, Any]:
        lists = [name for name in _PLE_PARTS if name in model._modules]
        others = [f"{name}.{i}" for name in lists for i in model._modules[name]._modules if i != str(number)]
        return {
            "without": [*_left_out(model, _PLE_PARTS), *others],
            # The statistics of a shared gate that nobody reads are not brought up to date.
            "ignored": [] if shared_gate else [f"{name}.{number}" for name in _SHARED_GATE],
            "original": lambda other, streams: other.cgc_net(streams, number)[: other.num_tasks + shared_gate],
        }

    return TrunkDescription.of(
        _ple_level(number, shared_gate),
        arguments=lambda model, streams: (list(streams),),
        method="cgc_net",
        trial=trial,
    )


def _mmoe_gates(model: Any) -> list[Chain]:
    finals = _by_number(model._modules["gate_dnn_final_layer"])
    if len(model.gate_dnn_hidden_units) == 0:
        return finals
    hidden = _by_number(model._modules["gate_dnn"])
    return [[_chain(dnn), final] for dnn, final in zip(hidden, finals, strict=True)]


def _mmoe_inputs(model: Any, X: Tensor) -> Tensor:  # noqa: N803 (the library's name, which callers may use)
    columns = model.input_from_feature_columns(X, model.dnn_feature_columns, model.embedding_dict)
    x: Tensor = combined_dnn_input(*columns)
    return x


def _predictions(model: Any, mixed: Sequence[Tensor]) -> Tensor:
    """What MMOE makes of the gates' mixtures."""
    if len(model.tower_dnn_hidden_units) > 0:
        mixed = [model.tower_dnn[i](x) for i, x in enumerate(mixed)]
    return torch.cat([model.out[i](model.tower_dnn_final_layer[i](x)) for i, x in enumerate(mixed)], -1)


def _dense(x: Tensor, *columns: Any) -> tuple[list[Tensor], list[Tensor]]:
    """In the place of ``input_from_feature_columns``: no embeddings, one dense feature."""
    return [], [x]


_MMOE_PARTS = ("expert_dnn", "gate_dnn", "gate_dnn_final_layer")
_MMOE_LEVEL = LevelDescription(
    experts=lambda model: [_chain(dnn) for dnn in _by_number(model._modules["expert_dnn"])],
    gates=_mmoe_gates,
    routing=lambda model: Routing.mmoe(model.num_experts, model.num_tasks),
    parts=lambda model: (model._modules.get(name) for name in _MMOE_PARTS),
)


def _method_refusal(model: nn.Module, base: type, method: str) -> str | None:
    if getattr(type(model), method) is not getattr(base, method) or method in vars(model):
        return f"{method} is not that of deepctr-torch"
    return None


def _is_setting(value: Any) -> bool:
    """Whether an attribute is no table of features, optimizer or the like."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_setting, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _left_out(model: Any, parts: Iterable[str]) -> list[str]:
    """What a trial does without: all modules but ``parts``, and all that is no setting."""
    attributes = (name for name in vars(model) if name[0] != "_" and name != "training")
    names = [name for name in attributes if not _is_setting(getattr(model, name))]
    return names + [name for name, part in model._modules.items() if part is not None and name not in parts]


# By the name of the class.
DESCRIPTIONS: dict[str, Any] = {
    # Its levels are fused each by itself.
    "PLE": TrunkDescription(
        _levels_of_ple,
        inputs=lambda model, inputs, level_num: inputs,
        level_of=lambda model, inputs, level_num: level_num,
        method="cgc_net",
        plan=_plan_ple,
    ),
    # A trial's copies take the network's input itself.
    "MMOE": TrunkDescription.of(
        _MMOE_LEVEL,
        inputs=_mmoe_inputs,
        outputs=_predictions,
        embeds=True,
        refusal=lambda model: _method_refusal(model, MMOE, "forward"),
        trial=lambda model: {
            "without": _left_out(model, (*_MMOE_PARTS, "tower_dnn", "tower_dnn_final_layer", "out")),
            "stand_ins": {"input_from_feature_columns": _dense},
        },
    ),
}
