"""The gradients that mk.optim.PCGrad writes, against direct projection of per-task gradients."""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import textwrap
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from tests.optim.model import TASKS, Model, assert_close, expected, grads_of

OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"include_self": True},
    {"max_norm": 0.3},
    {"normalize": True, "reduction": "sum"},
    {"project": False},
    {"eps": 0.1},
]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_parameters_shared(options: dict[str, Any], batched: bool, backend: str) -> None:
    model = Model()
    parameters = list(model.parameters())
    optimizer = mk.optim.PCGrad(torch.optim.SGD(parameters), batched=batched, **options)
    with mk.use_backend(backend):
        optimizer.pc_backward(model())
    found = grads_of(parameters)
    assert_close(found, expected(model, parameters, [], **options))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_heads_get_their_ordinary_gradients(reduction: str, batched: bool) -> None:
    model = Model()
    others = [*model.heads.parameters(), *model.unused.parameters()]
    optimizer = mk.optim.PCGrad(
        torch.optim.SGD(model.parameters()), shared=model.trunk.parameters(), reduction=reduction, batched=batched
    )
    gram = optimizer.pc_backward(model())
    found = grads_of([*model.shared(), *others])
    wanted = expected(model, model.shared(), others, reduction=reduction)
    assert_close(found, wanted)
    assert found[-1] is None
    rows = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(model()[i], model.shared())]) for i in (0, 1, 2)]
    )
    torch.testing.assert_close(gram, rows @ rows.T)
    assert (gram < 0).any(), "nothing conflicts in this test"


def test_heads_that_several_tasks_reach() -> None:
    """An other parameter that all tasks reach is added up, and nothing is projected."""
    model = Model()
    others = list(model.trunk.parameters())
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), shared=model.heads.parameters())
    optimizer.pc_backward(model())
    found = grads_of([*model.heads.parameters(), *others])
    assert_close(found, expected(model, list(model.heads.parameters()), others))


@pytest.mark.parametrize("batched", [False, True])
def test_gradients_share_no_memory(batched: bool) -> None:
    """Autograd hands out one tensor for a and b here, and expanded ones."""
    a, b = (torch.zeros(3, requires_grad=True) for _ in range(2))
    optimizer = mk.optim.PCGrad(torch.optim.SGD([a, b]), shared=[torch.zeros(1)], reduction="sum", batched=batched)
    optimizer.pc_backward([(a + b).sum(), ((a + b) * 2).sum()])
    a.grad.add_(1)  # type: ignore[union-attr]
    assert b.grad.tolist() == [3, 3, 3]  # type: ignore[union-attr]
    a.grad[0] = 7  # type: ignore[union-attr,index]
    assert a.grad.tolist() == [7, 4, 4]  # type: ignore[union-attr]
    one = mk.optim.PCGrad(torch.optim.SGD([a, b]), shared=[torch.zeros(1)], reduction="sum", batched=batched)
    one.zero_grad()
    one.pc_backward([(a + b).sum()])
    a.grad[0] = 7  # type: ignore[union-attr,index]
    assert b.grad.tolist() == [1, 1, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_accumulate(sparse: bool) -> None:
    model = Model(sparse=sparse)
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), shared=model.shared())
    optimizer.pc_backward(model())
    once, kept = grads_of(model.parameters()), [p.grad for p in model.trunk.parameters()]
    optimizer.pc_backward(model())
    assert_close(grads_of(model.parameters()), [None if g is None else 2 * g for g in once])
    assert all(p.grad is g for p, g in zip(model.trunk.parameters(), kept, strict=True)), "added in place"


def _made_in_inference(parameter: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.zeros_like(parameter)


@pytest.mark.parametrize(
    "earlier",
    [lambda parameter: parameter.new_zeros(1).expand_as(parameter), _made_in_inference],
    ids=["expanded", "made in inference mode"],
)
def test_gradients_beside_one_that_nothing_is_written_to(earlier: Any) -> None:
    """Into which PyTorch would not write, behind others that it has written to."""
    model = Model()
    other, last = copy.deepcopy(model), model.trunk[2]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    last.weight.grad = earlier(last.weight)
    for each in (model, other):
        generator = torch.Generator().manual_seed(0)
        mk.optim.PCGrad(torch.optim.SGD(each.parameters()), generator=generator).pc_backward(each())
    for mine, right in zip(grads_of(model.trunk.parameters()), grads_of(other.trunk.parameters()), strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, right)


def test_a_row_that_steps_over_nothing_is_written_to() -> None:
    """Of one entry along a dimension, whose stride says nothing."""
    weight = torch.ones(1, 3, requires_grad=True)
    weight.grad = kept = torch.zeros(3).as_strided((1, 3), (0, 1))
    assert kept.stride() == (0, 1)
    mk.optim.PCGrad(torch.optim.SGD([weight])).pc_backward([weight.sum()])
    assert weight.grad is kept and kept.tolist() == [[1, 1, 1]]


def test_sparse_and_dense_gradients_accumulate() -> None:
    weight = torch.zeros(6, 2, requires_grad=True)
    optimizer = mk.optim.PCGrad(torch.optim.SGD([weight]))
    ids = torch.tensor([1, 4, 1])

    def sparse() -> Tensor:
        return nn.functional.embedding(ids, weight, sparse=True).sum()

    wanted = torch.zeros(6, 2)
    for make, share in ((sparse, None), (weight.sum, 1), (sparse, None)):
        optimizer.pc_backward([make()])
        wanted += 1 if share else torch.tensor([0, 2, 0, 0, 1, 0.0])[:, None]
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad.to_dense(), wanted)
    weight.grad = torch.zeros(6, 2)
    optimizer.pc_backward([sparse()])
    assert not weight.grad.is_sparse


def test_sparse_embeddings_with_sparse_adam() -> None:
    model, plain = Model(sparse=True), Model(sparse=True)
    plain.load_state_dict(model.state_dict())
    assert model.embedding and plain.embedding
    dense = [p for name, p in model.named_parameters() if "embedding" not in name]
    adam = torch.optim.Adam(dense, 0.1)
    sparse_adam = torch.optim.SparseAdam(model.embedding.parameters(), 0.1)
    optimizer = mk.optim.PCGrad(adam, shared=model.shared(), beside=[sparse_adam])
    optimizer.pc_backward(model())
    assert model.embedding.weight.grad is not None and model.embedding.weight.grad.is_sparse
    assert model.embedding.weight.grad.is_coalesced()
    found = grads_of(model.shared())
    optimizer.step()
    assert torch.equal(model.embedding.weight, plain.embedding.weight), "the other optimizer's step is the caller's"
    sparse_adam.step()
    assert_close(found, expected(plain, plain.shared(), []))
    untouched = sorted(set(range(50)) - set(model.ids.tolist()))
    assert torch.equal(model.embedding.weight[untouched], plain.embedding.weight[untouched])
    assert not torch.equal(model.embedding.weight, plain.embedding.weight)


def test_sparse_adam_itself_is_wrapped() -> None:
    model = Model(sparse=True)
    assert model.embedding
    optimizer = mk.optim.PCGrad(torch.optim.SparseAdam(model.embedding.parameters(), 0.1))
    before = model.embedding.weight.clone()
    optimizer.pc_backward(model())
    optimizer.step()
    assert not torch.equal(before, model.embedding.weight)
    assert model.trunk[0].weight.grad is None


def test_sparse_others_are_added_up_sparse() -> None:
    model = Model(sparse=True)
    assert model.embedding
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), shared=model.trunk.parameters())
    optimizer.pc_backward(model())
    grad = model.embedding.weight.grad
    assert grad is not None and grad.is_sparse
    assert grad._nnz() == len(model.ids.unique()), "not once a task"
    found = grads_of([model.embedding.weight])
    assert_close(found, expected(model, list(model.trunk.parameters()), [model.embedding.weight])[-1:])
    both = torch.zeros(6, 2, requires_grad=True)
    optimizer = mk.optim.PCGrad(torch.optim.SGD([both]), shared=[torch.zeros(1)])
    lookup = nn.functional.embedding(torch.tensor([1, 1]), both, sparse=True).sum()
    optimizer.pc_backward([lookup, both.sum(), lookup, both.sum()])
    assert both.grad is not None and both.grad[:, 0].tolist() == [0.5, 1.5, 0.5, 0.5, 0.5, 0.5]


def test_the_graph_is_freed_and_nothing_else_is_kept() -> None:
    model = Model()
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), shared=model.trunk.parameters())
    losses = model()
    optimizer.pc_backward(losses)
    with pytest.raises(RuntimeError, match="second time"):
        losses[-1].backward()
    references = [weakref.ref(loss) for loss in losses]
    del losses
    gc.collect()
    assert [reference() for reference in references] == [None] * TASKS


def test_gradients_of_others_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass begins when those of all passes before are gone."""
    model, seen = Model(), []
    compute = torch.autograd.grad

    def observed(loss: Tensor, inputs: list[Tensor], **options: Any) -> Any:
        assert all(reference() is None for reference in seen)
        found = compute(loss, inputs, **options)
        seen.extend(weakref.ref(g) for g, p in zip(found, inputs, strict=True) if p.shape == (1, 4) and g is not None)
        return found

    monkeypatch.setattr(torch.autograd, "grad", observed)
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), shared=model.trunk.parameters())
    optimizer.pc_backward(model())
    assert len(seen) == TASKS


def test_a_vector_of_losses() -> None:
    model = Model()
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()))
    optimizer.pc_backward(torch.stack(model()))
    found = grads_of(model.parameters())
    assert_close(found, expected(model, list(model.parameters()), []))
    optimizer.zero_grad()
    optimizer.pc_backward([loss.reshape(1) for loss in model()])
    assert_close(grads_of(model.parameters()), found)


@pytest.mark.parametrize("batched", [None, False, True])
def test_losses_of_one_element(batched: bool | None) -> None:
    """A loss of any shape counts as the scalar that it holds."""
    weight, found = torch.tensor([1.0, -2.0], requires_grad=True), []
    optimizer = mk.optim.PCGrad(torch.optim.SGD([weight]), batched=batched)
    for shape in ((), (1,), (1, 1)):
        optimizer.zero_grad()
        losses = [(weight * torch.tensor([1.0, 3.0])).sum(), weight.square().sum()]
        optimizer.pc_backward([loss.reshape(shape) for loss in losses])
        found += grads_of([weight])
    assert_close(found[1:], found[:1] * 2)


def test_a_parameter_of_two_optimizers_counts_once() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    first, second = (torch.optim.SGD([weight]) for _ in range(2))
    optimizer = mk.optim.PCGrad(first, beside=[second], reduction="sum")
    gram = optimizer.pc_backward([(weight * torch.tensor([3.0, 5.0])).sum()])
    assert gram.tolist() == [[34.0]]
    assert weight.grad is not None and weight.grad.tolist() == [3.0, 5.0]


def test_frozen_parameters() -> None:
    model = Model()
    model.trunk[0].requires_grad_(False)
    optimizer = mk.optim.PCGrad(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad]), shared=model.trunk.parameters()
    )
    optimizer.pc_backward(model())
    assert model.trunk[0].weight.grad is None and model.trunk[2].weight.grad is not None
    model.trunk[0].requires_grad_(True)
    optimizer.add_param_group({"params": model.trunk[0].parameters()})
    optimizer.zero_grad()
    optimizer.pc_backward(model())
    found = grads_of(model.trunk.parameters())
    assert_close(found, expected(model, list(model.trunk.parameters()), []))


def test_a_loss_that_reaches_nothing_shared() -> None:
    model = Model()
    head = model.heads[0]
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), shared=model.trunk.parameters())
    optimizer.pc_backward([*model()[1:], head(torch.ones(1, 4, dtype=torch.float64)).sum()])
    assert head.bias.grad is not None and head.bias.grad.item() == pytest.approx(1 / 3)


def test_generator_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = Model()
    with torch.no_grad():
        model.y.mul_(torch.tensor([1.0, -2.0, 3.0])[:, None, None])
    found = []
    for seed in range(8):
        for _ in range(2):
            generator = torch.Generator().manual_seed(seed)
            optimizer = mk.optim.PCGrad(
                torch.optim.SGD(model.parameters()), shared=model.trunk.parameters(), generator=generator
            )
            optimizer.zero_grad()
            optimizer.pc_backward(model())
            found.append(model.trunk[0].weight.grad)
        assert torch.equal(found[-1], found[-2])  # type: ignore[arg-type]
    assert any(not torch.equal(found[0], other) for other in found[2:])  # type: ignore[arg-type]


def test_the_example_of_the_docstring() -> None:
    text = inspect.cleandoc(mk.optim.PCGrad.__doc__ or "").partition("::\n\n")[2]
    lines = itertools.takewhile(lambda line: not line or line.startswith(" " * 4), text.splitlines())
    code = textwrap.dedent("\n".join(lines))
    batches = [(torch.randn(7, 64), [torch.randn(7, 1) for _ in range(2)]) for _ in range(3)]
    names: dict[str, Any] = {"mk": mk, "torch": torch, "batches": batches}
    exec(code, names)
    assert len(names["optimizer"].state) == len(list(names["model"].parameters())) + 4
