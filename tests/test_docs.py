"""The documentation: links lead somewhere, code runs as printed, messages are those of the package."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path for pattern in ("*.md", "docs/*.md", "examples/*.md", ".github/*.md") for path in ROOT.glob(pattern)
)
RUN = (
    "adding_a_model",
    "captioning",
    "fine_tune",
    "index",
    "method",
    "prune",
    "publish",
    "question_answering",
    "reproduce",
    "retrieval",
    "visual_reasoning",
)
SLOW = ("fine_tune", "prune")  # the other pages show as much of calibration and training
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]+)\)")
_BLOCK = re.compile(r"(?:<!-- not run: (.+?) -->\n)?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


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
    """What `RELEASING.md` replaces: other pages don't name the repository."""
    named = [name_of(page) for page in PAGES if "OWNER" in page.read_text()]
    assert named == ["RELEASING.md"]


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
    """An empty folder to run a page in, with the shipped models where a clone has them."""
    pytest.importorskip("sklearn", reason="digit scenes need scikit-learn: pip install 'madtp_hf[digits]'")
    for library in ("datasets", "evaluate", "accelerate"):
        pytest.importorskip(library, reason=f"the pages use {library}: pip install 'madtp_hf[train,metrics]'")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("madtp_hf.budgets.alignment.FIT_STEPS", 2)  # that it runs is shown, not what it reaches


def test_the_code_of_all_pages_is_python():
    for page in (ROOT / "docs").glob("*.md"):
        for _, code in _BLOCK.findall(page.read_text()):
            compile(re.sub(r", \.\.\.\)", ")", code), page.name, "exec")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in RUN])
def test_the_code_of_a_page_runs(name, folder):
    blocks = _BLOCK.findall((ROOT / "docs" / f"{name}.md").read_text())
    assert any(not reason for reason, _ in blocks)
    namespace = {"__name__": "page"}
    for number, (reason, code) in enumerate(blocks, 1):
        if not reason:
            exec(compile(code, f"{name}.md, block {number}", "exec"), namespace)


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
