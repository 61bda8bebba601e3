"""Make a folder of synthetic clips: `python -m data.synth out=DIR clips=256 frames=64`.

Pixels serve as latents, in bfloat16, and captions are encoded by `TinyTextEncoder` under the name `text`. A finished
folder made with the same arguments is kept as it is, so the command can stand in front of every run.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.encoders.pixels import PixelEncoder
from data.errors import DataError, explained
from data.shards.manifest import FILE, Manifest
from data.shards.sample import Sample
from data.shards.stream import read_samples
from data.shards.writer import ShardWriter
from data.synth import SCENES
from data.synth.scenes import make_clip
from data.synth.worlds import make_world
from data.text import TinyTextEncoder
from radial.cli.command import Command
from radial.cli.settings import setting

FPS = 16.0
VERSIONS = {"sunrise": "synth-v2", "memory": "memory-v1"}
"""Of what makes the clips, by what they show: their manifest has it."""


@dataclass
class Arguments:
    """The keys of the command line."""

    out: Path = setting("folder for the shards")
    clips: int = setting("number of clips", 256)
    frames: int = setting("frames a clip", 64)
    height: int = setting("pixels", 32)
    width: int = setting("pixels", 64)
    seed: int = setting("draws the clips", 0)
    scenes: str = setting(
        "sunrise: shapes, and a sky that turns from night to day once a clip; memory: worlds in which what was seen "
        "has to be remembered, of sides from 48 pixels", "sunrise", SCENES,
    )  # fmt: skip
    per_shard: int = setting("clips a shard", 64)
    workers: int = setting("processes that render; 0: this one alone", 0)
    preview: Path | None = setting("a .gif that shows the first 16 clips", None)


def synthesize(
    out: str | Path,
    clips: int,
    frames: int,
    height: int = 32,
    width: int = 64,
    seed: int = 0,
    per_shard: int = 64,
    workers: int = 0,
    progress: bool = False,
    scenes: str = "sunrise",
) -> Manifest:
    """Make a folder of synthetic clips, or keep the finished one that is there.

    Args:
        out: the folder.
        clips: how many; clip i is the same whatever the number.
        frames, height, width: of each clip, which becomes a latent (3, frames, height, width) bfloat16 in [-1, 1].
        seed: draws the clips.
        per_shard: clips a shard, at most.
        workers: processes that render; 0 renders in this one. The bytes written are the same.
        progress: show a progress bar on stderr.
        scenes: what they show, one of `data.synth.SCENES`.

    Raises:
        DataError: when `out` is finished with other arguments, is a file or holds other files, or an argument is out of
            range; before the clips are rendered.
    """
    arguments = {
        "made_by": f"data.synth {VERSIONS[scenes]}",
        "clips": clips,
        "frames": frames,
        "height": height,
        "width": width,
        "seed": seed,
        "per_shard": per_shard,
    }
    for name, value, least in (("clips", clips, 1), ("per_shard", per_shard, 1), ("workers", workers, 0)):
        if value < least:
            raise DataError(f"{name} is {value}, expected at least {least}")
    if (Path(out) / FILE).exists():
        return _kept(Manifest.load(out), arguments)
    render = functools.partial(_render, scenes, seed, frames, height, width)
    render(0)  # An impossible size is refused before the folder is made.
    if Path(out).is_file():
        raise DataError(f"{out}: is a file, expected a folder; choose another place")
    # A manifest may have come meanwhile, with the folder of a run that makes the same.
    if Path(out).is_dir() and any(Path(out).iterdir()) and not (Path(out) / FILE).exists():
        hint = "choose another place or empty it"
        raise DataError(f"{out}: holds files, but no {FILE}, expected a new folder or an empty one; {hint}")
    # A folder of its own until it is whole, since runs that start together may want the same clips.
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix=f".{Path(out).name}.", dir=Path(out).parent))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, own, ignore_errors=True)
        writer = ShardWriter(
            own,
            fps=FPS,
            encoder=PixelEncoder.fingerprint(None),
            latent="RGB pixels in [-1, 1], bfloat16",
            text="text: TinyTextEncoder, float32",
            arguments=arguments,
            empty_prompt=TinyTextEncoder().prompt(""),
            max_samples=per_shard,
        )
        stack.callback(writer.abort)
        # Operations this small gain nothing from threads, and lose a lot when the cores are shared.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        entries: Iterable[dict[str, Any]] = map(render, range(clips))
        if workers:
            # Spawned, not forked: a fork of a process whose torch has run threads can hang.
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)))
            entries = pool.imap(render, range(clips), chunksize=4)
        for entry in tqdm(entries, "rendering", clips, unit="clip", disable=not progress):
            writer.write(Sample.from_entry(entry))
        writer.close()
        own.chmod(0o755)
        try:
            own.rename(out)
        except OSError:
            if not (Path(out) / FILE).exists():
                raise
        return _kept(Manifest.load(out), arguments)


def _render(scenes: str, seed: int, frames: int, height: int, width: int, index: int) -> dict[str, Any]:
    """Clip `index` as a shard entry: plain bytes, which travel between processes as they are."""
    make = make_world if scenes == "memory" else make_clip
    pixels, meta = make(seed, index, frames, height, width)
    prompt = TinyTextEncoder().prompt(meta["caption"])
    latent = pixels.to(torch.bfloat16)
    return Sample(f"clip-{index:06d}", latent, prompt.text, {}, {}, {**meta, "fps": FPS}).to_entry()


def _kept(manifest: Manifest, arguments: dict[str, Any]) -> Manifest:
    """The finished folder, or a DataError that says in which arguments it differs from what was asked."""
    there = {"encoder": manifest.encoder, **manifest.arguments}
    asked = {"encoder": PixelEncoder.fingerprint(None), **arguments}
    other = [f"{name}={there.get(name)} (asked: {asked.get(name)})" for name in asked if there.get(name) != asked[name]]
    if other:
        hint = "choose another folder or delete this one"
        raise DataError(f"{manifest.folder}: holds other clips already, made with {', '.join(other)}; {hint}")
    return manifest


def check_preview(path: Path) -> None:
    """Raise a DataError unless the path ends in .gif and its folder is there."""
    if path.suffix.lower() != ".gif":
        raise DataError(f"{path}: the preview is an animated GIF, expected a name that ends in .gif")
    if not path.parent.is_dir():
        raise DataError(f"{path}: there is no folder {path.parent} for the preview; make it first")


def write_preview(samples: Sequence[Sample], path: str | Path, columns: int = 4, scale: int = 4) -> None:
    """An animated GIF of the clips in a grid, `scale` times enlarged, looping, at the clips' pace.

    Raises:
        DataError: as `check_preview`.
    """
    from PIL import Image

    from data.animation import save_gif

    check_preview(Path(path))
    clips = [((sample.latent.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8) for sample in samples]
    gap = torch.nn.ConstantPad2d((1, 1, 1, 1), 255)
    clips = [gap(clip.repeat_interleave(scale, 2).repeat_interleave(scale, 3)) for clip in clips]
    clips += [torch.full_like(clips[0], 255)] * (-len(clips) % columns)
    rows = [torch.cat(clips[i : i + columns], dim=3) for i in range(0, len(clips), columns)]
    grid = torch.cat(rows, dim=2).permute(1, 2, 3, 0).contiguous().numpy()
    save_gif([Image.fromarray(frame) for frame in grid], path, round(1000 / FPS))


def make(given: Arguments) -> None:
    """Make the clips, show them."""
    if given.preview is not None:
        check_preview(given.preview)
    there = (given.out / FILE).exists()
    chosen = {name: value for name, value in vars(given).items() if name != "preview"}
    manifest = synthesize(**chosen, progress=True)
    state = "already there" if there else "made"
    print(f"{manifest.folder}: {len(manifest.samples)} clips in {len(manifest.shards)} shards, {state}")
    if given.preview is not None:
        write_preview(list(read_samples(manifest, 16)), given.preview)
        print(f"{given.preview}: preview")


main = Command(
    "python -m data.synth",
    "Makes synthetic clips as shards for training; a finished folder made with the same arguments is kept.",
    Arguments,
    make,
    ["python -m data.synth out=shards/shapes clips=256 frames=64 preview=shapes.gif"],
    explain=explained,
)
