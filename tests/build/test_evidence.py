"""docs/status.md says by what each kernel was executed, and no more than tests/evidence.json has."""

import ast

import pytest
import torch

from resode_cuda.ops import triton as triton_ops
from resode_cuda.ops.operands import ForwardStepOperands
from tests.support import evidence
from tests.support.evidence import DTYPES, ROOT, Row, recorded, sources, table

RENEW = "run `make machine`, and bench/gpu.sh where there is a GPU; python -m tests.support.evidence prints the table"


def test_no_kernel_is_newer_than_its_evidence():
    current = sources()
    older = sorted({row[:2] for row in recorded() if current.get(row[:2]) != row.source})
    assert not older, RENEW


def test_every_kernel_was_executed_in_every_dtype_that_it_has():
    found = {row[:3] for row in recorded()}
    for backend, kernel in sources():
        if kernel == "add_partial_squares_kernel":
            dtypes = {"float64"}
        elif kernel.startswith("stored_step"):
            dtypes = {"float32", "float64"}  # a companion's
        elif kernel in ("forward_step", "heun_step", "store", "store_step") or (kernel.rstrip("_") + "_").startswith(
            ("step_", "reverse_", "adjoint_update_", "store_")
        ):
            dtypes = set(DTYPES)
        else:
            dtypes = set(DTYPES) - {"float64"}
        missing = dtypes - {dtype for dtype in DTYPES if (backend, kernel, dtype) in found}
        assert not missing, f"{backend} {kernel}: {RENEW}"


def test_bfloat16_was_executed_as_compiled():
    """Triton's interpreter is wrong in it."""
    for row in recorded():
        assert (row.by, row.dtype) != ("interpreter", "bfloat16")


def test_the_page_has_the_table():
    assert "\n".join(table()) in (ROOT / "docs" / "status.md").read_text(), RENEW


@pytest.fixture
def one_tile(monkeypatch):
    monkeypatch.setattr(triton_ops, "VALUES_PER_TILE", dict.fromkeys(triton_ops.VALUES_PER_TILE, 128))


def launch():
    x = torch.zeros(8, dtype=torch.bfloat16)
    triton_ops.forward_step(ForwardStepOperands(x, x, 0.5), x.clone())


def test_what_passes_is_recorded_and_nothing_else(one_tile, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    from tests.support.ptx.launching import executing

    file = tmp_path / "evidence.jsonl"
    with evidence.noticing():
        with executing(80):
            launch()
        evidence.take(False, file)
        with executing(80, change=lambda program: None):  # spoiled, for all that is known
            launch()
        evidence.take(True, file)
        assert not file.exists()
        with executing(80):
            launch()
        evidence.take(True, file)
    source = sources()["triton", "step_kernel"]
    assert evidence.rows_of(file) == {Row("triton", "step_kernel", "bfloat16", "machine sm_80", source)}


def test_new_rows_take_the_place_of_older_ones_by_the_same_means(monkeypatch, tmp_path):
    step, store = (
        Row("triton", kernel, "float32", "machine sm_90", sources()["triton", kernel])
        for kernel in ("step_kernel", "store_kernel")
    )
    kept, gone = step._replace(by="gpu sm_90"), store._replace(by="gpu sm_90", source="of before")
    monkeypatch.setattr(evidence, "FILE", tmp_path / "evidence.json")
    for rows in ([store, kept, gone], [step]):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(evidence.line(row) for row in rows))
        evidence.write(file)
    assert recorded() == [kept, step]


def test_comments_are_no_change_and_code_is(tmp_path):
    file = tmp_path / "kernel.py"
    digests = []
    for text in ('"""One."""\nx = 1  # a comment\n', '"""Two."""\nx = 1\n', "x = 2\n"):
        file.write_text(text)
        ast.parse(text)
        digests.append(evidence._python_code(file))
    assert digests[0] == digests[1] != digests[2]
