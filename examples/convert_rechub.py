"""torch-rechub's PLE, embeddings and towers and all, trained and served before and after ``mk.convert(model)``.

Run: python examples/convert_rechub.py

On an AMD EPYC (Zen 4), 2 cores, with `--steps 20`: losses of the two trainings differ by 2e-16 in float64,
predictions by 6e-8 in float32; a request of 1 row takes 3.58 ms before and 1.73 ms after (2.07 times as fast), of 64
rows 6.46 and 3.35 ms (1.93), a training step of 512 rows 104 and 79.4 ms (1.31).
"""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from common import arguments, print_times
from rechub import by_name, click_data, rechub_ple
from torch import Tensor, nn

import mtlkernels as mk

EXACT_STEPS = 10  # in float64


class Trainer:
    """An ordinary training loop; nothing in it knows of mtlkernels."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.dtype = model.to(dtype).train(), dtype
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(self, codes: Tensor, numbers: Tensor, labels: Tensor) -> float:
        predicted = self.model(by_name(codes, numbers.to(self.dtype)))
        loss = F.binary_cross_entropy(predicted, labels.to(self.dtype))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def main() -> None:
    options = arguments(__doc__, steps=200, rows=512).parse_args()
    data = click_data(options.steps * options.rows)
    batches = list(zip(*(part.split(options.rows) for part in data), strict=True))

    before, after = rechub_ple(), rechub_ple()  # the same weights
    print(mk.convert(after))  # all that changes; optimizers, checkpoints and serving stay as they are

    trainers = {"as it is": Trainer(before), "converted": Trainer(after)}
    losses = {name: [trainer.step(*batch) for batch in batches] for name, trainer in trainers.items()}
    print(f"\n{'loss at step':<14}" + "".join(f"{name:>12}" for name in losses))
    for step in sorted({0, options.steps // 4, options.steps // 2, options.steps - 1}):
        print(f"{step + 1:<14}" + "".join(f"{found[step]:>12.6f}" for found in losses.values()))

    # In float32 a training amplifies rounding, whoever rounds; in float64 what remains shows whether losses are equal.
    exact = [Trainer(rechub_ple(), torch.float64), Trainer(rechub_ple(), torch.float64)]
    mk.convert(exact[1].model)
    apart = [abs(exact[0].step(*batch) - exact[1].step(*batch)) for batch in batches[:EXACT_STEPS]]
    print(f"\nlargest difference of losses, {len(apart)} steps in float64: {max(apart):.1e}")

    served = {"as it is": before.eval(), "converted": copy.deepcopy(before)}
    mk.convert(served["converted"])
    requests = {rows: by_name(*(part[:rows] for part in batches[0][:2])) for rows in (1, 64)}

    @torch.no_grad()
    def serve(model: nn.Module, rows: int) -> Tensor:
        return model(requests[rows])

    expected, answer = (serve(model, 64) for model in served.values())
    print(f"largest difference of predictions in float32: {(answer - expected).abs().max():.1e}")
    for rows in requests:
        calls = {name: partial(serve, model, rows) for name, model in served.items()}
        print_times(f"A request of {rows} rows", calls, options.rounds)
    before.train()
    steps = {name: partial(trainer.step, *batches[0]) for name, trainer in trainers.items()}
    print_times(f"A training step of {options.rows} rows", steps, options.rounds)


if __name__ == "__main__":
    main()
