"""What the programs of a launch do: how often each passes through its loops, and what it has to wait for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from benchmarks.gpu_model.launches import Launch
from benchmarks.gpu_model.sass import Code, Loop
from mtlkernels.ops._triton_functions import FEW_MEMBERS
from mtlkernels.ops.level.triton.gradient_kernels import FEW_COLUMNS


@dataclass(frozen=True)
class Part:
    """Programs of a launch that do the same.

    Args:
        programs: how many there are.
        product: the loop of its product, by its place in :attr:`Code.products`; None without one.
        members: how many products a program computes one after another, which is how often their loop's pipeline fills,
            unless the compiler has made one loop of them.
        steps: how often a program passes through that loop, in all.
        others: the same of other loops that do not hold the product's; of those not named, once.
        chain: loads one after another before a member's first copies: entries of the table, and what they point to.
        near, far: further loads that it waits for, one after another, from L1 and from behind it.
    """

    programs: int
    product: int | None = None
    members: int = 0
    steps: int = 0
    others: Callable[[Code, Loop], int] = field(default=lambda code, loop: 1)
    chain: int = 2
    near: float = 0
    far: float = 0


def plan(launch: Launch) -> list[Part]:
    """The parts of a launch of one of the kernels of a chain."""
    return _PLANS[launch.name](launch)


def _quotient(a: int, b: int) -> int:
    """Rounded up."""
    return -(-a // b)


def _entries(launch: Launch, at: int, count: int) -> list[int]:
    return [int(entry) for entry in launch.arguments["table"][at : at + count]]


def _blocks(launch: Launch) -> tuple[int, int, int]:
    """Blocks of rows and of columns, and the steps along the depth, of kernels that have these."""
    sizes, tile = launch.arguments, launch.tile
    pairs = ((sizes["num_rows"], tile.rows), (sizes["width"], tile.columns), (sizes["depth"], tile.depth))
    rows, columns, steps = (_quotient(size, block) for size, block in pairs)
    return rows, columns, steps


def _layer_forward(launch: Launch) -> list[Part]:
    rows, columns, steps = _blocks(launch)
    parts = [Part(rows * columns * launch.arguments["num_experts"], 0, 1, steps)]
    if launch.constants["LINEAR_GATES"]:
        parts.append(Part(rows * launch.arguments["gate_tiles"], 1, 1, steps))
    return [part for part in parts if part.programs]


def _last_forward(launch: Launch) -> list[Part]:
    """A program waits for each gate's logit, and for its place, after each expert; for all gates' at first.

    The loops in front of the product's are over the logits of a gate that are more than sixteen.
    """
    rows, columns, steps = _blocks(launch)
    splits, gates = launch.arguments["splits"], launch.constants["GATES"]
    experts = _quotient(launch.arguments["num_experts"], splits)
    offsets = _entries(launch, launch.arguments["gates"] + 3 * gates, gates + 1)
    most = max(end - start for start, end in zip(offsets, offsets[1:], strict=False))

    def trips(code: Code, loop: Loop) -> int:
        return _quotient(most, FEW_MEMBERS.value) - 1 if loop.begin < code.products[0].begin else 1

    return [Part(rows * columns * splits, 0, experts, experts * steps, trips, near=2.0 * gates * experts, far=3.0)]


def _input_gradient(launch: Launch) -> list[Part]:
    rows, columns, steps = _blocks(launch)
    groups, splits = launch.arguments["num_groups"], launch.arguments["splits"]
    offsets = _entries(launch, launch.arguments["members"], groups + 1)
    each = [_quotient(end - start, splits) for start, end in zip(offsets, offsets[1:], strict=False)]
    far = 3.0 * launch.constants["LINEAR_GATES"] + (launch.constants["CODE"] > 0)
    programs, others = rows * columns * splits, _sums_of_parts(launch)
    return [Part(each.count(n) * programs, 0, n, n * steps, others, chain=3, far=far) for n in sorted(set(each))]


def _wide_input_gradient(launch: Launch) -> list[Part]:
    """Of linear gates it waits for their weights alone, which it finds by what was loaded before."""
    rows, columns, steps = _blocks(launch)
    groups = launch.arguments["num_groups"]
    offsets = _entries(launch, launch.arguments["members"], groups + 1)
    each = [end - start for start, end in zip(offsets, offsets[1:], strict=False)]
    far, programs = 1.0 * launch.constants["LINEAR_GATES"], rows * columns
    return [Part(each.count(n) * programs, 0, n, n * steps, chain=3, far=far) for n in sorted(set(each))]


def _sums_of_parts(launch: Launch) -> Callable[[Code, Loop], int]:
    """The passes of loops that add programs' parts, some columns at a time: of the last program, whom others wait for.

    The compiler has unrolled the loop over parts several times.
    """
    splits, chunks = launch.arguments["splits"], _quotient(launch.tile.columns, FEW_COLUMNS.value)

    def trips(code: Code, loop: Loop) -> int:
        if not code.depth(loop):
            return chunks if any(loop.holds(other) for other in code.loops) else 1
        return chunks * _unrolled(code, loop, splits)

    return trips


def _unrolled(code: Code, loop: Loop, count: int) -> int:
    """The passes of one of two loops inside another: one takes several of ``count`` steps a pass, and one the rest."""
    around = code.around(loop)[-1]
    moved = sorted(other.moved("LDG") for other in code.loops if around.holds(other))
    times = moved[-1] // max(moved[0], 1)
    return count // times if loop.moved("LDG") == moved[-1] else count % times


def _weight_gradient(launch: Launch) -> list[Part]:
    """Of the programs that share rows of a weight the first adds up the biases' gradients too, in a loop of its own."""
    splits, tile = launch.arguments["splits"], launch.tile
    steps = _quotient(_quotient(launch.arguments["num_rows"], tile.depth), splits)
    layers = _entries(launch, launch.arguments["layers"], 8 * launch.arguments["num_layers"])
    first = others = 0
    for _, members, height, width in (layers[i : i + 4] for i in range(0, len(layers), 8)):
        rows, columns = _quotient(height, tile.rows), _quotient(width, tile.columns)
        first += members * rows * splits
        others += members * rows * (columns - 1) * splits
    loops = _sums_of_parts(launch)
    return [Part(programs, place, 1, steps, loops, chain=4) for place, programs in enumerate((first, others))]


def _mix_backward(launch: Launch) -> list[Part]:
    """Three runs: over gates, experts and gates. Of a gate's members sixteen are taken at a time."""
    sizes, tile = launch.arguments, launch.tile
    gates, experts, members = sizes["num_gates"], sizes["num_experts"], sizes["num_members"]
    blocks = _quotient(sizes["width"], tile.columns)
    offsets = _entries(launch, sizes["gates"] + 3 * gates, gates + 1)
    groups = sum(_quotient(end - start, FEW_MEMBERS.value) for start, end in zip(offsets, offsets[1:], strict=False))

    def trips(code: Code, loop: Loop) -> int:
        around = [*code.around(loop), loop]
        outermost = [other for other in code.loops if not code.depth(other)]
        place, depth = outermost.index(around[0]), len(around) - 1
        if place == 1:
            return (experts, experts * blocks, members * blocks)[depth]
        if depth == 0:
            return gates
        if depth == 1:  # first the logits behind the first sixteen, twice, and then all of them
            inside = [other for other in code.loops if code.around(other) == around[:1]]
            return groups - gates if place == 0 and inside.index(loop) < 2 else groups
        return groups * _unrolled(code, loop, blocks)

    programs = _quotient(sizes["num_rows"], tile.rows)
    far = 4.0 * gates + experts * blocks + 2.0 * groups
    return [Part(programs, others=trips, near=2.0 * members * blocks, far=far)]


_PLANS: Mapping[str, Callable[[Launch], list[Part]]] = {
    "layer_forward": _layer_forward,
    "last_forward": _last_forward,
    "input_gradient": _input_gradient,
    "wide_input_gradient": _wide_input_gradient,
    "weight_gradient": _weight_gradient,
    "mix_backward": _mix_backward,
}
