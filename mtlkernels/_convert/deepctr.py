"""deepctr-torch: ``PLE`` and ``MMOE``.

Both hold experts and gates as ``DNN`` modules, [Linear → (BatchNorm1d) → activation → Dropout] a layer, and call them
one by one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepctr_torch.inputs import combined_dnn_input
from deepctr_torch.layers import DNN
from deepctr_torch.layers.activation import Identity
from deepctr_torch.models.multitask import MMOE, PLE
from torch import Tensor, nn

from mtlkernels._convert.classes import Converted, Converter
from mtlkernels._convert.folding import norm_refusal
from mtlkernels._convert.mlp import (
    Experts,
    Gate,
    Layer,
    activation_name,
    describe,
    few_rows,
    mix,
    obstacle,
    read_experts,
)
from mtlkernels._convert.report import Line
from mtlkernels.nn.level import watched
from mtlkernels.routing import Routing

_VERSIONS = ("0.3.0",)


def _read(dnn: Any) -> list[Layer] | str:
    """The layers of a DNN, or why it cannot be fused in any mode."""
    if type(dnn) is not DNN:
        return f"{type(dnn).__name__} in the place of a DNN"
    modules = dnn._modules  # attribute look-ups by nn.Module.__getattr__ show when one row is served
    dropout = modules["dropout"]
    linears, activations = modules["linears"]._modules.values(), modules["activation_layers"]._modules.values()
    norms = list(modules["bn"]._modules.values()) if dnn.use_bn else [None] * len(linears)
    if type(dropout) is not nn.Dropout:
        return f"{type(dropout).__name__} in the place of Dropout"
    if any(watched(module) for module in (dnn, dropout, *linears, *activations)):
        return "a hook"
    layers = []
    for linear, norm, activation in zip(linears, norms, activations, strict=True):
        if type(linear) is not nn.Linear:
            return f"{type(linear).__name__} in the place of Linear"
        name = "none" if type(activation) is Identity else activation_name(activation)
        if name is None:
            return f"activation {type(activation).__name__}"
        if norm is not None:
            reason = "a hook" if watched(norm) else norm_refusal(linear, norm)
            if reason is not None:
                return reason
        layers.append(Layer(linear, norm, name, dropout))
    return layers


def _fusible(experts: Iterable[Any], x: Tensor) -> Experts | str:
    """A level's experts, or why they cannot be fused now, for an input of so many rows."""
    return read_experts(map(_read, experts), few_rows(x))


def _gate(dnn: Any, final: Any) -> Gate:
    """A gate from its DNN, or None, and its final layer; what cannot be fused now is called."""
    hidden: Any = [] if dnn is None else _read(dnn)
    if isinstance(hidden, str) or obstacle(hidden, False) is not None:
        hidden = None
    if type(final) is nn.Linear and not watched(final):
        return Gate(hidden, Layer(final, None, "none", None), dnn)
    return Gate(None, None, lambda x: final(x if dnn is None else dnn(x)))


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


def _ple_gates(model: Any, level: int, shared_gate: bool) -> list[Gate]:
    """The gates of a level: the tasks' and perhaps the shared one."""
    finals = list(_children(model, "specific_gate_dnn_final_layer", level))
    dnns: list[Any] = [None] * (len(finals) + shared_gate)
    if len(model.gate_dnn_hidden_units) > 0:
        dnns = [dnn for task in _children(model, "specific_gate_dnn", level) for dnn in task._modules.values()]
        if shared_gate:
            dnns.append(model.shared_gate_dnn[level])
    if shared_gate:
        finals.append(model.shared_gate_dnn_final_layer[level])
    return [_gate(dnn, final) for dnn, final in zip(dnns, finals, strict=True)]


class FusedPLE(Converted):
    """``PLE`` with each level one ``expert_mixture``; its plan holds a Routing a level, None for one left alone."""

    def cgc_net(self: Any, inputs: Sequence[Tensor], level_num: int) -> list[Tensor]:
        """T + 1 streams [B, D] → T [B, H], and the shared one [B, H] below the last level."""
        routing: Routing | None = self._mtlkernels_plan[level_num]
        found = "left alone" if routing is None else _fusible(_ple_experts(self, level_num), inputs[0])
        if routing is None or isinstance(found, str):
            original: list[Tensor] = super().cgc_net(inputs, level_num)  # type: ignore[misc]
            return original
        gates = _ple_gates(self, level_num, routing.num_gates > self.num_tasks)
        # The shared gate, where there is one, is the last and reads the last stream.
        return list(mix(inputs, found, gates, routing))


class FusedMMOE(Converted):
    """``MMOE`` with experts and gates one ``expert_mixture``; its plan is the Routing."""

    def forward(self: Any, X: Tensor) -> Tensor:  # noqa: N803 (the library's name, which callers may use)
        """Features [B, F], as deepctr-torch lays them out → predictions [B, T]."""
        found = _fusible(self._modules["expert_dnn"]._modules.values(), X)
        if isinstance(found, str):
            original: Tensor = super().forward(X)  # type: ignore[misc]
            return original
        x = combined_dnn_input(*self.input_from_feature_columns(X, self.dnn_feature_columns, self.embedding_dict))
        dnns = self.gate_dnn if len(self.gate_dnn_hidden_units) > 0 else [None] * self.num_tasks
        gates = [_gate(dnn, final) for dnn, final in zip(dnns, self.gate_dnn_final_layer, strict=True)]
        mixed = mix([x], found, gates, self._mtlkernels_plan)
        towers = self.tower_dnn if len(self.tower_dnn_hidden_units) > 0 else [None] * self.num_tasks
        predictions = [
            out(final(hidden if tower is None else tower(hidden)))
            for hidden, tower, final, out in zip(mixed, towers, self.tower_dnn_final_layer, self.out, strict=True)
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


def _level_line(model: nn.Module, path: str, part: str, experts: Sequence[Any], gates: int) -> Line:
    """What becomes of one level."""

    def left(reason: str) -> Line:
        return Line("left alone", path, part, reason)

    if not experts:
        return left("it has no experts")
    kinds = set()
    for dnn in experts:
        found = _read(dnn)
        if isinstance(found, str):
            return left(f"{found} ({next(name for name, module in model.named_modules() if module is dnn)})")
        kinds.add(tuple(layer.activation for layer in found))
    shapes = {
        tuple((linear.weight.shape, linear.bias is None, dnn.use_bn) for linear in dnn.linears) for dnn in experts
    }
    if len(shapes) > 1 or len(kinds) > 1:
        return left(f"experts of unequal {'shape' if len(shapes) > 1 else 'activations'}")
    return Line("replaced", path, part, describe([_read(dnn) for dnn in experts], [()] * gates))


def _plan_ple(module: nn.Module, path: str) -> tuple[Any, list[Line]]:
    model: Any = module
    tasks, specific, shared = model.num_tasks, model.specific_expert_num, model.shared_expert_num
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
        shared_gate = needs_last or level < model.num_levels - 1
        routing = Routing.cgc(tasks, specific, shared, shared_gate=shared_gate)
        part = f"{type(model).__name__} level {level}"
        lines.append(_level_line(model, path, part, _ple_experts(model, level), routing.num_gates))
        routings.append(routing if lines[-1].action == "replaced" else None)
    return (tuple(routings) if any(routings) else None), lines


def _plan_mmoe(module: nn.Module, path: str) -> tuple[Any, list[Line]]:
    model: Any = module
    refusal = _refusal(model, MMOE, "forward")
    if refusal is not None:
        return None, [Line("left alone", path, type(model).__name__, refusal)]
    line = _level_line(model, path, type(model).__name__, list(model.expert_dnn), model.num_tasks)
    return (Routing.mmoe(model.num_experts, model.num_tasks) if line.action == "replaced" else None), [line]


CONVERTERS = {
    "deepctr_torch.models.multitask.ple.PLE": Converter(_plan_ple, FusedPLE),
    "deepctr_torch.models.multitask.mmoe.MMOE": Converter(_plan_mmoe, FusedMMOE),
}
