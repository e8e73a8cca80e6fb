"""The house as its own rules describe it: which way imports point, and how large and how named things are."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "resode_cuda"
MODULES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES, MOST_PARAMETERS = 350, 8
SIBLINGS = [
    # Backends of the same ops, whose files have the same roles.
    {"fused/reference/passes.py", "fused/triton/passes.py"},
    {"ops/cuda.py", "fused/cuda.py"},
    # The same question of the pointwise and of the depth-fused ops.
    {"ops/selection.py", "fused/selection.py"},
]
CONSTRUCTORS = {"__init__", "residual_mlp", "network", "convert"}
"""What takes all that says what a network is."""

SOURCES = [
    path
    for folder in ("resode_cuda", "csrc", "bench", "tests", "examples")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".h", ".cu", ".cpp", ".sh")
]


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {dotted(path): path for path in MODULES}


def imports(path):
    """Modules of the package that a module imports, wherever in it."""
    base = dotted(path).split(".") if path.name == "__init__.py" else dotted(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = ".".join(base[: len(base) - node.level + 1])
            module = f"{above}.{node.module}" if node.module else above
            for alias in node.names:
                yield f"{module}.{alias.name}" if f"{module}.{alias.name}" in NAMES else module


def test_no_imports_go_round_in_a_circle():
    graph = {name: set(imports(path)) - {name} for name, path in NAMES.items()}
    # A package's own page imports its modules; a module that names the package means one of the others.
    remaining = dict(graph)
    while free := [name for name, needed in remaining.items() if not needed & remaining.keys()]:
        for name in free:
            del remaining[name]
    assert not remaining, f"in or above a circle: {sorted(remaining)}"


LAYERS = [
    ["dtypes", "layouts", "squares", "devices", "export", "library", "stored", "text_table", "worst_rank"],
    ["ops"],
    ["schemes", "reverse", "method"],
    ["adjoint", "fused"],
    ["module", "functional", "plan", "candidates", "trial", "calibration", "recalibration", "perceptron", "available"],
    ["stack", "mlp", "initialize", "handed_out"],
    ["stages"],
    ["smoothness", "diagnosis", "resuming"],
    ["__init__", "__main__"],
]
"""From the bottom to the top: what a file imports is on its own floor or below."""


def test_imports_point_down():
    floor = {name: height for height, names in enumerate(LAYERS) for name in names}
    up = []
    for path in MODULES:
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for name in imports(path):
            parts = name.split(".")
            target = parts[1] if len(parts) > 1 else "__init__"
            if target != "__init__" and floor[target] > floor[room]:
                up.append(f"{path.relative_to(PACKAGE)} -> {name}")
    assert not up


def test_every_file_has_a_name_of_its_own():
    places = defaultdict(set)
    for path in MODULES:
        if path.name != "__init__.py":
            places[path.name].add(str(path.relative_to(PACKAGE)))
    assert [paths for paths in places.values() if len(paths) > 1 and paths not in SIBLINGS] == []


def test_every_class_has_a_name_of_its_own():
    places = defaultdict(list)
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path.relative_to(PACKAGE)))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def is_kernel(node):
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_parameter_lists_are_short():
    long = []
    for path in [path for path in SOURCES if path.suffix == ".py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name not in CONSTRUCTORS:
                count = len(node.args.args) + len(node.args.kwonlyargs)
                if count > MOST_PARAMETERS and not is_kernel(node):
                    long.append(f"{path.relative_to(ROOT)}: {node.name}: {count}")
    assert not long


def lines_of_code(path):
    """In the package's modules without docstrings, which are the reference that users read."""
    text = path.read_text()
    lines = text.count("\n")
    if path not in MODULES:
        return lines
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    return lines


def test_files_are_short():
    long = {str(path.relative_to(ROOT)): count for path in SOURCES if (count := lines_of_code(path)) > MOST_LINES}
    assert not long


def test_docstrings_begin_with_their_subject():
    odd = []
    for path in SOURCES:
        if path.suffix == ".py":
            odd += [
                f"{path.relative_to(ROOT)}: {line.strip()}"
                for line in path.read_text().splitlines()
                if re.match(r'\s*"""(Of|Where|From what|With which) ', line)
            ]
    assert not odd


@pytest.mark.parametrize("folder", ["csrc", "resode_cuda"])
def test_no_two_kernels_or_launchers_share_a_name(folder):
    places = defaultdict(list)
    pattern = (
        r"^def (\w+_kernel)\("
        if folder == "resode_cuda"
        else r"(?:\s|^)(\w+_kernel)\(const|^void (launch_\w+)\([^;]*\{"
    )
    for path in sorted((ROOT / folder).rglob("*")):
        if path.suffix in (".py", ".cu"):
            for found in re.findall(pattern, path.read_text(), re.MULTILINE):
                places[found if isinstance(found, str) else "".join(found)].append(path.name)
    assert len(places) > 5
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
