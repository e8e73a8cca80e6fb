"""`python -m tests.support.fuzz`: the search of `tests/stack/test_fuzz.py`, for as long as it is told to."""

from __future__ import annotations

import argparse
import itertools
import random
import time
import warnings

import torch

from tests.support.fuzz.search import search

ROUND = {"adjoint": 300, "checkpoint": 80, "backprop": 20}
"""Recipes for each seed."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="start no further round after this time")
    parser.add_argument("--seed", type=int, help="of the first round, to repeat it; the next rounds count on from it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    end = time.monotonic() + 60 * options.minutes
    first = random.randrange(10**6) if options.seed is None else options.seed
    failed = []
    for seed in itertools.count(first):
        print(f"seed {seed}", flush=True)
        for gradient, count in ROUND.items():
            try:
                search(gradient, count, seed)
            except AssertionError as error:
                failed.append(seed)
                print(f"{gradient}: {error}", *getattr(error, "__notes__", ()), sep="\n", flush=True)
        if time.monotonic() > end:
            break
    print(f"{sum(ROUND.values()) * (seed + 1 - first)} recipes; failed seeds: {sorted(set(failed)) or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
