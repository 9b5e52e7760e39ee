"""Reads machine code as ``cuobjdump -sass`` prints it: instructions, loops, tensor-core products, memory accesses."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;", re.MULTILINE)
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_WARP_MMA = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}


@dataclass(frozen=True)
class Mma:
    """A product [m, k] by [k, n] of a warp ("HMMA") or of a warp group ("HGMMA"); where it reads its operands."""

    opcode: str
    m: int
    n: int
    k: int
    shared_elements: int

    def __str__(self) -> str:
        return f"{self.opcode} {self.m}x{self.n}x{self.k}"


@dataclass(frozen=True)
class Instruction:
    """``predicate`` is empty where it always runs."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.name == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def bytes(self) -> int:
        """What a load, store or copy moves for a thread."""
        return next((_BYTES[part] for part in self.opcode.split(".")[1:] if part in _BYTES), 4)

    @property
    def mma(self) -> Mma | None:
        if self.name == "HGMMA":
            m, n, k = map(int, self.opcode.split(".")[1].split("x"))
            left = 0 if re.match(r"R\d+, R\d+", self.operands) else m * k
            return Mma(self.name, m, n, k, left + n * k)
        if self.name == "HMMA":
            return Mma(self.name, *_WARP_MMA[self.opcode.split(".")[1]], 0)
        return None


@dataclass(frozen=True)
class Loop:
    """The instructions from a backward branch's target to the branch."""

    body: tuple[Instruction, ...]

    @property
    def begin(self) -> int:
        return self.body[0].address

    @property
    def end(self) -> int:
        return self.body[-1].address

    def holds(self, other: Loop) -> bool:
        return self != other and self.begin <= other.begin and other.end <= self.end

    @cached_property
    def products(self) -> tuple[Mma, ...]:
        return tuple(mma for i in self.body if (mma := i.mma) is not None)

    @property
    def arithmetic(self) -> int:
        """Multiply-adds of a pass, of a warp or a warp group."""
        return sum(mma.m * mma.n * mma.k for mma in self.products)

    @cached_property
    def skipped(self) -> tuple[Instruction, ...]:
        """What branches inside of it may skip, of what has neither products nor copies: what follows a product."""
        places = {i.address: at for at, i in enumerate(self.body)}
        skipped: set[int] = set()
        for at, branch in enumerate(self.body):
            end = places.get(branch.target or 0, 0)
            if not any(i.name == "LDGSTS" or i.mma for i in self.body[at + 1 : end]):
                skipped.update(range(at + 1, end))
        return tuple(self.body[at] for at in sorted(skipped))

    @cached_property
    def always(self) -> tuple[Instruction, ...]:
        """The rest of it."""
        skipped = set(self.skipped)
        return tuple(i for i in self.body if i not in skipped)

    @property
    def waits_for_products(self) -> int:
        """How often a pass waits until no product is under way any more."""
        return sum(_waits(i) for i in self.body)

    @property
    def waits_for_copies(self) -> bool:
        """Whether a pass waits for all copies of the one before, which makes them when its products are done."""
        waits = [i.operands for i in self.always if i.opcode == "DEPBAR.LE" and i.operands.startswith("SB0")]
        copies = [at for at, i in enumerate(self.always) if i.name == "LDGSTS"]
        if not waits or not copies or not all(operands.endswith(", 0x0") for operands in waits):
            return False
        before = (*self.always[copies[0] :], *self.always[: copies[0]])  # from there on, through the next pass
        return [_waits(i) for i in before if _waits(i) or i.mma is not None][-1:] == [True]

    @property
    def after_products(self) -> tuple[Instruction, ...]:
        """What always follows such a wait in a pass, until its next product begins: no tensor core is at work then."""
        found: list[Instruction] = []
        marks = [i for i in self.always if _waits(i) or i.mma is not None]
        idle = bool(marks) and _waits(marks[-1])  # at the beginning of a pass, as at the end of the one before
        for i in self.always:
            idle = (idle or _waits(i)) and i.mma is None
            if idle:
                found.append(i)
        return tuple(found)

    def moved(self, *names: str) -> int:
        """Bytes that instructions of these names move for a thread in a pass."""
        return sum(i.bytes for i in self.body if i.name in names)


def _waits(instruction: Instruction) -> bool:
    """Whether it waits until no product is under way."""
    return instruction.opcode == "WARPGROUP.DEPBAR.LE" and instruction.operands.endswith(", 0x0")


class Code:
    """A kernel's machine code."""

    def __init__(self, sass: str) -> None:
        found = [Instruction(int(a, 16), p, op, rest) for a, p, op, rest in _LINE.findall(sass)]
        self.instructions = tuple(i for i in found if i.name != "NOP")
        spans = [(i.target, i.address) for i in self.instructions if i.target is not None and i.target < i.address]
        bodies = [tuple(i for i in self.instructions if low <= i.address <= high) for low, high in spans]
        self.loops = sorted(map(Loop, bodies), key=lambda loop: (loop.begin, -loop.end))
        self._ways: dict[int, set[int]] = {}

    @cached_property
    def products(self) -> list[Loop]:
        """Innermost loops with tensor-core instructions, that with the most arithmetic and copies first."""
        found = [loop for loop in self.loops if loop.products and not any(map(loop.holds, self.loops))]
        return sorted(found, key=lambda loop: (-loop.arithmetic, -loop.moved("LDGSTS")))

    def around(self, inner: Loop) -> list[Loop]:
        """The loops that hold it, the outermost first."""
        return [loop for loop in self.loops if loop.holds(inner)]

    def depth(self, loop: Loop) -> int:
        return len(self.around(loop))

    def own(self, loop: Loop) -> tuple[Instruction, ...]:
        """Those of a loop that are in none of the loops inside it."""
        inner = [other for other in self.loops if loop.holds(other)]
        return tuple(i for i in loop.body if not _within(i, inner))

    def once(self, via: Loop | None) -> tuple[Instruction, ...]:
        """Those outside of loops on the ways from the beginning to the end that lead through ``via``."""
        return tuple(i for i in self.instructions if self._leads(i.address, via) and not _within(i, self.loops))

    def others(self, via: Loop | None) -> list[Loop]:
        """The loops on these ways but for innermost ones with products."""
        return [loop for loop in self.loops if self._leads(loop.begin, via) and loop not in self.products]

    def _leads(self, address: int, via: Loop | None) -> bool:
        if via is not None and via.begin not in self._ways:
            edges = self._successors(), self._predecessors()
            self._ways[via.begin] = set().union(*(self._reached(via.begin, each) for each in edges))
        return via is None or address in self._ways[via.begin]

    def _successors(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {i.address: [] for i in self.instructions}
        for here, after in zip(self.instructions, (*self.instructions[1:], None), strict=True):
            if here.target is not None:
                found[here.address].append(here.target)
            ends = here.name in ("BRA", "EXIT") and not here.predicate
            if after is not None and not ends:
                found[here.address].append(after.address)
        return found

    def _predecessors(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {i.address: [] for i in self.instructions}
        for address, after in self._successors().items():
            for other in after:
                found.setdefault(other, []).append(address)
        return found

    @staticmethod
    def _reached(start: int, edges: dict[int, list[int]]) -> set[int]:
        found, waiting = {start}, [start]
        while waiting:
            new = [other for other in edges.get(waiting.pop(), ()) if other not in found]
            found.update(new)
            waiting += new
        return found


def _within(instruction: Instruction, loops: Iterable[Loop]) -> bool:
    return any(loop.begin <= instruction.address <= loop.end for loop in loops)
