"""What the programs of a launch do: how often each passes through its loops, and what it has to wait for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from benchmarks.gpu_model.launches import Launch
from benchmarks.gpu_model.sass import Code, Loop
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
    """A program waits for each gate's logit, and for its place, after each expert."""
    rows, columns, steps = _blocks(launch)
    splits, gates = launch.arguments["splits"], launch.constants["GATES"]
    experts = _quotient(launch.arguments["num_experts"], splits)
    programs, near, far = rows * columns * splits, 2.0 * gates * experts, 3.0 * gates
    return [Part(programs, 0, experts, experts * steps, near=near, far=far)]


def _input_gradient(launch: Launch) -> list[Part]:
    rows, columns, steps = _blocks(launch)
    groups, splits = launch.arguments["num_groups"], launch.arguments["splits"]
    offsets = _entries(launch, launch.arguments["members"], groups + 1)
    each = [_quotient(end - start, splits) for start, end in zip(offsets, offsets[1:], strict=False)]
    far = 3.0 * launch.constants["LINEAR_GATES"] + (launch.constants["CODE"] > 0)
    programs, others = rows * columns * splits, _sums_of_parts(launch)
    return [Part(each.count(n) * programs, 0, n, n * steps, others, chain=3, far=far) for n in sorted(set(each))]


def _sums_of_parts(launch: Launch) -> Callable[[Code, Loop], int]:
    """The passes of loops that add programs' parts, some columns at a time: of the last program, whom others wait for.

    The compiler has unrolled the loop over parts several times, with another one for those that are left.
    """
    splits, chunks = launch.arguments["splits"], _quotient(launch.tile.columns, FEW_COLUMNS.value)

    def trips(code: Code, loop: Loop) -> int:
        if not code.depth(loop):
            return chunks if any(loop.holds(other) for other in code.loops) else 1
        moved = sorted(other.moved("LDG") for other in code.loops if other.begin in within(code, loop))
        times = moved[-1] // max(moved[0], 1)
        return chunks * (splits // times if loop.moved("LDG") == moved[-1] else splits % times)

    def within(code: Code, loop: Loop) -> set[int]:
        """Where the loops begin that lie in the same one."""
        around = code.around(loop)[-1]
        return {other.begin for other in code.loops if around.holds(other)}

    return trips


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
    """Three runs over gates, experts and gates; the loops over a gate's members are unrolled four times."""
    sizes, tile = launch.arguments, launch.tile
    gates, experts, members = sizes["num_gates"], sizes["num_experts"], sizes["num_members"]
    blocks = _quotient(sizes["width"], tile.columns)
    unrolled = _quotient(members, 4)

    def trips(code: Code, loop: Loop) -> int:
        outermost = [other for other in code.loops if not code.depth(other)]
        over_experts = outermost.index((*code.around(loop), loop)[0]) == 1
        counts = (experts, experts * blocks, members * blocks) if over_experts else (gates, unrolled, members)
        return counts[min(code.depth(loop), 2)]

    programs = _quotient(sizes["num_rows"], tile.rows)
    far = 4.0 * gates + experts * blocks + 2.0 * unrolled
    return [Part(programs, others=trips, near=2.0 * members * blocks, far=far)]


_PLANS: Mapping[str, Callable[[Launch], list[Part]]] = {
    "layer_forward": _layer_forward,
    "last_forward": _last_forward,
    "input_gradient": _input_gradient,
    "weight_gradient": _weight_gradient,
    "mix_backward": _mix_backward,
}
