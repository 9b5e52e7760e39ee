"""Under autocast to bfloat16 levels go past the checks in Python, and give the bits that these would give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels.ops import level as level_op
from tests import requires
from tests.ops.level.test_stored_layers import NORMS, OPTIONS, Level, everything, goes_past_checks

pytestmark = requires.cpp_kernels
ROUTING = mk.Routing.cgc(2, 1, 1)  # three streams
Arguments = dict[str, Any]


def by_checks(what: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(level_op, "direct", lambda *_: "a test wants the checks")
        return what()


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("linear", [True, False], ids=["linear gates", "logits"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_layers_that_are_stored(norm: str, options: str, linear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return everything(Level(norm, options), linear)

    found = goes_past_checks(run, monkeypatch)
    expected = by_checks(run, monkeypatch)
    assert found[0][0].dtype is torch.bfloat16
    assert [grad.dtype for grad in found[1] if grad is not None] == [
        grad.dtype for grad in expected[1] if grad is not None
    ]
    for own, theirs in zip(found, expected, strict=True):
        assert_same(own, theirs) if own is not found[2] else torch.testing.assert_close(own, theirs)


def leaves(value: Any) -> list[Tensor]:
    found = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.requires_grad]


def plain(dtype: torch.dtype = torch.float32, narrow: torch.dtype = torch.float32) -> Arguments:
    """Experts of two layers with linear gates; streams may be narrower, as those of a level below are."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    return {
        "inputs": [draw(9, 6, dtype=narrow) for _ in range(3)],
        "weights": [[draw(5, 6) for _ in range(3)], [draw(4, 5) for _ in range(3)]],
        "biases": [[draw(5) for _ in range(3)], None],
        "gate_logits": None,
        "routing": ROUTING,
        "gate_weights": [draw(len(gate), 6) for gate in ROUTING.gate_experts],
        "gate_biases": [None if k else draw(len(gate)) for k, gate in enumerate(ROUTING.gate_experts)],
    }


def stacked() -> Arguments:
    given = plain()
    stack = lambda tensors: torch.stack(list(tensors)).detach().requires_grad_()  # noqa: E731
    sizes = sum(map(len, ROUTING.gate_experts))
    return given | {
        "weights": list(map(stack, given["weights"])),
        "biases": [stack(given["biases"][0]), None],
        "gate_weights": torch.randn(sizes, 6, generator=torch.Generator().manual_seed(1)).requires_grad_(),
        "gate_biases": None,
    }


def with_logits() -> Arguments:
    logits = [torch.linspace(-2, 2, 9 * len(gate)).view(9, -1).requires_grad_() for gate in ROUTING.gate_experts]
    return plain() | {"gate_logits": logits, "gate_weights": None, "gate_biases": None}


def with_slopes() -> Arguments:
    slopes = [[torch.full((width,), 0.3).requires_grad_() for _ in range(3)] for width in (5, 4)]
    return plain() | {"slopes": slopes, "activation": "prelu"}


def frozen() -> Arguments:
    given = plain()
    for tensor in (*leaves(given["weights"]), *leaves(given["inputs"])):
        tensor.requires_grad_(False)
    return given


CALLS: dict[str, Callable[[], Arguments]] = {
    "plain": plain,
    "streams of a level below": lambda: plain(narrow=torch.bfloat16),
    "all in bfloat16": lambda: plain(torch.bfloat16, torch.bfloat16),
    "float64": lambda: plain(torch.float64, torch.float64),
    "float16": lambda: plain(torch.float16, torch.float16),
    "stacked": stacked,
    "logits": with_logits,
    "slopes": with_slopes,
    "frozen": frozen,
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_a_level(name: str, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = CALLS[name]()

    def run() -> Any:
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            ys = mk.expert_mixture(**given)
        if not grad:
            return ys, []
        return ys, torch.autograd.grad([y.float().square().sum() for y in ys], leaves(given), allow_unused=True)

    found, expected = goes_past_checks(run, monkeypatch), by_checks(run, monkeypatch)
    assert found[0][0].dtype is (torch.float64 if name == "float64" else torch.bfloat16)
    assert_same(found, expected)


def test_norms_by_running_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the checks fold into weights that are then rounded stays outside of these."""
    norms = nn.ModuleList(nn.ModuleList(nn.BatchNorm1d(width) for _ in range(3)) for width in (5, 4)).eval()
    for norm in norms.modules():
        if isinstance(norm, nn.BatchNorm1d):
            nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)  # type: ignore[arg-type]

    def run() -> Any:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return mk.expert_mixture(**plain(), norms=norms)

    found, expected = goes_past_checks(run, monkeypatch), by_checks(run, monkeypatch)
    with torch.no_grad():
        exact = mk.expert_mixture(**plain(), norms=norms)
    for y, rounded, true in zip(found, expected, exact, strict=True):
        assert (y - true).abs().mean() <= 1.5 * (rounded - true).abs().mean()


def test_what_is_not_cast_is_refused_as_by_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    given = plain() | {"inputs": plain(torch.float64, torch.float64)["inputs"]}
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="float64"):
        mk.expert_mixture(**given)


@pytest.mark.parametrize("aliased", [True, False])
@pytest.mark.parametrize("several", [True, False])
def test_a_gate_that_no_loss_reads_gets_no_gradient(
    several: bool, aliased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one tensor is all of the streams, beside layers that are stored."""
    given = plain() | {"norms": [[nn.LayerNorm(width) for _ in range(3)] for width in (5, 4)]}
    x = given["inputs"][0]
    given["inputs"] = ([x] * 3 if aliased else given["inputs"]) if several else x
    gates = given["gate_weights"]

    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            ys = mk.expert_mixture(**given)
        return torch.autograd.grad(ys[0].float().sum(), gates, allow_unused=True)

    found, expected = goes_past_checks(run, monkeypatch), by_checks(run, monkeypatch)
    assert [grad is None for grad in found] == [grad is None for grad in expected] == [False, True]
    assert_same(found[0], expected[0])


def test_half_gates_beside_layers_that_are_stored() -> None:
    given = plain() | {"norms": [[nn.LayerNorm(width) for _ in range(3)] for width in (5, 4)]}
    for inputs in (given["inputs"], given["inputs"][:1] * 3, given["inputs"][0]):
        gates = [gate.detach().half() for gate in given["gate_weights"]]
        with torch.autocast("cpu", torch.bfloat16):
            ys = mk.expert_mixture(**given | {"inputs": inputs, "gate_weights": gates, "gate_biases": None})
        assert ys[0].dtype is torch.bfloat16 and ys[0].isfinite().all()


def test_what_only_the_checks_differentiate_is_not_cast_twice() -> None:
    norms = nn.ModuleList(nn.ModuleList(nn.BatchNorm1d(width) for _ in range(3)) for width in (5, 4)).eval()
    given = plain()
    with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile(acc_events=True) as found:
        mk.expert_mixture(**given, norms=norms)
    casts = sum(event.count for event in found.key_averages() if event.key == "aten::_to_copy")
    assert casts <= len(leaves(given)) + 2 * 3 + 3  # and the biases that norms give layers without one


@pytest.mark.parametrize("name", ["weights", "inputs"])
def test_dtypes_of_other_kinds_are_refused_as_by_the_checks(name: str) -> None:
    narrow = [tensor.detach().to(torch.float8_e4m3fn) for tensor in leaves(plain()[name])]
    given = plain() | {name: narrow if name == "inputs" else [narrow[:3], narrow[3:]]}
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="float8"):
        mk.expert_mixture(**given)


def test_hooks_on_what_is_saved_see_autocast() -> None:
    seen: set[bool] = set()

    def pack(tensor: Tensor) -> Tensor:
        seen.add(torch.is_autocast_enabled("cpu"))
        return tensor

    norms = [[nn.LayerNorm(width) for _ in range(3)] for width in (5, 4)]
    for given in (plain(), with_logits() | {"norms": norms}):
        seen.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            mk.expert_mixture(**given)
        assert seen == {True}


def test_float16_is_left_to_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which fold no norms there."""
    with torch.autocast("cpu", torch.float16), pytest.raises(AssertionError, match="checks in Python were asked"):
        goes_past_checks(lambda: mk.expert_mixture(**plain()), monkeypatch)


def test_a_call_that_serves_is_kept_for_none_without_autocast() -> None:
    """The same lists serve both; each is what it is alone."""
    given = plain()
    with torch.no_grad():
        alone = mk.expert_mixture(**given)
        for _ in range(6):
            with torch.autocast("cpu", torch.bfloat16):
                assert mk.expert_mixture(**given)[0].dtype is torch.bfloat16
            assert_same(mk.expert_mixture(**given), alone)
