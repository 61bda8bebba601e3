"""Tokenizers: opened, checked for what they must not lose, and distinguished by the ids that they give.

A tokenizer's files are not all of it: transformers 5.0 to 5.21 lose the spaces of byte-level vocabularies that call
themselves LlamaTokenizer, HunyuanVideo's among them, without a word (huggingface/transformers#45488).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from data.errors import DataError

PLAIN = "a red ball rolls over the green grass"
"""A sentence that every tokenizer gives back as it is."""
SENTENCE = "A red ball, 3 dogs & \u201ctwo\u201d caf\u00e9s \u2014 it's 10:30.  \u4e00\u53ea\u7ea2\u8272\u7684\u7403"
"""A sentence whose ids differ between tokenizers: capitals, digits, marks, two spaces, letters of three kinds."""


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder.

    Raises:
        DataError: it is missing or cannot be loaded.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: missing, expected this part of a diffusers model folder")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: cannot be loaded as a tokenizer: {' '.join(str(error).split())}") from error


def ids_of(tokenizers: Sequence[Any]) -> str:
    """Twelve hexadecimal digits, equal where tokenizers give the same ids for `SENTENCE` and for nothing."""
    ids = [[tokenizer(text, verbose=False).input_ids for text in (SENTENCE, "")] for tokenizer in tokenizers]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]


def check_round_trip(tokenizer: Any, folder: Path) -> None:
    """Raise a DataError unless `PLAIN` comes back from its ids with every word and space."""
    found = tokenizer.decode(tokenizer(PLAIN).input_ids, skip_special_tokens=True).strip()
    if found != PLAIN:
        raise DataError(
            f"{folder}: of {PLAIN!r} its tokens keep {found!r}; transformers {transformers.__version__} reads it "
            "wrong, or its files are damaged: install transformers 5.22 or later, or download it again"
        )


def check_prefix(tokenizer: Any, folder: Path, prefix: str, expected: int) -> None:
    """Raise a DataError unless a template's text before the caption has as many tokens as are cropped from it."""
    found = len(tokenizer(prefix).input_ids)
    if found != expected:
        raise DataError(
            f"{folder}: the template before the caption has {found} tokens, and {expected} are cropped; "
            f"transformers {transformers.__version__} reads it wrong, or it is another model's: install transformers "
            "5.22 or later, or download it again"
        )
