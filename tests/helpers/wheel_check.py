"""Builds the wheel, installs it into an environment of its own and runs README's quick start there, out of sight of
the repository: `make test-wheel`.

What README loads from the Hub is the shipped examples/blip-vqa-digits here, and the Trainer is left out; all else runs
as it is printed.
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
    """All of the package, and nothing but the package."""
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {name for name in names if not name.startswith("madtp_hf-")}
    stray = {
        name
        for name in ours
        if not name.startswith(("madtp_hf/", "madtp_hf_cli/")) or not name.endswith((".py", ".md", "/py.typed"))
    }
    source = ROOT / "src"
    expected = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    expected |= {"madtp_hf/model_card_template.md", "madtp_hf/py.typed"}
    if stray or expected - ours:
        sys.exit(f"{wheel.name} has what it shouldn't, {sorted(stray)}, or lacks {sorted(expected - ours)}.")
    print(f"{wheel.name}: {len(names)} files, the package alone")


def quick_start() -> str:
    """README's blocks of code that prune a model and that ask it, as they stand."""
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

        # Built from a copy: setuptools leaves its build folder, and would take stale files from it.
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
