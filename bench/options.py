"""The command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .command_line import integer
from .section import DEFAULT, SECTIONS

DEFAULT_OUTPUT = Path("bench/results/latest")


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line, with defaults filled in."""

    only: tuple[str, ...]
    epochs: int
    depths: tuple[int, ...]
    rounds: int
    device: str
    output: Path
    seed: int
    threads: int | None
    quick: bool


def parse(arguments: Sequence[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Memory, time, gradient error and test accuracy of training residual networks with plain "
        "backprop, with checkpointing and with each reverse solver, Euler and Heun.",
        epilog="Writes results.json, table.md and the plots of the sweep (PNG) to the output directory. Ends with "
        "status 1 if a section failed; a missed target is printed, and is no failure.",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS,
        default=DEFAULT,
        metavar="SECTION",
        help="run only these sections: digits (trains on scikit-learn's handwritten digits), cost (time and memory of "
        "a step of the reference job, an MLP stack of 64 and of 16 steps), sweep (memory, time and gradient error "
        "against depth), kernels (the pointwise ops alone: on a GPU the bandwidth of each backend beside a copy's, on "
        "a CPU the time beside plain torch's), mlp (a residual MLP whose depth is one op, beside backprop of the same "
        "network, eager and compiled, takes two to four minutes), backends (on a GPU: the backends of a residual MLP "
        "beside each other at many sizes, and beside plain backprop where rows are few or layers wide, takes two "
        "minutes), accuracy (gradient errors of trained digits nets under every solver, takes about twenty minutes), "
        "stored (increments stored in a few bits: gradient errors of trained networks, and whole trainings, takes "
        "twenty minutes), overhead (backward passes beside torch.utils.checkpoint, on large and on tiny blocks), "
        "models (converted models of transformers and timm: what their layers hold and the time of a step, takes two "
        "minutes), finetuning (the same, trained: gradient errors and whole fine-tunings, takes three minutes); "
        "default: cost, digits and sweep",
    )
    parser.add_argument("--epochs", type=integer(1, 10_000), help="epochs of each training on the digits; default: 5")
    parser.add_argument(
        "--depths",
        type=integer(1, 100_000),
        nargs="+",
        metavar="N",
        help="steps N of the sweep; default: 8 16 32 64 128 256",
    )
    parser.add_argument(
        "--rounds",
        type=integer(1, 10_000),
        help="rounds of timing, in each of which every mode takes one step; more rounds, narrower spread; the "
        "cost section takes two more, the sweep fewer, but 2 at least, where stacks are deep; default: 4",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU where there is one; default"
    )
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIRECTORY", help="default: bench/results/latest"
    )
    parser.add_argument(
        "--seed", type=integer(0, 2**32 - 1), default=0, help="of weights, data and batches; default: 0"
    )
    parser.add_argument(
        "--threads",
        type=integer(1, 1024),
        help="CPU threads that torch uses, and trainings on the digits at a time; default: torch's own choice",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small networks and few rounds, to see in seconds that everything runs; targets are not judged",
    )
    given = parser.parse_args(arguments)
    return Options(
        only=tuple(section for section in SECTIONS if section in given.only),
        epochs=given.epochs or (1 if given.quick else 5),
        depths=tuple(sorted(set(given.depths or ((4, 16) if given.quick else (8, 16, 32, 64, 128, 256))))),
        rounds=given.rounds or (2 if given.quick else 4),
        device=given.device,
        output=given.output,
        seed=given.seed,
        threads=given.threads,
        quick=given.quick,
    )
