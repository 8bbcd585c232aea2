"""Publish a Space on the Hub: the page of `app.py`, which shows what a pruned checkpoint drops."""

import importlib.metadata
import io
import json
import os
from pathlib import Path

import yaml
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig

from ..checkpoints.push import (
    check_name,
    check_token,
    describe_upload,
    find_checkpoint_files,
    one_sentence_errors,
    upload,
)
from ..modeling.images import read_image
from ..modeling.versions import VERSION as __version__
from ..tasks import task_of
from .endpoint_handler import Limits
from .page import check_shown


PACKAGE = Path(__file__).parents[1]
SDK_VERSION = "6.31.0"  # the gradio version that the Space runs, and that the page is tested with
_OWN_FOLDERS = ("examples", "madtp_hf", "model")
_APP = '''"""What a pruned model drops: ask it, move the reduction. Made by madtp_hf {version}."""

import json
from pathlib import Path

from madtp_hf.checkpoints.load import load
from madtp_hf.serving.endpoint_handler import Limits
from madtp_hf.serving.page import TASKS_SHOWN, make_app


HERE = Path(__file__).parent
examples = [(str(HERE / image), text) for image, text in json.loads((HERE / "examples.json").read_text("utf-8"))]
loaded = load({source}, tuple(TASKS_SHOWN), revision={revision!r}, precision="auto")
app = make_app(loaded.model, loaded.processor, examples, {name!r})

if __name__ == "__main__":
    app.launch(max_file_size=Limits.from_environment().max_image_bytes)
'''
_README = """
# {title}

Ask {name} about an image, move the reduction, and see which patches and words each layer keeps, and what that saves
against the dense model: MADTP token pruning ([paper](https://arxiv.org/abs/2403.02991)), with madtp_hf {version}.
"""


def check_space(model, revision: str | None = None, token: str | None = None) -> None:
    """Raise an error for a checkpoint (a folder or Hub id) that the page can't show or that lacks a file."""
    if Path(model).is_dir():
        find_checkpoint_files(model)
    config = AutoConfig.from_pretrained(model, revision=revision, token=token, trust_remote_code=False)
    check_shown(task_of(config)[0].name, config, model)


def read_examples(path: str | os.PathLike) -> list[tuple[Path, str]]:
    """Read pairs of an image and a text from a JSON file: `[["scene.png", "how many sevens are there?"], ...]`.

    Paths are relative to the file's folder.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds something else.
    """
    path = Path(path)
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): expected pairs of an image and a text.") from error
    _check_pairs(pairs, str(path))
    return [(path.parent / image, text) for image, text in pairs]


def _check_pairs(pairs, where: str) -> None:
    if not isinstance(pairs, (list, tuple)):
        raise ValueError(f"{where} holds a {type(pairs).__name__}: expected pairs of an image and a text.")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[1], str):
            raise ValueError(f"{where} has {pair!r} as its item {index}: expected a pair, an image and a text.")


def make_space(
    model, examples=(), title: str | None = None, revision: str | None = None, requirement: str | None = None
) -> dict[str, Path | bytes]:
    """Build the files of a Space, name -> path or content; see [`push_space`] for the arguments."""
    is_folder = Path(model).is_dir()
    name = Path(model).resolve().name if is_folder else str(model)
    title = title or f"What {name.rpartition('/')[2]} drops"
    header = {
        "title": title,
        "emoji": "✂️",
        "colorFrom": "blue",
        "colorTo": "yellow",
        "sdk": "gradio",
        "sdk_version": SDK_VERSION,
        "app_file": "app.py",
        "short_description": "Which patches and words a pruned model keeps",
        "tags": ["madtp", "token-pruning"],
        **({} if is_folder else {"models": [name]}),
    }
    files: dict[str, Path | bytes] = {}
    listed = []
    _check_pairs(examples, "examples")
    for index, (image, text) in enumerate(examples):
        content = io.BytesIO()
        read_image(image, Limits().max_pixels).save(content, "PNG")  # a visitor could give it
        files[f"examples/{index}.png"] = content.getvalue()
        listed.append([f"examples/{index}.png", Limits().check_text(f"The text of example {index}", text)])
    if is_folder:
        files |= {f"model/{file}": Path(model, file) for file in find_checkpoint_files(model)}
    if requirement is None:
        inside = (path for path in sorted(PACKAGE.rglob("*")) if path.suffix in (".py", ".md") and path.is_file())
        files |= {f"madtp_hf/{path.relative_to(PACKAGE).as_posix()}": path for path in inside}
    source = 'HERE / "model"' if is_folder else repr(name)
    app = _APP.format(version=__version__, source=source, revision=None if is_folder else revision, name=name)
    if requirement is None:  # what the Space installs besides gradio, which the header of its README names
        needed = [name for name in importlib.metadata.requires("madtp_hf") or () if "extra ==" not in name]
        requirement = "\n".join([*needed, "matplotlib>=3.8"])
    readme = f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n"
    readme += _README.format(
        title=title, version=__version__, name=name if is_folder else f"[{name}](https://hf.co/{name})"
    )
    return {
        **files,
        "app.py": app.encode(),
        "examples.json": json.dumps(listed, indent=2).encode(),
        "requirements.txt": f"{requirement}\n".encode(),
        "README.md": readme.encode(),
    }


def push_space(
    model: str | os.PathLike,
    repo_id: str,
    *,
    examples=(),
    title: str | None = None,
    model_revision: str | None = None,
    requirement: str | None = None,
    token: str | None = None,
    private: bool = False,
    commit_message: str | None = None,
    dry_run: bool = False,
) -> str:
    """Publish a Space that shows what a pruned checkpoint drops, with all files that it needs, in one commit.

    Args:
        model: A checkpoint for question answering or captioning, with a calibrated schedule: a Hub id, which the Space
            loads when it starts, or a saved folder, whose files go into the Space.
        repo_id: The Space's name, as [`~madtp_hf.push_checkpoint`] takes one, and `token`, `private`,
            `commit_message` and `dry_run`.
        examples: Pairs of an image (a PIL image, array or path) and a question (for captioning, any string) to offer.
        title: The Space's title; by default made from the model's name.
        model_revision: The branch, tag or commit of a Hub id to load; pin one for someone else's model.
        requirement: What pip installs to get this package, such as `"madtp_hf[app]==0.1.0"`. By default the Space gets
            a copy of the running package.

    Returns:
        The Space's address.

    Raises:
        ValueError: for a checkpoint that the page can't show, an invalid name, or examples that aren't pairs.
        FileNotFoundError, PermissionError, ConnectionError: as [`~madtp_hf.push_folder`].
    """
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"push_space got a {type(model).__name__} as model: expected a Hub id or a saved folder.")
    with one_sentence_errors(repo_id, token):
        repo_id = check_name(repo_id, token, dry_run)
        if not Path(model).is_dir():
            with one_sentence_errors(str(model), token):
                validate_repo_id(str(model))
        if Path(model).is_dir() or not dry_run:
            check_space(model, None if Path(model).is_dir() else model_revision, token)
        files = make_space(model, examples, title, model_revision, requirement)
        if dry_run:
            url = f"{HfApi(token=False).endpoint}/spaces/{repo_id}"
            print(describe_upload(files, url, private, folder="madtp_hf/"))
            return url

        def is_stale(name: str) -> bool:
            return name.partition("/")[0] in _OWN_FOLDERS and "/" in name

        return upload(files, repo_id, check_token(token), private, None, commit_message, "space", is_stale)
