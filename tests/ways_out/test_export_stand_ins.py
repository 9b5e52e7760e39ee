"""``torch.export`` of models that have a module at two places, one activation for all towers or experts, say.

While it traces these, PyTorch hands out stand-ins for modules, for all of them, whose classes are not the modules' own.
What is fused is the same as of a model without such a module.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels._convert import registry
from tests.convert import adatt, doubles, homegrown, models, nextrec
from tests.ways_out.kinds import (
    ALL,
    WIDTH,
    ByColumns,
    Kind,
    Values,
    assert_same,
    changed,
    columns,
    names_of,
    rows,
    snr,
    trunk,
    with_weights,
)

ROWS = torch.export.Dim("rows", min=2)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Classes of users, and nextrec's, are known in these tests only."""
    monkeypatch.setattr(registry, "_registered", {})
    mk.convert.register(homegrown.MMoE, **homegrown.DESCRIPTION)
    for kind, description in adatt.DESCRIPTIONS.items():
        mk.convert.register(kind, **description)
    with nextrec.named_as_the_library():
        yield


class NormedGates(nn.Module):
    """A bare expert_mixture with batch norms behind its gates, and a layer norm and a PReLU in each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, WIDTH))
        self.gates = nn.ParameterList(torch.randn(3, WIDTH) for _ in range(2))
        self.norms = nn.ModuleList([nn.ModuleList(nn.LayerNorm(5) for _ in range(3))])
        self.slopes = nn.ModuleList(nn.PReLU() for _ in range(3))
        self.gate_norms = nn.ModuleList(nn.BatchNorm1d(3) for _ in range(2)).eval()

    def forward(self, x: Tensor) -> Any:
        layers: Any = {"gate_weights": self.gates, "gate_norms": self.gate_norms.eval(), "norms": self.norms}
        slopes: Any = [[module.weight for module in self.slopes]]
        routing = mk.Routing.mmoe(3, 2)
        return mk.expert_mixture(x, [self.weight], None, None, routing, slopes=slopes, activation="prelu", **layers)


class Streams(nn.Module):
    """A level that takes tasks' streams and a shared one apart."""

    def __init__(self, level: nn.Module) -> None:
        super().__init__()
        self.level = level

    def forward(self, x: Tensor) -> Any:
        return self.level([x, x, x], x)


class Named(nn.Module):
    """A model that takes features by their names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model({"x": x})


def partly_of_softplus() -> Any:
    """Half of its experts, and its gates' hidden layers, are called one by one."""
    model: Any = doubles.MMoE(WIDTH, (6, 5), gate=(4,))
    for mlp in (*model.expert_mlps[2:], *model.gate_mlps):
        for layer in mlp.mlp:
            layer.perceptron[-1] = nn.Softplus()
    return model


def home_grown(seed: int, **options: Any) -> Kind:
    def make() -> Any:
        return homegrown.MMoE({**homegrown.sample(seed), "embedding": False, "width": WIDTH, **options})

    return Kind(with_weights(make), rows, True)


def wide(count: int, seed: int = 0) -> tuple[Tensor]:
    return (torch.randn(count, nextrec.WIDTH, generator=torch.Generator().manual_seed(seed)),)


def codes(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 9, (count, doubles.RecModel.FIELDS), generator=generator)
    return found, torch.randn(count, doubles.RecModel.NUMBERS, generator=generator)


def tasks(count: int, seed: int = 0) -> tuple[Tensor]:
    return (torch.randn(count, 3, WIDTH, generator=torch.Generator().manual_seed(seed)),)


KINDS: dict[str, Kind] = {
    **ALL,
    "MMoE with PReLU": Kind(trunk(mk.nn.MMoE, num_experts=3, activation="prelu", dropout=0.2), rows),
    "SNR Trans with PReLU": Kind(with_weights(lambda: snr("trans", activation="prelu")), rows),
    "expert_mixture with norms of gates": Kind(with_weights(NormedGates), rows),
    "deepctr PLE with PReLU": Kind(lambda: models.ple(dnn_activation="prelu"), columns, True),
    "deepctr MMOE without activation": Kind(lambda: models.mmoe(dnn_activation="linear"), columns, True),
    "rechub PLE with Dice": Kind(lambda: ByColumns(models.rechub_ple(activation="dice")), columns, True),
    "rechub MMOE with PReLU": Kind(lambda: ByColumns(models.rechub_mmoe(activation="prelu")), columns, True),
    "nextrec PLE": Kind(with_weights(lambda: nextrec.PLE(nn.LayerNorm)), wide, True),
    "nextrec MMOE": Kind(with_weights(lambda: Named(nextrec.MMOE())), wide, True),
    "TorchEasyRec ExtractionNet": Kind(
        with_weights(lambda: Streams(doubles.ExtractionNet(WIDTH, (6, 5), norm="batch"))), rows, True
    ),
    "TorchEasyRec MMoE with Softplus": Kind(with_weights(partly_of_softplus), rows, True),
    "FuxiCTR MMoE_Layer": Kind(with_weights(lambda: doubles.MMoE_Layer(WIDTH, (6, 5))), rows, True),
    "LibMTL MMoE": Kind(with_weights(lambda: Values(doubles.LibMTLMMoE(WIDTH, (6, 5)))), rows, True),
    "MTReclib PLE": Kind(with_weights(doubles.PLEModel), codes, True),
    "MTReclib MMoE": Kind(with_weights(doubles.MMoEModel), codes, True),
    "AdaTT MLMMoE": Kind(with_weights(lambda: adatt.MLMMoE(WIDTH, ((6,), (5,)), ((4,), ()), 3, 4)), rows, True),
    "AdaTT AdaTTSp": Kind(with_weights(lambda: adatt.AdaTTSp(WIDTH, ((6,), (5,)), 3, 2)), tasks, True),
    "home-grown with modules": home_grown(0, stacked=False, act_module=True, activation="relu", norm=True, levels=2),
    "home-grown with matrices": home_grown(1, stacked=True, gate="stacked"),
}


class Towers(nn.Module):
    """A model, and two towers behind its first output, which have one activation or one each."""

    def __init__(self, model: Any, one: bool) -> None:
        super().__init__()
        self.model, activation = model, nn.LeakyReLU()
        self.towers = nn.ModuleList(nn.Sequential(activation if one else nn.LeakyReLU()) for _ in range(2))

    def forward(self, *x: Tensor) -> Any:
        outputs = torch.utils._pytree.tree_leaves(self.model(*x))
        return [*outputs, *(tower(outputs[0]) for tower in self.towers)]


def exported(model: Any, x: tuple[Any, ...], **options: Any) -> Any:
    return torch.export.export(model, x, dynamic_shapes=(tuple({0: ROWS} for _ in x),), **options)


def with_one_activation(model: nn.Module) -> nn.Module:
    """The same model with the first module of each kind of activation in the place of all others of its kind."""
    first: dict[type, nn.Module] = {}
    for part in list(model.modules()):
        for name, module in part.named_children():
            if type(module) in (nn.ReLU, nn.Softplus):
                setattr(part, name, first.setdefault(type(module), module))
    return model


# In training a few, as that is what most of this file's time goes to; in evaluation those of libraries are below.
OWN = [name for name, kind in KINDS.items() if not kind.convert]


@pytest.mark.parametrize(
    "name, training", [*((name, False) for name in OWN), *((name, True) for name in list(KINDS)[::3])]
)
def test_towers_with_one_activation(name: str, training: bool) -> None:
    """The graph has the operators that it has without; its results are the model's."""
    kind = KINDS[name]
    x = kind.inputs(40, 0)
    with torch.set_grad_enabled(training):
        apart, together = (exported(Towers(kind.model(training), one), x) for one in (False, True))
        assert any("mtlkernels" in operator for operator in names_of(apart.graph))
        assert names_of(together.graph) == names_of(apart.graph)
        assert together.graph_signature.parameters == apart.graph_signature.parameters
        assert together.state_dict.keys() == apart.state_dict.keys()
        if not training:
            x = kind.inputs(9, 1)
            assert_same(together.module()(*x), Towers(kind.model(), True)(*x))


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.convert])
def test_experts_with_one_activation(name: str) -> None:
    """And towers with one."""
    kind = KINDS[name]
    x = kind.inputs(40, 0)
    apart, model = kind.model(), with_one_activation(kind.model())
    together = exported(Towers(model, True), x)
    assert names_of(together.graph) == names_of(exported(Towers(apart, False), x).graph)
    assert_same(together.module()(*x), Towers(apart, False)(*x))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # how PyTorch 2.10 loads programs
@pytest.mark.parametrize("name", ["CGC with batch norm", "rechub PLE", "expert_mixture with norms", "SNR Trans"])
def test_a_program_follows_its_state(name: str) -> None:
    """Parameters are the program's own, saved and loaded with it; their gradients are the model's."""
    kind = KINDS[name]
    model, x = Towers(kind.model(), True), kind.inputs(11, 1)
    file = io.BytesIO()
    torch.export.save(exported(model, kind.inputs(5, 0)), file)
    file.seek(0)
    loaded: Any = torch.export.load(file).module()
    state = changed(model)
    for module in (loaded, model):
        module.load_state_dict(state)
    results = [module(*x) for module in (loaded, model)]
    assert_same(*results)
    for result in results:
        sum(y.square().sum() for y in result).backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(key).grad, parameter.grad)


def test_statistics_of_training() -> None:
    kind = KINDS["CGC with batch norm"]
    model, x = Towers(kind.model(True), True), kind.inputs(11, 1)
    program: Any = exported(model, kind.inputs(5, 0)).module()
    assert_same(program(*x), model(*x))
    for key, buffer in model.named_buffers():
        torch.testing.assert_close(program.get_buffer(key), buffer)


def test_a_norm_at_two_places_is_refused() -> None:
    """Its stand-ins are as many objects as places, and its statistics are one."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            norm = nn.BatchNorm1d(5)
            self.weight, self.norms = nn.Parameter(torch.randn(2, 5, WIDTH)), nn.ModuleList([norm, norm])

        def forward(self, x: Tensor) -> Any:
            return mk.expert_mixture(x, [self.weight], None, x[:, :2], mk.Routing.mmoe(2, 1), norms=[self.norms])

    with pytest.raises(ValueError, match="each BatchNorm1d once"):
        torch.export.export(Twice(), rows(5))


def test_a_norm_of_two_experts_is_called() -> None:
    """As in eager PyTorch each expert's batch is one for the statistics that both have."""
    model = with_weights(lambda: doubles.MMoE(WIDTH, (6,), experts=2, norm="batch"))().float()
    assert mk.convert(model).replaced
    experts = [mlp.mlp[0].perceptron for mlp in model.expert_mlps]
    experts[1][1] = experts[0][1]
    program: Any = torch.export.export(model, rows(9)).module()
    assert_same(program(*rows(9)), model(*rows(9)))
    for key, buffer in model.named_buffers():
        torch.testing.assert_close(program.get_buffer(key), buffer)


def test_modules_keep_their_paths() -> None:
    """Experts that are called are recorded under the paths at which they are."""
    kind = KINDS["TorchEasyRec MMoE with Softplus"]
    program = exported(Towers(with_one_activation(kind.model()), False), kind.inputs(40, 0))
    paths = {path for node in program.graph.nodes for path, _ in node.meta.get("nn_module_stack", {}).values()}
    assert {f"model.expert_mlps.{e}.mlp.1.perceptron.{i}" for e in (2, 3) for i in (0, 1)} <= paths
    assert {f"model.gate_mlps.{k}.mlp.0.perceptron.{i}" for k in range(3) for i in (0, 1)} <= paths
