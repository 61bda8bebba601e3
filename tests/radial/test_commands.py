"""``python -m radial`` as a user runs it."""

import json
import re

import numpy
import pytest
from PIL import Image

from radial import HeadMasks, Released, VideoGrid, build_layout, make_pattern
from radial.__main__ import main
from radial.backends.flashinfer import FlashInfer
from radial.bench import Shape


def test_mask_json_save_and_plot(tmp_path, capsys):
    save, plot = tmp_path / "mask.npz", tmp_path / "mask.png"
    arguments = "mask --tokens-per-frame 200 --frames 9 --rule ports --decay 0.5 --block 64 --text 30 --json"
    main.run([*arguments.split(), "--save", str(save), "--plot", str(plot)])
    about = json.loads(capsys.readouterr().out)
    layout = build_layout(Released(0.5, "ports"), VideoGrid(9, 1, 200, 30), 64)
    assert about["tokens"] == 1830
    assert about["blocks"] == 29
    assert about["kept"] == layout.kept
    assert about["sparsity"] == pytest.approx(1 - layout.kept / 29**2)
    assert about["build_seconds"] >= 0
    mask = numpy.load(save)["mask"]
    assert mask.dtype == bool
    assert (mask == layout.mask().numpy()).all()
    whole = tmp_path / "whole.png"
    main.run(f"mask --tokens-per-frame 200 --frames 9 --pattern dense --block 64 --text 30 --plot {whole}".split())
    shown, all_of_it = (_dark_pixels(path) for path in (plot, whole))
    assert shown / all_of_it == pytest.approx(layout.kept / 29**2, abs=0.1)


def _dark_pixels(picture):
    """How much of it is in the colour of a kept block."""
    return int((numpy.asarray(Image.open(picture).convert("RGB"))[..., 0] < 80).sum())


def test_tiles_lie_in_the_frames_of_the_clip(capsys):
    size = ["--height", "8", "--width", "24", "--frames", "8"]
    main.run(["mask", *size, "--pattern", "sliding_tile", "--block", "32", "--json"])
    layout = build_layout(make_pattern("sliding_tile"), VideoGrid(8, 8, 24), 32)
    assert json.loads(capsys.readouterr().out)["kept"] == layout.kept
    assert layout.kept != build_layout(make_pattern("sliding_tile"), VideoGrid(8, 1, 192), 32).kept


def test_a_random_mask_has_as_many_blocks_as_the_released_one_that_is_asked_for(capsys):
    size = ["mask", "frames=9", "tokens_per_frame=200", "block=64"]
    main.run([*size, "rule=hunyuan", "decay=0.2", "json=true"])
    kept = json.loads(capsys.readouterr().out)["kept"]
    main.run([*size, "pattern=random", "rule=hunyuan", "decay=0.2"])
    said = capsys.readouterr().out
    assert said.startswith("random (rule hunyuan, decay 0.2): ") and f"  blocks         {kept} of 29 x 29" in said


def test_mask_for_people(capsys):
    main.run(["mask", "--tokens-per-frame", "3600", "--frames", "4", "--pattern", "paper"])
    out = capsys.readouterr().out
    assert "14,400 tokens" in out
    assert "sparsity" in out
    assert "FLOPs" in out


def test_backends_table(capsys):
    main.run(["backends"])
    out = capsys.readouterr().out
    assert "torch" in out
    assert "no: it computes all blocks" in out


def test_a_backend_that_runs_forward_only_is_told_apart(monkeypatch, capsys):
    forward_only = "it runs forward only, and this call needs gradients"
    monkeypatch.setattr(FlashInfer, "why_not", lambda self, call: forward_only if call.needs_grad else None)
    main.run(["backends"])
    assert re.search("flashinfer +cpu +sparse +without gradients", capsys.readouterr().out)


def test_layouts_are_timed(monkeypatch, tmp_path, capsys):
    grid = VideoGrid(12, 8, 32)
    monkeypatch.setattr("radial.bench_layouts.TIMED", {"tiny": Shape(grid, 4, "hunyuan")})
    main.run(["layouts", "--json", str(tmp_path / "layouts.json")])
    rows = json.loads((tmp_path / "layouts.json").read_text(encoding="utf-8"))["rows"]
    assert [row["pattern"] for row in rows] == ["released", "paper"]
    assert rows[0]["kept"] == build_layout(Released(rule="hunyuan"), grid).kept < build_layout(Released(), grid).kept
    assert "tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--frames", "0"], "frames is 0"),
        (["--frames", "-3"], "frames is -3"),
        (["--frames", "x"], "expected a whole number"),
        (["--decay", "-1"], "decay is -1.0"),
        (["--decay", "nan"], "decay is 'nan', expected a number"),
        (["--rule", "wann"], "rule is 'wann'"),
        (["--rule", "ports", "--pattern", "paper"], "rule is of pattern released or random, paper has none"),
        (["--decay", "0.3", "--pattern", "paper"], "decay is of pattern released"),
        (["--pattern", "spiral"], "pattern is 'spiral'"),
        (["--tokens-per-frame", "0"], "tokens_per_frame is 0, expected at least 1"),
        (["--pattern", "sliding_tile"], "height and width are not set"),
        (["--height", "8"], "tokens_per_frame is 64, height 8 and width None"),
        (["--block", "100"], "block is 100"),
        (["--text", "-1"], "text is -1, expected at least 0"),
        (["--save", "mask.txt"], ".npz"),
        (["--plot", "no/such/folder/mask.png"], "does not exist"),
        (["--plot", "mask.xyz"], "cannot draw"),
        (["--what"], "is not an option"),
    ],
)
def test_nonsense_is_one_line_and_exit_code_2(arguments, text, capsys):
    given = {"--tokens-per-frame": "64", "--frames": "3"}
    given.update(dict(zip(arguments[::2], arguments[1::2], strict=False)))
    words = [word for pair in given.items() for word in pair] + (arguments if len(arguments) == 1 else [])
    with pytest.raises(SystemExit) as stop:
        main.run(["mask", *words])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert text in captured.err


def test_masks_of_known_decays_by_command(tmp_path, capsys):
    out = tmp_path / "masks.safetensors"
    main.run(["fit", "known=wan_1x", "share=0.3", "layers=1", "seed=7", f"out={out}"])
    about = HeadMasks.read(out).about
    assert about.seed == 7 and about.layers == (0,) and about.frames == 21 and "patches" in capsys.readouterr().out
    for words in (["share=0.3"], ["share=0.3", "known=wan_1x", "decay=decay.safetensors"]):
        with pytest.raises(SystemExit) as caught:
            main.run(["fit", *words, f"out={out}"])
        assert caught.value.code == 2
        assert capsys.readouterr().err.startswith("error: decay and known are both set or neither")
    for words, message in (
        (["known=wan_1x", "separable=true"], "separable is of decay="),
        (["known=wan_1x", "dense_layers=2"], "dense_layers is of decay="),
        (["decay=decay.safetensors", "layers=2"], "layers is of known="),
    ):
        with pytest.raises(SystemExit) as caught:
            main.run(["fit", "share=0.3", *words, f"out={out}"])
        assert caught.value.code == 2 and capsys.readouterr().err.startswith(f"error: {message}")
