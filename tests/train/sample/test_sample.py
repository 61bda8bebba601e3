"""Generating: held to the stock pipelines, step by step and layer by layer; the command and its files."""

import json
import re
import shutil
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from data.errors import DataError
from radial import Released, VideoGrid, build_layout
from radial.errors import Mistake
from tests.helpers.generating import close, latent, stock
from tests.helpers.oracles import masked_softmax
from tests.helpers.tiny_pipelines import save_pipeline, words
from train.errors import UserError
from train.models.families.wan import WanSelfAttention
from train.sample.__main__ import main
from train.sample.generate import Generator
from train.sample.jobs import jobs
from train.sample.settings import parse_settings


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return save_pipeline("wan", tmp_path_factory.mktemp("sample") / "wan")


@pytest.mark.parametrize("dense", [{"pattern": "dense"}, {"dense_steps": 4}, {"dense_layers": 3}, {"dense_sigma": 0.0}])
def test_dense_is_the_stock_pipeline(wan, dense):
    clip = latent(wan, **dense)
    close(clip.latent, stock(wan))
    assert len(clip.seconds) == 4
    assert all(clip.dense) == ("dense_layers" not in dense)


class Oracle(WanSelfAttention):
    """The stock processor's arithmetic in float64 with a layout as an attention mask."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        q, k, v = (t.unflatten(2, (attn.heads, -1)).double() for t in (q, k, attn.to_v(hidden_states)))
        cos, sin = rotary_emb
        turn = torch.complex(cos[..., 0::2].double(), sin[..., 1::2].double())
        q, k = (torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn for t in (q, k))
        q, k = (torch.view_as_real(t).flatten(3) for t in (q, k))
        out = masked_softmax(q, k, v, self.layout, None, q.shape[-1] ** -0.5)
        return attn.to_out[0](out.flatten(2).float())


def test_dense_layers_and_dense_steps_mean_what_the_released_scripts_mean(wan):
    """A layer is sparse from layer dense_layers on, in steps from dense_steps on."""
    layout = build_layout(Released(decay=0.4), VideoGrid(9, 2, 3), 16)
    assert not layout.is_dense

    def set_layers(pipeline, step):
        for layer, block in enumerate(pipeline.transformer.blocks):
            if step >= 2 and layer >= 1:
                block.attn1.set_processor(Oracle())
                block.attn1.processor.layout = layout

    def step_end(pipeline, step, timestep, tensors):
        set_layers(pipeline, step + 1)
        return {}

    expected = stock(wan, lambda pipeline: set_layers(pipeline, 0), step_end)
    clip = latent(wan, decay=0.4, dense_layers=1, dense_steps=2)
    close(clip.latent, expected)
    assert clip.dense == [True, True, False, False]
    assert (expected - stock(wan)).abs().max() > 1e-2


def test_a_dense_noise_level_holds_for_steps_above_it(wan):
    levels = WanPipeline.from_pretrained(wan).scheduler
    levels.set_timesteps(4)
    between = (levels.timesteps[1] + levels.timesteps[2]).item() / 2000
    assert latent(wan, dense_sigma=between).dense == [True, True, False, False]


def frames_of(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)]), float(stream.average_rate)


def test_the_command_writes_a_video_and_its_settings(wan, tmp_path, capsys):
    out = tmp_path / "deep" / "clip.mp4"
    arguments = words(wan, out=out, dense_steps=1)
    main(arguments)
    frames, fps = frames_of(out)
    assert frames.shape == (33, 32, 48, 3)
    assert fps == 16
    record = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert record["settings"]["prompt"] == "a red ball, moving & it's a clip"
    assert record["settings"]["dense_steps"] == 1
    assert len(record["measured"]["seconds_a_step"]) == 4
    assert record["measured"]["peak_memory_gib"] > 0
    assert "s a sparse step" in capsys.readouterr().out
    with torch.no_grad():
        pipeline = WanPipeline.from_pretrained(wan)
        clip = latent(wan, dense_steps=1).latent
        z = clip * torch.tensor(pipeline.vae.config.latents_std).view(1, -1, 1, 1, 1)
        z = z + torch.tensor(pipeline.vae.config.latents_mean).view(1, -1, 1, 1, 1)
        video = pipeline.vae.decode(z, return_dict=False)[0]
    expected = ((video[0].permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).numpy()
    assert np.abs(frames - expected).mean() < 6  # what H.264 and its halved colours lose on noise
    assert sorted(path.name for path in out.parent.iterdir()) == ["clip.json", "clip.mp4"]
    stamp = out.stat().st_mtime_ns
    main(arguments)
    assert out.stat().st_mtime_ns == stamp
    assert "1 of 1 videos are there already" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"clip.mp4 is there, of other settings \(seed 7, not 8\): give another out"):
        main(words(wan, out=out, dense_steps=1, seed=8))


def test_a_clip_of_other_numbers_of_the_model_is_another(wan, tmp_path):
    arguments = words(wan, out=tmp_path / "clip.mp4", steps=1, rope="interpolate", **{"model.native_frames": 17})
    main(arguments)
    for key, was, now in (("text_tokens", 24, 32), ("native_frames", 17, 21)):
        message = rf"clip.mp4 is there, of other settings \({key} {was}, not {now}\): give another out"
        with pytest.raises(UserError, match=message):
            main([word.replace(f"model.{key}={was}", f"model.{key}={now}") for word in arguments])
    main(arguments)


def test_many_prompts_go_on_where_they_stopped(wan, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a red ball"}, {"prompt": "the bar, moving", "negative": "a video"}, {"prompt": "a red ball"}]
    prompts.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    arguments = [*words(wan, prompt=None, out=tmp_path / "clips", steps=2), "--prompts", str(prompts)]
    made = []
    write = Generator.write

    def interrupted(self, job, known, clips):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(job.out.name)
        write(self, job, known, clips)

    monkeypatch.setattr(Generator, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    monkeypatch.setattr(Generator, "write", write)
    first = tmp_path / "clips" / "0001-a-red-ball.mp4"
    stamp = first.stat().st_mtime_ns
    main(arguments)
    assert first.stat().st_mtime_ns == stamp
    names = ["0001-a-red-ball", "0002-the-bar--moving", "0003-a-red-ball"]
    assert sorted(p.name for p in first.parent.iterdir()) == sorted(f"{n}.{e}" for n in names for e in ("mp4", "json"))
    clips = [frames_of(first.with_stem(name))[0] for name in names]
    assert np.array_equal(clips[0], clips[2])
    assert not np.array_equal(clips[0], clips[1])
    assert (
        json.loads(first.with_name(f"{names[1]}.json").read_text(encoding="utf-8"))["settings"]["negative"] == "a video"
    )


@pytest.mark.parametrize("compare", [None, "dense"])
def test_a_batch_goes_on_that_was_killed_before_a_record(wan, tmp_path, monkeypatch, compare):
    """As by SIGKILL: what would clean up does not run."""
    arguments = words(wan, out=tmp_path / "clip.mp4", steps=1, compare=compare, decay=0.4)

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("train.sample.generate.execution", kill)
        with pytest.raises(Killed):
            main(arguments)
    files = {"clip.mp4"} | ({"clip_dense.mp4", "clip_both.mp4"} if compare else set())
    assert {path.name for path in tmp_path.iterdir()} == files | {".clip.json", ".clip.latents.safetensors"}
    with pytest.raises(UserError, match="clip.mp4 is there, and no video of these settings: give another out"):
        main([*arguments, "shift=4"])
    main(arguments)
    assert {path.name for path in tmp_path.iterdir()} == files | {"clip.json"}
    stamp = (tmp_path / "clip.mp4").stat().st_mtime_ns
    main(arguments)
    assert (tmp_path / "clip.mp4").stat().st_mtime_ns == stamp
    (tmp_path / "clip.json").unlink()
    with pytest.raises(UserError, match="clip.mp4 is there, and no video of these settings: give another out"):
        main(arguments)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip_dense.mp4", "clip_dense.mp4 is there, and no video of these settings: give another out"),
        ("clip_both.mp4", "clip_both.mp4 is there, and no video of these settings: give another out"),
        ("clip.json", "clip.json is there, and no record of a video: give another out"),
    ],
)
def test_what_others_wrote_is_not_replaced(wan, tmp_path, name, message):
    """Such as a clip that was made with pattern=dense before, or a workflow of the clip's name."""
    (tmp_path / name).write_text("{}", encoding="utf-8")
    arguments = words(wan, out=tmp_path / "clip.mp4", steps=1)
    with pytest.raises(UserError, match=message):
        main([*arguments, "compare=dense"])
    if name != "clip.json":
        main(arguments)
        with pytest.raises(UserError, match=f"{name} is there, and not of compare=dense: give another out"):
            main([*arguments, "compare=dense"])
    assert (tmp_path / name).read_text(encoding="utf-8") == "{}"


def test_a_comparison_goes_on_that_wrote_only_some_of_its_videos(wan, tmp_path, monkeypatch):
    arguments = words(wan, out=tmp_path / "clip.mp4", steps=1, compare="dense", decay=0.4)

    def lost(source, path):
        if path.name == "clip.mp4":
            raise KeyboardInterrupt
        source.replace(path)

    with monkeypatch.context() as patched:
        patched.setattr("data.io.files.rename", lost)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    assert {path.name for path in tmp_path.glob("*.mp4")} == {"clip_dense.mp4", "clip_both.mp4"}
    main(arguments)
    whole = ["clip.json", "clip.mp4", "clip_both.mp4", "clip_dense.mp4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == whole
    (tmp_path / "clip_both.mp4").unlink()
    main(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == whole


def test_files_of_prompts(tmp_path):
    def prompts(data, **changes):
        (tmp_path / "prompts.txt").write_bytes(data)
        given = {"prompt": None, "prompts": tmp_path / "prompts.txt", "out": tmp_path / "clips_2.1", **changes}
        return jobs(parse_settings(words(tmp_path, **given))[0])

    (job,) = prompts("\ufeffa café\n".encode())
    assert (job.prompt, job.out.relative_to(tmp_path).as_posix()) == ("a café", "clips_2.1/0001-a-café.mp4")
    with pytest.raises(UserError, match=r"prompts .*prompts.txt: is not in UTF-8 .*; save it as UTF-8"):
        prompts("a café\n".encode("latin-1"))
    with pytest.raises(UserError, match="prompts.txt: line 1 holds a zero byte, as UTF-16 does; save it as UTF-8"):
        prompts("a ball\n".encode("utf-16-le"))
    odd = "one\u2028two\u2029three\x85four\vfive\fsix"
    found = prompts(f"{odd}\r\n\nlast".encode())
    assert [job.prompt for job in found] == [odd, "last"] and found[1].out.name == "0002-last.mp4"
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one\u2028two"}\n\n{"image": "x"}', encoding="utf-8")
    with pytest.raises(UserError, match="prompts.jsonl:3: expected an object with prompt"):
        prompts(b"", prompts=tmp_path / "prompts.jsonl")
    for key in ("prompt", "negative"):
        line = json.dumps({"prompt": "a \U0001f98a", key: "a fox \ud83e"})
        (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": "a boat"}}\n{line}\n', encoding="utf-8")
        with pytest.raises(UserError, match=rf"prompts.jsonl:2: {key} has half a character \(\\ud83e\), expected"):
            prompts(b"", prompts=tmp_path / "prompts.jsonl")
    (tmp_path / "first.png").touch()
    lines = [{"prompt": "a", "image": str(tmp_path / "first.png")}, {"prompt": "b"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.raises(UserError, match="prompts.jsonl: some have an image and some have none"):
        prompts(b"", prompts=tmp_path / "prompts.jsonl")
    (tmp_path / "prompts.JSONL").write_text('{"prompt": "a ball"}', encoding="utf-8")
    assert prompts(b"", prompts=tmp_path / "prompts.JSONL")[0].prompt == "a ball"
    (tmp_path / "prompts.json").write_text('[\n{"prompt": "a ball"}\n]', encoding="utf-8")
    with pytest.raises(
        UserError, match="prompts.json, expected text with a prompt a line, or .jsonl, an object a line"
    ):
        prompts(b"", prompts=tmp_path / "prompts.json")
    with pytest.raises(UserError, match="clips.mp4, expected a folder for the videos of many prompts"):
        prompts(b"a", out="clips.mp4")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_pipeline_that_lacks_a_tensor_is_told(wan, tmp_path, part):
    """The libraries would put in random numbers, or fail with a tensor that has none."""
    shutil.copytree(wan, tmp_path / "wan")
    (file,) = (tmp_path / "wan" / part).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(name for name, tensor in tensors.items() if tensor.ndim > 1 and "shared" not in name)[-1]
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file, {"format": "pt"})
    message = rf"wan/{part}: .*{re.escape(name)}.*download the folder again"
    with pytest.raises((UserError, DataError), match=message):
        main(words(tmp_path / "wan", out=tmp_path / "clip.mp4", steps=1))
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_index_of_a_pipeline_is_told(wan, tmp_path, text):
    shutil.copytree(wan, tmp_path / "wan")
    (tmp_path / "wan" / "model_index.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"model_index.json is (not JSON|a list, expected).*: download it again"):
        main(words(tmp_path / "wan", out=tmp_path / "clip.mp4"))


def test_one_of_several_processes_speaks(wan, tmp_path, capsys, monkeypatch):
    arguments = words(wan, out=tmp_path / "clip.mp4", steps=1)
    main(arguments)
    capsys.readouterr()
    monkeypatch.setenv("RANK", "1")
    main(arguments)
    assert capsys.readouterr().out == ""


def test_a_clip_that_cannot_be_written_is_written_elsewhere(wan, tmp_path, monkeypatch):
    """The folder goes away while it is made; the disk that is full answers alike, with an OSError."""
    denoise = Generator.denoise

    def meanwhile(self, *given):
        out.parent.rmdir()
        out.parent.write_text("", encoding="utf-8")
        return denoise(self, *given)

    monkeypatch.setattr(Generator, "denoise", meanwhile)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    out = tmp_path / "clips" / "clip.mp4"
    with pytest.raises(
        UserError, match=r"clip.mp4 cannot be written \(.*\): it is in .*, move what is there to"
    ) as error:
        main(words(wan, out=out, steps=1))
    (kept,) = tmp_path.glob("sample-*")
    assert f"it is in {kept}," in str(error.value)
    out.parent.unlink()
    kept.rename(out.parent)
    main(words(wan, out=out, steps=1))  # nothing is left to do: denoising would find no empty folder
    assert len(frames_of(out)[0]) == 33


def test_compare_measures_against_dense(wan, tmp_path, capsys):
    out = tmp_path / "clip.mp4"
    main(words(wan, out=out, compare="dense", decay=0.4, dense_layers=0, dense_steps=0))
    assert sorted(p.name for p in tmp_path.glob("*.mp4")) == ["clip.mp4", "clip_both.mp4", "clip_dense.mp4"]
    assert frames_of(tmp_path / "clip_both.mp4")[0].shape == (33, 32, 48 + 4 + 48, 3)
    measured = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["measured"]
    assert 5 < measured["psnr"] < 60
    assert 0 < measured["ssim"] < 1
    step = measured["seconds_a_sparse_step"]
    assert step == sorted(measured["seconds_a_step"])[1:3] @ np.array([0.5, 0.5])  # the median: the first one compiles
    assert measured["speed_up"] == pytest.approx(measured["dense"]["seconds_a_dense_step"] / step)
    printed = capsys.readouterr().out
    assert "PSNR" in printed
    assert "not measured (needs" in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "give prompt=TEXT, or --prompts FILE"),
        ({"model": "wan_14"}, "model is 'wan_14', expected one of .*; did you mean wan_14b"),
        ({"frames": 32}, "frames is 32, expected 4 x k [+] 1"),
        ({"frames": 0}, "frames is 0, expected at least 1"),
        ({"width": 0}, "width is 0, expected at least 1"),
        ({"height": 40}, "height is 40, expected a multiple of 16"),
        ({"pattern": "radial"}, "pattern is 'radial', expected one of released, paper, fitted, random, dense"),
        ({"decay": 0}, "decay is 0.0, expected a positive number"),
        ({"block": 100}, "block is 100, expected a power of two"),
        ({"backend": "fa9"}, "backend is 'fa9', expected one of"),
        ({"guidance": -1}, "guidance is -1.0, expected a positive number"),
        ({"image": "/nowhere.png"}, "image /nowhere.png is missing"),
        ({"lora": "/nowhere.safetensors"}, "/nowhere.safetensors is missing, expected a LoRA"),
        ({"model.path": "/nowhere"}, "model.path /nowhere has no model_index.json"),
        ({"model.path": "hub:a/b/c"}, "model.path hub:a/b/c cannot be fetched: Repo id must be in the form"),
        ({"model.rope": "abc"}, "model.rope is 'abc', expected one of default, riflex, interpolate"),
        ({"model.text_tokens": 0}, "model.text_tokens is 0, expected at least 1"),
        ({"model.boundary": 0.5}, "model.expert is None and model.boundary 0.5: a model of two experts has both"),
        ({"lora_2": "x.safetensors"}, "lora_2 is for the second of two experts, the model has one transformer"),
        ({"add_2": "x.safetensors"}, "add_2 is for the second of two experts"),
        ({"guidance_2": 3}, "guidance_2 is for the second of two experts"),
        ({"model": "wan22_t2v_a14b"}, "has 1 transformers, the chosen model has 2: choose the model=... that fits"),
        ({"model": "wan22_5b", "height": 64, "width": 96}, "wan has one timestep a clip, the family wan22_5b does not"),
        ({"model": "mochi", "frames": 49}, "holds a WanTransformer3DModel, expected a MochiTransformer3DModel: choose"),
        ({"model.dimensions": None}, "has num_attention_heads=2, the chosen model has 40: choose the model=..."),
        ({"pattern": "dense", "compare": "dense"}, "compare=dense with pattern=dense has nothing to compare"),
        ({"dense_steps": 2, "dense_sigma": 0.5}, "dense_steps and dense_sigma are both set, expected one"),
        ({"out": "/dev/null/clip.mp4"}, "out /dev/null/clip.mp4 cannot be written .*: give another out"),
        ({"sequence": 2}, "sequence is 2 on 1 ranks, expected 1"),
        ({"split_guidance": "true"}, "sequence is 1 on 1 ranks, expected an even number"),
        ({"out": "clip.json"}, "out is clip.json, expected a video's name that ends in .mp4"),
        ({"out": "clip.webm"}, "out is clip.webm, expected a video's name that ends in .mp4"),
        ({"out": "."}, "out is ., expected a video's name that ends in .mp4"),
        ({"seed": 2**70}, f"seed is {2**70}, expected at least 0 and less than 2 to the 64th"),
        ({"guidance": 1}, "negative is set, but guidance 1 is off: there is no pass with a negative prompt, leave it"),
    ],
)
def test_mistakes(wan, changes, message):
    with pytest.raises(Mistake, match=message):
        main(words(wan, **changes))


def test_a_setting_that_would_not_count_is_refused():
    with pytest.raises(Mistake, match="model is given twice"):
        parse_settings(["prompt=a", "model=wan_14b", "model=mochi"])
    with pytest.raises(UserError, match="guidance is 1, which turns it off for both experts: leave guidance_2 out"):
        parse_settings(["prompt=a", "model=wan22_t2v_a14b", "guidance=1", "guidance_2=3"])


def test_a_mistake_is_one_line_and_exit_code_2():
    command = [sys.executable, "-m", "train.sample", "prompt=a, b's", "stpes=3"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (2, "error: stpes is not a known key; did you mean steps?\n")


@pytest.mark.parametrize(("model", "prefix"), [
    ("wan_14b", ""), ("wan_i2v_14b", "镜头晃动，"), ("wan_i2v_14b_480p", "镜头晃动，"), ("wan22_i2v_a14b", ""),  # noqa: RUF001
    ("wan22_5b", ""),
])  # fmt: skip
def test_the_negative_prompt_is_that_of_the_model_s_own_configs(tmp_path, model, prefix):
    """`wan/configs/wan_i2v_14B.py` of Wan2.1 begins with the shaking camera, no config of Wan2.2 does."""
    given = ["prompt=a", f"model={model}", "frames=81", "height=480", "width=832", "out=a.mp4"]
    if "i2v" in model:
        (tmp_path / "first.png").touch()
        given.append(f"image={tmp_path / 'first.png'}")
    found = parse_settings(given)[0].negative
    assert found is not None
    assert found.startswith(f"{prefix}色调艳丽，过曝，静态") and found.endswith("背景人很多，倒着走")  # noqa: RUF001
