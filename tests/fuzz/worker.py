"""One process of the fuzzer: checks cases of one target and writes what came of them to a file."""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import json
import logging
from pathlib import Path

import numpy as np
import torch

from tests.fuzz import engine
from tests.fuzz.calls import counts
from tests.fuzz.targets import TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--cases", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--isolate", action="store_true")
    options = parser.parse_args()
    faulthandler.enable()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # of models that are compiled for many shapes
    np.seterr(all="ignore")  # by which Triton's interpreter computes: special values are among the cases
    torch.set_num_threads(1)
    target = TARGETS[options.target]
    finding = engine.run(target, options.cases, options.seed, options.record, options.isolate)
    found = None if finding is None else dataclasses.asdict(finding)
    options.result.write_text(json.dumps({"finding": found, "counts": counts}))


if __name__ == "__main__":
    main()
