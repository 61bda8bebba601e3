"""The token grid of a video clip: the only place where pixels become token counts."""

from __future__ import annotations

from dataclasses import dataclass

from radial.errors import RadialError


@dataclass(frozen=True)
class VideoGrid:
    """How the tokens of one sample lie in the sequence that self-attention sees.

    Video tokens come first, frame by frame, each frame in raster order; text tokens (joint-attention families)
    follow. Token ``t`` of the video part is position ``t % tokens_per_frame`` of frame ``t // tokens_per_frame``.

    Args:
        frames: latent frames after the VAE and the temporal patch.
        height: rows of tokens in a frame.
        width: columns of tokens in a frame.
        text_tokens: text tokens after the video, padding included.

    Raises:
        RadialError: a size is not a whole number, or too small.
    """

    frames: int
    height: int
    width: int
    text_tokens: int = 0

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("height", 1), ("width", 1), ("text_tokens", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise RadialError(f"VideoGrid: {name} is {value!r}, expected a whole number of at least {least}")

        if self.tokens >= 2**31:
            raise RadialError(f"VideoGrid: {self.tokens:,} tokens, expected fewer than 2^31")

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width

    @property
    def video_tokens(self) -> int:
        return self.frames * self.tokens_per_frame

    @property
    def tokens(self) -> int:
        """Video and text tokens: the sequence length of self-attention."""
        return self.video_tokens + self.text_tokens

    @classmethod
    def from_latent(
        cls, frames: int, height: int, width: int, *, patch: tuple[int, int, int], text_tokens: int = 0
    ) -> VideoGrid:
        """Grid of a latent of ``frames`` x ``height`` x ``width`` cells under a patchifier of (t, h, w) cells.

        Raises:
            RadialError: a side is not a multiple of its patch.
        """
        sides = dict(zip(("frames", "height", "width"), (frames, height, width), strict=True))
        for (name, side), step in zip(sides.items(), patch, strict=True):
            if side < step or side % step:
                raise RadialError(f"latent {name} is {side}, expected a multiple of the patch size {step}")
        return cls(frames // patch[0], height // patch[1], width // patch[2], text_tokens)

    @classmethod
    def from_pixels(
        cls,
        frames: int,
        height: int,
        width: int,
        *,
        vae: tuple[int, int, int] = (4, 8, 8),
        patch: tuple[int, int, int] = (1, 2, 2),
        text_tokens: int = 0,
    ) -> VideoGrid:
        """Grid of a clip of ``frames`` x ``height`` x ``width`` pixels.

        Args:
            vae: compression of the VAE in (t, h, w); the first frame is a latent frame of its own, so that
                ``frames`` must be ``vae[0] * k + 1`` (causal video VAEs: Wan, HunyuanVideo, Mochi).
            patch: patch size of the transformer in latent cells, (t, h, w).
            text_tokens: text tokens after the video.

        Raises:
            RadialError: a size that the VAE or the patchifier cannot have, with the nearest sizes that they can.
        """
        step = vae[0]
        if frames < 1 or (frames - 1) % step:
            low = max(frames - 1, 0) // step * step + 1
            raise RadialError(
                f"frames is {frames}, expected {step} x k + 1 (the VAE compresses time by {step}): "
                f"use {low} or {low + step}"
            )
        for name, side, cell in (("height", height, vae[1] * patch[1]), ("width", width, vae[2] * patch[2])):
            if side < cell or side % cell:
                low = max(side // cell, 1) * cell
                raise RadialError(
                    f"{name} is {side}, expected a multiple of {cell} (VAE x patch): use {low} or {low + cell}"
                )
        return cls.from_latent(
            (frames - 1) // step + 1, height // vae[1], width // vae[2], patch=patch, text_tokens=text_tokens
        )
