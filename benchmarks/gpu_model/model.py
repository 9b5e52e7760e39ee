"""The time that a launch would take: bounds of each resource, waves of programs, and what no other program hides.

A program alone takes as long as its instructions issue, its pipeline fills, its steps take and its loads wait. Programs
that a multiprocessor holds at the same time hide each other's waits until one of its resources is always busy: a wave
of r programs takes the longer of one program's time and r times what it needs of the busiest resource. Waves follow one
another; the last may be smaller. Memory serves all multiprocessors at once: a launch takes the longer of its waves and
of its traffic with memory, and the ramp from one launch to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu_model.card import Card
from benchmarks.gpu_model.cubin import Cubin
from benchmarks.gpu_model.launches import Step
from benchmarks.gpu_model.plan import Part, plan
from benchmarks.gpu_model.sass import Code, Instruction, Loop
from mtlkernels.ops._triton import Tile

WARP, GROUP = 32, 4
ITEMSIZE = 2  # of bfloat16 and float16
RESOURCES = ("tensor cores", "issue", "shared memory", "L2")
MEMORY, WAITING = "memory", "waiting"
# Accesses of so many bytes a thread are those of tiles; what is shorter is assumed to hit L1.
OF_TILES = 16
ASSUMPTIONS = (
    "Programs start in their order as soon as there is room, and those of a wave take equally long.",
    "A program's waits are hidden by the others that its multiprocessor holds, or not at all.",
    "Each pass through a product's loop takes the longest of what it needs, however the compiler has ordered it; copies"
    " that begin behind its products and that the next pass waits for take their time besides.",
    "An instruction takes a slot of its scheduler; special functions and accesses to memory take no more.",
    "Each operand comes from memory once: programs that share rows or weights run near to each other in time.",
    "What a launch reads is still in L2 where all that the launch moves fits there; what it writes reaches memory.",
    "Copies of whole tiles miss L1; shorter loads hit it.",
    "Copies, products and stores do not disturb each other but by the rates below; masked parts of tiles cost as much.",
)


@dataclass(frozen=True)
class Need:
    """Cycles that a program keeps each of :data:`RESOURCES` busy, and that it takes alone."""

    busy: tuple[float, ...]
    alone: float

    @property
    def busiest(self) -> float:
        return max(self.busy)


@dataclass(frozen=True)
class Prediction:
    """Of one launch, in microseconds.

    ``bounds`` are each resource's, were it busy all the time and the work spread evenly over the multiprocessors;
    ``alone`` is the time of one program that nothing disturbs; ``binds`` the resource that is busy all the time, or
    "waiting" where that is none.
    """

    kernel: str
    tile: Tile
    programs: int
    resident: int
    waves: float
    product: str
    registers: int
    shared: int
    bounds: dict[str, float]
    alone: float
    total: float
    binds: str
    flop: int

    def share(self, peak: float) -> float:
        """Of the card's peak."""
        return self.flop / (1e-6 * self.total * peak)


def resident(tile: Tile, cubin: Cubin, card: Card) -> int:
    """How many programs a multiprocessor holds at a time; registers are given to warps by 256."""
    of_warp = -(-cubin.registers * WARP // 256) * 256
    by_registers = card.registers // (of_warp * tile.warps)
    by_shared = card.shared // (cubin.shared + card.reserved)
    return min(by_registers, by_shared, card.warps // tile.warps, card.programs)


def need(part: Part, code: Code, tile: Tile, cold: bool, card: Card) -> Need:
    """Of one program; ``cold``: what it reads comes from memory, not from L2."""
    latency = card.memory_latency if cold else card.l2_latency
    loop = code.products[part.product] if part.product is not None else None
    runs = [_Run(1, code.once(loop), tile, card)]
    for other in code.others(loop):
        holds = loop is not None and other.holds(loop)
        runs.append(_Run(part.members if holds else part.others(code, other), code.own(other), tile, card))
    waits = part.near * card.l1_latency + part.far * latency
    if loop is None:
        busy = (0.0, sum(run.slots for run in runs), 0.0, sum(run.from_l2 for run in runs))
        return Need(busy, waits + sum(run.time for run in runs))
    step, after = _Run(1, loop.always, tile, card), _Run(part.members, loop.skipped, tile, card)
    tensor, shared, copies = _of_step(loop, tile, card)
    idle = loop.waits_for_products * card.product_latency + _Run(1, loop.after_products, tile, card).issue
    compute = max(tensor + idle, shared, step.issue)
    if loop.waits_for_copies:  # products and copies take turns
        compute += copies + latency
    copy = max(copies, latency / max(tile.stages - 1, 1))
    fill = part.chain * card.l2_latency + latency
    if code.around(loop):
        alone = part.members * fill + part.steps * max(compute, copy)
    else:  # the copies of the next member go on after the product of one, and only the first addresses are new
        addresses = (part.members - 1) * part.chain * card.l1_latency
        alone = fill + max(addresses + part.steps * compute + after.time, part.steps * copy)
    busy = (
        part.steps * tensor,
        part.steps * step.slots + after.slots + sum(run.slots for run in runs),
        part.steps * shared,
        part.steps * copies + after.from_l2 + sum(run.from_l2 for run in runs),
    )
    return Need(busy, alone + waits + sum(run.time for run in runs))


class _Run:
    """Instructions that each warp of a program issues so many times: what they need, in cycles of a program."""

    def __init__(self, times: int, instructions: Sequence[Instruction], tile: Tile, card: Card) -> None:
        slots = tile.warps / card.schedulers
        issued = times * len(instructions)
        barriers = times * sum(i.name == "BAR" for i in instructions)
        moved = times * sum(i.bytes for i in instructions if i.name in ("LDG", "STG") and i.bytes >= OF_TILES)
        self.slots = slots * issued
        self.from_l2 = moved * WARP * tile.warps / card.l2_bytes
        self.issue = max(card.issue_interval, slots) * issued + card.barrier * barriers
        self.time = self.issue + self.from_l2


def _of_step(loop: Loop, tile: Tile, card: Card) -> tuple[float, float, float]:
    """A pass through a product's loop: cycles of tensor cores, of shared memory, and of copies from L2."""
    by_group = loop.products[0].opcode == "HGMMA"
    teams = tile.warps // GROUP if by_group else tile.warps
    tensor = teams * loop.arithmetic / (card.multiply_adds * (1.0 if by_group else card.warp_level))
    threads = WARP * tile.warps
    copied = threads * sum(i.bytes for i in loop.always if i.name == "LDGSTS")
    moved = copied + threads * sum(i.bytes for i in loop.always if i.name in ("LDS", "STS"))
    moved += teams * ITEMSIZE * sum(mma.shared_elements for mma in loop.products)
    moved += tile.warps * sum(_of_matrices(i.opcode) for i in loop.always if i.name in ("LDSM", "STSM"))
    return tensor, moved / card.shared_bytes, copied / card.l2_bytes


def _of_matrices(opcode: str) -> int:
    """Bytes of one, two or four matrices of 8 x 8 elements of two bytes, which a warp reads at once."""
    return 128 * int(opcode.rsplit(".", 1)[-1])


def predict(step: Step, cubin: Cubin, card: Card) -> Prediction:
    """Of a launch, from its compiled code."""
    launch, code, work = step.launch, Code(cubin.sass), step.work
    parts = plan(launch)
    programs = sum(part.programs for part in parts)
    # What a launch whose traffic fits in L2 reads was written, or read, by the one before it.
    cold = work.traffic > card.l2_capacity
    needs = [need(part, code, launch.tile, cold, card) for part in parts]
    held = resident(launch.tile, cubin, card)
    one_wave = programs <= held * card.multiprocessors
    mean = _together(parts, needs, slowest=one_wave)
    micro = 1e6 / card.clock
    bounds = {
        name: micro * programs * busy / card.multiprocessors for name, busy in zip(RESOURCES, mean.busy, strict=True)
    }
    bounds[MEMORY] = 1e6 * (work.traffic if cold else work.written) / (card.memory * card.memory_share)
    # Memory is idle until the first program asks for something, and while the last one stores.
    edges = micro * (parts[0].chain * card.l2_latency + 2 * card.memory_latency)
    in_waves, in_memory = micro * waves(programs, held, mean, card), bounds[MEMORY] + edges
    crowd = min(held, -(-programs // card.multiprocessors))
    busiest = RESOURCES[mean.busy.index(mean.busiest)] if crowd * mean.busiest > mean.alone else WAITING
    products = code.products[parts[0].product].products if parts[0].product is not None else ()
    return Prediction(
        kernel=launch.name,
        tile=launch.tile,
        programs=programs,
        resident=held,
        waves=programs / (held * card.multiprocessors),
        product=str(products[0]) if products else "none",
        registers=cubin.registers,
        shared=cubin.shared,
        bounds=bounds,
        alone=micro * mean.alone,
        total=1e6 * card.ramp + max(in_waves, in_memory),
        binds=MEMORY if in_memory > in_waves else busiest,
        flop=work.flop,
    )


def _together(parts: Sequence[Part], needs: Sequence[Need], slowest: bool) -> Need:
    """The mean of all programs; where all are at work at the same time, the slowest of them counts for the time."""
    programs = sum(part.programs for part in parts)
    pairs = list(zip(parts, needs, strict=True))
    busy = (sum(part.programs * each.busy[i] for part, each in pairs) / programs for i in range(len(RESOURCES)))
    alone = sum(part.programs * each.alone for part, each in pairs) / programs
    return Need(tuple(busy), max(each.alone for part, each in pairs if part.programs) if slowest else alone)


def waves(programs: int, held: int, each: Need, card: Card) -> float:
    """Cycles of all waves, the last of which holds what is left."""
    full, left = divmod(programs, held * card.multiprocessors)
    last = -(-left // card.multiprocessors)
    return full * max(each.alone, held * each.busiest) + (max(each.alone, last * each.busiest) if left else 0.0)
