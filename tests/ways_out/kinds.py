"""What goes out of PyTorch in these tests: converted models of libraries, trunks, and modules around bare ops."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mtlkernels as mk
from tests.convert import doubles, models

WIDTH = 7


@dataclass(frozen=True)
class Kind:
    """``make()`` gives a model; ``inputs(rows, seed)`` the arguments of its forward. ``convert``: it is converted."""

    make: Callable[[], Any]
    inputs: Callable[[int, int], tuple[Any, ...]]
    convert: bool = False

    @functools.cached_property
    def _made(self) -> Any:
        """To be copied, as the trial of a conversion takes longer than most tests here."""
        model = self.make().float()
        if self.convert:
            report = mk.convert(model)
            assert report.replaced, report
        return model

    def model(self, training: bool = False) -> Any:
        return copy.deepcopy(self._made).train(training)

    def original(self, training: bool = False) -> Any:
        return self.make().float().train(training)


def rows(count: int, seed: int = 0) -> tuple[Tensor]:
    return (torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)),)


def columns(count: int, seed: int = 0) -> tuple[Tensor]:
    return (models.features(count, seed).float(),)


class ByColumns(nn.Module):
    """torch-rechub's models take a dict; a tracer wants a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(models.by_name(x))


class Listed(nn.Module):
    """A level that takes a list of streams, called with one tensor."""

    def __init__(self, level: nn.Module, streams: int) -> None:
        super().__init__()
        self.level, self.streams = level, streams

    def forward(self, x: Tensor) -> Any:
        return self.level([x] * self.streams)


class Values(nn.Module):
    """The values of a model's dict of outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return list(self.model(x).values())


class Mixture(nn.Module):
    """A bare expert_mixture: two layers, experts of which one sees another stream, gates as layers or as logits."""

    def __init__(self, gates: str, **options: Any) -> None:
        super().__init__()
        self.routing = mk.Routing.cgc(2, 1, 1, single_input=True)
        self.first = nn.ParameterList(nn.Parameter(torch.randn(6, WIDTH) / 3) for _ in range(3))
        self.second = nn.Parameter(torch.randn(3, 5, 6) / 3)
        self.bias = nn.Parameter(torch.randn(3, 6))
        self.gate = nn.Linear(WIDTH, 4)
        self.gates, self.options = gates, options

    def forward(self, x: Tensor) -> Any:
        weights, biases = [list(self.first), self.second], [self.bias, None]
        if self.gates == "logits":
            return mk.expert_mixture(x, weights, biases, self.gate(x), self.routing, **self.options)
        layers = {"gate_weights": self.gate.weight, "gate_biases": self.gate.bias}
        return mk.expert_mixture(x, weights, biases, None, self.routing, **layers, **self.options)


class Normalized(nn.Module):
    """A bare expert_mixture with batch norm, dropout in training, and slopes."""

    def __init__(self) -> None:
        super().__init__()
        self.routing = mk.Routing.mmoe(3, 2)
        self.weight = nn.Parameter(torch.randn(3, 5, WIDTH) / 3)
        self.norms = nn.ModuleList(nn.BatchNorm1d(5) for _ in range(3))
        self.slopes = nn.Parameter(torch.rand(3, 5))
        self.gate = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Any:
        options: Any = {"norms": [self.norms], "slopes": [self.slopes], "activation": "prelu"}
        return mk.expert_mixture(x, [self.weight], None, self.gate(x), self.routing, **options)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.routing = mk.Routing.mmoe(3, 2)
        self.expert, self.gate = nn.Linear(WIDTH, 15), nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Any:
        return mk.gated_mixture(self.expert(x).unflatten(1, (3, 5)), self.gate(x), self.routing)


class Routes(nn.Module):
    """Bare snr_trans or snr_aver, one route of six closed, with coding variables of hard_concrete."""

    def __init__(self, trans: bool) -> None:
        super().__init__()
        self.below = nn.ModuleList(nn.Linear(WIDTH, 6) for _ in range(2))
        self.log_alpha = nn.Parameter(torch.tensor([[0.5, -9.0], [1.0, 0.1], [-0.3, 0.2]]))
        self.weight = nn.Parameter(torch.randn(3, 2, 4, 6)) if trans else None

    def forward(self, x: Tensor) -> Any:
        u, z = [layer(x) for layer in self.below], mk.hard_concrete(self.log_alpha)
        return mk.snr_aver(u, z) if self.weight is None else mk.snr_trans(u, self.weight, z)


def snr(mode: str, **options: Any) -> Any:
    trunk = mk.nn.SNR(WIDTH, 2, (6, 5), (3, 2), mode=mode, **options)
    for joint in trunk.joints:
        joint.log_alpha.data.copy_(torch.linspace(-3.0, 2.0, joint.log_alpha.numel()).view(joint.log_alpha.shape))
    return trunk


def with_weights(make: Callable[[], Any]) -> Callable[[], Any]:
    """The same weights each time."""

    def filled() -> Any:
        torch.manual_seed(0)
        return models.fill(make())

    return filled


def trunk(kind: Any, **options: Any) -> Callable[[], Any]:
    return with_weights(lambda: kind(WIDTH, 2, expert_units=(6, 5), **options))


def seeded(make: Callable[[], Any]) -> Callable[[], Any]:
    def made() -> Any:
        torch.manual_seed(0)
        return make()

    return made


CONVERTED = {
    "deepctr PLE": Kind(models.ple, columns, True),
    "deepctr MMOE with batch norm": Kind(lambda: models.mmoe(dnn_use_bn=True), columns, True),
    "rechub PLE": Kind(lambda: ByColumns(models.rechub_ple()), columns, True),
    "rechub MMOE": Kind(lambda: ByColumns(models.rechub_mmoe()), columns, True),
    "TorchEasyRec MMoE": Kind(with_weights(lambda: doubles.MMoE(WIDTH, (6, 5), norm="batch")), rows, True),
    "FuxiCTR CGC_Layer": Kind(with_weights(lambda: Listed(doubles.CGC_Layer(WIDTH, (6, 5)), 4)), rows, True),
    "LibMTL CGC": Kind(with_weights(lambda: Values(doubles.CGC(WIDTH, (6, 5)))), rows, True),
}
TRUNKS = {
    "MMoE": Kind(trunk(mk.nn.MMoE, num_experts=3, activation="gelu"), rows),
    "CGC with batch norm": Kind(trunk(mk.nn.CGC, num_specific=1, num_shared=1, batch_norm=True), rows),
    "PLE": Kind(trunk(mk.nn.PLE, num_specific=1, num_shared=1, gate_units=(4,)), rows),
    "PLE with batch norm": Kind(trunk(mk.nn.PLE, num_specific=1, num_shared=1, batch_norm=True), rows),
}
SNRS = {
    "SNR Trans": Kind(seeded(lambda: snr("trans")), rows),
    "SNR Aver with batch norm": Kind(seeded(lambda: snr("aver", batch_norm=True)), rows),
    "compact SNR Trans": Kind(seeded(lambda: snr("trans").compact()), rows),
    "compact SNR Aver": Kind(seeded(lambda: snr("aver").compact()), rows),
}
MIXTURES = {
    "expert_mixture with logits": Kind(seeded(lambda: Mixture("logits")), rows),
    "expert_mixture with gate_weights": Kind(seeded(lambda: Mixture("layers", activation="tanh")), rows),
    "expert_mixture with norms": Kind(seeded(Normalized), rows),
    "gated_mixture": Kind(seeded(Gated), rows),
}
ROUTES = {
    "snr_trans": Kind(seeded(lambda: Routes(True)), rows),
    "snr_aver": Kind(seeded(lambda: Routes(False)), rows),
}
ALL: dict[str, Kind] = {**CONVERTED, **TRUNKS, **SNRS, **MIXTURES, **ROUTES}


def outputs(result: Any) -> list[Tensor]:
    """The tensors of a result, in float64."""
    return [y.detach().double() for y in torch.utils._pytree.tree_leaves(result) if isinstance(y, Tensor)]


def assert_same(found: Any, expected: Any, what: str = "") -> None:
    """Within float32's rounding, and not all of it zero: a way out runs the reference, whose errors are tested."""
    ours, theirs = outputs(found), outputs(expected)
    assert len(ours) == len(theirs) > 0, what
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and b.abs().max() > 0, what
        assert (a - b).abs().max() <= 1e-5 * b.abs().max(), what


def changed(model: Any) -> dict[str, Tensor]:
    """A state_dict of other values."""
    state = copy.deepcopy(model.state_dict())
    return {name: value * 1.25 if value.is_floating_point() else value for name, value in state.items()}


def names_of(graph: Any) -> Sequence[str]:
    """The operators that a graph of torch.fx calls."""
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}
