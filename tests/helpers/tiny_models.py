"""Tiny VAEs and text encoders in the families' real classes, saved in the layout of a diffusers folder."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLMiniMaxH3,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    HunyuanVideo15Pipeline,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from data.encoders.hunyuan import CROPPED, TEMPLATE
from data.encoders.tokens import PLAIN

WORDS = ["a", "red", "ball", "moving", "bar", "clip", "video", "of", "the", "and", "&", *PLAIN.split()]


def _tokenizer(length: int, side: str = "right", prefix: tuple[str, int] | None = None) -> Any:
    """Words of letters; pad 0, end 1, unknown 2, start 3; no end where a `prefix` has to have so many tokens."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "<s>", *dict.fromkeys(WORDS)])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    if prefix is not None:
        words.add_special_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
        starts = "<s> " * (prefix[1] - len(words.encode(prefix[0], add_special_tokens=False)))
        words.post_processor = processors.TemplateProcessing(single=f"{starts}$A", special_tokens=[("<s>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", bos_token="<s>",
        model_max_length=length, padding_side=side,
    )  # fmt: skip


def _random(model: torch.nn.Module) -> Any:
    """The model with every parameter drawn, so that no bias or norm is trivial."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def save_wan(folder: Path, seed: int = 0, *, image: bool = False) -> Path:
    """A Wan folder; `image` adds what image-to-video needs."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    config = UMT5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, pad_token_id=0, decoder_start_token_id=0
    )
    _random(vae).save_pretrained(folder / "vae")
    _random(UMT5EncoderModel(config)).save_pretrained(folder / "text_encoder")
    _tokenizer(512).save_pretrained(folder / "tokenizer")
    if image:
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
        _random(CLIPVisionModel(vision)).save_pretrained(folder / "image_encoder")
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
            folder / "image_processor"
        )
    return folder


def save_wan_5b(folder: Path, seed: int = 0) -> Path:
    """A Wan2.2-TI2V-5B folder: its VAE has residual blocks, a patchifier and 48 channels."""
    save_wan(folder, seed)
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=48, dim_mult=[1, 2, 2, 2], num_res_blocks=1, is_residual=True,
        temperal_downsample=[False, True, True], in_channels=12, out_channels=12, patch_size=2,
        scale_factor_temporal=4, scale_factor_spatial=16,
        latents_mean=torch.linspace(-0.5, 0.5, 48).tolist(), latents_std=torch.linspace(0.5, 1.5, 48).tolist(),
    )  # fmt: skip
    _random(vae).save_pretrained(folder / "vae")
    return folder


def save_hunyuan(folder: Path, seed: int = 0) -> Path:
    """A HunyuanVideo folder."""
    torch.manual_seed(seed)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    llama = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=3, eos_token_id=1,
    )  # fmt: skip
    clip = CLIPTextConfig(
        vocab_size=64, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, pad_token_id=0, bos_token_id=3, eos_token_id=1,
    )  # fmt: skip
    _random(vae).save_pretrained(folder / "vae")
    _random(LlamaModel(llama)).save_pretrained(folder / "text_encoder")
    _random(CLIPTextModel(clip)).save_pretrained(folder / "text_encoder_2")
    _tokenizer(512, prefix=(TEMPLATE.partition("{}")[0], CROPPED)).save_pretrained(folder / "tokenizer")
    _tokenizer(77).save_pretrained(folder / "tokenizer_2")
    return folder


CHAT = (
    "{{ '<s> ' * FILLED }}{% for message in messages %}<|im_start|> {{ message.role }} {{ message.content }} "
    "<|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def _chat_tokenizer(before: int) -> Any:
    """One whose chat has so many tokens before the caption, and three after it."""
    words = _tokenizer(2048).backend_tokenizer
    words.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    words.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    words.add_tokens(["system", "user", "assistant"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", model_max_length=2048, padding_side="right"
    )
    system = inspect.signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters["system_message"].default
    chat = [{"role": "system", "content": system}, {"role": "user", "content": "ball"}]
    tokenizer.chat_template = CHAT.replace("FILLED", "0")
    shown = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    filled = before - (len(shown["input_ids"]) - 4)
    tokenizer.chat_template = CHAT.replace("FILLED", str(filled))
    return tokenizer


def save_hunyuan15(folder: Path, seed: int = 0, *, image: bool = False) -> Path:
    """A HunyuanVideo-1.5 folder; `image` adds what image-to-video needs, with as many tokens as the real one's."""
    torch.manual_seed(seed)
    vae = AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1)
    qwen = Qwen2_5_VLTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, pad_token_id=0, bos_token_id=3, eos_token_id=1,
        rope_scaling={"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]},
    )  # fmt: skip
    byt5 = T5Config(vocab_size=384, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=4, pad_token_id=0)
    _random(vae).save_pretrained(folder / "vae")
    _random(Qwen2_5_VLTextModel(qwen)).save_pretrained(folder / "text_encoder")
    _random(T5EncoderModel(byt5)).save_pretrained(folder / "text_encoder_2")
    _chat_tokenizer(108).save_pretrained(folder / "tokenizer")
    ByT5Tokenizer().save_pretrained(folder / "tokenizer_2")
    if image:
        vision = SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=54,
            patch_size=2,
        )
        _random(SiglipVisionModel(vision)).save_pretrained(folder / "image_encoder")
        SiglipImageProcessor(size={"height": 54, "width": 54}).save_pretrained(folder / "feature_extractor")
    return folder


def save_minimax_h3(folder: Path, seed: int = 0, *, layers: int = 52, **other: Any) -> Path:
    """A MiniMax-H3 folder, its text encoder with more layers than the text goes through; `other` is of the VAE."""
    torch.manual_seed(seed)
    vae = AutoencoderKLMiniMaxH3(
        latent_channels=4, block_out_channels=(8,) * 6, layers_per_block=1, norm_num_groups=4, decoder_num_layers=2,
        decoder_num_attention_heads=2, decoder_attention_head_dim=8, latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.9, 1.1, 1.2, 0.8], **other,
    )  # fmt: skip
    for name, parameter in vae.named_parameters():
        if name.endswith(("scale1", "scale2")):  # zeros, by which the decoder's layers would do nothing
            parameter.data.fill_(1.0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocab={letter: n for n, letter in enumerate(letters)}, model_max_length=262144)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24, "patch_size": 4,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    _random(vae).save_pretrained(folder / "vae")
    qwen = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision))
    _random(qwen).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def save_mochi(folder: Path, seed: int = 0, *, force_zeros: bool = False) -> Path:
    """A Mochi folder."""
    torch.manual_seed(seed)
    vae = AutoencoderKLMochi(
        latent_channels=4, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1, 1, 1, 1, 1), latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.9, 1.1, 1.2, 0.8],
    )  # fmt: skip
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, pad_token_id=0)
    _random(vae).save_pretrained(folder / "vae")
    _random(T5EncoderModel(config)).save_pretrained(folder / "text_encoder")
    _tokenizer(256).save_pretrained(folder / "tokenizer")
    index = {"_class_name": "MochiPipeline", "force_zeros_for_empty_prompt": force_zeros}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def save_llava(folder: Path, seed: int = 0) -> Path:
    """A LLaVA folder: a vision-language model with its processor, which answers in the words of `WORDS`."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer(512)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, eos_token_id=1, bos_token_id=3,
    )  # fmt: skip
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token, vision_feature_layer=-1)
    model = _random(LlavaForConditionalGeneration(config))
    model.generation_config.suppress_tokens = [image_token]
    model.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), tokenizer, patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, image_token="<image>",
        chat_template=(
            "{% for message in messages %}user {% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
            "{% if add_generation_prompt %} assistant{% endif %}"
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder
