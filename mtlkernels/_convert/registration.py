"""``mk.convert.register``: classes that a user describes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from mtlkernels._convert.description import TrunkDescription
from mtlkernels._convert.levels import LevelDescription
from mtlkernels._convert.registry import register_trunk
from mtlkernels.routing import Routing


class Registration:
    """The part of :class:`mtlkernels.convert` that learns classes."""

    def register(
        self,
        kind: type[nn.Module],
        *,
        experts: Callable[..., Iterable[Any]],
        gates: Callable[..., Iterable[Any]],
        routing: Callable[..., Routing],
        inputs: Callable[..., Sequence[Tensor] | Tensor | None] | None = None,
        arguments: Callable[[Any, Sequence[Tensor]], tuple[Any, ...]] | None = None,
        outputs: Callable[[Any, Sequence[Tensor]], Any] | None = None,
        gate_inputs: Callable[..., Sequence[int]] | None = None,
        levels: Callable[[Any], Iterable[Hashable]] | None = None,
        level_outputs: Callable[[Any, Any, Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]] | None = None,
        example: Callable[[Any, int], tuple[Any, ...]] | None = None,
        method: str = "forward",
    ) -> None:
        """Teaches :func:`convert` a class of your own with levels of experts, gates and mixing in its ``forward``.

        An expert is given by what it applies, in a line, [Linear → (norm) → (activation) → (Dropout)] a layer: one
        module, an ``nn.Sequential``, also of a class that has its ``forward``, or a sequence of these and of what
        stands for modules:

        - a tensor [D, H] for ``x @ tensor`` (the transpose of an ``nn.Linear``'s weight), and behind it a tensor [H] or
          [1, H] for its bias;
        - "relu", "leaky_relu" (slope 0.01), "gelu" (exact), "silu", "tanh" or "sigmoid", or the function: ``F.relu``;
        - None for a module that an instance may lack.

        A gate likewise, up to its logits; an ``nn.Softmax`` and a dropout may follow. A gate that is None mixes its
        experts in equal shares, so of one expert it gives the output. A whole example::

            class MyMMoE(nn.Module):
                def __init__(self, width, hidden, num_experts, num_tasks):
                    super().__init__()
                    self.experts = nn.ModuleList(
                        nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.1))
                        for _ in range(num_experts)
                    )
                    self.gates = nn.ModuleList(nn.Linear(width, num_experts) for _ in range(num_tasks))

                def forward(self, x):
                    hidden = torch.stack([expert(x) for expert in self.experts], dim=1)
                    return [(gate(x).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.gates]

            mk.convert.register(
                MyMMoE,
                experts=lambda level: level.experts,
                gates=lambda level: level.gates,
                routing=lambda level: mk.Routing.mmoe(len(level.experts), len(level.gates)),
            )
            print(mk.convert(model))  # any model with a MyMMoE in it

        Subclasses are converted too unless they have a ``forward`` of their own. A class that is registered again gets
        the new description, also where it is converted already. To use a pickled converted model fused, register its
        class in that process too. A wrong description is found out when a copy of an instance is tried, and the model
        is left alone.

        Experts that keep modules as attributes and apply functions between them, gates that are bare parameters::

            class Expert(nn.Module):
                def __init__(self, width, hidden):
                    super().__init__()
                    self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, hidden)

                def forward(self, x):
                    return F.relu(self.fc2(F.relu(self.fc1(x))))

            class BareMMoE(nn.Module):
                def __init__(self, width, hidden, num_experts, num_tasks):
                    super().__init__()
                    self.experts = nn.ModuleList(Expert(width, hidden) for _ in range(num_experts))
                    self.gates = nn.Parameter(torch.randn(num_tasks, width, num_experts))

                def forward(self, x):
                    hidden = torch.stack([expert(x) for expert in self.experts], dim=1)
                    return [((x @ gate).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.gates]

            mk.convert.register(
                BareMMoE,
                experts=lambda model: [[e.fc1, "relu", e.fc2, "relu"] for e in model.experts],
                gates=lambda model: model.gates,
                routing=lambda model: mk.Routing.mmoe(len(model.experts), len(model.gates)),
            )

        Experts' matrices [D, H] lie across, seen from the kernels, which copy them at each call: below 128 rows the
        class's own code runs, and below 640 where gradients are wanted. Those that lie as an ``nn.Linear``'s, [H, D],
        given as ``tensor.t()``, are fused at any number of rows.

        Several levels in one ``forward`` are given by ``levels``; a model that embeds first and has towers behind by
        ``inputs``, ``outputs`` and ``example``, or, where it has a method from the embedding to the towers, by
        ``method``. ``docs/recipes/home-grown.md`` has a whole example.

        Args:
            kind: the class.
            experts: from an instance, its experts in the order of the routing; asked at every call.
            gates: from an instance, its gates in the order of the routing; asked at every call.
            routing: from an instance, its :class:`mtlkernels.Routing`; asked by ``convert``, and again where lists of
                modules in the instance have other lengths than then: with another routing the original code runs, and
                under ``torch.compile`` with any, until the instance is converted again.
            inputs: from an instance and the arguments of ``forward``, the G input streams [B, D]; None leaves that call
                to the original code, as does an argument that no trial gave, unless it has its default's value, and
                another flag, word or number than trials gave, or that number in another type; a number that differs
                between trials may be any. More or fewer streams than trials had, or streams of several B, run it too.
                By default ``forward`` takes one tensor, or a sequence of G.
            arguments: the inverse, with which the class is tried: from an instance and G streams, the arguments of
                ``forward``, a tuple. It or ``example`` is needed beside ``inputs``.
            outputs: from an instance and the K mixtures [B, H], what ``forward`` returns. By default a list of them.
            gate_inputs: from an instance, the number of the stream that each gate reads. By default gate k reads stream
                k, or the only one. Streams that gates alone read come after the experts'.
            levels: from an instance, a number or name for each of its levels, which then is the second argument of
                ``experts``, ``gates``, ``routing`` and ``gate_inputs``. By default there is one level.
            level_outputs: from an instance, a level, its K mixtures and the streams that it read, the streams that the
                next level reads, or that ``outputs`` takes. By default the mixtures.
            example: in the place of ``arguments`` where ``inputs`` does more than pick its arguments apart (an
                embedding, say): from an instance and a number of rows, arguments of ``forward``, a tuple. ``inputs`` is
                then called once a call, as the original code's beginning is, and has to give as many streams [B, D] of
                one B as trials had, or None: others run the original code in evaluation, which does that beginning
                again, and are a ``ValueError`` in training.
            method: the name of the method to replace, where it is not ``forward``.

        Raises:
            TypeError: ``kind`` is not a subclass of ``torch.nn.Module``, or another argument is not callable.
            ValueError: ``inputs`` is given without one of ``arguments`` and ``example`` or beside both, ``arguments``
                without ``inputs``, ``level_outputs`` without ``levels``, or ``kind`` has no such method.
        """
        _check_kind(kind)
        per_level = {"experts": experts, "gates": gates, "routing": routing, "gate_inputs": gate_inputs}
        optional = {"inputs": inputs, "arguments": arguments, "outputs": outputs, "example": example}
        _check_callable(per_level | optional | {"levels": levels, "level_outputs": level_outputs})
        _check_arguments(inputs, arguments, example)
        if level_outputs is not None and levels is None:
            raise ValueError("levels must be given beside level_outputs, got None")
        if not isinstance(method, str) or not callable(getattr(kind, method, None)):
            raise ValueError(f"method must be the name of a method of {kind.__name__}, got {method!r}")
        described: dict[str, Any] = {name: f for name, f in per_level.items() if f is not None}
        given: dict[str, Any] = {name: f for name, f in optional.items() if f is not None}
        given["levels"] = _levels(described, levels, level_outputs)
        register_trunk(kind, TrunkDescription(embeds=example is not None, method=method, **given))


def _levels(functions: dict[str, Any], levels: Any, level_outputs: Any) -> Callable[[Any], Sequence[LevelDescription]]:
    """From an instance, its levels."""
    if levels is None:
        only = (LevelDescription(**functions),)
        return lambda module: only

    made: dict[Hashable, LevelDescription] = {}  # functools.cache would have torch.compile warn

    def level(key: Hashable) -> LevelDescription:
        if key not in made:
            keyed = {name: _with_key(function, key) for name, function in functions.items()}
            if level_outputs is not None:
                keyed["level_outputs"] = lambda module, mixed, streams: level_outputs(module, key, mixed, streams)
            made[key] = LevelDescription(**keyed)
        return made[key]

    return lambda module: [level(key) for key in levels(module)]


def _with_key(function: Callable[..., Any], key: Hashable) -> Callable[..., Any]:
    return lambda module: function(module, key)


def _check_kind(kind: object) -> None:
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        given = kind.__name__ if isinstance(kind, type) else f"an instance of {type(kind).__name__}"
        raise TypeError(f"kind must be a subclass of torch.nn.Module, got {given}")


def _check_callable(functions: dict[str, Any]) -> None:
    needed = ("experts", "gates", "routing")
    for name, function in functions.items():
        if not callable(function) and (function is not None or name in needed):
            raise TypeError(f"{name} must be callable, got {type(function).__name__}")


def _check_arguments(inputs: Any, arguments: Any, example: Any) -> None:
    if arguments is not None and example is not None:
        raise ValueError(
            "arguments and example are both given, but a class is tried with one of them: leave one of them out"
        )
    if inputs is None and arguments is not None:
        raise ValueError("inputs must be given beside arguments, of which it is the inverse, got None")
    if inputs is not None and arguments is None and example is None:
        raise ValueError("arguments must be given beside inputs, of which it is the inverse, or example, got None")
