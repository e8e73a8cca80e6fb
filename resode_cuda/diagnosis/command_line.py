"""`python -m resode_cuda diagnose module:factory`: the diagnosis of a model of the user's."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from .diagnosis import diagnose

FACTORY = """a function in an importable module (the current folder is searched first), which returns (stack, x), or a
dictionary with these two and further arguments of resode_cuda.diagnose, such as loss"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("factory", metavar="module:factory", help=FACTORY)
    parser.add_argument(
        "--tolerance",
        type=lambda given: given if given == "amp" else float(given),
        default=1e-2,
        help='of the relative gradient error, or "amp", that of bfloat16 autocast itself; default: 0.01',
    )
    parser.add_argument("--prefer", choices=("memory", "time"), default="memory", help="default: memory")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="write a picture, as .png, .pdf or .svg")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument(
        "--earlier",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="what --json wrote at earlier moments of the same training, the oldest first: shows what became of the "
        "weights' smoothness in depth",
    )


def run(options: argparse.Namespace) -> None:
    """Print the diagnosis.

    Raises:
        SystemExit: for a factory that is none.
    """
    given = _made(options.factory)
    if isinstance(given, tuple) and len(given) == 2:
        given = {"stack": given[0], "x": given[1]}
    if not isinstance(given, dict) or not {"stack", "x"} <= given.keys():
        raise SystemExit(
            f"{options.factory} must return (stack, x) or a dictionary with both, got {type(given).__name__}"
        )
    others = {name: value for name, value in given.items() if name not in ("stack", "x")}
    try:
        earlier = [json.loads(file.read_text()) for file in options.earlier]
    except (OSError, ValueError) as error:
        raise SystemExit(f"--earlier must name files that --json wrote, got {error}") from error
    asked = {"tolerance": options.tolerance, "prefer": options.prefer, "earlier": earlier}
    diagnosis = diagnose(given["stack"], given["x"], **{**asked, **others})
    print(diagnosis)
    if options.json:
        options.json.write_text(json.dumps(diagnosis.to_dict(), indent=1) + "\n")
    if options.figure:
        diagnosis.figure().savefig(options.figure)


def _made(name: str) -> Any:
    module, separator, factory = name.partition(":")
    if not separator:
        raise SystemExit(f"the factory must be given as module:function, got {name!r}")
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), factory)()
    except (ModuleNotFoundError, AttributeError) as error:
        raise SystemExit(f"{name} must be a function that can be imported, got {error}") from error
