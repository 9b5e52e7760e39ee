"""Cases for levels whose gates are linear layers, by Triton; for the interpreter and for GPUs alike."""

from __future__ import annotations

import torch

from tests.triton.cases import Case

SMALL = Case("small", 9, (8, 7, 6), activations=(3, 1), num_inputs=4)


def cases(scale: int = 1) -> list[Case]:
    """Gates of one input or of one each; on a GPU, ``scale`` makes the batches of the larger ones larger."""
    f16, bf16 = torch.float16, torch.bfloat16
    return [
        Case("one_row", 1, (7, 5)),
        Case("one_gate", 9, (8, 6, 4), 3, 1, (1, 2)),
        Case("no_rows", 0, (7, 6, 5), activations=(1, 3), num_inputs=3),
        Case("odd", 37 * scale, (33, 21, 19), activations=(1, 2), num_inputs=3),
        Case("odd_one_input", 37 * scale, (33, 21, 19), 5, 4, (1, 2)),
        Case("more_inputs_than_gates", 37, (33, 21, 19), 6, 2, (1, 2), num_inputs=4),
        Case("aligned", 40 * scale, (48, 32, 16), activations=(1, 1)),
        Case("aligned_inputs", 70 * scale, (80, 144, 80), 4, 3, (3, 1), num_inputs=3),
        Case("aligned_one_layer", 70 * scale, (64, 32), 3, 2, (3,)),
        Case("three_layers", 45 * scale, (16, 32, 48, 16), activations=(4, 5, 6), dtype=f16),
        Case("three_layers_odd", 21, (9, 20, 11, 7), activations=(3, 4, 0), num_inputs=3),
        Case("unaligned", 37 * scale, (32, 32, 16), activations=(1, 1), unaligned=True),
        Case("strided", 35, (32, 16, 16), activations=(1, 4), num_inputs=3, strided=True),
        Case("no_biases", 18, (20, 12, 8), activations=(1, 1), biases=(False, False), gate_biases=(False,)),
        Case("all_biases", 18, (20, 12, 8), activations=(1, 1), gate_biases=(True,)),
        Case("eight_gates", 35, (32, 16, 16), 7, 8, (1, 1)),
        Case("more_gates_than_fit", 35, (20, 12), 3, 9),
        Case("more_gates_than_fit_aligned", 50, (32, 16, 16), 5, 11, (1, 1), num_inputs=11),
        Case("unfused", 35, (20, 12, 24), 3, 2, (3, 4), fused=False),
        Case("wider_than_a_tile", 40 * scale, (32, 16, 16), 40, 2, (1, 1), largest_gate=40),
        Case("wider_than_a_tile_odd", 18, (5, 4), 40, 2, num_inputs=2, largest_gate=40),
        Case("many_gates", 3, (4, 3), 70, 66, largest_gate=3),
        Case("bf16", 40 * scale, (48, 32, 16), activations=(1, 1), dtype=bf16, num_inputs=3),
        Case("bf16_odd", 37, (19, 21, 9), activations=(3, 1), dtype=bf16),
        Case("f16", 140 * scale, (48, 144, 80), activations=(1, 2), dtype=f16),
        Case("f16_odd_unfused", 37, (19, 21, 9), activations=(4, 6), dtype=f16, num_inputs=3, fused=False),
    ]
