"""Other captions for shards that are there: `python -m data.recaption SHARDS captions=SOURCE`.

Text is encoded again, video is not: each shard is read, the text of its samples replaced, and written under its name
into a new folder. Latents and image conditions keep their bytes. A shard counts from the moment its record has its
name, so that a killed run goes on with the next one; ranks share the shards, and the last to end makes the manifest.
The old folder stays as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from data.encoders import family_of, fingerprint, load_encoder, same_vae
from data.encoders.base import Encoder, EncoderSettings, find_device
from data.errors import DataError, explained, naming
from data.io.files import write_bytes
from data.io.locks import Lock, take
from data.io.remote import scheme_of
from data.prepare.chosen import ChosenVideos
from data.prepare.listed import name_of
from data.prepare.rows import Rows
from data.prepare.sources import Columns, read_source
from data.shards.begun import Begun, refuse_shards
from data.shards.manifest import FILE, REJECTED, Manifest
from data.shards.origins import LIST, numbers_of, sources_of
from data.shards.reader import SampleReader
from data.shards.sample import Prompt
from data.shards.shard_info import ShardInfo
from data.shards.writer import TarShards, finish_folder
from radial.cli.command import Command
from radial.cli.ranks import Rank
from radial.cli.settings import setting

JOURNAL = ".recaption"
_ASKED = "asked.json"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Arguments:
    """The keys of the command line."""

    shards: Path = setting("folder of the shards; it stays as it is")
    captions: Path = setting("folder or table with the new captions, laid out as the source= of data.prepare")
    out: Path | None = setting("folder for the new shards (<shards>-recaptioned); an unfinished one is continued", None)
    weights: Path | None = setting("the model's diffusers folder; not needed for pixels", None)
    path_column: str | None = setting("the table's column of paths; null: path, video, file, ...", None)
    caption_column: str | None = setting("the table's column of captions; null: caption, text, prompt", None)
    start_column: str | None = setting("the table's column of when a piece begins; null: start, start_time, ...", None)
    end_column: str | None = setting("the table's column of when a piece ends; null: end, end_time, ...", None)
    missing: str = setting(
        "samples whose video has no new caption: refuse them, or keep the old one", "refuse", ("refuse", "keep")
    )
    device: str | None = setting("where to encode; null: a GPU where there is one", None)
    text_dtype: str = setting("the text encoders' numbers", "bf16", tuple(_DTYPES))


def recaption(given: Arguments) -> int:
    """Make the folder or this rank's part of it, or go on with it; returns the exit code.

    Raises:
        DataError: the shards are not of this machine, not our own or damaged; a video has no new caption; the weights
            are of another VAE; or the new folder holds something else.
    """
    manifest = Manifest.load(given.shards)
    if scheme_of(manifest.home) != "file" or manifest.map is not None:
        raise DataError(f"{given.shards}: expected shards of data.prepare or ShardWriter on this machine; copy them")
    out = given.out or Path(f"{given.shards.absolute()}-recaptioned")
    if out.absolute() == manifest.folder:
        raise DataError(f"out is {out}, the folder of the shards; choose another, the old one stays")
    family = family_of(manifest.encoder)
    encoder = fingerprint(family, given.weights, "+image-" in manifest.encoder)
    if not same_vae(encoder, manifest.encoder):
        raise DataError(
            f"{manifest.home}: was made with {manifest.encoder}, weights={given.weights} are {encoder}: video would "
            "have to be encoded again; give the weights that made them"
        )
    captions = _captions(given, manifest)
    asked = _asked(manifest, captions, encoder, given.text_dtype)
    if _is_made(out, asked):
        print(f"{out}: already there")
        return 0
    with naming(out):
        (out / JOURNAL).mkdir(parents=True, exist_ok=True)
    with _exclusively(out):
        if _is_made(out, asked):  # by another rank, meanwhile
            return 0
        _begin(out, asked)
    rank = Rank.here()
    device = find_device(given.device, rank.local)
    loaded = load_encoder(family, EncoderSettings(given.weights, device, torch.float32, _DTYPES[given.text_dtype]))
    work = Work(out, manifest, captions, encoder, loaded)
    work.write(rank)
    with _exclusively(out):
        if _is_made(out, asked):
            return 0
        shards = [work.record(number) for number in range(len(manifest.shards))]
        left = shards.count(None)
        if left:
            print(f"rank {rank.index} is done, {left} shards are left to the others")
            return 0
        _finish(given, out, manifest, captions, [shard for shard in shards if shard], encoder, asked, loaded)
    print(f"{out}: {len(manifest.samples)} clips in {len(shards)} shards, with new captions")
    return 0


def _is_made(out: Path, asked: str) -> bool:
    """Whether the new folder is finished; raises a DataError where it is, with something else."""
    if not (out / FILE).exists():
        return False
    if Manifest.load(out).arguments.get("recaptioned") != asked:
        raise DataError(f"{out}: is finished, with other shards or captions; choose another out=")
    return True


@contextlib.contextmanager
def _exclusively(out: Path) -> Iterator[None]:
    """Inside, this process has the folder's journal for itself; that of a finished folder is removed."""
    (out / JOURNAL).mkdir(exist_ok=True)  # another rank has removed it where that finished the folder
    with (out / JOURNAL / "lock").open("a", encoding="utf-8") as lock:
        take(lock, wait=True)
        yield
    if (out / FILE).exists():
        shutil.rmtree(out / JOURNAL, ignore_errors=True)


def _captions(given: Arguments, manifest: Manifest) -> list[str | None]:
    """The new caption of each sample; None keeps the old one."""
    columns = Columns(given.path_column, given.caption_column, given.start_column, given.end_column)
    listed = read_source(given.captions, columns)
    names = _names(manifest)
    there, found = set(names), dict[str, str]()
    for video in listed.videos(()):
        if video.caption is not None and name_of(video) in there:
            found.setdefault(name_of(video), video.caption)
    captions = [found.get(name) for name in names]
    lacking = sorted({name for name, caption in zip(names, captions, strict=True) if caption is None})
    if lacking and given.missing == "refuse":
        raise DataError(
            f"{given.captions}: has no caption for {len(lacking)} of the videos in {given.shards}, such as "
            f"{lacking[0]}; add them, or give missing=keep"
        )
    if all(caption is None for caption in captions):
        raise DataError(f"{given.captions}: names none of the videos in {given.shards}, such as {lacking[0]}")
    return captions


def _names(manifest: Manifest) -> list[str]:
    """What each sample's video, or the piece of it, is called in a list of videos."""
    chosen = ChosenVideos.load(manifest.folder, LIST)
    if chosen is None:
        return sources_of(manifest)
    rows = [numbers_of(sample.key) for sample in manifest.samples]
    if any(row is None or row[0] >= len(chosen.rows) for row in rows):
        raise DataError(f"{manifest.folder / LIST}: does not list the videos of the samples; copy it again")
    return [chosen.rows[row[0]].name for row in rows if row is not None]


def _asked(manifest: Manifest, captions: Sequence[str | None], encoder: str, text_dtype: str) -> str:
    """What decides the new folder's contents, as a digest: it is only continued with the same."""
    digest = hashlib.sha256(json.dumps([encoder, text_dtype, captions]).encode())
    digest.update(json.dumps([shard.to_json() for shard in manifest.shards]).encode())
    return digest.hexdigest()[:16]


def _begin(out: Path, asked: str) -> None:
    """Note what is asked for, or refuse a folder that was begun with something else."""
    note = out / JOURNAL / _ASKED
    if not note.exists():
        refuse_shards(out)
        write_bytes(note, json.dumps(asked).encode())
    elif json.loads(note.read_text(encoding="utf-8")) != asked:
        raise DataError(
            f"{out}: was begun with other shards, captions or weights; ask for the same, choose another out= or "
            "delete it"
        )


class Work:
    """Writes the shards that have no record yet."""

    def __init__(
        self, out: Path, manifest: Manifest, captions: Sequence[str | None], encoder: str, loaded: Encoder
    ) -> None:
        self._out, self._manifest, self._captions = out, manifest, captions
        self._encoder, self._loaded = encoder, loaded
        self._last: tuple[str, Prompt] | None = None

    def write(self, rank: Rank) -> None:
        """Write the shards of a rank that have no record.

        Raises:
            DataError: another process writes one of them.
        """
        counts = [len(shard.samples) for shard in self._manifest.shards]
        firsts = list(itertools.accumulate(counts, initial=0))
        mine = range(rank.index, len(counts), rank.world)
        begun = Begun(self._out / JOURNAL / "begun.txt")
        total = sum(counts[number] for number in mine)
        with tqdm(total=total, unit="clip", desc="encoding text", disable=rank.index != 0) as bar:
            for number in mine:
                if self.record(number) is None:
                    with self._path(number).with_suffix(".lock").open("a", encoding="utf-8") as lock:
                        if take(lock) is Lock.HELD:
                            raise DataError(
                                f"{self._out}: another data.recaption is writing it; wait for it or stop it"
                            )
                        if self.record(number) is None:  # another process may have made it meanwhile
                            begun.add(self._manifest.shards[number].file)
                            made = self.shard(number, firsts[number])
                            write_bytes(self._path(number), json.dumps(made.to_json()).encode())
                bar.update(counts[number])

    def record(self, number: int) -> ShardInfo | None:
        """A shard of the new folder; None where it is not there yet."""
        path = self._path(number)
        return ShardInfo.parse(json.loads(path.read_text(encoding="utf-8")), path, "") if path.exists() else None

    def _path(self, number: int) -> Path:
        return self._out / JOURNAL / f"{self._manifest.shards[number].file}.json"

    def shard(self, number: int, first: int) -> ShardInfo:
        """One shard anew, whose samples are numbered from `first` on."""
        made: list[ShardInfo] = []
        about = self._manifest.shards[number]
        # As large as it gets: a shard of the old folder is one of the new.
        writer = TarShards(self._out, lambda n: about.file, made.append, max_samples=1 << 40, max_bytes=1 << 60)
        with SampleReader(self._manifest) as reader:
            try:
                for place, info in enumerate(about.samples):
                    content = reader.fetch(number, place)
                    # A flipped bit would get a checksum of its own.
                    if info.crc32 not in (None, zlib.crc32(content.numpy().data)):
                        raise DataError(f"{self._manifest.urls[number]}: sample {info.key} is damaged; copy it again")
                    sample = reader.decode(content, number, place)
                    caption = self._captions[first + place]
                    caption = sample.caption if caption is None else caption
                    if self._last is None or self._last[0] != caption:
                        self._last = (caption, self._loaded.prompt(caption))
                    prompt = self._last[1]
                    meta = {**sample.meta, "caption": caption, "encoder": self._encoder}
                    writer.write(replace(sample, text=prompt.text, pooled=prompt.pooled, meta=meta))
                writer.flush()
            finally:
                writer.abort()
        return made[0]


def _finish(
    given: Arguments,
    out: Path,
    manifest: Manifest,
    captions: Sequence[str | None],
    shards: Sequence[ShardInfo],
    encoder: str,
    asked: str,
    loaded: Encoder,
) -> None:
    """The lists beside the shards, the empty prompt and the manifest."""
    # The new shards lie here, wherever the old ones were moved to: what is appended must not go there.
    changed = {"text_dtype": str(_DTYPES[given.text_dtype]).removeprefix("torch."), "upload": None}
    if (manifest.folder / REJECTED).exists():
        write_bytes(out / REJECTED, (manifest.folder / REJECTED).read_bytes())
    chosen = ChosenVideos.load(manifest.folder, LIST)
    if chosen is not None:
        # data.prepare compares its list with these captions, when it appends to the folder
        new = {numbers_of(sample.key): caption for sample, caption in zip(manifest.samples, captions, strict=True)}
        by_row = {numbers[0]: caption for numbers, caption in new.items() if numbers is not None}
        rows = Rows(replace(row, caption=by_row.get(number) or row.caption) for number, row in enumerate(chosen.rows))
        replace(chosen, rows=rows, arguments={**chosen.arguments, **changed}).save(out, LIST)
    about = {**manifest.arguments, **changed, "recaptioned": asked}
    made = replace(manifest, shards=tuple(shards), encoder=encoder, arguments=about, text=loaded.text_is)
    finish_folder(out, made, loaded.prompt(""))


main = Command(
    "python -m data.recaption",
    "Makes a new folder of shards with other captions: text is encoded again, video is not. Kill it whenever you like: "
    "the same command goes on where it stopped. Under torchrun or srun each rank takes its share of the shards.",
    Arguments,
    recaption,
    [
        "python -m data.recaption shards/mine captions=better.csv out=shards/better weights=weights/wan_14b",
        "python -m data.recaption shards/mine captions=videos out=shards/better weights=weights/wan_14b missing=keep",
    ],
    positional="shards",
    explain=explained,
)

if __name__ == "__main__":
    main.run()
