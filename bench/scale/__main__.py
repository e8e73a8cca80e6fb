"""`python -m bench.scale`: prints the tables of docs/scale.md, under other assumptions too, or writes them there."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from ..command_line import CommandError, end_with, needing
from .assumptions import Assumptions
from .networks import NETWORKS

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale",
        description="Arithmetic of activation memory, traffic and time on many GPUs. Nothing is measured.",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="networks whose names contain one of these words, such as 405B"
    )
    parser.add_argument("--write", action="store_true", help="write the tables into docs/scale.md, by the defaults")
    for field in fields(Assumptions):
        option = f"--{field.name.replace('_', '-')}"
        kind = int if isinstance(field.default, int) else float
        parser.add_argument(option, type=kind, default=field.default, metavar="NUMBER", help="default: %(default)g")
    given = vars(parser.parse_args(arguments))
    only, write = given.pop("only"), given.pop("write")
    try:
        assumed = Assumptions(**given)
    except ValueError as error:
        raise CommandError(f"bench.scale: {error}") from error
    if write and (only or assumed != Assumptions()):
        raise CommandError("bench.scale: --write takes all networks and the defaults, got other options beside it")
    chosen = [network for network in NETWORKS if not only or any(word in network.name for word in only)]
    if not chosen:
        known = "; ".join(network.name for network in NETWORKS)
        raise CommandError(f"bench.scale: --only must name a network, got {' '.join(only)}; there are: {known}")
    from .tables import all_tables  # not before the options, so that --help comes at once

    tables = all_tables(chosen, assumed)
    if not write:
        print("\n\n".join(tables.values()))
        return 0
    with needing(f"bench.scale: the page must be a file with a place for each table, got {PAGE}"):
        PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), tables), encoding="utf-8")
    print(f"{len(tables)} tables: {PAGE}")
    return 0


def with_tables(page: str, tables: Mapping[str, str]) -> str:
    """A page with the tables between their marks, `<!-- table: name -->` and `<!-- end -->`.

    Raises:
        ValueError: if it has not one place for each table.
    """
    places = re.findall(r"<!-- table: (\w+) -->.*?<!-- end -->", page, re.DOTALL)
    if sorted(places) != sorted(tables):
        raise ValueError(f"places for {', '.join(places) or 'none'}; needed: {', '.join(tables)}")
    return re.sub(
        r"(<!-- table: (\w+) -->).*?(<!-- end -->)",
        lambda place: f"{place[1]}\n\n{tables[place[2]]}\n\n{place[3]}",
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    end_with(main)
