"""Calls with other streams than a trial had: more or fewer, or of several numbers of rows, which broadcast."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels._convert import registry

ITEMS, USER = torch.randn(2, 150, 8, generator=torch.Generator().manual_seed(0))
TASKS = 2


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(registry, "_registered", {})


class CGC(nn.Module):
    """A stream a task, then the shared one, which is the last."""

    def __init__(self) -> None:
        super().__init__()
        self.specific = nn.ModuleList(nn.Linear(8, 8) for _ in range(TASKS))
        self.shared = nn.Linear(8, 8)
        self.gates = nn.ModuleList(nn.Linear(8, 2) for _ in range(TASKS))

    def forward(self, streams: list[Tensor], *others: Any) -> list[Tensor]:
        shared = torch.relu(self.shared(streams[-1]))
        return [
            (gate(x).softmax(1).unsqueeze(2) * torch.stack([torch.relu(expert(x)), shared], 1)).sum(1)
            for expert, gate, x in zip(self.specific, self.gates, streams, strict=False)
        ]


def convert_cgc(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A model that is converted, and one that is not."""
    mk.convert.register(
        CGC,
        experts=lambda model: [[expert, "relu"] for expert in (*model.specific, model.shared)],
        gates=lambda model: model.gates,
        routing=lambda model: mk.Routing.cgc(TASKS, 1, 1),
        **options,
    )
    own = CGC()
    model = copy.deepcopy(own)
    assert mk.convert(model).replaced
    return model, own


def assert_same(model: nn.Module, own: nn.Module, *given: Any) -> None:
    """Both return the same, more than once, whatever calls keep."""
    for gradients in (False, False, True):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(model(*given), own(*given))


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_another_number_of_streams(number: int, fused_calls: list[int]) -> None:
    """As where the level before has a shared gate no longer."""
    model, own = convert_cgc()
    streams = [ITEMS + i for i in range(number)]
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        fused_calls.clear()
        assert_same(each, own, streams)
        assert bool(fused_calls) == (number == 3)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_another_number_behind_several_numbers_of_arguments(number: int, fused_calls: list[int]) -> None:
    """Of which none is held against a call."""
    model, own = convert_cgc(
        inputs=lambda model, streams, *others: streams,
        arguments=lambda model, streams: (list(streams), *[None] * (len(streams[0]) == 1)),
    )
    assert_same(model, own, [ITEMS] * number, None, None, None)
    assert bool(fused_calls) == (number == 3)


def test_no_streams() -> None:
    model, _ = convert_cgc()
    with pytest.raises(IndexError, match="list index out of range"):  # its own code's
        model([])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("number", [2, 3])
def test_compiled_in_one_graph(number: int, fused_calls: list[int]) -> None:
    model, own = convert_cgc()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for rows in (150, 140):
        streams = [ITEMS[:rows]] * number
        torch.testing.assert_close(compiled(streams), own(streams))
    assert bool(fused_calls) == (number == 3)


class Pair(nn.Module):
    """Two streams, of which one may have a single row for all of the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.gates = nn.ModuleList(nn.Linear(8, 3) for _ in range(TASKS))


class GatesOfUser(Pair):
    """Experts read the items, gates the user."""

    def forward(self, x: Tensor, user: Tensor) -> list[Tensor]:
        hidden = torch.stack([torch.relu(expert(x)) for expert in self.experts], 1)
        return [(gate(user).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.gates]


class ExpertOfUser(Pair):
    """One expert reads the user, all else the items."""

    def forward(self, x: Tensor, user: Tensor) -> list[Tensor]:
        hidden = [torch.relu(expert(y)) for expert, y in zip(self.experts, (user, x, x), strict=True)]
        shares = [gate(x).softmax(1) for gate in self.gates]
        return [sum(share[:, [i]] * y for i, y in enumerate(hidden)) for share in shares]  # type: ignore[misc]


def description(routing: mk.Routing, stream_of_gates: int) -> dict[str, Any]:
    return {
        "experts": lambda model: [[expert, "relu"] for expert in model.experts],
        "gates": lambda model: model.gates,
        "routing": lambda model: routing,
        "gate_inputs": lambda model: (stream_of_gates,) * TASKS,
    }


GATES_OF_USER = description(mk.Routing.mmoe(3, TASKS), 1)
PAIRS = {GatesOfUser: GATES_OF_USER, ExpertOfUser: description(mk.Routing((1, 0, 0), ((0, 1, 2),) * TASKS), 0)}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize(("items", "users"), [(150, 150), (150, 1), (1, 150)])
def test_streams_of_several_numbers_of_rows(kind: type[Pair], items: int, users: int, fused_calls: list[int]) -> None:
    """One user beside many items: where own code broadcasts, it does."""
    mk.convert.register(
        kind, **PAIRS[kind], inputs=lambda model, *streams: streams, arguments=lambda model, streams: tuple(streams)
    )
    own = kind()
    model = copy.deepcopy(own)
    assert mk.convert(model).replaced
    assert_same(model, own, ITEMS[:items], USER[:users])
    assert bool(fused_calls) == (items == users)


class Rank(GatesOfUser):
    """Behind an embedding, and perhaps a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(50, 8), nn.BatchNorm1d(8)

    def embed(self, items: Tensor, user: Tensor) -> list[Tensor]:
        return [self.norm(self.table(items)), self.table(user)]

    def forward(self, items: Tensor, user: Tensor) -> list[Tensor]:
        return super().forward(*self.embed(items, user))


def convert_rank(inputs: Callable[..., Any] = Rank.embed) -> tuple[nn.Module, nn.Module]:
    """A model that is converted, and one that is not."""
    mk.convert.register(
        Rank, **GATES_OF_USER, inputs=inputs, example=lambda model, rows: tuple(torch.randint(50, (2, rows)).unbind())
    )
    own = Rank()
    model = copy.deepcopy(own)
    assert mk.convert(model).replaced
    return model, own


def test_several_numbers_of_rows_behind_an_embedding(fused_calls: list[int]) -> None:
    """In evaluation own code may embed again, what batch statistics would see twice in training."""
    model, own = convert_rank()
    items, user = torch.arange(40), torch.tensor([7])
    assert_same(model.eval(), own.eval(), items, user)
    assert not fused_calls
    model.train()
    with pytest.raises(ValueError, match=r"inputs, .* 2 streams \[B, D\] of one B in training, got .* \[\[40, 8\], \["):
        model(items, user)


def test_another_number_of_streams_behind_an_embedding() -> None:
    def inputs(model: Any, items: Tensor, user: Tensor) -> list[Tensor]:
        streams: list[Tensor] = model.embed(items, user)
        return streams[:1] if len(items) == 40 else streams

    model, own = convert_rank(inputs)
    items = torch.arange(40)
    assert_same(model.eval(), own.eval(), items, items)
    with pytest.raises(
        ValueError, match=r"must give 2 streams \[B, D\] of one B in training, got shapes \[\[40, 8\]\]"
    ):
        model.train()(items, items)


class NarrowUser(GatesOfUser):
    """Whose gates read a stream of another width than experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(5, 3) for _ in range(TASKS))


def test_streams_of_several_widths(fused_calls: list[int]) -> None:
    """Each is tried as wide as the expert or gate that reads it takes it."""
    mk.convert.register(
        NarrowUser,
        **GATES_OF_USER,
        inputs=lambda model, *streams: streams,
        arguments=lambda model, streams: tuple(streams),
    )
    own = NarrowUser()
    model = copy.deepcopy(own)
    assert mk.convert(model).replaced
    assert_same(model, own, ITEMS, USER[:, :5])
    assert fused_calls


class Means(Pair):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [torch.stack([torch.relu(expert(x)) for expert in self.experts], 1).mean(1)] * TASKS


def test_means_with_gate_inputs() -> None:
    """Which none of them reads."""
    description = {**PAIRS[ExpertOfUser], "routing": lambda model: mk.Routing.mmoe(3, TASKS)}
    mk.convert.register(Means, **{**description, "gates": lambda model: [None] * TASKS})
    own = Means()
    model = copy.deepcopy(own)
    assert mk.convert(model).replaced
    assert_same(model, own, ITEMS)


class OneInput(CGC):
    def forward(self, x: Tensor, *others: Any) -> list[Tensor]:  # type: ignore[override]
        return super().forward([x] * (TASKS + 1))


@pytest.mark.parametrize("single_input", [True, False])
def test_a_routing_of_several_streams_for_one_input(single_input: bool) -> None:
    """The report says how one describes it."""
    mk.convert.register(
        OneInput,
        experts=lambda model: [[expert, "relu"] for expert in (*model.specific, model.shared)],
        gates=lambda model: model.gates,
        routing=lambda model: mk.Routing.cgc(TASKS, 1, 1, single_input=single_input),
    )
    (line,) = mk.convert(OneInput()).lines
    assert (line.action == "replaced") == single_input
    words = "; its routing has 3 input streams, given in a list; single_input=True is for one"
    assert line.detail.startswith("it fails in a trial: TypeError: linear()") != single_input
    assert line.detail.endswith(words) != single_input


class Sides(nn.Module):
    """Experts of two streams, in a list each, perhaps within another."""

    def __init__(self, nested: bool = False) -> None:
        super().__init__()
        lists = [nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(2)]
        self.sides: Any = nn.ModuleList(lists) if nested else nn.Module()
        if not nested:
            self.user, self.item = lists
        self.gates = nn.ModuleList(nn.Linear(8, 4) for _ in range(TASKS))

    def lists(self) -> list[Any]:
        return list(self.sides) if isinstance(self.sides, nn.ModuleList) else [self.user, self.item]

    def forward(self, user: Tensor, item: Tensor) -> list[Tensor]:
        pairs = zip(self.lists(), (user, item), strict=True)
        hidden = torch.stack([torch.relu(expert(x)) for experts, x in pairs for expert in experts], 1)
        return [(gate(user).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.gates]


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_an_expert_that_moves_to_another_stream(nested: bool, called: bool, fused_calls: list[int]) -> None:
    """The experts are the same in the same order, but one of them is in another list."""
    mk.convert.register(
        Sides,
        experts=lambda model: [[expert, "relu"] for experts in model.lists() for expert in experts],
        gates=lambda model: model.gates,
        routing=lambda model: mk.Routing(
            [stream for stream, experts in enumerate(model.lists()) for _ in experts], [range(4)] * TASKS
        ),
        gate_inputs=lambda model: [0] * TASKS,
        inputs=lambda model, *streams: streams,
        arguments=lambda model, streams: tuple(streams),
    )
    own = Sides(nested)
    model = copy.deepcopy(own)
    assert mk.convert(model).replaced
    if called:
        assert_same(model, own, ITEMS, USER)
        assert fused_calls
    fused_calls.clear()
    for each in (model, own):
        user, item = each.lists()
        item.insert(0, user.pop(1))
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(each, own, ITEMS, USER)
    assert not fused_calls
    assert mk.convert(model).replaced  # tried anew
    assert_same(model, own, ITEMS, USER)
    assert fused_calls


@pytest.mark.usefixtures("fresh_compiler")
def test_another_list_that_grows(fused_calls: list[int]) -> None:
    """The routing is as it was: fused as before, and by the compiler once it is converted again."""

    class Tall(Sides):
        def __init__(self) -> None:
            super().__init__()
            self.towers = nn.ModuleList([nn.Linear(8, 1)])

    mk.convert.register(
        Tall,
        experts=lambda model: [[expert, "relu"] for experts in model.lists() for expert in experts],
        gates=lambda model: model.gates,
        routing=lambda model: mk.Routing([0, 0, 1, 1], [range(4)] * TASKS),
        gate_inputs=lambda model: [0] * TASKS,
        inputs=lambda model, *streams: streams,
        arguments=lambda model, streams: tuple(streams),
    )
    model = Tall()
    assert mk.convert(model).replaced
    model.towers.append(nn.Linear(8, 1))
    model(ITEMS, ITEMS)
    assert len(fused_calls) == 1
    (line,) = mk.convert(model).lines
    assert line.detail == "already converted"
    torch.compile(model, fullgraph=True, backend="eager")(ITEMS, ITEMS)
    assert len(fused_calls) == 2
