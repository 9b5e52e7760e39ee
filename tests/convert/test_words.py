"""The report's words: what happened, and the layer and setting because of which it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels._convert import registry
from tests import requires
from tests.convert import doubles
from tests.convert.models import fill, rechub_mmoe, rechub_ple

WIDTH = 10


class Dice(nn.Module):
    """deepctr-torch's, by statistics of the batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(width)
        self.alpha = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        share = self.bn(x).sigmoid()
        return share * x + (1 - share) * self.alpha * x


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "LeakyReLU with slope 0.2": lambda: nn.LeakyReLU(0.2),
    "GELU with approximate='tanh'": lambda: nn.GELU(approximate="tanh"),
    "ELU with alpha=0.5": lambda: nn.ELU(0.5),
    "Hardtanh with min_val=-1.0, max_val=1.0": nn.Hardtanh,
    "Softplus with beta=1.0, threshold=20.0": nn.Softplus,
    "PReLU of 12 slopes after 7": lambda: nn.PReLU(12),
    "Dice over the batch": lambda: Dice(7),
}


@pytest.mark.parametrize("words", ACTIVATIONS)
def test_a_layer_and_its_setting(words: str) -> None:
    """Of one expert, the layer by its name in the model; and of all, so that only the mixing is fused."""
    if words.startswith("PReLU"):  # whose forward fails
        level = doubles.MMoE_Layer(WIDTH, (12, 7))
        level.experts[1].mlp[3] = ACTIVATIONS[words]()  # type: ignore[index, union-attr]
        assert "PReLU of 12 slopes after 7" in str(mk._convert.chains.read_chain(level.experts[1].mlp))  # type: ignore
        return
    for experts, action in (([1], "replaced"), (range(4), "mixing fused")):
        level = fill(doubles.MMoE_Layer(WIDTH, (12, 7)))  # type: ignore[assignment]
        for e in experts:
            level.experts[e].mlp[3] = ACTIVATIONS[words]()  # type: ignore[index, union-attr]
        report = mk.convert(level)
        (line,) = report.lines
        assert line.action == action
        assert f"because of {words} (experts.{experts[0]}.mlp.3)" in line.detail
        assert report.replaced == ((line,) if action == "replaced" else ())
        assert report.mixing_fused == ((line,) if action != "replaced" else ())


@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("last", [False, True])
def test_easyrec_without_shared_experts(last: bool, shared: int) -> None:
    model = fill(doubles.ExtractionNet(WIDTH, (12, 7), shared=shared, last=last)).eval()
    streams = list(torch.randn(4, 300, WIDTH))
    given = streams[:-1], streams[-1]
    expected = model(*given)
    (line,) = mk.convert(model).replaced
    assert line.detail == f"{6 + shared} experts of 2 layers and {3 + (not last)} gates in one expert_mixture"
    torch.testing.assert_close(model(*given), expected)
    if last and not shared:
        torch.testing.assert_close(model(streams[:-1], None), expected)


@pytest.mark.parametrize("kind", ["MMoE", "CGC", "PLE", "SNR"])
def test_mtlkernels_own_trunks(kind: str) -> None:
    sizes: dict[str, Any] = {"num_subnets": (2, 2), "subnet_units": (4,)} if kind == "SNR" else {"expert_units": (4,)}
    trunk = getattr(mk.nn, kind)(5, 2, **sizes)
    report = mk.convert(nn.ModuleDict({"trunk": trunk, "tower": nn.Linear(4, 1)}))
    assert str(report) == f"left alone  trunk  {kind}: fused already: mtlkernels' own"


def test_hooks_and_forwards_of_instances() -> None:
    model = rechub_ple(levels=2)
    expert = model.cgc_layers[0].experts_specific[1]
    expert.mlp[0].register_forward_hook(lambda *_: None)
    gate = model.cgc_layers[1].gates_specific[0]
    gate.forward = gate.forward
    assert [line.detail for line in mk.convert(model).left_alone] == [
        "experts_specific.1.mlp.0 has a hook, and would not be called",
        "gates_specific.0 has a forward of its own, and would not be called",
    ]


class Mixed(torch.Tensor):
    """A weight that knows how to multiply itself, twice as large as its numbers say, as quantized ones do."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            x, weight, *rest = args
            bias = rest[0] if rest else (kwargs or {}).get("bias")
            return nn.functional.linear(x, 2 * weight.as_subclass(Tensor), bias)
        return super().__torch_function__(function, types, args, kwargs or {})


def quantized(model: nn.Module) -> nn.Module:
    """As torchao's ``quantize_`` does it: each linear layer gets another weight in place."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight = nn.Parameter(module.weight.detach().as_subclass(Mixed), requires_grad=False)
    return model


class Adapted(nn.Module):
    """As peft's LoRA has it: in the place of a linear layer, which stays beneath."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x.sum(1, keepdim=True)


class Noisy(nn.Linear):
    """A subclass with a forward of its own, as those of quantization-aware training."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).round(decimals=1)


def exchanged(model: nn.Module, change: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, change(child))
    return model


def noisy(layer: nn.Linear) -> nn.Module:
    other = Noisy(layer.in_features, layer.out_features, bias=layer.bias is not None)
    other.load_state_dict(layer.state_dict())
    return other


def hooked_norm(model: nn.Module) -> nn.Module:
    """The older weight norm makes its weight in a hook."""
    for module in list(model.modules()):
        if type(module) is nn.Linear:
            nn.utils.weight_norm(module)
            with torch.no_grad():
                module.weight_g.mul_(1.5)  # type: ignore[operator]
    return model


def parametrized(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        if type(module) is nn.Linear:
            nn.utils.parametrizations.weight_norm(module)
            with torch.no_grad():
                module.parametrizations.weight.original0.mul_(1.5)  # type: ignore[union-attr, operator]
    return model


CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "quantized": quantized,
    "quantized by torch.ao": lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}),
    "LoRA": lambda model: exchanged(model, Adapted),
    "a subclass": lambda model: exchanged(model, noisy),
    "weight norm by hooks": hooked_norm,
    "weight norm": parametrized,
}
TRUNKS: dict[str, Callable[[], nn.Module]] = {
    "MMoE": lambda: mk.nn.MMoE(WIDTH, 2, (6, 5), num_experts=3),
    "MMoE with batch norm": lambda: mk.nn.MMoE(WIDTH, 2, (6, 5), num_experts=3, batch_norm=True),
    "PLE": lambda: mk.nn.PLE(WIDTH, 2, (6, 5), num_specific=2, num_shared=1, gate_units=(4,)),
    "SNR": lambda: mk.nn.SNR(WIDTH, 2, (6, 5), (3, 2)),
}


def plain(trunk: Any, x: Tensor) -> Any:
    """A trunk's levels by the modules of their experts and gates."""
    streams: Any = x
    for level in trunk.levels if hasattr(trunk, "levels") else [trunk.level]:
        streams = level._by_modules((streams,) if isinstance(streams, Tensor) else streams)
    return streams


# Older weight norm and torch.ao's quantization are deprecated, and still met.
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch.ao.*")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", TRUNKS)
def test_trunks_whose_layers_change(name: str, change: str) -> None:
    trunk = TRUNKS[name]().eval()
    x = torch.randn(40, WIDTH)
    before = trunk(x)
    trunk = CHANGES[change](trunk)
    found = trunk(x)
    if name == "SNR":
        level = trunk.levels[0]  # type: ignore[index, union-attr]
        torch.testing.assert_close(list(level(x)), [expert(x) for expert in level.experts])  # type: ignore
    else:
        torch.testing.assert_close(found, plain(trunk, x))
    assert not torch.allclose(found[0], before[0])


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch.ao.*")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@torch.no_grad()
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_converted_models_whose_layers_change(change: str, first: bool) -> None:
    """Before their conversion too: then it is left alone, or right."""
    models = [fill(doubles.ExtractionNet(WIDTH, (12, 7), norm="batch")).eval() for _ in range(2)]
    for rows in (3, 300):
        streams = list(torch.randn(4, rows, WIDTH))
        results = []
        for i, model in enumerate(models):
            if rows == 3:
                if i and not first:
                    assert mk.convert(model).replaced
                models[i] = CHANGES[change](model)
                if i and first:
                    mk.convert(models[i])
            results.append(models[i](streams[:-1], streams[-1]))
        torch.testing.assert_close(results[1], results[0])


@requires.gloo
def test_a_sharded_model_says_so(mesh: Any) -> None:
    """And what to do."""
    from torch.distributed.fsdp import fully_shard

    model = fill(doubles.MMoE_Layer(WIDTH, (12, 7)))
    fully_shard(model, mesh=mesh)
    (line,) = mk.convert(model).left_alone
    assert line.detail == "a weight of class DTensor, to be converted before it is sharded (experts.0.mlp.0)"


def test_a_quantized_model_says_so() -> None:
    (line,) = mk.convert(quantized(fill(doubles.MMoE_Layer(WIDTH, (12, 7))))).left_alone
    assert line.detail == "a weight of class Mixed (experts.0.mlp.0)"


# PyTorch's quantization is deprecated, and still met.
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("only_experts", [False, True])
def test_a_level_of_quantized_layers_says_so(only_experts: bool) -> None:
    model = rechub_ple(tasks=2, levels=1).eval()
    part = model.cgc_layers[0].experts_shared if only_experts else model
    torch.ao.quantization.quantize_dynamic(part, {nn.Linear}, inplace=True)
    (line,) = mk.convert(model).left_alone
    path = "experts_shared.0.mlp.0" if only_experts else "experts_specific.0.mlp.0"
    reason = f"its layers are quantized, and cannot be tried in float64 ({path}); convert it before it is quantized"
    assert line.detail == reason


@pytest.mark.parametrize("holder", ["parameter", "attribute", "statistic", "beside"])
def test_a_level_whose_memory_is_gone_says_so(holder: str) -> None:
    """As FullyShardedDataParallel frees what it has put together until a forward pass; it cannot be tried."""
    model = rechub_ple(tasks=2, levels=1)
    level = model.cgc_layers[0]
    linear, norm = level.experts_shared[1].mlp[:2]
    name = "experts_shared.1.mlp.0.weight"
    tensor = linear.weight
    if holder == "attribute":
        del linear.weight
        linear.weight = tensor = torch.randn(tensor.shape)
    elif holder == "statistic":
        name, tensor = "experts_shared.1.mlp.1.running_var", norm.running_var
    elif holder == "beside":
        name, tensor = "scales", torch.ones(3)
        level.scales = [tensor]
    tensor.untyped_storage().resize_(0)
    (line,) = mk.convert(model).left_alone
    assert line.detail == (
        f"{name} has no memory now, as where FullyShardedDataParallel has taken its values; convert it before it is"
        " wrapped"
    )


@pytest.mark.parametrize("make", [doubles.MMoE_Layer, doubles.CGC_Layer])
def test_dice_over_the_batch_makes_float32_under_autocast(make: Any) -> None:
    """By its slopes, which autocast leaves alone: so the level's own code runs there, and nowhere else."""
    level = fill(make(WIDTH, (7,)))
    for block in level.modules():
        if isinstance(block, nn.Sequential):
            block[1] = Dice(block[0].out_features)
    (line,) = mk.convert(level).mixing_fused
    assert line.detail.endswith(
        "; its own code under autocast: in evaluation in float32 under autocast its outputs are float32, but bfloat16"
        " fused"
    )
    x = torch.randn(300, WIDTH)
    streams = x if make is doubles.MMoE_Layer else [x] * 4
    with torch.autocast("cpu", torch.bfloat16):
        found = level(streams)
        assert mk.revert(level).reverted
        torch.testing.assert_close(found, level(streams), rtol=0, atol=0)


def test_a_library_model_is_tried_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch-rechub's class, whose code was edited where it is installed."""
    model = rechub_mmoe()
    original = type(model).forward

    def forward(self: Any, x: Any) -> Tensor:
        y: Tensor = original(self, x)
        return y * 0.5 if self.training else y

    monkeypatch.setattr(type(model), "forward", forward)
    (line,) = mk.convert(model).left_alone
    assert line.detail == "in training its outputs differ from those of its experts and gates"


class OwnExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


class OwnMMoE(nn.Module):
    """A class as users write it, whose features come in a dictionary where there are ``names`` of them."""

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.names = names
        self.experts = nn.ModuleList(OwnExpert() for _ in range(3))
        self.gates = nn.ModuleList(nn.Linear(WIDTH, 3) for _ in range(2))

    def forward(self, x: Any) -> list[Tensor]:
        x = torch.cat([x[name] for name in self.names], dim=1) if self.names else x
        hidden = torch.stack([expert(x) for expert in self.experts], dim=1)
        return [(gate(x).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.gates]


def described(monkeypatch: pytest.MonkeyPatch, model: nn.Module, **options: Any) -> str:
    """The report's words for a model, whose class is forgotten afterwards."""
    monkeypatch.setattr(registry, "_registered", {})
    usual: dict[str, Any] = {
        "experts": lambda model: model.experts,
        "gates": lambda model: model.gates,
        "routing": lambda model: mk.Routing.mmoe(3, 2),
    }
    mk.convert.register(type(model), **{**usual, **options})
    (line,) = mk.convert(model).lines
    return line.detail


def test_an_expert_of_a_class_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers may be listed instead."""
    words = "3 experts as modules, because of OwnExpert, whose forward is not known (experts.0), "
    assert described(monkeypatch, OwnMMoE()).startswith(words)
    listed = {"experts": lambda model: [[expert.layer, "relu"] for expert in model.experts]}
    words = "3 experts of 1 layer and 2 gates in one expert_mixture"
    assert described(monkeypatch, OwnMMoE(), **listed).startswith(words)


def test_arguments_that_nobody_has_described(monkeypatch: pytest.MonkeyPatch) -> None:
    words = described(monkeypatch, OwnMMoE(names=("a", "b")))
    assert words.startswith("it fails in a trial: TypeError: ")
    assert words.endswith(
        "; it was called with one tensor [B, D]: describe another call by inputs with arguments or example"
    )


def test_a_level_that_is_given_too_few_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    routing = {
        "levels": lambda model: range(2),
        "experts": lambda model, level: model.experts,
        "gates": lambda model, level: model.gates,
        "routing": lambda model, level: mk.Routing((0, 0, level * 2), ((0, 1, 2),) * 2),
    }
    words = described(monkeypatch, OwnMMoE(), **routing)
    assert words == "it fails in a trial: ValueError: level 1 reads 3 streams, but is given 2"
