"""Models of deepctr-torch and torch-rechub for the tests, with weights that make every part matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.demo.library import import_deepctr

import_deepctr()
from deepctr_torch.inputs import DenseFeat, SparseFeat  # noqa: E402
from deepctr_torch.models.multitask import MMOE, PLE  # noqa: E402
from torch_rechub.basic.features import DenseFeature, SparseFeature  # noqa: E402
from torch_rechub.models import multi_task as rechub  # noqa: E402

VOCABULARY, NUM_SPARSE, NUM_DENSE = 11, 3, 4
COLUMNS = [SparseFeat(f"s{i}", VOCABULARY, 5) for i in range(NUM_SPARSE)]
COLUMNS += [DenseFeat(f"d{i}", 1) for i in range(NUM_DENSE)]

SMALL = {"expert_dnn_hidden_units": (12, 7), "gate_dnn_hidden_units": (6,), "tower_dnn_hidden_units": (5,)}


def features(rows: int, seed: int = 0) -> Tensor:
    """Features [B, F] in float64, whose float32 rounding is exact."""
    generator = torch.Generator().manual_seed(seed)
    sparse = torch.randint(0, VOCABULARY, (rows, NUM_SPARSE), generator=generator)
    return torch.cat([sparse.float(), torch.randn(rows, NUM_DENSE, generator=generator)], 1).double()


def fill(model: nn.Module) -> nn.Module:
    """Weights and statistics of ordinary size: deepctr-torch's are 1e-4, so experts would hardly differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d) and module.running_mean is not None:
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.25)
    return model


def make(kind: type[nn.Module], **options: Any) -> Any:
    """A model of 3 tasks unless ``task_names`` says otherwise."""
    names = options.pop("task_names", ("a", "b", "c"))
    options = {**SMALL, "task_names": names, "task_types": ("binary",) * len(names), **options}
    return fill(kind(COLUMNS, **options))


def ple(**options: Any) -> Any:
    """A PLE of two levels, 2 specific experts a task and 2 shared ones."""
    return make(PLE, **{"specific_expert_num": 2, "shared_expert_num": 2, **options})


def mmoe(**options: Any) -> Any:
    """An MMOE of 4 experts."""
    return make(MMOE, **{"num_experts": 4, **options})


def rechub_features() -> list[Any]:
    """Made for each model: torch-rechub keeps a feature's embedding in the feature, so models would share it."""
    sparse: list[Any] = [SparseFeature(f"s{i}", VOCABULARY, embed_dim=5) for i in range(NUM_SPARSE)]
    return sparse + [DenseFeature(f"d{i}") for i in range(NUM_DENSE)]


def by_name(rows: Tensor) -> dict[str, Tensor]:
    """Features [B, F] as torch-rechub's models take them."""
    sparse = {f"s{i}": rows[:, i].long() for i in range(NUM_SPARSE)}
    return sparse | {f"d{i}": rows[:, NUM_SPARSE + i] for i in range(NUM_DENSE)}


def rechub_ple(
    *, tasks: int = 3, levels: int = 2, specific: int = 2, shared: int = 2, dims: Any = (12, 7), **expert: Any
) -> Any:
    """A PLE of torch-rechub."""
    towers = [{"dims": [5]} for _ in range(tasks)]
    experts = {"dims": list(dims), **expert}
    return fill(rechub.PLE(rechub_features(), ["classification"] * tasks, levels, specific, shared, experts, towers))


def rechub_mmoe(*, tasks: int = 3, experts: int = 4, dims: Any = (12, 7), **expert: Any) -> Any:
    """An MMOE of torch-rechub."""
    towers = [{"dims": [5]} for _ in range(tasks)]
    options = {"dims": list(dims), **expert}
    return fill(rechub.MMOE(rechub_features(), ["classification"] * tasks, experts, options, towers))
