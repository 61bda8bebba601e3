"""Each key of a run stands in one place: its meaning, its bounds, whether a resume may change it, and its --help."""

import re

import pytest

from radial.cli.settings import check_value, default_of
from radial.errors import Mistake
from train.__main__ import main
from train.config.changes import change_config
from train.config.compose import compose_run, finish, group_options, run_names
from train.config.help import ALONE, SECTIONS, topic
from train.config.schema import KEYS


@pytest.mark.parametrize("name", sorted(KEYS))
def test_every_key_has_a_meaning_that_help_prints(name):
    about = KEYS[name].field.metadata["about"]
    assert len(about.split()) >= 3 and not about.endswith("."), about
    shown = " ".join(" ".join(topic(name)).split())
    assert shown.startswith(f"{name} ") and about in shown
    default = default_of(KEYS[name].field)
    assert default is None or default in ([], {}, "???") or re.search(r"default \S", shown), shown
    section = name.partition(".")[0]
    if section != name:
        assert about in " ".join(" ".join(topic(section)).split())


@pytest.mark.parametrize("name", [name for name in sorted(KEYS) if default_of(KEYS[name].field) not in (None, "???")])
def test_every_default_is_within_its_own_bounds(name):
    check_value(name, KEYS[name].field, default_of(KEYS[name].field))


def test_the_overview_lists_runs_groups_sections_and_how_to_see_their_keys(capsys):
    main.run(["--help"])
    shown = capsys.readouterr().out
    assert "--help SECTION" in shown and "conf=wan_4x" in shown
    for word in (*run_names(), *group_options(), *SECTIONS, *ALONE):
        assert re.search(rf"^  {re.escape(word)} ", shown, re.M), word
    assert all(about and about[0].isupper() and about.endswith(".") for about in SECTIONS.values())


def test_help_of_a_section_a_key_a_group_and_a_word_that_is_none(capsys):
    main.run(["--help", "optim"])
    shown = capsys.readouterr().out
    assert shown.startswith("optim: AdamW") and "optim.warmup" in shown and "optimizer steps" in shown
    assert re.search(r"optim.decay .*one of constant, cosine; default constant", shown)
    main.run(["--help", "optim.lr", "rope"])
    shown = capsys.readouterr().out
    assert "optim.warmup" not in shown and "a positive number; default 0.0001" in shown
    assert "riflex" in shown and "interpolate" in shown
    with pytest.raises(SystemExit) as stop:
        main.run(["--help", "optim.lrr"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("did you mean optim.lr?\n")


def test_what_a_resume_may_change():
    """The layout, the pace of checkpoints, what is logged and shown: nothing that the weights follow from."""
    free = {name for name, key in KEYS.items() if key.resume}
    in_sections = {name for name in KEYS if name.startswith(("parallel.", "log.", "validation.", "report.", "export."))}
    trainer = {"nodes", "devices", "checkpoint_every", "checkpoint_minutes", "keep", "compile", "check_memory",
               "timeout", "max_skipped"}  # fmt: skip
    rest = {"data.batch_size", "data.workers", "data.cache", "data.max_bad", "optim.accumulate", "optim.global_batch",
            "runs"}  # fmt: skip
    assert free == in_sections | {f"trainer.{name}" for name in trainer} | rest
    config = finish(compose_run({}))
    assert change_config(config, {"log.every": "7"}).log.every == 7
    with pytest.raises(Mistake, match="seed was 0, now 1: this changes what the run computes"):
        change_config(config, {"seed": "1"})
