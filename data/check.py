"""Is a folder of shards what its manifest says: `python -m data.check SHARDS`.

Every byte of every shard is read: its size and SHA-256 are compared, its tar is walked, and every sample is decoded and
held to the schema and to its CRC-32. What is wrong is listed line by line, and the exit code is 1.

Training reads without that CRC-32, so that a flipped bit inside a latent shows here alone: zlib's takes 12 ms of a
sample of 41.5 MB, 43 % of the time that reading takes at 1.5 GB/s, xxHash's XXH3 would take 14 % (a core of an Intel
Xeon).
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data.encoders import check_encoder, family_of, load_encoder
from data.encoders.base import Encoder, EncoderSettings, find_device
from data.errors import DataError, explained
from data.io.lines import lines_of
from data.io.remote import CHUNK, open_shard, read_all, scheme_of
from data.rebuild import rebuild
from data.shards.manifest import REJECTED, Manifest, locate
from data.shards.order import BatchOrder
from data.shards.reader import SampleReader, decode
from data.shards.sample import Sample
from data.shards.shard_info import ShardInfo
from data.sheet import row_of, sheet_of
from radial.cli.command import Command
from radial.cli.settings import at_least, setting


@dataclass
class Arguments:
    """The keys of the command line."""

    shards: str = setting("folder or URL of the shards", path=True)
    contact_sheet: bool = setting("decode a few clips and draw them into a PNG", False)
    png: Path = setting("where the contact sheet goes", Path("contact_sheet.png"))
    clips: int = setting("rows of the contact sheet: clips spread over the folder", 8, must=at_least(1))
    pictures: int = setting("columns of the contact sheet: frames spread over a clip", 6, must=at_least(1))
    rebuild: bool = setting("first make the manifest that a folder has lost, of the tars that are whole", False)
    weights: Path | None = setting(
        "the diffusers folder whose VAE decodes, or encodes a lost empty prompt; not needed for pixels", None
    )
    device: str | None = setting("where the VAE runs; null: a GPU where there is one", None)


@dataclass
class Findings:
    """What a folder holds and what is wrong with it."""

    whole: list[int] = field(default_factory=list)
    """The numbers of the samples that are what the manifest lists."""
    shapes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    seconds: float = 0.0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)


def check(manifest: Manifest, progress: bool = False) -> Findings:
    """Verify the empty prompt and every shard; remote ones are read whole.

    Args:
        manifest: of the folder.
        progress: show a progress bar on stderr.
    """
    findings = Findings()
    try:
        manifest.load_empty_prompt()
    except DataError as error:
        findings.problems.append(str(error))
    total = sum(shard.bytes for shard in manifest.shards)
    first = 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="checking", disable=not progress) as bar:
        for url, shard in zip(manifest.urls, manifest.shards, strict=True):
            try:
                _check_shard(url, shard, first, manifest, findings, bar.update)
            except DataError as error:
                findings.problems.append(str(error))
            first += len(shard.samples)
    return findings


def _check_shard(
    url: str, shard: ShardInfo, first: int, manifest: Manifest, findings: Findings, advance: Callable[[int], object]
) -> None:
    """One pass over a shard, whose samples are numbered from `first` on: everything enters the hash, samples are
    decoded on the way."""
    digest, position = hashlib.sha256(), 0
    file = open_shard(url, shard.sha256, None)

    def take(size: int) -> Tensor:
        nonlocal position
        content = torch.empty(size, dtype=torch.uint8)
        content = content[: file.read_into(position, content.numpy().data)]
        digest.update(content.numpy().data)
        position += len(content)
        advance(len(content))
        return content

    problem = None
    try:
        for number, info in enumerate(shard.samples, first):
            # Between the samples of somebody else's tar lie headers, and entries that nothing here reads.
            while manifest.map is not None and position < info.offset and len(take(min(CHUNK, info.offset - position))):
                pass
            if info.offset != position:
                problem = f"sample {info.key} is listed at byte {info.offset}, not {position}"
                break
            content = take(info.bytes)
            if len(content) < info.bytes:
                problem = f"ends before its sample {info.key} does; make the folder anew"
                break
            try:
                sample = decode(content, info, manifest.map)
            except DataError as error:
                findings.problems.append(f"{url}: {error}")
                continue
            crc32 = zlib.crc32(content.numpy().data)
            if info.crc32 not in (None, crc32):
                found = f"CRC-32 is {crc32:08x}, the manifest says {info.crc32:08x}"
                findings.problems.append(f"{url}: sample {info.key}: {found}; copy the shard again, or make it anew")
                continue
            findings.whole.append(number)
            findings.shapes[info.shape] += 1
            frames = sample.meta.get("frames")  # what others put there may be anything
            findings.seconds += (frames if type(frames) is int and frames > 0 else info.shape[1]) / manifest.fps
        # What follows the samples ends the tar; a byte more is one too many.
        while len(take(CHUNK)):
            pass
    finally:
        file.close()
    findings.bytes += position
    if position != shard.bytes:  # which explains whatever stands elsewhere
        problem = f"is {position} bytes, the manifest says {shard.bytes}; copy it again"
    elif problem is None and digest.hexdigest() != shard.sha256:
        problem = f"SHA-256 is {digest.hexdigest()}, the manifest says {shard.sha256}"
    if problem is not None:
        findings.problems.append(f"{url}: {problem}")


def contact_sheet(
    manifest: Manifest, encoder: Encoder, numbers: Sequence[int], clips: int, pictures: int
) -> Image.Image:
    """Clips spread evenly over the samples of these numbers, one a row, frames spread evenly over each, captions."""
    count = len(numbers)
    order = BatchOrder(manifest.shapes(), seed=0, global_batch=1, shuffle_window=1)
    rows: list[Image.Image] = []
    with SampleReader(manifest) as reader:
        for place in sorted({round(i * (count - 1) / max(1, clips - 1)) for i in range(clips)}):
            sample = reader.read(*order.shard_of(numbers[place]))
            frames = encoder.decode(sample.latent)
            chosen = sorted({round(i * (len(frames) - 1) / max(1, pictures - 1)) for i in range(pictures)})
            label = f"{sample.key}  {_place(sample)}{list(sample.latent.shape)}  {sample.caption}"
            rows.append(row_of([frames[i] for i in chosen], label))
    return sheet_of(rows)


def _place(sample: Sample) -> str:
    """The video that a clip is from and where it starts there, as far as its maker says: others' may be anything."""
    source, start = sample.meta.get("source"), sample.meta.get("clip_start")
    if not isinstance(source, str):
        return ""
    return f"{source} at {start:.2f} s  " if isinstance(start, int | float) else f"{source}  "


def decoder_of(manifest: Manifest, weights: Path | None, device: str | None) -> Encoder:
    """What decodes a folder's latents.

    Raises:
        DataError: no family is known for them, weights are missing, the weights are not those that made them, or there
            is no such device.
    """
    try:
        family = family_of(manifest.encoder)
    except DataError as error:
        raise DataError(f"{manifest.home}: {error}; nothing here decodes it") from error
    check_encoder(manifest, family, weights)
    settings = EncoderSettings(weights, find_device(device), torch.float32, torch.float32, vae_only=True)
    return load_encoder(family, settings)


def report(given: Arguments) -> int:
    """Check, print, draw; returns 1 when something is wrong."""
    if given.contact_sheet:
        _check_png(given.png)
    problems: list[str] = []
    if given.rebuild:
        rebuilt = rebuild(Path(given.shards).expanduser(), given.weights, given.device, progress=True)
        problems = rebuilt.problems
        kept = f"{len(rebuilt.manifest.samples)} samples in {len(rebuilt.manifest.shards)} shards"
        print(f"{given.shards}: made a manifest of {kept}")
    manifest = Manifest.load(given.shards, missing=True)
    _check_moved(manifest)
    encoder = decoder_of(manifest, given.weights, given.device) if given.contact_sheet else None
    found = check(manifest, progress=True)
    print(table(manifest, found))
    for problem in problems:
        print(f"left out: {problem}")
    for problem in found.problems:
        print(f"damaged: {problem}")
    if encoder is not None and found.whole:
        contact_sheet(manifest, encoder, found.whole, given.clips, given.pictures).save(given.png)
        print(f"{given.png}: contact sheet{' of what is whole' if found.problems else ''}")
    elif encoder is not None:
        print(f"{given.png}: not drawn, no sample is whole")
    return 1 if found.problems or problems else 0


def _check_moved(manifest: Manifest) -> None:
    """Raise a DataError that says where the shards are, if `data.prepare upload=` has moved them out of this folder."""
    address = manifest.arguments.get("upload")
    if address and scheme_of(manifest.home) == "file" and not any(Path(url).exists() for url in manifest.urls):
        raise DataError(
            f"{manifest.home}: holds no shards, they were moved to {address}; `python -m data.check {address}` "
            "checks them there"
        )


def _check_png(path: Path) -> None:
    """Raise a DataError unless the path ends in .png and its folder is there."""
    if path.suffix.lower() != ".png":
        raise DataError(f"png is {path}, expected a name that ends in .png")
    if not path.parent.is_dir():
        raise DataError(f"png is {path}, but there is no folder {path.parent}; make it first")


def table(manifest: Manifest, found: Findings) -> str:
    """What a folder holds, in lines."""
    whole = f"{len(found.whole)} of {len(manifest.samples)} whole"
    lines = [
        f"{manifest.home}",
        f"  encoder    {manifest.encoder}",
        f"  latents    {manifest.latent}",
        f"  text       {manifest.text}",
        f"  shards     {len(manifest.shards)}, {found.bytes / 1e9:.3f} GB",
        f"  samples    {whole}, {found.seconds / 3600:.3f} h at {manifest.fps:g} fps",
        f"  rejects    {_rejects(manifest)}",
        f"  {'shape (C, F, H, W)':<24}{'samples':>9}",
    ]
    lines += [f"  {list(shape)!s:<24}{count:>9}" for shape, count in sorted(found.shapes.items())]
    return "\n".join(lines)


def _rejects(manifest: Manifest) -> str:
    """How many bad files `data.prepare` met, from its list beside the manifest."""
    try:
        listed = read_all(locate(manifest.home, REJECTED)).decode()
    except DataError:
        return f"no {REJECTED}"
    return f"{len(lines_of(listed))} files, see {REJECTED}"


main = Command(
    "python -m data.check",
    "Verifies every shard against the manifest and prints what the folder holds; the exit code is 1 for a damaged one.",
    Arguments,
    report,
    [
        "python -m data.check shards/openvid_4x",
        "python -m data.check shards/openvid_4x --rebuild",
        "python -m data.check shards/mine --contact-sheet weights=weights/wan",
    ],
    positional="shards",
    explain=explained,
)

if __name__ == "__main__":
    main.run()
