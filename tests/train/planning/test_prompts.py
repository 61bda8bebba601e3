"""What encodes prompts before the first step is counted: numbers of real architectures, and bytes that really load."""

from dataclasses import replace

import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLMiniMaxH3,
    AutoencoderKLMochi,
    AutoencoderKLWan,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from data.encoders import encoder_class, load_encoder
from data.encoders.base import EncoderSettings
from data.encoders.minimax_h3 import first_layers
from tests.helpers.tiny_models import (
    save_hunyuan,
    save_hunyuan15,
    save_minimax_h3,
    save_mochi,
    save_wan,
    save_wan_5b,
)
from train.config.compose import compose_run, finish
from train.planning import GIB, GPUS, Budget, Gpu, Machine, best, plan_table
from train.planning.prompts import EncoderMemory

XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
OF_5B = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "temperal_downsample": [False, True, True],
    "in_channels": 12, "out_channels": 12, "is_residual": True, "patch_size": 2,
}  # fmt: skip
QWEN3_VL = Qwen3VLConfig(
    text_config={
        "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
    },
    vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 5120},
)  # fmt: skip


def umt5():
    return UMT5EncoderModel(UMT5Config(vocab_size=256384, **XXL))


def qwen3_vl():
    return first_layers(Qwen3VLForConditionalGeneration(QWEN3_VL))


def llama():
    return LlamaModel(
        LlamaConfig(vocab_size=128320, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                    num_attention_heads=32, num_key_value_heads=8)
    )  # fmt: skip


def clip_l():
    return CLIPTextModel(
        CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                       num_attention_heads=12)
    )  # fmt: skip


def clip_h():
    return CLIPVisionModel(
        CLIPVisionConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                         image_size=224, patch_size=14)
    )  # fmt: skip


def qwen25_vl():
    return Qwen2_5_VLTextModel(
        Qwen2_5_VLTextConfig(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                             num_attention_heads=28, num_key_value_heads=4)
    )  # fmt: skip


def byt5():
    return T5EncoderModel(
        T5Config(vocab_size=1510, d_model=1472, d_kv=64, d_ff=3584, num_layers=12, num_heads=6,
                 feed_forward_proj="gated-gelu")
    )  # fmt: skip


def siglip():
    return SiglipVisionModel(
        SiglipVisionConfig(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
                           image_size=384, patch_size=14)
    )  # fmt: skip


def t5():
    return T5EncoderModel(T5Config(vocab_size=32128, **XXL))


PUBLISHED = {
    "wan": {"vae": (AutoencoderKLWan,), "text": (umt5,), "image": (clip_h,)},
    "wan22_5b": {"vae": (lambda: AutoencoderKLWan(**OF_5B),), "text": (umt5,), "image": (clip_h,)},
    "hunyuan": {"vae": (AutoencoderKLHunyuanVideo,), "text": (llama, clip_l)},
    "hunyuan15": {"vae": (AutoencoderKLHunyuanVideo15,), "text": (qwen25_vl, byt5), "image": (siglip,)},
    "mochi": {"vae": (AutoencoderKLMochi,), "text": (t5,)},
    "minimax_h3": {"vae": (AutoencoderKLMiniMaxH3,), "text": (qwen3_vl,)},
}


def size_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_published_encoders_have_as_many_numbers(family):
    with torch.device("meta"):
        found = {kind: sum(size_of(make()) for make in makers) for kind, makers in PUBLISHED[family].items()}
    assert encoder_class(family).numbers == found


@pytest.mark.parametrize(
    ("family", "save", "image"),
    [
        ("wan", save_wan, False), ("wan", save_wan, True), ("wan22_5b", save_wan_5b, False),
        ("hunyuan", save_hunyuan, False), ("hunyuan15", save_hunyuan15, False), ("hunyuan15", save_hunyuan15, True),
        ("mochi", save_mochi, False), ("minimax_h3", save_minimax_h3, False),
    ],
)  # fmt: skip
def test_of_a_folder_what_is_loaded_is_counted(tmp_path, family, save, image):
    folder = save(tmp_path, image=True) if image else save(tmp_path)
    given = EncoderSettings(folder, torch.device("cpu"), torch.float32, torch.bfloat16, image_to_video=image)
    encoder = load_encoder(family, given)
    parts = [encoder.vae, getattr(encoder, "layers", None)]
    pipeline = (getattr(encoder, "images", None) or encoder.pipeline) if hasattr(encoder, "pipeline") else None
    names = ("text_encoder", "text_encoder_2", "image_encoder")
    parts += [getattr(pipeline, name, None) for name in names]
    vae, *others = [sum(p.nbytes for p in part.parameters()) for part in parts if part is not None]
    counted = encoder_class(family).count(folder, image=image)
    assert 4 * counted["vae"] == vae
    assert 2 * (counted["text"] + counted.get("image", 0)) == sum(others)


def planned(gpu=GPUS["h200"], gpus=1, **words):
    given = {"conf": "minimax_h3_2x", "validation": "samples", "optim__global_batch": 1, **words}
    given |= {"trainer__devices": gpus, "parallel__sequence": gpus}
    config = finish(compose_run({key.replace("__", "."): str(value) for key, value in given.items()}))
    return Budget.of(config, Machine(gpu, gpus, 1, gpus * 128 * GIB))


def test_minimax_h3s_text_encoder_stands_beside_the_weights_before_the_first_step():
    """50.3 GB of Qwen3-VL in bf16 and 10.4 GB of the VAE in fp32, 66 of the model, and a LoRA without gradients."""
    budget = planned()
    assert budget.encoders == EncoderMemory(text=2 * 25_157_829_120, vae=4 * 2_603_868_984)
    lora = 3 * 4 * budget.sizes.trained  # Adam's moments too, as a resumed run has them
    assert budget.gpu_encoding == pytest.approx(budget.sizes.weights + lora + 50.3157e9 + 10.4155e9, rel=1e-5)
    table = plan_table(budget)
    assert f"  first, while prompts are encoded       {budget.gpu_encoding / GIB:.1f}" in table
    assert "text encoders of 46.9 GiB and a VAE of 9.7 beside the weights; what the VAE computes with" in table


def test_a_card_that_has_no_room_for_it_streams_the_weights():
    """A step fits on two cards of 80 GB that each hold half of the weights; encoding beside that half does not."""
    plain, budget = (planned(GPUS["h100"], 2, validation__samples_every=every) for every in (0, 250))
    assert plain.gpu_encoding == 0 and "encoded" not in plan_table(plain)
    fastest = best(plain, 1).budget
    assert not fastest.config.parallel.offload_weights
    with_clips = replace(fastest, config=replace(fastest.config, validation=budget.config.validation))
    assert with_clips.gpu_memory == fastest.gpu_memory
    assert with_clips.misfit == (
        f"encoding validation.prompts before the first step needs {with_clips.gpu_encoding / GIB:.1f} GiB, an NVIDIA "
        f"H100 has {fastest.usable / GIB:.1f} GiB for it (validation.samples_every=0 encodes none)"
    )
    streams = best(budget, 1).budget
    assert streams.config.parallel.offload_weights
    assert streams.misfit is None and 0 < streams.gpu_encoding <= streams.usable


def test_an_image_encoder_counts_where_prompts_have_images():
    given = {"conf": "wan_i2v_2x"}
    plain, images = (planned(**given, validation__images=words).encoders for words in ("[]", "[a.png, b.png]"))
    assert plain == EncoderMemory(text=2 * 5_680_910_336, vae=4 * 126_892_531)
    assert images == EncoderMemory(text=plain.text + 2 * 630_766_080, vae=plain.vae)
    own = planned(conf="wan22_5b_4x", validation__images="[a.png, b.png]").encoders
    assert own == EncoderMemory(text=plain.text, vae=4 * 704_688_668)  # the model goes on from the frame itself


def test_ranks_on_a_cpu_share_what_one_of_them_loads_in_fp32():
    machine = Machine(Gpu("cpu", 512 * GIB), 2, 1, 1024 * GIB)
    budget = replace(planned(conf="mochi_2x"), machine=machine)
    assert budget.encoders.text == 4 * 4_762_310_656
    assert budget.gpu_encoding == pytest.approx(
        budget.weights + budget.training - budget.gradients + budget.encoders.all / 2
    )
