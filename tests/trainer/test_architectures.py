"""Base models: what a path is, and that a single file gives bit by bit what a diffusers folder gives."""

import json
import math
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from lora_trainer.architectures import check_model, detection, find_architecture, unet_config
from lora_trainer.errors import ModelError

REPOSITORY = Path(__file__).resolve().parents[2]
PILOT_TINY = REPOSITORY / "lora_trainer" / "assets" / "pilot-tiny"
SCRIPT = Path(__file__).with_name("load_architectures.py")
START, END, WORD, PAD = 49406, 49407, 2653, 0

KOHYA = "which is not trained by the built-in trainer; choose Kohya."

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CONVOLUTION = {f"{UNET}input_blocks.0.0.weight": (320, 4, 3, 3)}
WITH_VAE = {f"{VAE}decoder.conv_in.weight": (512, 4, 3, 3)}
LABELS = {f"{UNET}label_emb.0.0.weight": (1280, 2816)}
SD15 = CONVOLUTION | WITH_VAE | {"cond_stage_model.transformer.text_model.final_layer_norm.bias": (768,)}
SD2 = CONVOLUTION | WITH_VAE | {"cond_stage_model.model.ln_final.bias": (1024,)}
SDXL = (
    CONVOLUTION
    | WITH_VAE
    | LABELS
    | {
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": (768,),
        "conditioner.embedders.1.model.ln_final.bias": (1280,),
    }
)
REFINER = CONVOLUTION | WITH_VAE | LABELS | {"conditioner.embedders.0.model.ln_final.bias": (1280,)}


def model_file(path, shapes, metadata=None):
    """A whole .safetensors file, with a hole where its numbers would be."""
    at, header = 0, {"__metadata__": metadata or {}}
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path


def sentence(path, **arguments):
    with pytest.raises(ModelError) as caught:
        check_model(path, **arguments)
    return str(caught.value).removeprefix(f"The base model {path} ")


@pytest.fixture
def folder(tmp_path):
    """pilot-tiny, to be spoilt."""
    return shutil.copytree(PILOT_TINY, tmp_path / "model")


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), str(tmp_path_factory.mktemp("models"))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("shapes", "key"), [(SD15, "sd15"), (SD2, "sd2"), (SDXL, "sdxl")])
def test_single_file_is_known_by_its_tensors(tmp_path, shapes, key):
    path = model_file(tmp_path / "whatever.safetensors", shapes)
    assert find_architecture(path).key == key
    assert unet_config(path)["cross_attention_dim"] == {"sd15": 768, "sd2": 1024, "sdxl": 2048}[key]


@pytest.mark.parametrize(
    ("pipeline", "unet", "key"),
    [
        ("StableDiffusionPipeline", {"cross_attention_dim": 768}, "sd15"),
        ("StableDiffusionPipeline", {"cross_attention_dim": 1024}, "sd2"),
        ("StableDiffusionPipeline", {"cross_attention_dim": 16, "use_linear_projection": True}, "sd2"),
        ("StableDiffusionXLPipeline", {"addition_embed_type": "text_time"}, "sdxl"),
    ],
)
def test_folder_is_known_by_its_configurations(folder, pipeline, unet, key):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    (folder / "unet" / "config.json").write_text(json.dumps(unet))
    assert find_architecture(folder).key == key
    assert unet_config(folder) == unet


@pytest.mark.parametrize(
    ("shapes", "beginning"),
    [
        (SD15 | {f"{UNET}input_blocks.0.0.weight": (320, 9, 3, 3)}, "is an inpainting model: its UNet takes 9"),
        (SD2 | {f"{UNET}input_blocks.0.0.weight": (320, 5, 3, 3)}, "is a depth, upscaling or video model: its UNet"),
        (REFINER, "is SDXL's refiner. Choose the SDXL base model."),
        (SD2 | LABELS, "has extra conditioning (unCLIP or the like)."),
        (SDXL | {"edm_mean": (4,)}, "uses an EDM noise schedule"),
        (CONVOLUTION | WITH_VAE, "holds a UNet without its text encoders."),
        (SD15.keys() - WITH_VAE.keys(), "holds no VAE. Choose the full checkpoint, or give one with 'vae'."),
        ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 8)}, "is a LoRA. Choose the base model"),
        ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": (4, 8)}, "is a LoRA. Choose the base model"),
        ({"control_model.input_blocks.0.0.weight": (4, 4, 3, 3)}, "is a ControlNet."),
        ({f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (4, 8)}, f"is a Stable Diffusion 3 model, {KOHYA}"),
        ({"double_blocks.0.img_attn.qkv.weight": (4, 8)}, f"is a FLUX.1 model, {KOHYA}"),
        ({"down_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3)}, "holds only a UNet. Choose an SD 1.5, SD 2 or SDXL"),
        ({"decoder.conv_in.weight": (4, 4, 3, 3)}, "holds only a VAE."),
        ({"text_model.encoder.layers.0.self_attn.q_proj.weight": (4, 4)}, "holds only a text encoder."),
        ({"a": (1,), "b": (1,)}, "has 2 tensors that fit none of the known models (the first: a, b)."),
    ],
)  # fmt: skip
def test_other_file_is_refused(tmp_path, shapes, beginning):
    shapes = shapes if isinstance(shapes, dict) else {name: SD15[name] for name in shapes}
    assert sentence(model_file(tmp_path / "model.safetensors", shapes)).startswith(beginning)


def test_missing_path_is_refused(tmp_path):
    wanted = (
        "does not exist. Choose an SD 1.5, SD 2 or SDXL model: a folder in diffusers' layout or one .safetensors file."
    )
    assert sentence(tmp_path / "none") == wanted


def test_cut_off_file_is_refused(tmp_path):
    path = model_file(tmp_path / "model.safetensors", SD15)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 9)
    assert sentence(path).startswith("cannot be used: model.safetensors was cut off: its header describes")
    path.write_bytes(b"")
    assert "has only 0 bytes" in sentence(path)


@pytest.mark.parametrize(("name", "content"), [("a.ckpt", b"x" * 9), ("a.pt", b""), ("a.safetensors", b"PK\x03\x04..")])
def test_pickle_is_refused_unopened(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert sentence(path).startswith("is a pickle file, which can run any program when it is opened.")


def test_own_vae_is_not_needed_when_another_is_given(tmp_path):
    bare = model_file(tmp_path / "model.safetensors", {name: SD15[name] for name in SD15.keys() - WITH_VAE.keys()})
    vae = model_file(tmp_path / "vae.safetensors", {"decoder.conv_in.weight": (4, 4, 3, 3)})
    check_model(bare, vae=vae)
    check_model(bare, vae=PILOT_TINY)
    check_model(bare, vae=PILOT_TINY / "vae")
    assert sentence(bare, vae=tmp_path / "no") == f"The VAE {tmp_path}/no does not exist. Check the path."
    assert "has no config.json" in sentence(bare, vae=tmp_path)
    other = model_file(tmp_path / "other.safetensors", {"a": (1,)})
    assert "holds no VAE. Choose another file" in sentence(bare, vae=other)


@pytest.mark.parametrize(
    ("name", "beginning"),
    [
        ("StableDiffusion3Pipeline", f"is a Stable Diffusion 3 model, {KOHYA}"),
        ("FluxPipeline", f"is a FLUX.1 model, {KOHYA}"),
        ("StableDiffusionInpaintPipeline", "is a StableDiffusionInpaintPipeline, which cannot be trained here."),
        ("StableDiffusionPipeline", "has a UNet of another kind than its StableDiffusionPipeline needs."),
    ],
)
def test_folder_of_another_kind_is_refused(folder, name, beginning):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    assert sentence(folder).startswith(beginning)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer_2", "scheduler"])
def test_folder_that_lacks_a_part_is_refused(folder, part):
    shutil.rmtree(folder / part)
    assert sentence(folder) == f"lacks its folder '{part}'. Copy or download the model again."


def test_spoilt_folder_is_refused(folder):
    weights = folder / "text_encoder" / "model.safetensors"
    weights.rename(folder / "text_encoder" / "model.bin")
    assert "needs text_encoder/model.safetensors, but there is only a pickle file (model.bin)" in sentence(folder)
    (folder / "text_encoder" / "model.bin").unlink()
    assert "needs text_encoder/model.safetensors, but there is none." in sentence(folder)
    weights.write_bytes(b"torn")
    assert str(weights) in sentence(folder)
    (folder / "unet" / "config.json").write_text('{"in_channels": 9}')
    assert sentence(folder).startswith("is an inpainting model")
    (folder / "model_index.json").write_text("{")
    assert sentence(folder).startswith("is damaged: model_index.json cannot be read")
    (folder / "model_index.json").unlink()
    assert sentence(folder).startswith("has no model_index.json, so it is no whole diffusers folder.")


@pytest.mark.parametrize(
    ("names", "variant"),
    [
        (["model.safetensors", "model.fp16.safetensors"], None),
        (["model.fp16.safetensors"], "fp16"),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors"], None),
        (["model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors"], "fp16"),
    ],
)
def test_half_precision_files_are_taken_when_there_are_no_others(tmp_path, names, variant):
    for name in names:
        (tmp_path / name).touch()
    assert detection.weights_variant(tmp_path, "model") == variant


@pytest.mark.parametrize(
    ("more", "metadata", "expected"),
    [
        ({}, {}, {}),
        ({}, {"modelspec.prediction_type": "epsilon"}, {"prediction_type": "epsilon"}),
        ({"v_pred": (0,)}, {}, {"prediction_type": "v_prediction"}),
        (
            {"v_pred": (0,), "ztsnr": (0,)},
            {"modelspec.prediction_type": "epsilon"},
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        ),
    ],
)
def test_single_file_says_what_it_predicts(tmp_path, more, metadata, expected):
    path = model_file(tmp_path / "model.safetensors", SDXL | more, metadata)
    assert detection.prediction_facts(path) == expected


def test_detection_needs_no_torch():
    code = "import sys, lora_trainer.architectures; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr


@pytest.mark.parametrize(
    ("key", "prediction", "parts"),
    [("sd15", "epsilon", 1), ("sd2", "v_prediction", 1), ("sdxl", "epsilon", 2)],
)
def test_single_file_gives_what_the_folder_gives(facts, key, prediction, parts):
    found = facts[key]
    whole = dict.fromkeys(["unet", "vae", "te1", "te2"][: 2 + parts], True)
    assert found["key"] == [key, key]
    assert found["prediction"] == [prediction, prediction]
    assert found["file has the tensors"] == found["folder has the tensors"] == whole
    assert found["answers are equal"]
    assert found["frozen"]
    assert found["in eval mode"]


def test_folder_as_published_is_read(facts):
    assert facts["published"] == {
        "tensors": {"unet": True, "vae": True, "te1": True},
        "ids": [START, 320, 1125, 539, 320, 2368, 256, END, PAD],
    }


@pytest.mark.parametrize(
    ("key", "tensors"),
    [
        ("sd15", {"unet": 686, "vae": 248, "te1": 196}),
        ("sd2", {"unet": 686, "vae": 248, "te1": 372}),
        ("sdxl", {"unet": 1680, "vae": 248, "te1": 196, "te2": 517}),
    ],
)
def test_full_size_names_are_those_of_the_original(facts, key, tensors):
    expected = {
        part: {"tensors": count, "one to one": True, "as in the tables": True} for part, count in tensors.items()
    }
    assert facts[f"{key} full size"] == expected


# start, first, last but one and last id of each chunk of a caption of 240 tokens; the last chunk of a short one
FIRST, MIDDLE = [START, WORD, WORD, END], [START, 273, 275, END]
ENDS = {"75": [FIRST], "150": [FIRST, MIDDLE], "225": [FIRST, MIDDLE, FIRST]}
PADDING = {"sd15": [END], "sd2": [PAD], "sdxl": [END, PAD]}


@pytest.mark.parametrize("length", ["75", "150", "225"])
@pytest.mark.parametrize("key", ["sd15", "sd2", "sdxl"])
def test_long_captions_are_encoded_in_chunks(facts, key, length):
    chunks = int(length) // 75
    assert facts[key]["states"][length] == {
        "ids": [2, chunks, 77],
        "states": {1: 77, 2: 152, 3: 227}[chunks],
        "ends": [ENDS[length]] * len(PADDING[key]),
        "short": [[START, 320, 1125, pad] if chunks == 1 else [START, END, pad, pad] for pad in PADDING[key]],
        "first and last chunk": True,
    }


def test_clip_skip_counts_as_kohya_does(facts):
    assert facts["clip_skip"] == {
        "none is the last": True,
        "two is the last but one": True,
        "too many": "ModelError: 'clip_skip' is 13, but the text encoder has only 12 layers. Lower it.",
    }


def test_prediction_can_be_set(facts):
    assert facts["v"] == ["v_prediction", "v_prediction", "sd_v1_v"]


def test_tokenizer_is_clips(facts):
    assert facts["ids"] == [
        [START, 320, 1125, 539, 320, 2368, END],
        [2368, 256],  # not 0, although OpenCLIP pads with "!"
        [2368, 995, 6522, 77, 35689, 3217, 275, 273],
        [27, 347, 40786, 4160, 91, 285],  # a caption cannot end itself
    ]


@pytest.mark.parametrize(
    ("key", "modules", "some"),
    [
        ("sd15", 350 + 4, {
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj",
            "lora_unet_up_blocks_1_upsamplers_0_conv", "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        }),
        ("sd2", 416 + 4, {
            "lora_unet_down_blocks_2_resnets_0_conv_shortcut", "lora_te_text_model_encoder_layers_22_mlp_fc2",
        }),
        ("sdxl", 1052 + 7, {
            "lora_unet_input_blocks_4_1_proj_in", "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_out_0",
            "lora_unet_output_blocks_8_0_skip_connection", "lora_te1_text_model_encoder_layers_11_mlp_fc1",
            "lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
        }),
    ],
)  # fmt: skip
def test_modules_have_kohyas_names(facts, key, modules, some):
    # those inside the blocks that get a LoRA, and the few linear and convolution modules outside
    names = facts[key]["names"]
    assert len(names) == len(set(names)) == modules
    assert some <= set(names)


def test_facts_for_the_metadata(facts):
    assert [facts[key]["facts"] for key in ("sd15", "sd2", "sdxl")] == [
        {
            "ss_base_model_version": "sd_v1",
            "modelspec.architecture": "stable-diffusion-v1/lora",
            "modelspec.implementation": "diffusers",
            "ss_v2": "False",
        },
        {
            "ss_base_model_version": "sd_v2_v",
            "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
            "modelspec.implementation": "diffusers",
            "ss_v2": "True",
        },
        {
            "ss_base_model_version": "sdxl_base_v1-0",
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
            "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
            "ss_v2": "False",
        },
    ]


def test_another_vae_is_read_in_every_layout(facts):
    layouts = ["checkpoint", "diffusers", "old-diffusers", "original", "prefixed"]
    names = ["vae-folder", "of a file", "of a folder", *(f"vae-{layout}.safetensors" for layout in layouts)]
    equal, refusal = facts["vae"]
    assert equal == dict.fromkeys(names, True)
    assert refusal == (
        "ModelError: The VAE …/sdxl-vae belongs to another architecture: its scaling factor is 0.13025 "
        "instead of 0.18215. Choose another VAE, or leave 'vae' empty."
    )


def test_file_that_does_not_fit_is_refused(facts):
    name = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    again, other = "Copy or download the model again", "Choose another version of this model."
    assert facts["damaged"] == {
        "missing": f"ModelError: …/missing.safetensors lacks tensors of its architecture (1, such as {name}). "
        f"{again}, or choose another version of it.",
        "stranger": "ModelError: …/stranger.safetensors holds tensors that its architecture does not have "
        f"(1, such as model.diffusion_model.adapter.weight). {other}",
        "shape": f"ModelError: …/shape.safetensors does not fit its architecture: {name} is (8, 4, 3, 3) instead of "
        f"(8, 8, 3, 3). {other}",
        "folder": "ModelError: …/sd15-folder/text_encoder does not fit its config.json "
        f"(missing keys: 1, such as final_layer_norm.bias). {again}.",
    }


@pytest.mark.parametrize("key", ["sd15", "sdxl"])
def test_samples_are_the_pipelines_and_leave_no_trace(facts, key):
    found = facts["samples"][key]
    assert found["as the pipeline draws"]
    assert found["rng unmoved"]
    assert found["former mode"] == [True, False, True]  # UNet trains, text encoder does not, scheduler is back
    # first timestep, schedule ends in noise, a picture came out
    assert set(map(tuple, found["zero terminal snr"].values())) == {(999.0, True, True)}


def test_samplers_differ(facts):
    assert facts["samples"]["sd15"]["distinct"] == 6


def test_nothing_is_fetched(facts):
    assert facts["connections"] == 0
