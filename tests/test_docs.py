"""The documentation: links lead somewhere, code runs as printed, messages are those of the package."""

import dataclasses
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from madtp_hf.modeling.pruning_method import METHODS

from .helpers.pages import blocks_of, commands_of, run_page


ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path for pattern in ("*.md", "docs/*.md", "examples/*.md", ".github/*.md") for path in ROOT.glob(pattern)
)
PYTHON = [page for page in sorted((ROOT / "docs").glob("*.md")) if "```python" in page.read_text()]
# Blocks that can't run here, with the reason that the page gives in a comment.
NOT_RUN = {"standard_benchmarks": "needs mteb and downloads a data set"}
SLOW = ("clip", "compatibility", "fine_tune", "index", "methods", "prune", "see_what_it_dropped", "serving")
ELSEWHERE = ("own_data",)  # run, and looked at more closely, by a file of its own
# Libraries that a page's code needs without importing them.
NEEDS = {
    "clip": ("onnx", "onnxscript", "sentence_transformers"),
    "compatibility": ("peft",),
    "search": ("faiss", "pyarrow"),
    "see_what_it_dropped": ("matplotlib",),
    "serving": ("onnx", "onnxscript", "onnxruntime"),
}
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]+)\)")


def name_of(page):
    return str(page.relative_to(ROOT))


def anchors(page) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{name_of(page)}: {link}"
        assert target.is_relative_to(ROOT), f"{name_of(page)}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)}: {link}, expected one of {sorted(anchors(target))}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_fits_the_column(page):
    """The site's column shows this much without scrolling."""
    blocks = re.findall(r"^```.*?\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 76] == []


def test_the_examples_page_lists_every_file():
    page = (ROOT / "examples/README.md").read_text()
    files = subprocess.run(
        ["git", "ls-files", "examples"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    names = {Path(file).relative_to("examples").parts[0] for file in files} - {"README.md"}
    assert [name for name in sorted(names) if f"({name}" not in page] == []


def test_the_owner_is_a_placeholder_in_few_places():
    """What `RELEASING.md` replaces: other files don't name the repository."""
    named = subprocess.run(["git", "grep", "-lw", "OWNER"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert named.stdout.split() == ["RELEASING.md", "pyproject.toml", "tests/test_docs.py"]


def test_the_home_page_has_the_tables_of_the_readme():
    hooks = runpy.run_path(str(ROOT / "docs/hooks.py"))
    config = hooks["on_config"]({})
    page = hooks["on_page_markdown"]((ROOT / "docs/index.md").read_text(), None, config, None)
    assert config["repo_url"].startswith("https://github.com/") and "github.io" in config["site_url"]
    assert page.index("surviving_patches.png") < page.index("## Speed") < page.index("## Accuracy")
    assert "| BLIP-base, question" in page and "| plain model, fine-tuned |" in page
    assert "](docs/" not in page and "](../" not in page and "<!--" not in page


def test_the_site_has_every_page():
    content = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [page for value in values for page in pages(value)]

    assert sorted(pages(content["nav"])) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to run a page in; what its code registers and imports is undone."""
    pytest.importorskip("sklearn", reason="digit scenes need scikit-learn: pip install 'madtp_hf[digits]'")
    for library in ("datasets", "evaluate", "accelerate"):
        pytest.importorskip(library, reason=f"the pages use {library}: pip install 'madtp_hf[train,metrics]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    monkeypatch.setattr("madtp_hf.modeling.pruning_method.METHODS", dict(METHODS))
    monkeypatch.setattr("madtp_hf.budgets.alignment.FIT_STEPS", 2)  # that it runs is shown, not what it reaches
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_the_code_of_all_pages_is_python_and_what_is_not_run_is_listed():
    not_run = {}
    for page in PYTHON:
        for block in blocks_of(page):
            if block.language == "python":
                compile(block.code, page.name, "exec")
                if block.not_run:
                    not_run[page.stem] = block.not_run
    assert not_run == NOT_RUN


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page.stem in SLOW else (), id=page.stem)
        for page in PYTHON
        if page.stem not in (*NOT_RUN, *ELSEWHERE)
    ],
)
def test_the_code_of_a_page_runs_from_its_top(page, folder):
    for library in NEEDS.get(page.stem, ()):
        pytest.importorskip(library)
    assert run_page(page, folder)


COMMANDS = [(page, *found) for page in [*PAGES, *ROOT.glob("examples/*/README.md")] for found in commands_of(page)]


def test_the_commands_of_the_pages_are_accepted():
    """Each `madtp-hf` line parses; `...` and words in capitals stand for the reader's own."""
    pytest.importorskip("typer", reason="the command needs typer: pip install 'madtp_hf[cli]'")
    import typer

    from madtp_hf_cli import app

    group, seen = typer.main.get_command(app), set()
    for page, words, complete in COMMANDS:
        start = [number for number, word in enumerate(words) if word in ("madtp-hf", "madtp_hf_cli")]
        if not start or (arguments := words[start[0] + 1 :])[:1] in ([], ["--help"], ["--version"]):
            continue
        name, *arguments = arguments
        assert name in group.commands, f"{name_of(page)}: {' '.join(words)}"
        seen.add(name)
        if arguments and "..." not in arguments:
            try:
                with group.make_context("madtp-hf", [name]) as parent:
                    group.commands[name].make_context(name, arguments, parent=parent)
            except Exception as error:  # click's, of which newer versions of typer have their own copy
                is_part = type(error).__name__ in ("MissingParameter", "BadOptionUsage") and not complete
                assert is_part, f"{name_of(page)}: {' '.join(words)}: {error!r}"
    assert seen == set(group.commands) - {"version"}


def test_the_scripts_of_the_pages_exist_and_have_the_options():
    from transformers import TrainingArguments

    training = {field.name for field in dataclasses.fields(TrainingArguments)}
    for page, words, _ in COMMANDS:
        for number, word in enumerate(words):
            if re.fullmatch(r"(examples|benchmarks|tests)/[\w/]+\.py", word):
                assert (ROOT / word).is_file(), f"{name_of(page)}: {word}"
                shared = [*ROOT.glob("examples/script_arguments.py"), *ROOT.glob("benchmarks/*.py")]
                source = "".join(file.read_text() for file in [ROOT / word, *shared])
                for option in re.findall(r"(?<=^--)[\w-]+", "\n".join(words[number + 1 :]), re.MULTILINE):
                    own = re.search(rf'"--{option}"|^    {option}: ', source, re.MULTILINE)
                    known = own or option in {*training, "help"}
                    assert known, f"{name_of(page)}: {word} has no option --{option}"


def test_install_lines_name_extras_of_the_project():
    project = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    extras = set(re.findall(r"^(\w+) = \[", project.partition("\n[")[0], re.MULTILINE))
    files = [*PAGES, *ROOT.glob("src/**/*.py"), *ROOT.glob("examples/**/*.ipynb")]
    named = {
        (name_of(file), extra)
        for file in files
        for found in re.findall(r"(?:madtp_hf|(?<=['\"])\.)\[([a-z_,]+)\]", file.read_text())
        for extra in found.split(",")
    }
    assert len(named) > 20
    assert sorted((file, extra) for file, extra in named if extra not in extras) == []


def test_the_messages_of_troubleshooting_are_the_package_s():
    files = [*ROOT.glob("src/madtp_hf/**/*.py"), *ROOT.glob("src/madtp_hf_cli/*.py")]
    # A message that goes over several lines of a source is one.
    sources = re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text() for file in files))
    headings = re.findall(r"^### (`.+)$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    messages = [message for heading in headings for message in re.findall(r"`([^`]+)`", heading)]
    assert len(messages) > 20
    for message in messages:
        # What differs from case to case is left out: numbers, names and values.
        parts = re.split(
            r"\.\.\.|'[^']*'|\b[a-z_]+=\S+|\[[^]]*\]|torch\.\w+|\b\d[\d.]*|Madtp\w+|Blip\w+|\bquestions\b", message
        )
        for part in parts:
            words = part.strip(" ,:;()")
            if len(words) > 8:
                assert words in sources, f"{message!r}: {words!r} is in no source"


def test_workflows_test_the_lowest_and_the_newest_versions():
    project = (ROOT / "pyproject.toml").read_text()
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    runs = workflow["jobs"]["test"]["strategy"]["matrix"]["include"]
    lowest = re.search(r'requires-python = ">=([\d.]+)"', project)[1]
    transformers = re.search(r'"transformers>=([\d.]+)"', project)[1]
    assert {"python": lowest, "transformers": f"transformers=={transformers}.0"}.items() <= runs[0].items()
    assert any(run["transformers"] == "transformers" and run["python"] != lowest for run in runs)
    for file in ROOT.glob(".github/**/*.yml"):
        assert yaml.safe_load(file.read_text()), file
