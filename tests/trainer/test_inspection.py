"""What `inspect` and `verify` say about whole, partial, foreign and damaged LoRA files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_trainer import inspection, lora_readers
from lora_trainer.errors import ModelError
from lora_trainer.layouts import full_size, read_layout
from lora_trainer.safetensors_header import HeaderError
from tests.trainer import lora_files
from tests.trainer.lora_files import diffusers_tensors, kohya_module, kohya_tensors, number, write, zeros

REPOSITORY = Path(__file__).resolve().parents[2]
PILOT_TINY = REPOSITORY / "lora_trainer" / "assets" / "pilot-tiny"
TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture
def lora(tmp_path):
    """Writes a LoRA file and returns its path."""

    def make(tensors, metadata=None):
        return write(tmp_path / "blob.safetensors", tensors, metadata)

    return make


@pytest.mark.parametrize(
    ("key", "modules", "with_convolutions", "parts"),
    [
        ("sd15", 264, 350, {"unet": 282, "te1": 72}),
        ("sd2", 330, 416, {"unet": 282, "te1": 138}),
        ("sdxl", 986, 1052, {"unet": 794, "te1": 72, "te2": 193}),
    ],
)
def test_tables_have_the_networks_counts(key, modules, with_convolutions, parts):
    layout = full_size(key)
    assert {part: len(found) for part, found in layout.parts.items()} == parts
    assert len(list(lora_files.targets(layout))) == modules
    assert len(list(lora_files.targets(layout, convolutions=True))) == with_convolutions


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("sd15", {"comfyui": 1908, "a1111": 708, "diffusers": 856}),
        ("sd2", {"comfyui": 2106, "a1111": 702, "diffusers": 1120}),
        ("sdxl", {"comfyui": 5365, "a1111": 1849, "diffusers": 3052}),
    ],
)
def test_tables_have_as_many_names_as_the_programs_read(key, names):
    found = {program.key: len(program.targets(full_size(key))) for program in lora_readers.PROGRAMS}
    assert found == names


@pytest.mark.parametrize("key", ["sd15", "sd2", "sdxl"])
@pytest.mark.parametrize("convolutions", [False, True])
def test_verify_finds_every_key_of_a_whole_lora_used(lora, key, convolutions):
    tensors = kohya_tensors(key, convolutions=convolutions)
    found = inspection.verify(lora(tensors))
    assert (found.architecture, found.is_complete) == (key, True)
    modules = len(tensors) // 3
    assert [(one.program, one.modules, one.used, one.unused_keys, one.misfits) for one in found.programs] == [
        (program, modules, modules, [], []) for program in ("ComfyUI", "A1111", "diffusers")
    ]


def test_verify_names_unknown_keys(lora, capsys):
    stranger = "lora_unet_up_blocks_9_attentions_0_proj_in"
    tensors = kohya_tensors("sd15") | kohya_module(stranger, (320, 320, 1, 1)) | {"thing.hada_w1_a": zeros(1)}
    path = lora(tensors)
    assert inspection.run(["verify", str(path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    lost = ["thing.hada_w1_a", f"{stranger}.lora_down.weight", f"{stranger}.lora_up.weight", f"{stranger}.alpha"]
    assert [(one["used"], one["unused_keys"]) for one in found["programs"]] == [(264, lost)] * 3
    assert inspection.run(["verify", str(path), "--for", "a1111"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "blob.safetensors, on SD 1.5:",
        "  A1111     uses 264 of 265 modules",
        "    4 keys are not used:",
        *(f"      {key}" for key in lost),
    ]


def test_verify_shows_ten_keys_and_counts_the_rest(lora, capsys):
    assert inspection.run(["verify", str(lora(diffusers_tensors("sd15"))), "--for", "a1111"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["  A1111     uses 0 of 264 modules", "    528 keys are not used:"]
    assert (len(lines), lines[-1]) == (14, "      and 518 more; --json lists all")


def test_verify_on_the_wrong_base_model_reports_every_lost_key(lora, tmp_path):
    base = tmp_path / "sd15"
    copy_configs("sd15", base)
    found = inspection.verify(lora(kohya_tensors("sdxl")), base=base, programs=["a1111", "diffusers"])
    assert (found.architecture, found.is_complete) == ("sd15", False)
    a1111, diffusers = found.programs
    # SDXL's first text encoder is that of SD 1.5; A1111 also takes 50 modules of the UNet that happen to fit
    assert diffusers.used == 72
    assert len(diffusers.unused_keys) == 3 * (986 - 72)
    assert all(key.startswith(("lora_unet_", "lora_te2_")) for key in diffusers.unused_keys)
    assert (a1111.used, len(a1111.misfits)) == (72 + 50, 46)


def copy_configs(key, base):
    """A diffusers folder of that architecture, as far as `verify` looks at it."""
    configs = REPOSITORY / "lora_trainer" / "assets" / "configs" / key
    parts = ["unet", "text_encoder", "vae", "scheduler"]
    for part in [*parts, "tokenizer"]:
        (base / part).mkdir(parents=True)
    for part in parts:
        (base / part / "config.json").write_bytes((configs / f"{part}.json").read_bytes())
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        write(base / part / f"{name}.safetensors", {"weight": zeros(1)})
    (base / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))


def test_verify_of_a_reduced_model_needs_its_folder(lora, capsys):
    layout = read_layout(PILOT_TINY)
    path = lora(kohya_tensors(layout, convolutions=True), {"ss_base_model_version": "sdxl_base_v1-0"})
    assert inspection.run(["verify", str(path), "--base", str(PILOT_TINY)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"blob.safetensors, on SDXL ({PILOT_TINY}):",
        *(f"  {name:<9} uses 228 of 228 modules" for name in ("ComfyUI", "A1111", "diffusers")),
    ]
    assert inspection.run(["verify", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "  If it was trained on a model of another size, name that model with --base."


@pytest.mark.parametrize(
    ("base", "sentence"),
    [("nowhere", "does not exist"), (".", "has no model_index.json")],
)
def test_verify_with_a_base_that_is_none_ends_with_2(lora, tmp_path, capsys, base, sentence):
    assert inspection.run(["verify", str(lora(kohya_tensors("sd15"))), "--base", str(tmp_path / base)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: The base model")
    assert sentence in error


def test_verify_checks_shapes_as_each_program_does(lora):
    tensors = kohya_tensors("sdxl")
    name = "lora_unet_input_blocks_4_1_proj_in"
    # 1x1 convolutions on a linear module: only diffusers minds
    tensors |= {f"{name}.lora_down.weight": zeros(1, 640, 1, 1), f"{name}.lora_up.weight": zeros(640, 1, 1, 1)}
    comfyui, a1111, diffusers = inspection.verify(lora(tensors)).programs
    assert comfyui.is_complete
    assert a1111.is_complete
    assert diffusers.misfits == [inspection.Misfit(name, [640, 640], [1, 640, 1, 1], [640, 1, 1, 1])]
    tensors |= {f"{name}.lora_down.weight": zeros(2, 640)}  # up has rank 1
    assert [len(one.misfits) for one in inspection.verify(lora(tensors)).programs] == [1, 1, 1]


def test_verify_counts_half_a_module_as_unused(lora):
    tensors = kohya_tensors("sd15")
    del tensors[f"{TO_Q}.lora_up.weight"]
    for verdict in inspection.verify(lora(tensors)).programs:
        assert (verdict.used, verdict.unused_keys) == (263, [f"{TO_Q}.lora_down.weight", f"{TO_Q}.alpha"])


def test_verify_of_diffusers_own_spelling(lora):
    tensors = diffusers_tensors("sd15")
    path = lora(tensors | {"unet.mid_block.attentions.0.proj_in.alpha": number(1)})
    comfyui, a1111, diffusers = inspection.verify(path).programs
    # ComfyUI knows `attn1.processor.to_q`, not `attn1.to_q`: 128 modules
    assert (comfyui.used, len(comfyui.unused_keys), a1111.used) == (264 - 128, 2 * 128, 0)
    assert (diffusers.used, diffusers.unused_keys) == (264, ["unet.mid_block.attentions.0.proj_in.alpha"])
    assert inspection.verify(lora(tensors), programs=["diffusers"]).is_complete


def test_verify_says_where_diffusers_takes_another_alpha(lora):
    tensors = kohya_tensors("sd15") | {
        f"{TO_Q}.alpha": number(3),
        "lora_unet_mid_block_attentions_0_proj_in.alpha": number(3),  # this one it keeps
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": number(3),
    }
    found = inspection.verify(lora(tensors))
    other = [TO_Q, "lora_te_text_model_encoder_layers_0_mlp_fc1"]
    assert [one.at_other_strength for one in found.programs] == [[], [], other]
    assert not found.is_complete


def test_verify_takes_only_known_programs(lora, capsys):
    with pytest.raises(SystemExit) as left:
        inspection.run(["verify", str(lora({})), "--for", "comfyui,forge"])
    assert left.value.code == 2
    assert "forge is not among comfyui, a1111, diffusers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "was cut off"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "was cut off inside its header"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "belong to no tensor"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), "was cut off inside its header"),
        (lambda path: path.write_bytes(b""), "it is no .safetensors file"),
        (lambda path: path.unlink(), "cannot be read: No such file or directory"),
        (lambda path: write(path, {"model.weight": zeros(2, 2)}), "holds no LoRA: none of its 1 keys is one of a LoRA"),
        (lambda path: write(path, {"a.alpha": number(1)}), "holds no LoRA"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_damaged_file_ends_with_2_and_one_sentence(lora, capsys, command, damage, sentence):
    path = lora(kohya_module(TO_Q, (320, 320)))
    damage(path)
    assert inspection.run([command, str(path), "--json"]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n"), error.startswith("Error: ")) == ("", 1, True)
    assert sentence in error


def test_unknown_architecture_can_be_inspected_but_not_verified(lora, capsys):
    path = lora(kohya_module("lora_unet_double_blocks_0_img_attn_qkv", (9216, 3072)))
    assert inspection.inspect(path).architecture == ""
    assert inspection.run(["verify", str(path)]) == 2
    assert "is not SD 1.5, SD 2 or SDXL. Name the model with --base." in capsys.readouterr().err


@pytest.mark.parametrize("key", ["sd15", "sd2", "sdxl"])
@pytest.mark.parametrize("part", ["lora_unet", "lora_te"])
def test_architecture_shows_in_either_part(lora, key, part):
    tensors = {name: tensor for name, tensor in kohya_tensors(key).items() if name.startswith(part)}
    assert inspection.inspect(lora(tensors)).architecture == key


def test_inspect_says_what_a_file_holds(lora):
    tensors = kohya_tensors("sd15", convolutions=True, rank=2, alpha=4.0)
    tensors |= kohya_module("lora_unet_mid_block_resnets_0_conv1", (1280, 1280, 3, 3), rank=1, alpha=0.5)
    tensors[f"{TO_Q}.alpha"] = number(8, "BF16")
    metadata = {
        "modelspec.title": "My blob", "ss_steps": "24", "ss_epoch": "2", "ss_sd_model_name": "base.safetensors",
        "ss_base_model_version": "sd_v1", "ss_num_train_images": "12", "ss_text_encoder_lr": "None",
        "ss_dataset_dirs": '{"3_blob": {"n_repeats": 3, "img_count": 4}}', "sshs_model_hash": "0" * 64,
    }  # fmt: skip
    found = inspection.inspect(lora(tensors, metadata))
    assert (found.spelling, found.architecture, found.dtype) == ("kohya", "sd15", "F16")
    assert found.parts == [
        inspection.Part("unet", 278, 50, {"2": 277, "1": 1}, {"4": 276, "8": 1, "0.5": 1}),
        inspection.Part("te1", 72, 0, {"2": 72}, {"4": 72}),
    ]
    assert (found.has_convolutions, found.other_keys, found.hash_matches) == (True, [], False)
    assert found.facts == {
        "title": "My blob", "base_model": "base.safetensors", "base_model_version": "sd_v1", "steps": "24",
        "epochs": "2", "images": "12",
    }  # fmt: skip
    assert found.datasets == {"3_blob": {"n_repeats": 3, "img_count": 4}}


def test_inspect_prints_text_or_json(lora, capsys):
    metadata = {"ss_steps": "24", "ss_dataset_dirs": '{"3_blob": {"n_repeats": 3, "img_count": 4}}'}
    path = lora(kohya_tensors("sdxl", rank=4, alpha=2.0) | {"extra": zeros(1)}, metadata)
    assert inspection.run(["inspect", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"blob.safetensors: LoRA for SDXL, {path.stat().st_size / 1e6:.1f} MB",
        f"  keys         kohya, F16, {inspection.inspect(path).parameters:,} parameters",
        "  UNet         722 modules",
        "    rank       4",
        "    alpha      2",
        "  text encoder 1 72 modules",
        "    rank       4",
        "    alpha      2",
        "  text encoder 2 192 modules",
        "    rank       4",
        "    alpha      2",
        "  other keys   1",
        "    extra",
        "  steps: 24",
        "  dataset 3_blob: 4 pictures, 3 times",
    ]
    assert inspection.run(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [part["modules"] for part in found["parts"]] == [722, 72, 192]


def test_inspect_reads_alpha_of_diffusers_files_from_the_metadata(lora):
    settings = {
        "unet.lora_alpha": 3.0, "unet.alpha_pattern": {"mid_block.attentions.0.proj_in": 5.0},
        "text_encoder.lora_alpha": 1.5, "text_encoder.alpha_pattern": {"encoder.layers.0.mlp.fc1": 2.5},
    }  # fmt: skip
    found = inspection.inspect(lora(diffusers_tensors("sd15"), {"lora_adapter_metadata": json.dumps(settings)}))
    assert [part.alphas for part in found.parts] == [{"3": 191, "5": 1}, {"1.5": 71, "2.5": 1}]
    assert found.spelling == "diffusers"


@pytest.mark.parametrize("text", ["[]", "{", '{"3_blob": 4}'])
def test_inspect_passes_over_metadata_that_says_nothing(lora, text):
    metadata = {"ss_dataset_dirs": text, "lora_adapter_metadata": text}
    assert inspection.inspect(lora(diffusers_tensors("sd15"), metadata)).datasets == {}


@pytest.mark.parametrize("shape", [(), (4,), (0, 320)])
def test_odd_shapes_fit_nowhere(lora, shape):
    tensors = kohya_module(TO_Q.replace("attn1_to_q", "attn2_to_k"), (320, 768))
    key = next(iter(tensors))
    tensors[key] = zeros(*shape)
    path = lora(tensors | kohya_module("lora_te_text_model_encoder_layers_0_mlp_fc1", (3072, 768)))
    assert [one.used for one in inspection.verify(path).programs] == [1, 1, 1]
    assert inspection.inspect(path).architecture == "sd15"


def test_functions_raise_for_a_caller(lora, tmp_path):
    path = lora(kohya_tensors("sd15"))
    with pytest.raises(ModelError):
        inspection.verify(path, base=tmp_path / "nowhere")
    path.write_bytes(b"")
    with pytest.raises(HeaderError):
        inspection.inspect(path)


def test_inspection_needs_no_pytorch():
    code = "import sys, lora_trainer.inspection; print([name for name in ('torch', 'django') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout == "[]\n"
