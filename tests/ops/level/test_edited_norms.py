"""Norm modules of which a part has been exchanged since they were made: as the modules compute, or refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from tests.ops.level.test_norm_modules import ROUTING, Experts, assert_close, step

Edit = Callable[[Any], object]


class Own(dict[str, Any]):
    """A dictionary that may look anything up in its own way."""


def attribute(name: str, value: Any) -> Edit:
    return lambda norm: setattr(norm, name, value)


def exchanged(name: str, change: Callable[[Tensor], Any]) -> Edit:
    return lambda norm: norm._buffers.__setitem__(name, change(norm._buffers[name]))


def gone(entries: str, name: str) -> Edit:
    return lambda norm: norm.__dict__[entries].pop(name)


def without(name: str) -> Edit:
    return lambda norm: norm.__dict__.pop(name)


def own(entries: str) -> Edit:
    return lambda norm: norm.__dict__.__setitem__(entries, Own(norm.__dict__[entries]))


def made_in_inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def strided(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2)[::2]


SAME: dict[str, Edit] = {
    "num_features a float": attribute("num_features", 6.0),
    "parameters in a dictionary of its own": own("_parameters"),
    "buffers in a dictionary of its own": own("_buffers"),
    "training an int": attribute("training", 1),
    "track_running_stats an int": attribute("track_running_stats", 1),
    "no count": attribute("num_batches_tracked", None),
    "a count in int32": exchanged("num_batches_tracked", Tensor.int),
    "a count in a vector": exchanged("num_batches_tracked", lambda count: count[None]),
    "momentum NaN": attribute("momentum", math.nan),
    "momentum an int": attribute("momentum", 1),
    "momentum a bool": attribute("momentum", True),
    "every other number a mean": exchanged("running_mean", strided),
    "every other number a variance": exchanged("running_var", strided),
}
REFUSED: dict[str, tuple[Edit, type[Exception], str]] = {
    "eps an int": (
        attribute("eps", 1),
        ValueError,
        r"norms\[0\]\[1\] must have the eps of norms\[0\]\[0\], 1e-05, got 1",
    ),
    "eps a bool": (attribute("eps", True), TypeError, r"norms\[0\]\[1\].eps must be a number, got bool"),
    "eps beyond floats": (attribute("eps", 10**400), ValueError, r"norms\[0\]\[1\] must have the eps of norms"),
    "eps negative": (attribute("eps", -1e-9), ValueError, r"norms\[0\]\[1\].eps must be at least 0, got -1e-09"),
    "no eps": (without("eps"), AttributeError, "eps"),
    "no num_features": (without("num_features"), AttributeError, "num_features"),
    "num_features beyond int64": (attribute("num_features", 2**70), ValueError, "must normalize the 6 features"),
    "no weight": (gone("_parameters", "weight"), AttributeError, "weight"),
    "no bias": (gone("_parameters", "bias"), AttributeError, "bias"),
    "no mean": (gone("_buffers", "running_mean"), TypeError, "running_mean must be a buffer, got NoneType"),
    "no count": (gone("_buffers", "num_batches_tracked"), AttributeError, "num_batches_tracked"),
    "a mean of None": (
        attribute("running_mean", None),
        TypeError,
        r"running_mean must be a tensor \[6\], got NoneType",
    ),
    "momentum a string": (attribute("momentum", "a"), TypeError, "momentum must be a number or None, got str"),
    "a mean in a column": (exchanged("running_mean", lambda t: t[:, None]), ValueError, r"shape \[6\], got \[6, 1\]"),
    "a short mean": (exchanged("running_mean", lambda t: t[:3]), ValueError, r"must have shape \[6\], got \[3\]"),
    "a mean that inference made": (exchanged("running_mean", made_in_inference), ValueError, "training can write to"),
    "a mean in float32": (exchanged("running_mean", Tensor.float), TypeError, "dtype of inputs, torch.float64"),
    "a variance in float32": (exchanged("running_var", Tensor.float), TypeError, "dtype of inputs, torch.float64"),
    "a mean without values": (exchanged("running_mean", lambda t: t.to("meta")), ValueError, "device of inputs, cpu"),
    "a mean in a list": (exchanged("running_mean", Tensor.tolist), TypeError, r"must be a tensor \[6\], got list"),
    "a bias in a list": (
        lambda norm: norm._parameters.__setitem__("bias", [0.0] * 6),
        TypeError,
        r"norms\[0\]\[1\].bias must be a tensor \[6\], got list",
    ),
    "a count that inference made": (
        exchanged("num_batches_tracked", made_in_inference),
        ValueError,
        "num_batches_tracked must be a tensor that training can write to, got one that torch.inference_mode made",
    ),
    "no mode": (without("training"), AttributeError, "training"),
    "no track_running_stats": (without("track_running_stats"), AttributeError, "track_running_stats"),
}
LAYER_NORM_REFUSED: dict[str, tuple[Edit, type[Exception], str]] = {
    "no shape": (without("normalized_shape"), AttributeError, "normalized_shape"),
    "two dimensions": (attribute("normalized_shape", (1, 6)), ValueError, r"the 6 features of its layer, got \[1, 6\]"),
    "beyond int64": (attribute("normalized_shape", (2**70,)), ValueError, "must normalize the 6 features"),
    "a number": (attribute("normalized_shape", 6), TypeError, "iterable"),
    "no weight": (gone("_parameters", "weight"), AttributeError, "weight"),
}


def state(model: nn.Module) -> list[Tensor]:
    buffers = [buffer for module in model.modules() for buffer in module._buffers.values()]
    return [buffer.clone() for buffer in buffers if isinstance(buffer, Tensor) and not buffer.is_meta]


@pytest.mark.parametrize("edit", SAME.values(), ids=SAME)
def test_as_the_modules(edit: Edit, backend: str) -> None:
    model = Experts(nn.BatchNorm1d)
    other = copy.deepcopy(model)
    for experts in (model, other):
        edit(experts.norms[0][1])  # type: ignore[index]
    with mk.use_backend(backend):
        got = step(model.fused, model, 0)
    assert_close(got, step(other, other, 0), 1e-10)
    for found, expected in zip(state(model), state(other), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, equal_nan=True)


def test_a_shape_in_a_list(backend: str) -> None:
    model = Experts(nn.LayerNorm)
    model.norms[0][1].normalized_shape = [6]  # type: ignore[index]
    with mk.use_backend(backend):
        got = step(model.fused, model, 0)
    assert_close(got, step(model, model, 0), 1e-10)


@pytest.mark.parametrize("edit", REFUSED.values(), ids=REFUSED)
def test_refused(edit: tuple[Edit, type[Exception], str], backend: str) -> None:
    """Before any statistics or counts have changed."""
    change, error, message = edit
    model = Experts(nn.BatchNorm1d)
    change(model.norms[0][1])  # type: ignore[index]
    before = state(model)
    with mk.use_backend(backend), pytest.raises(error, match=message):
        step(model.fused, model, 0)
    assert all(map(torch.equal, state(model), before))


@pytest.mark.parametrize("edit", LAYER_NORM_REFUSED.values(), ids=LAYER_NORM_REFUSED)
def test_refused_layer_norms(edit: tuple[Edit, type[Exception], str], backend: str) -> None:
    change, error, message = edit
    model = Experts(nn.LayerNorm)
    change(model.norms[0][1])  # type: ignore[index]
    with mk.use_backend(backend), pytest.raises(error, match=message):
        step(model.fused, model, 0)


@pytest.mark.parametrize("part", ["running_mean", "running_var", "num_batches_tracked", "weight", "bias"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_memory_that_is_gone(part: str, training: bool, gradients: bool, backend: str) -> None:
    """PyTorch reads and writes lists of tensors without memory, which ends the process."""
    model = Experts(nn.BatchNorm1d).train(training)
    getattr(model.norms[1][1], part).detach().untyped_storage().resize_(0)  # type: ignore[index]
    x = [torch.randn(9, 7).double()] * 3
    logits = [torch.randn(9, size).double() for size in (3, 3, 5)]
    if part == "num_batches_tracked" and not training:
        with mk.use_backend(backend):
            model.fused(x, logits)  # which nobody reads then
        return
    before = [norm.num_batches_tracked.clone() for norm in model.norms[0]]  # type: ignore[union-attr]
    refusal = pytest.raises(ValueError, match="must have [0-9]+ bytes of memory( for each of their tensors)?, got 0")
    with mk.use_backend(backend), torch.set_grad_enabled(gradients), refusal:
        model.fused(x, logits)
    assert before == [norm.num_batches_tracked for norm in model.norms[0]]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["inputs[0]", "weights[1][1]", "biases[1][1]", "gate_weights[1]", "gate_biases[1]"])
@pytest.mark.parametrize("gradients", [True, False])
def test_memory_that_is_gone_before_norms(name: str, gradients: bool, dtype: torch.dtype, backend: str) -> None:
    """PyTorch, which folds norms into weights, reads them without asking."""
    model = Experts(nn.BatchNorm1d, dtype=dtype).eval()
    layers: Any = model.linears
    weights = [[linear.weight for linear in layer] for layer in layers]
    biases = [[linear.bias for linear in layer] for layer in layers]
    gates = [nn.Linear(7, size, dtype=dtype) for size in ROUTING.wiring.gate_sizes]
    x = [torch.randn(9, 7).to(dtype)] * 3
    which: Any = {
        "inputs": x,
        "weights": weights,
        "biases": biases,
        "gate_weights": [gate.weight for gate in gates],
        "gate_biases": [gate.bias for gate in gates],
    }
    argument, *places = name.replace("]", "").split("[")
    gone: Any = which[argument]
    for place in places:
        gone = gone[int(place)]
    gone.detach().untyped_storage().resize_(0)
    refusal = pytest.raises(ValueError, match=rf"{argument}.*must have [0-9]+ bytes of memory, got 0")
    with mk.use_backend(backend), torch.set_grad_enabled(gradients), refusal:
        mk.expert_mixture(
            x,
            weights,
            biases,
            None,
            ROUTING,
            gate_weights=which["gate_weights"],
            gate_biases=which["gate_biases"],
            norms=model.norms,
        )
