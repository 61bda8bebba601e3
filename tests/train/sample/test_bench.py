"""The benchmark of a denoising step, on a CPU at a size that says nothing of speed."""

import json

import pytest
import torch
from torch._dynamo.utils import counters

from radial.errors import Mistake
from train.errors import UserError
from train.sample import bench

TINY = [
    "model=wan_14b", "frames=33", "layers=3", "clip.height=64", "clip.width=96", "attention.block=16",
    "trainer.precision=fp32", "trainer.compile=false",
    "model.dimensions={num_attention_heads: 2, attention_head_dim: 16, ffn_dim: 32}",
]  # fmt: skip


def test_every_case_is_measured_beside_dense(tmp_path, capsys):
    file = tmp_path / "bench.json"
    bench.main([*TINY, "dense_layers=0,2", "--json", str(file)])
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert [(r["pattern"], r["dense_layers"]) for r in results] == [("released", 0), ("released", 2), ("dense", 0)]
    assert all(r["forward"] > 0 and r["tokens"] == 9 * 4 * 6 for r in results)
    assert results[0]["flops"] < results[1]["flops"] < results[2]["flops"]
    printed = capsys.readouterr().out
    assert "33 released, 2 dense layers: " in printed
    bound = results[2]["flops"] / results[0]["flops"]
    assert f"(bound by operations {bound:.2f}x)" in printed


JOINT = [
    "conf=hunyuan_4x", "layers=4", "clip.height=64", "clip.width=96", "attention.block=16", "trainer.precision=fp32",
    "model.dimensions={num_attention_heads: 2, attention_head_dim: 16, num_layers: 2, num_single_layers: 4, "
    "text_embed_dim: 32, pooled_projection_dim: 16, rope_axes_dim: [4,6,6]}",
]  # fmt: skip


def test_nothing_is_compiled_while_it_istimed(monkeypatch):
    """Of a model with two kinds of layers; torch.compile without its code generation, which takes minutes."""
    torch._dynamo.reset()

    def compile_layer(layer, **settings):
        layer._compiled_call_impl = torch.compile(layer._call_impl, backend="eager", **settings)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_layer)
    graphs, timed = [], bench.timed

    def counted(forward):
        before = counters["stats"]["unique_graphs"]
        seconds = timed(forward)
        graphs.append((before, counters["stats"]["unique_graphs"]))
        return seconds

    counters.clear()
    monkeypatch.setattr(bench, "timed", counted)
    bench.main([*JOINT, "trainer.compile=true", "frames=33", "dense_layers=1", "dense=false"])
    ((before, after),) = graphs
    assert before == after >= 3  # a dense layer, a sparse one, and one of the joint stream at least


def test_what_is_measured_is_kept_when_a_later_case_fails(tmp_path, monkeypatch, capsys):
    """As where a job reaches its time limit."""
    measure = bench.Bench.measure

    def once(self, config, steps):
        if config.attention.pattern == "dense":
            raise KeyboardInterrupt
        return measure(self, config, steps)

    monkeypatch.setattr(bench.Bench, "measure", once)
    file = tmp_path / "bench.json"
    with pytest.raises(KeyboardInterrupt):
        bench.main([*TINY, "dense_layers=1", "--json", str(file)])
    assert [result["pattern"] for result in json.loads(file.read_text(encoding="utf-8"))["results"]] == ["released"]
    assert "released" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["frames=a"], "frames is 'a', expected a whole number"),
        (["frames=32"], "frames is 32, expected 4 x k"),
        (["dense=no"], "dense is 'no', expected true or false"),
        (["frames=33", "clip.frames=33"], "frames and clip.frames are both set"),
        (["--json"], "--json needs a value"),
        (["attention.patern=x"], "attention.patern is not a known key"),
    ],
)
def test_mistakes(words, message):
    with pytest.raises(Mistake, match=message):
        bench.main(words)


def test_a_runs_model_and_length_are_measured():
    (run,) = bench.bench_runs(None, {"conf": "hunyuan_4x"})
    assert (run.model.family, run.clip.frames) == ("hunyuan", 509)
    runs = bench.bench_runs([33, 65], {"conf": "hunyuan_4x", "model": "wan_1.3b"})
    assert [(run.model.family, run.clip.frames) for run in runs] == [("wan", 33), ("wan", 65)]
    assert [(run.model.family, run.clip.frames) for run in bench.bench_runs(None, {})] == [("wan", 161), ("wan", 321)]


def test_no_speed_of_numbers_that_are_not_finite(monkeypatch):
    run = bench.finish(
        bench.compose_run({"conf": "wan_4x", **dict(word.split("=", 1) for word in TINY if "." in word)})
    )
    measured = bench.Bench(run, 1)
    measured.adapter.transformer.proj_out.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="numbers that are not finite"):
        measured.measure(run, 1)
