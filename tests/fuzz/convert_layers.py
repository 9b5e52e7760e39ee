"""Edits of layers: exchanged, inserted, left out, in another order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.convert_subject import NORMS, Edit, Subject

ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.SiLU, nn.GELU, nn.Sigmoid, nn.LeakyReLU, nn.PReLU)
_OTHER_ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.Tanh,
    nn.Sigmoid,
    lambda: nn.LeakyReLU(0.3),
    lambda: nn.GELU("tanh"),
    nn.Softplus,
    nn.PReLU,
    lambda: nn.ReLU(inplace=True),
    nn.Identity,
    lambda: nn.Dropout(0.5),
)


class ScaledLinear(nn.Linear):
    """A layer of the user's own."""

    def forward(self, input: Tensor) -> Tensor:
        return 1.5 * super().forward(input)


class Temperature(nn.Module):
    """Logits that are divided."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def _as(new: nn.Module, old: nn.Module) -> nn.Module:
    """In the dtype and the mode of ``old``."""
    parameter = next(old.parameters(), None)
    return new.train(old.training).to(torch.float32 if parameter is None else parameter.dtype)


def _width(layer: Any) -> int:
    return int(layer.num_features if isinstance(layer, nn.BatchNorm1d) else layer.normalized_shape[0])


def _behind(make: Callable[[int], nn.Module]) -> Edit:
    """Inserts, behind a linear layer, what is made of its width."""

    def edit(subject: Subject) -> None:
        parent, name = subject.site(nn.Linear)
        layer = parent._modules[name]
        new = _as(make(layer.out_features), layer)
        if type(parent) is nn.Sequential and subject.draw.random() < 0.5:
            parent.insert(list(parent._modules).index(name) + 1, new)
        else:
            parent._modules[name] = nn.Sequential(layer, new)

    return edit


def _exchange(kinds: tuple[type[nn.Module], ...], make: Callable[[Any, Subject], nn.Module]) -> Edit:
    """Puts another module in the place of one of ``kinds``."""

    def edit(subject: Subject) -> None:
        parent, name = subject.site(*kinds)
        parent._modules[name] = _as(make(parent._modules[name], subject), parent._modules[name])

    return edit


def _linear(old: Any, bias: bool, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    new = kind(old.in_features, old.out_features, bias=bias)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
    return new


def _swap(subject: Subject) -> None:
    """Two neighbours in a chain change places, where widths allow it."""
    chain, i = subject.pick(
        (chain, i)
        for chain in subject.model.modules()
        if type(chain) is nn.Sequential
        for i in range(len(chain) - 1)
        if not isinstance(chain[i], nn.Linear) or not isinstance(chain[i + 1], nn.Linear)
    )
    chain[i], chain[i + 1] = chain[i + 1], chain[i]


def _leave_out(subject: Subject) -> None:
    chain, i = subject.pick(
        (chain, i)
        for chain in subject.model.modules()
        if type(chain) is nn.Sequential
        for i in range(len(chain))
        if not isinstance(chain[i], nn.Linear)
    )
    del chain[i]


def _of_batch_norm(**options: Any) -> Edit:
    return _exchange((nn.BatchNorm1d,), lambda old, subject: nn.BatchNorm1d(_width(old), **options))


LAYERS: dict[str, Edit] = {
    "an identity more": _behind(lambda width: nn.Identity()),
    "a dropout of nothing more": _behind(lambda width: nn.Dropout(0.0)),
    "a dropout more": _behind(lambda width: nn.Dropout(0.3)),
    "a layer norm more": _behind(nn.LayerNorm),
    "a batch norm more": _behind(nn.BatchNorm1d),
    "a group norm more": _behind(lambda width: nn.GroupNorm(1, width)),
    "a tanh more": _behind(lambda width: nn.Tanh()),
    "a softplus more": _behind(lambda width: nn.Softplus()),
    "a softmax more": _behind(lambda width: nn.Softmax(dim=1)),
    "a PReLU more": _behind(nn.PReLU),
    "a linear layer more": _behind(lambda width: nn.Linear(width, width, bias=False)),
    "a temperature": _behind(lambda width: Temperature()),
    "another activation": _exchange(ACTIVATIONS, lambda old, subject: subject.draw.choice(_OTHER_ACTIVATIONS)()),
    "an activation left out": _exchange(ACTIVATIONS, lambda old, subject: nn.Identity()),
    "an activation twice": _exchange(ACTIVATIONS, lambda old, subject: nn.Sequential(old, old)),
    "a norm left out": _exchange(NORMS, lambda old, subject: nn.Identity()),
    "another norm": _exchange(NORMS, lambda old, subject: nn.LayerNorm(_width(old))),
    "a norm twice": _exchange(NORMS, lambda old, subject: nn.Sequential(old, old)),
    "a softmax over the batch": _exchange((nn.Softmax,), lambda old, subject: nn.Softmax(dim=0)),
    "a softmax of divided logits": _exchange((nn.Softmax,), lambda old, subject: nn.Sequential(Temperature(), old)),
    "another linear layer": _exchange((nn.Linear,), lambda old, subject: _linear(old, old.bias is not None)),
    "a linear layer with a bias or without": _exchange((nn.Linear,), lambda old, s: _linear(old, old.bias is None)),
    "a linear layer of another class": _exchange((nn.Linear,), lambda old, s: _linear(old, True, ScaledLinear)),
    "layers swapped": _swap,
    "a layer left out": _leave_out,
    "a norm without weights": _of_batch_norm(affine=False),
    "a norm without statistics": _of_batch_norm(track_running_stats=False),
}
