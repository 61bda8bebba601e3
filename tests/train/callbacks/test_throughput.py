"""The training log's figures: FLOPs against torch's own counter, and what a run writes."""

import csv

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

from radial import Dense, Released, VideoGrid
from tests.helpers.attention import step_attention
from tests.helpers.sequence_ranks import clips, tiny_adapter
from tests.helpers.tiny import ARCHITECTURE, run_config
from train.callbacks.throughput import Throughput
from train.models.families.wan import WanAdapter
from train.planning.flops import PEAK_RATES, SampleFlops, peak_rate
from train.run import train
from train.storage.run_folder import RunFolder


def test_linear_flops_are_those_that_torch_counts():
    """Of a stock model on the meta device; what torch counts more is the timestep's own few rows."""
    with torch.device("meta"):
        model = WanTransformer3DModel(**ARCHITECTURE)
        inputs = torch.empty(1, 3, 4, 16, 32), torch.empty(1), torch.empty(1, 32, 64)
        with FlopCounterMode(display=False) as counter:
            model(*inputs)
    grid = VideoGrid(4, 4, 8)
    attention = step_attention(Dense(), grid, block=16).attention_flops(3, 2, 32)
    time = 2 * 64 * (32 + 64 + 6 * 64)
    got = WanAdapter(model, 32).linear_flops(grid)
    assert got == pytest.approx(counter.get_total_flops() - attention - time, rel=1e-6)


def test_a_layer_of_wan_14b_at_4x():
    """The figures of the published geometry: 1.74e14 linear, 2.82e14 attention at density 0.162."""
    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=1)
    adapter, grid = WanAdapter(model, 512), VideoGrid(81, 45, 80)
    assert adapter.linear_flops(grid) == pytest.approx(1.77e14, rel=0.02)
    plan = step_attention(Released(), grid)
    flops = SampleFlops.of(adapter, plan)
    assert flops.attention == pytest.approx(2.82e14, rel=0.01)
    assert flops.trains_all


def test_lora_counts_forward_and_both_gradients():
    adapter = tiny_adapter()
    x, _, _, _ = clips(1, (3, 12, 20))
    flops = SampleFlops.of(adapter, step_attention(Released(), adapter.grid(x), block=16))
    assert flops.lora == 2 * 45 * 3 * 4 * 4 * (64 + 64)
    assert flops.step == 3.5 * flops.attention + 2 * flops.linear + 3 * flops.lora


def test_the_most_exact_name_counts():
    assert peak_rate("NVIDIA H100 PCIe") == PEAK_RATES["H100 PCIe"] < peak_rate("NVIDIA H100 80GB HBM3")
    assert peak_rate("NVIDIA GeForce RTX 5090") == PEAK_RATES["RTX 5090"]
    assert peak_rate("cpu") is None


def test_what_ends_a_step_is_no_wait_for_data(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("train.callbacks.throughput.time.perf_counter", lambda: now[0])
    throughput = Throughput()
    now[0] = 10.0  # of which a validation took 4 s, and a checkpoint 5
    throughput.leave_out(4.0)
    throughput.busy(5.0)
    throughput.on_train_batch_start(None, None, None, 1)
    assert throughput.waited == 1.0


@pytest.mark.slow
def test_a_compiled_run_logs_its_compile_time(tmp_path):
    folder = RunFolder.create(config := run_config(tmp_path, trainer__compile=True, trainer__steps=1))
    train(config, folder)
    with (folder.path / "metrics.csv").open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("compile_seconds")]
    assert float(rows[0]["compile_seconds"]) > 0.1


def test_a_run_logs_its_speed(tmp_path):
    config = run_config(tmp_path, optim__accumulate=2, log__every=2)
    folder = RunFolder.create(config)
    train(config, folder)
    with (folder.path / "metrics.csv").open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("tokens_per_second")]
    assert len(rows) == 2
    for row in rows:
        seconds = float(row["step_seconds"])
        assert float(row["tokens_per_second"]) == pytest.approx(2 * 1024 / seconds, rel=1e-4)
        assert float(row["tflops"]) > 0
        assert 0 <= float(row["data_wait"]) <= seconds
        assert float(row["memory_gib"]) > 0
        assert "mfu" not in row
        assert "compile_seconds" not in row
    assert float(rows[0]["hours_left"]) > float(rows[1]["hours_left"]) == 0
