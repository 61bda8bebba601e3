"""Captions are tokenised as the models were trained, or refused; what is cut is counted; fingerprints tell the ids."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data.encoders import check_encoder, fingerprint, load_encoder, same_encoder
from data.encoders.base import Encoder, EncoderSettings
from data.encoders.pixels import PixelEncoder
from data.encoders.tokens import PLAIN, SENTENCE, check_prefix, check_round_trip, ids_of, open_tokenizer
from data.errors import DataError
from data.prepare.__main__ import main
from data.shards.manifest import Manifest
from tests.helpers.prepared import FAST
from tests.helpers.tiny_models import save_hunyuan, save_hunyuan15, save_mochi, save_wan
from tests.helpers.videos import write_video

SAVE = {"wan": save_wan, "hunyuan": save_hunyuan, "hunyuan15": save_hunyuan15, "mochi": save_mochi}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save(tmp_path_factory.mktemp(family)) for family, save in SAVE.items()}


def load(family: str, folder: Path) -> Encoder:
    return load_encoder(family, EncoderSettings(folder, torch.device("cpu"), torch.float32, torch.float32))


def save_byte_level(folder: Path, kind: str) -> Path:
    """A byte-level tokenizer as LLaMA 3's, which says to be of the class `kind`."""
    words = Tokenizer(models.BPE())
    letters = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(letters, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator([PLAIN] * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    folder.mkdir()
    words.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": kind, "model_max_length": 2048}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", ["LlamaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_a_byte_level_vocabulary_keeps_its_spaces(tmp_path: Path, kind: str) -> None:
    """HunyuanVideo's says LlamaTokenizerFast, and transformers before 5.22 then loses every space."""
    folder = save_byte_level(tmp_path / "tokenizer", kind)
    tokenizer, own = open_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    check_round_trip(tokenizer, folder)
    assert tokenizer(SENTENCE).input_ids == own.encode(SENTENCE).ids


def test_a_tokenizer_that_loses_words_or_spaces_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    broken = shutil.copytree(folders["wan"], tmp_path / "broken")
    file = broken / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    del content["model"]["vocab"]["grass"]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(
        DataError, match=rf"broken/tokenizer: of '{PLAIN}' its tokens keep 'a red ball rolls over the gre"
    ):
        load("wan", broken)


def test_a_template_of_another_length_than_is_cropped_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    broken = shutil.copytree(folders["hunyuan"], tmp_path / "broken")
    shutil.rmtree(broken / "tokenizer")
    shutil.copytree(folders["wan"] / "tokenizer", broken / "tokenizer")
    with pytest.raises(
        DataError, match=r"tokenizer: the template before the caption has \d+ tokens, and 95 are cropped;"
    ):
        load("hunyuan", broken)
    other = shutil.copytree(folders["hunyuan15"], tmp_path / "other")
    template = other / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert fingerprint("hunyuan15", other) != fingerprint("hunyuan15", folders["hunyuan15"])
    before = fingerprint("hunyuan", folders["hunyuan"])  # which has a template of its own, in its encoder
    (broken / "tokenizer").rename(tmp_path / "unused")
    shutil.copytree(folders["hunyuan"] / "tokenizer", broken / "tokenizer")
    (broken / "tokenizer" / "chat_template.jinja").write_text("unused", encoding="utf-8")
    assert fingerprint("hunyuan", broken) == before
    template.write_text("<s> " + template.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(DataError, match="the template before the caption has 109 tokens, and 108 are cropped;"):
        load("hunyuan15", other)
    check_prefix(open_tokenizer(folders["wan"] / "tokenizer"), tmp_path, "a red ball", 4)


def test_fingerprints_tell_how_captions_become_ids(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same files read otherwise, as by another version of transformers; older fingerprints do not tell."""
    folder = folders["hunyuan"]
    known = fingerprint("hunyuan", folder)
    family, _, parts = known.partition(":")
    assert family == "hunyuan" and [part.split("-")[0] for part in parts.split("+")] == ["vae", "text", "ids"]
    older = known.rpartition("+ids-")[0]
    assert same_encoder(known, known) and same_encoder(known, older) and same_encoder(older, known)
    assert not same_encoder(known, older.replace("text-", "text-0")) and not same_encoder(
        known, fingerprint("wan", folders["wan"])
    )
    made = Manifest((), 24.0, known, "", "", {}, home="shards")
    check_encoder(made, "hunyuan", folder)
    assert not caplog.messages
    check_encoder(Manifest((), 24.0, older, "", "", {}, home="shards"), "hunyuan", folder)
    assert "does not record how captions were tokenised: that is not compared" in caplog.messages[-1]

    def otherwise(tokenizers: Any) -> str:
        return ids_of(tokenizers[:1])

    monkeypatch.setattr("data.encoders.base.ids_of", otherwise)
    other = fingerprint("hunyuan", folder)
    assert other.rpartition("+ids-")[0] == older and other != known
    with pytest.raises(
        DataError, match="captions were tokenised otherwise than transformers does it here; make the sh"
    ):
        check_encoder(made, "hunyuan", folder)


@pytest.mark.parametrize(("family", "text", "expected"), [
    ("wan", "red " * 600, {"UMT5": (601, 512)}), ("mochi", "red " * 300, {"T5": (301, 256)}),
    ("hunyuan", "red " * 300, {"LLaMA": (301, 256), "CLIP": (301, 77)}),
    ("hunyuan", "red " * 70, {"LLaMA": (71, 256), "CLIP": (71, 77)}),
    ("hunyuan15", "red " * 1100, {"Qwen2.5-VL": (1103, 1000), "byT5": (0, 256)}),
    ("hunyuan15", f'red "{"a" * 300}"', {"Qwen2.5-VL": (7, 1000), "byT5": (310, 256)}),
])  # fmt: skip
def test_the_tokens_of_a_caption_are_counted_and_cutting_prints_nothing(
    folders: dict[str, Path], family: str, text: str, expected: Any, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = load(family, folders[family])
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).propagate = True
    try:
        assert encoder.tokens(text) == expected
        prompt = encoder.prompt(text)
    finally:
        for name in ("diffusers", "transformers"):
            logging.getLogger(name).propagate = False
    found, used = next(iter(expected.values()))
    assert len(prompt.text["text"].tokens) == min(found, used) and not caplog.messages


def test_cut_captions_are_counted_once_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over all runs of a folder, the longest named."""
    monkeypatch.setattr(PixelEncoder, "tokens", lambda self, text: {"Tiny": (len(text.split()), 4)})
    for name, words in (("a", 3), ("b", 9), ("c", 5)):
        write_video(tmp_path / "videos" / f"{name}.mp4", 20, caption="word " * words)
    write, clips = PixelEncoder.encode, []

    def stops(self: PixelEncoder, frames: Any) -> torch.Tensor:
        clips.append(1)
        if len(clips) == 5:
            raise KeyboardInterrupt
        return write(self, frames)

    monkeypatch.setattr(PixelEncoder, "encode", stops)
    command = [f"source={tmp_path / 'videos'}", f"out={tmp_path / 'out'}", *FAST]
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert shown.count("are longer") == 1
    assert (
        "2 captions are longer than the 4 tokens that Tiny takes, and are cut there; the longest is that of b.mp4"
        in (shown)
    )


def test_hunyuan_s_clips_are_cut_into_the_tiles_of_its_own_vae(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 frames and the one that follows, 48 apart; each part is the VAE's own encoding of those frames."""
    encoder: Any = load("hunyuan", folders["hunyuan"])
    seen: list[int] = []
    inner = encoder.vae.encoder.forward
    monkeypatch.setattr(encoder.vae.encoder, "forward", lambda x: seen.append(x.shape[2]) or inner(x))
    frames = torch.randint(0, 256, (129, 16, 16, 3), dtype=torch.uint8).numpy()
    latent = encoder.encode(frames)
    assert seen == [65, 65, 33] and latent.shape == (4, 33, 2, 2)
    assert isinstance(encoder.vae, AutoencoderKLHunyuanVideo)
    seen.clear()
    encoder.encode(frames[:61])
    assert seen == [61], "what fits is not cut"
