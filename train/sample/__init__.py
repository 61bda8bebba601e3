"""Generating videos with diffusers' own pipelines and radial attention: `extend`, and ``python -m train.sample``.

`settings` is what a user may set, `pipeline` loads the model and its LoRAs, `extension` puts both on a pipeline,
`noise_levels` settles the shift and the level from which steps are dense, `denoise` gives each step its attention,
`ranks` splits the work over GPUs, `video` writes and compares, `generate` does all of it, and `records` keeps what is
done. Latents become frames in `data.encoders.decoding`.
"""

from typing import TYPE_CHECKING, Any

__all__ = ["extend", "unextend"]

if TYPE_CHECKING:
    from train.sample.extension import extend, unextend


def __getattr__(name: str) -> Any:
    """`extend` and `unextend` load diffusers' pipelines, which takes seconds: only when they are asked for."""
    if name in __all__:
        from train.sample import extension

        return getattr(extension, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
