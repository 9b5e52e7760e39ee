"""nn.SNR against its definition, module by module; its routes, and what compact() leaves of it."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.nn.routes import RouteMap

MODES = pytest.mark.parametrize("mode", ["trans", "aver"])


def build(mode: str = "trans", spread: float = 2.0, **options: Any) -> mk.nn.SNR:
    """Ten features, two tasks, levels of four, three and two; at test time about half of the routes are open."""
    torch.manual_seed(0)
    arguments = {"in_features": 10, "num_tasks": 2, "subnet_units": (7, 6), "num_subnets": (4, 3, 2), **options}
    model = mk.nn.SNR(mode=mode, **arguments)
    for joint in model.joints:
        nn.init.normal_(joint.log_alpha, -2.2, spread)
    return model


def by_definition(model: mk.nn.SNR, x: Tensor, coding: list[Tensor]) -> list[Tensor]:
    """The network by its modules and the paper's sums."""
    streams = [x] * model.num_subnets[0]
    for level, joint, z in zip(model.levels, model.joints, coding, strict=True):
        u = [expert(stream) for expert, stream in zip(level.experts, streams, strict=True)]
        sent = [
            [x if joint.weight is None else x @ joint.weight[i, j].t() for j, x in enumerate(u)] for i in range(len(z))
        ]
        streams = [sum(z[i, j] * x for j, x in enumerate(row)) for i, row in enumerate(sent)]
    return streams


def noise_for(model: mk.nn.SNR, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(joint.log_alpha.shape, generator=generator) for joint in model.joints]


def gradients(model: nn.Module, outputs: Any) -> dict[str, Tensor]:
    loss = sum((k + 1) * v.square().sum() for k, v in enumerate(outputs))
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return dict(zip(names, found, strict=True))


@MODES
@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"batch_norm": True}, {"activation": "silu", "num_subnets": (5,)}, {"activation": "dice"}], ids=str
)
def test_outputs_and_gradients(mode: str, straight_through: bool, options: dict[str, Any]) -> None:
    model = build(mode, straight_through=straight_through, dtype=torch.float64, **options)
    x = torch.randn(9, 10, dtype=torch.float64)
    for training in (True, False):
        model.train(training)
        noise = noise_for(model) if training else None
        outputs = model(x, noise)
        expected = by_definition(model, x, model.sample(noise))
        assert [tuple(v.shape) for v in outputs] == [(9, 6), (9, 6)]
        torch.testing.assert_close(outputs, expected)
        got, want = gradients(model, outputs), gradients(model, expected)
        for name in want:
            torch.testing.assert_close(got[name], want[name], msg=lambda text, name=name: f"{name}: {text}")
        assert training or any((z == 0).any() for z in model.sample())


@MODES
def test_dropout_runs_the_modules(mode: str) -> None:
    model, x = build(mode, dropout=0.5), torch.randn(9, 10)
    assert not torch.equal(model(x, noise_for(model))[0], model(x, noise_for(model))[0])
    model.eval()
    torch.testing.assert_close(model(x), by_definition(model, x, model.sample()))


def test_one_draw_a_route_and_step_from_the_generator() -> None:
    model, x = build(), torch.randn(5, 10)
    torch.manual_seed(7)
    expected = [torch.rand(joint.log_alpha.shape) for joint in model.joints]
    torch.manual_seed(7)
    first, second = model(x), model(x)
    for a, b in zip(first, model(x, expected), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], second[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


def test_straight_through_rounds_and_keeps_the_gradient() -> None:
    model = build(straight_through=True, dtype=torch.float64)
    noise = noise_for(model)
    hard = model.sample(noise)
    soft = [mk.hard_concrete(joint.log_alpha, u) for joint, u in zip(model.joints, noise, strict=True)]
    for joint, h, s in zip(model.joints, hard, soft, strict=True):
        assert torch.equal(h, (s > 0.5).to(h.dtype))
        (through,) = torch.autograd.grad(h.sum(), joint.log_alpha)
        (plain,) = torch.autograd.grad(s.sum(), joint.log_alpha)
        assert torch.equal(through, plain) and plain.any()


def test_l0_penalty_closes_routes() -> None:
    model, x = build(spread=0.1, init_log_alpha=0.0), torch.randn(64, 10)
    expected = sum(mk.l0_penalty(joint.log_alpha) for joint in model.joints)
    torch.testing.assert_close(model.l0_penalty(), expected)
    for joint in model.joints:
        nn.init.constant_(joint.log_alpha, 1.0)
    before = model.routes()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        loss = sum((v.sum(1) - x[:, 0]).square().mean() for v in model(x)) + 0.1 * model.l0_penalty()
        loss.backward()
        optimizer.step()
    after = model.routes()
    assert before.num_open == before.num_routes == 22 and after.num_open < 15


# Routes -------------------------------------------------------------------------------------------------------------


def set_coding(model: mk.nn.SNR, *coding: list[list[float]]) -> None:
    """Opens and closes routes: log_alpha far out, except where z is to be one half."""
    for joint, values in zip(model.joints, coding, strict=True):
        with torch.no_grad():
            joint.log_alpha.copy_(torch.tensor(values).sub(0.5).mul(80))


def small(**options: Any) -> mk.nn.SNR:
    return build(num_subnets=(3, 2), **options)


def test_route_map() -> None:
    model = small()
    set_coding(model, [[1, 0, 0], [0, 0.5, 0]], [[0, 0.5], [0, 1]])
    routes = model.routes()
    assert routes.coding == (((1.0, 0.0, 0.0), (0.0, 0.5, 0.0)), ((0.0, 0.5), (0.0, 1.0)))
    assert (routes.num_open, routes.num_routes) == (4, 10)
    assert routes.read() == ((1,), (1,))
    assert str(routes).splitlines() == [
        "SNR-Trans: 4 of 10 routes open",
        "level 1 → level 2",
        "       0  1  2",
        "    0  █  ·  ·",
        "    1  ·  ▄  ·",
        "  nobody reads 0, 2",
        "level 2 → tasks",
        "       0  1",
        "    0  ·  ▄",
        "    1  ·  █",
        "  nobody reads 0",
    ]
    assert model.training, "routes() leaves the mode alone"


def test_an_open_route_has_a_bar() -> None:
    """However little it lets through."""
    assert "  0  ▁  ·" in str(RouteMap("aver", (((0.01, 0.0),),)))


CODINGS = {
    "random": None,
    "all open": ([[1, 1, 1], [0.5, 1, 1]], [[1, 1], [1, 0.5]]),
    "an unread sub-network": ([[1, 0, 0.5], [1, 0, 0]], [[1, 0.5], [0.5, 0]]),
    "a task without any": ([[1, 0, 0.5], [1, 0, 0]], [[1, 0.5], [0, 0]]),
    "a sub-network that reads nothing": ([[0, 0, 0], [1, 0, 0]], [[1, 0.5], [0.5, 1]]),
    "no routes at the bottom": ([[0, 0, 0], [0, 0, 0]], [[1, 0.5], [0.5, 1]]),
    "no routes at the top": ([[1, 0, 0.5], [1, 0, 0]], [[0, 0], [0, 0]]),
}


@MODES
@pytest.mark.parametrize("coding", CODINGS.values(), ids=CODINGS)
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("rows", [1, 40])
def test_compact_is_the_same_bit_for_bit(mode: str, coding: Any, batch_norm: bool, rows: int, backend: str) -> None:
    model = small(mode=mode, batch_norm=batch_norm, dtype=torch.float64).eval()
    if coding is not None:
        set_coding(model, *coding)
    x, compact = torch.randn(rows, 10, dtype=torch.float64), model.compact()
    with mk.use_backend(backend), torch.no_grad():
        got, expected = compact(x), model(x)
    assert len(got) == 2 and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("isa", _extension.instruction_sets() or [""])
@pytest.mark.parametrize("width", [2, 4, 5, 8, 9, 16, 17])
def test_compact_is_the_same_whatever_outputs_go_together(isa: str, width: int) -> None:
    """Outputs that sum the same inputs go together, and compact() leaves others of them."""
    model = mk.nn.SNR(
        32, num_tasks=3, subnet_units=(width,), num_subnets=(4, 4), mode="aver", dtype=torch.float64
    ).eval()
    x = torch.randn(16, 32, dtype=torch.float64)
    for _ in range(20):
        with torch.no_grad(), _extension.instruction_set(isa) if isa else contextlib.nullcontext():
            for joint in model.joints:
                joint.log_alpha.copy_(torch.randn_like(joint.log_alpha) * 3)
            assert all(torch.equal(a, b) for a, b in zip(model.compact()(x), model(x), strict=True))


def test_noise_is_for_every_level() -> None:
    model = small().train()
    with pytest.raises(TypeError, match=r"noise\[1\] must be a tensor \[I, J\], got None"):
        model(torch.randn(4, 10), [noise_for(model)[0], None])


def test_compact_leaves_out_what_is_dead() -> None:
    model = small()
    set_coding(model, [[1, 0, 0], [0, 0.5, 0]], [[0, 0.5], [0, 1]])
    compact = model.compact()
    assert not compact.training and model.training
    assert [len(level.experts) for level in compact.levels] == [1, 1]
    assert [len(joint.weights) for joint in compact.joints] == [1, 2]
    x = torch.randn(5, 10)
    torch.testing.assert_close(compact(x), model.eval()(x))
    before = [v.clone() for v in compact(x)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(compact(x), before, strict=True)), "its parameters are its own"


@MODES
@pytest.mark.parametrize("name", ["no routes at the bottom", "no routes at the top"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("own", [torch.float32, torch.float64])
def test_what_reads_nothing_has_the_dtype_of_the_network(
    own: torch.dtype, autocast: torch.dtype | None, name: str, mode: str
) -> None:
    model = small(mode=mode, dtype=own).eval()
    set_coding(model, *CODINGS[name])
    compact = model.compact()
    with torch.autocast("cpu", autocast, enabled=autocast is not None), torch.no_grad():
        x = torch.randn(5, 10, dtype=own)
        expected = model(x)
        assert expected[0].dtype == (autocast if autocast is not None and own == torch.float32 else own)
        assert [v.dtype for v in compact(x)] == [v.dtype for v in expected]
        other = torch.float64 if own == torch.float32 else torch.float32
        with pytest.raises(TypeError, match=f"x must have the dtype of the network, {own}, got {other}"):
            compact(x.to(other))
    with pytest.raises(ValueError, match="x must be on the device of the network, cpu, got meta"):
        compact(x.to("meta"))


# Copies and modes ---------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(mode: str, duplicate: Any) -> None:
    model, x = build(mode).eval(), torch.randn(5, 10)
    for original in (model, model.compact()):
        for a, b in zip(duplicate(original)(x), original(x), strict=True):
            assert torch.equal(a, b)


@MODES
def test_state_dict(mode: str, tmp_path: Any) -> None:
    model, x = build(mode).eval(), torch.randn(5, 10)
    other = mk.nn.SNR(10, 2, (7, 6), (4, 3, 2), mode).eval()
    assert "joints.0.log_alpha" in model.state_dict() and "levels.2.experts.1.linears.1.weight" in model.state_dict()
    torch.save(model.state_dict(), tmp_path / "snr.pt")
    other.load_state_dict(torch.load(tmp_path / "snr.pt", weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(other(x), model(x), strict=True))
    compact, again = model.compact(), model.compact()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.load_state_dict(compact.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again(x), model(x), strict=True))


@MODES
def test_the_state_of_other_routes(mode: str) -> None:
    """Matrices belong to the routes that were open; where there are none, z says all."""
    models = [mk.nn.SNR(6, 2, (5, 4), (2,), mode).eval() for _ in range(2)]
    with torch.no_grad():
        for i, model in enumerate(models):
            model.joints[0].log_alpha.fill_(2.0)[i, i] = -9.0
    serving, new = (model.compact() for model in models)
    if mode == "trans":
        with pytest.raises(RuntimeError, match=r"joints.0.z must be non-zero for the routes that are open here"):
            serving.load_state_dict(new.state_dict())
    else:
        serving.load_state_dict(new.state_dict())
        x = torch.randn(3, 6)
        assert all(torch.equal(a, b) for a, b in zip(serving(x), new(x), strict=True))


@MODES
def test_autocast_functional_call_and_meta(mode: str) -> None:
    model, x = build(mode), torch.randn(5, 10)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(x, noise_for(model))
    assert {v.dtype for v in outputs} == {torch.bfloat16}
    sum(v.sum() for v in outputs).backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert not any(v.any() for v in torch.func.functional_call(model, zeros, (x,)))
    with torch.device("meta"):
        abstract = mk.nn.SNR(10, 2, (7, 6), (4, 3), mode)
    assert abstract(torch.empty(5, 10, device="meta"))[1].shape == (5, 6)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@MODES
def test_compile(mode: str) -> None:
    model, x = build(mode, num_subnets=(3, 2)), torch.randn(9, 10)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    noise = noise_for(model)
    got, expected = gradients(model, compiled(x, noise)), gradients(model, model(x, noise))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])
    compact = model.eval().compact()
    torch.testing.assert_close(torch.compile(compact, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning")
def test_export_with_a_dynamic_batch() -> None:
    model = small().eval()
    dynamic = ({0: torch.export.Dim("rows", min=2, max=4096)},)
    program = torch.export.export(model.compact(), (torch.randn(9, 10),), dynamic_shapes=dynamic)
    x = torch.randn(33, 10)
    torch.testing.assert_close(program.module()(x), model(x))


# Mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"num_subnets": ()}, ValueError, "num_subnets must hold at least one level's number"),
        ({"num_subnets": 4}, TypeError, "num_subnets must be a sequence of ints, each a level's number, got int"),
        ({"num_subnets": (4, 0)}, ValueError, r"num_subnets\[1\] must be at least 1, got 0"),
        ({"subnet_units": ()}, ValueError, "subnet_units must hold at least one"),
        ({"mode": "sum"}, ValueError, "mode must be 'trans' or 'aver', got 'sum'"),
        ({"mode": None}, TypeError, "mode must be 'trans' or 'aver', got NoneType"),
        ({"zeta": 1}, ValueError, "zeta must be above 1"),
        ({"init_log_alpha": "0"}, TypeError, "init_log_alpha must be a number, got str"),
        ({"init_log_alpha": float("nan")}, ValueError, "init_log_alpha must be finite, got nan"),
        ({"init_log_alpha": float("-inf")}, ValueError, "init_log_alpha must be finite, got -inf"),
        ({"straight_through": 1}, TypeError, "straight_through must be True or False, got int"),
        ({"activation": "swish"}, ValueError, "activation must be one of"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(**{"mode": "trans", **options})


def test_wrong_inputs() -> None:
    model, x = build(), torch.randn(5, 10)
    with pytest.raises(ValueError, match=r"x must have shape \[B, 10\], got \[5, 9\]"):
        model(x[:, 1:])
    with pytest.raises(TypeError, match="noise must be a sequence with a tensor for each level, got Tensor"):
        model(x, noise_for(model)[0])
    with pytest.raises(ValueError, match="noise must hold a tensor for each of 3 levels, got 2"):
        model(x, noise_for(model)[:2])
    with pytest.raises(ValueError, match=r"noise must have the shape of log_alpha, \[3, 4\], got \[2, 2\]"):
        model(x, noise_for(model)[::-1])
