"""Publish checkpoints on the Hub: `push_checkpoint` for a model in memory, `push_folder` for a saved one.

Both upload a complete checkpoint in one commit.
"""

import errno
import json
import os
import re
import tempfile
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, ProcessorMixin
from transformers.dynamic_module_utils import get_relative_imports

from ..modeling.versions import VERSION as __version__
from ..tasks import TASKS
from .card import PICTURE, make_card


_MODEL_CLASSES = {task.model_class.__name__: task.model_class for task in TASKS.values()}
_MODEL_TYPES = sorted({model_class.config_class.model_type for model_class in _MODEL_CLASSES.values()})
# A checkpoint is the files that its configuration refers to, and these. Other files of the folder, such as optimizer
# state, aren't uploaded.
_PROCESSOR_FILES = (
    "processor_config.json preprocessor_config.json tokenizer.json tokenizer_config.json special_tokens_map.json"
    " added_tokens.json vocab.txt vocab.json merges.txt chat_template.json chat_template.jinja"
).split()
_SENTENCE_TRANSFORMERS_FILES = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
_ALONGSIDE = (
    *_PROCESSOR_FILES,
    *_SENTENCE_TRANSFORMERS_FILES,
    *"generation_config.json README.md LICENSE LICENSE.md LICENSE.txt NOTICE results.json".split(),
    *"handler.py images.py requirements.txt".split(),
)
# What an Inference Endpoint needs besides a checkpoint: a request handler, and a transformers that can load it.
_HANDLER = {
    "handler.py": Path(__file__).parents[1].joinpath("serving", "endpoint_handler.py").read_bytes,
    "images.py": Path(__file__).parents[1].joinpath("modeling", "images.py").read_bytes,
    "requirements.txt": lambda: b"transformers>=5.0\n",
}
_PICTURES = (".png", ".jpg", ".jpeg", ".svg", ".gif")  # uploaded if README.md links to them
_LINK = re.compile(r"""\]\(<?(?:\./)?([^)>\s]+)|\b(?:src|href)=["'](?:\./)?([^"']+)""")  # in Markdown or inline HTML
# Files to delete from a repository if the new checkpoint doesn't have them. Code and documents that people added to
# it are kept.
_STALE = (
    *_PROCESSOR_FILES,
    *_SENTENCE_TRANSFORMERS_FILES,
    "generation_config.json",
    PICTURE,
    "model.safetensors",
    "model.safetensors.index.json",
    "model-[0-9]*-of-[0-9]*.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model-[0-9]*-of-[0-9]*.bin",
    "training_args.bin",  # pushed by a `Trainer`: a pickle
)
_SAVE_AGAIN = "save model and processor there with `save_pretrained`"


def push_checkpoint(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    repo_id: str,
    *,
    metrics: str | os.PathLike | dict | list | None = None,
    token: str | None = None,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    dry_run: bool = False,
    base_model: str | None = None,
    license: str | None = None,
    datasets: str | list[str] | None = None,
    handler: bool = False,
) -> str:
    """Publish a model and its processor, with code and model card, as a repository for `AutoModel` and `pipeline`.

    The repository is created if it doesn't exist. Everything is uploaded in one commit, or nothing is. After an
    interruption, the same call continues and doesn't send again what is already uploaded. Weights and processor files
    of an earlier version that this one doesn't have are deleted, and its card is replaced.

    Args:
        model: One of this package's models.
        processor: Its processor, of images and texts.
        repo_id: `"name"`, for the token's own user, or `"namespace/name"`.
        metrics: What the card reports: the path of a `results.json`, its content, its list of rows (`"reached"`,
            `"accuracy %"`, `"GFLOPs"`, ...), or a dict such as `{"accuracy": 0.93}`.
        token: A token with write access; by default that of `hf auth login` or of the environment variable HF_TOKEN.
        private: Whether a new repository is private.
        revision: The branch to commit to, created if it doesn't exist; by default `"main"`.
        commit_message: The commit's message.
        dry_run: Print what would be uploaded, and change nothing. This needs no token.
        base_model, license, datasets: For the card's metadata, as the Hub names them.
        handler: Add the handler.py that a Hugging Face Inference Endpoint runs, and its requirements.txt.

    Returns:
        The repository's address.

    Raises:
        TypeError: for another model, or for a processor without image processor or tokenizer.
        ValueError: for an invalid name, metrics or card, or for `private=True` and an existing public repository.
        PermissionError: without a token, or with one that lacks write access.
        ConnectionError: if the Hub can't be reached.
        OSError: if the upload breaks off, or the disk is full.
    """
    # Not checked by class: `AutoModel` may have loaded the model with the checkpoint's own code.
    if getattr(getattr(model, "config", None), "model_type", None) not in _MODEL_TYPES:
        raise TypeError(f"push_checkpoint got a {type(model).__name__}: expected one of madtp_hf's models.")
    if hasattr(model, "peft_config"):
        raise TypeError(
            f"push_checkpoint got a {type(model).__name__}, a model with an adapter: push the result of its"
            " merge_and_unload(), or save the adapter and upload its folder."
        )
    for part in ("image_processor", "tokenizer"):
        if getattr(processor, part, None) is None:
            raise TypeError(
                f"push_checkpoint got a {type(processor).__name__} as processor, which has no {part}: expected the"
                " model's BlipProcessor or CLIPProcessor."
            )
    with one_sentence_errors(repo_id, token), tempfile.TemporaryDirectory(prefix="madtp-hf-") as folder:
        repo_id = check_name(repo_id, token, dry_run)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        try:
            files = find_checkpoint_files(folder)
        except (FileNotFoundError, ValueError) as error:
            reason = re.sub(f"[;:] {re.escape(_SAVE_AGAIN)}", "", str(error).replace(f"{folder}{os.sep}", ""))
            raise ValueError(
                f"What this {type(model).__name__} saves does not load again ({reason.rstrip('.')}):"
                " expected one of madtp_hf's models as it is, without adapters or layers of another kind."
            ) from error
        options: dict = {"private": private, "revision": revision, "commit_message": commit_message}
        options |= {"base_model": base_model, "license": license, "datasets": datasets}
        return _push(Path(folder), files, repo_id, metrics, dry_run, handler, token, **options)


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    metrics: str | os.PathLike | dict | list | None = None,
    token: str | None = None,
    dry_run: bool = False,
    handler: bool = False,
    **options,
) -> str:
    """Publish the checkpoint in a folder, as `save_pretrained` and `madtp-hf convert` write it.

    The arguments are those of [`push_checkpoint`]. The checkpoint is checked to be complete before anything is created
    on the Hub. The folder is not changed, and files that aren't part of the checkpoint, such as optimizer state,
    aren't uploaded. If the folder has no README.md, a model card is made from `metrics` or from the folder's
    results.json.

    Returns:
        The repository's address.

    Raises:
        FileNotFoundError: if a file of the checkpoint is missing.
        ValueError: as [`push_checkpoint`], and if a file is damaged or lies outside the folder, or `metrics` is given
            although the folder has a README.md.
    """
    with one_sentence_errors(repo_id, token):
        files = find_checkpoint_files(folder)
        repo_id = check_name(repo_id, token, dry_run)
        return _push(Path(folder), files, repo_id, metrics, dry_run, handler, token, **options)


def check_name(repo_id: str, token: str | None, dry_run: bool) -> str:
    """Validate a repository's name and return it in full, with its namespace; a dry run returns it as given."""
    if not isinstance(repo_id, str):
        raise TypeError(f"repo_id is {repo_id!r}: expected the name of a repository, `name` or `namespace/name`.")
    validate_repo_id(repo_id)
    if dry_run:
        return repo_id
    token = check_token(token)
    return repo_id if "/" in repo_id else f"{HfApi(token=token).whoami()['name']}/{repo_id}"


def save_handler(folder: str | os.PathLike) -> None:
    """Write the handler.py and requirements.txt of a Hugging Face Inference Endpoint into a checkpoint's folder.

    Existing files of these names are not changed. `push_folder` uploads both.
    """
    find_checkpoint_files(folder)  # raises if there is no checkpoint
    for name, content in _HANDLER.items():
        if not Path(folder, name).exists():
            Path(folder, name).write_bytes(content())


def _push(
    folder: Path,
    names: list[str],
    repo_id: str,
    metrics,
    dry_run: bool,
    handler: bool,
    token: str | None,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    base_model=None,
    license=None,
    datasets=None,
) -> str:
    metadata = {"base_model": base_model, "license": license, "datasets": datasets}
    files: dict[str, Path | bytes] = {name: content() for name, content in _HANDLER.items()} if handler else {}
    files |= {name: folder / name for name in names}
    if "README.md" not in files:
        with tempfile.TemporaryDirectory(prefix="madtp-hf-") as scratch:
            picture = Path(scratch, PICTURE)
            files["README.md"] = str(make_card(folder, repo_id, metrics, picture, **metadata)).encode()
            files |= {PICTURE: picture.read_bytes()} if picture.exists() else {}
    elif metrics is not None or any(value is not None for value in metadata.values()):
        raise ValueError(
            f"{folder} already has a model card, README.md: leave out what would be written into a new one (metrics,"
            " base model, license, data sets), or delete the file."
        )
    if dry_run:
        url = f"{HfApi(token=False).endpoint}/{repo_id}"
        stays = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name not in files)
        print(describe_upload(files, f"{url}, {revision or 'main'}", private, stays))
        return url
    return upload(files, repo_id, check_token(token), private, revision, commit_message)


def find_checkpoint_files(folder: str | os.PathLike) -> list[str]:
    """Return the names of the files that make up the checkpoint in a folder, and of no other files.

    Raises:
        FileNotFoundError: if a file is missing; the message names it and says what to do.
        ValueError: if a file is damaged or lies outside the folder, or the folder holds another kind of checkpoint.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a directory: expected a folder with a saved checkpoint.")
    config = _read_json(_require(folder, "config.json", "the model's configuration"))
    if config.get("model_type") not in _MODEL_TYPES:
        raise ValueError(
            f"{folder / 'config.json'} has the model type {config.get('model_type')!r}: expected"
            f" {' or '.join(map(repr, _MODEL_TYPES))}, a model of this package;"
            " make one with `from_blip`, `from_clip` or `madtp-hf convert`."
        )
    model_class = _MODEL_CLASSES.get((config.get("architectures") or [None])[0])
    if model_class is None or not {"AutoConfig", "AutoModel"} <= set(config.get("auto_map") or ()):
        raise ValueError(
            f"{folder / 'config.json'} does not say which code loads it (architectures, auto_map): {_SAVE_AGAIN}."
        )
    _require(folder, "tokenizer_config.json", "the tokenizer's configuration")
    if not (folder / "vocab.txt").is_file():
        _require(folder, "tokenizer.json", "the tokenizer")
    if not (folder / "preprocessor_config.json").is_file():
        processor = _read_json(_require(folder, "processor_config.json", "the processor's configuration"))
        if "image_processor" not in processor:
            _require(folder, "preprocessor_config.json", "the image processor's configuration")
    if model_class.can_generate():
        _require(folder, "generation_config.json", "the generation settings")
    names = {"config.json", *_find_weights(folder, config, model_class), *_find_modules(folder)}
    card = (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").is_file() else ""
    linked = {PICTURE, *(unquote(target) for link in _LINK.findall(card) for target in link)}
    for path in folder.iterdir():
        shown = path.suffix.lower() in _PICTURES and path.name in linked
        if path.is_file() and (path.name in _ALONGSIDE or shown):
            names.add(path.name)
    for name in names:
        _check_inside(folder, name)
        if name.endswith(".json"):
            _read_json(folder / name)
    return sorted(names)


def _check_inside(folder: Path, name: str) -> None:
    """Raise a `ValueError` for a file that isn't inside the folder.

    A configuration or link must not cause another file of this machine to be published.
    """
    if name in ("", ".", "..") or name != Path(name).name or name != PureWindowsPath(name).name:
        raise ValueError(f"{folder} refers to {name!r}: expected the name of a file in that folder, without a path.")
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":  # Hub cache: links to the repository's blobs
        roots.append(folder.resolve().parents[1] / "blobs")
    target = (folder / name).resolve()
    if not any(target.is_relative_to(root) for root in roots):
        raise ValueError(f"{folder / name} is a symlink to {target}, outside the folder: replace it with the file.")


def _require(folder: Path, name: str, what: str) -> Path:
    _check_inside(folder, name)
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} has no {name}, {what}: {_SAVE_AGAIN}.")
    return folder / name


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}), it may be truncated: {_SAVE_AGAIN}.") from error


def _find_weights(folder: Path, config: dict, model_class) -> list[str]:
    """Return the weight files, one file or shards and their index, once they are complete and match the model."""
    name, index_name = "model.safetensors", "model.safetensors.index.json"
    index = folder / index_name
    if (folder / name).is_file():  # loaders prefer it to shards
        tensors_of: dict[str, set[str]] = {name: set()}
    elif index.is_file():
        tensors_of = {}
        for tensor, shard in _read_json(index).get("weight_map", {}).items():
            tensors_of.setdefault(shard, set()).add(tensor)
    else:
        pickled = [path.name for path in folder.glob("pytorch_model*.bin")]
        but = f", but {pickled[0]}, a pickle that could run anything where it is loaded" if pickled else ""
        raise FileNotFoundError(
            f"{folder} has no {name} or {index_name}, the model's weights{but}: {_SAVE_AGAIN}, which writes"
            " safetensors."
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for shard, tensors in tensors_of.items():
        _require(folder, shard, "weights that the index names")
        try:
            with safe_open(
                folder / shard, framework="pt"
            ) as weights:  # reads only the header, and checks the file's length against it
                missing = tensors - set(weights.keys())
                shapes |= {tensor: tuple(weights.get_slice(tensor).get_shape()) for tensor in weights.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"{folder / shard} is truncated or damaged ({error}): {_SAVE_AGAIN}, or download it again."
            ) from error
        if missing:
            raise ValueError(f"{folder / shard} lacks {min(missing)}, which the index lists: {_SAVE_AGAIN}.")
    if "quantization_config" not in config:
        _check_tensors(folder, shapes, model_class, config)
    return [*tensors_of, *([index_name] if name not in tensors_of else [])]


def _check_tensors(folder: Path, shapes: dict[str, tuple[int, ...]], model_class, config: dict) -> None:
    """Raise a `ValueError` if the saved tensors aren't the model's: on loading, missing ones would be random."""
    sharded = not (folder / "model.safetensors").is_file()
    where = folder / f"model.safetensors{'.index.json' if sharded else ''}"
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_dict(config))
    model.tie_weights()
    expected = dict(model.state_dict(keep_vars=True))
    saved = {id(expected[name]) for name in shapes if name in expected}  # tied weights are saved under one name
    for name, tensor in expected.items():
        if name in shapes and shapes[name] != tuple(tensor.shape):
            problem = f"has {name} of shape {shapes[name]}, where the configuration says {tuple(tensor.shape)}"
        elif id(tensor) not in saved:
            problem = f"lacks {name}, which the model has"
        else:
            continue
        raise ValueError(f"{where} {problem}: {_SAVE_AGAIN}.")
    unknown = sorted(shapes.keys() - expected.keys())
    if unknown:
        raise ValueError(f"{where} has {unknown[0]}, which the model does not have: {_SAVE_AGAIN}.")


def _find_modules(folder: Path) -> list[str]:
    """Return the code files that the configurations name, and those that these import relatively."""
    wanted: dict[str, str] = {}  # file -> the file that refers to it
    for name in ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        content = _read_json(folder / name)
        references = list((content.get("auto_map") or {}).values())
        references += [pipeline.get("impl") for pipeline in (content.get("custom_pipelines") or {}).values()]
        for reference in references:
            for path in reference if isinstance(reference, list) else [reference]:  # of a tokenizer, slow and fast
                if path is None:
                    continue
                if not isinstance(path, str):
                    raise ValueError(f"{folder / name} names code by {path!r}: expected a string, `module.Class`.")
                if "--" in path:
                    raise ValueError(
                        f"{folder / name} takes its code from another repository, {path!r}: expected code in this"
                        " folder; load the model with madtp_hf's own class, and save it."
                    )
                wanted.setdefault(f"{path.rpartition('.')[0]}.py", name)
    found = {}
    while wanted:
        name, referrer = wanted.popitem()
        path = _require(folder, name, f"code that {referrer} refers to")
        found[name] = path
        for module in get_relative_imports(path):
            if f"{module}.py" not in found:
                wanted[f"{module}.py"] = name
    return list(found)


def describe_upload(files: dict[str, Path | bytes], where: str, private: bool, stays=(), folder: str = "") -> str:
    """Describe for a person what would be uploaded; the files of `folder` share a line."""
    rows: dict[str, tuple[int, str]] = {}
    width = max(map(len, files))
    for name, content in sorted(files.items()):
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        # The Hub decides; by its rules these are weights, pictures and files above 10 MB.
        is_lfs = name.endswith((".safetensors", ".png", ".jpg")) or size > 10_000_000
        kinds = f"{'  LFS' if is_lfs else ''}{'  (made)' if isinstance(content, bytes) else ''}"
        key = folder if folder and name.startswith(folder) else name
        rows[key] = rows[key][0] + size if key in rows else size, "" if key == folder else kinds
    card = files["README.md"]
    head = (card if isinstance(card, bytes) else card.read_bytes()).decode().splitlines()[:24]
    return "\n".join(
        [
            f"Would publish to {where}{', private' if private else ''}:",
            *(f"  {name:<{width}}  {size / 1000:>12,.1f} kB{kinds}" for name, (size, kinds) in rows.items()),
            *([f"Would stay here: {', '.join(stays)}"] if stays else []),
            "The card begins:",
            *(f"  {line}".rstrip() for line in head),
        ]
    )


def check_token(token: str | None) -> str:
    if token is not None and not isinstance(token, str):
        raise TypeError(f"token is a {type(token).__name__}: expected a string, or None for the stored one.")
    token = (token or get_token() or "").strip()
    if not token:
        raise PermissionError(
            "There is no token to publish with: log in with `hf auth login`, set HF_TOKEN, or pass a token with write"
            " access."
        )
    if not (token.isascii() and token.isprintable() and " " not in token):
        # If it were sent, a library's error message would quote it.
        raise ValueError(
            "The token contains a character that tokens never contain, such as a space: expected `hf_` and letters."
        )
    return token


def _is_stale(name: str) -> bool:
    """Return whether a repository's file that the new checkpoint lacks belongs to an earlier checkpoint."""
    return "/" not in name and any(fnmatch(name, known) for known in _STALE)


def upload(files, repo_id, token, private, revision, commit_message, repo_type=None, is_stale=_is_stale) -> str:
    """Upload files, name -> path or content, in one commit, and delete stale ones; return the repository's address.

    repo_type: `"space"` for a Space that runs gradio, None for a model.
    """
    api = HfApi(token=token, library_name="madtp_hf", library_version=__version__)
    # None, not False: an organization may have private repositories as its default.
    sdk = "gradio" if repo_type == "space" else None
    api.create_repo(repo_id, private=private or None, exist_ok=True, repo_type=repo_type, space_sdk=sdk)
    if private and not api.repo_info(repo_id, repo_type=repo_type).private:
        raise ValueError(
            f"{repo_id} exists and is public, and private=True was given: make it private in its settings, or choose"
            " another name."
        )
    if revision not in (None, "main") and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True, repo_type=repo_type)
    before = api.repo_info(repo_id, revision=revision, repo_type=repo_type)
    existing = [sibling.rfilename for sibling in getattr(before, "siblings", None) or ()]
    stale = [name for name in existing if name not in files and is_stale(name)]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationDelete(name) for name in stale),
        *(CommitOperationAdd(name, content) for name, content in sorted(files.items())),
    ]
    try:
        # Not `upload_folder`: it may commit in several steps, and a load in between would get half a checkpoint.
        api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message or f"Upload with madtp_hf {__version__}",
            repo_type=repo_type,
            revision=revision,
            parent_commit=before.sha,  # stale files were determined at this commit
        )
    except HTTPError:
        raise
    except (RuntimeError, OSError) as error:  # raised by the Hub's client and Xet's if a file can't be sent
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
            raise _explain_answer(cause, repo_id) from error
        if getattr(error, "errno", None) is not None:  # an error of a local file
            raise
        reason = " ".join(str(error).replace(token, "***").split()).rstrip(".")
        raise OSError(
            f"The upload to {repo_id} was interrupted and nothing was published ({reason}): try again; files that are"
            " already uploaded are not sent twice."
        ) from error
    return f"{api.endpoint}/{'spaces/' if repo_type == 'space' else ''}{repo_id}"


@contextmanager
def one_sentence_errors(repo_id: str, token: str | None):
    """Turn library errors into errors that say what to do, with the original error as their cause."""
    try:
        yield
    except Exception as error:
        explained = _explain(error, repo_id)
        if explained is None:
            raise
        for secret in (token, get_token()):
            if secret and secret.strip():  # replacing an empty string would put stars between all letters
                explained.args = tuple(argument.replace(secret.strip(), "***") for argument in explained.args)
        raise explained from error


def _explain(error: Exception, repo_id: str) -> Exception | None:
    """Return the error to raise in place of a library's error; None to keep the library's."""
    endpoint = HfApi(token=False).endpoint
    if isinstance(error, HFValidationError):
        return ValueError(
            f"{repo_id!r} can't be the name of a repository: expected `name` or `namespace/name`, of letters, digits,"
            " '-', '_' and '.', at most 96 characters."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return ConnectionError("HF_HUB_OFFLINE is set, and nothing can be published offline: unset it and try again.")
    if isinstance(error, HfHubHTTPError):
        return _explain_answer(error, repo_id)
    if isinstance(error, HTTPError):  # no response at all
        return ConnectionError(
            f"{endpoint} can't be reached ({type(error).__name__}), so nothing was published: check the connection and"
            " try again."
        )
    if isinstance(error, json.JSONDecodeError):
        return ConnectionError(
            f"{endpoint} does not respond like a model hub: check the environment variable HF_ENDPOINT."
        )
    if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error):
        explained = OSError(
            f"No space is left to save the checkpoint in {tempfile.gettempdir()}: free some, or set TMPDIR."
        )
        explained.errno = errno.ENOSPC
        return explained
    if isinstance(error, ValueError) and str(error).startswith("Invalid metadata in README.md"):
        problems = "; ".join(line.removeprefix("- ") for line in str(error).splitlines()[1:])
        return ValueError(f"{endpoint} rejects the model card's metadata ({problems}): correct README.md.")
    return None


# By the status of the Hub's answer: the error, what it begins with, and what it ends with.
_ANSWERS = {
    400: (ValueError, "The Hub rejects the files of {}", "correct them"),
    401: (
        PermissionError,
        "The Hub rejects the token for {}",
        "create one with write access in your account's settings, and log in with `hf auth login`",
    ),
    403: (
        PermissionError,
        "The token may not write to {}",
        "expected one with write access there; if the namespace is someone else's, choose your own",
    ),
    404: (
        FileNotFoundError,
        "The Hub has no {} that this token can see, or not that revision",
        "check the name, the branch and the token",
    ),
    409: (OSError, "{} was changed by someone else in the meantime", "nothing was published, try again"),
}
_ANSWERS[412] = _ANSWERS[409]


def _explain_answer(error: HfHubHTTPError, repo_id: str) -> Exception:
    status = error.response.status_code
    said = (error.server_message or "no reason given").strip().replace("\n", " ").rstrip(".")
    other = OSError, f"The Hub answered {status} and nothing was published as {{}}", "try again"
    kind, problem, advice = _ANSWERS.get(status, other)
    return kind(f"{problem.format(repo_id)} ({said}): {advice}.")
