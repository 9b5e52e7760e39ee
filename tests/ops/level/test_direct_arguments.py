"""What the direct way into C++ makes of arguments that nobody has checked: results, None, or an error."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtlkernels import _extension
from mtlkernels.ops import activations as act
from mtlkernels.ops.level.spec import BATCH_NORM, Layer, LevelSpec
from tests import requires
from tests.ops.test_tensor_subclasses import Wrapped

pytestmark = requires.cpp_kernels

ROWS, WIDTHS, SIZES = 5, (4, 6, 3), (2, 3)
WIRING = (2, (0, 1, 0), (0, 1, 2, 1, 0), SIZES)
HUGE = 2**70
ORDER = (
    "inputs", "weights", "biases", "gate_logits", "gate_weights", "gate_biases", "norms", "gate_norms", "slopes",
    "dice_eps", "spec", "trains", "by_name",
)  # fmt: skip


def spec_of(*layers: Layer, linear: bool = True) -> Any:
    return LevelSpec(*WIRING, layers, (0, 1) if linear else ()).encoded[0]


def norm(width: int, **changed: Any) -> tuple[Any, ...]:
    """A batch norm by running statistics, as Python hands it over."""
    parts = {"mean": torch.randn(width), "variance": torch.rand(width) + 0.5}
    parts |= {"weight": torch.ones(width), "bias": torch.zeros(width), "eps": 1e-5}
    return tuple((parts | changed).values())


def layers_of(make: Callable[[int], Any]) -> list[list[Any]]:
    """One entry for each expert of each layer, by the layer's width."""
    return [[make(width) for _ in range(3)] for width in WIDTHS[1:]]


def arguments(**changed: Any) -> dict[str, Any]:
    """A call that the direct way takes: two experts' layers and gates that are layers."""
    given = {
        "inputs": [torch.randn(ROWS, 4) for _ in range(2)],
        "weights": [[torch.randn(b, a) for _ in range(3)] for a, b in zip(WIDTHS, WIDTHS[1:], strict=False)],
        "biases": layers_of(torch.randn),
        "gate_logits": None,
        "gate_weights": [torch.randn(size, 4) for size in SIZES],
        "gate_biases": [torch.randn(2), None],
        "norms": None,
        "gate_norms": None,
        "slopes": None,
        "dice_eps": None,
        "spec": spec_of(Layer(1), Layer(2)),
        "trains": True,
        "by_name": False,
    }
    assert changed.keys() <= given.keys()
    return given | changed


def call(**changed: Any) -> Any:
    given = arguments(**changed)
    return _extension.function("level")(*(given[name] for name in ORDER))


def with_slopes(**changed: Any) -> dict[str, Any]:
    """A call with slopes, whose gates come as logits."""
    slopes = [[torch.ones(1) for _ in range(3)], None]
    given = {
        "gate_logits": [torch.randn(ROWS, size) for size in SIZES],
        "gate_weights": None,
        "slopes": slopes,
        "spec": spec_of(Layer(act.PRELU), Layer(1), linear=False),
    }
    return given | changed


def first_changed(items: Any, item: Any) -> list[Any]:
    """A list of lists whose very first item is another."""
    return [[item, *items[0][1:]], *items[1:]]


TAKEN = {
    "plain": dict,
    "logits": lambda: {"gate_logits": [torch.randn(ROWS, n) for n in SIZES], "gate_weights": None,
                       "spec": spec_of(Layer(1), Layer(2), linear=False)},
    "stacked": lambda: {"weights": [torch.stack(layer) for layer in arguments()["weights"]], "biases": None},
    "joined gates": lambda: {"inputs": torch.randn(ROWS, 4), "gate_weights": torch.randn(5, 4),
                             "gate_biases": torch.randn(5),
                             "spec": LevelSpec(1, (0,) * 3, WIRING[2], SIZES, (Layer(1), Layer(2)), (0, 0)).encoded[0]},
    "norms": lambda: {"norms": [None, layers_of(norm)[1]], "gate_norms": [norm(2), None]},
    "norms without parameters": lambda: {"norms": layers_of(lambda width: norm(width, weight=None, bias=None)),
                                         "gate_norms": [None, norm(3, weight=None)]},
    "norms in other dtypes": lambda: {"norms": [
        [norm(6, mean=torch.randn(6).double()), norm(6, weight=torch.ones(6).half()), norm(6)],
        [norm(3, bias=torch.ones(3).bfloat16()), None, norm(3)]]},
    "an eps of an integer": lambda: {"norms": layers_of(lambda width: norm(width, eps=1))},
    "slopes": with_slopes,
}  # fmt: skip

LEFT = {
    "a spec of text": lambda: {"spec": "12"},
    "a spec with a float": lambda: {"spec": [2.0, *arguments()["spec"][1:]]},
    "a spec with a large integer": lambda: {"spec": [HUGE, *arguments()["spec"][1:]]},
    "norms by the batch's statistics": lambda: {"spec": spec_of(Layer(1, BATCH_NORM, 1e-5), Layer(2), linear=False)},
    "inputs of another kind": lambda: {"inputs": "ab"},
    "an input too few": lambda: {"inputs": [torch.randn(ROWS, 4)]},
    "an input that is None": lambda: {"inputs": [torch.randn(ROWS, 4), None]},
    "an input that is wrapped": lambda: {"inputs": [torch.randn(ROWS, 4), Wrapped(torch.randn(ROWS, 4))]},
    "a weight that is None": lambda: {"weights": first_changed(arguments()["weights"], None)},
    "a layer too few": lambda: {"weights": arguments()["weights"][:1]},
    "an expert too few": lambda: {"weights": [layer[:2] for layer in arguments()["weights"]]},
    "weights that are None": lambda: {"weights": [None, None]},
    "weights stacked in nothing": lambda: {"weights": [torch.tensor(1.0)] * 2},
    "a bias of text": lambda: {"biases": first_changed(layers_of(torch.randn), "b")},
    "biases of another kind": lambda: {"biases": 3},
    "no gates": lambda: {"gate_weights": None, "spec": spec_of(Layer(1), Layer(2), linear=False)},
    "a gate of text": lambda: {"gate_weights": ["g", torch.randn(3, 4)]},
    "a gate bias of text": lambda: {"gate_biases": ["g", None]},
    "joined gates of other sizes": lambda: {"gate_weights": torch.randn(6, 4)},
    "joined gates without dimensions": lambda: {"gate_weights": torch.tensor(1.0)},
    "joined logits of one dimension": lambda: {"gate_logits": torch.randn(5), "gate_weights": None,
                                               "spec": spec_of(Layer(1), Layer(2), linear=False)},
    "norms of another kind": lambda: {"norms": 3},
    "norms of a layer too few": lambda: {"norms": layers_of(norm)[:1]},
    "a norm that is no tuple": lambda: {"norms": first_changed(layers_of(norm), list(norm(6)))},
    "a norm of four parts": lambda: {"norms": first_changed(layers_of(norm), norm(6)[:4])},
    "a mean that is no tensor": lambda: {"norms": first_changed(layers_of(norm), norm(6, mean=0.0))},
    "a variance that is no tensor": lambda: {"norms": first_changed(layers_of(norm), norm(6, variance=1.0))},
    "a scale of text": lambda: {"norms": first_changed(layers_of(norm), norm(6, weight="w"))},
    "a shift of text": lambda: {"norms": first_changed(layers_of(norm), norm(6, bias="b"))},
    "an eps of text": lambda: {"norms": first_changed(layers_of(norm), norm(6, eps="e"))},
    "an eps beyond all floats": lambda: {"norms": first_changed(layers_of(norm), norm(6, eps=10**400))},
    "a mean of another length": lambda: {"norms": first_changed(layers_of(norm), norm(6, mean=torch.zeros(5)))},
    "a variance of two dimensions": lambda: {"norms": first_changed(layers_of(norm),
                                                                    norm(6, variance=torch.ones(1, 6)))},
    "a mean elsewhere": lambda: {"norms": first_changed(layers_of(norm), norm(6, mean=torch.zeros(6, device="meta")))},
    "a sparse scale": lambda: {"norms": first_changed(layers_of(norm), norm(6, weight=torch.ones(6).to_sparse()))},
    "a gate norm too few": lambda: {"gate_norms": [norm(2)]},
    "gate norms of another kind": lambda: {"gate_norms": 3},
    "slopes of another kind": lambda: with_slopes(slopes=3),
    "no slopes": lambda: with_slopes(slopes=None),
    "slopes where there are none": lambda: {"slopes": [[torch.ones(1)] * 3, None]},
    "slopes in another layer": lambda: with_slopes(slopes=[None, [torch.ones(1)] * 3]),
    "a slope of text": lambda: with_slopes(slopes=[["s"] * 3, None]),
    "an eps of Dice of zero": lambda: with_slopes(dice_eps=[0.0, 0.0]),
    "an eps of Dice of text": lambda: with_slopes(dice_eps=["e", 1e-8]),
    "eps of Dice in no list": lambda: with_slopes(dice_eps=1e-8),
    "eps of Dice for three layers": lambda: with_slopes(dice_eps=[1e-8] * 3),
}  # fmt: skip


@pytest.mark.parametrize("what", TAKEN)
@torch.no_grad()
def test_taken(what: str) -> None:
    found = call(**TAKEN[what]())
    assert [tuple(y.shape) for y in found] == [(ROWS, 3), (ROWS, 3)]
    assert all(y.isfinite().all() for y in found)


@pytest.mark.parametrize("what", LEFT)
@torch.no_grad()
def test_left_to_the_checks(what: str) -> None:
    """No error, as the checks in Python say it in the user's words, and none is left behind in Python."""
    assert call(**LEFT[what]()) is None


@pytest.mark.parametrize("parts", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@torch.no_grad()
def test_norms_of_every_dtype(kind: torch.dtype, parts: torch.dtype) -> None:
    """They serve as norms whose parts are of the dtype that is computed in, bit for bit."""
    given = arguments()
    given |= {name: [t.to(kind) for t in given[name]] for name in ("inputs", "gate_weights")}
    given |= {name: [[t.to(kind) for t in layer] for layer in given[name]] for name in ("weights", "biases")}
    given["gate_biases"] = None

    def with_parts(norm: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
        return *(part.to(dtype) for part in norm[:4]), norm[4]

    norms, gate = layers_of(lambda width: with_parts(norm(width), parts)), with_parts(norm(3), parts)
    compute = torch.float64 if kind == torch.float64 else torch.float32
    found = call(**given | {"norms": norms, "gate_norms": [None, gate]})
    wide = [[with_parts(norm, compute) for norm in layer] for layer in norms]
    expected = call(**given | {"norms": wide, "gate_norms": [None, with_parts(gate, compute)]})
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("isa", _extension.instruction_sets())
@pytest.mark.parametrize("rows", [3, 40, 200])
@torch.no_grad()
def test_norms_of_some_gates(rows: int, isa: str) -> None:
    """A gate with a norm beside one without, of which each may have biases."""
    given = arguments(inputs=[torch.randn(rows, 4) for _ in range(2)])
    of_gate = norm(2)
    for biases in ([torch.randn(2), None], [None, torch.randn(3)]):
        given["gate_biases"] = biases
        with _extension.instruction_set(isa):
            found = call(**given | {"gate_norms": [of_gate, None]})
            x, (weights, others) = given["inputs"], given["gate_weights"]
            first = torch.nn.functional.linear(x[0], weights, biases[0])
            logits = [
                torch.nn.functional.batch_norm(first, *of_gate[:4], False, 0.0, of_gate[4]),
                torch.nn.functional.linear(x[1], others, biases[1]),
            ]
            outside = {"gate_logits": logits, "gate_weights": None, "gate_biases": None}
            spec = spec_of(Layer(1), Layer(2), linear=False)
            torch.testing.assert_close(found, call(**given | outside | {"spec": spec}))


def test_gradients_are_left_to_the_checks_where_it_does_not_train() -> None:
    wanted: dict[str, Callable[[], dict[str, Any]]] = {
        "inputs": lambda: {"inputs": [torch.randn(ROWS, 4).requires_grad_(), torch.randn(ROWS, 4)]},
        "weights": lambda: {"weights": first_changed(arguments()["weights"], torch.randn(6, 4).requires_grad_())},
        "biases": lambda: {"biases": first_changed(arguments()["biases"], torch.randn(6).requires_grad_())},
        "gates": lambda: {"gate_weights": [torch.randn(2, 4).requires_grad_(), torch.randn(3, 4)]},
        "gate biases": lambda: {"gate_biases": [torch.randn(2).requires_grad_(), None]},
    }
    for make in wanted.values():
        assert call(trains=False, **make()) is None
        outputs = call(**make())
        assert all(y.requires_grad for y in outputs)
    scales = norm(6, weight=torch.ones(6).requires_grad_()), norm(6, bias=torch.ones(6).requires_grad_())
    of_norms = [{"norms": first_changed(layers_of(norm), scale)} for scale in scales]
    of_norms += [{"gate_norms": [norm(2, weight=torch.ones(2).requires_grad_()), None]}]
    for changed in [*of_norms, with_slopes(slopes=[[torch.ones(1).requires_grad_()] * 3, None])]:
        assert call(**changed) is None
        with torch.no_grad():
            assert call(**changed) is not None
    assert not any(y.requires_grad for y in call(norms=layers_of(lambda width: norm(width, weight=None, bias=None))))


def tensors_of(**changed: Any) -> Any:
    """By the way in for GPUs, which hands the tensors back."""
    given = arguments(**changed)
    return _extension.function("level_tensors")(*(given[name] for name in ORDER[:6]), words_of(given["spec"]))


def words_of(spec: Any) -> bytes:
    """A spec's ints side by side."""
    return array("q", spec).tobytes()


def test_tensors_in_the_operators_order() -> None:
    given = arguments()
    tensors, wanted, _ = tensors_of(**given)
    flat = [*given["inputs"], *(t for name in ("weights", "biases") for layer in given[name] for t in layer)]
    expected = [*flat, *given["gate_weights"], *given["gate_biases"]]
    assert not wanted and len(tensors) == len(expected)
    assert all(a is b for a, b in zip(tensors, expected, strict=True))
    assert tensors_of(inputs=[torch.randn(ROWS, 4).requires_grad_(), given["inputs"][1]])[1]


@pytest.mark.parametrize("kind", ["plain", "logits", "stacked", "joined gates"])
def test_tensors_have_the_signature_that_python_asks_for(kind: str) -> None:
    """Inputs and logits move; with a parameter elsewhere the signature is another."""
    given = arguments(**TAKEN[kind]())
    tensors, _, signature = tensors_of(**given)
    inputs = len(given["inputs"]) if isinstance(given["inputs"], list) else 1
    last = len(SIZES) if given["gate_weights"] is None else 0
    fixed = tensors[inputs : len(tensors) - last]
    moving = [*tensors[:inputs], *tensors[len(tensors) - last :]]
    assert signature == _extension.function("signature")(moving, fixed)
    given["inputs"] = [torch.randn(ROWS, 4) for _ in range(2)] if inputs > 1 else torch.randn(ROWS, 4)
    assert tensors_of(**given)[2] == signature
    stacked = kind == "stacked"
    given["weights"] = (
        [w.clone() for w in given["weights"]] if stacked else first_changed(given["weights"], torch.randn(6, 4))
    )
    assert tensors_of(**given)[2] != signature


WITHOUT_TENSORS = ["norms by the batch's statistics", "a weight that is None", "joined gates of other sizes"]


@pytest.mark.parametrize("what", WITHOUT_TENSORS)
def test_tensors_that_there_are_not(what: str) -> None:
    assert tensors_of(**LEFT[what]()) is None


@pytest.mark.parametrize(
    "weights", [3, [torch.ones(2, 2), None], [Wrapped(torch.ones(2, 2))]], ids=["no list", "None", "wrapped"]
)
def test_what_cannot_be_kept(weights: Any) -> None:
    with pytest.raises(ValueError, match="a list of plain tensors was expected"):
        _extension.function("keep_prepared")(weights)


def test_a_recorded_level_takes_tensors() -> None:
    tensors: list[Tensor | None] = tensors_of()[0]
    with pytest.raises(TypeError, match="a tensor or None was expected"):
        _extension.function("recorded_level")(tensors, ["y", "y"], words_of(arguments()["spec"]), False)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_recorded_levels_outputs_have_its_node(by_name: bool) -> None:
    tensors = tensors_of()[0]
    tensors[2].requires_grad_()
    spec, results = arguments()["spec"], [torch.randn(ROWS, 3) for _ in range(2)]
    saved = [torch.randn(ROWS, 6), None]
    outputs = _extension.function("recorded_level")(tensors, [*results, *saved], words_of(spec), by_name)
    context = _extension.function("level_context")(outputs[0].grad_fn)
    assert outputs[1].grad_fn is outputs[0].grad_fn
    assert (context.recorded, context.by_name, context.num_saved) == (True, by_name, 2)
    assert tuple(context.encoded[0]) == tuple(spec) and context.saved[-1] is None
    assert [i for i, variable in enumerate(context.variables) if variable] == [2]


def test_an_instruction_set_that_there_is_not() -> None:
    assert _extension.function("select_isa")("sparc") is False
