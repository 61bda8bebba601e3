"""The file of masks that are fitted to a model's heads: a rule for each head, so that it serves any length.

A rule is a bit for each (temporal distance, query tile, key tile): whether blocks of such a pair are kept. Keys in the
first frame, where models put attention that has nowhere to go, have bits of their own, whatever their distance. With F
frames of A tiles in the clips that it was fitted to:

    bit (distance + F - 1, query tile, key tile)    distance = key frame - query frame, from 1 - F to F - 1
    bit (2 F - 1, query tile, key tile)             the key frame is the first

``<name>.safetensors`` holds ``bits`` (layers, heads, ceil(2 F A^2 / 8)) uint8, eight bits a byte, the lowest first: 27
MB for 40 layers of 40 heads at 81 frames of 29 tiles. What else belongs to it is JSON in the file's metadata.

The order of a frame's tokens is part of the file (`radial.patterns.token_orders`): a tile is as many tokens, one after
another in that order, as a block has; the last of a frame is smaller.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from radial.errors import RadialError
from radial.grid import VideoGrid
from radial.patterns.token_orders import ORDERS
from radial.whole import written

_KEY = "radial.masks"


@dataclass(frozen=True)
class About:
    """What belongs to the rules.

    Attributes:
        order: of a frame's tokens, one of `ORDERS`.
        block: side of a block, in tokens.
        frames, height, width: tokens of the clips that the masks are fitted to.
        layers: numbers of the layers that have masks.
        share: of all blocks of such a clip that is kept, the mean over layers and heads.
        coverage: of those, the part that is drawn and not fitted.
        rate: at which pairs that no rule keeps are drawn.
        seed: of the draw.
        separable: whether they are fitted to masses that fall off exponentially (`radial.fit.nearest_separable`), and
            not to the measured ones.
        not_separable: (layer, head) of those that are fitted to their measured masses all the same: no such ones are
            near.
        rows: query blocks, one after another, that draw the same key blocks; 1 in older files.
    """

    order: str
    block: int
    frames: int
    height: int
    width: int
    layers: tuple[int, ...]
    share: float
    coverage: float
    rate: float
    seed: int
    separable: bool = False
    not_separable: tuple[tuple[int, int], ...] = ()
    rows: int = 1

    @property
    def tiles(self) -> int:
        """Tiles of a frame."""
        return -(-self.height * self.width // self.block)

    @property
    def entries(self) -> int:
        """Bits of a rule."""
        return 2 * self.frames * self.tiles**2

    def check_grid(self, grid: VideoGrid, block: int) -> None:
        """Raises where the rules have nothing for a clip.

        Raises:
            RadialError: frames or blocks of another size.
        """
        if (grid.height, grid.width) != (self.height, self.width):
            raise RadialError(
                f"masks are fitted to frames of {self.height} x {self.width} tokens, the clip's have "
                f"{grid.height} x {grid.width}: fit masks at its size (python -m train.decay, python -m radial fit)"
            )
        if block != self.block:
            raise RadialError(
                f"masks are fitted to blocks of {self.block} tokens, block is {block}: set it to {self.block}"
            )


@dataclass(frozen=True, eq=False)
class HeadMasks:
    """The rules of a model's heads. Two are equal when their files are.

    Attributes:
        bits: (layers, heads, bytes) uint8.
        about: what belongs to them.
        digest: SHA-256 of the file, in hexadecimal digits.
    """

    bits: Tensor
    about: About
    digest: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadMasks) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"HeadMasks({self.digest[:16]})"

    @property
    def heads(self) -> int:
        """Heads of a layer."""
        return self.bits.shape[1]

    @classmethod
    def read(cls, path: str | Path) -> HeadMasks:
        """Reads a file that `write` made.

        Raises:
            RadialError: it is missing, or none.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path).expanduser()
        made = "expected a file of python -m radial fit"
        try:
            content = path.read_bytes()
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get(_KEY)
                if text is None:
                    raise RadialError(f"masks {path} holds no masks of heads: {made}")
                about, bits = _about(json.loads(text)), file.get_tensor("bits")
        except OSError as error:
            raise RadialError(f"masks {path} cannot be read ({error.strerror or error}): {made}") from error
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            if isinstance(error, RadialError):
                raise
            raise RadialError(f"masks {path} is damaged ({error}): {made}") from error
        if about.order not in ORDERS:
            raise RadialError(
                f"masks {path} are for tokens in the order {about.order!r}, this version knows {', '.join(ORDERS)}"
            )
        shape = len(about.layers), -(-about.entries // 8)
        if bits.dtype != torch.uint8 or bits.dim() != 3 or bits.shape[::2] != shape:
            raise RadialError(f"masks {path} is damaged (bits of shape {tuple(bits.shape)}): {made}")
        return cls(bits, about, hashlib.sha256(content).hexdigest())

    @cached_property
    def often(self) -> Tensor:
        """(entries,) int32: how many heads, of all layers, have each bit."""
        count = torch.zeros(self.about.entries, dtype=torch.int32)
        for bits in self.bits.flatten(0, 1):
            count += unpacked(bits)[: self.about.entries]
        return count

    def check_model(self, layers: int, heads: int, dense_layers: int) -> None:
        """Raises where the masks are not those of a model whose first ``dense_layers`` of ``layers`` are dense.

        Raises:
            RadialError: it has other layers or heads.
        """
        if self.about.layers[-1] >= layers:
            raise RadialError(
                f"masks are fitted for layers up to {self.about.layers[-1]}, the model's last is {layers - 1}: "
                "fit masks to this model"
            )
        for layer in range(dense_layers, layers):
            self.place_of(layer, heads)

    def place_of(self, layer: int, heads: int) -> int:
        """Where the rules of a layer of so many heads are.

        Raises:
            RadialError: it has none, or they are for another number of heads.
        """
        if heads != self.heads:
            raise RadialError(
                f"masks are for {self.heads} heads in each layer, the model has {heads}: fit masks to this model"
            )
        if layer not in self.about.layers:
            raise RadialError(
                f"masks are fitted for layers {self.about.layers[0]} to {self.about.layers[-1]}, layer {layer} has "
                "none: keep it dense (dense_layers), or fit the masks with another dense_layers"
            )
        return self.about.layers.index(layer)


def write(rules: Tensor, about: About, path: Path) -> None:
    """Writes rules to a file, under a temporary name until it is whole.

    Args:
        rules: (layers, heads, entries) bool.
        about: what belongs to them.
        path: of the file.
    """
    import safetensors.torch

    content = safetensors.torch.save({"bits": packed(rules)}, {_KEY: json.dumps(asdict(about))})
    with written(path) as fresh:
        fresh.write_bytes(content)


def packed(bits: Tensor) -> Tensor:
    """(..., n) bool -> (..., ceil(n / 8)) uint8, the first bit the lowest."""
    groups = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (groups << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpacked(packs: Tensor) -> Tensor:
    """The inverse of `packed`: (..., n) uint8 -> (..., 8 n) uint8 of 0 and 1."""
    return (packs[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)


def _about(given: dict[str, Any]) -> About:
    known = {field.name: field.default for field in fields(About)}
    given = {name: value for name, value in known.items() if value is not MISSING} | given  # older files lack these
    if given.keys() != known.keys():
        raise ValueError(f"its metadata has {', '.join(sorted(given))}")
    others = tuple((layer, head) for layer, head in given["not_separable"])
    return About(**{**given, "layers": tuple(given["layers"]), "not_separable": others})
