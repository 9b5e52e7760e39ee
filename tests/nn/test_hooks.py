"""Forward hooks on experts: where gradients are recorded they run, and change nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mtlkernels as mk

PARTS = ["experts.1", "experts.1.linears.0", "experts.1.linears.1", "experts.1.norms.1", "experts.1.slopes"]


def build(**style: Any) -> Any:
    torch.manual_seed(0)
    return mk.nn.CGC(5, 2, (6, 4), 1, 1, dtype=torch.float64, **style)


@pytest.mark.parametrize("part", PARTS)
def test_hooks_run_in_training(part: str) -> None:
    trunk, plain = (build(activation="prelu", batch_norm=True) for _ in range(2))
    x = torch.randn(7, 5, dtype=torch.float64)
    wanted = plain(x)
    sum(y.square().sum() for y in wanted).backward()
    heard: list[nn.Module] = []
    module = trunk.level.get_submodule(part)
    handle = module.register_forward_hook(lambda who, given, returned: heard.append(who))
    with torch.no_grad():
        trunk(x)
    assert not heard, "serving does not look for hooks"
    trunk.load_state_dict(build(activation="prelu", batch_norm=True).state_dict())  # statistics as they were
    found = trunk(x)
    assert heard == [module]
    sum(y.square().sum() for y in found).backward()
    for a, b in zip((*found, *trunk.buffers()), (*wanted, *plain.buffers()), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(trunk.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    handle.remove()
    trunk(x)
    assert heard == [module]


def test_hooks_of_sub_networks_run() -> None:
    trunk = mk.nn.SNR(5, 2, (4,), (2, 2))
    heard: list[nn.Module] = []
    linear: Any = trunk.get_submodule("levels.1.experts.0.linears.0")
    linear.register_forward_hook(lambda who, given, returned: heard.append(who))
    trunk(torch.randn(3, 5))
    assert heard == [linear]
