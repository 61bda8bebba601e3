"""One grammar for the words of every command; every command's settings, paths and --help."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from data.prepare import __main__ as prepare
from radial.cli.command import Command
from radial.cli.reader import expanded, read, read_some, words_of
from radial.cli.settings import at_least, each, key_of, plain_kind, setting
from radial.errors import Mistake

COMMANDS = (
    "radial mask",
    "radial bench",
    "radial layouts",
    "radial backends",
    "data.prepare",
    "data.check",
    "data.bench",
    "data.synth",
    "train",
    "train.export",
    "train.report",
    "train.sample",
    "train.sample.bench",
    "train.bench",
    "train.bench.compare",
    "train.decay",
    "data.index",
    "launch plan",
    "launch local",
    "launch slurm",
    "launch status",
    "launch logs",
    "launch cancel",
    "launch doctor",
)


def command_of(name: str) -> Command:
    """The command that ``python -m <name>`` runs."""
    module, _, word = name.partition(" ")
    for place in (f"{module}.__main__", module):
        try:
            main = importlib.import_module(place).main
        except ModuleNotFoundError:
            continue
        return main.find[word][1]() if word else main
    raise AssertionError(name)


@dataclasses.dataclass
class Settings:
    place: Path = setting("where")
    count: int | None = setting("how many; all: all", 2, must=at_least(1), none="all")
    share: float = setting("a share", 0.5)
    ranks: list[int] = setting("several", [1], must=each(at_least(1)))
    kind: str = setting("which", "one", ("one", "two"))
    dry_run: bool = setting("do nothing", False)
    text: str | None = setting("any text", None)
    files: str | None = setting("paths or addresses", None, path=True)


@pytest.mark.parametrize(
    "words",
    [
        ["place=x", "count=3", "ranks=1,2", "dry_run=true", "text=a=b, {c}"],
        ["x", "--count", "3", "--ranks=1,2", "--dry-run", "--text", "a=b, {c}"],
        ["--place", "x", "--count=3", "ranks=1,2", "--dry_run=true", "text=a=b, {c}"],
    ],
)
def test_each_form_means_the_same(words: list[str]) -> None:
    given = read(Settings, words, "place")
    assert given == Settings(Path("x"), 3, 0.5, [1, 2], "one", True, "a=b, {c}")
    assert read(Settings, words_of(given)) == given


def test_a_key_may_be_another_word_than_its_field() -> None:
    @dataclasses.dataclass
    class Dotted:
        model: str = setting("which", "a")
        caption_model: int | None = setting("which describes", None, must=at_least(1), key="caption.model")

    for words in (["caption.model=3"], ["--caption.model", "3"]):
        assert read(Dotted, words) == Dotted("a", 3)
    assert words_of(Dotted("a", 3)) == ["caption.model=3"]
    for word, said in [
        ("caption_model=3", "caption_model is not a known key; did you mean caption.model?"),
        ("caption.model=x", "caption.model is 'x', expected a whole number"),
        ("caption.model=0", "caption.model is 0, expected at least 1"),
    ]:
        with pytest.raises(Mistake, match=re.escape(said)):
            read(Dotted, [word])
    assert "\n  caption.model " in Command("x", "does", Dotted, print).usage()


def test_null_or_another_word_stands_for_none() -> None:
    assert read(Settings, ["x", "count=all", "text=null"], "place").count is None
    assert words_of(read(Settings, ["x", "count=all"], "place")) == ["place=x", "count=all"]


def test_a_path_may_hold_the_sign_that_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=b").mkdir()
    assert read(Settings, ["a=b"], "place").place == Path("a=b")


def test_keys_of_others_are_handed_back_as_they_were_typed() -> None:
    given, others = read_some(Settings, ["place=x", "optim.lr=1e-4", "lora=null"])
    assert given.place == Path("x") and others == {"optim.lr": "1e-4", "lora": "null"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "place is not set, give it; where"),
        (["x", "y"], "place is given twice: x y"),
        (["x", "place=y"], "place is given twice"),
        (["x", "share=1", "--share=2"], "share is given twice"),
        (["place="], "place is empty, expected a path; is a variable of the shell not set"),
        (["place=a", "files="], "files is empty, expected a path; is a variable of the shell not set"),
        (["place=s3://b/x"], "place is s3://b/x, expected a path on this machine"),
        (["x", "conut=1"], r"conut is not a known key; did you mean count\?"),
        (["conut=1"], r"conut is not a known key; did you mean count\?"),
        (["x", "--conut", "1"], r"'--conut' is not an option; did you mean --count\?"),
        (["x", "--count"], "--count needs a value"),
        (["x", "-v"], "'-v' is not a setting, expected key=value"),
        (["x", "count=0"], "count is 0, expected at least 1"),
        (["x", "count=two"], "count is 'two', expected a whole number, at least 1"),
        (["x", "count=null"], "count is 'null', expected a whole number"),
        (["x", "share=nan"], "share is 'nan', expected a number"),
        (["x", "ranks=1,0"], r"ranks is \[1, 0\], expected at least 1 each"),
        (["x", "kind=three"], "kind is 'three', expected one of one, two"),
        (["x", "dry_run=1"], "dry_run is '1', expected true or false"),
    ],
)
def test_mistakes_name_the_key(words: list[str], message: str) -> None:
    with pytest.raises(Mistake, match=message):
        read(Settings, words, "place")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_setting_of_every_command_has_a_meaning_and_stands_in_its_help(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = command_of(name)
    assert command.name == f"python -m {name}"
    command.run(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(command.schema):
        assert f" {key_of(field)} {field.metadata['about'].split()[0]}" in shown, field.name
        assert len(field.metadata["about"]) > 4
    for example in command.examples:
        assert " ".join(example.split()) in shown
    with pytest.raises(SystemExit) as stop:
        command.run(["--no-such-option"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: '--no-such-option' is not an option") and error.count("\n") == 1


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HOME", str(tmp_path))
    return str(tmp_path)


def test_a_home_folder_wherever_a_path_begins(home: str) -> None:
    for text, expected in {
        "~": home,
        "~/x y": f"{home}/x y",
        "~/a.safetensors:0.8,~/b.safetensors": f"{home}/a.safetensors:0.8,{home}/b.safetensors",
        "[~/a.png, '~/b.png']": f"[{home}/a.png, '{home}/b.png']",
        "~nobody-of-this-name/x": "~nobody-of-this-name/x",
    }.items():
        assert expanded(text) == expected
    for text in ("/data/~/x", "a ~/b", "s3://bucket/~/x", "pipe:cat ~/x/{}", "hub:Wan-AI/x", "x~", "~x~y"):
        assert expanded(text) == text


PATHS = {
    "data.prepare": {"source", "out", "upload", "weights", "videos", "preview", "caption.model"},
    "data.bench": {"shards"},
    "data.check": {"shards", "png", "weights"},
    "data.synth": {"out", "preview"},
    "train": {"resume"},
    "train.export": {"run", "checkpoint", "out", "add", "add_2"},
    "train.report": {"run", "runs", "out"},
    "train.decay": {"out"},
    "data.index": {"shards", "weights"},
    "train.sample": {"prompts", "image", "out", "lora", "lora_2", "add", "add_2", "masks"},
    "launch slurm": {"resume", "container", "mounts"},
    "launch status": {"run"},
    "launch logs": {"run"},
    "launch doctor": {"run"},
}


@pytest.mark.parametrize("name", sorted(PATHS))
def test_every_path_of_every_command(home: str, name: str) -> None:
    schema: Any = command_of(name).schema
    hints = dataclasses.fields(schema), __import__("typing").get_type_hints(schema)
    found = {key_of(f): f.name for f in hints[0] if plain_kind(hints[1][f.name]) is Path or f.metadata["path"]}
    assert found.keys() == PATHS[name]
    given = read(schema, [f"{path}=~/x" for path in found] + ["family=wan"] * (name == "data.index"))
    assert {str(getattr(given, path)) for path in found.values()} == {f"{home}/x"}


def test_a_flag_of_prepare_may_have_a_hyphen() -> None:
    assert read(prepare.Arguments, ["source=s", "out=o", "--image-to-video"]).image_to_video
