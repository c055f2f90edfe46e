from pathlib import Path

import pytest

from lora_trainer import config
from lora_trainer.arguments import NETWORK_READERS
from lora_trainer.errors import ConfigError
from lora_trainer.kohya_keys import ALWAYS, INSTEAD
from lora_trainer.prompts import SamplePrompt

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
    assert str(caught.value).startswith("The option 'pretrained_model_name_or_path' is missing: Base model:")


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
        (
            {"optimizer_type": "Adam"},
            f"'optimizer_type' must be one of {', '.join(config.OPTIMIZERS)}, not 'Adam'.",
        ),
        (
            {"network_args": ["rank=3"]},
            f"'network_args' knows {', '.join(NETWORK_READERS)}, not 'rank'.",
        ),
        ({"network_args": ["conv_dim=a"]}, "'network_args': 'conv_dim=a' needs a whole number after the equals sign."),
        ({"network_args": ["conv_alpha=1"]}, "'network_args': conv_alpha means nothing without conv_dim."),
        (
            {"network_args": ["exclude_patterns=("]},
            "'network_args': 'exclude_patterns=(' needs regular expressions after the equals sign.",
        ),
        ({"optimizer_args": ["momentum=1"]}, "'optimizer_args' knows weight_decay, betas, eps, not 'momentum'."),
        ({"max_token_length": 77}, "'max_token_length' must be one of 75, 150, 225, not 77."),
        ({"text_encoder_lr": "1e-5"}, "'text_encoder_lr' must be a number, not '1e-5'."),
        ({"lr_warmup_steps": 10.5}, "'lr_warmup_steps' must be a whole number of steps, or a share below 1, not 10.5."),
        (
            {"cache_latents": True, "color_aug": True},
            "'color_aug' makes each picture new at every use: set 'cache_latents' to false, or leave it out.",
        ),
        (
            {"network_train_unet_only": True, "network_train_text_encoder_only": True},
            "Give only one of 'network_train_unet_only' and 'network_train_text_encoder_only'.",
        ),
        ({"unet_lr": 0, "text_encoder_lr": 0}, "Every learning rate is 0: nothing would be trained."),
        ({"save_best": True}, "'save_best' needs validation pictures: set 'validation_split', such as 0.1."),
        ({"min_timestep": 900, "max_timestep": 900}, "'min_timestep' must be below 'max_timestep'."),
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


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dataset_class": "x"}, "'dataset_class' is not an option of this trainer: it would import code."),
        ({"conv_dim": 8}, "'conv_dim' is not an option of this trainer: it goes into network_args, as 'conv_dim=8'."),
        ({"xformers": True}, "'xformers' = True is not possible here: set attention = 'xformers'."),
        ({"full_bf16": True}, "'full_bf16' = True is not possible here: the LoRA is trained in float32."),
        ({"wandb_api_key": "x"}, "'wandb_api_key' is not an option of this trainer: nothing is sent anywhere."),
    ],
)
def test_key_of_sd_scripts_that_is_missing_here_is_refused_with_the_reason(changes, sentence):
    assert refusal(**changes) == sentence


@pytest.mark.parametrize("changes", [{"sdpa": True}, {"no_half_vae": True}, {"cache_text_encoder_outputs": True}])
def test_key_of_sd_scripts_that_says_what_happens_anyway_is_taken(changes):
    assert config.from_table(REQUIRED | changes) == config.from_table(REQUIRED)


def test_no_key_is_both_an_option_and_refused():
    assert set(config.FIELDS) & (set(ALWAYS) | set(INSTEAD)) == set()
    assert set(ALWAYS) & set(INSTEAD) == set()


# every option that sd-scripts (v0.10.1, train_network.py and sdxl_train_network.py) takes in a configuration file
SD_SCRIPTS = (Path(__file__).parent / "data" / "sd-scripts-options.txt").read_text().split()


@pytest.mark.parametrize("key", SD_SCRIPTS)
def test_every_option_of_sd_scripts_is_known_or_refused_with_a_reason(key):
    is_known = key in config.FIELDS or key in ALWAYS or key in INSTEAD
    assert is_known


def test_trainpilots_base_configuration_is_taken():
    base = {
        "resolution": "1024,1024", "enable_bucket": True, "min_bucket_reso": 768, "max_bucket_reso": 1600,
        "bucket_reso_steps": 64, "caption_extension": ".txt", "shuffle_caption": True, "keep_tokens": 1,
        "flip_aug": True,
        "min_snr_gamma": 5, "optimizer_type": "AdamW", "optimizer_args": ["betas=0.9,0.99", "weight_decay=0.01"],
        "lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 2, "lr_warmup_steps": 100,
        "gradient_checkpointing": True, "noise_offset": 0.02, "max_grad_norm": 0.8, "caption_dropout_rate": 0.1,
        "seed": 31337, "save_every_n_epochs": 1, "save_last_n_epochs": 15, "network_module": "networks.lora",
        "network_dim": 48, "network_alpha": 24, "network_args": ["conv_dim=48", "conv_alpha=24"],
        "network_dropout": 0.05, "unet_lr": 2.5e-4, "text_encoder_lr": 3e-5, "max_token_length": 225,
        "mixed_precision": "bf16", "train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 500,
        "sdpa": True, "no_half_vae": True, "cache_latents": True, "save_precision": "fp16",
    }  # fmt: skip
    read = config.from_table(REQUIRED | base)
    assert (read.network.conv_dim, read.text_encoder_rates(2), read.unet_rate) == (48, [3e-5, 3e-5], 2.5e-4)


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({}, (1e-4, [1e-4, 1e-4])),
        ({"network_train_unet_only": True}, (1e-4, [0.0, 0.0])),
        ({"unet_lr": 2e-4, "text_encoder_lr": 1e-5}, (2e-4, [1e-5, 1e-5])),
        ({"text_encoder_lr": [1e-5, 0]}, (1e-4, [1e-5, 0.0])),
    ],
)
def test_rates_by_part(changes, rates):
    read = config.from_table(REQUIRED | changes)
    assert (read.unet_rate, read.text_encoder_rates(2)) == rates


def test_network_and_optimizer_arguments_are_read():
    loaded = config.from_table(
        REQUIRED
        | {"network_args": ["conv_dim=8", "conv_alpha=4.5"], "optimizer_args": ["weight_decay=0.01", "betas=0.9,0.99"]}
    )
    assert (loaded.network.conv_dim, loaded.network.conv_alpha) == (8, 4.5)
    assert loaded.optimizer_options == {"weight_decay": 0.01, "betas": (0.9, 0.99)}


def test_prompt_file_with_kohya_flags(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# a comment\na red circle --n blurry, bad --w 64 --h 128 --d 7 --s 12 --l 4.5\n\na star\n")
    first, second = config.from_table(REQUIRED | {"sample_prompts": str(path), "seed": 5}).sample_prompts
    assert first == SamplePrompt("a red circle", "blurry, bad", 7, 64, 128, 12, 4.5)
    assert second == SamplePrompt("a star", "", 5, 1024, 1024, 20, 5.0)


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
    assert (loaded.network_dim, loaded.network.conv_dim, loaded.network.conv_alpha) == (16, 16, 16.0)


def test_every_option_stands_in_the_documentation_as_the_program_tells_it():
    documentation = (REPOSITORY / "docs" / "trainer-options.md").read_text()
    rows = [line for line in documentation.splitlines() if line.startswith("| `")]
    assert rows == config.option_rows()
