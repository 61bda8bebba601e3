"""What the manuals and the maps name is there: files, links, commands, runs; and README stays short."""

import ast
import math
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from train.config.compose import compose_run, finish
from train.planning import GIB, GPUS, Budget, Machine, best, fewest
from train.step.clip_recipe import clip_recipe

ROOT = Path(__file__).resolve().parent.parent
LONGEST_README, LONGEST_LINE = 220, 120
PACKAGES = ("radial", "data", "train", "launch", "conf", "tests")
MANUALS = [ROOT / "CONTRIBUTING.md", ROOT / "README.md"]
MANUALS += sorted(manual for package in PACKAGES for manual in (ROOT / package).rglob("README.md"))
PATH = re.compile(rf"`((?:{'|'.join(PACKAGES)})/[\w./-]+)(?:::\w+)?`")
LINK = re.compile(r"(?:\]\(|src=\")(?!https?://|#)([^)\"#]+)")
COMMAND = re.compile(rf"-m ((?:{'|'.join(PACKAGES)})(?:\.\w+)*)")
RUN = re.compile(r"\bconf=(\w[\w.]*\w)")


def text_of(manual: Path) -> str:
    return manual.read_text(encoding="utf-8")


def test_readme_is_short():
    lines = text_of(ROOT / "README.md").splitlines()
    assert len(lines) <= LONGEST_README
    assert not [line for line in lines if len(line) > LONGEST_LINE]


@pytest.mark.parametrize("manual", MANUALS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_manual_names_is_there(manual):
    text = text_of(manual)
    paths = {name for name in PATH.findall(text) if "<" not in name}
    assert not [name for name in paths if not (ROOT / name).exists()]
    assert not [name for name in LINK.findall(text) if not (manual.parent / name).exists()]
    assert not [name for name in COMMAND.findall(text) if find_spec(name) is None]
    assert not [name for name in RUN.findall(text) if not (ROOT / "conf" / f"{name}.yaml").is_file()]


@pytest.mark.parametrize("package", ["train", "data"])
def test_a_map_names_every_folder(package):
    folder = ROOT / package
    lines = (ast.get_docstring(ast.parse(text_of(folder / "__init__.py"))) or "").splitlines()
    named = {line.split()[0] for line in lines if line.startswith("    ")}
    assert len([name for name in named if name.endswith(".py")]) == 5
    assert not [name for name in named if not (folder / name).exists()]
    folders = {f"{path.name}/" for path in folder.iterdir() if (path / "__init__.py").is_file()}
    assert {name for name in named if name.endswith("/")} == folders


OWN = {"_replace", "_exit", "_group"}
"""Of named tuples, of os, and of this project's own classes."""


def is_private(name: str) -> bool:
    return name == "__class__" or (name.startswith("_") and not name.startswith("__"))


def uses_privates(file: Path) -> bool:
    """Whether a file reads or changes what another library calls private, or imports from there."""
    for node in ast.walk(ast.parse(text_of(file))):
        if isinstance(node, ast.ImportFrom) and any(map(is_private, (node.module or "").split("."))):
            return True
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in OWN:
            of_another = not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
            if of_another and (node.attr != "__class__" or isinstance(node.ctx, ast.Store)):
                return True
    return False


def test_contributing_lists_every_private_name_of_other_libraries():
    table = text_of(ROOT / "CONTRIBUTING.md").partition("## What the code relies on")[2]
    files = {
        str(file.relative_to(ROOT))
        for package in ("radial", "data", "train", "launch")
        for file in (ROOT / package).rglob("*.py")
        if uses_privates(file)
    }
    assert len(files) > 10
    assert not [name for name in sorted(files) if f"`{name}`" not in table]


CARDS = (("rtx4090", 1), ("rtx5090", 1), ("h100", 1), ("h200", 1), ("h100", 8), ("h200", 8))
PLANNED = [line.strip("| ").split(" | ") for line in text_of(ROOT / "README.md").splitlines() if "_2x` | " in line]
PLANNED += [line.strip("| ").split(" | ") for line in text_of(ROOT / "README.md").splitlines() if "_4x` | " in line]


def test_readme_plans_every_run():
    runs = {path.stem for path in (ROOT / "conf").glob("*.yaml") if not path.stem.startswith(("shapes", "study"))}
    assert {row[0].strip("`") for row in PLANNED} == runs


@pytest.mark.parametrize("row", PLANNED, ids=lambda row: row[0].strip("`"))
def test_a_run_files_hours_are_those_of_the_readme(row):
    """On one H200 and on eight, each to the digits that it prints."""
    comment = text_of(ROOT / "conf" / f"{row[0].strip('`')}.yaml").splitlines()[1]
    table = {"one": row[4], "8": row[6]}
    found = {cards: hours for hours, cards in re.findall(r"([\d.]+) (?:hours )?on (one|8)\b", comment)}
    assert set(found) == {cards for cards, cell in table.items() if not cell.startswith("no")}, comment
    for cards, hours in found.items():
        digits = min(len(text.partition(".")[2]) for text in (hours, table[cards].split()[2]))
        assert round(float(hours), digits) == round(float(table[cards].split()[2]), digits), (comment, table[cards])


RECIPES = {
    "Wan2.1-14B": "wan_4x", "Wan2.1-14B image-to-video": "wan_i2v_2x", "Wan2.1-1.3B": "wan_1.3b_4x",
    "Wan2.2-A14B text-to-video": "wan22_2x", "Wan2.2-A14B image-to-video": "wan22_i2v_2x",
    "Wan2.2-TI2V-5B": "wan22_5b_4x", "HunyuanVideo": "hunyuan_4x", "HunyuanVideo-1.5": "hunyuan15_4x",
    "MiniMax-H3": "minimax_h3_4x", "Mochi-1": "mochi_4x",
}  # fmt: skip


@pytest.mark.parametrize("family", RECIPES)
def test_the_manuals_recipe_is_the_runs(family):
    """Rule, dense layers and steps, their noise level and the shift that it follows from."""
    lines = text_of(ROOT / "train" / "README.md").splitlines()
    (line,) = [line for line in lines if line.startswith(f"| {family} | `")]
    config = finish(compose_run({"conf": RECIPES[family]}))
    attention, level = config.attention, clip_recipe(config).attention.dense_sigma
    shift = "its own levels" if config.model.family == "mochi" else f"shift {config.shift():g}"
    steps = f"{attention.dense_steps} of {config.model.steps}, {level:.4f} ({shift})"
    assert f"| {family} | `{config.rule()}` | {attention.dense_layers} of " in line and f"| {steps} |" in line


def test_the_manual_says_how_two_experts_share_the_steps():
    shares = []
    for run in ("wan22_2x", "wan22_i2v_2x"):
        config = finish(compose_run({"conf": run}))
        shares.append(config.trainer.steps * clip_recipe(config).schedule.share_above(config.model.boundary))
    wanted = f"share {config.trainer.steps:,} steps between both; the one of high noise levels gets "
    text = " ".join(text_of(ROOT / "train" / "README.md").split())
    assert wanted + " and ".join(f"{share:,.0f}" for share in shares) in text


@pytest.mark.slow
@pytest.mark.parametrize("row", PLANNED, ids=lambda row: row[0].strip("`"))
def test_readmes_plans_are_the_planners(row):
    """Seconds a step and hours of each run on each card, to the digits that are printed."""
    config = finish(compose_run({"conf": row[0].strip("`")}))
    clips = float(config.optim.global_batch or 1)
    for (name, count), cell in zip(CARDS, row[1:], strict=True):
        budget = Budget.of(config, Machine(GPUS[name], count, 1, count * 128 * GIB))
        assert budget is not None
        setting = best(budget, clips)
        if cell.startswith("no"):
            more = fewest(budget, clips, 64, count)
            assert setting is None and more is not None
            assert cell == f"no ({more.budget.machine.world})"
            continue
        assert setting is not None
        for found, printed in zip((setting.duration.step, setting.duration.hours), cell.split(", "), strict=True):
            number = printed.split()[0]
            assert math.isclose(found or 0.0, float(number), abs_tol=0.6 * 10 ** -len(number.partition(".")[2]))
