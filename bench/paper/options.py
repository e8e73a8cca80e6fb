"""The command line of `python -m bench.paper`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..command_line import integer
from .experiment import EXPERIMENTS

DEFAULT_OUTPUT, QUICK_OUTPUT = Path("bench/results/paper"), Path("bench/results/latest/paper")


@dataclass(frozen=True)
class Options:
    """What was asked for, with defaults filled in."""

    only: tuple[str, ...] = tuple(EXPERIMENTS)
    quick: bool = False
    full: bool = False
    cifar10: Path | None = None
    imagenet: Path | None = None
    fresh: bool = False
    device: str = "auto"
    output: Path = DEFAULT_OUTPUT
    seed: int = 0
    threads: int | None = None


def parse(arguments: Sequence[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper",
        description="The experiments of Sander, Ablin and Peyré (NeurIPS 2022), small enough for two CPU cores: "
        + "; ".join(f"{name} ({what})" for name, what in EXPERIMENTS.items())
        + ".",
        epilog="Writes a JSON file and a picture of each experiment, and index.html with all of them. A run that was "
        "stopped goes on where it was: what has figures of the same settings is not measured again. A check that is "
        "not met is printed, and is no failure; status 1 means that an experiment ended in an error.",
    )
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS, metavar="NAME", help="run these")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="tiny networks, to see in seconds that all runs; checks are not judged"
    )
    size.add_argument(
        "--full",
        action="store_true",
        help="the authors' depths where no data set is needed (reconstruction, linear_weights); takes hours on a CPU",
    )
    parser.add_argument(
        "--cifar10",
        type=Path,
        metavar="DIRECTORY",
        help="the folder with cifar-10-batches-py: gradient_error, depth_sweep and untie run on CIFAR-10 with the "
        "authors' settings, days on a CPU; needs torchvision, nothing is downloaded",
    )
    parser.add_argument(
        "--imagenet",
        type=Path,
        metavar="DIRECTORY",
        help="the folder with train and val, a folder for each class: untie and ordinary_network run on ImageNet with "
        "the authors' settings; needs torchvision and a GPU",
    )
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU where there is one; default"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIRECTORY", help=f"default: {DEFAULT_OUTPUT}; with --quick {QUICK_OUTPUT}"
    )
    parser.add_argument("--seed", type=integer(0, 2**31), default=0, help="of weights, data and batches; default: 0")
    parser.add_argument(
        "--threads", type=integer(1, 1024), help="trainings at a time on a CPU; default: as many as torch has threads"
    )
    given = vars(parser.parse_args(arguments))
    # Figures of a quick run must not take the place of others.
    output = given["output"] or (QUICK_OUTPUT if given["quick"] else DEFAULT_OUTPUT)
    return Options(**{**given, "only": tuple(name for name in EXPERIMENTS if name in given["only"]), "output": output})
