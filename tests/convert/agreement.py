"""Three steps of Adam and serving, of a model and of its conversion, held against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import mtlkernels as mk
from tests.seeding import seed
from tests.summary import note_second_trial

# Results that differ by less than so many roundings are the same. Those of float64 are held against float64, so that
# the library's own error is not seen.
ROUNDINGS = {torch.float64: 1024}
USUAL_ROUNDINGS = 8
# What a PLE of two levels has in its last shared gate.
UNREAD = "shared_gate_dnn.1.bn."
STEPS = 3
# Copies of a library's model that are a rounding away from it.
NUDGED = 3

# From rows, a seed and a dtype, the arguments of the model.
Inputs = Callable[[int, int, torch.dtype], tuple[Any, ...]]


def tensors(result: Any) -> list[Tensor]:
    """The tensors in whatever a model returns."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if leaf is not None]


def flat(result: Any) -> Tensor:
    """All of them in one."""
    return torch.cat([y.detach().flatten() for y in tensors(result)])


def train_and_serve(model: Any, inputs: Inputs, rows: int, serve: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """What a model computes and becomes: outputs, first gradients (None where there are none), states, answers."""
    dtype = next(model.parameters()).dtype
    # Weight decay, since biases in front of batch norm have gradients of nothing but rounding, which Adam magnifies.
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-3, weight_decay=1.0)
    found: dict[str, dict[str, Any]] = {"outputs": {}, "gradients": {}, "optimizer": {}, "serving": {}}
    for step in range(STEPS):
        seed(step)
        results = model(*inputs(rows, step, dtype))
        found["outputs"][f"step {step}"] = flat(results)
        loss = sum((y - 0.3).square().sum() for y in tensors(results))
        if hasattr(model, "get_regularization_loss"):
            loss = loss + model.get_regularization_loss().to(dtype).squeeze()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            found["gradients"] = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
    found["state"] = {name: value.clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found["optimizer"][f"{key} of {name}"] = value
    with torch.no_grad():
        model.eval()
        for count in serve:
            found["serving"][f"{count} rows"] = flat(model(*inputs(count, 9, dtype)))
    return found


@torch.no_grad()
def nudge(model: Any, seed: int) -> Any:
    """The model, each of its parameters off by at most half a rounding."""
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        off = torch.rand(parameter.shape, generator=random, dtype=torch.float64) - 0.5
        parameter.copy_(parameter * (1 + torch.finfo(parameter.dtype).eps * off))
    return model


def assert_agrees(found: Any, originals: Iterator[Any], exact: Any, unread: str = UNREAD) -> None:
    """The errors are within those of some of the library's own results.

    Where batch norm magnifies a rounding, two runs of the library differ from float64 by more than three times one
    another, so that one of them is no measure. Hence the next result is only asked for where those before it are not
    enough.
    """
    seen: list[Any] = []
    for original in originals:
        seen.append(original)
        try:
            assert_within(found, seen, exact, unread)
        except AssertionError as error:
            failure = error
            continue
        if len(seen) > 1:
            note_second_trial("within the error of one of several runs of the library")
        return
    raise failure


def assert_within(found: Any, originals: Sequence[Any], exact: Any, unread: str = UNREAD) -> None:
    """Errors are at most three times the largest of the library's own, and roundings.

    What begins with ``unread`` is left out: statistics of deepctr-torch's last shared gate, which is not evaluated.
    """
    for part, expected in exact.items():
        assert found[part].keys() == expected.keys(), f"{part}: {found[part].keys() ^ expected.keys()}"
        assert all(original[part].keys() == expected.keys() for original in originals), part
        sizes = [value.double().norm().item() for value in expected.values() if value is not None]
        for key, value in expected.items():
            ours, theirs = found[part][key], [original[part][key] for original in originals]
            if key.startswith(unread):
                continue
            if ours is None or value is None or theirs[0] is None:
                assert ours is value is theirs[0], f"{part}: {key} is None for one of {ours}, {theirs[0]} and {value}"
                continue
            assert ours.shape == theirs[0].shape, f"{part}: {key} has shape {ours.shape}, expected {theirs[0].shape}"
            assert ours.dtype == theirs[0].dtype, f"{part}: {key} has dtype {ours.dtype}, expected {theirs[0].dtype}"
            floor = (
                ROUNDINGS.get(ours.dtype, USUAL_ROUNDINGS) * torch.finfo(ours.dtype).eps
                if ours.is_floating_point()
                else 0.0
            )
            # A gradient that is a sum of nearly nothing is as wrong as the others are, not as it is small.
            slack = floor * max(sizes) if part in ("gradients", "optimizer") else 0.0
            off, allowed = (max((x.double() - value).norm().item() for x in xs) for xs in ([ours], theirs))
            budget = 3 * allowed + floor * value.double().norm().item() + slack
            assert off <= budget, f"{part}: {key} is off by {off:.3g}, allowed {budget:.3g}"


def assert_converts(
    model: Any, inputs: Inputs, rows: int = 300, serve: tuple[int, ...] = (1, 2, 33, 300)
) -> mk._convert.ConversionReport:
    """A converted copy keeps keys and parameters, trains and serves as the model; what its conversion reported."""
    exact, converted = copy.deepcopy(model).double(), copy.deepcopy(model)
    keys, parameters = list(converted.state_dict()), list(map(id, converted.parameters()))
    report = mk.convert(converted)
    assert report.replaced or report.mixing_fused, report
    assert list(converted.state_dict()) == keys
    assert list(map(id, converted.parameters())) == parameters
    # The library's own, as it is and with parameters that are a rounding away; made before it is trained.
    originals = [copy.deepcopy(model), *(nudge(copy.deepcopy(model), seed) for seed in range(NUDGED))]
    expected, ours = (train_and_serve(m, inputs, rows, serve) for m in (exact, converted))
    assert_agrees(ours, (train_and_serve(m, inputs, rows, serve) for m in originals), expected)
    return report
