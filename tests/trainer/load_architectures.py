"""Run as a script: small random models with the true topology, from a folder and from a single file; facts as JSON.

Argument: an empty folder to work in. The names of the original layout stand here in tables of their own, so that the
trainer's conversion is compared with something that it did not write itself.
"""

import dataclasses
import importlib.util
import json
import re
import shutil
import socket
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
WORK = Path(sys.argv[1])
FACTS = {"connections": 0}


def start_like_the_trainer():
    spec = importlib.util.spec_from_file_location("start", REPOSITORY / "lora_trainer" / "__main__.py")
    start = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(start)
    start.register_package()
    start.hide_neighbours()
    start.stay_offline()
    start.stay_quiet()


def count_connection(*_):
    FACTS["connections"] += 1
    raise OSError("no network here")


start_like_the_trainer()
socket.socket.connect = count_connection

import diffusers  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection  # noqa: E402
from transformers.initialization import no_init_weights  # noqa: E402

from lora_trainer.architectures import clip, load_base_model, original_names, pipelines, sd, sdxl  # noqa: E402
from lora_trainer.architectures.base import LoadOptions  # noqa: E402
from lora_trainer.errors import TrainerError  # noqa: E402
from lora_trainer.prompts import SamplePrompt  # noqa: E402
from lora_trainer.sampling import draw_sample, make_scheduler  # noqa: E402

torch.set_num_threads(1)
CONFIGS = REPOSITORY / "lora_trainer" / "assets" / "configs"
CAPTION = "a photo of a cat!"
LONG = " ".join(f"word{index % 7}" for index in range(120))  # 240 tokens

# a tenth of the width and less, every layer there
NARROW = {
    "sd15": {
        "unet": {"block_out_channels": [8, 12, 16, 16], "attention_head_dim": 2, "cross_attention_dim": 12},
        "text_encoder": {"hidden_size": 12, "intermediate_size": 24, "num_attention_heads": 2},
    },
    "sd2": {
        "unet": {"block_out_channels": [8, 12, 16, 16], "attention_head_dim": [1, 2, 2, 2], "cross_attention_dim": 12},
        "text_encoder": {"hidden_size": 12, "intermediate_size": 24, "num_attention_heads": 2},
    },
    "sdxl": {
        "unet": {
            "block_out_channels": [8, 12, 16],
            "attention_head_dim": [1, 2, 2],
            "cross_attention_dim": 32,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 20,
        },
        "text_encoder": {"hidden_size": 12, "intermediate_size": 24, "num_attention_heads": 2},
        "text_encoder_2": {
            "hidden_size": 20,
            "intermediate_size": 40,
            "num_attention_heads": 2,
            "projection_dim": 20,
        },
    },
}
for one in NARROW.values():
    one["unet"]["norm_num_groups"] = 4
    one["vae"] = {"block_out_channels": [8, 12, 16, 16], "norm_num_groups": 4}
    one["scheduler"] = {}

# original block = diffusers block
SD_BLOCKS = """
input_blocks.0.0=conv_in
input_blocks.1.0=down_blocks.0.resnets.0   input_blocks.1.1=down_blocks.0.attentions.0
input_blocks.2.0=down_blocks.0.resnets.1   input_blocks.2.1=down_blocks.0.attentions.1
input_blocks.3.0.op=down_blocks.0.downsamplers.0.conv
input_blocks.4.0=down_blocks.1.resnets.0   input_blocks.4.1=down_blocks.1.attentions.0
input_blocks.5.0=down_blocks.1.resnets.1   input_blocks.5.1=down_blocks.1.attentions.1
input_blocks.6.0.op=down_blocks.1.downsamplers.0.conv
input_blocks.7.0=down_blocks.2.resnets.0   input_blocks.7.1=down_blocks.2.attentions.0
input_blocks.8.0=down_blocks.2.resnets.1   input_blocks.8.1=down_blocks.2.attentions.1
input_blocks.9.0.op=down_blocks.2.downsamplers.0.conv
input_blocks.10.0=down_blocks.3.resnets.0  input_blocks.11.0=down_blocks.3.resnets.1
output_blocks.0.0=up_blocks.0.resnets.0    output_blocks.1.0=up_blocks.0.resnets.1
output_blocks.2.0=up_blocks.0.resnets.2    output_blocks.2.1.conv=up_blocks.0.upsamplers.0.conv
output_blocks.3.0=up_blocks.1.resnets.0    output_blocks.3.1=up_blocks.1.attentions.0
output_blocks.4.0=up_blocks.1.resnets.1    output_blocks.4.1=up_blocks.1.attentions.1
output_blocks.5.0=up_blocks.1.resnets.2    output_blocks.5.1=up_blocks.1.attentions.2
output_blocks.5.2.conv=up_blocks.1.upsamplers.0.conv
output_blocks.6.0=up_blocks.2.resnets.0    output_blocks.6.1=up_blocks.2.attentions.0
output_blocks.7.0=up_blocks.2.resnets.1    output_blocks.7.1=up_blocks.2.attentions.1
output_blocks.8.0=up_blocks.2.resnets.2    output_blocks.8.1=up_blocks.2.attentions.2
output_blocks.8.2.conv=up_blocks.2.upsamplers.0.conv
output_blocks.9.0=up_blocks.3.resnets.0    output_blocks.9.1=up_blocks.3.attentions.0
output_blocks.10.0=up_blocks.3.resnets.1   output_blocks.10.1=up_blocks.3.attentions.1
output_blocks.11.0=up_blocks.3.resnets.2   output_blocks.11.1=up_blocks.3.attentions.2
"""
SDXL_BLOCKS = """
input_blocks.0.0=conv_in
input_blocks.1.0=down_blocks.0.resnets.0   input_blocks.2.0=down_blocks.0.resnets.1
input_blocks.3.0.op=down_blocks.0.downsamplers.0.conv
input_blocks.4.0=down_blocks.1.resnets.0   input_blocks.4.1=down_blocks.1.attentions.0
input_blocks.5.0=down_blocks.1.resnets.1   input_blocks.5.1=down_blocks.1.attentions.1
input_blocks.6.0.op=down_blocks.1.downsamplers.0.conv
input_blocks.7.0=down_blocks.2.resnets.0   input_blocks.7.1=down_blocks.2.attentions.0
input_blocks.8.0=down_blocks.2.resnets.1   input_blocks.8.1=down_blocks.2.attentions.1
output_blocks.0.0=up_blocks.0.resnets.0    output_blocks.0.1=up_blocks.0.attentions.0
output_blocks.1.0=up_blocks.0.resnets.1    output_blocks.1.1=up_blocks.0.attentions.1
output_blocks.2.0=up_blocks.0.resnets.2    output_blocks.2.1=up_blocks.0.attentions.2
output_blocks.2.2.conv=up_blocks.0.upsamplers.0.conv
output_blocks.3.0=up_blocks.1.resnets.0    output_blocks.3.1=up_blocks.1.attentions.0
output_blocks.4.0=up_blocks.1.resnets.1    output_blocks.4.1=up_blocks.1.attentions.1
output_blocks.5.0=up_blocks.1.resnets.2    output_blocks.5.1=up_blocks.1.attentions.2
output_blocks.5.2.conv=up_blocks.1.upsamplers.0.conv
output_blocks.6.0=up_blocks.2.resnets.0    output_blocks.7.0=up_blocks.2.resnets.1
output_blocks.8.0=up_blocks.2.resnets.2
label_emb.0.0=add_embedding.linear_1       label_emb.0.2=add_embedding.linear_2
"""
BOTH_BLOCKS = """
time_embed.0=time_embedding.linear_1       time_embed.2=time_embedding.linear_2
middle_block.0=mid_block.resnets.0         middle_block.1=mid_block.attentions.0
middle_block.2=mid_block.resnets.1         out.0=conv_norm_out  out.2=conv_out
"""
INSIDE_RESNETS = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE_BLOCKS = {
    **{f"{side}.{kind}": f"{side}.{kind}" for side in ("encoder", "decoder") for kind in ("conv_in", "conv_out")},
    **{f"{side}.conv_norm_out": f"{side}.norm_out" for side in ("encoder", "decoder")},
    **{f"{side}.mid_block.resnets.0": f"{side}.mid.block_1" for side in ("encoder", "decoder")},
    **{f"{side}.mid_block.resnets.1": f"{side}.mid.block_2" for side in ("encoder", "decoder")},
    **{f"{side}.mid_block.attentions.0": f"{side}.mid.attn_1" for side in ("encoder", "decoder")},
    **{f"encoder.down_blocks.{i}.resnets.{j}": f"encoder.down.{i}.block.{j}" for i in range(4) for j in range(2)},
    **{f"encoder.down_blocks.{i}.downsamplers.0.conv": f"encoder.down.{i}.downsample.conv" for i in range(3)},
    **{f"decoder.up_blocks.{i}.resnets.{j}": f"decoder.up.{3 - i}.block.{j}" for i in range(4) for j in range(3)},
    **{f"decoder.up_blocks.{i}.upsamplers.0.conv": f"decoder.up.{3 - i}.upsample.conv" for i in range(3)},
    "quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv",
}  # fmt: skip
INSIDE_VAE = {
    "conv_shortcut": "nin_shortcut", "group_norm": "norm",
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip
OLD_VAE_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def original_name(name, blocks, inside):
    """Longest block first; what follows it is renamed by `inside` in residual blocks and in the VAE's attention."""
    block = max((one for one in blocks if name.startswith(f"{one}.")), key=len)
    inner, kind = name[len(block) + 1 :].rpartition(".")[::2]
    changed = inside.get(inner, inner) if "attentions" not in block or inside is INSIDE_VAE else inner
    return ".".join(part for part in (blocks[block], changed, kind) if part)


def unet_blocks(key):
    table = BOTH_BLOCKS + (SDXL_BLOCKS if key == "sdxl" else SD_BLOCKS)
    return {ours: original for original, ours in (pair.split("=") for pair in table.split())}


def original_unet(key, tensors):
    return {original_name(name, unet_blocks(key), INSIDE_RESNETS): tensor for name, tensor in tensors.items()}


def original_vae(tensors):
    result = {original_name(name, VAE_BLOCKS, INSIDE_VAE): tensor for name, tensor in tensors.items()}
    is_attention = re.compile(r"mid\.attn_1\.(q|k|v|proj_out)\.weight")
    return {name: t[:, :, None, None] if is_attention.search(name) else t for name, t in result.items()}


def original_clip(tensors):
    return {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}


def original_open_clip(tensors):
    tensors = original_clip(tensors)
    layer = "text_model.encoder.layers.{}."
    result = {
        "token_embedding.weight": tensors["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": tensors["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": tensors["text_model.final_layer_norm.weight"],
        "ln_final.bias": tensors["text_model.final_layer_norm.bias"],
        "logit_scale": torch.ones(()),
    }
    if "text_model.text_projection.weight" in tensors:
        result["text_projection"] = tensors["text_model.text_projection.weight"].T
    number = 0
    while f"{layer.format(number)}mlp.fc1.weight" in tensors:
        old, new = layer.format(number), f"transformer.resblocks.{number}."
        for kind in ("weight", "bias"):
            thirds = [tensors[f"{old}self_attn.{one}_proj.{kind}"] for one in "qkv"]
            result[f"{new}attn.in_proj_{kind}"] = torch.cat(thirds)
            result[f"{new}attn.out_proj.{kind}"] = tensors[f"{old}self_attn.out_proj.{kind}"]
            result[f"{new}mlp.c_fc.{kind}"] = tensors[f"{old}mlp.fc1.{kind}"]
            result[f"{new}mlp.c_proj.{kind}"] = tensors[f"{old}mlp.fc2.{kind}"]
            result[f"{new}ln_1.{kind}"] = tensors[f"{old}layer_norm1.{kind}"]
            result[f"{new}ln_2.{kind}"] = tensors[f"{old}layer_norm2.{kind}"]
        number += 1
    return result


def with_prefix(prefix, tensors):
    return {prefix + name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def original_file(key, pipeline):
    """All tensors of a checkpoint as the original code saves it, with what else such files hold."""
    unet, vae = pipeline.unet.state_dict(), pipeline.vae.state_dict()
    text = pipeline.text_encoder.state_dict()
    file = with_prefix("model.diffusion_model.", original_unet(key, unet))
    file |= with_prefix("first_stage_model.", original_vae(vae))
    file |= {"alphas_cumprod": torch.ones(9), "model_ema.decay": torch.ones(()), "model_ema.x": torch.ones(2)}
    if key == "sd15":
        file |= with_prefix("cond_stage_model.transformer.", original_clip(text))
        file["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    elif key == "sd2":
        open_clip = original_open_clip(text)
        last = {name.replace(".22.", ".23."): t for name, t in open_clip.items() if ".resblocks.22." in name}
        file |= with_prefix("cond_stage_model.model.", open_clip | last | {"text_projection": torch.ones(12, 12)})
    else:
        file |= with_prefix("conditioner.embedders.0.transformer.", original_clip(text))
        second = original_open_clip(pipeline.text_encoder_2.state_dict())
        file |= with_prefix("conditioner.embedders.1.model.", second)
    return file


def configs_of(key):
    """The package's configurations, narrower."""
    folder = WORK / f"{key}-configs"
    folder.mkdir()
    for part, changes in NARROW[key].items():
        config = json.loads((CONFIGS / key / f"{part}.json").read_text()) | changes
        (folder / f"{part}.json").write_text(json.dumps(config))
    return folder


def read(folder, part):
    return json.loads((folder / f"{part}.json").read_text())


def build(key, configs):
    """A pipeline with random weights, norms and biases included."""
    torch.manual_seed(7)
    with no_init_weights():
        parts = modules_of(key, configs)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        for parameter in parts[name].parameters() if name in parts else ():
            torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.1)
    if key == "sdxl":
        return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    return diffusers.StableDiffusionPipeline(**parts, **sd.WITHOUT)


def modules_of(key, configs):
    parts = {
        "unet": UNet2DConditionModel.from_config(read(configs, "unet")),
        "vae": AutoencoderKL.from_config(read(configs, "vae")),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**read(configs, "text_encoder"))),
        "scheduler": getattr(diffusers, read(configs, "scheduler")["_class_name"]).from_config(
            read(configs, "scheduler")
        ),
        "tokenizer": clip.make_tokenizer("!" if key == "sd2" else clip.END),
    }
    if key == "sdxl":
        parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**read(configs, "text_encoder_2")))
        parts["tokenizer_2"] = clip.make_tokenizer("!")
    return parts


def load(key, path, configs=None, **changes):
    defaults = {
        "vae": None, "device": torch.device("cpu"), "dtype": torch.float32, "max_token_length": 75, "clip_skip": 0,
        "v_parameterization": None,
    }  # fmt: skip
    options = LoadOptions(path=path, **(defaults | changes))
    if path.is_dir():
        return load_base_model(options)
    return sdxl.load(options, configs=configs) if key == "sdxl" else sd.load(key, options, configs=configs)


def answers(model):
    """What the model says to one caption, one latent and one picture."""
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(1, 4, 16, 16, generator=generator)
    pixels = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    with torch.no_grad():
        condition = model.encode(model.tokenize([CAPTION]))
        answer = model.predict(noisy, torch.tensor([321]), condition, sizes)
    pooled = [] if condition.pooled is None else [condition.pooled]
    return [condition.sequence, *pooled, answer, model.latents_of(pixels)]


def modules(model):
    return {"unet": model.unet, "vae": model.vae, **{f"te{i}": one for i, one in enumerate(model.text_encoders, 1)}}


def all_equal(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def same_tensors(model, pipeline):
    encoders = [pipeline.text_encoder] + ([pipeline.text_encoder_2] if hasattr(pipeline, "text_encoder_2") else [])
    wanted = {"unet": pipeline.unet, "vae": pipeline.vae, **{f"te{i}": one for i, one in enumerate(encoders, 1)}}
    return {
        part: module.state_dict().keys() == wanted[part].state_dict().keys()
        and all_equal(module.state_dict().values(), wanted[part].state_dict().values())
        for part, module in modules(model).items()
    }


def refusal(action):
    try:
        action()
    except TrainerError as error:
        return f"{type(error).__name__}: {error}".replace(str(WORK), "…")
    return ""


def single_file_and_folder(key):
    configs = configs_of(key)
    pipeline = build(key, configs)
    folder, file = WORK / f"{key}-folder", WORK / f"{key}.safetensors"
    pipeline.save_pretrained(folder)
    save_file(original_file(key, pipeline), file)
    from_file, from_folder = load(key, file, configs), load(key, folder)
    for parameter in (one for module in modules(from_folder).values() for one in module.parameters()):
        # weights that lie in the mapped file are aligned differently, which is worth a last bit of an answer
        parameter.data = parameter.data.clone()
    names = [from_file.file_name(part, path) for part, module in modules(from_file).items() if part != "vae"
             for path, one in module.named_modules() if isinstance(one, torch.nn.Linear | torch.nn.Conv2d)]  # fmt: skip
    return (
        {
            "key": [from_file.key, from_folder.key],
            "prediction": [from_file.prediction, from_folder.prediction],
            "file has the tensors": same_tensors(from_file, pipeline),
            "folder has the tensors": same_tensors(from_folder, pipeline),
            "answers are equal": all_equal(answers(from_file), answers(from_folder)),
            "frozen": not any(
                p.requires_grad or p.is_meta for m in modules(from_file).values() for p in m.parameters()
            ),
            "in eval mode": not any(one.training for m in modules(from_file).values() for one in m.modules()),
            "states": {length: long_caption(from_file, length) for length in (75, 150, 225)},
            "names": names,
            "facts": from_file.facts(),
        },
        pipeline,
        from_file,
    )


def set_options(model, **changes):
    model._options = dataclasses.replace(model._options, **changes)
    return model


def published_folder(pipeline):
    """Stable Diffusion 1.5 as it was published as a folder: older names, older tokenizer files, a safety checker."""
    folder = WORK / "published"
    shutil.copytree(WORK / "sd15-folder", folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    text = original_clip(pipeline.text_encoder.state_dict())
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(text, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    vae = old_vae_names(pipeline.vae.state_dict())
    save_file(vae, folder / "vae" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "tokenizer" / "tokenizer.json").unlink()
    merges = clip.MERGES.read_text(encoding="utf-8")
    (folder / "tokenizer" / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(pipeline.tokenizer.get_vocab()))
    settings = {"model_max_length": 77, "pad_token": "!", "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    model = load("sd15", folder)
    return {
        "tensors": same_tensors(model, pipeline),
        "ids": model.tokenize([CAPTION])[0][0, 0, :9].tolist(),
    }


def old_vae_names(tensors):
    is_attention = re.compile(r"(?<=\.attentions\.0\.)(to_q|to_k|to_v|to_out\.0)")
    return {is_attention.sub(lambda match: OLD_VAE_ATTENTION[match[0]], name): t for name, t in tensors.items()}


def long_caption(model, length):
    """A caption of 240 tokens and a short one: what each chunk begins and ends with, and how many states there are."""
    with torch.no_grad():
        alone = set_options(model, max_token_length=75).encode(model.tokenize([CAPTION]))
        tokens = set_options(model, max_token_length=length).tokenize([LONG, CAPTION])
        condition = model.encode(tokens)
        firsts = model.encode([ids[:, :1] for ids in tokens])
        lasts = model.encode([ids[:, -1:] for ids in tokens])
    pooled = condition.pooled is None or torch.allclose(condition.pooled, firsts.pooled, atol=1e-5)
    return {
        "ids": list(tokens[0].shape),
        "states": condition.sequence.shape[1],
        "ends": [[[chunk[place] for place in (0, 1, -2, -1)] for chunk in ids[0].tolist()] for ids in tokens],
        "short": [ids[1, -1, :3].tolist() + ids[1, -1, -1:].tolist() for ids in tokens],
        "first and last chunk": pooled
        and torch.allclose(condition.sequence[:, :76], firsts.sequence[:, :76], atol=1e-5)
        and torch.allclose(condition.sequence[:, -76:], lasts.sequence[:, -76:], atol=1e-5)
        and torch.allclose(condition.sequence[1, :8], alone.sequence[0, :8], atol=1e-5),
    }


def clip_skip(pipeline, model):
    tokens = clip.tokenize(pipeline.tokenizer, [CAPTION], 75)[:, 0]
    with torch.no_grad():
        output = pipeline.text_encoder(tokens, output_hidden_states=True)
        tokens = set_options(model, max_token_length=75).tokenize([CAPTION])
        states = {skip: set_options(model, clip_skip=skip).encode(tokens).sequence for skip in (0, 1, 2)}
        second = pipeline.text_encoder.final_layer_norm(output.hidden_states[-2])
    set_options(model, clip_skip=0)
    return {
        "none is the last": torch.equal(states[0], output.last_hidden_state) and torch.equal(states[0], states[1]),
        "two is the last but one": torch.equal(states[2], second) and not torch.equal(states[2], states[1]),
        "too many": refusal(lambda: load("sd15", WORK / "sd15-folder", clip_skip=13)),
    }


def separate_vae(pipeline):
    torch.manual_seed(9)
    configs = WORK / "sd15-configs"
    vae = AutoencoderKL.from_config(read(configs, "vae"))
    tensors = vae.state_dict()
    vae.save_pretrained(WORK / "vae-folder")
    original = with_prefix("", original_vae(tensors))
    save_file(tensors, WORK / "vae-diffusers.safetensors")
    save_file(old_vae_names(tensors), WORK / "vae-old-diffusers.safetensors")
    save_file(original, WORK / "vae-original.safetensors")
    save_file(with_prefix("first_stage_model.", original), WORK / "vae-prefixed.safetensors")
    pipeline.vae = vae
    save_file(original_file("sd15", pipeline), WORK / "vae-checkpoint.safetensors")
    bare = {name: t for name, t in load_file(WORK / "sd15.safetensors").items() if "first_stage" not in name}
    save_file(bare, WORK / "without-vae.safetensors")
    found = {
        one.name: pipelines._read_vae(one, torch.device("cpu"), configs / "vae.json")
        for one in sorted(WORK.glob("vae-*"))
    }
    found["of a file"] = load("sd15", WORK / "without-vae.safetensors", configs, vae=WORK / "vae-folder").vae
    found["of a folder"] = load("sd15", WORK / "sd15-folder", vae=WORK / "vae-original.safetensors").vae
    vae.register_to_config(scaling_factor=0.13025)
    vae.save_pretrained(WORK / "sdxl-vae")
    equal = {name: all_equal(one.state_dict().values(), tensors.values()) for name, one in found.items()}
    return equal, refusal(lambda: load("sd15", WORK / "sd15-folder", vae=WORK / "sdxl-vae"))


def damaged_files():
    configs = WORK / "sd15-configs"
    tensors = load_file(WORK / "sd15.safetensors")
    key = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    changes = {
        "missing": {name: t for name, t in tensors.items() if name != key},
        "stranger": tensors | {"model.diffusion_model.adapter.weight": torch.ones(2)},
        "shape": tensors | {key: tensors[key][:, :4].clone()},
    }
    found = {}
    for name, changed in changes.items():
        file = WORK / f"{name}.safetensors"
        save_file(changed, file)
        found[name] = refusal(lambda file=file: load("sd15", file, configs))
    folder = WORK / "sd15-folder"
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "final_layer_norm.bias" not in name}
    save_file(kept, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    found["folder"] = refusal(lambda: load("sd15", folder))
    save_file(weights, folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    return found


def full_size(key):
    """Every name that the conversion expects, against the tables above."""
    folder = CONFIGS / key
    with torch.device("meta"), no_init_weights():
        unet = UNet2DConditionModel.from_config(read(folder, "unet"))
        vae = AutoencoderKL.from_config(read(folder, "vae"))
        texts = {path.stem: CLIPTextConfig(**read(folder, path.stem)) for path in folder.glob("text_encoder*.json")}
        first = CLIPTextModel(texts["text_encoder"])
        second = CLIPTextModelWithProjection(texts["text_encoder_2"]) if key == "sdxl" else None
    ours = {
        "unet": (original_names.unet_sources(unet.state_dict(), unet.config), original_unet(key, unet.state_dict())),
        "vae": (original_names.vae_sources(vae.state_dict(), vae.config), original_vae(vae.state_dict())),
    }
    if key == "sd2":
        ours["te1"] = (original_names.open_clip_sources(first.state_dict()), original_open_clip(first.state_dict()))
    else:
        ours["te1"] = (original_names.clip_sources(first.state_dict()), original_clip(first.state_dict()))
    if second is not None:
        ours["te2"] = (original_names.open_clip_sources(second.state_dict()), original_open_clip(second.state_dict()))
    return {
        part: {
            "tensors": len(sources),
            "one to one": len(set(sources.values())) == len(sources),
            "as in the tables": {source.name for source in sources.values()} == set(table) - {"logit_scale"},
        }
        for part, (sources, table) in ours.items()
    }


def prompt(negative=""):
    return SamplePrompt(prompt=CAPTION, negative_prompt=negative, seed=3, width=64, height=64, steps=3, scale=4.0)


def samples(key, model):
    accelerator = Accelerator(cpu=True)
    set_options(model, max_token_length=75)
    plain = model.pipeline(
        CAPTION, negative_prompt=None, width=64, height=64, num_inference_steps=3, guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3), output_type="np",
    ).images[0]  # fmt: skip
    model.unet.train()
    before = torch.get_rng_state()
    drawn = np.array(draw_sample(model, prompt(), accelerator))
    unmoved = torch.equal(before, torch.get_rng_state())
    own = model.pipeline.scheduler
    some = SAMPLERS if key == "sd15" else SAMPLERS[:1]
    pictures = {name: np.array(draw_sample(model, prompt("bad"), accelerator, name)) for name in some}
    model.scheduler_config = {**model.scheduler_config, "rescale_betas_zero_snr": True}
    model.scheduler_config["prediction_type"] = "v_prediction"
    last = {}
    for name in ("", *SAMPLERS) if key == "sd15" else ("", "heun"):
        scheduler = make_scheduler(model, name)
        scheduler.set_timesteps(4)
        finite = np.array(draw_sample(model, prompt(), accelerator, name)).std() > 0
        last[name] = [float(scheduler.timesteps[0]), float(scheduler.alphas_cumprod[-1]) < 1e-6, bool(finite)]
    return {
        "as the pipeline draws": bool(np.array_equal(drawn, (plain * 255).round().astype("uint8"))),
        "rng unmoved": unmoved,
        "former mode": [model.unet.training, model.text_encoders[0].training, model.pipeline.scheduler is own],
        "distinct": len({picture.tobytes() for picture in pictures.values()}),
        "zero terminal snr": last,
    }


SAMPLERS = ("ddim", "ddpm", "euler", "euler_a", "heun", "dpmsolver++")


def main():
    built = {}
    for key in NARROW:
        FACTS[key], *built[key] = single_file_and_folder(key)
        FACTS[f"{key} full size"] = full_size(key)
    pipeline, model = built["sd15"]
    FACTS["published"] = published_folder(pipeline)
    FACTS["clip_skip"] = clip_skip(pipeline, model)
    FACTS["samples"] = {key: samples(key, built[key][1]) for key in ("sd15", "sdxl")}
    FACTS["v"] = forced_prediction()
    FACTS["damaged"] = damaged_files()
    FACTS["vae"] = separate_vae(pipeline)
    tokenizer = clip.make_tokenizer("!")
    texts = ["a photo of a cat", "cat!", "cat!!! ünïcode 42", "<|endoftext|>"]
    FACTS["ids"] = [tokenizer(texts[0]).input_ids, *(clip.caption_ids(tokenizer, text) for text in texts[1:])]


def forced_prediction():
    model = load("sd15", WORK / "sd15-folder", v_parameterization=True)
    return [model.prediction, model.scheduler_config["prediction_type"], model.facts()["ss_base_model_version"]]


main()
sys.stdout.write(json.dumps(FACTS) + "\n")
