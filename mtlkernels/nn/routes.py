"""Which routes of an SNR trunk are open, as numbers and as a small picture."""

from __future__ import annotations

import math
from dataclasses import dataclass

_BARS = "·▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class RouteMap:
    """The coding variables of a network at test time; ``print`` draws them.

    Attributes:
        mode: "trans" or "aver".
        coding: for each set of routes, from the lowest level up, a row for each sub-network (or task) above that holds
            z for each sub-network below; 0 where the route is closed.
    """

    mode: str
    coding: tuple[tuple[tuple[float, ...], ...], ...]

    @property
    def num_routes(self) -> int:
        """How many routes there are."""
        return sum(len(row) for matrix in self.coding for row in matrix)

    @property
    def num_open(self) -> int:
        """How many of them are open."""
        return sum(z != 0 for matrix in self.coding for row in matrix for z in row)

    def read(self) -> tuple[tuple[int, ...], ...]:
        """For each level, from the lowest up, the sub-networks that some task's representation depends on."""
        above: tuple[int, ...] = tuple(range(len(self.coding[-1])))
        levels: list[tuple[int, ...]] = []
        for matrix in reversed(self.coding):
            above = tuple(j for j in range(len(matrix[0])) if any(matrix[i][j] != 0 for i in above))
            levels.append(above)
        return tuple(reversed(levels))

    def __str__(self) -> str:
        """A matrix a set of routes: a column for each sub-network below, a row for each above, a bar as high as z."""
        lines = [f"SNR-{self.mode.capitalize()}: {self.num_open} of {self.num_routes} routes open"]
        for level, (matrix, read) in enumerate(zip(self.coding, self.read(), strict=True), 1):
            above = "tasks" if level == len(self.coding) else f"level {level + 1}"
            lines.append(f"level {level} → {above}")
            lines.append("".join([" " * 5, *(f"{j:3}" for j in range(len(matrix[0])))]))
            lines += ["".join([f"{i:5}", *(f"  {_bar(z)}" for z in row)]) for i, row in enumerate(matrix)]
            unread = [str(j) for j in range(len(matrix[0])) if j not in read]
            if unread:
                lines.append(f"  nobody reads {', '.join(unread)}")
        return "\n".join(lines)


def _bar(z: float) -> str:
    return _BARS[math.ceil(z * (len(_BARS) - 1))] if 0 <= z <= 1 else "?"
