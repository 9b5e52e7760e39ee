"""Into how many parts sums are split, which needs no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from mtlkernels.ops._triton import DTYPES, Kind, Tile  # noqa: E402
from mtlkernels.ops._triton_splits import MAX_SPLITS, Card, Sums, splits  # noqa: E402
from mtlkernels.ops.activations import CODES  # noqa: E402
from mtlkernels.ops.level.triton import tiles  # noqa: E402

H100 = 132
HALF = Kind(DTYPES[torch.bfloat16], True, "ieee")


def mixing(rows: int, multiprocessors: int = H100) -> int:
    """The splits of the last layer of workload A: 12 experts, 3 gates, 256 to 128 features in bfloat16."""
    tile = tiles.mixing(HALF, 3, 12, rows, 128, 256, CODES["relu"], True, Card(multiprocessors, (8, 0)))
    assert tile is not None
    return splits(tiles.mixing_sums(tile, 12, rows, 128, 256, 3, 2), multiprocessors)


def weights(rows: int, features: int, multiprocessors: int = H100) -> int:
    """The splits of the weights' gradients of workload A's experts behind that number of features."""
    _, sums = tiles.weights(HALF, ((12, 256, features), (12, 128, 256)), rows, 2, Card(multiprocessors, (8, 0)))
    return splits(sums, multiprocessors)


def test_enough_blocks_are_not_split() -> None:
    assert mixing(8192) == 1  # 128 blocks
    assert mixing(65536) == 1
    assert weights(4096, 416) == 1  # 120 blocks


def test_few_blocks_are_split_over_the_multiprocessors() -> None:
    assert mixing(4096) == 2  # 64 blocks
    assert mixing(1024) == 3  # 16 blocks, whose parts the last program adds alone
    assert mixing(1) > 1
    assert weights(4096, 128) == 2  # 48 blocks; in five parts 240 programs would come in two waves


def test_the_loop_that_copies_ahead() -> None:
    """On one kind of card, in half precision, unless a training step splits the sums of three gates."""

    def chosen(
        rows: int, gates: int, save: bool, capability: tuple[int, int] = (9, 0), kind: Kind = HALF
    ) -> Tile | None:
        return tiles.mixing(kind, gates, 12, rows, 128, 256, CODES["relu"], save, Card(H100, capability))

    ahead, wide = tiles.AHEAD_MIXING[HALF.operands], tiles.MIXING[HALF.operands].wide
    assert [chosen(65536, gates, True) for gates in (1, 2, 3)] == [ahead] * 3
    assert [chosen(1024, gates, save) for gates in (2, 3) for save in (True, False)] == [ahead, ahead, wide, ahead]
    assert [chosen(65536, 3, True, other) for other in ((8, 0), (8, 6), (10, 0), (12, 0))] == [wide] * 4
    assert chosen(65536, 4, True) == tiles.MIXING[HALF.operands].full
    assert ahead not in (chosen(16, 3, True), chosen(65536, 3, True, kind=HALF._replace(aligned=False)))


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
def test_activations_of_the_wide_tiles(capability: tuple[int, int]) -> None:
    """relu and leaky_relu; behind others, the compiler would spill."""
    choice = tiles.MIXING[HALF.operands]
    wide = tiles.AHEAD_MIXING[HALF.operands] if capability == tiles.AHEAD else choice.wide
    for name, expected in (("relu", wide), ("leaky_relu", wide), ("gelu", choice.full), ("silu", choice.full)):
        found = tiles.mixing(HALF, 3, 12, 65536, 128, 256, CODES[name], True, Card(H100, capability))
        assert found == expected, name


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)], ids=str)
def test_large_tiles_are_for_large_cards_and_for_much_to_read(capability: tuple[int, int]) -> None:
    """Of workload A; of few rows, and of few columns, larger tiles would read more."""
    card, shapes = Card(H100, capability), ((12, 256, 416), (12, 128, 256))
    others = [tiles.PRODUCT[HALF.operands].full, tiles.WEIGHT_GRADIENT[HALF.operands]]
    larger = [tiles.LARGE_INPUT[HALF.operands], tiles.LARGE_WEIGHT[HALF.operands]]

    def chosen(rows: int, columns: int, kind: Kind = HALF) -> list[Tile]:
        found = tiles.inputs(kind, [12], rows, columns, 256, 2, card), tiles.weights(kind, shapes, rows, 2, card)
        return [tile for tile, _ in found]

    assert chosen(65536, 416) == (larger if capability in ((9, 0), (10, 0)) else others)
    assert chosen(65536, 128)[0] == others[0]
    assert chosen(4096, 416)[1] == others[1]
    assert chosen(16, 416)[0] == tiles.PRODUCT[HALF.operands].short
    wide = HALF._replace(dtype=DTYPES[torch.float32])
    assert chosen(65536, 416, wide) == [tiles.PRODUCT[wide.operands].full, tiles.WEIGHT_GRADIENT[wide.operands]]


def test_one_multiprocessor_splits_nothing() -> None:
    assert mixing(16, 1) == mixing(1024, 1) == weights(4096, 128, 1) == 1


@pytest.mark.parametrize("blocks", [0, 1, 2, 7, 32, 100, 131, 132, 133, 1000, 10**6])
@pytest.mark.parametrize("terms", [0, 1, 2, 12, 1000])
@pytest.mark.parametrize("part", [1, 100, 10**5])
def test_a_split_pays(blocks: int, terms: int, part: int) -> None:
    """Never more parts than terms, and what the busiest multiprocessor reads of operands falls by more than it adds."""
    count = splits(Sums(blocks, terms, 1000, part), H100)
    assert 1 <= count <= max(1, min(terms, MAX_SPLITS))
    if count > 1:
        waves, rounds = -(-blocks * count // H100), -(-blocks // H100)
        assert waves <= 2
        saved = (rounds * terms - waves * -(-terms // count)) * 1000
        assert saved > 4 * part * (waves + count * rounds)
