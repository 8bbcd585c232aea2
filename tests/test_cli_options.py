"""The commands' options: one spelling, one help text, one set of exit codes; bad ones are refused before any work."""

import re

import pytest


pytest.importorskip("typer", reason="the command needs typer: pip install 'madtp_hf[cli]'")
import typer
from typer.testing import CliRunner

from madtp_hf_cli import app
from madtp_hf_cli.common import as_options


GROUP = typer.main.get_command(app)
COMMANDS = {name: command for name, command in GROUP.commands.items() if name != "version"}
# What these say about their own task.
OWN = {
    "prune": {"--reductions", "--text", "--question"},
    "ask": {"--text", "--question"},
    "benchmark": {"--reductions", "--out", "--data"},
    "evaluate": {"--out"},
    "export": {"--data", "--precision", "--reduction", "--reductions", "--text", "--question"},
    "convert": {"--task"},
    "push": {"--revision"},
    "search": {"--model"},
}


def invoke(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def test_options_have_hyphens_and_one_help_text_in_all_commands():
    texts = {}
    for name, command in COMMANDS.items():
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--"):
                    assert "_" not in option, (name, option)
                    if option not in OWN.get(name, ()):
                        texts.setdefault(option, set()).add(parameter.help)
    assert len(texts) > 40
    assert {option: found for option, found in texts.items() if len(found) > 1} == {}


def parsed(name, *arguments):
    command = COMMANDS[name]
    with GROUP.make_context("madtp-hf", [name]) as parent:
        return command.make_context(name, list(arguments), parent=parent).params


def test_underscores_are_accepted_in_every_option():
    for name, command in COMMANDS.items():
        needed = [option for option in command.params if option.required and option.opts[0].startswith("--")]
        for option in command.params:
            spelled = option.opts[0]
            if spelled.startswith("--") and "-" in spelled[2:]:
                value = [] if option.is_flag else [{"columns": "image=a"}.get(option.name, "1")]
                given = [text for other in needed for text in (other.opts[0], "x")]
                places = ["x"] * sum(not other.opts[0].startswith("-") for other in command.params)
                both = [
                    parsed(name, *places, *given, spelling, *value)
                    for spelling in (spelled, "--" + spelled[2:].replace("-", "_"))
                ]
                assert both[0] == both[1] and both[0][option.name] not in (None, False), (name, spelled)


def test_options_of_several_values_take_them_at_once_and_nothing_else():
    given = parsed("prune", "--reductions", "0.3", "0.5", "model", "out", "--data", "x", "--text", "a", "--text", "b")
    assert (given["reductions"], given["model"], given["text"]) == ([0.3, 0.5], "model", ["a", "b"])
    given = parsed("benchmark", "model", "--batch_sizes", "1", "8", "--reductions=0.5")
    assert (given["batch_sizes"], given["reductions"]) == ([1, 8], [0.5])
    given = parsed("caption", "--columns", "image=a b", "key=c", "model", "images", "out.jsonl")
    assert dict(given["columns"]) == {"image": "a b", "key": "c"} and given["images"] == "images"


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--device", "banana", "'banana' is not a device: expected a name such as cpu"),
        ("--device", "meta", "'meta' is not a device"),
        ("--device", "cuda:99", r"'cuda:99' is not available \(.*\): leave it out"),
        ("--max-pixels", 0, "(0 is not in the range|.* greater than or equal to 1)"),
        ("--temperature", 0, "0: expected a number above 0; for greedy search, leave --do-sample out"),
        ("--temperature", "nan", "nan: expected a number above 0"),
        ("--top-p", 1.5, "1.5: expected a number above 0 and at most 1"),
        ("--memory", "much", "'much' is not a size: expected a number with a unit, such as 2GB"),
        ("--columns", "image", "'image': expected KIND=NAME, such as image=photo"),
        ("--batch_size", 0, "(0 is not in the range|.* greater than or equal to 1)"),
    ],
)
def test_options_that_can_not_work_are_refused_before_anything_is_read(option, value, message, tmp_path):
    # There is no such model and no such image, of which nothing is said.
    result = invoke("caption", tmp_path / "model", tmp_path / "images", tmp_path / "o.jsonl", option, value)
    assert result.exit_code == 2 and not list(tmp_path.iterdir())
    assert re.search(f"Invalid value for '{option.replace('_', '-')}'.*{message}", result.stderr), result.stderr


def test_messages_name_the_command_s_options_where_the_library_names_arguments():
    class Option:
        def __init__(self, name, option):
            self.name, self.opts = name, [option]

    names = ("force", "image_dir", "columns", "workers", "task")
    options = [Option(name, "--" + name.replace("_", "-")) for name in names]
    for message, expected in (
        ("x exists: pass `force=True`.", "x exists: pass --force."),
        ("x exists: pass force=True.", "x exists: pass --force."),
        ("pass `image_dir` for it", "pass --image-dir for it"),
        ("image_dir=a/b: expected a folder", "--image-dir a/b: expected a folder"),
        ("task='gqa': expected one of 'vqa'", "--task gqa: expected one of 'vqa'"),
        ('pass columns={"image": NAME}.', "pass --columns image=NAME."),
        ("num_workers=-1: expected", "--workers -1: expected"),
        ("call export(model, force=True)", "call export(model, force=True)"),
        ("other settings (image_dir was a, now b)", "other settings (--image-dir was a, now b)"),
        ("data/task=vqa/image_dir/a.png", "data/task=vqa/image_dir/a.png"),
        ("pass samples=3", "pass samples=3"),  # no option of this command
    ):
        assert as_options(message, options) == expected


def test_the_help_of_each_command_names_an_example_and_the_exit_codes():
    for name in COMMANDS:
        shown = invoke(name, "--help").stdout
        assert f"Example: madtp-hf {name} " in shown and "3 some rows failed" in shown
        assert len(shown.splitlines()) <= 45
    assert "3 some rows failed" in invoke("--help").stdout
