"""``lora.init``: the LoRA that training starts from, one file, or one for each of two experts.

`train/README.md` lists the tools whose files are read.
"""

from __future__ import annotations

from pathlib import Path

from train.config.schema import ModelConfig
from train.errors import UserError
from train.lora.file_checks import base_notes, check_file
from train.lora.file_lists import split_files
from train.lora.reading import Lora, read_lora
from train.models.base import ModelAdapter

_KEY = "lora.init"


def initial_files(init: str, model: ModelConfig) -> list[tuple[Path, str | None]]:
    """Each file with the expert that it is for; None: the model has one transformer.

    Raises:
        UserError: not as many files as the run trains transformers.
    """
    names = split_files(init)
    if not all(names):  # which Path takes for the current folder
        raise UserError(
            f"{_KEY} is {init!r}, expected a file on each side of a comma; is a variable of the shell not set?"
        )
    files = [Path(name).expanduser() for name in names]
    experts = ["high", "low"] if model.expert == "both" else [model.expert]
    if len(files) != len(experts):
        wanted = "one file, or a folder with one"
        if len(experts) == 2:
            wanted = "a file for each expert: high.safetensors,low.safetensors"
        raise UserError(f"{_KEY} is {init}, expected {wanted}")
    return list(zip(files, experts, strict=True))


def check_initial(init: str, model: ModelConfig) -> None:
    """Holds the files' headers against the model, before anything is loaded.

    Raises:
        UserError: a file is missing, or of another family or expert.
    """
    for file, expert in initial_files(init, model):
        check_file(file, model, _KEY, expert)


def read_initial(init: str, model: ModelConfig, adapter: ModelAdapter) -> Lora:
    """The LoRA of ``lora.init`` by the names of the adapter's transformer.

    Raises:
        UserError: a file that does not fit the model.
    """
    files, start = initial_files(init, model), Lora({})
    prefixes = [f"{name}." for name, _ in adapter.transformer.named_children()] if len(files) == 2 else [""]
    for (file, _), prefix, transformer in zip(files, prefixes, adapter.transformers, strict=True):
        lora = read_lora(file, transformer)
        start.pairs.update({f"{prefix}{layer}": pair for layer, pair in lora.pairs.items()})
        start.differences.update({f"{prefix}{parameter}": change for parameter, change in lora.differences.items()})
        start.notes += [f"{file}: {note}" for note in (*lora.notes, *base_notes(file, model))]
    return start
