"""Tars that somebody else wrote: their manifest, reading through it, and the samples that lack something."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from data.check import check
from data.errors import DataError
from data.index import main
from data.shards.entry_map import EntryMap
from data.shards.manifest import EMPTY_PROMPT, FILE, Manifest
from data.shards.sample import Prompt, TextTokens
from data.shards.stream import LatentStream, read_samples
from tests.helpers.batches import order_of
from tests.helpers.tiny_models import save_hunyuan, save_wan


def npy(tensor: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, tensor.numpy())
    return file.getvalue()


def pth(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def latent(index: int, channels: int = 16, frames: int = 3) -> Tensor:
    return torch.randn(channels, frames, 4, 6, generator=torch.Generator().manual_seed(index))


def tokens(index: int, dim: int = 32) -> Tensor:
    """Five tokens, padded to eight."""
    noise = torch.Generator().manual_seed(100 + index)
    return torch.cat([torch.randn(5, dim, generator=noise), torch.zeros(3, dim)])


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wan(tmp_path_factory.mktemp("wan"))


def theirs(index: int) -> dict[str, bytes]:
    """A sample as other tools leave it: a batch of one in float16, folders in the name, a video that nobody reads."""
    key = f"./clips/part.0/{'long' * 30}-{index}" if index == 3 else f"clips/clip-{index}"
    key = key.replace("part.0", "part-0")
    return {
        f"{key}.mp4": b"v" * 700,
        f"{key}.latent.npy": npy(latent(index)[None].half()),
        f"{key}.text.pth": pth({"embeds": tokens(index)[None], "other": torch.zeros(1)}),
        f"{key}.json": json.dumps({"title": f"clip {index}", "score": 1.5}).encode(),
    }


MAP = "map=latent:latent.npy, text.text:text.pth#embeds, caption:json#title"


def test_training_reads_their_tars_as_they_are(tmp_path: Path, wan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = tmp_path / "shards"
    files = [
        write_tar(shards / "a.tar", theirs(0) | theirs(1)),
        write_tar(shards / "b.tar", theirs(2) | theirs(4), tarfile.PAX_FORMAT),
    ]
    before = [file.read_bytes() for file in files]
    assert main([str(shards), "family=wan", f"weights={wan}", MAP, "fps=24"]) == 0
    assert "a manifest of 4 samples in 2 tars, 0 left out" in capsys.readouterr().out
    assert [file.read_bytes() for file in files] == before

    manifest = Manifest.load(shards)
    assert manifest.fps == 24 and manifest.encoder.startswith("wan:vae-")
    assert [info.key for info in manifest.samples] == [f"clips_clip-{i}" for i in (0, 1, 2, 4)]
    assert manifest.load_empty_prompt().text["text"].tokens.shape[1] == 32
    samples = list(read_samples(manifest))
    for index, sample in zip((0, 1, 2, 4), samples, strict=True):
        assert sample.latent.dtype == torch.float32 and torch.equal(sample.latent, latent(index).half().float())
        assert torch.equal(sample.text["text"].tokens, tokens(index))
        assert sample.text["text"].mask.tolist() == [True] * 5 + [False] * 3
        assert sample.meta == {"title": f"clip {index}", "score": 1.5, "caption": f"clip {index}"}
    # in the exact order, as from our own
    batches = list(LatentStream(manifest, order_of(manifest, 2), num_steps=4, workers=2))
    assert sorted(key for batch in batches[:2] for key in batch.keys) == [info.key for info in manifest.samples]
    assert not check(manifest).problems


def test_check_finds_a_flipped_bit_and_a_cut_in_their_tars(tmp_path: Path, wan: Path) -> None:
    shards = tmp_path / "shards"
    file = write_tar(shards / "a.tar", theirs(0) | theirs(1))
    assert main([str(shards), "family=wan", f"weights={wan}", MAP]) == 0
    whole, info = file.read_bytes(), Manifest.load(shards).samples[1]
    place = info.offset + 200
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    (first, second) = check(Manifest.load(shards)).problems
    assert f"sample {info.key}: CRC-32 is" in first and "SHA-256 is" in second
    file.write_bytes(whole[: info.offset + 300])
    assert any("the manifest says" in problem for problem in check(Manifest.load(shards)).problems)
    with pytest.raises(DataError, match=rf"{info.key}: the shard ends \d+ bytes before it does"):
        list(read_samples(shards))


def test_entries_named_after_the_fields_need_no_map(tmp_path: Path) -> None:
    """Two texts; a tensor alone in a .safetensors and in a .pth; a mask of their own; the caption in a .txt."""
    weights = save_hunyuan(tmp_path / "weights")
    shards = tmp_path / "shards"
    write_tar(
        shards / "x.tar",
        {
            "s0.latent.safetensors": save({"anything": latent(0, 4).bfloat16()}),
            "s0.text.npy": npy(tokens(0)),
            "s0.text.mask.npy": npy(torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0]])),
            "s0.pooled.pt": pth(torch.arange(24.0)),
            "s0.txt": b"a red ball\n",
        },
    )
    assert main([str(shards), "family=hunyuan", f"weights={weights}"]) == 0
    (sample,) = read_samples(shards)
    assert sample.latent.dtype == torch.bfloat16 and torch.equal(sample.latent, latent(0, 4).bfloat16())
    assert sample.text["text"].mask.sum() == 2 and torch.equal(sample.pooled["clip"], torch.arange(24.0))
    assert sample.caption == "a red ball"


def test_samples_that_lack_something_are_named_and_left_out(
    tmp_path: Path, wan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Anything:
        def __reduce__(self) -> tuple[Any, ...]:
            return (exec, ("raise SystemExit('this code ran')",))

    def sample(key: str, **changed: bytes | None) -> dict[str, bytes]:
        entries: dict[str, bytes | None] = {"latent.npy": npy(latent(0)), "text.pth": pth(tokens(0)), "txt": b"a cat"}
        entries |= {name.replace("_", "."): content for name, content in changed.items()}
        return {f"{key}.{name}": content for name, content in entries.items() if content is not None}

    shards = tmp_path / "shards"
    write_tar(
        shards / "a.tar",
        sample("good")
        | sample("bare", text_pth=None, txt=None)
        | sample("code", text_pth=pth(Anything()))
        | sample("nan", latent_npy=npy(latent(0) * float("nan")))
        | sample("flat", latent_npy=npy(latent(0)[0]))
        | sample("double", latent_npy=npy(latent(0).double()))
        | sample("small", latent_npy=npy(latent(0, 4)))
        | sample("narrow", text_pth=pth(tokens(0, 16)))
        | sample("cut", latent_npy=npy(latent(0))[:-9])
        | {"alone.mp4": b"v"},
    )
    (shards / "b.tar").write_bytes((shards / "a.tar").read_bytes()[:20_000])
    assert main([str(shards), "family=wan", f"weights={wan}"]) == 1
    shown = capsys.readouterr().out.split("\n")
    expected = {
        "bare": "text.pth, txt are missing from its tar",
        "code": "text.pth cannot be read: it is damaged, or holds more than tensors",
        "nan": "latent holds NaN or infinity",
        "flat": "latent has shape (3, 4, 6), expected 4 dimensions",
        "double": "latent is torch.float64, expected bfloat16 or float32",
        "small": "latent has 4 channels, shape [4, 3, 4, 6], expected 16, [C, F, H, W]",
        "narrow": "text.text has 16 channels, shape [8, 16], expected 32",
        "cut": "latent.npy cannot be read",
        "alone": "latent.npy, text.pth, txt are missing from its tar",
    }
    for key, message in expected.items():
        (line,) = (line for line in shown if f": sample {key}: " in line)
        assert line.startswith(f"left out: {shards / 'a.tar'}: ") and message in line
    assert any(line.startswith(f"left out: {shards / 'b.tar'}: ") for line in shown)
    assert [info.key for info in Manifest.load(shards).samples] == ["good"]
    with pytest.raises(DataError, match="manifest.json: is there"):
        main([str(shards), "family=wan", f"weights={wan}"])


def test_what_cannot_be_indexed_is_one_line(tmp_path: Path, wan: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    words = [str(shards), "family=wan", f"weights={wan}"]
    with pytest.raises(DataError, match=r"holds no \*.tar"):
        main(words)
    (shards / "a.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"unpack a.tar.gz and the like"):
        main(words)
    write_tar(shards / "a.tar", {"s.vae.npy": npy(latent(0)), "s.t5.npy": npy(tokens(0))})
    with pytest.raises(DataError, match=r"none of the entries t5.npy, vae.npy is named latent; say where .* map="):
        main(words)
    with pytest.raises(DataError, match="weights is not set, family=wan needs its diffusers folder"):
        main(words[:2])
    with pytest.raises(DataError, match=r"no sample of its 1 tars fits family=wan; the first: .*text none, the family"):
        main([*words, "map=latent:vae.npy"])
    assert not (shards / FILE).exists() and not (shards / EMPTY_PROMPT).exists()
    assert main([*words, "map=latent:vae.npy,text.text:t5.npy"]) == 0
    (sample,) = read_samples(shards)
    assert sample.caption == ""


def test_an_empty_prompt_beside_the_tars_is_used(tmp_path: Path, wan: Path) -> None:
    shards = tmp_path / "shards"
    write_tar(shards / "a.tar", theirs(0))
    prompt = Prompt({"text": TextTokens(torch.full((2, 32), 7.0), torch.ones(2, dtype=torch.bool))}, {})
    save_file(prompt.tensors(), shards / EMPTY_PROMPT)
    assert main([str(shards), "family=wan", f"weights={wan}", MAP]) == 0
    assert torch.equal(Manifest.load(shards).load_empty_prompt().text["text"].tokens, torch.full((2, 32), 7.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latent", "'latent' is no place, expected FIELD:ENTRY"),
        ("latent:a.npy,latent:b.npy", "latent is given twice"),
        ("text.text:a.npy", "gives no place for latent"),
        ("latents:a.npy", "'latents' is no field, expected latent, text.<name>"),
        ("latent:a.zip", r"latent is 'a.zip', expected the name of an entry that ends in .npy, .safetensors"),
        ("latent:a.npy,caption:b.npy", r"caption is 'b.npy', expected the name of an entry that ends in .json, .txt"),
        ("latent:a.npy,text.x.mask:b.npy", "text.x.mask is given without text.x"),
    ],
)
def test_a_map_that_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=f"^map: .*{message}"):
        EntryMap.parse(text)


def test_tensors_in_a_file_of_several_have_to_be_named() -> None:
    part = torch.frombuffer(bytearray(save({"a": latent(0), "b": latent(1)})), dtype=torch.uint8)
    with pytest.raises(DataError, match="l.safetensors holds several tensors, a, b: say which with map=latent:l.safet"):
        EntryMap.parse("latent:l.safetensors").sample("k", {"l.safetensors": part})
    with pytest.raises(DataError, match="sample k: l.safetensors has no c, found a, b"):
        EntryMap.parse("latent:l.safetensors#c").sample("k", {"l.safetensors": part})
    sample = EntryMap.parse("latent:l.safetensors#b").sample("k", {"l.safetensors": part})
    assert torch.equal(sample.latent, latent(1))


def test_a_tensor_that_was_saved_with_its_gradient_is_data() -> None:
    parts = {
        "latent.npy": npy(latent(0)),
        "text.pth": pth({"embeds": tokens(0).requires_grad_(), "mask": torch.ones(len(tokens(0)))}),
    }
    places = "latent:latent.npy,text.text:text.pth#embeds,text.text.mask:text.pth#mask"
    raw = {name: torch.frombuffer(bytearray(content), dtype=torch.uint8) for name, content in parts.items()}
    sample = EntryMap.parse(places).sample("s0", raw)
    assert not sample.text["text"].tokens.requires_grad
    assert torch.equal(sample.text["text"].tokens.float(), tokens(0).float())


def test_help_names_every_key() -> None:
    assert all(word in main.usage() for word in ("shards", "family", "weights", "map", "fps", "device"))
