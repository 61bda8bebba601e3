"""Files of LoRAs against the model that they are for: which expert each belongs to, whether it fits, its masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config.schema import ModelConfig
from train.errors import UserError
from train.lora.file_lists import files_with_strengths
from train.lora.header import read_values, typed
from train.lora.masks import check_masks, masks_beside

NONE = "none"
"""What stands for no LoRA where one has to be given."""
_PARTS = ("high_noise", "low_noise")  # of an export folder of two experts


@dataclass(frozen=True)
class Slot:
    """The LoRAs of one transformer.

    Attributes:
        key: of the settings: lora or lora_2.
        expert: high or low; None: the model has one transformer.
        lora: the value of ``key``.
        add: that of add or add_2.
    """

    key: str
    expert: str | None
    lora: str | None
    add: str | None

    def files(self) -> list[tuple[Path, float]]:
        """Files or folders, with strengths."""
        texts = ((self.key, self.lora), (self.key.replace("lora", "add"), self.add))
        return [found for key, text in texts if text for found in files_with_strengths(key, text)]


def of_experts(lora: str | None, lora_2: str | None) -> tuple[str | None, str | None]:
    """The LoRA of each of two experts; ``lora`` alone may be an export's folder that has both.

    Raises:
        UserError: one of them is not given: an untuned expert would go unnoticed.
    """
    if lora is not None and lora_2 is None:
        (path, strength), *others = files_with_strengths("lora", lora)
        if not others and all((path / part).is_dir() for part in _PARTS):
            return f"{path / _PARTS[0]}:{strength}", f"{path / _PARTS[1]}:{strength}"
    if (lora is None) != (lora_2 is None):
        missing, given = ("lora", "lora_2") if lora is None else ("lora_2", "lora")
        raise UserError(
            f"{given} is set and {missing} is not, the model has two experts: give {missing}=FILE, {missing}={NONE} "
            "for none, or lora=<export folder> with high_noise and low_noise"
        )
    return (None if lora == NONE else lora), (None if lora_2 == NONE else lora_2)


def check(slots: Sequence[Slot], model: ModelConfig) -> None:
    """Holds each header against the model and the transformer that the file is given for.

    Raises:
        UserError: a file of another family or expert, or one that is not there.
    """
    for slot in slots:
        for path, _ in slot.files():
            check_file(path, model, slot.key, slot.expert)


def check_file(path: Path, model: ModelConfig, key: str, expert: str | None) -> None:
    """Holds the header of a file that is given by ``key`` against a model, or against its ``expert``.

    Raises:
        UserError: it is of another family or expert, or not there.
    """
    header = read_values(path)
    family, of = header.get("family", model.family), header.get("expert", "None")
    trained = f"{path} was trained on {header.get('base_model', 'another model')}"
    if family != model.family:
        raise UserError(
            f"{trained}, of the family {family}; the model is of {model.family}: choose the model=... that fits"
        )
    if of not in ("None", str(expert)):
        place = f"{key} is the {expert} one's" if expert else "the model has one transformer"
        raise UserError(f"{trained}, its expert for {of} noise levels; {place}: give it where it belongs")


def notes(slots: Sequence[Slot], model: ModelConfig) -> list[str]:
    """A line for each file whose base model has another name than the one in use: a copy, or another model."""
    return [f"warning: {path} {note}" for slot in slots for path, _ in slot.files() for note in base_notes(path, model)]


def base_notes(path: Path, model: ModelConfig) -> list[str]:
    """What to know of a file whose header names another base model than the one in use."""
    from train.models.pretrained import public_name  # takes seconds to import

    base = read_values(path).get("base_model")
    mine = public_name(model) if base is not None and model.path is not None else base
    if base is None or mine is None or base.split("/")[-1].lower() == mine.split("/")[-1].lower():
        return []
    return [f"was trained on {base}, model.path is {mine}: are they the same model?"]


def header_settings(slots: Sequence[Slot], names: Sequence[str], model: ModelConfig) -> dict[str, Any]:
    """Settings by the header of the first LoRA, or of a merged model's weights: those of ``names`` that it has.

    Raises:
        UserError: a value in it is of another kind.
    """
    file = header_file(slots, model)
    if file is None:
        return {}
    header = read_values(file)
    return {name: typed(header[name], name, file) for name in names if name in header}


def check_alike(slots: Sequence[Slot], names: Sequence[str]) -> None:
    """Holds the header of the second expert's LoRA to that of the first, whose settings a clip has for both.

    Args:
        names: of the settings that have to be the same.

    Raises:
        UserError: one is not.
    """
    files = [slot.files()[0][0] for slot in slots if slot.lora]
    if len(files) < 2:
        return
    first, second = (read_values(file) for file in files)
    for name in names:
        if name in first and name in second:
            one, other = (typed(header[name], name, file) for header, file in zip((first, second), files, strict=True))
            if one != other:
                raise UserError(
                    f"{files[0]} was trained with {name} {one}, {files[1]} with {other}, and a clip has one for both "
                    f"experts: give {name}=... yourself"
                )


def header_file(slots: Sequence[Slot], model: ModelConfig) -> Path | None:
    """The file whose header tells how the weights were trained: the first LoRA, or a merged model's first file."""
    files = [slot.files()[0][0] for slot in slots if slot.lora] or _weights(model)
    return files[0] if files else None


def masks_of(slots: Sequence[Slot], model: ModelConfig, given: Path | None) -> Path | None:
    """The file of masks that differ by head: ``given``, or what lies beside the LoRA or in the merged model's folder.

    Raises:
        UserError: it is missing, or another one than the LoRA was trained under.
    """
    from train.lora.reading import find_file  # takes seconds to import

    file = header_file(slots, model)
    if file is None:
        return given
    beside = masks_beside(
        find_file(file)[0] if any(slot.lora for slot in slots) else Path(str(model.path)).expanduser()
    )
    masks = given or beside
    for trained in [slot.files()[0][0] for slot in slots if slot.lora] or [file]:
        check_masks(masks, trained)
    return masks if masks.is_file() else given


def _weights(model: ModelConfig) -> list[Path]:
    """The transformer's files, where the model is a local folder."""
    return sorted(Path(model.path or "").expanduser().glob("transformer/*.safetensors")) if model.path else []
