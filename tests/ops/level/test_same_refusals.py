"""What one way refuses every way refuses, in the same words, before any running statistics are brought up to date."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk

ROUTING = mk.Routing.mmoe(3, 1)
WIDTH, EXPERTS = 5, 3


def norms(*, width: int = WIDTH, count: int = EXPERTS, **changed: Any) -> list[nn.Module]:
    """Batch norms by running statistics, the last of which is changed."""
    found: list[nn.Module] = [nn.BatchNorm1d(width).eval() for _ in range(count)]
    for name, value in changed.items():
        setattr(found[-1], name, value)
    return found


def gate_norm(**changed: Any) -> list[nn.Module]:
    return norms(width=EXPERTS, count=1, **changed)


def with_eps(eps: Any) -> dict[str, Any]:
    found = norms()
    for norm in found:
        norm.eps = eps
    return {"norms": [found]}


MISTAKES: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "an eps that nobody needs": (lambda: {"dice_eps": "x"}, TypeError, "dice_eps must be a number or a sequence"),
    "a negative one": (lambda: {"dice_eps": -1.0}, ValueError, "dice_eps must be positive and finite, got -1.0"),
    "an infinite one": (lambda: {"dice_eps": [math.inf]}, ValueError, "dice_eps must be positive and finite, got inf"),
    "two of them": (lambda: {"dice_eps": [1.0, 1.0]}, ValueError, "dice_eps must be one number or one for each of 1"),
    "no norm": (
        lambda: {"norms": [[*norms(count=2), None]]},
        TypeError,
        r"norms\[0\]\[2\] must be a BatchNorm1d or a LayerNorm, got NoneType",
    ),
    "two eps": (lambda: {"norms": [norms(eps=1e-3)]}, ValueError, r"norms\[0\]\[2\] must have the eps of"),
    "another width": (
        lambda: {"norms": [norms(num_features=7)]},
        ValueError,
        r"norms\[0\]\[2\] must normalize the 5 features of its layer, got \[7\]",
    ),
    "norms in float64": (
        lambda: {"norms": [[norm.double() for norm in norms()]]},
        TypeError,
        r"norms\[0\]\[0\].weight must have the dtype of inputs, torch.float32, got torch.float64",
    ),
    "a norm thrice": (lambda: {"norms": [norms(count=1) * 3]}, ValueError, "norms must hold each BatchNorm1d once"),
    "no gate's norm": (lambda: {"gate_norms": []}, ValueError, "gate_norms must hold an entry for each of 1 gates"),
    "gates' in float64": (
        lambda: {"gate_norms": [gate_norm()[0].double()]},
        TypeError,
        r"gate_norms\[0\].weight must have the dtype of inputs",
    ),
    "a gate's of another width": (
        lambda: {"gate_norms": gate_norm(num_features=7)},
        ValueError,
        r"gate_norms\[0\] must normalize the 3 features of its layer, got \[7\]",
    ),
    "a gate's statistics": (
        lambda: {"gate_norms": gate_norm(running_var=torch.ones(1))},
        ValueError,
        r"gate_norms\[0\].running_var must have shape \[3\], got \[1\]",
    ),
    "a negative eps": (lambda: with_eps(-2), ValueError, r"norms\[0\]\[0\].eps must be at least 0, got -2"),
    "eps that is no number": (lambda: with_eps(math.nan), ValueError, r"norms\[0\]\[0\].eps must be at least 0"),
    "eps of a kind": (lambda: with_eps("1"), TypeError, r"norms\[0\]\[0\].eps must be a number, got str"),
}
# Of running statistics, in training and in evaluation.
STATISTICS: dict[str, tuple[Tensor | None, type[Exception], str]] = {
    "too few": (torch.ones(4), ValueError, r"must have shape \[5\], got \[4\]"),
    "one for all": (torch.ones(1), ValueError, r"must have shape \[5\], got \[1\]"),
    "of two dimensions": (torch.ones(5, 1), ValueError, r"must have shape \[5\], got \[5, 1\]"),
    "integers": (torch.ones(5, dtype=torch.int64), TypeError, "must be float32, .*, got torch.int64"),
    "of another dtype": (torch.ones(5).double(), TypeError, "must have the dtype of inputs, torch.float32"),
    "of another device": (torch.ones(5, device="meta"), ValueError, "must be on the device of inputs, cpu, got meta"),
    "sparse": (torch.ones(5).to_sparse(), TypeError, "must be a dense tensor, got layout torch.sparse_coo"),
    "none beside the other": (None, TypeError, r"must be a tensor \[5\], got NoneType"),
}


def call(*, linear: bool | None = None, precision: torch.dtype = torch.float32, **options: Any) -> Any:
    """With gates that are ``linear`` layers, or that come as logits: by default layers where these have norms."""
    torch.manual_seed(0)
    linear = "gate_norms" in options if linear is None else linear

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(precision)

    gates: dict[str, Any] = {"gate_weights": random(EXPERTS, 6)} if linear else {}
    logits = None if linear else random(4, EXPERTS)
    weights = [random(EXPERTS, WIDTH, 6)]
    return mk.expert_mixture(random(4, 6), weights, None, logits, ROUTING, **gates, **options)


@pytest.mark.parametrize("wanted", [True, False], ids=["recording", "serving"])
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, backend: str, wanted: bool) -> None:
    options, error, message = MISTAKES[name]
    with torch.set_grad_enabled(wanted), mk.use_backend(backend), pytest.raises(error, match=f"^{message}"):
        call(**options())


# What C++ does not look at.
LEFT: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "biases beside logits": (
        lambda: {"gate_biases": [torch.zeros(EXPERTS)]},
        ValueError,
        "gate_biases must be None without gate_weights, got biases",
    ),
    "norms beside logits": (
        lambda: {"gate_norms": gate_norm(), "linear": False},
        ValueError,
        "gate_norms must be None without gate_weights, got norms",
    ),
    "norms in float32 beside float64": (
        lambda: {"norms": [norms()], "precision": torch.float64},
        TypeError,
        r"norms\[0\]\[0\].weight must have the dtype of inputs, torch.float64, got torch.float32",
    ),
    "a negative eps": (lambda: with_eps(-1.0), ValueError, r"norms\[0\]\[0\].eps must be at least 0, got -1.0"),
    "an eps of truth": (lambda: with_eps(True), TypeError, r"norms\[0\]\[0\].eps must be a number, got bool"),
}


@pytest.mark.parametrize("wanted", [True, False], ids=["recording", "serving"])
@pytest.mark.parametrize("name", LEFT)
def test_what_the_direct_way_leaves_to_the_checks(name: str, wanted: bool) -> None:
    options, error, message = LEFT[name]
    with torch.set_grad_enabled(wanted), pytest.raises(error, match=f"^{message}"):
        call(**options())


@pytest.mark.parametrize("way", ["training", "evaluation", "serving"])
@pytest.mark.parametrize("part", ["running_mean", "running_var"])
@pytest.mark.parametrize("name", STATISTICS)
def test_running_statistics(name: str, part: str, way: str) -> None:
    value, error, message = STATISTICS[name]
    found = norms(**{part: value})
    for norm in found:
        norm.train(way == "training")
    before = [copy.deepcopy(norm.state_dict()) for norm in found[:2]]
    expected = rf"^norms\[0\]\[2\].{part} {message}"
    with torch.set_grad_enabled(way != "serving"), pytest.raises(error, match=expected):
        call(norms=[found])
    for norm, old in zip(found, before, strict=False):
        assert all(torch.equal(now, old[key]) for key, now in norm.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_no_running_statistics(training: bool) -> None:
    """Norms that never had any take the batch's, and so do those that do not look at what they have, in training."""
    without: list[nn.Module] = [nn.BatchNorm1d(WIDTH, track_running_stats=False).train(training) for _ in range(3)]
    expected = call(norms=[without])
    kept = norms(running_mean=torch.ones(4), track_running_stats=False)
    if training:
        for norm in kept:
            norm.train()
        torch.testing.assert_close(call(norms=[kept]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("wanted", [True, False], ids=["recording", "serving"])
def test_module_lists_of_gate_norms(backend: str, wanted: bool) -> None:
    found = gate_norm()
    with torch.set_grad_enabled(wanted), mk.use_backend(backend):
        torch.testing.assert_close(call(gate_norms=nn.ModuleList(found)), call(gate_norms=found), rtol=0, atol=0)


@pytest.mark.parametrize("joined", [False, True])
def test_linear_gates_of_another_kind_beside_stored_layers(joined: bool) -> None:
    """They are refused in the terms of the caller, and not in those of a product."""
    norms, x = [[nn.BatchNorm1d(4) for _ in range(2)]], torch.randn(9, 5)
    for odd in (torch.randn(2, 5, dtype=torch.float64), torch.empty(2, 5, device="meta")):
        own: Any = {"gate_weights": odd if joined else [odd]}
        with pytest.raises((TypeError, ValueError), match="gate_weights"):
            mk.expert_mixture(x, [torch.randn(2, 4, 5)], None, None, mk.Routing.mmoe(2, 1), norms=norms, **own)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)])
def test_joined_gates_of_inputs_that_are_no_matrix(shape: tuple[int, ...]) -> None:
    own: Any = {"gate_weights": torch.randn(2, 5), "norms": [[nn.BatchNorm1d(4) for _ in range(2)]]}
    with pytest.raises(ValueError, match="inputs must have shape"):
        mk.expert_mixture(torch.randn(shape), [torch.randn(2, 4, 5)], None, None, mk.Routing.mmoe(2, 1), **own)


@pytest.mark.parametrize("name", ["gate_weights", "gate_biases"])
def test_more_linear_gates_than_gates_beside_stored_layers(name: str) -> None:
    own: Any = {"gate_weights": [torch.randn(2, 5)], "gate_biases": [torch.randn(2)]}
    own[name] *= 2
    norms, x = [[nn.BatchNorm1d(4) for _ in range(2)]], torch.randn(9, 5)
    with pytest.raises(ValueError, match=name):
        mk.expert_mixture(x, [torch.randn(2, 4, 5)], None, None, mk.Routing.mmoe(2, 1), norms=norms, **own)
