"""The LoRA file: names, tensors, both formats, and reading Kohya's back."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lora_trainer import inspection, lora_readers
from lora_trainer.adapter import LoraPair, Size
from lora_trainer.config import from_table
from lora_trainer.errors import ConfigError
from lora_trainer.export import (
    diffusers_metadata,
    diffusers_tensors,
    kohya_tensors,
    legacy_hash,
    lora_file,
    model_hash,
    read_kohya,
    write_lora,
)
from lora_trainer.layouts import full_size
from tests.trainer import lora_files

REPOSITORY = Path(__file__).resolve().parents[2]
PILOT_TINY = REPOSITORY / "lora_trainer" / "assets" / "pilot-tiny"
SCRIPT = Path(__file__).with_name("export_roundtrip.py")
KEYS = ("lora_down.weight", "lora_up.weight", "alpha")


def pair(part="unet", name="a.to_q", file_name="lora_unet_a_to_q", rank=4, alpha=2.0, shape=(8, 6)):
    ones = (1,) * (len(shape) - 2)
    down = torch.nn.Parameter(torch.randn(rank, *shape[1:]))
    up = torch.nn.Parameter(torch.randn(shape[0], rank, *ones))
    return LoraPair(part, name, file_name, down, up, rank, alpha)


@pytest.fixture
def pairs():
    torch.manual_seed(0)
    return [
        pair(),
        pair(name="a.conv", file_name="lora_unet_a_conv", rank=2, alpha=8.0, shape=(8, 6, 3, 3)),
        pair("te1", "encoder.layers.0.mlp.fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        pair("te2", "text_model.encoder.layers.0.mlp.fc1", "lora_te2_text_model_encoder_layers_0_mlp_fc1", alpha=3.0),
    ]


@pytest.fixture
def saved(pairs, tmp_path):
    path = tmp_path / "blob.safetensors"
    write_lora(path, kohya_tensors(pairs, "float"), {})
    return path


@pytest.fixture(scope="module")
def roundtrip(tmp_path_factory):
    """Real models, in a process that does not see this repository's `datasets`."""
    folder = tmp_path_factory.mktemp("roundtrip")
    place = folder / "packages"
    place.mkdir()
    (place / "lora_trainer").symlink_to(REPOSITORY / "lora_trainer")
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), str(PILOT_TINY), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(place)},
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("key", "module", "name"),
    [
        ("sd15", "unet down_blocks.0.attentions.1.proj_in", "lora_unet_down_blocks_0_attentions_1_proj_in"),
        ("sd15", "unet mid_block.resnets.0.time_emb_proj", "lora_unet_mid_block_resnets_0_time_emb_proj"),
        ("sd15", "te1 text_model.encoder.layers.3.self_attn.q_proj",
         "lora_te_text_model_encoder_layers_3_self_attn_q_proj"),
        ("sdxl", "unet down_blocks.1.attentions.0.proj_in", "lora_unet_input_blocks_4_1_proj_in"),
        ("sdxl", "unet down_blocks.0.downsamplers.0.conv", "lora_unet_input_blocks_3_0_op"),
        ("sdxl", "unet mid_block.resnets.1.conv1", "lora_unet_middle_block_2_in_layers_2"),
        ("sdxl", "unet up_blocks.0.upsamplers.0.conv", "lora_unet_output_blocks_2_2_conv"),
        ("sdxl", "unet up_blocks.1.attentions.2.transformer_blocks.1.ff.net.0.proj",
         "lora_unet_output_blocks_5_1_transformer_blocks_1_ff_net_0_proj"),
        ("sdxl", "te1 text_model.encoder.layers.11.mlp.fc1", "lora_te1_text_model_encoder_layers_11_mlp_fc1"),
        ("sdxl", "te2 text_model.encoder.layers.31.mlp.fc2", "lora_te2_text_model_encoder_layers_31_mlp_fc2"),
    ],
)  # fmt: skip
def test_names_of_full_size_models(roundtrip, key, module, name):
    _, report = roundtrip
    assert report["names"][key][module] == name


@pytest.mark.parametrize("key", ["sd15", "sdxl"])
def test_every_name_is_one_that_each_program_reads_for_that_module(roundtrip, key):
    _, report = roundtrip
    layout = full_size(key)
    for program in lora_readers.PROGRAMS:
        targets = program.targets(layout)
        for part, path, shape in lora_files.targets(layout, convolutions=True):
            assert targets[report["names"][key][f"{part} {path}"]] == shape


def test_both_formats_draw_the_same_picture_in_diffusers(roundtrip):
    _, report = roundtrip
    assert report["scales"] == [0.375, 0.75, 1.5]
    assert report["effect"] > 0.1
    for found in report["formats"].values():
        assert (found["modules"], found["same_scales"]) == (228, True)
        # of 1; a scale that is 1% off gives 3e-3, another CPU's order of additions about 1e-6
        assert found["difference"] < 1e-5


def test_files_of_a_reduced_model_are_used_completely(roundtrip):
    folder, _ = roundtrip
    kohyas, own = folder / "safetensors.safetensors", folder / "diffusers.safetensors"
    assert inspection.verify(kohyas, base=PILOT_TINY).is_complete
    assert inspection.verify(own, base=PILOT_TINY, programs=["diffusers"]).is_complete
    assert inspection.inspect(own).parts == inspection.inspect(kohyas).parts


def test_kohya_tensors_have_the_real_alpha(pairs):
    tensors = kohya_tensors(pairs, "fp16")
    assert set(tensors) == {f"{one.file_name}.{key}" for one in pairs for key in KEYS}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert tensors["lora_unet_a_conv.alpha"].item() == 8
    assert torch.equal(tensors["lora_unet_a_conv.lora_down.weight"], pairs[1].down.detach().half())


def test_diffusers_tensors_have_dotted_names(pairs):
    names = [
        "unet.a.to_q",
        "unet.a.conv",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
    ]
    tensors = diffusers_tensors(pairs, "bf16")
    assert list(tensors) == [f"{name}.lora_{letter}.weight" for name in names for letter in "AB"]
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_diffusers_metadata_keeps_ranks_and_alphas(pairs):
    metadata = diffusers_metadata(pairs)
    assert metadata["format"] == "pt"
    assert json.loads(metadata["lora_adapter_metadata"]) == {
        "unet.r": 4, "unet.lora_alpha": 2.0, "unet.rank_pattern": {"a.conv": 2}, "unet.alpha_pattern": {"a.conv": 8.0},
        "unet.target_modules": ["a.conv", "a.to_q"],
        "text_encoder.r": 4, "text_encoder.lora_alpha": 2.0, "text_encoder.rank_pattern": {},
        "text_encoder.alpha_pattern": {}, "text_encoder.target_modules": ["encoder.layers.0.mlp.fc1"],
        "text_encoder_2.r": 4, "text_encoder_2.lora_alpha": 3.0, "text_encoder_2.rank_pattern": {},
        "text_encoder_2.alpha_pattern": {}, "text_encoder_2.target_modules": ["encoder.layers.0.mlp.fc1"],
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "ending"), [("safetensors", "lora_up.weight"), ("diffusers", "lora_B.weight")])
def test_lora_file_has_the_format_asked_for(pairs, kind, ending):
    options = {"pretrained_model_name_or_path": "m", "train_data_dir": "d", "output_dir": "o", "save_model_as": kind}
    tensors, metadata = lora_file(pairs, from_table(options | {"save_precision": "bf16"}), {"ss_v2": "False"})
    assert sum(key.endswith(ending) for key in tensors) == 4
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert metadata["ss_v2"] == "False"
    assert ("lora_adapter_metadata" in metadata) == (kind == "diffusers")


def test_written_file_carries_hashes_of_its_weights(pairs, tmp_path):
    path = tmp_path / "deep" / "blob.safetensors"
    written = write_lora(path, kohya_tensors(pairs, "fp16"), {"ss_v2": "False", "modelspec.sai_model_spec": "1.0.1"})
    content = path.read_bytes()
    assert (written.size_bytes, written.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert [one.name for one in path.parent.iterdir()] == ["blob.safetensors"]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "ss_v2": "False",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.hash_sha256": f"0x{model_hash(content)}",
        "sshs_model_hash": model_hash(content),
        "sshs_legacy_hash": legacy_hash(b""),  # the file ends before 1 MiB
    }
    assert inspection.inspect(path).hash_matches is True
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert inspection.inspect(path).hash_matches is False


def test_file_without_modelspec_gets_no_hash_of_it(pairs, saved):
    with safe_open(saved, framework="pt") as file:
        assert set(file.metadata()) == {"sshs_model_hash", "sshs_legacy_hash"}


def test_read_kohya_gives_back_what_was_written(pairs, saved):
    lora = read_kohya(saved)
    assert lora.sizes == {one.file_name: Size(one.rank, one.alpha) for one in pairs}
    others = [pair(one.part, one.name, one.file_name, one.rank, one.alpha, one.down.shape) for one in pairs]
    for one, other in zip(pairs, others, strict=True):
        other.down.data, other.up.data = torch.zeros_like(one.down), torch.zeros_like(one.up)
    assert lora.load_into(others) == 4
    for one, other in zip(pairs, others, strict=True):
        assert torch.equal(one.down, other.down)
        assert torch.equal(one.up, other.up)


def test_read_kohya_keeps_the_effect_under_another_alpha(pairs, saved):
    other = pair(alpha=4.0)
    lora = read_kohya(saved)
    others = [other, *pairs[1:]]
    assert lora.load_into(others) == 4
    before = pairs[0].alpha * pairs[0].up @ pairs[0].down
    assert torch.equal(other.alpha * other.up @ other.down, before)


def test_read_kohya_leaves_modules_that_the_file_lacks(pairs, saved):
    extra = pair(name="b.to_q", file_name="lora_unet_b_to_q")
    before = extra.up.detach().clone()
    assert read_kohya(saved).load_into([*pairs, extra]) == 4
    assert torch.equal(extra.up, before)


def test_read_kohya_takes_a_file_without_alpha_at_scale_1(tmp_path):
    tensors = {"lora_unet_a.lora_down.weight": torch.zeros(4, 6), "lora_unet_a.lora_up.weight": torch.zeros(8, 4)}
    path = tmp_path / "old.safetensors"
    write_lora(path, tensors, {})
    assert read_kohya(path).sizes == {"lora_unet_a": Size(4, 4.0)}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda pairs: pairs[1:], "does not fit what is trained here: lora_unet_a_to_q would be lost."),
        (lambda pairs: [], "mlp_fc1, lora_unet_a_conv and 1 more would be lost."),
        (lambda pairs: [pair(rank=8), *pairs[1:]],
         "has rank 4 in lora_unet_a_to_q, this run 8. Set dim_from_weights = true"),
        (lambda pairs: [pair(shape=(8, 7)), *pairs[1:]], "lora_unet_a_to_q has another shape."),
    ],
)  # fmt: skip
def test_load_into_refuses_what_does_not_fit(pairs, saved, change, sentence):
    with pytest.raises(ConfigError) as refusal:
        read_kohya(saved).load_into(change(pairs))
    assert sentence in str(refusal.value)
    assert str(saved) in str(refusal.value)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"unet.a.lora_A.weight": (4, 6), "unet.a.lora_B.weight": (8, 4)},
         "is not in Kohya's format: it holds unet.a."),
        ({"lora_unet_a.hada_w1_a": (4, 6)}, "is not in Kohya's format: it holds lora_unet_a.hada_w1_a."),
        ({"lora_prior_unet_a.lora_up.weight": (4, 6)}, "is not in Kohya's format: it holds lora_prior_unet_a."),
        ({"lora_unet_a.lora_down.weight": (4, 6)},
         "is incomplete: lora_down or lora_up of lora_unet_a is missing."),
        ({}, "is not in Kohya's format: it holds nothing."),
    ],
)  # fmt: skip
def test_read_kohya_refuses_other_files(tmp_path, tensors, sentence):
    path = tmp_path / "other.safetensors"
    write_lora(path, {key: torch.zeros(shape) for key, shape in tensors.items()}, {})
    with pytest.raises(ConfigError) as refusal:
        read_kohya(path)
    assert sentence in str(refusal.value)


def test_read_kohya_refuses_damaged_and_missing_files(saved):
    saved.write_bytes(saved.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"'network_weights': blob\.safetensors was cut off"):
        read_kohya(saved)
    saved.unlink()
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_kohya(saved)
