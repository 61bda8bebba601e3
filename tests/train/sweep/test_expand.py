"""The values of a sweep, read as Hydra reads them; what is no sweep, as it is typed."""

import pytest

from radial.errors import Mistake
from train.__main__ import main
from train.config.compose import group_options
from train.sweep.expand import expand


def values(text, key="lora.rank"):
    return [run[key] for run in expand({key: text})]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("32,64", ["32", "64"]),
        ("32, 64", ["32", "64"]),
        ("choice(32,64)", ["32", "64"]),
        ("range(1,4)", ["1", "2", "3"]),
        ("range(3)", ["0", "1", "2"]),
        ("range(0,1,0.5)", ["0.0", "0.5"]),
        ("int(3.0,4.0)", ["3", "4"]),
        ("sort(3,1,2)", ["1", "2", "3"]),
        ("null,3", ["null", "3"]),
        ("true,false", ["true", "false"]),
        ("1e-4,2e-4", ["0.0001", "0.0002"]),
        ("'a, b',\"c d\"", ["a, b", "c d"]),
        ('choice("a fox, at dawn")', ["a fox, at dawn"]),
        ("[1,2],['a, b']", ["[1, 2]", "['a, b']"]),
        ("s3://a/x,s3://b/y", ["s3://a/x", "s3://b/y"]),
        ("${a},b", ["${a}", "b"]),
    ],
)
def test_a_sweep_is_read_in_hydras_grammar(text, found):
    assert values(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1.10,1.20", ["1.10", "1.20"]),
        ("2024_01, 1e3", ["2024_01", "1e3"]),
        ("choice(1.10,1.1)", ["1.10", "1.1"]),
        ("range(1,3)", ["1", "2"]),
        ("float(1,2)", ["1.0", "2.0"]),
        ("1.10,a,'b c'", ["1.10", "a", "b c"]),
        ("1.10,'a, b'", ["1.1", "a, b"]),
    ],
)
def test_a_text_that_looks_like_a_number_stays_as_it_is_typed(text, found):
    assert values(text, "data.shards") == found


@pytest.mark.parametrize(
    "text",
    [
        "64", "", "null", "[a cat, a dog]", "it's a dog, at dawn", "runs/lr=1e-4, often", "{000..009}", '"a, b"',
        r"a\,b", "pipe:aws s3 cp s3://b/{} -", "~/a,~/b", "choice(1,2",
    ],
)  # fmt: skip
def test_what_is_no_sweep_stays_as_it_is_typed(text):
    assert values(text) == [text]


def test_groups_are_swept_by_name_and_by_glob():
    options = group_options()["attention"]
    assert values("glob(*)", "attention") == options
    assert values("glob(*,exclude=ra*)", "attention") == [name for name in options if not name.startswith("ra")]
    assert values("radial,dense", "attention") == ["radial", "dense"]


def test_the_last_key_changes_fastest():
    runs = expand({"conf": "wan_4x", "lora.rank": "32,64", "optim.lr": "1e-4", "seed": "0,1"})
    assert [(run["lora.rank"], run["seed"]) for run in runs] == [("32", "0"), ("32", "1"), ("64", "0"), ("64", "1")]
    assert all((run["conf"], run["optim.lr"]) == ("wan_4x", "1e-4") for run in runs)


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("seed", "1,2,1", "seed is '1,2,1', which has 1 twice"),
        ("optim.lr", "interval(0,1)", "optim.lr is 'interval(0,1)', which has no end of values"),
        ("lora.rank", "glob(*)", "glob() is for groups: attention, "),
        ("attention", "glob(nix*)", "attention is 'glob(nix*)', which has no values"),
    ],
)
def test_a_sweep_that_makes_no_runs_is_refused(key, text, said):
    with pytest.raises(Mistake) as error:
        expand({key: text})
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-m", "seed=0,x"], "seed is 'x', expected a whole number"),
        (["--multirun", "conf=shapes_4x,wan_4x"], "conf is 'shapes_4x,wan_4x', expected one of"),
        (["-m", "resume=/nowhere"], "/nowhere has no sweep.json, expected the folder of a sweep"),
        (["-m", "lora.rank=0,4"], "lora.rank is 0, expected at least 1"),
        (["-m", "seed=0,1", "seed=2"], "seed is given twice"),
    ],
)
def test_mistakes_stop_a_sweep_before_its_first_run(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Mistake) as error:
        main(arguments)
    assert said in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_sweep_is_started_once(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Mistake, match="-m was started by torchrun or srun"):
        main(["-m", "seed=0,1"])


def test_cfg_prints_what_would_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["-m", "lora.rank=32,64", "seed=0,1", "--cfg", "job"])
    first, *others = capsys.readouterr().out.removeprefix("---\n").split("\n---\n")
    assert first.startswith("# run 0: lora.rank=32 seed=0\n") and "\n  rank: 32\n" in first and len(others) == 3
    assert others[-1].startswith("# run 3: lora.rank=64 seed=1\n") and "\nseed: 1\n" in others[-1]
    assert not list(tmp_path.iterdir())
