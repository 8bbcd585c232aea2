"""Test the package with other versions of transformers: `make test-matrix`, or

python tests/helpers/version_matrix.py [--transformers 5.0.0 5.12.1 5.24.0] [--torch torch==2.13.0] [--suite]

creates an environment for each version under --folder and keeps it for the next time. In it the frozen checkpoints of
tests/fixtures run with their own code, without madtp_hf installed (tests/helpers/check_checkpoint.py). With --suite,
the package's own tests of checkpoints and tasks follow in the same environment, with `src` on the path. It downloads
packages and is not part of `make test`.

After a pass with a newer transformers, set TESTED_TRANSFORMERS in src/madtp_hf/modeling/versions.py.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).parents[2]
VERSIONS = ["5.0.0", "5.12.1", "5.24.0"]  # the oldest supported version, one in the middle, the newest available
SUITE = [
    "tests/test_checkpoint.py",
    "tests/test_question_answering.py",
    "tests/test_pruning_off.py",
    "tests/test_pruning_on.py",
    "tests/test_from_blip.py",
    "tests/test_gradients.py",
    "tests/test_retrieval_losses.py",
    "tests/test_bad_input.py",
    "tests/test_attention.py",
]


def make_environment(folder: Path, version: str, torch: str, suite: bool) -> Path:
    """Create an environment with that transformers and return its Python.

    torch is installed first, so that pip does not choose another build of it.
    """
    python = folder / f"transformers-{version}" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    installs = [[torch]] if torch else []
    installs.append([f"transformers=={version}", "accelerate>=1.1", "pillow"])
    if suite:
        installs.append([f"transformers=={version}", "pytest>=8", "pytest-timeout>=2", "jinja2", "datasets>=3.0"])
    for packages in installs:
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
        subprocess.run(pip, check=True)
    return python


def run(command: list, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def check_version(python: Path, suite: bool) -> dict[str, str]:
    """Run the checks; return check -> "passed" or the error."""
    found = {}
    for checkpoint in sorted(path for path in (ROOT / "tests" / "fixtures").glob("checkpoint-v*") if path.is_dir()):
        result = run([python, "tests/helpers/check_checkpoint.py", checkpoint])
        try:
            checks = json.loads(result.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            checks = {"start": (result.stderr.strip().splitlines() or ["no output"])[-1]}
        if any(outcome != "passed" for outcome in checks.values()):
            print(result.stdout, result.stderr[-4000:], sep="\n")
        found |= {f"{checkpoint.name.removeprefix('checkpoint-')} {name}": outcome for name, outcome in checks.items()}
    if suite:
        result = run([python, "-m", "pytest", "-q", *SUITE], PYTHONPATH=str(ROOT / "src"))
        lines = result.stdout.strip().splitlines() or [result.stderr.strip()[-200:]]
        if result.returncode:
            print(result.stdout[-6000:], result.stderr[-2000:], sep="\n")
        found["suite"] = "passed" if result.returncode == 0 else lines[-1]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--transformers", nargs="+", default=VERSIONS, metavar="VERSION")
    parser.add_argument("--torch", default="torch==2.13.0", help="what pip installs first; empty: what it chooses")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "matrix", help="where the environments go")
    parser.add_argument("--suite", action="store_true", help="a part of the package's own tests as well")
    arguments = parser.parse_args()
    results = {}
    for version in arguments.transformers:
        began = time.monotonic()
        python = make_environment(arguments.folder.resolve(), version, arguments.torch, arguments.suite)
        results[version] = check_version(python, arguments.suite)
        torch = run([python, "-c", "import torch; print(torch.__version__)"]).stdout.strip()
        print(f"transformers {version}, torch {torch}: {time.monotonic() - began:.0f} s", flush=True)
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    width = max(map(len, names))
    print(f"\n{'':{width}}  " + "  ".join(f"{version:>8}" for version in results))
    for name in names:
        outcomes = ("passed" if found.get(name) == "passed" else "FAILED" for found in results.values())
        print(f"{name:{width}}  " + "  ".join(f"{outcome:>8}" for outcome in outcomes))
    failed = [(version, name, outcome) for version, found in results.items() for name, outcome in found.items()]
    failed = [entry for entry in failed if entry[2] != "passed"]
    for version, name, outcome in failed:
        print(f"{version}, {name}: {outcome}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
