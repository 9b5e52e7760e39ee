"""What a conversion did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One line of a report.

    ``action`` is "replaced" where a fused operator evaluates experts, all or some of them; "mixing fused" where every
    expert runs as a module, and only their mixing is a fused operator; "left alone" or "reverted". ``path`` is the
    module's name in the model, empty for the model itself; ``part`` what of it; ``detail`` what evaluates it now, or
    why it was left alone.
    """

    action: str
    path: str
    part: str
    detail: str

    def __str__(self) -> str:
        return f"{self.action:<10}  {self.path or '(model)'}  {self.part}: {self.detail}"


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`mtlkernels.convert` or :func:`mtlkernels.revert` did; ``print`` it to read it."""

    lines: tuple[Line, ...]

    @property
    def replaced(self) -> tuple[Line, ...]:
        """The parts whose experts, all or some of them, are evaluated by fused operators now."""
        return self._of("replaced")

    @property
    def mixing_fused(self) -> tuple[Line, ...]:
        """The parts whose experts run as modules, mixed by a fused operator."""
        return self._of("mixing fused")

    @property
    def left_alone(self) -> tuple[Line, ...]:
        """The parts that are as they were, and why."""
        return self._of("left alone")

    @property
    def reverted(self) -> tuple[Line, ...]:
        """The modules that are what they were before their conversion."""
        return self._of("reverted")

    def _of(self, action: str) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.action == action)

    def __str__(self) -> str:
        return "\n".join(map(str, self.lines))
