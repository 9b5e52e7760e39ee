"""mk.optim.GramWeighted: TorchJD's weightings against TorchJD's own steps, other functions, and what goes wrong."""

from __future__ import annotations

import copy
import inspect
import pickle
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchjd import aggregation as jd
from torchjd.autojac import backward, jac_to_grad, mtl_backward

import mtlkernels as mk
from tests.convert.models import by_name, features, rechub_ple
from tests.optim.model import TASKS, Model, assert_close, expected, grads_of

# By its name: TorchJD's aggregator and the weighting in it. GradVac and PCGrad draw an order.
METHODS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "pcgrad": (jd.PCGrad, jd.PCGradWeighting),
    "upgrad": (jd.UPGrad, jd.UPGradWeighting),
    "mgda": (jd.MGDA, jd.MGDAWeighting),
    "cagrad": (lambda: jd.CAGrad(0.5), lambda: jd.CAGradWeighting(0.5)),
    "gradvac": (jd.GradVac, jd.GradVacWeighting),
    "dualproj": (jd.DualProj, jd.DualProjWeighting),
    "aligned-mtl": (jd.AlignedMTL, jd.AlignedMTLWeighting),
}


def rows_of(losses: list[Tensor], parameters: list[Tensor]) -> Tensor:
    """The tasks' gradients [T, P], of losses whose graphs go on."""
    grads = [
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in losses
    ]
    return torch.stack([flat(row) for row in grads])


def flat(grads: Any) -> Tensor:
    return torch.cat([grad.flatten() for grad in grads])


class Ple(nn.Module):
    """mk.nn.PLE with a tower a task, on a batch of its own, in float64."""

    def __init__(self, tasks: int = 3) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.trunk = mk.nn.PLE(6, tasks, (8, 4), num_specific=1, num_shared=2, activation="tanh")
        self.towers = nn.ModuleList(nn.Linear(4, 1) for _ in range(tasks))
        self.double()
        self.x = torch.randn(12, 6, dtype=torch.float64)
        self.y = torch.randn(tasks, 12, 1, dtype=torch.float64)

    def losses(self, hidden: Any) -> list[Tensor]:
        return [(f(h) - y).square().mean() for f, h, y in zip(self.towers, hidden, self.y, strict=True)]

    def forward(self) -> list[Tensor]:
        return self.losses(self.trunk(self.x))


@pytest.mark.parametrize("name", METHODS)
def test_steps_of_torchjd(name: str) -> None:
    """Three steps, so that state counts; towers get their own gradients there, which is the sum here."""
    make_aggregator, make_weighting = METHODS[name]
    ours, theirs = Ple(), Ple()
    shared = list(ours.trunk.parameters())
    optimizer = mk.optim.GramWeighted(
        torch.optim.SGD(ours.parameters(), 0.5), make_weighting(), shared=shared, reduction="sum"
    )
    aggregator, sgd = make_aggregator(), torch.optim.SGD(theirs.parameters(), 0.5)
    conflicts = False
    for step in range(3):
        optimizer.zero_grad()
        torch.manual_seed(step)
        gram = optimizer.backward(ours())
        conflicts |= bool((gram < 0).any())
        sgd.zero_grad()
        hidden = theirs.trunk(theirs.x)
        mtl_backward(theirs.losses(hidden), features=hidden)
        torch.manual_seed(step)
        jac_to_grad(list(theirs.trunk.parameters()), aggregator)
        for (path, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad, msg=lambda text, path=path: f"{path}: {text}")
        optimizer.step()
        sgd.step()
    assert conflicts, "nothing conflicts in this test"


@pytest.mark.parametrize("name", METHODS)
def test_a_converted_model(name: str) -> None:
    """torch-rechub's PLE after mk.convert, against TorchJD's step on the library's own modules."""
    make_aggregator, make_weighting = METHODS[name]
    theirs = rechub_ple().double()
    ours = copy.deepcopy(theirs)
    assert mk.convert(ours, force=True).replaced
    rows = by_name(features(24))
    targets = (torch.rand(24, 3, generator=torch.Generator().manual_seed(4)) < 0.5).double()

    def losses(model: Any) -> list[Tensor]:
        return list(nn.functional.binary_cross_entropy(model(rows), targets, reduction="none").mean(0))

    optimizer = mk.optim.GramWeighted(torch.optim.SGD(ours.parameters()), make_weighting())
    torch.manual_seed(0)
    optimizer.backward(losses(ours))
    parameters = list(theirs.parameters())
    # One by one: embeddings that are looked up, and batch norms, are not made for TorchJD's vmap.
    backward(losses(theirs), inputs=parameters, parallel_chunk_size=1)
    torch.manual_seed(0)
    jac_to_grad(parameters, make_aggregator())
    for (path, parameter), other in zip(ours.named_parameters(), parameters, strict=True):
        found = torch.zeros_like(other) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, other.grad, msg=lambda text, path=path: f"{path}: {text}")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", ["zero task", "all zero", "twins", "one task"])
def test_singular_matrices(case: str, name: str) -> None:
    """Where TorchJD's aggregator makes something of them, this is what is written."""
    make_aggregator, make_weighting = METHODS[name]
    weight = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([[1.0, -2.0, 0.5], [-1.5, 1.0, 0.3], [0.2, 0.1, 3.0]], dtype=torch.float64)
    g = {"zero task": g * g.new_tensor([[1], [0], [1]]), "all zero": 0 * g, "twins": g[[0, 1, 1]], "one task": g[:1]}[
        case
    ]
    optimizer = mk.optim.GramWeighted(torch.optim.SGD([weight]), make_weighting())
    torch.manual_seed(0)
    gram = optimizer.backward([row @ weight for row in g])
    torch.testing.assert_close(gram, g @ g.T)
    torch.manual_seed(0)
    torch.testing.assert_close(weight.grad, make_aggregator()(g))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_function(reduction: str, batched: bool, backend: str) -> None:
    """All tasks' gradients of one norm; heads and what no task reaches as ever."""
    model = Model()
    shared, others = model.shared(), [*model.heads.parameters(), *model.unused.parameters()]
    optimizer = mk.optim.GramWeighted(
        torch.optim.SGD(model.parameters()),
        lambda gram: gram.diagonal().rsqrt(),
        shared=shared,
        reduction=reduction,
        batched=batched,
    )
    with mk.use_backend(backend):
        gram = optimizer.backward(model())
    found, plain = flat(grads_of(shared)), grads_of(others)
    rows = rows_of(model(), shared)
    torch.testing.assert_close(gram, rows @ rows.T)
    torch.testing.assert_close(found, (rows / rows.norm(dim=1, keepdim=True)).sum(0))
    assert_close(plain, expected(model, shared, others, reduction=reduction)[len(shared) :])
    assert plain[-1] is None


@pytest.mark.parametrize(
    "weights",
    [
        torch.tensor([1, 2, 3]),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16),
        torch.tensor([3.0, 2.0, 1.0]).flip(0).requires_grad_(),
        torch.tensor([[1.0, 2.0, 3.0]] * 2).T[:, 0],
    ],
    ids=["integers", "float16", "with a gradient", "strided"],
)
def test_weights_of_other_kinds(weights: Tensor) -> None:
    model, kept = Model(), weights.detach().clone()
    optimizer = mk.optim.GramWeighted(torch.optim.SGD(model.parameters()), lambda gram: weights, shared=model.shared())
    optimizer.backward(model())
    found = flat(grads_of(model.shared()))
    torch.testing.assert_close(found, torch.tensor([1.0, 2, 3], dtype=torch.float64) @ rows_of(model(), model.shared()))
    assert torch.equal(weights, kept)


def test_how_it_is_called() -> None:
    """Once a call, without gradients, with a matrix of its own."""
    model, seen = Model(), []

    def weighting(gram: Tensor) -> Tensor:
        seen.append((torch.is_grad_enabled(), gram.dtype, gram.device, gram.clone()))
        return gram.zero_()[0] + 1

    optimizer = mk.optim.GramWeighted(torch.optim.SGD(model.parameters()), weighting)
    gram = optimizer.backward(model())
    ((enabled, dtype, device, given),) = seen
    assert not enabled and dtype == torch.float64 and device == gram.device
    assert torch.equal(given, gram) and gram.any()
    assert optimizer.weighting is weighting


def test_accumulation_and_sparse_embeddings() -> None:
    model = Model(sparse=True)
    optimizer = mk.optim.GramWeighted(
        torch.optim.SGD(model.parameters()), lambda gram: gram.new_tensor([1.0, 2.0, -1.0]), shared=model.shared()
    )
    optimizer.backward(model())
    assert model.embedding is not None and model.embedding.weight.grad is not None
    assert model.embedding.weight.grad.is_sparse
    once = grads_of(model.shared())
    a, b, c = model()
    wanted = torch.autograd.grad(a + 2 * b - c, model.shared())
    assert_close(once, [grad.to_dense() for grad in wanted])
    optimizer.backward(model())
    assert_close(grads_of(model.shared()), [2 * grad for grad in once])  # type: ignore[operator]


@pytest.mark.parametrize("returned", [lambda gram: gram.new_tensor([1.0, 2.0, 3.0]), jd.UPGradWeighting()])
def test_scaler(returned: Any) -> None:
    """The matrix is that of unscaled gradients; ``.grad`` is scaled."""
    model, plain = Model(torch.float32), Model(torch.float32)
    plain.load_state_dict(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    seen: list[Tensor] = []

    def weighting(gram: Tensor) -> Tensor:
        seen.append(gram)
        weights: Tensor = returned(gram)
        return weights

    scaled, unscaled = (
        mk.optim.GramWeighted(torch.optim.SGD(m.parameters(), 0.1), weighting, shared=m.shared())
        for m in (model, plain)
    )
    torch.testing.assert_close(scaled.backward(model(), scaler=scaler), unscaled.backward(plain()))
    torch.testing.assert_close(seen[0], seen[1])
    for a, b in zip(grads_of(model.parameters()), grads_of(plain.parameters()), strict=True):
        if a is not None:
            torch.testing.assert_close(a / 1024, b)
    scaler.step(scaled)
    scaler.update()
    unscaled.step()
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))


@pytest.mark.parametrize("name", METHODS)
def test_overflow_skips_the_step(name: str) -> None:
    """A weighting, which may raise for such a matrix or make ordinary weights of it, is not asked."""
    model = Model(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    weighting = METHODS[name][1]()
    asked: list[Any] = []
    weighting.register_forward_hook(lambda *args: asked.append(args))
    optimizer = mk.optim.GramWeighted(torch.optim.SGD(model.parameters(), 0.1), weighting, shared=model.shared())
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.y.mul_(100)
    optimizer.backward(model(), scaler=scaler)
    assert all(bool(grad.isnan().all()) for grad in grads_of(model.shared()) if grad is not None)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert scaler.get_scale() == 2.0**126 and not asked


def quantized(gram: Tensor) -> Tensor:
    return torch.quantize_per_tensor(gram[0].float(), 1.0, 0, torch.qint8)


WRONG: list[tuple[str, Any, type[Exception], str]] = [
    ("list", lambda gram: [1.0] * 3, TypeError, r"weighting must return a tensor of weights \[T\], got list"),
    ("none", lambda gram: None, TypeError, r"weighting must return a tensor of weights \[T\], got NoneType"),
    (
        "matrix",
        lambda gram: gram,
        ValueError,
        r"weighting must return a weight a task, of shape \[3\], got shape \[3, 3\]",
    ),
    ("column", lambda gram: gram[:, :1], ValueError, r"shape \[3\], got shape \[3, 1\]"),
    ("scalar", lambda gram: gram.sum(), ValueError, r"shape \[3\], got shape \[\]"),
    ("complex", lambda gram: gram[0] * 1j, TypeError, "weighting must return .* real numbers, got torch.complex128"),
    ("bool", lambda gram: gram[0] > 0, TypeError, "weighting must return .* real numbers, got torch.bool"),
    ("sparse", lambda gram: gram[0].to_sparse(), TypeError, "weighting must return a dense .* torch.sparse_coo"),
    ("quantized", quantized, TypeError, "weighting must return a dense tensor of real numbers, got torch.qint8"),
    ("meta", lambda gram: gram[0].to("meta"), ValueError, "weighting must return weights with values, .*, got some on"),
    ("nan", lambda gram: gram[0] * torch.nan, ValueError, r"weighting must return finite .* got \[nan, nan, nan\] for"),
    ("inf", lambda gram: gram.new_tensor([1, torch.inf, 1]), ValueError, r"got \[1.0, inf, 1.0\] for \[\["),
    ("raises", lambda gram: gram[7], IndexError, "out of bounds"),
]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(("weighting", "kind", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_what_a_weighting_may_not_return(weighting: Any, kind: type[Exception], message: str) -> None:
    model = Model()
    sgd = torch.optim.SGD(model.parameters())
    mk.optim.GramWeighted(sgd, lambda gram: gram[0]).backward(model())
    before = grads_of(model.parameters())
    with pytest.raises(kind, match=message):
        mk.optim.GramWeighted(sgd, weighting, shared=model.shared()).backward(model())
    assert_close(grads_of(model.parameters()), before, rtol=0, atol=0)


def test_what_is_no_weighting() -> None:
    sgd = torch.optim.SGD(Model().parameters())
    words = r"weighting must be a function from a Gram matrix \[T, T\] to weights \[T\], got "
    for wrong, end in (
        (None, "NoneType"),
        ("upgrad", "str"),
        (jd.UPGradWeighting, "the class UPGradWeighting: make an instance of it"),
        (jd.UPGrad(), "TorchJD's aggregator UPGrad, which takes a Jacobian: give UPGradWeighting"),
        (jd.Mean(), "TorchJD's aggregator Mean, which takes a Jacobian$"),
    ):
        with pytest.raises(TypeError, match=words + end):
            mk.optim.GramWeighted(sgd, wrong)  # type: ignore[arg-type]
    wrapped = mk.optim.GramWeighted(sgd, lambda gram: gram[0])
    for wrapper in (lambda: mk.optim.PCGrad(wrapped), lambda: mk.optim.GramWeighted(wrapped, lambda gram: gram[0])):
        with pytest.raises(TypeError, match="optimizer must be one that is not wrapped yet, got GramWeighted"):
            wrapper()
    for options, kind, message in (
        ({"reduction": "max"}, ValueError, "reduction must be 'sum' or 'mean', got 'max'"),
        ({"batched": 1}, TypeError, "batched must be True.* got int"),
    ):
        with pytest.raises(kind, match=message):
            mk.optim.GramWeighted(sgd, lambda gram: gram[0], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_state_of_a_weighting(clone: Callable[[Any], Any]) -> None:
    """It goes with copies, and not into the optimizer's checkpoint."""
    model = Model()
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    optimizer = mk.optim.GramWeighted(sgd, jd.GradVacWeighting(), shared=model.shared())
    optimizer.backward(model())
    optimizer.step()
    state = optimizer.weighting.state_dict()["_phi_t"].clone()  # type: ignore[attr-defined]
    assert state.any()
    assert optimizer.state_dict().keys() == sgd.state_dict().keys()
    other_model, other = clone((model, optimizer))
    assert other.weighting is not optimizer.weighting
    assert torch.equal(other.weighting.state_dict()["_phi_t"], state)
    for m, o in ((model, optimizer), (other_model, other)):
        torch.manual_seed(1)
        o.zero_grad()
        o.backward(m())
        o.step()
    assert not torch.equal(other.weighting.state_dict()["_phi_t"], state)
    for a, b in zip(model.parameters(), other_model.parameters(), strict=True):
        assert a is not b and torch.equal(a, b)


def test_pcgrad_is_one_of_them() -> None:
    """Its own call, the common one, and its weighting elsewhere write the same bits."""
    found = []
    for which in range(3):
        model = Model()
        torch.nn.init.constant_(model.trunk[0].bias, 0.1)
        sgd = torch.optim.SGD(model.parameters())
        for i, parameter in enumerate(model.parameters()):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        optimizer = mk.optim.PCGrad(sgd, shared=model.shared(), max_norm=0.5)
        assert isinstance(optimizer, mk.optim.GramWeighted)
        if which == 2:
            weighted = mk.optim.GramWeighted(sgd, optimizer.weighting, shared=model.shared())
            weighted.backward(model())
        else:
            (optimizer.pc_backward, optimizer.backward)[which](model())
        found.append(grads_of(model.parameters()))
    assert_close(found[1], found[0], rtol=0, atol=0)
    assert_close(found[2], found[0], rtol=0, atol=0)


def test_the_example_of_the_docstring() -> None:
    text = inspect.cleandoc(mk.optim.GramWeighted.__doc__ or "").partition("::\n\n")[2].partition("\n\nand a")[0]
    trunk, towers = nn.Linear(3, 4), nn.ModuleList(nn.Linear(4, 1) for _ in range(TASKS))
    h = trunk(torch.randn(5, 3))
    names: dict[str, Any] = {"mk": mk, "torch": torch, "trunk": trunk, "towers": towers}
    exec(textwrap.dedent(text), names | {"losses": [tower(h).square().mean() for tower in towers]})
    assert all(p.grad is not None for p in (*trunk.parameters(), *towers.parameters()))
