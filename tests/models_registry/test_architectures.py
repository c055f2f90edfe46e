"""Every architecture in every layout, and those that resemble each other."""

from __future__ import annotations

import json

import pytest

from models_registry.diffusers_folder import PIPELINES, TRANSFORMER_CLASSES
from models_registry.enums import Architecture
from models_registry.recognition import TITLES, Unrecognised, recognise
from tests.models_registry import published
from tests.models_registry.conftest import VAE, write_file
from tests.models_registry.published import TRANSFORMERS, prefixed, vae, wan

TRAINED_AT = {"hunyuan_image": 2048, "qwen_image": 1328, "wan": 480, "wan22": 720, "ltx": 512, "hunyuan_video": 720}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(("architecture", "tensors"), TRANSFORMERS)
def test_transformer_is_recognised_alone_and_in_a_checkpoint(tmp_path, architecture, tensors, prefix):
    found = recognise(write_file(tmp_path / "flux.safetensors", prefixed(prefix, tensors)), root=tmp_path)
    assert (found.architecture, found.resolution, found.prediction_type) == (
        architecture,
        TRAINED_AT.get(architecture, 1024),
        "flow_prediction",
    )
    assert [component.role for component in found.components] == ["transformer"]
    assert found.notes[0] == (
        "The file does not hold the VAE and the text encoders: staff add them under “Other files it is trained with”."
    )


@pytest.mark.parametrize(
    ("architecture", "prefix", "tensors"),
    [("anima", "net.", published.ANIMA), ("auraflow", "model.", published.AURAFLOW)],
)
def test_transformer_under_the_prefix_of_its_trainer(tmp_path, architecture, prefix, tensors):
    path = write_file(tmp_path / "x.safetensors", prefixed(prefix, tensors))
    assert recognise(path, root=tmp_path).architecture == architecture


def test_checkpoint_of_a_transformer_has_its_parts(tmp_path):
    tensors = prefixed("model.diffusion_model.", published.LTX) | VAE
    tensors |= {"text_encoders.qwen25_7b.model.norm.weight": (8,)}
    found = recognise(write_file(tmp_path / "x.safetensors", tensors), root=tmp_path)
    assert [(part.title, part.tensors) for part in found.parts] == [
        ("Transformer", 3),
        ("VAE", 1),
        ("Text encoders", 1),
    ]
    assert (found.components[0].role, found.notes) == ("checkpoint", ())


def test_every_architecture_is_tested_here():
    assert {architecture for architecture, _ in TRANSFORMERS} | {"sd15", "sd2", "sdxl"} == set(TITLES)
    assert set(TITLES) == set(Architecture.values) - {"unknown"}
    assert set(TRANSFORMER_CLASSES) | {"anima"} == {architecture for architecture, _ in TRANSFORMERS}


@pytest.mark.parametrize(
    ("tensors", "open_question"),
    [
        (wan(), "Wan 2.1 and the A14B models of Wan 2.2 have the same tensors"),
        (published.QWEN_IMAGE, "Qwen-Image and Qwen-Image-Edit have the same tensors"),
        (wan(channels=36), "It is an image-to-video model"),
    ],
)
def test_what_the_tensors_leave_open_is_said(tmp_path, tensors, open_question):
    found = recognise(write_file(tmp_path / "x.safetensors", tensors), root=tmp_path)
    assert len(found.notes) == 2
    assert found.notes[1].startswith(open_question)


def test_what_the_tensors_decide_is_not_left_open(tmp_path):
    path = write_file(tmp_path / "x.safetensors", wan(channels=48, latent=48))
    assert len(recognise(path, root=tmp_path).notes) == 1


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (wan(channels=48), "takes 48 channels instead of 16"),
        (wan(channels=96, latent=48), "takes 96 channels instead of 48"),
        (wan() | {"vace_patch_embedding.weight": (8, 96, 1, 2, 2)}, "is Wan VACE, which no trainer here supports"),
        (published.LTX | {"audio_adaln_single.linear.weight": (8, 8)}, "is LTX-2, which"),
        (published.DIFFUSERS_HUNYUAN_VIDEO | {"clean_x_embedder.proj.weight": (8, 16, 1, 2, 2)}, "is FramePack, which"),
        (published.CHROMA | {"nerf_blocks.0.norm.scale": (8,)}, "is Chroma Radiance, which"),
        (published.LUMINA2 | {"clip_text_pooled_proj.0.weight": (8,)}, "is NewBie, which"),
        ({name: published.ANIMA[name] for name in published.ANIMA if "llm" not in name}, "is Cosmos-Predict2, which"),
        (published.FLUX2 | {"img_in.weight": (8, 256)}, "takes 256 channels instead of 128"),
        (published.HUNYUAN_IMAGE | {"img_in.proj.weight": (8, 128, 1, 1)}, "takes 128 channels instead of 64"),
        (
            published.Z_IMAGE | {"x_embedder.weight": (64,)},
            "5 tensors that fit none of Stable Diffusion 1.5, .*OmniGen2",
        ),
    ],
)
def test_relative_of_an_architecture_is_refused(tmp_path, tensors, words):
    path = write_file(tmp_path / "x.safetensors", tensors)
    with pytest.raises(Unrecognised, match=words):
        recognise(path, root=tmp_path)


OF_FOLDERS = {
    "ChromaPipeline": published.DIFFUSERS_CHROMA,
    "Lumina2Pipeline": published.DIFFUSERS_LUMINA2,
    "Lumina2Text2ImgPipeline": published.DIFFUSERS_LUMINA2,
    "HunyuanImagePipeline": published.DIFFUSERS_HUNYUAN_IMAGE,
    "WanPipeline": published.diffusers_wan(),
    "WanImageToVideoPipeline": published.diffusers_wan(channels=36, picture=True),
    "QwenImagePipeline": published.QWEN_IMAGE,
    "HiDreamImagePipeline": published.HIDREAM,
    "ZImagePipeline": published.DIFFUSERS_Z_IMAGE,
    "Flux2Pipeline": published.DIFFUSERS_FLUX2,
    "Flux2KleinPipeline": published.DIFFUSERS_FLUX2,
    "LTXPipeline": published.DIFFUSERS_LTX,
    "LTXConditionPipeline": published.DIFFUSERS_LTX,
    "HunyuanVideoPipeline": published.DIFFUSERS_HUNYUAN_VIDEO,
    "AuraFlowPipeline": published.DIFFUSERS_AURAFLOW,
    "OmniGen2Pipeline": published.OMNIGEN2,
    "StableDiffusion3Pipeline": published.DIFFUSERS_SD3,
    "FluxPipeline": published.DIFFUSERS_FLUX,
}


def write_json(path, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_folder(folder, pipeline, tensors, *, transformer_class=None, more=(), tokenizer="tokenizer.json"):
    """A diffusers folder of that class: as little as makes it whole."""
    architectures, required = PIPELINES[pipeline]
    parts = (*required, *more)
    write_json(folder / "model_index.json", _class_name=pipeline, **{part: ["a", "B"] for part in parts})
    for part in parts:
        if part.startswith("transformer"):
            name = transformer_class or TRANSFORMER_CLASSES[architectures[0]]
            write_json(folder / part / "config.json", _class_name=name, sample_size=64)
            write_file(folder / part / "diffusion_pytorch_model.safetensors", tensors)
        elif part == "vae":
            write_json(folder / part / "config.json", block_out_channels=[1, 2, 4, 4])
            write_file(folder / part / "diffusion_pytorch_model.safetensors", vae(16))
        elif part == "scheduler":
            write_json(folder / part / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")
        elif part.startswith("tokenizer") or part == "processor":
            write_json(folder / part / tokenizer, tokenizer_class="ByT5Tokenizer")
        else:
            write_json(folder / part / "config.json")
            write_file(folder / part / "model.safetensors", {"a": (4,)})
    return folder


@pytest.mark.parametrize(("pipeline", "tensors"), OF_FOLDERS.items())
def test_folder_of_every_pipeline(tmp_path, pipeline, tensors):
    folder = write_folder(tmp_path / "model", pipeline, tensors)
    found = recognise(folder, root=tmp_path)
    architecture = PIPELINES[pipeline][0][0]
    resolution = 512 if architecture in {"sd3", "flux", "lumina2"} else TRAINED_AT.get(architecture, 1024)
    assert (found.layout, found.architecture, found.resolution, found.prediction_type, found.notes) == (
        "folder",
        architecture,
        resolution,
        "flow_prediction",
        (),
    )
    assert {component.path for component in found.components} == {
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
    }


def test_every_pipeline_is_tested():
    assert set(OF_FOLDERS) | {"StableDiffusionPipeline", "StableDiffusionXLPipeline"} == set(PIPELINES)


def test_folder_of_wan22_by_its_tensors_or_its_second_transformer(tmp_path):
    of_5b = write_folder(tmp_path / "a", "WanPipeline", published.diffusers_wan(channels=48, latent=48))
    of_a14b = write_folder(tmp_path / "b", "WanPipeline", published.diffusers_wan(), more=["transformer_2"])
    assert [recognise(folder, root=tmp_path).architecture for folder in (of_5b, of_a14b)] == ["wan22", "wan22"]
    titles = [part.title for part in recognise(of_a14b, root=tmp_path).parts]
    assert titles == ["Transformer", "Transformer 2", "VAE", "Text encoder"]


def test_folder_whose_tokenizer_reads_bytes(tmp_path):
    folder = write_folder(
        tmp_path / "a", "HunyuanImagePipeline", published.DIFFUSERS_HUNYUAN_IMAGE, tokenizer="tokenizer_config.json"
    )
    assert recognise(folder, root=tmp_path).architecture == "hunyuan_image"
    write_json(folder / "tokenizer" / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    with pytest.raises(Unrecognised, match="tokenizer holds no tokenizer"):
        recognise(folder, root=tmp_path)


@pytest.mark.parametrize(
    ("pipeline", "tensors", "options", "words"),
    [
        ("ChromaPipeline", published.DIFFUSERS_FLUX, {}, "says Chroma, but the tensors of .* are those of FLUX.1"),
        ("FluxPipeline", published.DIFFUSERS_FLUX2, {}, "says FLUX.1, but the tensors of .* are those of FLUX.2"),
        ("Lumina2Pipeline", published.OMNIGEN2, {}, "says Lumina Image 2.0, but .* those of OmniGen2"),
        (
            "ZImagePipeline",
            published.DIFFUSERS_Z_IMAGE,
            {"transformer_class": "FluxTransformer2DModel"},
            "says 'FluxTransformer2DModel', its tensors are those of a ZImageTransformer2DModel",
        ),
    ],
)
def test_folder_that_contradicts_itself(tmp_path, pipeline, tensors, options, words):
    folder = write_folder(tmp_path / "model", pipeline, tensors, **options)
    with pytest.raises(Unrecognised, match=words):
        recognise(folder, root=tmp_path)
