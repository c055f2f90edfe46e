"""The tensors that tell published models and their parts apart, by architecture and layout, as tiny as they can be."""

from __future__ import annotations

from tests.models_registry.conftest import FLUX, SD3


def prefixed(prefix, tensors):
    return {f"{prefix}{name}": shape for name, shape in tensors.items()}


DIFFUSERS_FLUX = {
    "single_transformer_blocks.0.attn.to_q.weight": (8, 8),
    "time_text_embed.text_embedder.linear_1.weight": (8, 16),
    "context_embedder.weight": (8, 16),
    "x_embedder.weight": (8, 64),
    "transformer_blocks.0.attn.add_q_proj.weight": (8, 8),
    "transformer_blocks.0.attn.to_q.weight": (8, 8),
}
DIFFUSERS_SD3 = {
    "transformer_blocks.0.attn.add_q_proj.weight": (8, 8),
    "context_embedder.weight": (8, 16),
    "pos_embed.proj.weight": (8, 16, 2, 2),
}
CHROMA = {
    "double_blocks.0.img_attn.qkv.weight": (24, 8),
    "distilled_guidance_layer.in_proj.weight": (8, 64),
    "txt_in.weight": (8, 16),
    "img_in.weight": (8, 64),
}
DIFFUSERS_CHROMA = {
    "distilled_guidance_layer.in_proj.weight": (8, 64),
    "single_transformer_blocks.0.attn.to_q.weight": (8, 8),
    "transformer_blocks.0.attn.to_q.weight": (8, 8),
    "transformer_blocks.0.attn.add_q_proj.weight": (8, 8),
    "context_embedder.weight": (8, 16),
    "x_embedder.weight": (8, 64),
}
FLUX2 = {
    "double_blocks.0.img_attn.qkv.weight": (24, 8),
    "double_stream_modulation_img.lin.weight": (48, 8),
    "txt_in.weight": (8, 16),
    "img_in.weight": (8, 128),
}
DIFFUSERS_FLUX2 = {
    "double_stream_modulation_img.linear.weight": (48, 8),
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight": (8, 8),
    "transformer_blocks.0.attn.add_q_proj.weight": (8, 8),
    "context_embedder.weight": (8, 16),
    "x_embedder.weight": (8, 128),
}
HUNYUAN_VIDEO = {
    "txt_in.individual_token_refiner.blocks.0.norm1.weight": (8,),
    "txt_in.input_embedder.weight": (8, 8),
    "vector_in.in_layer.weight": (8, 16),
    "double_blocks.0.img_attn.qkv.weight": (24, 8),
    "img_in.proj.weight": (8, 16, 1, 2, 2),
}
DIFFUSERS_HUNYUAN_VIDEO = {
    "context_embedder.token_refiner.refiner_blocks.0.norm1.weight": (8,),
    "time_text_embed.text_embedder.linear_1.weight": (8, 16),
    "single_transformer_blocks.0.attn.to_q.weight": (8, 8),
    "x_embedder.proj.weight": (8, 16, 1, 2, 2),
}
HUNYUAN_IMAGE = {
    "txt_in.individual_token_refiner.blocks.0.norm1.weight": (8,),
    "txt_in.input_embedder.weight": (8, 8),
    "byt5_in.fc1.weight": (8, 8),
    "img_in.proj.weight": (8, 64, 1, 1),
}
DIFFUSERS_HUNYUAN_IMAGE = {
    "context_embedder.token_refiner.refiner_blocks.0.norm1.weight": (8,),
    "time_guidance_embed.timestep_embedder.linear_1.weight": (8, 16),
    "single_transformer_blocks.0.attn.to_q.weight": (8, 8),
    "x_embedder.proj.weight": (8, 64, 1, 1),
}
AURAFLOW = {
    "double_layers.0.attn.w1q.weight": (8, 8),
    "cond_seq_linear.weight": (8, 16),
    "init_x_linear.weight": (8, 16),
}
DIFFUSERS_AURAFLOW = {
    "joint_transformer_blocks.0.attn.add_q_proj.weight": (8, 8),
    "context_embedder.weight": (8, 16),
    "pos_embed.proj.weight": (8, 16),
}
LUMINA2 = {
    "cap_embedder.1.weight": (8, 16),
    "noise_refiner.0.attention.qkv.weight": (24, 8),
    "layers.0.adaLN_modulation.1.weight": (32, 8),
    "x_embedder.weight": (8, 64),
}
DIFFUSERS_LUMINA2 = {
    "time_caption_embed.caption_embedder.1.weight": (8, 16),
    "noise_refiner.0.attn.to_q.weight": (8, 8),
    "layers.0.norm1.linear.weight": (32, 8),
    "x_embedder.weight": (8, 64),
}
Z_IMAGE = {
    "cap_embedder.1.weight": (8, 16),
    "cap_pad_token": (1, 8),
    "noise_refiner.0.attention.qkv.weight": (24, 8),
    "layers.0.adaLN_modulation.0.weight": (32, 8),
    "x_embedder.weight": (8, 64),
}
DIFFUSERS_Z_IMAGE = {
    "cap_embedder.1.weight": (8, 16),
    "cap_pad_token": (1, 8),
    "noise_refiner.0.attention.to_q.weight": (8, 8),
    "layers.0.adaLN_modulation.0.weight": (32, 8),
    "all_x_embedder.2-1.weight": (8, 64),
}
OMNIGEN2 = {
    "time_caption_embed.caption_embedder.1.weight": (8, 16),
    "noise_refiner.0.attn.to_q.weight": (8, 8),
    "layers.0.norm1.linear.weight": (32, 8),
    "ref_image_patch_embedder.weight": (8, 64),
    "x_embedder.weight": (8, 64),
}
QWEN_IMAGE = {
    "txt_norm.weight": (16,),
    "txt_in.weight": (8, 16),
    "transformer_blocks.0.img_mod.1.weight": (48, 8),
    "transformer_blocks.0.attn.add_q_proj.weight": (8, 8),
    "img_in.weight": (8, 64),
}
HIDREAM = {
    "caption_projection.0.linear.weight": (8, 16),
    "double_stream_blocks.0.block.attn1.to_q.weight": (8, 8),
    "x_embedder.proj.weight": (8, 64),
}
ANIMA = {
    "llm_adapter.blocks.0.cross_attn.q_proj.weight": (8, 8),
    "blocks.0.mlp.layer1.weight": (32, 8),
    "x_embedder.proj.1.weight": (8, 68),
}
LTX = {
    "adaln_single.emb.timestep_embedder.linear_1.weight": (8, 16),
    "transformer_blocks.0.attn2.to_k.weight": (8, 8),
    "patchify_proj.weight": (8, 128),
}
DIFFUSERS_LTX = {
    "time_embed.emb.timestep_embedder.linear_1.weight": (8, 16),
    "caption_projection.linear_1.weight": (8, 16),
    "transformer_blocks.0.attn2.to_k.weight": (8, 8),
    "proj_in.weight": (8, 128),
}


def wan(*, channels=16, latent=16, picture=False):
    tensors = {
        "head.modulation": (1, 2, 8),
        "head.head.weight": (4 * latent, 8),
        "blocks.0.self_attn.q.weight": (8, 8),
        "patch_embedding.weight": (8, channels, 1, 2, 2),
    }
    return tensors | ({"img_emb.proj.1.weight": (8, 8)} if picture else {})


def diffusers_wan(*, channels=16, latent=16, picture=False):
    tensors = {
        "condition_embedder.text_embedder.linear_1.weight": (8, 16),
        "blocks.0.attn1.to_q.weight": (8, 8),
        "proj_out.weight": (4 * latent, 8),
        "patch_embedding.weight": (8, channels, 1, 2, 2),
    }
    return tensors | ({"condition_embedder.image_embedder.ff.net.0.proj.weight": (8, 8)} if picture else {})


TRANSFORMERS = [
    ("sd3", {name.removeprefix("model.diffusion_model."): shape for name, shape in SD3.items()}),
    ("sd3", DIFFUSERS_SD3),
    ("flux", FLUX),
    ("flux", DIFFUSERS_FLUX),
    ("chroma", CHROMA),
    ("chroma", DIFFUSERS_CHROMA),
    ("lumina2", LUMINA2),
    ("lumina2", DIFFUSERS_LUMINA2),
    ("hunyuan_image", HUNYUAN_IMAGE),
    ("hunyuan_image", DIFFUSERS_HUNYUAN_IMAGE),
    ("anima", ANIMA),
    ("wan", wan()),
    ("wan", diffusers_wan()),
    ("wan", wan(channels=36, picture=True)),
    ("wan", diffusers_wan(channels=36, picture=True)),
    ("wan22", wan(channels=48, latent=48)),
    ("wan22", diffusers_wan(channels=48, latent=48)),
    ("wan22", wan(channels=36)),
    ("wan22", diffusers_wan(channels=36)),
    ("qwen_image", QWEN_IMAGE),
    ("hidream", HIDREAM),
    ("z_image", Z_IMAGE),
    ("z_image", DIFFUSERS_Z_IMAGE),
    ("flux2", FLUX2),
    ("flux2", DIFFUSERS_FLUX2),
    ("ltx", LTX),
    ("ltx", DIFFUSERS_LTX),
    ("hunyuan_video", HUNYUAN_VIDEO),
    ("hunyuan_video", DIFFUSERS_HUNYUAN_VIDEO),
    ("auraflow", AURAFLOW),
    ("auraflow", DIFFUSERS_AURAFLOW),
    ("omnigen2", OMNIGEN2),
]


def vae(channels, *, dimensions=4, name="decoder.conv_in.weight"):
    return {"encoder.conv_out.weight": (8, 8), name: (8, channels, *(3,) * (dimensions - 2))}


def clip(width):
    return {
        "text_model.embeddings.token_embedding.weight": (4, width),
        "text_model.encoder.layers.0.self_attn.q_proj.weight": (8, width),
    }


def t5(width, *, is_umt5=False):
    own_bias = {"encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": (4, 4)}
    first = {"encoder.block.0.layer.0.SelfAttention.k.weight": (8, width), "shared.weight": (2, width)}
    return first | (own_bias if is_umt5 else {})


def language_model(width, *more, words=2, prefix="model."):
    """`words` is the size of the vocabulary, `more` what the family has beside the usual."""
    return {
        f"{prefix}embed_tokens.weight": (words, 1),
        f"{prefix}layers.0.input_layernorm.weight": (width,),
        f"{prefix}layers.0.self_attn.q_proj.weight": (1, width),
    } | dict.fromkeys(more, (2,))


GEMMA2 = language_model(2304, "model.layers.0.pre_feedforward_layernorm.weight")
QWEN25_VL = language_model(3584, "model.layers.0.self_attn.k_proj.bias", "visual.blocks.0.norm1.weight")
QWEN3 = language_model(2560, "model.layers.0.self_attn.q_norm.weight")
LLAMA3 = language_model(4096, words=128_256)
PARTS = [
    ("vae", "VAE of Stable Diffusion 1.5, 2, XL and AuraFlow", vae(4)),
    ("vae", "VAE of FLUX.1, Stable Diffusion 3, Z-Image and the like", vae(16)),
    ("vae", "VAE of FLUX.2", vae(32)),
    ("vae", "VAE of HunyuanImage 2.1", vae(64)),
    ("vae", "VAE of Wan 2.1 and Qwen-Image", vae(16, dimensions=5)),
    ("vae", "VAE of Wan 2.2 5B", vae(48, dimensions=5)),
    ("vae", "VAE of Wan 2.1 and Qwen-Image", {"decoder.middle.0.residual.0.gamma": (8, 1, 1, 1)}),
    (
        "vae",
        "VAE of Wan 2.2 5B",
        {
            "decoder.middle.0.residual.0.gamma": (8, 1, 1, 1),
            "decoder.upsamples.0.upsamples.0.residual.2.weight": (8, 8, 3, 3, 3),
        },
    ),
    ("vae", "VAE of HunyuanVideo", vae(16, dimensions=5, name="decoder.conv_in.conv.weight")),
    ("vae", "VAE of LTX-Video", vae(128, dimensions=5, name="decoder.conv_in.conv.weight")),
    ("vae", "VAE", vae(7)),
    ("vae", "VAE of Stable Diffusion 1.5, 2, XL and AuraFlow", prefixed("first_stage_model.", vae(4))),
    ("clip_l", "CLIP-L", clip(768)),
    (
        "clip_l",
        "CLIP-L",
        {"embeddings.token_embedding.weight": (4, 768), "encoder.layers.0.self_attn.q_proj.weight": (8, 768)},
    ),
    ("clip_g", "CLIP-G", clip(1280)),
    (
        "clip_g",
        "CLIP-G",
        {"token_embedding.weight": (4, 1280), "transformer.resblocks.0.attn.in_proj_weight": (24, 1280)},
    ),
    ("t5", "T5-XXL", t5(4096)),
    ("t5", "UMT5-XXL", t5(4096, is_umt5=True)),
    ("t5", "UMT5-XL", t5(2048, is_umt5=True)),
    ("t5", "T5 of width 64", t5(64)),
    (
        "t5",
        "UMT5-XXL",
        {"token_embedding.weight": (2, 4096), "blocks.0.pos_embedding.embedding.weight": (4, 4)},
    ),
    ("byt5", "ByT5 small", t5(1472)),
    ("llm", "Gemma 2 2B", GEMMA2),
    ("llm", "Qwen2.5-VL 7B", QWEN25_VL),
    (
        "llm",
        "Qwen2.5-VL 3B",
        language_model(
            2048,
            "model.language_model.layers.0.self_attn.k_proj.bias",
            "model.visual.blocks.0.norm1.weight",
            prefix="model.language_model.",
        ),
    ),
    ("llm", "Qwen3 4B", QWEN3),
    ("llm", "Qwen3 0.6B", language_model(1024, "layers.0.self_attn.q_norm.weight", prefix="")),
    ("llm", "Llama 3 8B", LLAMA3),
    ("llm", "Mistral 24B", language_model(5120, words=131_072, prefix="language_model.model.")),
    ("llm", "Mistral of width 32", language_model(32)),
]
