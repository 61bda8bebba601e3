"""Encoding on a GPU: the CPU's latents and embeddings, and a memory that follows the clip alone at the real size."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from data.encoders import load_encoder
from data.encoders.base import EncoderSettings
from tests.helpers.tiny_models import save_hunyuan, save_hunyuan15, save_mochi, save_wan, save_wan_5b

SAVE = {
    "wan": (save_wan, 9), "wan22_5b": (save_wan_5b, 9), "hunyuan": (save_hunyuan, 9), "hunyuan15": (save_hunyuan15, 9),
    "mochi": (save_mochi, 13),
}  # fmt: skip


def load(family, folder, device, **more):
    return load_encoder(family, EncoderSettings(folder, torch.device(device), torch.float32, torch.float32, **more))


def clip(frames, height, width):
    return torch.randint(256, (frames, height, width, 3), dtype=torch.uint8).numpy()


@pytest.mark.parametrize("family", sorted(SAVE))
def test_a_gpu_encodes_what_the_cpu_encodes(tmp_path, family):
    save, frames = SAVE[family]
    folder, video = save(tmp_path / family), clip(frames, 64, 96)
    expected, found = load(family, folder, "cpu"), load(family, folder, "cuda")
    latent = found.encode(video)
    torch.testing.assert_close(latent.float(), expected.encode(video).float(), rtol=2e-2, atol=2e-2)
    assert found.decode(latent).shape == video.shape
    for name, text in expected.prompt("a red ball").text.items():
        other = found.prompt("a red ball").text[name]
        assert torch.equal(other.mask, text.mask)
        torch.testing.assert_close(other.tokens.float(), text.tokens.float(), rtol=2e-2, atol=2e-2)


def test_the_memory_of_encoding_at_720p_follows_the_clip_alone(tmp_path):
    """Wan's VAE at its real size: a longer clip takes more only for its own pixels, float32, and its latent."""
    torch.manual_seed(0)
    AutoencoderKLWan().save_pretrained(tmp_path / "vae")
    encoder = load("wan", tmp_path, "cuda", vae_only=True)
    beside = []
    for frames in (17, 81, 321):
        video = clip(frames, 720, 1280)
        torch.cuda.reset_peak_memory_stats()
        assert encoder.encode(video).isfinite().all()
        peak, pixels = torch.cuda.max_memory_allocated(), 4 * video.size
        print(f"{frames} frames of 720 x 1280: {peak / 2**30:.1f} GiB, {pixels / 2**30:.1f} of them the clip")
        beside.append(peak - pixels)
    assert max(beside) < 1.1 * min(beside)
