"""The model of GPU launches: made-up machine code whose numbers follow by hand, and the launches that it is fed."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.gpu_model import __main__ as command  # noqa: E402
from benchmarks.gpu_model.card import H100, Card  # noqa: E402
from benchmarks.gpu_model.cubin import Cubin  # noqa: E402
from benchmarks.gpu_model.launches import CPU, steps  # noqa: E402
from benchmarks.gpu_model.model import Need, need, predict, resident, waves  # noqa: E402
from benchmarks.gpu_model.plan import Part, plan  # noqa: E402
from benchmarks.gpu_model.sass import Code  # noqa: E402
from benchmarks.peers.shape import TrunkShape  # noqa: E402
from benchmarks.suites.mixture import LEVEL, TWO_LEVELS  # noqa: E402
from mtlkernels.ops._triton import DTYPES as KINDS  # noqa: E402
from mtlkernels.ops._triton import Kind, Tile  # noqa: E402
from mtlkernels.ops._triton_splits import card  # noqa: E402
from mtlkernels.ops.activations import CODES  # noqa: E402
from mtlkernels.ops.level.triton import tiles  # noqa: E402

# A way through a loop of products, in a loop over experts, and a way through another, behind which there is a sum.
SASS = """
	code for sm_90a
        /*0000*/                   S2R R0, SR_CTAID.X ;                                    /* 0x0000000000007919 */
                                                                                           /* 0x000ff00000000800 */
        /*0010*/               @P0 BRA 0x110 ;                                             /* 0x0000000000007919 */
        /*0020*/                   LDG.E.64 R2, desc[UR4][R2.64] ;                         /* 0x0000000000007919 */
        /*0030*/                   DEPBAR.LE SB0, 0x2 ;                                    /* 0x0000000000007919 */
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;                           /* 0x0000000000007919 */
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;         /* 0x0000000000007919 */
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4].tnspB, R24, gsb0 ;  /* 0x00000000000079 */
        /*0070*/                   LDGSTS.E.BYPASS.128 [R33], desc[UR12][R12.64], P5 ;     /* 0x0000000000007919 */
        /*0080*/                   LDGSTS.E.BYPASS.128 [R33+0x1000], desc[UR12][R10.64], P5 ;  /* 0x000000000000791 */
        /*0090*/              @!P5 BRA 0x30 ;                                              /* 0x0000000000007919 */
        /*00a0*/                   STG.E.128 desc[UR4][R4.64], R24 ;                       /* 0x0000000000007919 */
        /*00b0*/               @P1 BRA 0x20 ;                                              /* 0x0000000000007919 */
        /*00c0*/                   STG.E.U16 desc[UR4][R4.64], R24 ;                       /* 0x0000000000007919 */
        /*00d0*/                   EXIT ;                                                  /* 0x0000000000007919 */
        /*0110*/                   HGMMA.64x32x16.F32.BF16 R24, R8, gdesc[UR4], R24 ;      /* 0x0000000000007919 */
        /*0120*/              @!P5 BRA 0x110 ;                                             /* 0x0000000000007919 */
        /*0130*/                   LDG.E.128 R4, desc[UR4][R4.64] ;                        /* 0x0000000000007919 */
        /*0140*/               @P2 BRA 0x130 ;                                             /* 0x0000000000007919 */
        /*0150*/                   EXIT ;                                                  /* 0x0000000000007919 */
        /*0160*/                   BRA 0x160;                                              /* 0x0000000000007919 */
        /*0170*/                   NOP;                                                    /* 0x0000000000007919 */
"""
# Rates with which each of the first loop's resources is busy for 256 cycles a step, and round latencies.
CARD = replace(
    H100, multiprocessors=10, l2_bytes=32.0, l1_latency=10, l2_latency=100, memory_latency=1000, barrier=50, ramp=0.0
)
TILE = Tile(128, 128, 32, 8, 3)


def code() -> Code:
    return Code(SASS)


def test_machine_code_is_read() -> None:
    found = code()
    assert len(found.instructions) == 20
    assert [(loop.begin, loop.end) for loop in found.loops] == [
        (0x20, 0xB0),
        (0x30, 0x90),
        (0x110, 0x120),
        (0x130, 0x140),
    ]
    first, second = found.products
    assert [str(mma) for mma in first.products] == ["HGMMA 64x128x16"] * 2
    assert first.arithmetic == 2 * 64 * 128 * 16 and second.arithmetic == 64 * 32 * 16
    # Both operands from shared memory, and the second alone.
    assert first.products[0].shared_elements == 16 * (64 + 128) and second.products[0].shared_elements == 16 * 32
    assert first.moved("LDGSTS") == 32
    assert found.around(first) == [found.loops[0]] and [found.depth(loop) for loop in found.loops] == [0, 1, 0, 0]
    assert [i.address for i in found.own(found.loops[0])] == [0x20, 0xA0, 0xB0]
    assert [i.address for i in found.once(first)] == [0x00, 0x10, 0xC0, 0xD0]
    assert [i.address for i in found.once(second)] == [0x00, 0x10, 0x150]
    assert found.others(first) == [found.loops[0]] and found.others(second) == [found.loops[3]]


def test_what_a_program_needs() -> None:
    """Three experts of five steps each: by hand."""
    found = need(Part(7, 0, 3, 15, chain=2, near=4, far=2), code(), TILE, cold=False, card=CARD)
    issued = 4 + 3 * 3
    stored = 3 * 16 * 256 / 32
    assert found.busy == (15 * 256, 2 * (issued + 15 * 7), 15 * 256, 15 * 256 + stored)
    fills, waits = 3 * (2 * 100 + 100), 4 * 10 + 2 * 100
    # A step takes as long as its products do.
    assert found.alone == 2 * issued + fills + waits + stored + 15 * 256
    assert max(found.busy) == found.busiest
    cold = need(Part(7, 0, 3, 15, chain=2, near=4, far=2), code(), TILE, cold=True, card=CARD)
    # Two stages are on their way while one is used, so that a step takes half of memory's latency at least.
    assert cold.alone == 2 * issued + 3 * (2 * 100 + 1000) + 4 * 10 + 2 * 1000 + stored + 15 * 500
    assert cold.busy == found.busy


def test_one_loop_over_all_members() -> None:
    """What branches skip runs once a member, and copies go on meanwhile; tensor cores are idle behind a wait."""
    one = SASS.replace("@P0 BRA 0x110", "@P0 BRA 0x20").replace("@!P5 BRA 0x30", "@P5 BRA 0xb0")
    found = Code(one.replace("LDG.E.64 R2, desc[UR4][R2.64]", "WARPGROUP.DEPBAR.LE gsb0, 0x0"))
    loop = found.products[0]
    assert [i.address for i in loop.skipped] == [0xA0] and len(loop.always) == 9
    assert loop.waits_for_products == 1 and not found.around(loop)
    known = need(Part(1, 0, 3, 15, chain=2), found, TILE, cold=False, card=CARD)
    once, fill, store = 2 * 4, 2 * 100 + 100, 3 * (2 + 16 * 256 / 32)
    assert [i.address for i in loop.after_products] == [0x20, 0x30, 0x40]
    step = 256 + CARD.product_latency + 2 * 3 + CARD.barrier
    assert known.alone == once + fill + 2 * 2 * 10 + 15 * step + store
    far = need(Part(1, 0, 3, 15, chain=2), found, TILE, cold=False, card=replace(CARD, l2_bytes=16.0))
    assert far.alone == once + fill + 15 * 512  # copies take longer than all that they go on beside


def test_tensor_cores_are_idle_from_one_pass_to_the_next() -> None:
    copy = "LDGSTS.E.BYPASS.128 [R33+0x1000], desc[UR12][R10.64], P5"
    loop = Code(SASS.replace(copy, "WARPGROUP.DEPBAR.LE gsb0, 0x0")).products[0]
    assert [i.address for i in loop.after_products] == [0x30, 0x40, 0x80, 0x90]
    assert code().products[0].after_products == ()


def test_copies_that_are_waited_for_at_once_take_their_time() -> None:
    """Where they begin behind all products, and the next pass waits for them before its own."""
    part, copy = Part(1, 0, 3, 15, chain=2), "LDGSTS.E.BYPASS.128 [R33], desc[UR12][R12.64], P5"
    ahead = SASS.replace(copy, "WARPGROUP.DEPBAR.LE gsb0, 0x0")
    behind = ahead.replace("DEPBAR.LE SB0, 0x2", "DEPBAR.LE SB0, 0x0")
    assert Code(behind).products[0].waits_for_copies and not Code(ahead).products[0].waits_for_copies
    assert not Code(SASS.replace("SB0, 0x2", "SB0, 0x0")).products[0].waits_for_copies  # beside products
    with_copies, without = (need(part, Code(text), TILE, cold=True, card=CARD) for text in (behind, ahead))
    step = 256 + CARD.product_latency + 2 * 5 + CARD.barrier
    assert with_copies.alone - without.alone == 15 * (step + 16 * 256 / 32 + 1000 - max(step, 1000 / 2))
    assert with_copies.busy == without.busy


def test_other_loops_run_as_often_as_the_plan_says() -> None:
    one = need(Part(1, 1, 1, 1), code(), TILE, cold=False, card=CARD)
    many = need(Part(1, 1, 1, 1, others=lambda *_: 11), code(), TILE, cold=False, card=CARD)
    assert many.busy[1] - one.busy[1] == 2 * 10 * 2  # the loop behind the product's, not the one on another way
    assert many.busy[3] - one.busy[3] == 10 * 16 * 256 / 32  # a load of 16 bytes a thread


def test_programs_at_a_time() -> None:
    small = Cubin(registers=32, stack=0, shared=0, sass="")
    assert resident(TILE, small, H100) == 8  # 64 warps
    assert resident(replace(TILE, warps=1), small, H100) == 32  # programs
    assert resident(TILE, replace(small, registers=128), H100) == 2
    assert resident(TILE, replace(small, registers=129), H100) == 1  # 136 registers a thread
    assert resident(TILE, replace(small, shared=75 * 1024), H100) == 3
    assert resident(TILE, replace(small, shared=76 * 1024), H100) == 2  # with the reserved kilobyte


def test_waves_and_their_tail() -> None:
    """Ten multiprocessors with two programs each at a time."""
    waiting, busy = Need((10.0, 0.0, 0.0, 0.0), 100.0), Need((10.0, 60.0, 0.0, 0.0), 100.0)
    assert waves(20, 2, waiting, CARD) == 100.0  # together they take no longer than one
    assert waves(20, 2, busy, CARD) == 120.0
    assert waves(10, 2, busy, CARD) == waves(3, 2, busy, CARD) == 100.0  # one each
    assert waves(11, 2, busy, CARD) == 120.0  # one of them has two
    assert waves(65, 2, busy, CARD) == 3 * 120.0 + 100.0
    assert waves(0, 2, busy, CARD) == 0.0


def test_a_launch_takes_the_longer_of_its_waves_and_its_traffic() -> None:
    step = steps(LEVEL, 4096, torch.bfloat16, False)[0]
    cubin = Cubin(64, 0, 1024, SASS)
    found = predict(step, cubin, replace(H100, memory=1e15))
    assert found.binds != "memory" and found.total > max(found.bounds.values())
    slow = predict(step, cubin, replace(H100, memory=1e9))
    assert slow.binds == "memory"
    assert slow.bounds["memory"] == pytest.approx(1e6 * step.work.written / (1e9 * H100.memory_share))
    assert slow.total == pytest.approx(slow.bounds["memory"] + 1.5, abs=3)  # the ramp, and the memory's idle ends
    assert slow.share(H100.peak) == pytest.approx(step.work.flop / (1e-6 * slow.total * 989.4e12), rel=1e-3)


def test_launches_are_those_of_the_launchers() -> None:
    found = [step.launch for step in steps(LEVEL, 4096, torch.bfloat16, True)]
    kind = Kind.of(torch.bfloat16, True)
    assert kind.dtype == KINDS[torch.bfloat16]
    first = tiles.roomy(tiles.product(kind, 4096, 256))
    assert found[0].name == "layer_forward" and found[0].tile == first
    mixing = tiles.mixing(kind, 3, 12, 4096, 128, 256, CODES["relu"], True, card(CPU))
    assert found[1].name == "last_forward" and found[1].tile == mixing
    assert found[-1].name == "weight_gradient" and found[-1].tile == tiles.WEIGHT_GRADIENT[kind.operands]
    assert found[0].arguments["depth"] == 416 and found[0].constants["LINEAR_GATES"] is True


@pytest.mark.parametrize("shape", [LEVEL, TWO_LEVELS], ids=["A", "A2"])
@pytest.mark.parametrize("rows", [1, 300, 4096, 65536])
@pytest.mark.parametrize("training", [False, True])
def test_plans_have_the_programs_of_the_launch(shape: TrunkShape, rows: int, training: bool) -> None:
    for step in steps(shape, rows, torch.bfloat16, training):
        assert sum(part.programs for part in plan(step.launch)) == step.launch.programs


def test_plans_do_the_work_of_the_launch() -> None:
    """Of widths that are multiples of all tiles but for the gates', which are few."""
    shape = replace(LEVEL, in_features=512)
    for step in steps(shape, 4096, torch.bfloat16, True):
        tile = step.launch.tile
        area = tile.rows * tile.columns * tile.depth
        planned = sum(2 * area * part.programs * part.steps for part in plan(step.launch) if part.product is not None)
        assert planned == pytest.approx(step.work.flop, rel=0.05)


def test_every_number_of_a_card_has_a_source() -> None:
    assert {field.name for field in fields(Card)} == {"name", "sources", *H100.sources}
    assert H100.peak == pytest.approx(989.4e12, rel=1e-3)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "compile_kernel", lambda *_: Cubin(64, 0, 1024, SASS))
    assert command.main(["--rows", "4096", "--workload", "A2", "--json", str(tmp_path / "model.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| last_forward |") == 4 and printed.count("| mix_backward |") == 2
    assert "no kernel has run" in printed and "assumed" in printed
    passes = json.loads((tmp_path / "model.json").read_text())["passes"]
    assert [each["name"] for each in passes] == ["forward", "forward in training", "backward"]
    for each in passes:
        assert each["us"] == pytest.approx(sum(launch["total"] for launch in each["launches"]))
