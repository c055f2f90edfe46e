import dataclasses
from pathlib import Path

import pytest

from lora_trainer import config
from lora_trainer.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
REQUIRED = {"pretrained_model_name_or_path": "/model", "dataset_manifest": "/set.jsonl", "output_dir": "/out"}


def refusal(**changes):
    with pytest.raises(ConfigError) as caught:
        config.from_table(REQUIRED | changes)
    return str(caught.value)


def test_from_table_with_only_the_required_keys_uses_defaults():
    loaded = config.from_table(REQUIRED)
    assert (loaded.resolution, loaded.network_dim, loaded.learning_rate) == ((1024, 1024), 16, 1e-4)
    assert loaded.events_path == Path("/out/events.jsonl")


@pytest.mark.parametrize("value", [128, "128", "128,128", "128, 128", [128, 128]])
def test_resolution_takes_a_number_a_text_or_a_pair(value):
    assert config.from_table(REQUIRED | {"resolution": value}).resolution == (128, 128)


@pytest.mark.parametrize("value", [100, 4, "128x128", [128, 128, 128], 128.0, True, [], ["a", "b"]])
def test_resolution_refuses_others_by_name(value):
    assert refusal(resolution=value).startswith("'resolution' must be one or two multiples of 8")


def test_sections_are_flattened(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(
        "[model]\npretrained_model_name_or_path = '/model'\n[data]\ndataset_manifest = '/set.jsonl'\n"
        "[data.more]\noutput_dir = '/out'\n[metadata]\nrun = '7'\n"
    )
    loaded = config.load(path)
    assert (loaded.output_dir, loaded.metadata) == ("/out", {"run": "7"})


def test_key_in_two_sections_is_refused(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("[a]\nseed = 1\n[b]\nseed = 2\n")
    with pytest.raises(ConfigError, match="The option 'seed' is given twice"):
        config.load(path)


def test_unknown_key_names_the_nearest_known_one():
    assert refusal(learning_rat=1e-4) == "Unknown option 'learning_rat'. Did you mean 'learning_rate'?"


def test_missing_key_says_what_it_is_for():
    with pytest.raises(ConfigError) as caught:
        config.from_table({"output_dir": "/out"})
    assert str(caught.value).startswith("The option 'pretrained_model_name_or_path' is missing: Folder of the base")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"network_dim": "16"}, "'network_dim' must be a whole number, not '16'."),
        ({"network_dim": True}, "'network_dim' must be a whole number, not True."),
        ({"network_dim": 0}, "'network_dim' must be at least 1, not 0."),
        ({"learning_rate": 0}, "'learning_rate' must be above 0, not 0."),
        ({"learning_rate": float("nan")}, "'learning_rate' must be a finite number, not nan."),
        ({"learning_rate": float("inf")}, "'learning_rate' must be a finite number, not inf."),
        ({"caption_dropout_rate": 1.5}, "'caption_dropout_rate' must be at most 1, not 1.5."),
        ({"save_precision": "int8"}, "'save_precision' must be one of float, fp16, bf16, not 'int8'."),
        ({"flip_aug": 1}, "'flip_aug' must be true or false, not 1."),
        ({"optimizer_type": "Prodigy"}, "'optimizer_type' 'Prodigy' is not supported; use AdamW."),
        ({"network_args": ["rank=3"]}, "'network_args' knows conv_dim, conv_alpha, not 'rank'."),
        ({"network_args": ["conv_dim=a"]}, "'network_args': 'conv_dim=a' needs a number after the equals sign."),
        ({"network_args": "conv_dim=4"}, "'network_args' must be a list of texts, not 'conv_dim=4'."),
        (
            {"optimizer_args": ["betas=0.9"]},
            "'optimizer_args': betas takes two numbers from 0 to below 1, such as betas=0.9,0.99.",
        ),
        ({"metadata": {"run": 7}}, "'metadata' must be a table of texts, not {'run': 7}."),
        ({"output_name": "../face"}, "'output_name' must be a plain file name, not '../face'."),
        ({"dataset_manifest": ""}, "Give exactly one of 'dataset_manifest' and 'train_data_dir'."),
        ({"train_data_dir": "/pictures"}, "Give exactly one of 'dataset_manifest' and 'train_data_dir'."),
        ({"sample_prompts": [{"prompt": "x", "sed": 1}]}, "'sample_prompts': unknown key 'sed'. Did you mean 'seed'?"),
        ({"sample_prompts": [{"seed": 1}]}, "'sample_prompts': 'prompt' must be a text, not None."),
        ({"enable_bucket": True, "bucket_reso_steps": 60}, "'bucket_reso_steps' must be a multiple of 8, not 60."),
    ],
)
def test_bad_value_is_refused_by_name(changes, sentence):
    assert refusal(**changes) == sentence


def test_training_the_text_encoders_is_refused_with_the_reason():
    assert refusal(network_train_unet_only=False).startswith(
        "'network_train_unet_only' must be true: this trainer does"
    )


def test_network_and_optimizer_arguments_are_read():
    loaded = config.from_table(
        REQUIRED
        | {"network_args": ["conv_dim=8", "conv_alpha=4.5"], "optimizer_args": ["weight_decay=0.01", "betas=0.9,0.99"]}
    )
    assert loaded.convolution == (8, 4.5)
    assert loaded.optimizer_options == {"weight_decay": 0.01, "betas": (0.9, 0.99)}


def test_prompt_file_with_kohya_flags(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# a comment\na red circle --n blurry, bad --w 64 --h 128 --d 7 --s 12 --l 4.5\n\na star\n")
    first, second = config.from_table(REQUIRED | {"sample_prompts": str(path), "seed": 5}).sample_prompts
    assert first == config.SamplePrompt("a red circle", "blurry, bad", 7, 64, 128, 12, 4.5)
    assert second == config.SamplePrompt("a star", "", 5, 1024, 1024, 20, 5.0)


def test_printed_configuration_loads_back_to_an_equal_one(tmp_path):
    loaded = config.from_table(
        REQUIRED
        | {
            "metadata": {"run id": '7 "x" ü', "b": "\\"},
            "sample_prompts": [{"prompt": "a 'b' \"c\"\n", "scale": 4}],
            "network_args": ["conv_dim=8"],
        }
    )
    path = tmp_path / "printed.toml"
    path.write_text(config.to_toml(loaded))
    assert config.load(path) == loaded


def test_invalid_toml_names_file_and_place(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("seed = \n")
    with pytest.raises(ConfigError, match=r"config.toml is not valid TOML: .*line 1"):
        config.load(path)


def test_demo_recipe_is_valid():
    recipe = config.read_table(REPOSITORY / "lora_trainer" / "assets" / "demo.toml")
    loaded = config.from_table(REQUIRED | recipe)
    assert (loaded.network_dim, loaded.convolution, loaded.max_train_steps) == (16, (16, 16.0), 320)


def test_every_option_stands_in_the_documentation():
    documentation = (REPOSITORY / "docs" / "trainer.md").read_text()
    missing = [one.name for one in dataclasses.fields(config.TrainingConfig) if f"`{one.name}`" not in documentation]
    assert missing == []
