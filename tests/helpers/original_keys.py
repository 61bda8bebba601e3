"""The tensors of the checkpoints that the families were released in: names and shapes, as data.

`tests/train/lora/test_names.py` holds this list to diffusers' checkpoint converters and model classes; HunyuanVideo-1.5
has a converter in its scripts alone (convert_hunyuan_video1_5_to_diffusers.py), which takes just these. ``{n}``
counts blocks; a name without an ending has a weight and a bias, whose shape is the weight's first side.
"""

from __future__ import annotations

# D width, F feed-forward width, T text width, I image width, C channels in, O channels out
WAN = """
patch_embedding D,C,1,2,2
text_embedding.0 D,T
text_embedding.2 D,D
time_embedding.0 D,256
time_embedding.2 D,D
time_projection.1 6D,D
blocks.{n}.modulation! 1,6,D
blocks.{n}.self_attn.q D,D
blocks.{n}.self_attn.k D,D
blocks.{n}.self_attn.v D,D
blocks.{n}.self_attn.o D,D
blocks.{n}.self_attn.norm_q.weight! D
blocks.{n}.self_attn.norm_k.weight! D
blocks.{n}.norm3 D
blocks.{n}.cross_attn.q D,D
blocks.{n}.cross_attn.k D,D
blocks.{n}.cross_attn.v D,D
blocks.{n}.cross_attn.o D,D
blocks.{n}.cross_attn.norm_q.weight! D
blocks.{n}.cross_attn.norm_k.weight! D
blocks.{n}.ffn.0 F,D
blocks.{n}.ffn.2 D,F
head.head 4O,D
head.modulation! 1,2,D
"""
WAN_IMAGE = """
img_emb.proj.0 I
img_emb.proj.1 I,I
img_emb.proj.3 D,I
img_emb.proj.4 D
blocks.{n}.cross_attn.k_img D,D
blocks.{n}.cross_attn.v_img D,D
blocks.{n}.cross_attn.norm_k_img.weight! D
"""
HUNYUAN = """
img_in.proj D,C,1,2,2
time_in.mlp.0 D,256
time_in.mlp.2 D,D
vector_in.in_layer D,768
vector_in.out_layer D,D
guidance_in.mlp.0 D,256
guidance_in.mlp.2 D,D
txt_in.input_embedder D,T
txt_in.t_embedder.mlp.0 D,256
txt_in.t_embedder.mlp.2 D,D
txt_in.c_embedder.linear_1 D,T
txt_in.c_embedder.linear_2 D,D
txt_in.individual_token_refiner.blocks.{r}.norm1 D
txt_in.individual_token_refiner.blocks.{r}.self_attn_qkv 3D,D
txt_in.individual_token_refiner.blocks.{r}.self_attn_proj D,D
txt_in.individual_token_refiner.blocks.{r}.norm2 D
txt_in.individual_token_refiner.blocks.{r}.mlp.fc1 F,D
txt_in.individual_token_refiner.blocks.{r}.mlp.fc2 D,F
txt_in.individual_token_refiner.blocks.{r}.adaLN_modulation.1 2D,D
double_blocks.{n}.img_mod.linear 6D,D
double_blocks.{n}.img_attn_qkv 3D,D
double_blocks.{n}.img_attn_q_norm.weight! 128
double_blocks.{n}.img_attn_k_norm.weight! 128
double_blocks.{n}.img_attn_proj D,D
double_blocks.{n}.img_mlp.fc1 F,D
double_blocks.{n}.img_mlp.fc2 D,F
double_blocks.{n}.txt_mod.linear 6D,D
double_blocks.{n}.txt_attn_qkv 3D,D
double_blocks.{n}.txt_attn_q_norm.weight! 128
double_blocks.{n}.txt_attn_k_norm.weight! 128
double_blocks.{n}.txt_attn_proj D,D
double_blocks.{n}.txt_mlp.fc1 F,D
double_blocks.{n}.txt_mlp.fc2 D,F
single_blocks.{s}.linear1 3D+F,D
single_blocks.{s}.linear2 D,D+F
single_blocks.{s}.q_norm.weight! 128
single_blocks.{s}.k_norm.weight! 128
single_blocks.{s}.modulation.linear 3D,D
final_layer.linear 4O,D
final_layer.adaLN_modulation.1 2D,D
"""
# B byT5's width, I the image encoder's
HUNYUAN15 = """
img_in.proj D,C,1,1,1
time_in.mlp.0 D,256
time_in.mlp.2 D,D
txt_in.input_embedder D,T
txt_in.t_embedder.mlp.0 D,256
txt_in.t_embedder.mlp.2 D,D
txt_in.c_embedder.linear_1 D,T
txt_in.c_embedder.linear_2 D,D
txt_in.individual_token_refiner.blocks.{r}.norm1 D
txt_in.individual_token_refiner.blocks.{r}.self_attn_qkv 3D,D
txt_in.individual_token_refiner.blocks.{r}.self_attn_proj D,D
txt_in.individual_token_refiner.blocks.{r}.norm2 D
txt_in.individual_token_refiner.blocks.{r}.mlp.fc1 F,D
txt_in.individual_token_refiner.blocks.{r}.mlp.fc2 D,F
txt_in.individual_token_refiner.blocks.{r}.adaLN_modulation.1 2D,D
byt5_in.layernorm B
byt5_in.fc1 2048,B
byt5_in.fc2 2048,2048
byt5_in.fc3 D,2048
vision_in.proj.0 I
vision_in.proj.1 I,I
vision_in.proj.3 D,I
vision_in.proj.4 D
cond_type_embedding.weight! 3,D
double_blocks.{n}.img_mod.linear 6D,D
double_blocks.{n}.img_attn_q D,D
double_blocks.{n}.img_attn_k D,D
double_blocks.{n}.img_attn_v D,D
double_blocks.{n}.img_attn_q_norm.weight! 128
double_blocks.{n}.img_attn_k_norm.weight! 128
double_blocks.{n}.img_attn_proj D,D
double_blocks.{n}.img_mlp.fc1 F,D
double_blocks.{n}.img_mlp.fc2 D,F
double_blocks.{n}.txt_mod.linear 6D,D
double_blocks.{n}.txt_attn_q D,D
double_blocks.{n}.txt_attn_k D,D
double_blocks.{n}.txt_attn_v D,D
double_blocks.{n}.txt_attn_q_norm.weight! 128
double_blocks.{n}.txt_attn_k_norm.weight! 128
double_blocks.{n}.txt_attn_proj D,D
double_blocks.{n}.txt_mlp.fc1 F,D
double_blocks.{n}.txt_mlp.fc2 D,F
final_layer.linear O,D
final_layer.adaLN_modulation.1 2D,D
"""
# E width of the text stream, G its feed-forward width; F and G are doubled by the gate; l is the last block alone
MOCHI = """
x_embedder.proj D,C,2,2
t_embedder.mlp.0 D,256
t_embedder.mlp.2 D,D
t5_y_embedder.to_kv 2T,T
t5_y_embedder.to_q T,T
t5_y_embedder.to_out D,T
t5_yproj E,T
pos_frequencies! 3,24,64
blocks.{n}.mod_x 4D,D
blocks.{a}.mod_y 4E,D
blocks.{l}.mod_y E,D
blocks.{n}.attn.qkv_x.weight! 3D,D
blocks.{n}.attn.q_norm_x.weight! 128
blocks.{n}.attn.k_norm_x.weight! 128
blocks.{n}.attn.proj_x D,D
blocks.{n}.attn.qkv_y.weight! 3D,E
blocks.{n}.attn.q_norm_y.weight! 128
blocks.{n}.attn.k_norm_y.weight! 128
blocks.{a}.attn.proj_y E,D
blocks.{n}.mlp_x.w1.weight! 2F,D
blocks.{n}.mlp_x.w2.weight! D,F
blocks.{a}.mlp_y.w1.weight! 2G,E
blocks.{a}.mlp_y.w2.weight! E,G
final_layer.mod 2D,D
final_layer.linear 4O,D
"""
# D the hidden states, A all heads, M the timestep; q, k and v as ComfyUI orders them
MINIMAX_H3 = """
video_patch_proj D,4C
audio_patch_proj D,O
condition_proj D,T
time_embedder.proj_in D,256
time_embedder.proj_out M,D
token_refiner.final_norm.weight! D
token_refiner.blocks.{r}.norm1.weight! D
token_refiner.blocks.{r}.attn.qkv_proj.weight! 3A,D
token_refiner.blocks.{r}.attn.q_norm.weight! 128
token_refiner.blocks.{r}.attn.k_norm.weight! 128
token_refiner.blocks.{r}.attn.out_proj.weight! D,A
token_refiner.blocks.{r}.norm2.weight! D
token_refiner.blocks.{r}.mlp.fc1.weight! 2F,D
token_refiner.blocks.{r}.mlp.fc2.weight! D,F
blocks.{n}.norm1.weight! D
blocks.{n}.attn.qkv_proj.weight! 3A,D
blocks.{n}.attn.q_norm.weight! 128
blocks.{n}.attn.k_norm.weight! 128
blocks.{n}.attn.out_proj.weight! D,A
blocks.{n}.norm2.weight! D
blocks.{n}.mlp.fc1.weight! 2F,D
blocks.{n}.mlp.fc2.weight! D,F
blocks.{n}.adaln_proj.linear 18D,M
final_layer.norm.weight! D
final_layer.adaln_proj.linear 2D,M
final_layer.video_out 4C,D
final_layer.audio_out O,D
"""
_WAN_14B = {"D": 5120, "F": 13824, "T": 4096, "C": 16, "O": 16, "n": range(40)}
CHECKPOINTS: dict[str, tuple[str, dict]] = {
    "Wan2.1-T2V-14B": (WAN, _WAN_14B),
    "Wan2.1-T2V-1.3B": (WAN, {**_WAN_14B, "D": 1536, "F": 8960, "n": range(30)}),
    "Wan2.1-I2V-14B": (WAN + WAN_IMAGE, {**_WAN_14B, "C": 36, "I": 1280}),
    "Wan2.2-T2V-A14B": (WAN, _WAN_14B),
    "Wan2.2-TI2V-5B": (WAN, {**_WAN_14B, "D": 3072, "F": 14336, "C": 48, "O": 48, "n": range(30)}),
    "HunyuanVideo": (
        HUNYUAN,
        {"D": 3072, "F": 12288, "T": 4096, "C": 16, "O": 16, "r": range(2), "n": range(20), "s": range(40)},
    ),
    "HunyuanVideo-1.5": (
        HUNYUAN15,
        {"D": 2048, "F": 8192, "T": 3584, "B": 1472, "I": 1152, "C": 65, "O": 32, "r": range(2), "n": range(54)},
    ),
    "MiniMax-H3": (
        MINIMAX_H3,
        {"D": 5376, "A": 7168, "F": 14336, "M": 2688, "T": 5120, "C": 24, "O": 32, "r": range(2), "n": range(50)},
    ),
    "mochi-1-preview": (
        MOCHI,
        {"D": 3072, "F": 8192, "E": 1536, "G": 4096, "T": 4096, "C": 12, "O": 12}
        | {"n": range(48), "a": range(47), "l": range(47, 48)},
    ),
}


def original_keys(name: str) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of a public checkpoint."""
    lines, sizes = CHECKPOINTS[name]
    found = {}
    for line in filter(None, lines.splitlines()):
        key, sides = line.split()
        shape = tuple(sum(_product(term, sizes) for term in side.split("+")) for side in sides.split(","))
        counter = next((letter for letter in "nrsal" if f"{{{letter}}}" in key), None)
        for number in sizes[counter] if counter else [0]:
            full = key.replace(f"{{{counter}}}", str(number))
            if full.endswith("!"):
                found[full[:-1]] = shape
            else:
                found |= {f"{full}.weight": shape, f"{full}.bias": shape[:1]}
    return found


def _product(term: str, sizes: dict) -> int:
    if term.isdigit():
        return int(term)
    factor, letter = term[:-1], term[-1]
    return int(factor or 1) * sizes[letter]
