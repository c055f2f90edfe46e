"""Broken configurations, datasets and models (tests/trainer/bad): one clear sentence and exit status 2, each."""

import json
from pathlib import Path

import pytest

from lora_trainer.command import main

BAD = Path(__file__).parent / "bad"
MODEL = Path(__file__).resolve().parents[2] / "lora_trainer" / "assets" / "pilot-tiny"
CONFIGS = sorted((BAD / "configs").glob("*.toml"))


def refusal(tmp_path, capsys, text="", **options):
    """The sentence with which `options` after `text` are refused."""
    given = {"pretrained_model_name_or_path": MODEL, "dataset_manifest": BAD / "datasets" / "good.jsonl"} | options
    given |= {"output_dir": tmp_path / "out"}
    lines = [f"{key} = {json.dumps(str(value))}" for key, value in given.items() if value is not None]
    config = tmp_path / "config.toml"
    config.write_text("\n".join([*lines, text]))
    status = main([str(config), "--dry-run"])
    shown = capsys.readouterr()
    assert (status, shown.err) == (2, "")
    *before, last = shown.out.splitlines()
    assert not any(line.startswith(("Traceback", "Error")) for line in before)
    assert last.startswith("Error: ")
    assert not (tmp_path / "out").exists()
    return last.removeprefix("Error: ")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_broken_configuration_is_refused_with_its_sentence(tmp_path, capsys, path):
    first, _, rest = path.read_text().partition("\n")
    found = refusal(tmp_path, capsys, rest)
    assert found.replace(str(tmp_path), "…") == first.removeprefix("# ")


def test_missing_configuration_is_refused(tmp_path, capsys):
    assert main([str(tmp_path / "none.toml")]) == 2
    assert capsys.readouterr().out == f"Error: The configuration file {tmp_path}/none.toml does not exist.\n"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("empty", "The dataset {} has no pictures to train on. Add some and start again."),
        ("nowhere", "The dataset folder {} does not exist."),
        ("unnamed", "The dataset {} has no pictures to train on. Add some and start again."),
        ("zero", "The picture {}/3_cats/cat.png cannot be read; replace or remove it."),
        ("no-picture", "The picture {}/3_cats/cat.png cannot be read; replace or remove it."),
        ("latin", "The caption {}/3_cats/cat.txt cannot be read as UTF-8 text."),
    ],
)
def test_broken_folder_is_refused_by_name(tmp_path, capsys, name, sentence):
    folder = BAD / "datasets" / name
    assert refusal(tmp_path, capsys, dataset_manifest=None, train_data_dir=folder) == sentence.format(folder)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere", "The dataset manifest {0} cannot be read: [Errno 2] No such file or directory: '{0}'."),
        ("missing-picture", "The picture {1}/nowhere.png does not exist."),
        ("no-json", "Line 2 of {0} is not valid JSON: Expecting value."),
        ("no-image-key", 'Line 1 of {0} must be an object with an "image" path.'),
        ("negative-repeats", 'Line 1 of {0}: "caption" must be a text and "repeats" a whole number of at least 1.'),
        ("empty", "The dataset {0} has no pictures to train on. Add some and start again."),
    ],
)
def test_broken_manifest_is_refused_by_line(tmp_path, capsys, name, sentence):
    path = BAD / "datasets" / f"{name}.jsonl"
    assert refusal(tmp_path, capsys, dataset_manifest=path) == sentence.format(path, path.parent)


WANTED = "Choose an SD 1.5, SD 2 or SDXL model: a folder in diffusers' layout or one .safetensors file."


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere", f"does not exist. {WANTED}"),
        ("no-index", f"has no model_index.json, so it is no whole diffusers folder. {WANTED}"),
        ("stable-cascade", f"is a StableCascadePipeline, which cannot be trained here. {WANTED}"),
        ("half", "lacks its folder 'vae'. Copy or download the model again."),
        ("a-lora.safetensors", "is a LoRA. Choose the base model that it was trained on."),
        ("flux.safetensors", "is a FLUX.1 model, which is not trained by the built-in trainer; choose Kohya."),
        ("only-a-vae.safetensors", f"holds only a VAE. {WANTED}"),
        (
            "inpainting.safetensors",
            (
                "is an inpainting model: its UNet takes 9 channels instead of 4. "
                "Choose the plain model that it comes from."
            ),
        ),
        (
            "pickle.ckpt",
            (
                "is a pickle file, which can run any program when it is opened. Convert it to .safetensors, or get the "
                ".safetensors version of this model."
            ),
        ),
    ],
)
def test_what_is_no_base_model_is_refused(tmp_path, capsys, name, sentence):
    path = BAD / "models" / name
    assert refusal(tmp_path, capsys, pretrained_model_name_or_path=path) == f"The base model {path} {sentence}"


@pytest.mark.parametrize("name", ["cut-off.safetensors", "words.safetensors", "torn-weights"])
def test_damaged_model_is_refused_with_what_is_wrong(tmp_path, capsys, name):
    path = BAD / "models" / name
    found = refusal(tmp_path, capsys, pretrained_model_name_or_path=path)
    assert found.startswith(f"The base model {path} ")
    assert found.endswith((".", "again."))


def test_damaged_picture_is_found_before_the_first_step(trainer):
    done = trainer.run(dataset_manifest=None, train_data_dir=str(BAD / "datasets" / "torn"))
    assert done.returncode == 2
    (error,) = trainer.named("error")
    picture = BAD / "datasets" / "torn" / "3_cats" / "cat.png"
    assert error["message"] == f"The picture {picture} is damaged; replace or remove it."
    assert (trainer.named("progress"), trainer.named("checkpoint")) == ([], [])
