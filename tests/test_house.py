"""The rules of the house that a machine can hold."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {"radial": set(), "data": {"radial"}, "train": {"radial", "data"}, "launch": {"radial", "data", "train"}}
OURS = set(MAY_IMPORT) | {"tests", "conf"}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("package", [p for p in MAY_IMPORT if (ROOT / p).is_dir()])
def test_packages_import_only_what_they_may(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        siblings = imports(file) & OURS - {package}
        assert siblings <= MAY_IMPORT[package], f"{file} imports {siblings}"


ROOMS = {  # each package's, in the order in which they are passed: one imports only from those before it
    "radial": (
        "errors", "whole", "cli", "grid", "bands", "reorder", "patterns", "fit", "layout", "head_layouts", "share",
        "backends", "scaled_scores", "attention", "serving", "comfyui", "draw", "sampled_errors", "known_decays",
        "bench", "bench_layouts", "__main__",
    ),
    "data": (
        "errors", "colour", "animation", "io", "shards", "text", "encoders", "synth", "sheet", "scan", "index",
        "prepare", "caption", "recaption", "rebuild", "check", "bench",
    ),
    "train": (
        "errors", "config", "attention", "flow", "models", "parallel", "lora", "memory", "step", "planning", "storage",
        "loggers", "shards", "preflight", "measures", "export", "sample", "report", "decay", "callbacks", "evaluate",
        "bench", "assemble", "run", "sweep", "study", "__main__",
    ),
}  # fmt: skip


def modules_of(package: str) -> dict[str, Path]:
    found = {}
    for file in (ROOT / package).rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = file
    return found


def names_from(file: Path) -> list[tuple[str, str]]:
    """(module, name) of every ``from module import name`` that runs: not those for type checkers alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    left_out = {inner for node in typing for inner in ast.walk(node)}
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node not in left_out]
    return [(node.module or "", alias.name) for node in nodes for alias in node.names]


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_downwards_only(package):
    modules, rooms = modules_of(package), ROOMS[package]
    assert {name.split(".")[1] for name in modules if "." in name} == set(rooms)
    for name, file in modules.items():
        for module, thing in names_from(file):
            target = f"{module}.{thing}" if f"{module}.{thing}" in modules else module
            if "." in name and "." in target and target in modules:
                mine, its = name.split(".")[1], target.split(".")[1]
                assert rooms.index(its) <= rooms.index(mine), f"{file} imports {target}, a room further on"


def test_no_module_and_no_test_uses_anothers_private_names():
    for package in (*MAY_IMPORT, "tests"):
        for file in (ROOT / package).rglob("*.py"):
            for module, thing in names_from(file):
                ours = module.split(".")[0] in MAY_IMPORT
                assert not (ours and thing.startswith("_") and not thing.startswith("__")), f"{file}: {module}.{thing}"


def test_radial_needs_only_torch():
    """Neither importing radial nor its command line loads a third-party package that torch does not load itself."""
    program = "import sys, torch; before = set(sys.modules); import radial.__main__; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True, cwd=ROOT)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert loaded - set(sys.stdlib_module_names) <= {"radial", "torch"}


def test_training_imports_no_video_library():
    """Nodes that only train need no FFmpeg, and no client of a service that the run does not use."""
    program = "import sys; sys.modules.update(dict.fromkeys(['av', 'wandb', 'deepspeed'])); import train.run"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_everything_public_has_a_docstring():
    for package in MAY_IMPORT:
        for file in (ROOT / package).rglob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            assert ast.get_docstring(tree), f"{file} has no docstring"
            for node in tree.body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith(("_", "main")):
                    assert ast.get_docstring(node), f"{file}: {node.name} has no docstring"


def test_nothing_unpickles():
    """Files of strangers are read as safetensors, JSON, YAML and tar: no pickle, no torch.load of arbitrary objects."""
    for package in MAY_IMPORT:
        for file in (ROOT / package).rglob("*.py"):
            assert not imports(file) & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, file
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "numpy.load", "np.load"):
                    safe = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    assert safe.get("weights_only") == "True" or safe.get("allow_pickle") == "False", file
                assert not (isinstance(node, ast.Attribute) and node.attr in ("extractall", "unsafe_load")), file


READERS = [  # what reads users' files and settings, and what writes files for other tools
    "radial/cli", "radial/comfyui", "data/io", "data/shards", "train/config", "train/export", "train/sample",
    "train/storage", "train/lora/reading.py", "train/lora/scaling.py", "train/lora/keys.py", "train/lora/names.py",
    "train/lora/initial.py", "train/lora/file_checks.py", "train/lora/file_lists.py", "train/lora/masks.py", "launch",
]  # fmt: skip


@pytest.mark.parametrize("place", READERS)
def test_what_a_user_may_get_wrong_is_no_assertion(place):
    """python -O drops assertions: there they tell the type checker what is known, and check nothing."""
    files = [ROOT / place] if place.endswith(".py") else list((ROOT / place).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.Assert) or _narrows(node.test), f"{file}:{node.lineno}"


def _narrows(test: ast.expr) -> bool:
    """Whether an assertion says no more than that something is there, or of a type."""
    if isinstance(test, ast.BoolOp):
        return all(map(_narrows, test.values))
    if isinstance(test, ast.Compare):
        return all(isinstance(sign, ast.Is | ast.IsNot) for sign in test.ops)
    is_instance = isinstance(test, ast.Call) and ast.unparse(test.func) == "isinstance"
    return is_instance or isinstance(test, ast.Name | ast.Attribute)


def test_text_is_utf8_whatever_the_locale():
    """Ruff's PLW1514 sees paths whose type it can tell; this sees the other paths, and the output of programs."""
    for package in (*MAY_IMPORT, "tests"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and "encoding" not in {word.arg for word in node.keywords}:
                    assert not _is_text(node), f"{file}:{node.lineno}: {ast.unparse(node)} has no encoding="


def _is_text(call: ast.Call) -> bool:
    function = ast.unparse(call.func)
    name = function.rpartition(".")[2]
    if function.startswith("subprocess.") and any(word.arg == "text" for word in call.keywords):
        return True
    if name == "open" and not function.startswith(("fsspec.", "tarfile.", "os.")):
        modes = [*call.args, *(word.value for word in call.keywords if word.arg == "mode")]
        return not modes or (isinstance(modes[0], ast.Constant) and "b" not in str(modes[0].value))
    return name in ("read_text", "write_text", "FileHandler", "TextIOWrapper")
