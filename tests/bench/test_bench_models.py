"""The section on models of other libraries, small, from end to end."""

import pytest

from bench.harness.foreign import define_torchvision_operators
from bench.sections import finetuning, models
from tests.bench.conftest import quick_run

define_torchvision_operators()
pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("timm", reason="needs timm")


def test_a_quick_run_of_models(tmp_path):
    done, _, results = quick_run(tmp_path, "--only", "models")
    rows = results["sections"]["models"]["rows"]
    assert {row["model"] for row in rows} == {"GPT-2", "ViT", "ConvNeXt"}
    assert {row["mode"] for row in rows} == {models.PLAIN, models.CHECKPOINT, *models.CONVERTED}
    held = {(row["model"], row["layers"], row["mode"]): row["held_by_layers_bytes"] for row in rows}
    for (model, layers, mode), size in held.items():
        assert 0 < size <= held[model, layers, models.PLAIN]
        if mode in models.CONVERTED:
            assert size < held[model, layers, models.CHECKPOINT]
    assert all(row["of_checkpoint"] == 1 for row in rows if row["mode"] == models.CHECKPOINT)
    assert "what converted layers hold" in done.stdout


def test_a_quick_run_of_finetuning(tmp_path):
    done, _, results = quick_run(tmp_path, "--only", "finetuning")
    rows = results["sections"]["finetuning"]["rows"]
    assert [row["model"] for row in rows] == ["GPT-2", "BERT", "ViT"]
    for row in rows:
        assert set(row["losses"]) == {finetuning.EXACT, *finetuning.CONVERTED, finetuning.PLANNED}
        errors = row["errors"]
        assert 0 < errors["stored, 8 bits"] < errors["stored, 4 bits"] < 0.1
        assert errors["stored, 8 bits"] < errors[finetuning.AUTOCAST]
    assert "held-out loss" in done.stdout
