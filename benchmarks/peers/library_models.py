"""Whole models of deepctr-torch and torch-rechub as their users write them, and their parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.demo.library import import_deepctr

# 10 x 40 + 16 = 416 features, as in the standard workload.
SPARSE, EMBEDDING, DENSE, VOCABULARY = 10, 40, 16, 1000
TASKS, SPECIFIC, SHARED, LEVELS, UNITS, TOWER = 2, 4, 4, 2, (256, 128), 64
# A pre-activation as close to zero as this, in units of epsilon and of its root mean square, may fall on either side of
# the ReLU's corner by rounding alone.
CORNER = 64.0
PARTS = ("embedding", "trunk", "towers")


@dataclass(frozen=True)
class LibraryModel:
    """A model, and how its user calls it and its parts.

    Args:
        label: how tables call it.
        build: the model, the same weights each time.
        arguments: from codes and numbers [B, 26], what the model takes; codes stay exact in every dtype.
        parts: from a model and such an argument, for each of :data:`PARTS` a function of what the part before gives.
            None where its forward holds all of it.
        prefixes: for "embedding" and "trunk", what names of their parameters begin with; all others are the towers'.
        experts: of each level.
        batch_norm: whether training needs two rows.
    """

    label: str
    build: Callable[[], Any]
    arguments: Callable[[Tensor], Any]
    parts: Callable[[Any], Mapping[str, Callable[[Any], Any]]] | None
    prefixes: Mapping[str, tuple[str, ...]]
    levels: int
    experts: int
    batch_norm: bool

    def part_of(self, name: str) -> str:
        """The part to which a parameter or buffer belongs."""
        return next((part for part, prefixes in self.prefixes.items() if name.startswith(prefixes)), "towers")

    def flop(self, rows: int, training: bool) -> float:
        """Arithmetic of the experts' linear layers, nearly all there is; twice as much again backwards."""
        weights = 0
        for level in range(self.levels):
            widths = (SPARSE * EMBEDDING + DENSE if level == 0 else UNITS[-1], *UNITS)
            weights += self.experts * sum(a * b for a, b in zip(widths, widths[1:], strict=False))
        return 2.0 * rows * weights * (3 if training else 1)


def features(rows: int) -> Tensor:
    """[B, 26]: codes, then numbers."""
    codes = torch.randint(0, VOCABULARY, (rows, SPARSE))
    return torch.cat([codes.float(), torch.randn(rows, DENSE)], 1)


def _by_name(x: Tensor) -> dict[str, Tensor]:
    found = {f"s{i}": x[:, i].long() for i in range(SPARSE)}
    return found | {f"d{i}": x[:, SPARSE + i].contiguous() for i in range(DENSE)}


def _rechub(kind: str, activation: str = "relu") -> Any:
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.models import multi_task

    torch.manual_seed(0)
    columns: list[Any] = [SparseFeature(f"s{i}", VOCABULARY, embed_dim=EMBEDDING) for i in range(SPARSE)]
    columns += [DenseFeature(f"d{i}") for i in range(DENSE)]
    experts, towers = {"dims": list(UNITS), "activation": activation}, [{"dims": [TOWER]}] * TASKS
    tasks = ["classification"] * TASKS
    if kind == "PLE":
        return multi_task.PLE(columns, tasks, LEVELS, SPECIFIC, SHARED, experts, towers)
    return multi_task.MMOE(columns, tasks, TASKS * SPECIFIC + SHARED, experts, towers)


def _rechub_parts(model: Any) -> dict[str, Callable[[Any], Any]]:
    def trunk(x: Tensor) -> list[Tensor]:
        streams = [x] * (TASKS + 1)
        for level in model.cgc_layers:
            streams = level(streams)
        return streams

    def towers(streams: Sequence[Tensor]) -> Tensor:
        heads = zip(streams, model.towers, model.predict_layers, strict=True)
        return torch.cat([predict(tower(x)) for x, tower, predict in heads], dim=1)

    return {
        "embedding": lambda x: model.embedding(x, model.features, squeeze_dim=True),
        "trunk": trunk,
        "towers": towers,
    }


def _deepctr(batch_norm: bool) -> Any:
    import_deepctr()
    from deepctr_torch.inputs import DenseFeat, SparseFeat
    from deepctr_torch.models.multitask import PLE

    columns = [SparseFeat(f"s{i}", VOCABULARY, EMBEDDING) for i in range(SPARSE)]
    columns += [DenseFeat(f"d{i}", 1) for i in range(DENSE)]
    return PLE(
        columns,
        shared_expert_num=SHARED,
        specific_expert_num=SPECIFIC,
        num_levels=LEVELS,
        expert_dnn_hidden_units=UNITS,
        tower_dnn_hidden_units=(TOWER,),
        dnn_use_bn=batch_norm,
        init_std=0.05,
        task_types=("binary",) * TASKS,
        task_names=[f"task{t}" for t in range(TASKS)],
    )


def _deepctr_parts(model: Any) -> dict[str, Callable[[Any], Any]]:
    from deepctr_torch.inputs import combined_dnn_input

    def embedding(x: Tensor) -> Any:
        columns = model.input_from_feature_columns(x, model.dnn_feature_columns, model.embedding_dict)
        return combined_dnn_input(*columns)

    def trunk(x: Tensor) -> list[Tensor]:
        streams = [x] * (TASKS + 1)
        for level in range(LEVELS):
            streams = model.cgc_net(streams, level)
        return streams[:TASKS]

    def towers(streams: Sequence[Tensor]) -> Tensor:
        heads = zip(streams, model.tower_dnn, model.tower_dnn_final_layer, model.out, strict=True)
        return torch.cat([out(final(tower(x))) for x, tower, final, out in heads], -1)

    return {"embedding": embedding, "trunk": trunk, "towers": towers}


_RECHUB = {"embedding": ("embedding.",), "trunk": ("cgc_layers.", "experts.", "gates.")}
_DEEPCTR = {
    "embedding": ("embedding_dict.", "linear_model."),
    "trunk": ("specific_experts.", "shared_experts.", "specific_gate_dnn", "shared_gate_dnn"),
}
_EXPERTS = TASKS * SPECIFIC + SHARED
MODELS = {
    "rechub-PLE": LibraryModel(
        "torch-rechub's PLE", lambda: _rechub("PLE"), _by_name, _rechub_parts, _RECHUB, LEVELS, _EXPERTS, True
    ),
    "rechub-MMOE": LibraryModel(
        "torch-rechub's MMOE", lambda: _rechub("MMOE"), _by_name, None, _RECHUB, 1, _EXPERTS, True
    ),
    "rechub-PLE-PReLU": LibraryModel(
        "torch-rechub's PLE with PReLU",
        lambda: _rechub("PLE", "prelu"),
        _by_name,
        None,
        _RECHUB,
        LEVELS,
        _EXPERTS,
        True,
    ),
    "rechub-PLE-Dice": LibraryModel(
        "torch-rechub's PLE with Dice", lambda: _rechub("PLE", "dice"), _by_name, None, _RECHUB, LEVELS, _EXPERTS, True
    ),
    "deepctr-PLE": LibraryModel(
        "deepctr-torch's PLE", lambda: _deepctr(False), lambda x: x, _deepctr_parts, _DEEPCTR, LEVELS, _EXPERTS, False
    ),
    "deepctr-PLE-BN": LibraryModel(
        "deepctr-torch's PLE with batch norm",
        lambda: _deepctr(True),
        lambda x: x,
        _deepctr_parts,
        _DEEPCTR,
        LEVELS,
        _EXPERTS,
        True,
    ),
}


def loss_of(model: Any, predictions: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy a row, and the model's own regularisation."""
    entropy = F.binary_cross_entropy(predictions, labels, reduction="sum") / len(labels)
    if hasattr(model, "get_regularization_loss"):
        entropy = entropy + model.get_regularization_loss().squeeze().to(entropy.dtype)
    return entropy


@torch.no_grad()
def has_corners(model: Any, arguments: Any) -> bool:
    """Whether some ReLU's or PReLU's input is zero but for float32's rounding; ``model`` is in float64.

    There the derivative jumps, so two right implementations may differ by all of it.
    """
    found = []
    near = CORNER * torch.finfo(torch.float32).eps

    def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        (before,) = args
        found.append(bool((before.abs() <= near * before.square().mean().sqrt()).any()))

    handles = [m.register_forward_pre_hook(look) for m in model.modules() if type(m) in (nn.ReLU, nn.PReLU)]
    model(arguments)
    for handle in handles:
        handle.remove()
    return any(found)
