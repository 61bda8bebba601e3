"""What the layers of the original checkpoints are called, and which layers of the diffusers models they hold: a table a
model class.

Some layers are several of diffusers' in one matrix, stacked along the output rows: q, k and v, or q, k, v and the first
feed-forward layer. `tests/train/lora/test_names.py` holds the tables to diffusers' own converters.
"""

# For each class: prefix in the original checkpoint, prefix in diffusers ({} is the number of a layer), then lines of
# the original name and the diffusers layers that it holds; * marks those whose two halves of rows change places.
TABLES: dict[str, list[tuple[str, str, str]]] = {
    "WanTransformer3DModel": [
        (
            "",
            "",
            """
            patch_embedding    patch_embedding
            time_embedding.0   condition_embedder.time_embedder.linear_1
            time_embedding.2   condition_embedder.time_embedder.linear_2
            time_projection.1  condition_embedder.time_proj
            text_embedding.0   condition_embedder.text_embedder.linear_1
            text_embedding.2   condition_embedder.text_embedder.linear_2
            img_emb.proj.0     condition_embedder.image_embedder.norm1
            img_emb.proj.1     condition_embedder.image_embedder.ff.net.0.proj
            img_emb.proj.3     condition_embedder.image_embedder.ff.net.2
            img_emb.proj.4     condition_embedder.image_embedder.norm2
            head.head          proj_out
            """,
        ),
        (
            "blocks.{}.",
            "blocks.{}.",
            """
            self_attn.q            attn1.to_q
            self_attn.k            attn1.to_k
            self_attn.v            attn1.to_v
            self_attn.o            attn1.to_out.0
            self_attn.norm_q       attn1.norm_q
            self_attn.norm_k       attn1.norm_k
            cross_attn.q           attn2.to_q
            cross_attn.k           attn2.to_k
            cross_attn.v           attn2.to_v
            cross_attn.o           attn2.to_out.0
            cross_attn.norm_q      attn2.norm_q
            cross_attn.norm_k      attn2.norm_k
            cross_attn.k_img       attn2.add_k_proj
            cross_attn.v_img       attn2.add_v_proj
            cross_attn.norm_k_img  attn2.norm_added_k
            norm3                  norm2
            ffn.0                  ffn.net.0.proj
            ffn.2                  ffn.net.2
            """,
        ),
    ],
    "HunyuanVideoTransformer3DModel": [
        (
            "",
            "",
            """
            img_in.proj                   x_embedder.proj
            time_in.mlp.0                 time_text_embed.timestep_embedder.linear_1
            time_in.mlp.2                 time_text_embed.timestep_embedder.linear_2
            guidance_in.mlp.0             time_text_embed.guidance_embedder.linear_1
            guidance_in.mlp.2             time_text_embed.guidance_embedder.linear_2
            vector_in.in_layer            time_text_embed.text_embedder.linear_1
            vector_in.out_layer           time_text_embed.text_embedder.linear_2
            txt_in.input_embedder         context_embedder.proj_in
            txt_in.t_embedder.mlp.0       context_embedder.time_text_embed.timestep_embedder.linear_1
            txt_in.t_embedder.mlp.2       context_embedder.time_text_embed.timestep_embedder.linear_2
            txt_in.c_embedder.linear_1    context_embedder.time_text_embed.text_embedder.linear_1
            txt_in.c_embedder.linear_2    context_embedder.time_text_embed.text_embedder.linear_2
            final_layer.adaLN_modulation.1  *norm_out.linear
            final_layer.linear            proj_out
            """,
        ),
        (
            "txt_in.individual_token_refiner.blocks.{}.",
            "context_embedder.token_refiner.refiner_blocks.{}.",
            """
            norm1               norm1
            self_attn_qkv       attn.to_q attn.to_k attn.to_v
            self_attn_proj      attn.to_out.0
            norm2               norm2
            mlp.fc1             ff.net.0.proj
            mlp.fc2             ff.net.2
            adaLN_modulation.1  norm_out.linear
            """,
        ),
        (
            "double_blocks.{}.",
            "transformer_blocks.{}.",
            """
            img_mod.linear   norm1.linear
            img_attn_qkv     attn.to_q attn.to_k attn.to_v
            img_attn_q_norm  attn.norm_q
            img_attn_k_norm  attn.norm_k
            img_attn_proj    attn.to_out.0
            img_mlp.fc1      ff.net.0.proj
            img_mlp.fc2      ff.net.2
            txt_mod.linear   norm1_context.linear
            txt_attn_qkv     attn.add_q_proj attn.add_k_proj attn.add_v_proj
            txt_attn_q_norm  attn.norm_added_q
            txt_attn_k_norm  attn.norm_added_k
            txt_attn_proj    attn.to_add_out
            txt_mlp.fc1      ff_context.net.0.proj
            txt_mlp.fc2      ff_context.net.2
            """,
        ),
        (
            "single_blocks.{}.",
            "single_transformer_blocks.{}.",
            """
            linear1            attn.to_q attn.to_k attn.to_v proj_mlp
            linear2            proj_out
            q_norm             attn.norm_q
            k_norm             attn.norm_k
            modulation.linear  norm.linear
            """,
        ),
    ],
    "HunyuanVideo15Transformer3DModel": [
        (
            "",
            "",
            """
            img_in.proj                   x_embedder.proj
            time_in.mlp.0                 time_embed.timestep_embedder.linear_1
            time_in.mlp.2                 time_embed.timestep_embedder.linear_2
            txt_in.input_embedder         context_embedder.proj_in
            txt_in.t_embedder.mlp.0       context_embedder.time_text_embed.timestep_embedder.linear_1
            txt_in.t_embedder.mlp.2       context_embedder.time_text_embed.timestep_embedder.linear_2
            txt_in.c_embedder.linear_1    context_embedder.time_text_embed.text_embedder.linear_1
            txt_in.c_embedder.linear_2    context_embedder.time_text_embed.text_embedder.linear_2
            byt5_in.layernorm             context_embedder_2.norm
            byt5_in.fc1                   context_embedder_2.linear_1
            byt5_in.fc2                   context_embedder_2.linear_2
            byt5_in.fc3                   context_embedder_2.linear_3
            vision_in.proj.0              image_embedder.norm_in
            vision_in.proj.1              image_embedder.linear_1
            vision_in.proj.3              image_embedder.linear_2
            vision_in.proj.4              image_embedder.norm_out
            cond_type_embedding           cond_type_embed
            final_layer.adaLN_modulation.1  *norm_out.linear
            final_layer.linear            proj_out
            """,
        ),
        (
            "txt_in.individual_token_refiner.blocks.{}.",
            "context_embedder.token_refiner.refiner_blocks.{}.",
            """
            norm1               norm1
            self_attn_qkv       attn.to_q attn.to_k attn.to_v
            self_attn_proj      attn.to_out.0
            norm2               norm2
            mlp.fc1             ff.net.0.proj
            mlp.fc2             ff.net.2
            adaLN_modulation.1  norm_out.linear
            """,
        ),
        (
            "double_blocks.{}.",
            "transformer_blocks.{}.",
            """
            img_mod.linear   norm1.linear
            img_attn_q       attn.to_q
            img_attn_k       attn.to_k
            img_attn_v       attn.to_v
            img_attn_q_norm  attn.norm_q
            img_attn_k_norm  attn.norm_k
            img_attn_proj    attn.to_out.0
            img_mlp.fc1      ff.net.0.proj
            img_mlp.fc2      ff.net.2
            txt_mod.linear   norm1_context.linear
            txt_attn_q       attn.add_q_proj
            txt_attn_k       attn.add_k_proj
            txt_attn_v       attn.add_v_proj
            txt_attn_q_norm  attn.norm_added_q
            txt_attn_k_norm  attn.norm_added_k
            txt_attn_proj    attn.to_add_out
            txt_mlp.fc1      ff_context.net.0.proj
            txt_mlp.fc2      ff_context.net.2
            """,
        ),
    ],
    # q, k and v one behind the other, as ComfyUI and musubi-tuner have them; the released file has them head by head
    "MiniMaxH3Transformer3DModel": [
        (
            "",
            "",
            """
            video_patch_proj               proj_in
            audio_patch_proj               audio_proj_in
            condition_proj                 context_embedder
            time_embedder.proj_in          time_embedder.linear_1
            time_embedder.proj_out         time_embedder.linear_2
            token_refiner.final_norm       token_refiner.final_norm
            final_layer.norm               norm_out.norm
            final_layer.adaln_proj.linear  norm_out.linear
            final_layer.video_out          proj_out
            final_layer.audio_out          audio_proj_out
            """,
        ),
        (
            "token_refiner.blocks.{}.",
            "token_refiner.refiner_blocks.{}.",
            """
            norm1          norm1
            attn.qkv_proj  attn.to_q attn.to_k attn.to_v
            attn.q_norm    attn.norm_q
            attn.k_norm    attn.norm_k
            attn.out_proj  attn.to_out.0
            norm2          norm2
            mlp.fc1        *ff.net.0.proj
            mlp.fc2        ff.net.2
            """,
        ),
        (
            "blocks.{}.",
            "transformer_blocks.{}.",
            """
            norm1              norm1
            attn.qkv_proj      attn.to_q attn.to_k attn.to_v
            attn.q_norm        attn.norm_q
            attn.k_norm        attn.norm_k
            attn.out_proj      attn.to_out.0
            norm2              norm2
            mlp.fc1            *ff.net.0.proj
            mlp.fc2            ff.net.2
            adaln_proj.linear  adaln_proj.linear
            """,
        ),
    ],
    "MochiTransformer3DModel": [
        (
            "",
            "",
            """
            x_embedder.proj       patch_embed.proj
            t_embedder.mlp.0      time_embed.timestep_embedder.linear_1
            t_embedder.mlp.2      time_embed.timestep_embedder.linear_2
            t5_y_embedder.to_kv   time_embed.pooler.to_kv
            t5_y_embedder.to_q    time_embed.pooler.to_q
            t5_y_embedder.to_out  time_embed.pooler.to_out
            t5_yproj              time_embed.caption_proj
            final_layer.mod       *norm_out.linear
            final_layer.linear    proj_out
            """,
        ),
        (
            "blocks.{}.",
            "transformer_blocks.{}.",
            """
            mod_x          norm1.linear
            mod_y          norm1_context.linear
            mod_y          norm1_context.linear_1
            attn.qkv_x     attn1.to_q attn1.to_k attn1.to_v
            attn.q_norm_x  attn1.norm_q
            attn.k_norm_x  attn1.norm_k
            attn.proj_x    attn1.to_out.0
            attn.qkv_y     attn1.add_q_proj attn1.add_k_proj attn1.add_v_proj
            attn.q_norm_y  attn1.norm_added_q
            attn.k_norm_y  attn1.norm_added_k
            attn.proj_y    attn1.to_add_out
            mlp_x.w1       *ff.net.0.proj
            mlp_x.w2       ff.net.2
            mlp_y.w1       *ff_context.net.0.proj
            mlp_y.w2       ff_context.net.2
            """,
        ),
    ],
}

# What lies in no layer: the name in the original checkpoint, and in diffusers.
PARAMETERS: dict[str, list[tuple[str, str]]] = {
    "WanTransformer3DModel": [
        ("blocks.{}.modulation", "blocks.{}.scale_shift_table"),
        ("head.modulation", "scale_shift_table"),
    ]
}
MUSUBI_BLOCKS: dict[str, tuple[str, ...]] = {
    "WanTransformer3DModel": ("blocks.",),
    "HunyuanVideoTransformer3DModel": ("double_blocks.", "single_blocks."),
    "HunyuanVideo15Transformer3DModel": ("double_blocks.",),
    "MiniMaxH3Transformer3DModel": ("blocks.",),
}
"""What the names of the layers start with that musubi-tuner reads of a LoRA; Mochi it does not know."""
