"""The section on models of other libraries, small, from end to end."""

import pytest

from bench.sections import models
from tests.bench.conftest import quick_run
from tests.support.peers import define_torchvision_operators

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
