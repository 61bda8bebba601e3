"""The model card of a run, and its upload: to a server here that answers as the hub does."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import yaml

from tests.helpers.tiny import run_config
from train.config.compose import compose_run, finish
from train.errors import UserError
from train.export.card import base_model, write_card
from train.export.hub import repository, upload


def run_of(conf, **settings):
    return finish(compose_run({"conf": conf, **settings}))


def card_of(tmp_path, config, results=""):
    if results:
        (tmp_path / "report.txt").write_text(results, encoding="utf-8")
    write_card(tmp_path, config, 7, tmp_path, None)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_card_has_what_the_run_had(tmp_path):
    front, body = card_of(tmp_path, run_of("wan_4x", **{"trainer.steps": "7"}), "dense 0.03\nreleased 0.04")
    assert front == {
        "base_model": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        "library_name": "diffusers",
        "license": "apache-2.0",
        "pipeline_tag": "text-to-video",
        "tags": ["lora", "radial-attention", "video", "wan"],
    }
    assert "| mask | `Released(decay=1.0, rule='wan')`, blocks of 128 tokens |" in body
    assert "| clips | 321 frames of 720 x 1280 pixels |" in body and "| steps | 7 of 8 clips |" in body
    assert "dense 0.03\nreleased 0.04" in body
    assert 'extend(pipeline, "diffusers")' in body
    assert "- `comfyui/`: ComfyUI runs this attention with the node Load Radial LoRA" in body
    assert "- `comfyui/`: WanVideoWrapper runs other attention than the LoRA was trained with: rule ports" in body


def test_a_card_counts_the_clips_of_all_gpus_and_micro_batches(tmp_path):
    several = {"trainer.devices": "2", "data.batch_size": "3", "optim.accumulate": "4"}
    assert "| steps | 7 of 24 clips |" in card_of(tmp_path, run_of("shapes_4x", **several))[1]


def test_a_card_of_an_earlier_step_has_no_losses_of_the_last(tmp_path):
    _, body = card_of(tmp_path, run_of("wan_4x", **{"trainer.steps": "8"}), "dense 0.03")
    assert "| steps | 7 of 8 clips |" in body and "Held-out losses" not in body and "0.03" not in body


def test_a_doras_card_names_what_there_is_of_it(tmp_path):
    _, body = card_of(tmp_path, run_of("wan_4x", **{"lora.dora": "true"}))
    assert "A DoRA that was trained" in body and "| DoRA | rank 128" in body
    assert "extend(" not in body and "comfyui" not in body and "kohya" not in body
    assert 'pipeline.transformer.load_lora_adapter("diffusers", weight_name="pytorch_lora_weights.safetensors")' in body
    assert "merge=true" in body


def test_a_card_has_no_command_that_fails(tmp_path):
    """`extend` knows no pipeline of MiniMax-H3; and it reads the format that there is."""
    _, body = card_of(tmp_path, run_of("minimax_h3_4x"))
    assert "extend(" not in body and "pipeline.transformer.load_lora_adapter(" in body
    write_card(tmp_path, run_of("wan_4x"), 7, tmp_path, ["comfyui"])
    assert 'extend(pipeline, "comfyui")' in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_card_of_one_experts_lora_names_that_expert(tmp_path):
    expected = {"high": '"diffusers", lora_2="none"', "low": '"none", lora_2="diffusers"'}
    for expert, files in expected.items():
        _, body = card_of(tmp_path, run_of("wan22_2x", **{"model.expert": expert}))
        assert f"extend(pipeline, {files})" in body
    dora = {"model.expert": "low", "lora.dora": "true"}
    assert "pipeline.transformer_2.load_lora_adapter(" in card_of(tmp_path, run_of("wan22_2x", **dora))[1]


def test_a_card_of_dense_attention_names_no_mask(tmp_path):
    _, body = card_of(tmp_path, run_of("wan_4x", attention="dense"))
    assert "A LoRA that was trained with dense attention." in body
    assert "mask" not in body.partition("## Running it")[0] and "| dense |" not in body


def test_other_licences_and_images(tmp_path):
    front, body = card_of(tmp_path, run_of("hunyuan_4x"))
    assert front["license"] == "other" and front["license_name"] == "tencent-hunyuan-community"
    assert front["license_link"].endswith("hunyuanvideo-community/HunyuanVideo/blob/main/LICENSE")
    assert "Held-out" not in body
    assert card_of(tmp_path, run_of("wan_i2v_2x"))[0]["pipeline_tag"] == "image-to-video"
    assert (
        'extend(pipeline, "high_noise/diffusers", lora_2="low_noise/diffusers")'
        in card_of(tmp_path, run_of("wan22_2x"))[1]
    )
    assert base_model(run_config(tmp_path)) is None
    assert "base_model" not in card_of(tmp_path, run_config(tmp_path))[0]


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that an upload of small files uses."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self.answer({"url": "https://huggingface.co/org/mine", "id": "org/mine"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            if self.server.refuse:
                self.server.refuse -= 1
                self.send_error(403, "Forbidden")
                return
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            self.answer({"commitUrl": "https://huggingface.co/org/mine/commit/1", "commitOid": "1", "success": True})
        else:
            self.answer({"errors": [], "warnings": []})

    def do_GET(self):
        self.answer({"id": "org/mine", "sha": "1", "siblings": []})

    def answer(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.refuse = {}, 0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_the_folder_arrives_and_a_refused_upload_goes_on(hub, tmp_path):
    (tmp_path / "comfyui").mkdir()
    (tmp_path / "comfyui" / "mine.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\ncard\n", encoding="utf-8")
    (tmp_path / ".export").touch()
    hub.refuse = 1
    with pytest.raises(UserError, match=r"push to org/mine failed \(.*is whole; check the network and the login"):
        upload(tmp_path, "org/mine")
    assert not hub.files
    assert upload(tmp_path, "org/mine") == "pushed to org/mine: https://huggingface.co/org/mine/commit/1"
    assert hub.files["comfyui/mine.safetensors"] == b"weights"
    assert set(hub.files) == {"README.md", "comfyui/mine.safetensors"}


def test_without_a_network_the_folder_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "README.md").write_text("card\n", encoding="utf-8")
    with pytest.raises(UserError, match="give the same command again"):
        upload(tmp_path, "org/mine")
    assert (tmp_path / "README.md").exists()
    assert repository("hub:org/my_lora-4x.1") == "org/my_lora-4x.1"
    with pytest.raises(UserError, match="push is 'mine', expected hub:<organisation>/<name>"):
        repository("mine")
