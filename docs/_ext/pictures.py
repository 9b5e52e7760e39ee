"""The pictures of the site, by name. What can be computed is: wirings come from Routing, curves from the operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from drawing import AGAINST, INK, QUIET, SHARED, TASKS, Drawing, Point

import mtlkernels as mk

WIDTH = 460
EXPERTS = [(TASKS[0], "expert 0"), (TASKS[0], "expert 1"), (TASKS[1], "expert 2"), (TASKS[1], "expert 3")]
EXPERTS += [(SHARED, "expert 4"), (SHARED, "expert 5")]


def _experts(d: Drawing, x: float, top: float) -> list[float]:
    """A column of experts and arrows from x to each; the heights of their middles."""
    middles = [top + 16 + 38 * e for e in range(len(EXPERTS))]
    centre = (middles[0] + middles[-1]) / 2
    d.named(6, centre - 22, 62, 44, "x [B, D]", QUIET)
    for (colour, name), y in zip(EXPERTS, middles, strict=True):
        d.arrow((68, centre), (x, y))
        d.named(x, y - 15, 88, 30, name, colour)
    return middles


def level_as_modules() -> Drawing:
    """What a loop over experts writes to memory before anything is mixed."""
    d = Drawing(WIDTH, 266, "Six experts each write their output into a tensor of B times E times H, which gates read")
    middles = _experts(d, 106, 6)
    d.box(226, 4, 92, 224, fill=AGAINST, stroke=AGAINST, opacity=0.12, dashed=True)
    for y in middles:
        d.arrow((194, y), (230, y))
        d.box(234, y - 13, 76, 26, stroke=AGAINST, fill=AGAINST, opacity=0.2)
    d.text(272, 250, "[B, E, H] in memory", colour=AGAINST)
    for t, y in enumerate((80.0, 160.0)):
        d.arrow((318, 116), (362, y))
        d.named(362, y - 22, 92, 44, f"y{t} [B, H]", TASKS[t])
        d.text(408, y - 30, f"gate {t}, bmm", colour=QUIET, size=14)
    return d


def level_fused() -> Drawing:
    """The same level, a block of rows at a time, into the sums of all gates."""
    d = Drawing(WIDTH, 266, "Six experts add their output to the sums of both gates while it is in the cache")
    routing = mk.Routing.cgc(2, 2, 2)
    middles = _experts(d, 106, 6)
    d.box(98, 1, 358, 230, fill="none", dashed=True)
    d.text(277, 252, "one operator; 64 rows at a time, in the cache", colour=QUIET)
    for t, y in enumerate((80.0, 160.0)):
        for e in routing.gate_experts[t]:
            d.arrow((194, middles[e]), (352, y), colour=TASKS[t], width=1.2)
        d.named(352, y - 24, 96, 48, f"y{t} += s·h", TASKS[t])
    return d


def routing() -> Drawing:
    """Experts against gates, of Routing.cgc with a shared gate."""
    wiring = mk.Routing.cgc(2, 2, 2, shared_gate=True)
    names = ("task 0", "task 1", "shared")
    colours = (*TASKS, SHARED)
    d = Drawing(WIDTH, 262, "Which of six experts each of three gates mixes, and which stream each expert reads")
    left, step = 128, 54
    d.text(left - 14, 30, "expert", anchor="end", colour=QUIET)
    d.text(left - 14, 62, "reads stream", anchor="end", colour=QUIET)
    for e, stream in enumerate(wiring.expert_inputs):
        x = left + step * e + step / 2
        d.text(x, 30, str(e), bold=True)
        d.named(x - 21, 42, 42, 30, str(stream), colours[stream])
    for k, seen in enumerate(wiring.gate_experts):
        y = 112 + 50 * k
        d.text(left - 14, y + 5, f"gate {k}: {names[k]}", anchor="end", colour=colours[k], bold=True)
        d.line((left, y - 25), (left + step * wiring.num_experts, y - 25))
        for place, e in enumerate(seen):
            d.named(left + step * e + 9, y - 17, 36, 34, str(place), colours[k])
    d.text(WIDTH / 2, 256, "in a box: the place of the expert's logit in the gate's softmax", colour=QUIET, size=14)
    return d


def ple() -> Drawing:
    """Two levels of CGC: a stream a task and a shared one between them."""
    d = Drawing(WIDTH, 346, "Two levels of PLE from x to two outputs, with three streams between the levels")
    left, middle, right = 90.0, 230.0, 370.0
    columns = ((left, TASKS[0], "task 0"), (middle, SHARED, "shared"), (right, TASKS[1], "task 1"))
    d.named(190, 4, 80, 32, "x [B, D]", QUIET)
    for level, top in enumerate((72.0, 196.0)):
        d.box(14, top, 432, 78, dashed=True)
        for x, colour, name in columns:
            d.named(x - 56, top + 8, 112, 40, f"{name}: experts", colour, size=14)
        d.text(middle, top + 68, f"level {level}, one operator", colour=QUIET, size=14)
    for x, colour, _ in columns:
        d.arrow((middle, 36), (x, 70), colour=colour)
        d.arrow((x, 150), (x, 194), colour=colour, width=2.4)
    for x, colour, name in ((left, TASKS[0], "y0 [B, H]"), (right, TASKS[1], "y1 [B, H]")):
        aside = 20 if x < middle else -20
        d.arrow((middle, 150), (x + aside, 194), colour=colour)
        d.arrow((x, 150), (middle - aside, 194), colour=SHARED)
        d.arrow((x, 274), (x, 306), colour=colour, width=2.4)
        d.arrow((middle, 274), (x + 2 * aside, 306), colour=colour)
        d.named(x - 50, 308, 100, 34, name, colour)
    return d


def _plus(a: Point, b: Point, factor: float = 1.0) -> Point:
    return (a[0] + factor * b[0], a[1] + factor * b[1])


def pcgrad() -> Drawing:
    """Two gradients that conflict, and what is left of each; projected by mk.pcgrad_weights."""
    d = Drawing(WIDTH, 268, "Two conflicting gradients, each projected onto the plane that is normal to the other")
    grads = torch.tensor([[-70.0, 118.0], [168.0, 14.0]], dtype=torch.float64)
    weights = mk.pcgrad_weights(grads @ grads.T, torch.tensor([[1], [0]]))
    origin: Point = (170.0, 226.0)

    def end(vector: torch.Tensor) -> Point:
        return origin[0] + float(vector[0]), origin[1] - float(vector[1])

    for t, (before, after) in enumerate(zip(grads, weights @ grads, strict=True)):
        d.line(end(before), end(after), colour=AGAINST, dashed=True)
        d.arrow(origin, end(before), colour=TASKS[t], width=1.6, dashed=True)
        d.arrow(origin, end(after), colour=TASKS[t], width=3)
    update = (weights @ grads).sum(0)
    d.arrow(origin, end(update), colour=INK, width=3)
    d.text(*_plus(end(grads[0]), (-8, 4)), "g0", anchor="end", colour=TASKS[0], bold=True)
    d.text(*_plus(end(grads[1]), (8, 6)), "g1", anchor="start", colour=TASKS[1], bold=True)
    d.text(*_plus(end((weights @ grads)[0]), (-12, -8)), "g0 projected", colour=TASKS[0], anchor="middle")
    d.text(*_plus(end((weights @ grads)[1]), (14, 2)), "g1 projected", colour=TASKS[1], anchor="start")
    d.text(*_plus(end(update), (8, -6)), "their sum", anchor="start", bold=True)
    d.text(WIDTH / 2, 262, "⟨g0, g1⟩ < 0: against each other", colour=AGAINST, size=14)
    return d


def gram() -> Drawing:
    """The two passes over the gradients."""
    d = Drawing(WIDTH, 232, "Gradients are read once for the Gram matrix and once for the weighted sum")
    for t, colour in enumerate((TASKS[0], TASKS[1], SHARED)):
        y = 14 + 34 * t
        for x, width in ((70, 92), (166, 54), (224, 132), (360, 88)):
            d.box(x, y, width, 24, fill=colour, stroke=colour, opacity=0.2)
        d.text(58, y + 18, f"g{t}", anchor="end", colour=colour, bold=True)
    d.text(233, 132, "a list of tensors a task, where they are: no copy of T × P", colour=QUIET, size=14)
    d.named(18, 164, 112, 44, "G [T, T]", QUIET)
    d.arrow((36, 118), (36, 162))
    d.text(44, 154, "read once", anchor="start", size=14)
    d.arrow((130, 186), (172, 186))
    d.named(172, 164, 112, 44, "weights [T]", QUIET)
    d.arrow((284, 186), (326, 186))
    d.named(326, 164, 122, 44, "Σ w·g in .grad", QUIET)
    d.arrow((430, 118), (430, 162))
    d.text(422, 154, "read again", anchor="end", size=14)
    d.text(228, 226, "T² numbers, no matter how many parameters", colour=QUIET, size=14)
    return d


def hard_concrete() -> Drawing:
    """z against the uniform noise, from mk.hard_concrete."""
    d = Drawing(WIDTH, 286, "The coding variable z as a function of the noise u for three values of log alpha")
    left, top, width, height = 56.0, 16.0, 380.0, 200.0
    for z in (0.0, 0.5, 1.0):
        y = top + height * (1 - z)
        d.line((left, y), (left + width, y), dashed=0 < z < 1)
        d.text(left - 8, y + 5, f"{z:g}", anchor="end", size=14)
    noise = torch.linspace(0.001, 0.999, 300)
    shown: Sequence[tuple[float, str]] = ((-2.5, AGAINST), (0.0, TASKS[0]), (2.5, SHARED))
    for place, (alpha, colour) in enumerate(shown):
        found = mk.hard_concrete(torch.full_like(noise, alpha), noise)
        points = [(left + width * float(u), top + height * (1 - float(z))) for u, z in zip(noise, found, strict=True)]
        d.curve(points, colour=colour, width=2.6)
        d.text(left + 62 + 130 * place, 276, f"log α = {alpha:g}", colour=colour, bold=True)
    d.text(left, top + height + 22, "u = 0", size=14)
    d.text(left + width, top + height + 22, "u = 1", size=14)
    d.text(left + width / 2, top + height + 22, "z = 0: closed, z = 1: open", size=14, colour=QUIET)
    return d


def snr() -> Drawing:
    """Sub-networks and routes, some closed, one sub-network read by nobody."""
    d = Drawing(WIDTH, 300, "Two levels of sub-networks, with open and closed routes between them and to two tasks")
    z = (torch.tensor([[1.0, 0, 0], [0.7, 1, 0], [0, 0, 0.6]]), torch.tensor([[1.0, 0.4, 0], [0, 1, 0]]))
    rows = (
        [(82.0, 44.0), (230.0, 44.0), (378.0, 44.0)],
        [(82.0, 150.0), (230.0, 150.0), (378.0, 150.0)],
        [(156.0, 256.0), (304.0, 256.0)],
    )
    for below, (joint, starts, ends) in enumerate(zip(z, rows, rows[1:], strict=False)):
        for i, end in enumerate(ends):
            for j, start in enumerate(starts):
                is_open = float(joint[i, j]) > 0
                dead = below == 0 and i == 2  # nobody reads what it leads to
                colour = QUIET if dead or not is_open else SHARED
                d.arrow(
                    (start[0], start[1] + 18), (end[0], end[1] - 20),
                    colour=colour, width=1 + 2 * float(joint[i, j]) * (not dead), dashed=not is_open or dead,
                )  # fmt: skip
    for level, row in enumerate(rows[:2]):
        for j, (x, y) in enumerate(row):
            unread = j == 2
            d.named(x - 62, y - 18, 124, 36, "read by nobody" if unread else f"sub-network {j}",
                    QUIET if unread else TASKS[0], size=14)  # fmt: skip
        d.text(6, row[0][1] - 26, f"level {level}", anchor="start", colour=QUIET, size=14)
    for t, (x, y) in enumerate(rows[2]):
        d.named(x - 52, y - 18, 104, 36, f"task {t}", TASKS[1])
    d.text(WIDTH / 2, 294, "dashed: costs neither arithmetic nor memory traffic", colour=QUIET, size=14)
    return d


PICTURES: dict[str, Callable[[], Drawing]] = {
    drawn.__name__.replace("_", "-"): drawn
    for drawn in (level_as_modules, level_fused, routing, ple, pcgrad, gram, hard_concrete, snr)
}
