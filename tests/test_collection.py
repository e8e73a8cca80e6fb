"""Every folder of tests is collected where pytest is given none: its own defaults leave out some names, "build" among
them."""

from fnmatch import fnmatch
from pathlib import Path

HERE = Path(__file__).parent


def test_no_folder_of_tests_is_left_out(pytestconfig):
    patterns = pytestconfig.getini("norecursedirs")
    folders = {path.parent.relative_to(HERE) for path in HERE.rglob("test_*.py")}
    left_out = [folder for folder in folders for part in folder.parts if any(fnmatch(part, p) for p in patterns)]
    assert not left_out
