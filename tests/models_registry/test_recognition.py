from __future__ import annotations

import json
import shutil

import pytest

from models_registry.enums import ATTACHABLE, Architecture, Layout, Role
from models_registry.recognition import TITLES, Component, Part, Unrecognised, recognise
from tests.models_registry.conftest import (
    DIFFUSERS_UNET,
    FLUX,
    SD2,
    SD3,
    SD15,
    SDXL,
    VAE,
    original_unet,
    write_file,
    write_raw,
)
from tests.models_registry.published import DIFFUSERS_FLUX, DIFFUSERS_SD3


@pytest.mark.parametrize(
    ("tensors", "architecture", "role", "resolution", "prediction_type"),
    [
        (SD15, "sd15", "checkpoint", 512, "epsilon"),
        (SD2, "sd2", "checkpoint", 768, "v_prediction"),
        (SDXL, "sdxl", "checkpoint", 1024, "epsilon"),
        (SDXL | {"v_pred": (0,)}, "sdxl", "checkpoint", 1024, "v_prediction"),
        (SD3, "sd3", "transformer", 1024, "flow_prediction"),
        (SD3 | VAE, "sd3", "checkpoint", 1024, "flow_prediction"),
        (DIFFUSERS_SD3, "sd3", "transformer", 1024, "flow_prediction"),
        (FLUX, "flux", "transformer", 1024, "flow_prediction"),
        ({f"model.diffusion_model.{key}": FLUX[key] for key in FLUX}, "flux", "transformer", 1024, "flow_prediction"),
        (DIFFUSERS_FLUX, "flux", "transformer", 1024, "flow_prediction"),
    ],
)
def test_single_file_is_recognised_by_its_tensors(tmp_path, tensors, architecture, role, resolution, prediction_type):
    path = write_file(tmp_path / "surely-an-sd15-lora.safetensors", tensors)
    found = recognise(path, root=tmp_path)
    assert (found.layout, found.architecture, found.resolution, found.prediction_type) == (
        "file",
        architecture,
        resolution,
        prediction_type,
    )
    assert [(component.role, component.path, component.bytes) for component in found.components] == [
        (role, path.name, path.stat().st_size)
    ]
    assert sum(part.tensors for part in found.parts) == len(tensors)


def test_single_file_parts_and_numbers(tmp_path):
    found = recognise(write_file(tmp_path / "x.safetensors", SD15, dtype="F32"), root=tmp_path)
    assert found.parts == (
        Part("UNet", 3, 8 * 4 * 9 + 64 + 8 * 768, 4 * (8 * 4 * 9 + 64 + 8 * 768), "F32"),
        Part("VAE", 1, 144, 576, "F32"),
        Part("Text encoder", 1, 8, 32, "F32"),
    )
    assert found.components[0].parameters == sum(part.parameters for part in found.parts)
    assert found.components[0].dtype == "F32"


def test_single_file_metadata_is_believed_before_a_default(tmp_path):
    metadata = {"modelspec.resolution": "512x512", "modelspec.prediction_type": "epsilon"}
    found = recognise(write_file(tmp_path / "base.safetensors", SD2, metadata=metadata), root=tmp_path)
    assert (found.architecture, found.resolution, found.prediction_type, found.notes) == ("sd2", 512, "epsilon", ())


@pytest.mark.parametrize("stated", ["0x0", "99999x99999", "1024", "x", "10x10"])
def test_single_file_impossible_resolution_is_not_believed(tmp_path, stated):
    path = write_file(tmp_path / "base.safetensors", SDXL, metadata={"modelspec.resolution": stated})
    assert recognise(path, root=tmp_path).resolution == 1024


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"lora_unet_x.lora_up.weight": (8, 4), "lora_unet_x.lora_down.weight": (4, 8)}, "is a LoRA"),
        ({"unet.down_blocks.0.attn2.to_k.lora_A.weight": (4, 8)}, "is a LoRA"),
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight": (4, 8)}, "is a LoRA"),
        ({"decoder.conv_in.weight": (8, 4, 3, 3)}, "only a VAE"),
        (VAE, "only a VAE"),
        ({"text_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8)}, "only a text encoder"),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)}, "only a text encoder"),
        ({"clip_l": (1, 8), "clip_g": (1, 8)}, "textual inversion"),
        (DIFFUSERS_UNET | {"controlnet_cond_embedding.conv_in.weight": (8, 3, 3, 3)}, "is a ControlNet"),
        (DIFFUSERS_UNET, "holds the UNet of a Stable Diffusion XL model, but not the VAE and the text encoders"),
        ({key: SD15[key] for key in SD15 if key not in VAE}, "but not the VAE"),
        (original_unet(768, channels=9) | VAE, "takes 9 channels instead of 4"),
        (FLUX | {"img_in.weight": (8, 384)}, "takes 384 channels instead of 64"),
        (original_unet(1280, linear=True, label=2560) | VAE, "the refiner"),
        (original_unet(1024, linear=True, label=2048) | VAE, "extra conditioning"),
        (SDXL | {"edm_mean": (4,)}, "EDM noise schedule"),
        (FLUX | {"img_in.weight.quant_state.bitsandbytes__nf4": (8,)}, "quantised"),
        ({"fc.weight": (8, 8), "fc.bias": (8,)}, "has 2 tensors that fit none of .* fc.bias, fc.weight"),
        ({}, "has 0 tensors"),
    ],
)
def test_single_file_that_is_no_base_model(tmp_path, tensors, words):
    path = write_file(tmp_path / "sdxl-base.safetensors", tensors)
    with pytest.raises(Unrecognised, match=words):
        recognise(path, root=tmp_path)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickle_is_refused_unread(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(Unrecognised, match="can run any program when it is opened"):
        recognise(path, root=tmp_path)


def test_damaged_file_is_refused_with_the_reason(tmp_path):
    path = write_raw(tmp_path / "x.safetensors", b"{}", length=50)
    with pytest.raises(Unrecognised, match="was cut off inside its header"):
        recognise(path, root=tmp_path)


def test_pilot_tiny(tiny, models):
    found = recognise(tiny, root=models)
    assert (found.layout, found.architecture, found.resolution, found.prediction_type, found.notes) == (
        "folder",
        "sdxl",
        128,
        "epsilon",
        (),
    )
    unet = tiny / "unet/diffusion_pytorch_model.safetensors"
    assert found.components[2] == Component(
        "unet", "unet/diffusion_pytorch_model.safetensors", unet.stat().st_size, "F16", 3_368_388
    )
    assert {component.path for component in found.components} == {
        file.relative_to(tiny).as_posix() for file in tiny.rglob("*.*") if file.name != "README.md"
    }
    assert [part.title for part in found.parts] == ["UNet", "VAE", "Text encoder", "Text encoder 2"]


def test_folder_of_shards(tiny, models):
    unet = tiny / "unet"
    tensors = DIFFUSERS_UNET | {"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (8, 128)}
    names = list(tensors)
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    shards = {"a.safetensors": names[:1], "b.safetensors": names[1:]}
    for shard, held in shards.items():
        write_file(unet / shard, {name: tensors[name] for name in held})
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    found = recognise(tiny, root=models)

    assert found.architecture == "sdxl"
    assert found.parts[0].tensors == 3
    (unet / "b.safetensors").unlink()
    with pytest.raises(Unrecognised, match=r"incomplete: unet/b\.safetensors is missing"):
        recognise(tiny, root=models)


def test_folder_with_a_shard_index_that_leaves_the_folder(tiny, models):
    (tiny / "unet/diffusion_pytorch_model.safetensors").unlink()
    index = tiny / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../../secret.safetensors"}}))
    with pytest.raises(Unrecognised, match=r"does not name \.safetensors files"):
        recognise(tiny, root=models)


def test_folder_of_the_fp16_variant(tiny, models):
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"):
        (tiny / f"{name}.safetensors").rename(tiny / f"{name}.fp16.safetensors")
    found = recognise(tiny, root=models)
    assert found.architecture == "sdxl"
    assert found.notes == ("The folder holds the fp16 variant of the weights only.",)


def test_folder_prediction_type_comes_from_the_scheduler(tiny, models, edit_json):
    edit_json(tiny / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    assert recognise(tiny, root=models).prediction_type == "v_prediction"


def test_folder_without_sample_size_takes_the_usual_one_and_says_so(tiny, models, edit_json):
    edit_json(tiny / "unet/config.json", sample_size=...)
    found = recognise(tiny, root=models)
    assert found.resolution == 1024
    assert found.notes == ("The configuration states no size of pictures; 1024 is the usual one.",)


@pytest.mark.parametrize(
    ("width", "linear", "architecture"),
    [(768, False, "sd15"), (1024, True, "sd2"), (32, False, "sd15"), (32, True, "sd2")],
)
def test_folder_of_stable_diffusion_1_and_2(tiny, models, edit_json, width, linear, architecture):
    edit_json(tiny / "model_index.json", _class_name="StableDiffusionPipeline", text_encoder_2=..., tokenizer_2=...)
    edit_json(tiny / "unet/config.json", cross_attention_dim=width, addition_embed_type=None, sample_size=64)
    write_file(
        tiny / "unet/diffusion_pytorch_model.safetensors",
        {
            "conv_in.weight": (8, 4, 3, 3),
            "down_blocks.0.attentions.0.proj_in.weight": (8, 8) if linear else (8, 8, 1, 1),
            "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (8, width),
        },
    )
    found = recognise(tiny, root=models)
    assert (found.architecture, found.resolution) == (architecture, 512)
    assert "text_encoder_2" not in {component.role for component in found.components}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda tiny, edit: (tiny / "model_index.json").unlink(), "no model_index.json"),
        (lambda tiny, edit: (tiny / "model_index.json").write_text("[]"), "no JSON object"),
        (lambda tiny, edit: (tiny / "model_index.json").write_text("{"), "no readable JSON"),
        (lambda tiny, edit: (tiny / "model_index.json").write_text("[" * 200_000), "no readable JSON"),
        (lambda tiny, edit: edit(tiny / "model_index.json", _class_name="KolorsPipeline"), "is a 'KolorsPipeline'"),
        (lambda tiny, edit: edit(tiny / "model_index.json", vae=[None, None]), "names no vae"),
        (lambda tiny, edit: (tiny / "vae/config.json").unlink(), "incomplete: vae/config.json is missing"),
        (
            lambda tiny, edit: (tiny / "vae/diffusion_pytorch_model.safetensors").unlink(),
            "vae/diffusion_pytorch_model.safetensors is missing",
        ),
        (lambda tiny, edit: shutil.rmtree(tiny / "text_encoder_2"), "text_encoder_2/config.json is missing"),
        (lambda tiny, edit: (tiny / "tokenizer/tokenizer.json").unlink(), "tokenizer holds no tokenizer"),
        (
            lambda tiny, edit: (tiny / "unet/diffusion_pytorch_model.safetensors").rename(
                tiny / "unet/diffusion_pytorch_model.bin"
            ),
            "can run any program",
        ),
        (lambda tiny, edit: edit(tiny / "unet/config.json", cross_attention_dim=2048), "its tensors say 128"),
        (lambda tiny, edit: edit(tiny / "unet/config.json", addition_embed_type="image"), "not conditioned as"),
        (
            lambda tiny, edit: write_file(
                tiny / "unet/diffusion_pytorch_model.safetensors",
                {
                    "conv_in.weight": (8, 4, 3, 3),
                    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": (8, 768),
                },
            ),
            "says Stable Diffusion XL, but the tensors of tiny/unet are those of Stable Diffusion 1.5",
        ),
        (lambda tiny, edit: edit(tiny / "scheduler/scheduler_config.json", _class_name="EDMEulerScheduler"), "EDM"),
        (
            lambda tiny, edit: edit(tiny / "scheduler/scheduler_config.json", prediction_type="magic"),
            "predicts 'magic'",
        ),
        (
            lambda tiny, edit: write_file(tiny / "vae/diffusion_pytorch_model.safetensors", {"a": (1,)}),
            "holds no VAE",
        ),
    ],
)
def test_folder_that_is_no_base_model(tiny, models, edit_json, damage, words):
    damage(tiny, edit_json)
    with pytest.raises(Unrecognised, match=words):
        recognise(tiny, root=models)


def test_folder_with_a_file_that_links_out(tiny, models, tmp_path):
    weights = tiny / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "outside.safetensors")
    weights.symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(Unrecognised, match="link that leaves the models folder"):
        recognise(tiny, root=models)


def test_words_are_those_of_the_database():
    assert {value: title for value, title in Architecture.choices if value != "unknown"} == TITLES
    assert Layout.values == ["folder", "file"]
    from models_registry.diffusers_folder import ROLES

    assert set(ROLES.values()) | {"checkpoint"} | set(ATTACHABLE) == set(Role.values)
