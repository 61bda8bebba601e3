"""The token grid of a video clip: the only place where pixels become token counts."""

from __future__ import annotations

from dataclasses import dataclass

from radial.errors import RadialError


@dataclass(frozen=True)
class LatentTime:
    """How a video VAE compresses time: the lengths that clips may have, and their latent frames.

    Attributes:
        stride: frames of the video in a latent frame. A clip's first frame is a latent frame of its own (causal VAEs:
            Wan, HunyuanVideo, Mochi), so that stride x k + 1 frames are k + 1 latent frames.
        chunks: of a VAE that encodes a clip in chunks (MiniMax-H3): the frames of each, and those of the last, which is
            shorter. The first frame of each chunk is a latent frame of its own. None: the whole clip is one.
    """

    stride: int
    chunks: tuple[int, int] | None = None

    @property
    def step(self) -> int:
        """Clips have ``step x k + rest`` frames."""
        return self.stride if self.chunks is None else self.chunks[0]

    @property
    def rest(self) -> int:
        """Frames of the shortest clip."""
        return 1 if self.chunks is None else self.chunks[1]

    def latents(self, frames: int) -> int:
        """Latent frames of a clip."""
        whole, rest = (0, frames) if self.chunks is None else divmod(frames, self.chunks[0])
        return whole * self._of_chunk + (self._alone(rest) if rest else 0)

    def frames(self, latents: int) -> int:
        """Frames of the video that so many latent frames stand for: the inverse of `latents`."""
        whole, rest = (0, latents) if self.chunks is None else divmod(latents, self._of_chunk)
        return whole * self.step + ((rest - 1) * self.stride + 1 if rest else 0)

    def check(self, frames: int) -> None:
        """Raises a RadialError unless a clip may have so many frames, with the nearest lengths."""
        over = frames - self.rest
        if over < 0 or over % self.step:
            low = max(over, 0) // self.step * self.step + self.rest
            by = f"compresses time by {self.stride}" if self.chunks is None else f"encodes {self.step} at a time"
            raise RadialError(
                f"frames is {frames}, expected {self.step} x k + {self.rest} (the VAE {by}): "
                f"use {low} or {low + self.step}"
            )

    @property
    def _of_chunk(self) -> int:
        return self._alone(self.step)

    def _alone(self, frames: int) -> int:
        return (frames - 1) // self.stride + 1


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
        chunks: tuple[int, int] | None = None,
    ) -> VideoGrid:
        """Grid of a clip of ``frames`` x ``height`` x ``width`` pixels.

        Args:
            vae: compression of the VAE in (t, h, w).
            patch: patch size of the transformer in latent cells, (t, h, w).
            text_tokens: text tokens after the video.
            chunks: which lengths clips may have, as in `LatentTime`.

        Raises:
            RadialError: a size that the VAE or the patchifier cannot have, with the nearest sizes that they can.
        """
        time = LatentTime(vae[0], chunks)
        time.check(frames)
        for name, side, cell in (("height", height, vae[1] * patch[1]), ("width", width, vae[2] * patch[2])):
            if side < cell or side % cell:
                low = max(side // cell, 1) * cell
                raise RadialError(
                    f"{name} is {side}, expected a multiple of {cell} (VAE x patch): use {low} or {low + cell}"
                )
        return cls.from_latent(
            time.latents(frames), height // vae[1], width // vae[2], patch=patch, text_tokens=text_tokens
        )
