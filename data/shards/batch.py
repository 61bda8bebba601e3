"""What a training step gets: samples of one shape, stacked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from data.errors import DataError
from data.shards.sample import Prompt, Sample, TextTokens


@dataclass(frozen=True, eq=False)
class Batch:
    """The samples of one rank in one step.

    Attributes:
        latent: (B, C, F, H, W), bfloat16 or float32 as stored.
        text: by encoder name, tokens (B, L, D) and mask (B, L); shorter texts are padded by zeros, their mask False.
        pooled: by name, (B, D).
        image: by name, (B, …).
        keys: the samples' keys.
        step: the global step that this batch is for.
    """

    latent: Tensor
    text: dict[str, TextTokens]
    pooled: dict[str, Tensor]
    image: dict[str, Tensor]
    keys: list[str]
    step: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`; dtypes stay."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from where it goes to a GPU fastest."""
        return self._map(lambda tensor: tensor.pin_memory())

    def with_prompt(self, rows: Sequence[int], prompt: Prompt) -> Batch:
        """The same batch with another prompt in these rows: caption dropout puts the empty prompt there.

        Raises:
            DataError: the prompt has other encoders than the batch.
        """
        for kind in ("text", "pooled"):
            found, expected = sorted(getattr(prompt, kind)), sorted(getattr(self, kind))
            if found != expected:
                raise DataError(f"the empty prompt has {kind} {found}, the samples have {expected}; {_HINT}")
        text, pooled = {}, {}
        for name, own in self.text.items():
            other = prompt.text[name]
            length = max(own.tokens.shape[1], len(other.tokens))
            tokens = F.pad(own.tokens, (0, 0, 0, length - own.tokens.shape[1]))
            mask = F.pad(own.mask, (0, length - own.mask.shape[1]))
            text[name] = TextTokens(_with_rows(tokens, rows, other.tokens), _with_rows(mask, rows, other.mask))
        for name, vectors in self.pooled.items():
            pooled[name] = _with_rows(vectors, rows, prompt.pooled[name])
        return dataclasses.replace(self, text=text, pooled=pooled)

    @property
    def nbytes(self) -> int:
        """The bytes of its tensors."""
        text = [tensor for entry in self.text.values() for tensor in (entry.tokens, entry.mask)]
        return sum(tensor.nbytes for tensor in (self.latent, *text, *self.pooled.values(), *self.image.values()))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return dataclasses.replace(
            self,
            latent=change(self.latent),
            text={name: TextTokens(change(text.tokens), change(text.mask)) for name, text in self.text.items()},
            pooled={name: change(tensor) for name, tensor in self.pooled.items()},
            image={name: change(tensor) for name, tensor in self.image.items()},
        )


def collate(samples: Sequence[Sample], step: int) -> Batch:
    """Stack samples into a batch.

    Raises:
        DataError: when they differ in shapes, dtypes or the names of their tensors; names the first that differs.
    """
    first = samples[0]
    for sample in samples:
        for kind in ("text", "pooled", "image"):
            found, expected = sorted(getattr(sample, kind)), sorted(getattr(first, kind))
            if found != expected:
                raise DataError(f"sample {sample.key}: {kind} has {found}, sample {first.key} has {expected}; {_HINT}")
    text = {}
    for name in first.text:
        tokens = [sample.text[name].tokens for sample in samples]
        _check_alike(samples, f"text.{name}", [(t.shape[1:], t.dtype) for t in tokens])
        masks = [sample.text[name].mask for sample in samples]
        text[name] = TextTokens(_pad(tokens), _pad(masks))
    return Batch(
        latent=_stack(samples, "latent", [sample.latent for sample in samples]),
        text=text,
        pooled={n: _stack(samples, f"pooled.{n}", [sample.pooled[n] for sample in samples]) for n in first.pooled},
        image={n: _stack(samples, f"image.{n}", [sample.image[n] for sample in samples]) for n in first.image},
        keys=[sample.key for sample in samples],
        step=step,
    )


_HINT = "samples of one folder have to agree; make the folder anew with one encoder"


def _stack(samples: Sequence[Sample], field: str, tensors: list[Tensor]) -> Tensor:
    _check_alike(samples, field, [(tensor.shape, tensor.dtype) for tensor in tensors])
    # One sample is no copy: it stays where its bytes were read to.
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _with_rows(batch: Tensor, rows: Sequence[int], value: Tensor) -> Tensor:
    """(B, L, …) with `value` (l, …), l at most L and zeros after it, in these rows; or (B, D) with (D,)."""
    batch = batch.clone()
    for row in rows:
        batch[row] = 0
        batch[row, : len(value)] = value.to(batch)
    return batch


def _pad(tensors: list[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else pad_sequence(tensors, batch_first=True)


def _check_alike(samples: Sequence[Sample], field: str, kinds: list[tuple[torch.Size, torch.dtype]]) -> None:
    """Raise a DataError unless all samples have the same shape and dtype in this field."""
    for sample, (shape, dtype) in zip(samples, kinds, strict=True):
        if (shape, dtype) != kinds[0]:
            found, expected = f"{dtype} {tuple(shape)}", f"{kinds[0][1]} {tuple(kinds[0][0])}"
            raise DataError(f"sample {sample.key}: {field} is {found}, sample {samples[0].key} has {expected}; {_HINT}")
