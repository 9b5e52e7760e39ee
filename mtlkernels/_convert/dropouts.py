"""Whether a conversion drops what the original does: where, how much, and how many random numbers are drawn for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from mtlkernels._convert.activations import activation_name
from mtlkernels._convert.chains import Chain, Product, flatten
from mtlkernels.ops._fusing import linear_parameters

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_KEEP_WIDTH = (*DROPOUTS, nn.Identity, nn.BatchNorm1d, nn.LayerNorm, nn.Softmax)


def dropouts_of(module: nn.Module) -> list[Any]:
    """The dropout modules of a model."""
    return [part for part in module.modules() if isinstance(part, DROPOUTS)]


def set_rates(dropouts: Sequence[Sequence[Any]], rates: Sequence[float]) -> None:
    """Of each of several copies' dropouts."""
    for modules in dropouts:
        for module, rate in zip(modules, rates, strict=True):
            module.p = rate


@contextmanager
def counted(dropouts: Sequence[nn.Module]) -> Iterator[Counter[int]]:
    """Within the block a dropout's calls add the numbers that it is given to the counter, at its place.

    By a hook on all modules: with one of its own a part would not be fused.
    """
    counts: Counter[int] = Counter()
    places = {id(module): place for place, module in enumerate(dropouts)}

    def count(module: nn.Module, given: Any, made: Any) -> None:
        if id(module) in places:
            counts[places[id(module)]] += made.numel()

    handle = register_module_forward_hook(count)
    try:
        yield counts
    finally:
        handle.remove()


def widths_dropped(chains: Iterable[Chain]) -> dict[int, int | None]:
    """By the id of each dropout in some chains, how many numbers of a row it is given in all of them.

    None where that cannot be told. A conversion draws so many, whether a chain is fused or called.
    """
    found: dict[int, int | None] = {}
    for chain in chains:
        steps = [] if chain is None else flatten(chain)
        width = _width_before(steps)
        for step in steps:
            if isinstance(step, DROPOUTS):
                known = found.get(id(step), 0)
                found[id(step)] = None if width is None or known is None else known + width
            elif isinstance(step, (nn.Linear, Product)):
                width = len(linear_parameters(step)[0])
            elif not isinstance(step, _KEEP_WIDTH) and activation_name(step) is None:
                width = None
    return found


def _width_before(steps: Sequence[Any]) -> int | None:
    """The width of what comes in, where dropouts alone stand before the first linear layer."""
    first = next((step for step in steps if not isinstance(step, (*DROPOUTS, nn.Identity))), None)
    return linear_parameters(first)[0].shape[1] if isinstance(first, (nn.Linear, Product)) else None


def dropped_otherwise(
    original: Sequence[Any], theirs: Counter[int], ours: Counter[int], widths: Mapping[int, int | None], rows: int
) -> str | None:
    """Why a conversion would draw another number of masks than the original does, in the report's words.

    Args:
        original: the original's dropouts, None in the place of one that does not matter, as those do not that drop
            nothing and are in no chain.
        theirs, ours: what :func:`counted` has counted of each, of the original and of the fused way.
        widths: of those in chains, see :func:`widths_dropped`.
        rows: how many rows chains read.
    """
    for place, module in enumerate(original):
        if module is None or (module.p == 0 and id(module) not in widths):
            continue
        width = widths.get(id(module), 0)
        if width is None:
            continue
        expected = rows * width if id(module) in widths else ours[place]
        if theirs[place] != expected:
            return (
                f"its forward draws dropout's masks for {theirs[place]} numbers where a conversion would draw them for"
                f" {expected}: a part is called more often, or shared by more experts, than once each"
            )
    return None
