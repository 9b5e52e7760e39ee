"""Sub-network routing: training with the L0 penalty closes routes, and ``compact()`` serves what is left.

Two tasks that have features of their own learn which sub-networks they share. Closed routes cost nothing in the trained
trunk already; without the sub-networks that nobody reads any more, the compact one has less to do still.

Run: python examples/snr_compact.py

On an AMD EPYC (Zen 4), 2 cores: 11 of 80 routes stay open, and of 2,955,344 parameters 1,068,416. The compact trunk
gives the same outputs. With all routes open, trained, and compact a request of 1 row takes 0.703, 0.665 and 0.322 ms
(2.18 times as fast as all open), of 64 rows 2.39, 1.77 and 0.996 ms (2.40), of 1024 rows 31.5, 20.2 and 11.8 ms
(2.68).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from common import arguments, print_times
from torch import Tensor, nn

import mtlkernels as mk

FEATURES, TASKS, HALF = 416, 2, 208
L0_WEIGHT = 1e-2  # what an open route costs, in units of the loss


def make_data(steps: int, rows: int) -> tuple[Tensor, Tensor]:
    """x [S, B, D] and targets [S, B, T], each of which depends on a half of the features that is its own."""
    x = torch.randn(steps, rows, FEATURES)
    direction = torch.randn(FEATURES, TASKS) / HALF**0.5
    direction[HALF:, 0] = direction[:HALF, 1] = 0
    return x, torch.sin(x @ direction)


def main() -> None:
    options = arguments(__doc__, steps=400, rows=256).parse_args()
    torch.manual_seed(0)
    trunk = mk.nn.SNR(FEATURES, TASKS, subnet_units=(256, 128), num_subnets=(8, 8), mode="trans")
    towers = nn.ModuleList(nn.Linear(trunk.out_features, 1) for _ in range(TASKS))
    all_open = trunk.compact()  # as long as nothing is trained

    routes = [joint.log_alpha for joint in trunk.joints]
    weights = [p for p in (*trunk.parameters(), *towers.parameters()) if all(p is not route for route in routes)]
    adam = torch.optim.Adam([{"params": weights, "lr": 1e-3}, {"params": routes, "lr": 5e-2}], fused=True)

    print(f"{'step':>5} {'loss':>8} {'open routes':>12}")
    for step, (x, targets) in enumerate(zip(*make_data(options.steps, options.rows), strict=True), 1):
        outputs = torch.cat([tower(h) for tower, h in zip(towers, trunk(x), strict=True)], dim=1)
        loss = F.mse_loss(outputs, targets)
        adam.zero_grad()
        (loss + L0_WEIGHT * trunk.l0_penalty()).backward()
        adam.step()
        if step % max(1, options.steps // 8) == 0:
            print(f"{step:>5} {loss.item():>8.4f} {trunk.routes().num_open:>12}")

    trunk.eval()  # z is deterministic now
    compact = trunk.compact()
    print(f"\n{trunk.routes()}")
    sizes = [sum(p.numel() for p in module.parameters()) for module in (trunk, compact)]
    print(f"\nparameters: {sizes[0]:,} in full, {sizes[1]:,} compact")

    requests = {rows: torch.randn(rows, FEATURES) for rows in (1, 64, 1024)}
    with torch.inference_mode():
        pairs = list(zip(trunk(requests[64]), compact(requests[64]), strict=True))
        print(f"largest difference of outputs: {max(float((a - b).abs().max()) for a, b in pairs):.1e}")
        for rows, x in requests.items():
            calls = {
                "all routes open": partial(all_open, x),
                "trained": partial(trunk, x),
                "compact": partial(compact, x),
            }
            print_times(f"A request of {rows} rows", calls, options.rounds)


if __name__ == "__main__":
    main()
