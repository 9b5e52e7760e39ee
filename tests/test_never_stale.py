"""What a call gives comes from the values that are in memory then, whoever wrote them and however."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels import _extension
from tests import requires
from tests.turns import in_turns
from tests.writers import CHANGES, WRITERS


class Plain(nn.Module):
    """A level as many write it, for convert.register."""

    def __init__(self, act: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(40, 48), nn.BatchNorm1d(48), act(), nn.Linear(48, 32), nn.BatchNorm1d(32), act())
            for _ in range(3)
        )
        self.gates = nn.ModuleList(nn.Sequential(nn.Linear(40, 3), nn.BatchNorm1d(3)) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.stack([expert(x) for expert in self.experts], dim=1)
        return [(gate(x).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.gates]


class OwnLists(nn.Module):
    """A level that hands its parameters to the op."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(*n) for _ in range(3)) for n in ((40, 48), (48, 32)))
        self.gates = nn.ModuleList(nn.Linear(40, 3) for _ in range(2))
        self.routing = mk.Routing.mmoe(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        weights, biases = ([[getattr(e, part) for e in layer] for layer in self.layers] for part in ("weight", "bias"))  # type: ignore[union-attr]
        gate_weights, gate_biases = ([getattr(gate, part) for gate in self.gates] for part in ("weight", "bias"))
        gates = {"gate_weights": gate_weights, "gate_biases": gate_biases}
        return mk.expert_mixture(x, weights, biases, None, self.routing, **gates)


@functools.cache
def converted(act: Callable[[], nn.Module]) -> nn.Module:
    """To be copied, as the trial of a conversion takes longer than most tests here."""
    model = nn.Sequential(Plain(act))
    report = mk.convert(model)
    assert report.replaced and not report.left_alone, str(report)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mmoe": lambda: mk.nn.MMoE(40, 2, (48, 32), num_experts=3),
    "mmoe, batch norm": lambda: mk.nn.MMoE(40, 2, (48, 32), num_experts=3, batch_norm=True),
    "ple, PReLU and batch norm": lambda: mk.nn.PLE(
        40, 2, (48, 40), num_specific=1, num_shared=1, num_levels=2, activation="prelu", batch_norm=True
    ),
    "own lists": OwnLists,
    "snr": lambda: mk.nn.SNR(40, 2, (48, 32), num_subnets=(3, 3), mode="trans"),
    "converted, batch norm": lambda: copy.deepcopy(converted(nn.ReLU)),
    "converted, PReLU and batch norm": lambda: copy.deepcopy(converted(nn.PReLU)),
}
# Few rows and many, on either side of where kernels take over from each other.
ROWS = (1, 16, 80, 200)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    mk.convert.register(
        Plain,
        experts=lambda level: level.experts,
        gates=lambda level: level.gates,
        routing=lambda level: mk.Routing.mmoe(3, 2),
    )
    yield


def make(name: str, dtype: torch.dtype) -> nn.Module:
    model = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model.to(dtype).eval()


def serve(model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [y for x in inputs for y in model(x)]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def check(model: nn.Module, dtype: torch.dtype, write: Callable[[], None]) -> None:
    """Serves until whatever may be kept is kept, writes, and serves what a copy that nobody has seen serves."""
    inputs = [torch.randn(rows, 40).to(dtype) for rows in ROWS]
    before = [serve(model, inputs) for _ in range(3)][-1]
    write()
    found = serve(model, inputs)
    assert not equal(found, before), "the write changed nothing, so that this test cannot fail"
    fresh = copy.deepcopy(model)
    assert equal(found, serve(fresh, inputs))
    with mk.use_backend("reference"):
        exact = serve(copy.deepcopy(model).double(), [x.double() for x in inputs])
    tolerance = {torch.bfloat16: 0.1, torch.float16: 0.01}.get(dtype, 1e-4)
    for y, true in zip(found, exact, strict=True):
        assert (y.double() - true).norm() <= tolerance * true.norm()


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def norms(model: nn.Module) -> list[nn.BatchNorm1d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]


KINDS = (torch.float32, torch.bfloat16)
WITH_NORMS = [name for name in MODELS if "batch norm" in name]


@pytest.mark.parametrize("writer, name, kind", in_turns(KINDS, WRITERS, MODELS), ids=str)
def test_writes_to_a_weight(writer: str, name: str, kind: torch.dtype) -> None:
    model = make(name, kind)
    check(model, kind, lambda: WRITERS[writer](linears(model)[1].weight))


PARTS = ("running_mean", "running_var", "weight", "bias")


@pytest.mark.parametrize("writer, name, part, at", in_turns((0, -1), WRITERS, WITH_NORMS, PARTS))
def test_writes_to_a_norm(writer: str, name: str, part: str, at: int) -> None:
    """The first norm or the last, which in a converted level is a gate's."""
    model = make(name, torch.float32)
    check(model, torch.float32, lambda: WRITERS[writer](getattr(norms(model)[at], part)))


@pytest.mark.parametrize("how, name, kind", in_turns(KINDS, CHANGES, MODELS), ids=str)
def test_changes_to_a_linear_layer(how: str, name: str, kind: torch.dtype) -> None:
    if how == "SGD_fused":
        kind = torch.float32  # PyTorch's own changes nothing in the other
    model = make(name, kind)
    check(model, kind, lambda: CHANGES[how](linears(model)[1]))


@pytest.mark.parametrize("name", WITH_NORMS)
@pytest.mark.parametrize("how", [how for how in CHANGES if "pruning" not in how])
def test_changes_to_a_norm(how: str, name: str) -> None:
    model = make(name, torch.float32)
    check(model, torch.float32, lambda: CHANGES[how](norms(model)[0]))


@pytest.mark.parametrize("fused", (True, False))
def test_serving_between_steps_in_bfloat16(fused: bool) -> None:
    """Small steps of every parameter, frozen batch norm, and a loss on one output: each serving is of that step."""
    model = make("mmoe, batch norm", torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    x = torch.randn(64, 40).bfloat16()
    for _ in range(10):
        optimizer.zero_grad()
        model(x)[0][:, 3].float().square().mean().backward()
        optimizer.step()
        assert equal(serve(model, [x]), serve(copy.deepcopy(model), [x]))


def test_memory_mapped_from_a_file(tmp_path: Any) -> None:
    """Written to through another mapping of the same file, as another process would."""
    model = make("mmoe", torch.float32)
    weight = linears(model)[1].weight
    file = str(tmp_path / "weight")
    mapped, other = (torch.from_file(file, shared=True, size=weight.numel()) for _ in range(2))
    mapped.copy_(weight.detach().flatten())
    weight.data = mapped.view(weight.shape)
    check(model, torch.float32, lambda: other.mul_(1.5))


def test_weights_that_change_while_others_serve() -> None:
    """After the last write is done, every thread's next call is of what was written."""
    model = make("mmoe, batch norm", torch.bfloat16)
    x = torch.randn(80, 40).bfloat16()
    stop = threading.Event()

    def serving() -> None:
        while not stop.is_set():
            serve(model, [x])

    threads = [threading.Thread(target=serving) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            for module in (*linears(model), *norms(model)):
                module.weight.data.mul_(1.01)
            assert equal(serve(model, [x]), serve(copy.deepcopy(model), [x]))
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_memory_that_is_used_again() -> None:
    """Another model at the addresses of one that is gone."""
    for seed in range(6):
        torch.manual_seed(seed)
        model = make("mmoe", torch.bfloat16)
        x = torch.randn(80, 40).bfloat16()
        assert all(equal(serve(model, [x]), serve(copy.deepcopy(model), [x])) for _ in range(3))
        del model


@requires.cpp_kernels
@pytest.mark.parametrize("name", MODELS)
def test_every_instruction_set(name: str) -> None:
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        model = make(name, kind)
        for isa in _extension.instruction_sets():
            with _extension.instruction_set(isa):
                check(model, kind, lambda m=model: linears(m)[1].weight.data.mul_(-1.1))
