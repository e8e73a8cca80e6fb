"""The README's example runs as printed."""

import re
from pathlib import Path


def test_the_example_runs(capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len(example.splitlines()) <= 13
    exec(compile(example, "README.md", "exec"), {})
    assert re.fullmatch(
        r"loss \d\.\d{3}, largest relative error of a rebuilt state \d\.\de-\d\d\n", capsys.readouterr().out
    )
