"""Links and paths in README.md, CHANGELOG.md, CONTRIBUTING.md and docs/ lead to files and headings that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples" / "README.md",
]
MADE_LATER = {"resode_cuda/fused/timings.json"}
"""What `python -m bench.timings` writes."""


def text_of(page):
    return page.read_text(encoding="utf-8")


def without_code_blocks(page):
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def headings(page):
    """As GitHub names them in links."""
    for heading in re.findall(r"^#+ (.*)$", without_code_blocks(page), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def relative_links(page):
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)) if "://" not in link]


def named_paths(page):
    """`path/like/this.py` and `folder/`, from the root.

    The rows of a table whose head names a folder, as in "in `folder/`", name what is there, and may name other paths
    that begin with a folder of the root.
    """
    folder = ""
    for line in without_code_blocks(page).splitlines():
        if not line.startswith("|"):
            folder = ""
        elif head := re.match(r"\| in `([\w/]+/)`", line):
            folder = head[1]
            continue
        for name in re.findall(r"`([\w./-]+(?:/|\.(?:py|json|md|sh|png|toml|txt|h|cu|cpp)))`", line):
            yield name if (ROOT / name.split("/")[0]).is_dir() else folder + name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    broken = []
    for link in relative_links(page):
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (heading and heading not in headings(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    paths = set(named_paths(page)) - MADE_LATER
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


def test_there_is_something_to_look_at():
    assert len(PAGES) >= 8
    assert sum(len(relative_links(page)) for page in PAGES) > 20
    assert sum(len(set(named_paths(page))) for page in PAGES) > 60
