"""Edits of what modules hold: parameters shared, frozen or of another kind, modules in another mode, dtype or order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.utils import parametrizations, parametrize, prune

from tests.fuzz.convert_subject import DROPOUTS, LISTS, NORMS, Edit, NoPlace, Subject


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _list(subject: Subject) -> Any:
    return subject.pick(m for m in subject.model.modules() if type(m) is nn.ModuleList and len(m) > 1)


def _reorder(subject: Subject) -> None:
    modules = _list(subject)
    order = list(modules)
    subject.draw.shuffle(order)
    for i, module in enumerate(order):
        modules[i] = module


def _reorder_keys(subject: Subject) -> None:
    """A module that was taken out and put back by its number is the last one."""
    modules = _list(subject)
    modules._modules["0"] = modules._modules.pop("0")


def _share_modules(subject: Subject) -> None:
    modules = _list(subject)
    modules[0] = modules[len(modules) - 1]


def _alike(subject: Subject, dims: int = 1) -> list[tuple[Any, str]]:
    """All parameters of the shape of one of them."""
    module, name = subject.parameter(dims)
    shape = module._parameters[name].shape
    found = [
        (other, key)
        for other in subject.model.modules()
        for key, parameter in other.named_parameters(recurse=False)
        if parameter.shape == shape
    ]
    if len(found) < 2:
        raise NoPlace
    return found


def _tie(subject: Subject) -> None:
    (module, name), *others = _alike(subject)
    other, key = subject.draw.choice(others)
    other._parameters[key] = module._parameters[name]


def _slices(subject: Subject) -> None:
    """Weights of one shape lie in one tensor."""
    found = _alike(subject, 2)
    stacked = torch.stack([module._parameters[name].detach() for module, name in found])
    for (module, name), part in zip(found, stacked, strict=True):
        module._parameters[name] = nn.Parameter(part)


def _replace_parameter(subject: Subject) -> None:
    module, name = subject.parameter()
    module._parameters[name] = nn.Parameter(module._parameters[name].detach() * 0.5 + 0.1)


def _across(subject: Subject) -> None:
    """A parameter that lies in memory as its transpose."""
    module, name = subject.parameter(2)
    module._parameters[name] = nn.Parameter(module._parameters[name].detach().t().contiguous().t())


def _as_tensor(subject: Subject) -> None:
    """A weight that is no parameter any more, but a plain tensor, or a buffer."""
    module, name = subject.parameter()
    value = module._parameters.pop(name).detach()
    if subject.draw.random() < 0.5:
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)


def _freeze_parameter(subject: Subject) -> None:
    module, name = subject.parameter()
    module._parameters[name].requires_grad_(False)


def _set(kinds: tuple[type[nn.Module], ...], **settings: Any) -> Edit:
    def edit(subject: Subject) -> None:
        vars(subject.module(*kinds)).update(settings)

    return edit


def _to(dtype: torch.dtype, *kinds: type[nn.Module]) -> Edit:
    return lambda subject: subject.module(*kinds).to(dtype)


def _all_norms_to(dtype: torch.dtype) -> Edit:
    def edit(subject: Subject) -> None:
        for module in subject.model.modules():
            if isinstance(module, NORMS):
                module.to(dtype)

    return edit


def _weight_of(function: Callable[[nn.Module], Any]) -> Edit:
    def edit(subject: Subject) -> None:
        function(subject.module(nn.Linear))

    return edit


def _compiled(subject: Subject) -> None:
    parent, name = subject.pick(
        (parent, name)
        for parent in subject.model.modules()
        for name, child in parent.named_children()
        if type(child) not in LISTS and not any(isinstance(m, OptimizedModule) for m in (parent, *child.modules()))
    )
    parent._modules[name] = torch.compile(parent._modules[name], backend="eager")


def _add(name: str, value: Callable[[], Any]) -> Edit:
    """Something on a module that its forward does not use."""
    return lambda subject: setattr(subject.module(), name, value())


# Those that leave a model as it is come first.
STATE: dict[str, Edit] = {
    "an attribute more": _add("note", lambda: {"by": ["a user"]}),
    "a parameter more": _add("extra", lambda: nn.Parameter(torch.ones(2))),
    "a buffer more": lambda subject: subject.module().register_buffer("spare", torch.ones(2)),
    "a module more": _add("spare_layer", lambda: nn.Linear(2, 2)),
    "a parameter frozen": _freeze_parameter,
    "a module frozen": lambda subject: subject.module().requires_grad_(False),
    "a module in evaluation": lambda subject: subject.module().eval(),
    "a parameter exchanged": _replace_parameter,
    "a parameter that lies across": _across,
    "a parameter tied": _tie,
    "weights in one tensor": _slices,
    "a parameter that is a tensor": _as_tensor,
    "a module shared": _share_modules,
    "a list in another order": _reorder,
    "a list with its keys in another order": _reorder_keys,
    "a dropout rate": _set(DROPOUTS, p=0.4),
    "a cumulative average": _set((nn.BatchNorm1d,), momentum=None),
    "another momentum": _set((nn.BatchNorm1d,), momentum=0.5),
    "another epsilon": _set(NORMS, eps=0.1),
    "a module in float64": _to(torch.float64),
    "a layer in float64": _to(torch.float64, nn.Linear),
    "a norm in float32": _to(torch.float32, *NORMS),
    "all norms in float32": _all_norms_to(torch.float32),
    "weight norm": _weight_of(parametrizations.weight_norm),
    "weight norm by a hook": _weight_of(nn.utils.weight_norm),
    "spectral norm": _weight_of(parametrizations.spectral_norm),
    "spectral norm by a hook": _weight_of(nn.utils.spectral_norm),
    "a parametrization": _weight_of(lambda m: parametrize.register_parametrization(m, "weight", Doubled())),
    "pruned weights": _weight_of(lambda m: prune.l1_unstructured(m, "weight", amount=0.5)),
    "pruned weights made permanent": _weight_of(
        lambda m: prune.remove(prune.l1_unstructured(m, "weight", amount=0.5), "weight")
    ),
    "a compiled module": _compiled,
    "a module compiled in place": lambda subject: subject.module().compile(backend="eager"),
}
