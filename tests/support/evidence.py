"""Which kernels were executed, in which dtype, and by what: rows of evidence.json, recorded by tests that passed.

    make machine                                      runs the kernels' tests on a CPU, and writes their rows
    python -m tests.support.evidence --write FILE     writes the rows of a file that RECORD named, such as a GPU's
    python -m tests.support.evidence                  prints the table of docs/status.md

A row holds as long as its kernel's source is what was executed: comments and docstrings aside. With the environment
variable RECORD, every test that passes adds the rows of the kernels that it launched to that file.
"""

import argparse
import ast
import functools
import hashlib
import json
import re
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from resode_cuda.fused.cuda import CudaKernels
from resode_cuda.fused.triton.passes import TritonKernels
from resode_cuda.fused.triton.wide import WideTile
from resode_cuda.ops import triton as triton_ops
from resode_cuda.ops.cuda import CompiledKernels

ROOT = Path(__file__).parents[2]
PACKAGE, CSRC = ROOT / "resode_cuda", ROOT / "csrc"
FILE = ROOT / "tests" / "evidence.json"
RECORD = "RESODE_EVIDENCE"
"""The environment variable that names the file to which tests add their rows."""
COMPILED_BY = [
    PACKAGE / "fused" / name for name in ("norms.py", "triton/tiles.py", "triton/stored_tiles.py", "triton/wide.py")
]
"""Files with what the depth-fused Triton kernels are compiled for, beside their own."""
DTYPES = ("float64", "float32", "float16", "bfloat16")
MEANS = {"host": "H", "interpreter": "I", "machine": "M", "gpu": "G"}


class Row(NamedTuple):
    """A kernel of a backend, "cuda" or "triton"; the narrowest dtype of its operands; `by` one of MEANS, and where
    that knows one, the GPU it was compiled for: "machine sm_90"."""

    backend: str
    kernel: str
    dtype: str
    by: str
    source: str


_launched: set[Row] = set()


@contextmanager
def noticing():
    """Launches in this context are noticed."""
    with ExitStack() as patches:
        for owner, name, row_of in _LAUNCHES:
            launch = getattr(owner, name)

            def noticed(*args, launch=launch, row_of=row_of, **kwargs):
                result = launch(*args, **kwargs)
                if row := row_of(*args, **kwargs):
                    _launched.add(row)
                return result

            patches.enter_context(mock.patch.object(owner, name, noticed))
        yield


def take(passed, file):
    """The launches since the last call, which a test has made, are added to the file if it has passed."""
    if passed and _launched:
        with Path(file).open("a") as out:
            out.writelines(map(line, _launched))
    _launched.clear()


def line(row):
    """A row as a line of the file to which tests add theirs."""
    return json.dumps(row) + "\n"


def rows_of(file):
    """The rows of such a file."""
    return {Row(*json.loads(text)) for text in Path(file).read_text().splitlines()}


def _triton_row(kernel, tensors):
    import triton

    tensors = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    if tensors[0].device.type == "cuda":
        by = _on_gpu(tensors[0].device)
    elif triton.knobs.runtime.interpret:
        by = "interpreter"
    else:
        from .ptx import launching

        if launching.stands_for is None:
            return None  # only compiled, or spoiled
        by = f"machine sm_{launching.stands_for}"
    return _row("triton", kernel.__name__, tensors, by)


def _cuda_row(kernel, tensors):
    device = tensors[0].device
    return _row("cuda", kernel, tensors, _on_gpu(device) if device.type == "cuda" else "host")


def _on_gpu(device):
    return f"gpu sm_{''.join(map(str, torch.cuda.get_device_capability(device)))}"


def _row(backend, kernel, tensors, by):
    dtypes = {t.dtype for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()}
    dtype = min(dtypes, key=lambda dtype: dtype.itemsize)
    return Row(backend, kernel, str(dtype).removeprefix("torch."), by, sources()[backend, kernel])


_OPS = ("forward_step", "heun_step", "reverse_update_", "reverse_extrapolate_", "adjoint_update_")
_STORING_OPS = ("store", "store_step", "stored_step")
_LAUNCHES = [
    (TritonKernels, "_launch", lambda self, kernel, *_, **__: _triton_row(kernel, [self.w1])),
    (WideTile, "_launch", lambda self, kernel, grid, warps, *values: _triton_row(kernel, values)),
    (triton_ops, "_launch", lambda kernel, programs, tensors, *_: _triton_row(kernel(), tensors)),
    (CudaKernels, "_launch", lambda self, launcher, operands: _cuda_row(launcher.__name__, [self.w1])),
    *(
        (CompiledKernels, op, lambda self, operands, *_, op=op: _cuda_row(op, operands))
        for op in (*_OPS, *_STORING_OPS)
    ),
]
"""The functions of the library that launch kernels: whose they are, and the row of a call, or None."""


@functools.cache
def sources():
    """By backend and kernel: a digest of all code that the kernel is made of."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE):
            if files := _kernel_files(path):
                files |= set(COMPILED_BY if path.parent.name == "triton" else ())
                found["triton", name] = _digest(_python_code(file) for file in sorted(files))
    common = sorted((CSRC / "common").glob("*"))
    for folder, pattern in (("pointwise", r'define\(module, "(\w+)"'), ("mlp", r'define\(module, "(mlp_\w+)"')):
        bindings = CSRC / ("bindings.cpp" if folder == "pointwise" else "mlp/bindings.cpp")
        files = [f for f in [*common, *sorted((CSRC / folder).glob("*"))] if f.name != "bindings.cpp"]
        code = _digest(_cuda_code(file) for file in files)
        found.update({("cuda", name): code for name in re.findall(pattern, bindings.read_text())})
    return found


def _kernel_files(path):
    """The file, and those with device functions, or structures of their arguments, that it imports."""
    found, waiting = set(), [path]
    while waiting:
        file = waiting.pop()
        text = file.read_text()
        if file in found or not ("import triton.language" in text or file.name == "arguments.py"):
            continue
        found.add(file)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                module = file.parents[node.level - 1].joinpath(*(node.module or "").split(".")).with_suffix(".py")
                waiting += [module] if module.exists() else []
    return found


def _python_code(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            # A string that stands by itself says something to readers alone.
            node.body = [one for one in node.body if not _is_string(one)] or [ast.Pass()]
    return ast.dump(tree)


def _is_string(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _cuda_code(path):
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
    return " ".join(code.split())


def _digest(parts):
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def recorded():
    """The rows of evidence.json."""
    return [Row(*row) for row in json.loads(FILE.read_text())]


def write(file):
    """Put a file's rows in the place of those of the same means, and leave out those of code that is no more."""
    new = rows_of(file)
    means, current = {row.by for row in new}, sources()
    rows = new | {row for row in (recorded() if FILE.exists() else []) if row.by not in means}
    rows = sorted(row for row in rows if current.get((row.backend, row.kernel)) == row.source)
    FILE.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n")


def table():
    """Rows of Markdown: a kernel's means in each dtype."""
    found = defaultdict(set)
    for row in recorded():
        means, *gpu = row.by.split()
        found[row.backend, row.kernel, row.dtype].add(MEANS[means] + "".join(gpu).removeprefix("sm_"))
    kernels = sorted({key[:2] for key in found}, reverse=True)
    lines = [f"| kernel | {' | '.join(DTYPES)} |", "|---|" + "---|" * len(DTYPES)]
    for backend, kernel in kernels:
        cells = [" ".join(sorted(found[backend, kernel, dtype])) or "–" for dtype in DTYPES]
        name = {"triton": "Triton", "cuda": "CUDA C++"}[backend]
        lines.append(f"| {name} `{kernel}` | {' | '.join(cells)} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", metavar="FILE", help="write the rows of this file to evidence.json")
    given = parser.parse_args()
    if given.write:
        write(given.write)
    print("\n".join(table()))


if __name__ == "__main__":
    main()
