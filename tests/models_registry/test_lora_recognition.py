"""What LoRA files are, by their headers: every spelling, every base model, and what strangers may send."""

import json
import struct

import pytest

from models_registry.lora_recognition import (
    MOST_HEADER_BYTES,
    Unrecognised,
    metadata_rows,
    recognise_lora,
)
from tests.models_registry.conftest import SDXL as SDXL_CHECKPOINT
from tests.models_registry.conftest import write_file, write_raw
from tests.models_registry.loras import SD15, SDXL, UNET, kohya, peft, write_lora


def told(path):
    found = recognise_lora(path)
    return found.architecture, found.style, found.algorithm, found.rank


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (SD15, ("sd15", "kohya", "LoRA", 4)),
        (kohya(UNET, inside=1024), ("sd2", "kohya", "LoRA", 4)),
        (SDXL, ("sdxl", "kohya", "LoRA", 4)),
        (kohya("input_blocks_4_1_transformer_blocks_1_attn2_to_k", inside=2048), ("sdxl", "kohya", "LoRA", 4)),
        (kohya("down_blocks_2_attentions_0_transformer_blocks_9_attn1_to_k"), ("sdxl", "kohya", "LoRA", 4)),
        (peft(UNET.replace("_to_k", ".to_k"), prefix="unet.", inside=768), ("sd15", "peft", "LoRA", 4)),
        (
            {
                "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight": (8, 768),
                "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.up.weight": (320, 8),
            },
            ("sd15", "diffusers", "LoRA", 8),
        ),
        (kohya("joint_blocks_0_x_block_attn_qkv", inside=1536), ("sd3", "kohya", "LoRA", 4)),
        (peft("transformer_blocks.0.attn.add_q_proj", inside=1536), ("sd3", "peft", "LoRA", 4)),
        (kohya("double_blocks_0_img_attn_qkv", inside=3072), ("flux", "kohya", "LoRA", 4)),
        (peft("single_transformer_blocks.0.attn.to_q"), ("flux", "peft", "LoRA", 4)),
        (peft("double_blocks.0.img_attn.qkv", prefix="diffusion_model.", inside=6144), ("flux2", "peft", "LoRA", 4)),
        (kohya("double_blocks_0_img_attn_qkv", inside=3584), ("hunyuan_image", "kohya", "LoRA", 4)),
        (kohya("double_blocks_0_img_mlp_fc1", inside=3072), ("hunyuan_video", "kohya", "LoRA", 4)),
        (peft("distilled_guidance_layer.layers.0.in_layer"), ("chroma", "peft", "LoRA", 4)),
        (peft("transformer_blocks.0.img_mlp.net.0.proj"), ("qwen_image", "peft", "LoRA", 4)),
        (peft("transformer_blocks.59.attn.to_q"), ("qwen_image", "peft", "LoRA", 4)),
        (peft("blocks.0.self_attn.q", prefix="diffusion_model.", inside=5120), ("wan", "peft", "LoRA", 4)),
        (peft("blocks.0.cross_attn.k", prefix="diffusion_model.", inside=3072), ("wan22", "peft", "LoRA", 4)),
        (kohya("blocks_0_self_attn_q_proj", inside=2048), ("anima", "kohya", "LoRA", 4)),
        (peft("layers.0.attention.qkv", prefix="diffusion_model.", inside=2304), ("lumina2", "peft", "LoRA", 4)),
        (peft("layers.0.attention.to_q", prefix="diffusion_model.", inside=3840), ("z_image", "peft", "LoRA", 4)),
        (peft("layers.0.attn.to_q", inside=2520), ("omnigen2", "peft", "LoRA", 4)),
        (peft("double_stream_blocks.0.block.attn1.to_q", inside=2560), ("hidream", "peft", "LoRA", 4)),
        (peft("joint_transformer_blocks.0.attn.to_q"), ("auraflow", "peft", "LoRA", 4)),
        (peft("transformer_blocks.0.attn1.to_q", inside=2048), ("ltx", "peft", "LoRA", 4)),
        (
            peft(UNET, prefix="base_model.model.unet.", inside=2048, ending="default.weight"),
            ("sdxl", "peft", "LoRA", 4),
        ),
        (peft("something.else"), ("unknown", "peft", "LoRA", 4)),
    ],
)
def test_spelling_and_base_model_are_told_by_the_tensors(tmp_path, shapes, expected):
    assert told(write_lora(tmp_path / "a.safetensors", shapes)) == expected


def test_lycoris_algorithms_are_told_apart(tmp_path):
    name = f"lora_unet_{UNET}"
    loha = {
        f"{name}.hada_w1_a": (640, 8),
        f"{name}.hada_w1_b": (8, 2048),
        f"{name}.hada_w2_a": (640, 8),
        f"{name}.hada_w2_b": (8, 2048),
    }
    lokr = {f"{name}.lokr_w1": (16, 16), f"{name}.lokr_w2_a": (40, 6), f"{name}.lokr_w2_b": (6, 128)}
    full = {f"{name}.diff": (640, 2048), f"{name}.diff_b": (640,)}
    assert told(write_lora(tmp_path / "a.safetensors", loha)) == ("sdxl", "lycoris", "LoHa", 8)
    assert told(write_lora(tmp_path / "b.safetensors", lokr)) == ("sdxl", "lycoris", "LoKr", 6)
    assert told(write_lora(tmp_path / "c.safetensors", full)) == ("unknown", "lycoris", "Full difference", 0)
    mixed = kohya("down_blocks_1_attentions_0_proj_in", rank=4) | loha
    assert told(write_lora(tmp_path / "d.safetensors", mixed))[1:3] == ("mixed", "mixed")


@pytest.mark.parametrize(
    ("shapes", "metadata", "expected"),
    [
        (peft("x.y"), {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        (peft("x.y"), {"ss_base_model_version": "sd_v1"}, "sd15"),
        (peft("x.y"), {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
        (peft("x.y"), {"modelspec.architecture": "nobody-knows"}, "unknown"),
        (kohya("double_blocks_0_img_attn_qkv", inside=3072), {"modelspec.architecture": "chroma/lora"}, "chroma"),
        (kohya("double_blocks_0_img_attn_qkv", inside=3072), {"ss_base_model_version": "sdxl"}, "flux"),
        (kohya("text_model_encoder_layers_0_mlp_fc1", prefix="lora_te_"), {}, "sd15"),
        (kohya("text_model_encoder_layers_0_mlp_fc1", prefix="lora_te2_", inside=1280), {}, "sdxl"),
    ],
)
def test_metadata_decides_only_what_the_modules_leave_open(tmp_path, shapes, metadata, expected):
    found = recognise_lora(write_lora(tmp_path / "a.safetensors", shapes, metadata=metadata))
    assert found.architecture == expected


def test_parts_ranks_and_alphas_are_counted(tmp_path):
    shapes = (
        kohya("down_blocks_0_a", UNET, rank=16, inside=2048)
        | kohya("mid_block_b", rank=8)
        | kohya("text_model_c", prefix="lora_te2_", rank=4)
    )
    path = write_lora(tmp_path / "a.safetensors", shapes, dtype="F32")
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    start = path.stat().st_size - max(entry["data_offsets"][1] for entry in header.values())
    with path.open("r+b") as file:
        for name, entry in header.items():
            if name.endswith(".alpha"):
                file.seek(start + entry["data_offsets"][0])
                file.write(struct.pack("<f", 1.0 if "mid" in name else 8.0))
    found = recognise_lora(path)
    assert [(part.title, part.modules, dict(part.ranks), dict(part.alphas)) for part in found.parts] == [
        ("UNet", 3, {"16": 2, "8": 1}, {"8": 2, "1": 1}),
        ("Text encoder 2", 1, {"4": 1}, {"8": 1}),
    ]
    assert (found.rank, found.alpha, found.dtype) == (16, 8.0, "F32")


@pytest.mark.parametrize(
    ("metadata", "alpha"),
    [
        ({"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 32})}, 32.0),
        ({"ss_network_alpha": "16.0"}, 16.0),
        ({"ss_network_alpha": "None"}, None),
        ({"ss_network_alpha": "nan"}, None),
        ({"lora_adapter_metadata": "[" * 5000}, None),
        ({"lora_adapter_metadata": '{"lora_alpha": [1]}'}, None),
        ({}, None),
    ],
)
def test_alpha_may_stand_in_the_metadata(tmp_path, metadata, alpha):
    path = write_lora(tmp_path / "a.safetensors", peft("x.y"), metadata=metadata)
    assert recognise_lora(path).alpha == alpha


def test_half_a_module_and_strange_tensors_are_told(tmp_path):
    shapes = kohya("down_blocks_0_a", "down_blocks_0_b") | {"bundle_emb.x.string_to_param.*": (4, 768)}
    del shapes["lora_unet_down_blocks_0_a.lora_up.weight"]
    assert recognise_lora(write_lora(tmp_path / "a.safetensors", shapes)).notes == (
        "1 modules have only one of their two matrices: the file is damaged, or was edited.",
        "1 further tensors belong to no LoRA.",
    )


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        ({}, "is no LoRA"),
        ({"a.weight": (4,)}, "none of its 1 tensors is one of a LoRA's"),
        ({"x.alpha": ()}, "is no LoRA"),
        (SDXL_CHECKPOINT, "is no LoRA"),
        (SDXL_CHECKPOINT | peft("x"), "Is it a base model?"),
    ],
)
def test_what_is_no_lora_is_refused(tmp_path, shapes, sentence):
    with pytest.raises(Unrecognised, match=sentence.replace("?", r"\?")):
        recognise_lora(write_file(tmp_path / "a.safetensors", shapes))


def test_pickles_are_refused_by_the_name_that_a_person_gave(tmp_path):
    path = write_lora(tmp_path / "key")
    with pytest.raises(Unrecognised, match=r"evil\.pt is a pickle file"):
        recognise_lora(path, name="evil.pt")


def test_sentences_have_the_name_that_a_person_gave(tmp_path):
    path = tmp_path / "key"
    path.write_bytes(b"x")
    with pytest.raises(Unrecognised, match=r"^cat\.safetensors has only 1 bytes"):
        recognise_lora(path, name="cat.safetensors")


def test_header_beyond_the_limit_is_not_read(tmp_path):
    path = write_raw(tmp_path / "a.safetensors", b"{", length=MOST_HEADER_BYTES + 1, data_bytes=MOST_HEADER_BYTES + 8)
    with pytest.raises(Unrecognised, match="has a header of 16,777,217 bytes"):
        recognise_lora(path)


def test_ranks_that_are_claimed_without_numbers_are_passed_by(tmp_path):
    shapes = {"x.lora_A.weight": (2**62, 0), "x.lora_B.weight": (0, 2**62)}
    found = recognise_lora(write_file(tmp_path / "a.safetensors", shapes))
    assert (found.rank, found.parameters) == (0, 0)


def test_large_file_is_not_read(tmp_path, monkeypatch):
    """24 GB of holes: what is read is counted, not timed."""
    path = write_raw(
        tmp_path / "a.safetensors",
        json.dumps(
            {
                "x.lora_A.weight": {"dtype": "F16", "shape": [4, 3 * 10**9], "data_offsets": [0, 24 * 10**9]},
                "x.lora_B.weight": {"dtype": "F16", "shape": [0, 4], "data_offsets": [24 * 10**9, 24 * 10**9]},
            }
        ).encode(),
        data_bytes=24 * 10**9,
    )
    assert recognise_lora(path).bytes == path.stat().st_size


def test_metadata_rows_are_sorted_bounded_and_printable():
    rows = metadata_rows(
        {
            "ss_b": "x" * 5000,
            "note": "a\x00b\nc\u202e",
            "modelspec.thumbnail": "data:image/png;base64,AAAA",
            "lorapilot_run": "3",
        }
        | {f"z{number}": "" for number in range(1000)}
    )
    assert len(rows) == 300
    assert [(row.group, row.key, row.value[:40], row.is_cut) for row in rows[:4]] == [
        ("LoRA Pilot", "lorapilot_run", "3", False),
        ("ModelSpec", "modelspec.thumbnail", "(a picture of 26 characters)", False),
        ("Training (sd-scripts)", "ss_b", "x" * 40, True),
        ("Other", "note", "a b\nc ", False),
    ]
