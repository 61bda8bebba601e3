"""What an export says of the tools that run other attention than the run was trained with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from radial import Released
from tests.helpers.faults import run
from tests.helpers.stock_models import TARGETS, random_lora
from tests.helpers.tiny import run_config
from tests.helpers.tiny_pipelines import save_pipeline
from train.config.compose import compose_run, finish
from train.config.output_sections import TOOL_KEYS
from train.errors import UserError
from train.export.run import folded, header_of, save_adapters
from train.export.tools import TOOLS, differences, script_flags, table, warnings, ways
from train.models.pretrained import stand_in


def run_of(conf, **settings):
    return finish(compose_run({"conf": conf, **{key.replace("__", "."): value for key, value in settings.items()}}))


def test_the_released_hunyuan_script_runs_what_hunyuan_trains_with():
    assert differences(run_of("hunyuan_4x"), "released") == []
    (line,) = differences(run_of("hunyuan_4x", attention__rule="wan"), "released")
    assert line.startswith("the released HunyuanVideo script runs other attention") and "rule hunyuan, not wan" in line
    (line,) = differences(run_of("hunyuan_4x", attention="paper"), "released")
    assert line.endswith("the released mask, not paper")
    (line,) = differences(run_of("hunyuan_4x", clip__frames="129", clip__height="544", clip__width="960"), "released")
    assert line.endswith("8 of 525 query blocks see the text alone")
    assert differences(run_of("hunyuan_4x", attention="dense"), "released") == []


@pytest.mark.parametrize(
    ("settings", "kind", "expected"),
    [
        ({"conf": "wan_4x"}, "diffusers", {}),
        (
            {"conf": "wan_4x"},
            "comfyui",
            {
                "WanVideoWrapper": "rule ports, not wan, it refuses 720 x 1280 pixels, no multiples of the block 128",
                "LightX2V": "rule ports, not wan, decay 0.2, not 1, no dense layers, not 2, no dense steps, not 2",
                "Wan2GP": "rule ports, not wan, no dense layers, not 2, no dense steps, not 2",
                "ComfyUI-RadialAttn": "it also keeps the corner blocks of every pair of frames, rule ports, not wan",
            },
        ),
        (
            {
                "conf": "wan_4x",
                "attention__rule": "ports",
                "attention__dense_layers": "0",
                "attention__dense_steps": "0",
            },
            "comfyui",
            {
                "WanVideoWrapper": "it refuses 720 x 1280 pixels, no multiples of the block 128",
                "LightX2V": "decay 0.2, not 1",
                "ComfyUI-RadialAttn": "it also keeps the corner blocks of every pair of frames",
            },
        ),
        (
            {"conf": "wan22_2x"},
            "diffusers",
            {
                "the released Wan2.2 script": "blocks of 64, not 128; training's fastest kernel has blocks of 128 only",
            },
        ),
        ({"conf": "wan_i2v_2x"}, "diffusers", {}),
        ({"conf": "mochi_4x"}, "diffusers", {}),
    ],
)
def test_each_tool_that_differs_has_a_line(settings, kind, expected):
    lines = differences(run_of(**settings), kind)
    words = " runs other attention than the LoRA was trained with: "
    assert dict(line.split(words) for line in lines) == expected


def test_each_tool_that_can_has_its_settings():
    lines = ways(run_of("wan_4x", attention__rule="ports", attention__decay="0.8", clip__height="768"), "comfyui")
    assert lines == [
        "WanVideoWrapper runs this attention: a radial attention mode in its model loader, and the node "
        "WanVideoSetRadialAttention, decay_factor 0.8, dense_blocks 2, dense_timesteps 2, block_size 128",
        "ComfyUI runs this attention with the node Load Radial LoRA of radial/comfyui",
    ]
    settings = {"attention__rule": "ports", "attention__dense_layers": "0", "attention__dense_steps": "0"}
    assert any(line.startswith("Wan2GP runs") for line in ways(run_of("wan_4x", **settings), "comfyui"))
    settings["attention__decay"] = "0.2"
    assert 'LightX2V runs this attention: "self_attn_1_type": "radial_attn" in its JSON' in ways(
        run_of("wan_4x", **settings), "comfyui"
    )
    (line,) = ways(run_of("wan_4x"), "diffusers")
    assert line == (
        "the released Wan2.1 script runs this attention: its arguments, --decay_factor 1, --dense_layers 2, "
        "--dense_timesteps 2"
    )
    assert ways(run_of("wan_4x", attention="dense"), "comfyui") == []
    assert any("64 tokens on" in line for line in differences(run_of("wan_4x", attention__block="64"), "comfyui"))


def test_the_option_ports_trains_what_the_ports_run():
    run = run_of("wan_4x", attention="ports", clip__height="768", export__tools="[wanvideowrapper]")
    own = run_of("wan_4x").attention
    assert run.pattern() == Released(decay=1.0, rule="ports")
    assert replace(run.attention, rule=None) == replace(own, rule=None)  # all else is as in radial
    assert warnings(run) == []
    assert ways(run, "comfyui")[0].startswith("WanVideoWrapper runs this attention: ")


def test_a_run_is_warned_of_the_tools_that_it_names():
    assert [tool.key for tool in TOOLS] == list(TOOL_KEYS)
    assert warnings(run_of("wan_4x")) == []
    lines = warnings(run_of("wan_4x", export__tools="[wan2gp,released_wan,released_hunyuan]"))
    assert lines == [
        "warning: export.tools has released_hunyuan: the released HunyuanVideo script does not run the run's model",
        "warning: export.tools has wan2gp: Wan2GP runs other attention than the LoRA was trained with: rule ports, not "
        "wan, no dense layers, not 2, no dense steps, not 2",
    ]
    dora = {"attention__rule": "ports", "attention__dense_layers": "0", "attention__dense_steps": "0"}
    (line,) = warnings(run_of("wan_4x", **dora, lora__dora="true", export__tools="[wan2gp,released_wan]"))[1:]
    assert line.startswith("warning: export.tools has wan2gp: Wan2GP loads comfyui/, which a DoRA (lora.dora) is not")
    with pytest.raises(UserError, match=r"export.tools is \['kijai'\], expected some of released_hunyuan"):
        run_of("wan_4x", export__tools="[kijai]")


def test_a_run_says_at_its_start_who_cannot_run_it_and_with_how_many_clips_it_trains(tmp_path, capsys):
    settings = {"trainer__steps": 1, "report__clips": 0, "export__tools": "[wan2gp]", "optim__accumulate": 2}
    run(run_config(tmp_path, **settings))
    start, step, _ = capsys.readouterr().out.partition("step 1/1")
    assert step
    assert "warning: export.tools has wan2gp: Wan2GP runs other attention than the LoRA was trained with" in start
    assert "  clips      2 a step: 1 x 1 process, 2 micro-batches\n" in start


def test_the_manuals_table_is_that_of_the_tools():
    manual = (Path(__file__).parents[3] / "train" / "README.md").read_text(encoding="utf-8").splitlines()
    for row in table():
        assert row in manual, row


def test_the_scripts_flags_are_the_runs():
    flags = dict(line.split() for line in script_flags(run_of("hunyuan_4x")).splitlines())
    assert flags == {
        "--pattern": "radial", "--dense_layers": "2", "--dense_timesteps": "2", "--decay_factor": "1",
        "--num_frames": "509", "--height": "720", "--width": "1280", "--num_inference_steps": "50",
    }  # fmt: skip
    before = run_of("hunyuan_4x", attention__dense_steps="0", attention__dense_sigma="0.99")
    assert "--dense_timesteps 4\n" in script_flags(before)


def test_an_export_has_flags_differences_and_both_dense_figures(tmp_path):
    base = save_pipeline("hunyuan", tmp_path / "base") / "transformer"
    config = run_of("hunyuan_4x", model__path=str(base.parent), attention__rule="wan")
    pairs = folded(random_lora(stand_in(base), TARGETS["hunyuan"], seed=0), 3)
    header = header_of(config, 7)
    words = (["released"], torch.float32, tmp_path / "out", "mine", lambda: None)
    said = save_adapters(config, base, pairs, header, *words)
    assert (tmp_path / "out" / "released" / "flags.txt").read_text(encoding="utf-8") == script_flags(config)
    assert any("released  the released HunyuanVideo script runs other attention" in line for line in said)
    assert (header["radial.rule"], header["radial.dense_steps"], header["radial.sampling_steps"]) == ("wan", "2", "50")
    assert 0.99408 < float(header["radial.dense_sigma"]) < 0.99709  # the third and second of 50 levels at shift 7
