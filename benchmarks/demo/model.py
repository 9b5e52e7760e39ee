"""The models: PLE of deepctr-torch and of torch-rechub as their users write them, their loss, and their training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.demo.flights import TASKS, Flights
from benchmarks.demo.library import import_deepctr

EMBEDDING = 40  # times 10 features, and 16 dense ones: D = 416, as in the benchmarks' standard workload
SEED = 2013


def build(flights: Flights) -> Any:
    """Two levels of 4 experts a task and 4 shared ones, (256, 128) units; the same weights each time."""
    import_deepctr()
    from deepctr_torch.inputs import DenseFeat, SparseFeat
    from deepctr_torch.models.multitask import PLE

    columns = [SparseFeat(name, size, EMBEDDING) for name, size in flights.vocabulary.items()]
    columns += [DenseFeat(name, 1) for name in flights.dense]
    return PLE(
        columns,
        shared_expert_num=4,
        specific_expert_num=4,
        num_levels=2,
        expert_dnn_hidden_units=(256, 128),
        gate_dnn_hidden_units=(),
        init_std=0.05,
        seed=SEED,
        task_types=("binary",) * len(TASKS),
        task_names=TASKS,
    )


class ByName(nn.Module):
    """A model of torch-rechub, which takes its features by name, for features in one tensor [B, F]."""

    def __init__(self, model: nn.Module, sparse: Sequence[str], dense: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.num_sparse = len(sparse)
        self.feature_index = {name: (i, i + 1) for i, name in enumerate([*sparse, *dense])}

    def forward(self, x: Tensor) -> Any:
        codes, values = x[:, : self.num_sparse].long(), x[:, self.num_sparse :]
        columns = (*codes.unbind(1), *values.unbind(1))
        return self.model(dict(zip(self.feature_index, columns, strict=True)))


def build_rechub(flights: Flights) -> ByName:
    """The same sizes; in torch-rechub every expert, gate and tower has batch norm."""
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.models.multi_task import PLE

    columns: list[Any] = [SparseFeature(name, size, embed_dim=EMBEDDING) for name, size in flights.vocabulary.items()]
    columns += [DenseFeature(name) for name in flights.dense]
    torch.manual_seed(SEED)
    experts, towers = {"dims": [256, 128]}, [{"dims": [64]}] * len(TASKS)
    model = PLE(columns, ["classification"] * len(TASKS), 2, 4, 4, experts, towers)
    return ByName(model, list(flights.vocabulary), list(flights.dense))


@dataclass(frozen=True)
class Client:
    """A library's model, and the fewest rows of a training batch."""

    label: str
    name: str
    build: Callable[[Flights], Any]
    fewest: int = 1


DEEPCTR = Client("deepctr-torch's PLE", "deepctr-torch", build)
RECHUB = Client("torch-rechub's PLE", "torch-rechub", build_rechub, fewest=2)  # batch norm needs two
CLIENTS = (DEEPCTR, RECHUB)


def tensors(model: Any, flights: Flights) -> tuple[Tensor, Tensor]:
    """Features [N, F] in the order in which the model wants them, and labels [N, T], in its dtype."""
    values = {**flights.sparse, **flights.dense}
    features = np.stack([values[name] for name in model.feature_index], axis=1).astype("float32")
    dtype = next(model.parameters()).dtype
    return torch.from_numpy(features).to(dtype), torch.from_numpy(flights.labels).to(dtype)


def task_losses(model: Any, features: Tensor, labels: Tensor) -> Tensor:
    """[T]: binary cross-entropy of each task a flight, over the labels that flights have."""
    known = ~labels.isnan()
    weight = known.to(labels.dtype)
    entropy = F.binary_cross_entropy(model(features), labels.nan_to_num(), weight=weight, reduction="none")
    losses: Tensor = entropy.sum(0) / len(features)
    return losses


def penalty(model: Any) -> Tensor | None:
    """The model's own regularisation, where it has one."""
    return model.get_regularization_loss().squeeze() if hasattr(model, "get_regularization_loss") else None


def loss_of(model: Any, features: Tensor, labels: Tensor) -> Tensor:
    """The sum of the tasks' losses, and the model's own regularisation."""
    loss = task_losses(model, features, labels).sum()
    own = penalty(model)
    return loss if own is None else loss + own


RATE = 1e-3
# While steps are timed, again and again on one batch: each does the same work on the same weights, where a training
# would bring this batch's loss close to 0 and its gradients close to the least numbers, which take longer.
TIMED_RATE = 0.0


def adam(model: nn.Module, rate: float = RATE) -> torch.optim.Adam:
    """The optimizer of all trainings."""
    return torch.optim.Adam(model.parameters(), lr=rate)


Step = Callable[[Tensor, Tensor], Tensor]  # from the features and labels of a batch to the loss


def training_step(model: Any, rate: float = RATE) -> Step:
    """A function that takes one step of Adam and returns the loss."""
    model.train()
    optimizer = adam(model, rate)

    def step(features: Tensor, labels: Tensor) -> Tensor:
        loss = loss_of(model, features, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def batches(flights: int, epochs: int, rows: int) -> Iterator[Tensor]:
    """The flights of each batch of ``rows``, in an order that depends on nothing but :data:`SEED`."""
    shuffle = torch.Generator().manual_seed(SEED)
    for _ in range(epochs):
        yield from torch.randperm(flights, generator=shuffle).split(rows)


def train(
    step: Step, features: Tensor, labels: Tensor, order: Iterable[Tensor], on_step: Callable[[int, float], None]
) -> list[float]:
    """Trains over batches of these flights; the loss of each step."""
    losses: list[float] = []
    for batch in order:
        losses.append(step(features[batch], labels[batch]).item())
        on_step(len(losses), losses[-1])
    return losses


@torch.no_grad()
def predict(model: Any, features: Tensor, rows: int = 4096) -> Tensor:
    """Predictions [N, T]."""
    model.eval()
    return torch.cat([model(batch) for batch in features.split(rows)])


def aucs(predictions: Tensor, labels: Tensor) -> list[float]:
    """The area under the ROC curve of each task, over the flights that have its label; NaN without both classes."""
    from sklearn.metrics import roc_auc_score

    found = []
    for task in range(labels.shape[1]):
        known = ~labels[:, task].isnan()
        truth = labels[known, task].numpy()
        both = len(np.unique(truth)) == 2
        found.append(float(roc_auc_score(truth, predictions[known, task].numpy())) if both else float("nan"))
    return found
