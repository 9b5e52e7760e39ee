"""Every mistake in norms, dropout and slopes gets an error that names the argument; nothing is counted before it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import mtlkernels as mk

ROUTING = mk.Routing.mmoe(2, 1)


def batch(width: int, **options: Any) -> list[nn.Module]:
    return [nn.BatchNorm1d(width, **options) for _ in range(2)]


def layer(width: int, **options: Any) -> list[nn.Module]:
    return [nn.LayerNorm(width, **options) for _ in range(2)]


def evaluated(module: nn.Module) -> nn.Module:
    return module.eval()


DICE = {"activation": "dice", "slopes": [torch.ones(2, 1)] * 2}
SHARED = nn.BatchNorm1d(3)

MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "norms of a kind": ({"norms": 3}, TypeError, r"norms must be None or a sequence .*, got int"),
    "a module": ({"norms": nn.BatchNorm1d(4)}, TypeError, r"norms must be None or a sequence .*, got BatchNorm1d"),
    "too few layers": ({"norms": [batch(4)]}, ValueError, r"norms .* each of 2 layers, got 1"),
    "layer of a kind": ({"norms": [nn.BatchNorm1d(4), None]}, TypeError, r"norms\[0\] must be None or a sequence of 2"),
    "too few experts": ({"norms": [batch(4)[:1], None]}, ValueError, r"norms\[0\] .* each of 2 experts, got 1"),
    "a name": ({"norms": [["batch", "batch"], None]}, TypeError, r"norms\[0\]\[0\] must be a BatchNorm1d .*, got str"),
    "another norm": (
        {"norms": [None, [nn.GroupNorm(1, 3)] * 2]},
        TypeError,
        r"norms\[1\]\[0\] must be a BatchNorm1d or a LayerNorm, got GroupNorm",
    ),
    "two kinds": (
        {"norms": [[nn.BatchNorm1d(4), nn.LayerNorm(4)], None]},
        TypeError,
        r"norms\[0\]\[1\] must be of the kind of norms\[0\]\[0\], BatchNorm1d, got LayerNorm",
    ),
    "width": ({"norms": [None, batch(4)]}, ValueError, r"norms\[1\]\[0\] .* 3 features .*, got \[4\]"),
    "layer norm of two dimensions": ({"norms": [layer(4), [nn.LayerNorm((1, 3))] * 2]}, ValueError, r"got \[1, 3\]"),
    "two eps": (
        {"norms": [[nn.BatchNorm1d(4), nn.BatchNorm1d(4, eps=1e-3)], None]},
        ValueError,
        r"norms\[0\]\[1\] must have the eps of norms\[0\]\[0\], 1e-05, got 0.001",
    ),
    "both statistics": (
        {"norms": [[nn.BatchNorm1d(4), evaluated(nn.BatchNorm1d(4))], None]},
        ValueError,
        r"norms\[0\] must all use the batch's statistics or all running ones",
    ),
    "one module twice": ({"norms": [None, [SHARED, SHARED]]}, ValueError, r"norms must hold each BatchNorm1d once"),
    "dtype": ({"norms": [batch(4), batch(3, dtype=torch.float64)]}, TypeError, r"norms\[1\]\[0\].weight must have .*"),
    "low precision": (
        {"norms": [layer(4, dtype=torch.bfloat16), None]},
        TypeError,
        r"norms\[0\]\[0\].weight must have the dtype of inputs, torch.float32, got torch.bfloat16",
    ),
    "device": (
        {"norms": [None, layer(3, device="meta")]},
        ValueError,
        r"norms\[1\]\[0\].weight must be on the device of inputs, cpu, got meta",
    ),
    "dropout of a kind": ({"dropout": "0.5"}, TypeError, r"dropout must be a rate or a sequence of rates, got str"),
    "a bool": ({"dropout": True}, TypeError, r"dropout must hold numbers, got bool"),
    "a tensor": ({"dropout": torch.zeros(2)}, TypeError, r"dropout must be a rate or a sequence of rates, got Tensor"),
    "too few rates": ({"dropout": [0.5]}, ValueError, r"dropout must be one rate or one for each of 2 layers, got 1"),
    "rate of a kind": ({"dropout": [0.5, None]}, TypeError, r"dropout must hold numbers, got NoneType"),
    "too large a rate": ({"dropout": 1.5}, ValueError, r"dropout must be in \[0, 1\], got 1.5"),
    "a negative rate": ({"dropout": [0.0, -0.1]}, ValueError, r"dropout must be in \[0, 1\], got -0.1"),
    "slopes of a kind": (
        {"activation": "prelu", "slopes": 0.25},
        TypeError,
        r"slopes must be None or a sequence .*, got float",
    ),
    "no slopes": ({"activation": "prelu"}, ValueError, r"slopes\[0\] must hold the slopes of 'prelu', got NoneType"),
    "slopes for one layer": (
        {"activation": ["relu", "dice"], "slopes": [torch.ones(2, 1)]},
        ValueError,
        r"slopes must hold an entry for each of 2 layers, got 1",
    ),
    "slopes of none": (
        {"slopes": [None, torch.ones(2, 1)]},
        ValueError,
        r"slopes\[1\] must be None beside 'relu', got Tensor",
    ),
    "slopes for some experts": (
        {"activation": ["prelu", "relu"], "slopes": [[torch.ones(1)], None]},
        ValueError,
        r"slopes\[0\] must hold a tensor for each of 2 experts, got 1",
    ),
    "slopes of another width": (
        {"activation": ["prelu", "relu"], "slopes": [[torch.ones(4), torch.ones(3)], None]},
        ValueError,
        r"slopes\[0\]\[1\] must have shape \[4\] or \[1\], got \[3\]",
    ),
    "slopes without dimensions": (
        {"activation": ["prelu", "relu"], "slopes": [[torch.ones(()), torch.ones(())], None]},
        ValueError,
        r"slopes\[0\]\[0\] must have shape \[4 or 1\], got \[\]",
    ),
    "a number as slope": (
        {"activation": ["prelu", "relu"], "slopes": [[0.1, 0.2], None]},
        TypeError,
        r"slopes\[0\]\[0\] must be a tensor \[4 or 1\], got float",
    ),
    "dtype of slopes": (
        {"activation": ["dice", "relu"], "slopes": [torch.ones(2, 1, dtype=torch.float64), None]},
        TypeError,
        r"slopes\[0\] must have the dtype of inputs, torch.float32, got torch.float64",
    ),
    "device of slopes": (
        {"activation": ["dice", "relu"], "slopes": [torch.ones(2, 1, device="meta"), None]},
        ValueError,
        r"slopes\[0\] must be on the device of inputs, cpu, got meta",
    ),
    "eps of a kind": ({**DICE, "dice_eps": "1"}, TypeError, r"dice_eps must be a number or a sequence .*, got str"),
    "eps that is none": ({**DICE, "dice_eps": [None, 1.0]}, TypeError, r"dice_eps must hold numbers, got NoneType"),
    "too few eps": (
        {**DICE, "dice_eps": [1.0]},
        ValueError,
        r"dice_eps must be one number or one for each of 2 layers",
    ),
    "no eps": ({**DICE, "dice_eps": 0.0}, ValueError, r"dice_eps must be positive and finite, got 0.0"),
    "an infinite eps": ({**DICE, "dice_eps": float("inf")}, ValueError, r"dice_eps must be positive .*, got inf"),
    "an unknown activation": (
        {"activation": "swish"},
        ValueError,
        r"activation must be one of none, .*, prelu, dice, got 'swish'",
    ),
    "no number": ({"dropout": float("nan")}, ValueError, r"dropout must be in \[0, 1\], got nan"),
}


def call(**options: Any) -> Any:
    weights = [torch.randn(2, 4, 5), torch.randn(2, 3, 4)]
    return mk.expert_mixture(torch.randn(6, 5), weights, None, torch.randn(6, 2), ROUTING, **options)


@pytest.mark.parametrize(("options", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**options)
    for entry in options["norms"] if isinstance(options.get("norms"), list) else ():
        for module in entry if isinstance(entry, list) else ():
            assert int(getattr(module, "num_batches_tracked", 0)) == 0


def test_mistakes_elsewhere_leave_running_statistics_alone() -> None:
    experts = batch(4)
    before = [copy.deepcopy(norm.state_dict()) for norm in experts]
    with pytest.raises(ValueError, match="gate_logits"):
        mk.expert_mixture(
            torch.randn(6, 5),
            [torch.randn(2, 4, 5), torch.randn(2, 3, 4)],
            None,
            torch.randn(6, 3),
            ROUTING,
            norms=[experts, None],
        )
    for norm, old in zip(experts, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in norm.state_dict().items())


def test_statistics_that_cannot_be_written_to() -> None:
    experts: list[Any] = batch(4)
    with torch.inference_mode():
        experts[1].running_mean = torch.zeros(4)
    with pytest.raises(ValueError, match=r"norms\[0\]\[1\].running_mean must be .* that training can write to"):
        call(norms=[experts, None])
    assert [int(norm.num_batches_tracked) for norm in experts] == [0, 0]
    with torch.inference_mode():
        call(norms=[experts, None])
    assert [int(norm.num_batches_tracked) for norm in experts] == [1, 1]


def test_module_lists_are_sequences() -> None:
    norms = nn.ModuleList([nn.ModuleList(batch(4)), nn.ModuleList(layer(3))])
    assert [tuple(y.shape) for y in call(norms=norms, dropout=[0, 0.5])] == [(6, 3)]


@pytest.mark.parametrize("which", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("shape", [(5,), (4, 1)])
def test_norms_by_running_statistics(which: str, shape: tuple[int, ...]) -> None:
    """Which the direct way folds: it hands on what it cannot read."""
    norms = [batch(4), None]
    first: Any = norms[0][0].eval()  # type: ignore[index]
    norms[0][1].eval()  # type: ignore[index]
    setattr(first, which, nn.Parameter(torch.ones(shape)) if which in ("weight", "bias") else torch.ones(shape))
    with torch.no_grad(), pytest.raises(ValueError, match=rf"norms\[0\]\[0\].{which} must"):
        call(norms=norms)
