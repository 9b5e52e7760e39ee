"""Batch norm in trunks: experts that stand in a level twice, and ensembles of models by torch.func.vmap."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import mtlkernels as mk


def trunk() -> Any:
    return mk.nn.MMoE(12, 2, (10, 8), num_experts=3, batch_norm=True)


@pytest.mark.parametrize("cast", [False, True])
def test_slopes_of_layers_that_are_called_are_one_operator(cast: bool) -> None:
    """PyTorch's, where that takes them; each of what it is made up of would be a pass over the rows."""
    expert = mk.nn.MMoE(6, 2, (5,), 3, batch_norm=True, activation="prelu").level.experts[0].eval()
    x = torch.randn(7, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast), torch.profiler.profile(acc_events=True) as found:
        y = expert(x)
    operators = {event.key for event in found.key_averages()}
    assert ("aten::prelu" in operators) != cast and ("aten::where" in operators) == cast
    z = expert.norms[0](expert.linears[0](x))
    torch.testing.assert_close(
        y.float(), torch.where(z > 0, z, z * expert.slopes[0]), rtol=0.1 if cast else 1e-6, atol=0.05 if cast else 1e-6
    )


def by_modules(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Of a hook on each layer, which has its modules called."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_: None)
    return list(copied(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rows", [20, 150])
def test_an_expert_that_stands_there_twice(rows: int, training: bool) -> None:
    model, x = trunk(), torch.randn(rows, 12)
    model.level.experts[2] = model.level.experts[0]
    model.train(training)
    expected = by_modules(model, x)
    torch.testing.assert_close(list(model(x)), expected)
    norm = model.level.experts[0].norms[0]
    assert int(norm.num_batches_tracked) == (2 if training else 0)


def test_an_ensemble_in_training() -> None:
    """Each model has statistics of its own, which vmap batches like its parameters."""
    x, models = torch.randn(40, 12), [trunk().train() for _ in range(3)]
    alone = [copy.deepcopy(model) for model in models]
    expected = [model(x)[0] for model in alone]
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]
    base = copy.deepcopy(models[0]).to("meta")

    def call(parameters: Any, buffers: Any) -> Tensor:
        return functional_call(base, (parameters, buffers), (x,))[0]  # type: ignore[no-any-return]

    torch.testing.assert_close(vmap(call)(parameters, buffers), torch.stack(expected))
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, torch.stack([dict(model.named_buffers())[name] for model in alone]))
    grads = vmap(grad(lambda *state: call(*state).square().sum()))(parameters, buffers)
    for y in expected:
        y.square().sum().backward()
    for name, found in grads.items():
        own = [dict(model.named_parameters())[name].grad for model in alone]
        wanted = [torch.zeros_like(found[0]) if each is None else each for each in own]
        torch.testing.assert_close(found, torch.stack(wanted))
