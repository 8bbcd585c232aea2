"""README: short, within its width, and its quick start runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 124
    assert [line for line in lines if len(line) > 119] == []
    assert lines.index("## Install") < 25


def test_the_quick_start_runs(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    prune, ask = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
    }

    def run(code):
        command = [sys.executable, "-W", "error::UserWarning:madtp_hf", "-c", code]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "UserWarning" not in result.stderr  # nothing that a reader would have to look up
        return result.stdout

    run(prune)
    # Another process, where the package can't be imported.
    code = "import sys; sys.modules['madtp_hf'] = None\n" + ask.replace("\nask(image", "\nanswer = ask(image")
    answer = run(code + "\nprint(answer[0]['answer'])")
    assert answer.strip().splitlines()[-1]
