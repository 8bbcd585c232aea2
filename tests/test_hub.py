"""Publishing, against a hub on 127.0.0.1 that huggingface_hub takes for the real one."""

import copy
import errno
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import warnings
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from madtp_hf import push_checkpoint, push_folder
from madtp_hf.checkpoints.push import find_checkpoint_files

from .conftest import TASKS, make_inputs, make_task_model
from .test_checkpoint import WITHOUT_PACKAGE


RESULTS = {
    "title": "2000 questions about unseen scans",
    "results": [
        {"reduction asked": 0.0, "reached": 0.0, "accuracy %": 0.92, "GFLOPs": 0.0844, "times faster": 1.0},
        {"reduction asked": 0.5, "reached": 0.496, "accuracy %": 0.93, "GFLOPs": 0.0425, "times faster": 1.9},
    ],
}
CHECKPOINT = {
    "README.md",
    "config.json",
    "configuration_madtp_blip.py",
    "encoder.py",
    "generation_config.json",
    "model.safetensors",
    "modeling_madtp_blip.py",
    "pipeline_madtp_blip.py",
    "processor_config.json",
    "sequences.py",
    "token_pruning.py",
    "tokenizer.json",
    "tokenizer_config.json",
}
PICKLES = (".bin", ".pt", ".pth", ".pkl")


@pytest.fixture
def folder(model, processor, tmp_path):
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def push(model, processor, repo_id="org/blip-madtp", **options):
    return push_checkpoint(model, processor, repo_id, **{"metrics": None, "token": "hf_alice", **options})


def train(model, steps=3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for step in range(steps):
        model(**make_inputs(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


CONSUMER = """
from huggingface_hub import snapshot_download
repo, scratch, first, second = folder, *sys.argv[2:5]
inputs = torch.load(scratch + "/inputs.pt", weights_only=True)
result = {"logits": {}, "errors": {}}
for revision in (first, second, "main", "v1"):
    model, info = AutoModel.from_pretrained(repo, trust_remote_code=True, revision=revision, output_loading_info=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        result["logits"][revision] = model(**inputs).logits.tolist()
ask = pipeline("visual-question-answering", repo, trust_remote_code=True, revision=first)
result["answer"] = ask(image=scratch + "/image.png", question="how many sevens are there?")
local = snapshot_download(repo, revision=first)
import os
result["snapshot"] = sorted(os.listdir(local))
with torch.no_grad():
    result["logits"]["snapshot"] = AutoModel.from_pretrained(local, trust_remote_code=True)(**inputs).logits.tolist()
# Whoever has it may publish it on, by transformers' own means.
model.push_to_hub("org/again", token="hf_alice")
AutoProcessor.from_pretrained(repo, trust_remote_code=True).push_to_hub("org/again", token="hf_alice")
with torch.no_grad():
    again = AutoModel.from_pretrained("org/again", trust_remote_code=True)
    result["logits"]["again"] = again(**inputs).logits.tolist()
for what, arguments in {
    "no trust": (repo, dict(trust_remote_code=False)),
    "revision": (repo, dict(trust_remote_code=True, revision="v9")),
    "private": ("org/secret", dict(trust_remote_code=True, token=False)),
    "truncated": ("org/broken", dict(trust_remote_code=True)),
}.items():
    try:
        AutoModel.from_pretrained(arguments[0], **arguments[1])
    except Exception as error:
        result["errors"][what] = f"{type(error).__name__}: {error}"
result["secret"] = type(AutoModel.from_pretrained("org/secret", trust_remote_code=True, token="hf_alice")).__name__
print("RESULT" + json.dumps(result))
"""


def test_from_training_to_a_stranger_who_asks(hub, model, processor, tmp_path):
    """Trained, pushed, trained on, pushed again; then a process without this package loads and asks over HTTP, with an
    empty cache."""
    inputs = make_inputs()

    def logits():
        with torch.no_grad():
            return model(**inputs).logits

    train(model)
    model.set_pruning(temperature=1.0)
    assert push(model, processor, metrics=RESULTS) == f"{hub.url}/org/blip-madtp"
    api = HfApi(token="hf_alice")
    first, expected = api.model_info("org/blip-madtp"), [logits()]
    assert {sibling.rfilename for sibling in first.siblings} >= CHECKPOINT
    assert not any(sibling.rfilename.endswith(PICKLES) for sibling in first.siblings)
    assert first.library_name == "transformers" and first.pipeline_tag == "visual-question-answering"
    assert {"blip", "madtp", "token-pruning"} <= set(first.tags) and not first.private
    api.create_tag("org/blip-madtp", tag="v1", revision=first.sha)
    image = Image.effect_noise((48, 48), 90).convert("RGB")
    image.save(tmp_path / "image.png")
    answer = model.as_pipeline(processor)(image=image, question="how many sevens are there?")

    train(model)
    push(model, processor, commit_message="Trained on")
    second = api.model_info("org/blip-madtp")
    expected.append(logits())
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    titles = [commit.title for commit in api.list_repo_commits("org/blip-madtp")]
    assert len(titles) == 3 and titles[0] == "Trained on" and titles[2] == "initial commit"

    push(model, processor, "org/secret", private=True)
    push(model, processor, "org/broken")
    hub.truncated_files.add(("org/broken", "model.safetensors"))
    torch.save(inputs, tmp_path / "inputs.pt")
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
    loaded = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE + CONSUMER, "org/blip-madtp", tmp_path, first.sha, second.sha],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert "Do you wish to run" not in loaded.stdout + loaded.stderr  # nobody is there to answer
    result = json.loads(loaded.stdout.splitlines()[-1].partition("RESULT")[2])

    def assert_same(revision, which):
        torch.testing.assert_close(torch.tensor(result["logits"][revision]), expected[which], atol=1e-5, rtol=0)

    for revision, which in ((first.sha, 0), ("v1", 0), ("snapshot", 0), (second.sha, 1), ("main", 1), ("again", 0)):
        assert_same(revision, which)
    assert set(result["snapshot"]) >= CHECKPOINT
    again = hub.files("org/again")
    assert set(again) >= CHECKPOINT and "--" not in str(json.loads(again["config.json"])["auto_map"])
    assert result["answer"][0]["answer"] == answer[0]["answer"]
    assert result["answer"][0]["score"] == pytest.approx(answer[0]["score"], rel=1e-3)
    assert result["secret"] == "MadtpBlipForQuestionAnswering"
    errors = result["errors"]
    assert errors["no trust"].startswith("ValueError: ") and "trust_remote_code=True" in errors["no trust"]
    assert errors["revision"].startswith("OSError: v9 is not a valid git identifier")
    assert "org/secret is not a local folder and is not a valid model identifier" in errors["private"]
    assert "private repository" in errors["private"] and "token" in errors["private"]
    assert re.search("SafetensorError: .*incomplete", errors["truncated"]), errors["truncated"]


def test_the_card_is_taken_and_reloads(hub, model, processor):
    pytest.importorskip("matplotlib")
    push(model, processor, metrics=RESULTS, base_model="org/dense", license="apache-2.0", datasets="org/digits")
    card = ModelCard.load("org/blip-madtp")
    card.validate()
    assert card.data.base_model == "org/dense" and card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "visual-question-answering" and "madtp" in card.data.tags
    assert "](budgets.png)" in card.text and hub.files("org/blip-madtp")["budgets.png"].startswith(b"\x89PNG")
    for field, value in (("tags", {"madtp": True}), ("license", "Apache 2.0"), ("model-index", [{"results": 1}])):
        content = f"---\n{json.dumps({field: value})}\n---\n".encode()
        with pytest.raises(ValueError, match=r"Invalid metadata in README.md"):  # it doesn't take just anything
            HfApi(token="hf_alice").upload_file(
                path_or_fileobj=content, path_in_repo="README.md", repo_id="org/blip-madtp"
            )


@pytest.mark.parametrize("source", ("path", "content", "rows", "flat"))
def test_metrics_of_any_kind_are_in_the_card(hub, model, processor, tmp_path, source):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    metrics = {
        "path": tmp_path / "results.json",
        "content": RESULTS,
        "rows": RESULTS["results"],
        "flat": {"accuracy": 0.93},
    }[source]
    push(model, processor, metrics=metrics)
    assert re.search(r"0\.93|93\.0|93 ?%", ModelCard.load("org/blip-madtp").text)


def test_an_interrupted_upload_is_repeated(hub, folder):
    hub.failing_uploads = {2}
    (folder / "budgets.png").write_bytes(b"\x89PNG\0" + bytes(100))
    with pytest.raises(OSError, match=r"was interrupted and nothing was published .*: try again") as raised:
        push_folder(folder, "org/blip-madtp", token="hf_alice")
    assert raised.value.__cause__ is not None
    assert [commit.title for commit in hub.repositories["org/blip-madtp"].history()] == ["initial commit"]
    sent = hub.uploads
    push_folder(folder, "org/blip-madtp", token="hf_alice")
    assert len(hub.repositories["org/blip-madtp"].history()) == 2
    assert hub.uploads == sent + 1  # what was up already was not sent again
    assert hub.files("org/blip-madtp")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    push_folder(folder, "org/blip-madtp", token="hf_alice")  # nothing new: no empty commit
    assert len(hub.repositories["org/blip-madtp"].history()) == 2 and hub.uploads == sent + 1


def test_a_hub_without_xet_is_told_as_well(hub, folder, monkeypatch):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    with pytest.raises(OSError, match=r"was interrupted and nothing was published .*xet.*: try again"):
        push_folder(folder, "org/blip-madtp", token="hf_alice")
    assert [commit.title for commit in hub.repositories["org/blip-madtp"].history()] == ["initial commit"]


def test_a_new_version_leaves_nothing_stale(hub, model, processor, folder, tmp_path):
    shards = tmp_path / "shards"
    model.save_pretrained(shards, max_shard_size="100KB")
    processor.save_pretrained(shards)
    (shards / "added_tokens.json").write_text("{}")
    push_folder(shards, "org/blip-madtp", token="hf_alice")
    before = hub.files("org/blip-madtp")
    assert sum(name.startswith("model-0") for name in before) > 1 and "model.safetensors.index.json" in before
    api = HfApi(token="hf_alice")
    api.upload_file(path_or_fileobj=b"kept", path_in_repo="docs/model.safetensors", repo_id="org/blip-madtp")
    api.upload_file(path_or_fileobj=b"kept", path_in_repo="handler.py", repo_id="org/blip-madtp")
    theirs = {"model-int8/notes.safetensors", "model-ema.safetensors", "pytorch_model_old/x.bin"}
    for name in theirs:
        api.upload_file(path_or_fileobj=b"kept", path_in_repo=name, repo_id="org/blip-madtp")
    push_folder(folder, "org/blip-madtp", token="hf_alice")
    after = hub.files("org/blip-madtp")
    ours = {"model.safetensors", "docs/model.safetensors"}
    assert {name for name in after if "safetensors" in name} == ours | {t for t in theirs if "safetensors" in t}
    assert "added_tokens.json" not in after and {"handler.py", ".gitattributes", *theirs} <= set(after)
    assert len(hub.repositories["org/blip-madtp"].history()) == 8


def test_weights_that_are_not_the_models_are_named(hub, model, processor, folder):
    tensors = load_file(folder / "model.safetensors")

    def refused(problem, tensors):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=problem):
            push_folder(folder, "org/new", token="hf_alice")

    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    refused(f"lacks {name}, which the model has", {k: v for k, v in tensors.items() if k != name})
    refused("has extra, which the model does not have", {**tensors, "extra": torch.zeros(1)})
    refused(rf"has {name} of shape \(1,\), where", {**tensors, name: torch.zeros(1)})

    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["fc1"]))
    for with_adapter in (adapted, adapted.get_base_model()):
        with pytest.raises(TypeError, match=r"a model with an adapter: push the result of its merge_and_unload\(\)"):
            push_checkpoint(with_adapter, processor, "org/new", metrics=None, token="hf_alice")
    # Layers of another kind, which save what no loader looks for.
    model.vision_model.encoder.layers[0].mlp.fc1 = torch.nn.Sequential(model.vision_model.encoder.layers[0].mlp.fc1)
    with pytest.raises(ValueError, match=r"does not load again .*lacks .*fc1.*expected one of") as raised:
        push_checkpoint(model, processor, "org/new", metrics=None, token="hf_alice")
    assert tempfile.gettempdir() not in str(raised.value)
    with pytest.raises(TypeError, match="repo_id is None: expected the name"):
        push_checkpoint(model, processor, None, metrics=None, token="hf_alice")
    assert "org/new" not in hub.repositories


def test_a_branch_and_what_stays_at_home(hub, folder):
    for name in (
        "optimizer.pt",
        "training_args.bin",
        "trainer_state.json",
        "train.py",
        "patients.png",
        "model-00001-of-00002.safetensors",
    ):
        (folder / name).write_bytes(b"mine")
    for name in ("checkpoint-10", ".git", "__pycache__", "runs"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"mine")
    before = sorted(folder.rglob("*"))
    push_folder(folder, "org/blip-madtp", token="hf_alice", revision="wip")
    assert sorted(folder.rglob("*")) == before  # no card written into it
    files = hub.files("org/blip-madtp", "wip")
    assert (
        set(files) >= CHECKPOINT
        and b"mine" not in files.values()
        and len(files) == len(find_checkpoint_files(folder)) + 2
    )
    assert set(hub.files("org/blip-madtp", "main")) == {".gitattributes"}
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# My own\n")
    push_folder(folder, "org/blip-madtp", token="hf_alice")
    assert hub.files("org/blip-madtp")["README.md"] == (folder / "README.md").read_bytes()


def test_of_pictures_those_that_the_card_links_to_go_along(folder):
    linked, not_linked = {"curve.png", "by scene.PNG", "html.svg", "budgets.png"}, {"e.png", "patients.png"}
    for name in linked | not_linked:
        (folder / name).write_bytes(b"picture")
    (folder / "README.md").write_text(
        'Not patients.png. ![curve](curve.png "title") ![](./by%20scene.PNG) <img width="9" src="html.svg">'
    )
    names = set(find_checkpoint_files(folder))
    assert linked <= names and not not_linked & names


def only_sentence(error):
    """The message, once it is made sure that it is one that a person can read."""
    message = str(error)
    assert "\n" not in message and message.endswith(".") and "hf_" not in message.replace("`hf_`", ""), message
    return message


def test_what_hinders_publishing_is_told_in_a_sentence(hub, model, processor, folder, monkeypatch):
    def refused(kind, message, repo_id="org/new", **options):
        with pytest.raises(kind, match=message) as raised:
            push_folder(folder, repo_id, **{"token": "hf_alice", **options})
        only_sentence(raised.value)
        return raised.value

    push_folder(folder, "org/public", token="hf_alice")
    requests = len(hub.requests)
    refused(PermissionError, "no token to publish with: log in with `hf auth login`, set HF_TOKEN", token=None)
    refused(ValueError, "'a/b/c' can't be the name of a repository", "a/b/c")
    refused(ValueError, "'org/a--b' can't be", "org/a--b")
    refused(ValueError, "token contains a character that tokens never contain", token="hf_al\nice")
    assert len(hub.requests) == requests  # none of them got as far as the hub

    with monkeypatch.context() as patch:  # pasted into the wrong place
        patch.setenv("HF_TOKEN", "hf_secret")
        refused(ValueError, r"'a/b/\*\*\*' can't be", "a/b/hf_secret", token=None)
        refused(ValueError, r"'a/b/\*\*\*' can't be", "a/b/hf_secret")
        refused(ValueError, r"'a/b/c' can't be", "a/b/c", token=" ")

    error = refused(PermissionError, "rejects the token for org/new .*Invalid credentials", token="hf_stolen")
    assert isinstance(error.__cause__, HfHubHTTPError)
    refused(PermissionError, "may not write to org/new .*someone else's, choose your own", token="hf_bob")
    refused(PermissionError, "may not write to org/public", "org/public", token="hf_bob")
    refused(ValueError, "exists and is public, and private=True", "org/public", private=True, revision="next")
    assert [branch.name for branch in HfApi(token="hf_alice").list_repo_refs("org/public").branches] == ["main"]
    (folder / "README.md").write_text("---\nlicense: [1\n---\n")
    refused(ValueError, "rejects the model card's metadata .*Invalid YAML metadata.*: correct README.md")
    refused(ValueError, "already has a model card, README.md: .*delete the file", metrics={"accuracy": 1.0})
    (folder / "README.md").unlink()
    refused(ValueError, "metrics='nowhere.json' can't be read", metrics="nowhere.json")
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("org/new2", token="hf_alice")

    with pytest.raises(TypeError, match=r"got a Linear: expected one of madtp_hf's models"):
        push(torch.nn.Linear(2, 2), processor)
    with pytest.raises(TypeError, match=r"got a .*Tokenizer.* as processor, which has no image_processor"):
        push(model, processor.tokenizer)

    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "save_pretrained", Mock(side_effect=error))
            with pytest.raises(OSError, match=r"No space is left to save the checkpoint in .*: free some") as raised:
                push(model, processor, "org/new3")
            assert only_sentence(raised.value) and raised.value.errno == errno.ENOSPC
    assert "org/new3" not in hub.repositories

    look = HfApi.model_info

    def look_while_another_commits(*arguments, **options):
        seen = look(*arguments, **options)
        hub.repositories["org/public"].commit("main", "Another's", {})
        return seen

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "model_info", look_while_another_commits)
        refused(
            OSError, "org/public was changed by someone else in the meantime .*: nothing was published", "org/public"
        )
    assert hub.files("org/public") == {}
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        refused(ConnectionError, "HF_HUB_OFFLINE is set")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(ConnectionError, "http://127.0.0.1:9 can't be reached .*check the connection and try again")


def test_an_incomplete_folder_is_refused_before_anything_is_made(hub, folder, tmp_path):
    def refused(kind, message, where=folder):
        with pytest.raises(kind, match=message) as raised:
            push_folder(where, "org/new", token="hf_alice")
        only_sentence(raised.value)

    for name in (
        "config.json",
        "modeling_madtp_blip.py",
        "token_pruning.py",  # imported by another
        "pipeline_madtp_blip.py",
        "model.safetensors",
        "processor_config.json",
        "sequences.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        refused(FileNotFoundError, f"has no {name}.*: save model and processor there with `save_pretrained`")
        if name == "model.safetensors":
            (folder / "pytorch_model.bin").write_bytes(b"pickled")
            refused(FileNotFoundError, "has no model.safetensors .*but pytorch_model.bin, a pickle")
        (folder / name).write_bytes(content)
        if not name.endswith(".py"):
            (folder / name).write_bytes(content[: len(content) // 2])
            refused(ValueError, f"{name} is (truncated or damaged|not valid JSON)")
            (folder / name).write_bytes(content)
    refused(FileNotFoundError, "nowhere is not a directory", tmp_path / "nowhere")
    config = json.loads((folder / "config.json").read_text())
    for changed, message in (
        ({"model_type": "blip"}, "has the model type 'blip': expected 'madtp_blip'"),
        ({"auto_map": None}, "does not say which code loads it"),
        ({"auto_map": {**config["auto_map"], "AutoModel": "a/b--modeling.Model"}}, "code from another repository"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **changed}))
        refused(ValueError, message)
    assert hub.requests == []


def test_shards_are_checked_against_their_index(hub, model, processor, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    processor.save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert {path.name for path in shards} < set(find_checkpoint_files(tmp_path))
    content = shards[0].read_bytes()
    shards[0].write_bytes(shards[1].read_bytes())
    with pytest.raises(ValueError, match=r"00001-of.* lacks .*, which the index lists"):
        find_checkpoint_files(tmp_path)
    shards[0].write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"00001-of.* is truncated"):
        find_checkpoint_files(tmp_path)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model-00001-of.*, weights that the index names"):
        find_checkpoint_files(tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_complete_as_it_is_saved(task, processor, tmp_path):
    make_task_model(task).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    names = set(find_checkpoint_files(tmp_path))
    assert names == {path.name for path in tmp_path.iterdir()}
    assert ("generation_config.json" in names) == (task in ("vqa", "captioning"))


def test_the_command(hub, folder, monkeypatch):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from madtp_hf_cli import app

    def invoke(*arguments):
        return CliRunner().invoke(app, ["push", str(folder), *arguments])

    (folder / "optimizer.pt").touch()
    (folder / "results.json").write_text(json.dumps(RESULTS))
    shown = invoke("org/blip-madtp", "--dry-run", "--private")
    assert shown.exit_code == 0, shown.output
    assert f"{hub.url}/org/blip-madtp, main, private" in shown.stdout
    assert re.search(r"model\.safetensors +[\d,.]+ kB  LFS\n", shown.stdout)
    assert re.search(r"README\.md +[\d.]+ kB  \(made\)\n", shown.stdout)
    assert "stay here: optimizer.pt" in shown.stdout and "library_name: transformers" in shown.stdout
    assert hub.requests == []

    failed = invoke("org/blip-madtp")
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr.startswith("madtp-hf: There is no token") and failed.stderr.count("\n") == 1
    failed = invoke("org/blip-madtp", "--token", "hf_bob")
    assert failed.exit_code == 1 and "may not write to org/blip-madtp" in failed.stderr
    assert "Traceback" not in failed.output and "hf_bob" not in failed.output

    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    pushed = invoke("org/blip-madtp", "--private", "--message", "A first one", "--revision", "wip")
    assert (pushed.exit_code, pushed.stdout) == (0, f"{hub.url}/org/blip-madtp\n"), pushed.output
    repository = hub.repositories["org/blip-madtp"]
    assert repository.private and repository.history("wip")[0].title == "A first one"
    assert "results.json" in hub.files("org/blip-madtp", "wip")
    pushed = invoke(
        "blip-madtp", "--metrics", str(folder / "results.json")
    )  # a name alone: in the user's own namespace
    assert pushed.stdout == f"{hub.url}/alice/blip-madtp\n", pushed.output
    assert "alice/blip-madtp" in ModelCard.load("alice/blip-madtp").text


def test_a_model_that_was_loaded_with_its_own_code(hub, folder, processor):
    name = "modeling_madtp_blip.MadtpBlipForQuestionAnswering"
    model = get_class_from_dynamic_module(name, str(folder)).from_pretrained(folder)
    assert type(model).__module__.startswith("transformers_modules.")
    push(model, processor)
    assert set(hub.files("org/blip-madtp")) >= CHECKPOINT


def test_the_stock_push_to_hub_is_complete(hub, model, processor):
    model.push_to_hub("org/blip-madtp", token="hf_alice", tags=["mine"])
    processor.push_to_hub("org/blip-madtp", token="hf_alice")
    assert set(hub.files("org/blip-madtp")) >= CHECKPOINT
    tags = ModelCard.load("org/blip-madtp").data.tags
    assert {"blip", "madtp", "token-pruning", "mine"} <= set(tags)
    assert "mine" not in type(model).model_tags  # what one model is tagged with is not every model's


def test_the_stock_trainer_pushes_a_complete_repository(hub, model, processor, tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("datasets")
    inputs = make_inputs((6, 6, 6, 6))
    samples = [{name: value[index] for name, value in inputs.items()} for index in range(4)]
    arguments = TrainingArguments(
        output_dir=tmp_path / "trained",
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        push_to_hub=True,
        hub_model_id="org/blip-madtp",
        hub_token="hf_alice",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=samples, processing_class=processor)
    trainer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.push_to_hub()
    files = hub.files("org/blip-madtp")
    assert set(files) >= CHECKPOINT
    card = ModelCard.load("org/blip-madtp")
    card.validate()
    assert {"blip", "madtp", "token-pruning"} <= set(card.data.tags)
    local = tmp_path / "trained"
    assert files["model.safetensors"] == (local / "model.safetensors").read_bytes()
    # `push_checkpoint` onto it: a card of its own, and no pickle.
    assert {name for name in files if name.endswith(PICKLES)} == {"training_args.bin"}
    push(model, processor, metrics=RESULTS)
    assert not any(name.endswith(PICKLES) for name in hub.files("org/blip-madtp"))
    assert "token pruning" in ModelCard.load("org/blip-madtp").text


def test_the_hub_serves_as_the_real_one_does(hub, model, processor):
    push(model, processor, "org/secret", private=True)
    api = HfApi(token="hf_alice")
    assert api.whoami()["name"] == "alice" and not api.file_exists("org/secret", "nothing.txt")
    assert [branch.name for branch in api.list_repo_refs("org/secret").branches] == ["main"]
    (weights,) = api.get_paths_info("org/secret", ["model.safetensors"])
    assert weights.lfs is not None and weights.size == len(hub.files("org/secret")["model.safetensors"])
    assert set(api.list_repo_files("org/secret")) == set(hub.files("org/secret"))
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("org/secret", "config.json", token=False)
    asked = urllib.request.Request(f"{hub.url}/org/secret/resolve/main/model.safetensors")
    asked.add_header("Authorization", "Bearer hf_alice")
    asked.add_header("Range", "bytes=8-15")
    with urllib.request.urlopen(asked) as answer:
        assert answer.status == 206 and answer.read() == hub.files("org/secret")["model.safetensors"][8:16]
