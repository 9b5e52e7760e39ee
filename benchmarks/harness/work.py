"""What a row's work takes at least, from its shapes alone: the arithmetic, and the bytes that have to move."""

from __future__ import annotations

from dataclasses import dataclass

# A backward pass takes the arithmetic of two forward passes, one for each factor's gradient, and moves each operand's
# gradient beside the operand.
TRAINING_FLOP, TRAINING_TRAFFIC = 3, 2


@dataclass(frozen=True)
class Work:
    """``flop`` counts a multiply-add as two; ``traffic`` is bytes, each operand read or written once."""

    flop: float
    traffic: float


def by_row(rows: int, products: int, parameters: int, features: int, itemsize: int, training: bool) -> Work:
    """Work that is the same in each row, as that of linear layers.

    Args:
        products: multiply-adds a row.
        parameters: numbers that all rows share.
        features: numbers read and written a row, without those that need not leave the chip.
    """
    elements = parameters + rows * features
    return Work(
        flop=2.0 * rows * products * (TRAINING_FLOP if training else 1),
        traffic=float(elements * itemsize * (TRAINING_TRAFFIC if training else 1)),
    )


def projection(num_tasks: int, parameters: int, itemsize: int) -> Work:
    """PCGrad: half of the Gram matrix and one weighted sum. Gradients are read twice, the update is written once.

    The second reading cannot be spared: its coefficients depend on all of the first.
    """
    return Work(
        flop=float(num_tasks * (num_tasks + 1) + 2 * num_tasks) * parameters,
        traffic=float((2 * num_tasks + 1) * parameters * itemsize),
    )


def sparse_projection(num_tasks: int, touched: int, width: int, itemsize: int, index: int) -> Work:
    """PCGrad of an embedding's gradients, of whose rows each task touches so many, indices of ``index`` bytes included.

    The update has the rows of all tasks; between them they touch nearly all of the twice as many that they choose from.
    """
    return Work(
        flop=projection(num_tasks, touched * width, itemsize).flop,
        traffic=float((2 * num_tasks + 2) * touched * (width * itemsize + index)),
    )
