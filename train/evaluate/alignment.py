"""How well a clip's frames fit its prompt, by a CLIP (Radford et al. 2021, arXiv 2103.00020) that lies on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from train.errors import UserError


class TextAlignment:
    """A CLIP of transformers; nothing is downloaded.

    Args:
        folder: with its model, tokenizer and image processor.

    Raises:
        UserError: it is not there, or is no CLIP.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer  # takes seconds

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if not (folder / "config.json").is_file():
            raise UserError(f"clip {folder} has no config.json, expected the folder of a CLIP of transformers")
        try:
            loaded: Any = CLIPModel.from_pretrained(folder, local_files_only=True)
            self._words: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            self._pictures: Any = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"clip {folder} cannot be loaded: {' '.join(str(error).split())}") from error
        self._model = loaded.to(self.device).eval()

    @torch.no_grad()
    def score(self, frames: np.ndarray, prompt: str) -> float:
        """The mean cosine similarity of frames, (n, H, W, 3) uint8, and a prompt, which is cut to what CLIP takes."""
        longest = self._model.config.text_config.max_position_embeddings
        words = self._words(prompt, truncation=True, max_length=longest, return_tensors="pt").to(self.device)
        pictures = self._pictures([Image.fromarray(frame) for frame in frames], return_tensors="pt")
        found = self._model(
            input_ids=words["input_ids"],
            attention_mask=words["attention_mask"],
            pixel_values=pictures["pixel_values"].to(self.device),
        )
        return F.cosine_similarity(found.image_embeds, found.text_embeds).mean().item()
