"""Build the wheel, install it into a new environment and run README's quick start outside the repository.

`make test-wheel` runs it. The shipped examples/blip-vqa-digits replaces the model that README loads from the Hub, and
the Trainer is left out; everything else runs as printed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


ROOT = Path(__file__).parents[2]
BEFORE = """
import torch
import madtp_hf
assert "site-packages" in madtp_hf.__file__, madtp_hf.__file__
torch.set_num_threads(1)
"""


def check_contents(wheel: Path) -> None:
    """Check that the wheel contains the whole package and nothing else."""
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {name for name in names if not name.startswith("madtp_hf-")}
    stray = {
        name
        for name in ours
        if not name.startswith(("madtp_hf/", "madtp_hf_cli/")) or not name.endswith((".py", ".md", "/py.typed"))
    }
    source = ROOT / "src"
    expected = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    expected |= {"madtp_hf/checkpoints/card_template.md", "madtp_hf/py.typed"}
    if stray or expected - ours:
        sys.exit(f"{wheel.name} has what it shouldn't, {sorted(stray)}, or lacks {sorted(expected - ours)}.")
    print(f"{wheel.name}: {len(names)} files, the package alone")


def quick_start() -> str:
    """Return README's code blocks that prune a model and ask it, unchanged."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    code = "\n".join(block for block in blocks if "from_blip(" in block or "pipeline(" in block)
    wanted = ("from_blip(", "calibrate(model", "set_pruning(", "save_pretrained(", "pipeline(")
    missing = [part for part in wanted if part not in code]
    if missing:
        sys.exit(f"README's blocks of Python have no {', '.join(missing)}: adapt this check to what is there.")
    return code.replace("\nask(image", "\nanswer = ask(image")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", default="torch==2.13.0", help="what pip installs first; empty: what it chooses")
    arguments = parser.parse_args()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory(prefix="madtp-hf-") as scratch:

        def run(*command, cwd=scratch, **variables):
            print("$", *(part if len(str(part)) < 80 else "..." for part in command), flush=True)
            subprocess.run(list(map(str, command)), cwd=cwd, check=True, env={**environment, **variables})

        # Build from a copy: setuptools leaves its build folder behind, and would include stale files from it.
        copy = shutil.copytree(
            ROOT / "src", Path(scratch, "copy", "src"), ignore=shutil.ignore_patterns("*.egg-info")
        ).parent
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, copy)
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", scratch, copy)
        shutil.rmtree(copy)
        (wheel,) = Path(scratch).glob("*.whl")
        check_contents(wheel)
        run(sys.executable, "-m", "venv", "venv")
        python = Path(scratch, "venv", "bin", "python")
        for packages in ([arguments.torch] if arguments.torch else [], [f"{wheel}[cli,digits]"]):
            if packages:
                run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages)
        shutil.copytree(ROOT / "examples" / "blip-vqa-digits", Path(scratch, "examples", "blip-vqa-digits"))
        code = f"{BEFORE}\n{quick_start()}\nprint(answer)\nassert answer[0]['answer'], answer"
        offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(scratch, "modules"))}
        run(python, "-c", code, **offline)
        command = python.with_name("madtp-hf")
        run(command, "--help", **offline)
        run(command, "push", "blip-vqa-madtp", "org/blip-madtp", "--dry-run", **offline)
    print("the quick start runs from the wheel")


if __name__ == "__main__":
    main()
