"""Where each parameter of the diffusers and transformers modules lies in a single file of the original layout.

Parameters are named as in `module.state_dict()`; the original names here come without the prefix of their part.
Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from lora_trainer.sgm_names import sgm_name


class Source(NamedTuple):
    """A tensor of the file, or a part of one."""

    name: str
    third: int | None = None
    """Query, key and value are one tensor in OpenCLIP, one above the other: 0, 1, 2."""
    is_transposed: bool = False


def unet_sources(parameters: Iterable[str], config: Mapping[str, Any]) -> dict[str, Source]:
    """The original code's names: input_blocks, middle_block, output_blocks."""

    def source(path: str, kind: str) -> Source:
        return Source(f"{sgm_name(path, config)}.{kind}")

    return _sources(parameters, source)


def vae_sources(parameters: Iterable[str], config: Mapping[str, Any]) -> dict[str, Source]:
    """The original code counts the decoder's resolutions from the picture's, diffusers from the latent's."""
    last = len(config["block_out_channels"]) - 1

    def source(path: str, kind: str) -> Source:
        path = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{last - int(match[1])}", path)
        for ours, original in _VAE:
            path = re.sub(ours, original, path)
        return Source(f"{path}.{kind}")

    return _sources(parameters, source)


_VAE = (
    (r"down_blocks\.(\d+)", r"down.\1"),
    (r"\.mid_block\.resnets\.0", ".mid.block_1"),
    (r"\.mid_block\.resnets\.1", ".mid.block_2"),
    (r"\.mid_block\.attentions\.0", ".mid.attn_1"),
    (r"\.resnets\.(\d+)", r".block.\1"),
    (r"\.conv_shortcut$", ".nin_shortcut"),
    (r"\.(down|up)samplers\.0\.conv$", r".\1sample.conv"),
    (r"\.conv_norm_out$", ".norm_out"),
    (r"\.group_norm$", ".norm"),
    (r"\.to_([qkv])$", r".\1"),
    (r"\.to_out\.0$", ".proj_out"),
)


def diffusers_vae_sources(parameters: Iterable[str], names: Collection[str]) -> dict[str, Source]:
    """A VAE under its own names, or with the attention's names of diffusers before 0.17."""

    def source(path: str, kind: str) -> Source:
        before = path
        for now, once in _ATTENTION_BEFORE:
            before = re.sub(now, once, before)
        name = f"{path}.{kind}"
        return Source(name if name in names else f"{before}.{kind}")

    return _sources(parameters, source)


_ATTENTION_BEFORE = (
    (r"\.to_q$", ".query"),
    (r"\.to_k$", ".key"),
    (r"\.to_v$", ".value"),
    (r"\.to_out\.0$", ".proj_attn"),
)


def clip_sources(parameters: Iterable[str], *, is_wrapped: bool = True) -> dict[str, Source]:
    """CLIP as transformers saved it before version 5, which dropped the wrapper `text_model.` from CLIPTextModel."""

    def source(path: str, kind: str) -> Source:
        return Source(f"{'text_model.' * is_wrapped}{path.removeprefix('text_model.')}.{kind}")

    return _sources(parameters, source)


def open_clip_sources(parameters: Iterable[str]) -> dict[str, Source]:
    """OpenCLIP, the text encoder of SD 2 and the second one of SDXL."""
    return _sources(parameters, _open_clip_source)


def _open_clip_source(path: str, kind: str) -> Source:
    path = path.removeprefix("text_model.")
    if path in _OPEN_CLIP_OUTSIDE_LAYERS:
        return _OPEN_CLIP_OUTSIDE_LAYERS[path]._replace(name=_OPEN_CLIP_OUTSIDE_LAYERS[path].name.format(kind=kind))
    _, _, number, inner = path.split(".", 3)
    block = f"transformer.resblocks.{number}"
    if inner in _THIRDS:
        return Source(f"{block}.attn.in_proj_{kind}", third=_THIRDS.index(inner))
    return Source(f"{block}.{_OPEN_CLIP_LAYER[inner]}.{kind}")


_OPEN_CLIP_OUTSIDE_LAYERS = {
    "embeddings.token_embedding": Source("token_embedding.{kind}"),
    "embeddings.position_embedding": Source("positional_embedding"),
    "final_layer_norm": Source("ln_final.{kind}"),
    "text_projection": Source("text_projection", is_transposed=True),
}
_THIRDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def _sources(parameters: Iterable[str], source: Callable[[str, str], Source]) -> dict[str, Source]:
    """`source` takes a module's path and weight or bias."""
    return {name: source(*name.rsplit(".", 1)) for name in parameters}


_EXTRAS = re.compile(
    r"model_ema\.|embedding_manager\.|first_stage_model\.(loss|model_ema)\.|denoiser\.|"
    r"(sqrt_|log_)?(one_minus_)?(recip_|recipm1_)?alphas_cumprod(_prev)?$|posterior_\w+$|betas$|logvar$|scale_factor$|"
    r"global_step$|v_pred$|ztsnr$|(.+\.)?(position_ids|logit_scale|text_projection(\.weight)?)$"
)


def is_extra(name: str) -> bool:
    """Whether a tensor of a single file is known to play no part: averaged weights, the noise schedule, marks."""
    return _EXTRAS.match(name) is not None
