import json
import math
import random
import tomllib
from pathlib import Path

import pytest
import toml
import yaml

from lorapilot.errors import UserError
from runs.stacks import option_table
from runs.stacks.option_table import StackOption, check_options, editable, groups, load_table, refusal_of

KEYS = {
    "kohya": "sd-scripts-options.txt",
    "ai_toolkit": "ai-toolkit-options.txt",
    "diffusion_pipe": "diffusion-pipe-options.txt",
}
NASTY = [
    "../x",
    "..",
    "/etc/passwd",
    "C:\\x",
    "$(touch x)",
    "${HOME}",
    "`id`",
    "a\nb",
    "a\u2028b",
    "a\x00b",
    "__import__('os')",
    "http://example.org",
    "1e999",
    "9" * 5000,
    "-" + "9" * 40,
    "nan",
    "x=1",
    "betas=__import__('os')",
    "verbose=True\nconv_dim=/x",
    "",
    "  ",
    "a" * 5000,
    10**400,
    -(10**30),
    1e308,
    -1e308,
    0,
    -1,
    0.5,
    math.nan,
    math.inf,
    -math.inf,
    True,
    False,
    None,
    [],
    ["../x"],
    ["a\nb", 1],
    [None],
    [math.nan, 1],
    [1] * 1000,
    [[1]],
    {},
    {"a": "/x"},
    b"/x",
    object(),
]
TYPES = {"bool": bool, "int": int, "float": float, "text": str, "choice": str}
ITEMS = {"ints": int, "floats": float, "words": str, "names": str}


def open_options(name):
    return [option for option in load_table(name).options.values() if option.is_open]


def architecture_of(option):
    return min(option.architectures, default="sdxl")


def check_one(name, option, value):
    """The checked value; None if the key was left out, which an empty text does."""
    return check_options(load_table(name), {option.key: value}, architecture=architecture_of(option)).get(option.key)


def example_of(option):
    if option.example is not None:
        return option.example
    if option.type == "names":
        return [f"{name}={EXAMPLES_OF_NAMES.get(kind, kind[0])}" for name, kind in option.names.items()]
    if option.type in {"bool", "choice"}:
        return option.choices[-1] if option.choices else True
    low = option.least if option.least is not None else option.above
    middle = (low + option.most) / 2
    value = round(middle) if option.type in {"int", "ints"} else middle
    return [value] * (option.count or 2) if option.type in ITEMS else value


EXAMPLES_OF_NAMES = {
    "int": "7",
    "float": "1e-8",
    "bool": "True",
    "ints": "1,2,3",
    "floats": "0.9,0.99",
    "ranges": "0-3,7",
}


def as_form_text(value):
    if isinstance(value, list):
        return ("\n" if any("=" in str(item) for item in value) else ", ").join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize("name", KEYS)
def test_table_knows_each_key_of_its_trainer_and_no_other(name):
    lines = (Path(__file__).parent / "data" / KEYS[name]).read_text().splitlines()
    keys = {line for line in lines if line and not line.startswith("#")}
    assert set(load_table(name).options) == keys


@pytest.mark.parametrize("name", KEYS)
def test_options_survive_toml_yaml_json_and_a_form(name):
    for option in open_options(name):
        value = check_one(name, option, example_of(option))
        trips = {
            "again": value,
            "toml": tomllib.loads(toml.dumps({"it": value}))["it"],
            "yaml": yaml.safe_load(yaml.safe_dump(value)),
            "json": json.loads(json.dumps(value)),
            "form": as_form_text(value),
        }
        arrived = {way: check_one(name, option, trip) for way, trip in trips.items()}
        assert arrived == dict.fromkeys(trips, value), option.key


@pytest.mark.parametrize("name", KEYS)
def test_defaults_are_values_of_their_options(name):
    described = [option for option in open_options(name) if option.default is not None]
    assert {option.key: check_one(name, option, option.default) for option in described} == {
        option.key: option.default for option in described
    }


@pytest.mark.parametrize("name", KEYS)
def test_no_value_becomes_a_path_code_or_a_second_line(name):
    chance = random.Random(5)
    for option in load_table(name).options.values():
        for value in [*NASTY, *(mutated(example_of(option), chance) for _ in range(20) if option.is_open)]:
            try:
                checked = check_one(name, option, value)
            except UserError as error:
                assert error.field == f"options.{option.key}"  # noqa: PT017 a value that passes is checked below
                continue
            assert option.is_open
            if checked is not None:
                assert_harmless(option, checked)


def mutated(example, chance):
    """The example as a form sends it, with something nasty put into the middle."""
    text = as_form_text(example)
    cut = chance.randrange(len(text) + 1)
    return text[:cut] + chance.choice([piece for piece in NASTY if isinstance(piece, str)]) + text[cut:]


def assert_harmless(option, value):
    items = value if option.type in ITEMS else [value]
    assert type(value) is (list if option.type in ITEMS else TYPES[option.type])
    for item in items:
        assert type(item) is (ITEMS | TYPES)[option.type]
        if isinstance(item, str):
            assert item.isprintable()
            assert item
            assert not set(item) & set("/\\$`\n\r")
            assert ".." not in item
            assert "(" not in item or option.type == "text"
        elif not isinstance(item, bool):
            assert math.isfinite(item)
            assert (option.least if option.least is not None else option.above) <= item <= option.most
    if option.choices:
        assert set(items) <= set(option.choices)
    if option.type == "names":
        assert {item.partition("=")[0] for item in items} <= set(option.names)


@pytest.mark.parametrize("name", KEYS)
def test_closed_keys_are_refused_by_name_with_their_reason(name):
    table = load_table(name)
    closed = [option for option in table.options.values() if not option.is_open]
    assert closed
    for option in closed:
        with pytest.raises(UserError) as refused:
            check_options(table, {option.key: "1"}, architecture="sdxl")
        assert refused.value.field == f"options.{option.key}"
        assert refused.value.message == refusal_of(option)
        assert refused.value.message.startswith(option.key)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("kohya", "dataset_class"),
        ("kohya", "lr_scheduler_type"),
        ("kohya", "network_weights"),
        ("kohya", "wandb_api_key"),
        ("kohya", "config_file"),
        ("kohya", "huggingface_repo_id"),
        ("kohya", "network_module"),
        ("ai_toolkit", "network.pretrained_lora_path"),
        ("ai_toolkit", "save.push_to_hub"),
        ("ai_toolkit", "datasets.folder_path"),
        ("ai_toolkit", "model.accuracy_recovery_adapter"),
        ("ai_toolkit", "sqlite_db_path"),
        ("diffusion_pipe", "adapter.init_from_existing"),
        ("diffusion_pipe", "model.merge_adapters"),
        ("diffusion_pipe", "monitoring.wandb_api_key"),
        ("diffusion_pipe", "dataset.mask_path"),
    ],
)
def test_what_reads_files_imports_or_uploads_is_closed(name, key):
    option = load_table(name).options[key]
    assert option.ours or option.refused


@pytest.mark.parametrize("name", KEYS)
def test_what_names_a_path_is_never_open(name):
    telling = ("_path", "_dir", "_file", "_repo_id", "_token", "_url", "_module", "api_key")
    assert [
        option.key for option in load_table(name).options.values() if option.is_open and option.key.endswith(telling)
    ] == []


@pytest.mark.parametrize(
    ("values", "key", "message"),
    [
        (
            {"blocks_to_swop": 1},
            "blocks_to_swop",
            "sd-scripts has no option 'blocks_to_swop'. Did you mean blocks_to_swap?",
        ),
        ({"network_dim": 8}, "network_dim", "network_dim is set by the field Rank."),
        (
            {"output_dir": "x"},
            "output_dir",
            "output_dir is set by the platform. Each run has a folder of its own.",
        ),
        ({"dataset_class": "a.B"}, "dataset_class", "dataset_class is refused. It imports a class by its name."),
        ({"blocks_to_swap": 2.5}, "blocks_to_swap", "Blocks to swap is a whole number."),
        ({"blocks_to_swap": True}, "blocks_to_swap", "Blocks to swap is a whole number."),
        ({"blocks_to_swap": -1}, "blocks_to_swap", "Blocks to swap must be at least 0."),
        ({"sigmoid_scale": 0}, "sigmoid_scale", "Sigmoid scale must be more than 0."),
        ({"sigmoid_scale": "nan"}, "sigmoid_scale", "Sigmoid scale is a finite number."),
        ({"loss_type": "mse"}, "loss_type", "Loss: 'mse' is none of l1, l2, huber, smooth_l1."),
        ({"color_aug": "yes"}, "color_aug", "Change colours at random is true or false."),
        ({"clip_skip": 2}, "clip_skip", "clip_skip is for Stable Diffusion 1.5 only, and the model's kind is FLUX.1."),
        ({"metadata_author": 3}, "metadata_author", "Author is a text."),
        ({"metadata_license": "<b>"}, "metadata_license", "Licence does not look like 'CC-BY-4.0'."),
        (
            {"metadata_author": "a/b"},
            "metadata_author",
            "Author is one line without slashes, backslashes, dollar signs, backquotes and double dots.",
        ),
        (
            {"dataset.face_crop_aug_range": "2"},
            "dataset.face_crop_aug_range",
            "Crop around the face is a list of 2.",
        ),
        (
            {"network_args": "conv_dim=4"},
            "network_args",
            "conv_dim of More of the network is set by the field Convolution rank.",
        ),
        (
            {"network_args": "split_qvk=true"},
            "network_args",
            "More of the network has no name 'split_qvk'. Did you mean split_qkv?",
        ),
        ({"network_args": "rank_dropout=much"}, "network_args", "rank_dropout is a number."),
        (
            {"network_args": "verbose"},
            "network_args",
            "More of the network is a list of name=value, one a line.",
        ),
        (
            {"network_args": "verbose=true\nverbose=false"},
            "network_args",
            "More of the network: verbose is there twice.",
        ),
    ],
)
def test_options_are_refused_with_what_to_do(values, key, message):
    with pytest.raises(UserError) as refused:
        check_options(load_table("kohya"), values, architecture="flux")
    assert (refused.value.field, refused.value.message) == (f"options.{key}", message)


def test_options_from_a_form_become_typed_values():
    values = {
        "blocks_to_swap": "18",
        "sigmoid_scale": "0.5",
        "color_aug": "true",
        "loss_type": "huber",
        "huber_c": "",
        "network_args": "loraplus_lr_ratio = 16\nsplit_qkv=true",
        "optimizer_args": ["betas=0.9, 0.99"],
    }
    assert check_options(load_table("kohya"), values, architecture="flux") == {
        "blocks_to_swap": 18,
        "sigmoid_scale": 0.5,
        "color_aug": True,
        "loss_type": "huber",
        "network_args": ["loraplus_lr_ratio=16", "split_qkv=True"],
        "optimizer_args": ["betas=0.9,0.99"],
    }


def test_a_form_offers_what_suits_the_model():
    table = load_table("kohya")
    flux = {option.key for option in editable(table, "flux")}
    assert "guidance_scale" in flux
    assert flux.isdisjoint({"clip_skip", "network_dim", "output_dir", "dataset_class"})
    offered = groups(table, "flux")
    assert [name for name, _ in offered] == [name for name in option_table.GROUPS if name in dict(offered)]
    assert {option.key for _, options in offered for option in options} == flux


ENTRY = {"key": "k", "label": "K", "group": "Data", "help": "Helps.", "type": "int", "least": 0, "most": 9}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"colour": "red"}, "unknown attributes colour"),
        ({"type": "path"}, "its type is none"),
        ({"group": "Misc"}, "its group is none"),
        ({"most": None}, "a number has bounds, and nothing else"),
        ({"type": "text"}, "a number has bounds, and nothing else"),
        ({"type": "text", "least": None, "most": None}, "a text has a pattern or choices, and an example"),
        ({"type": "choice", "least": None, "most": None}, "a choice has choices"),
        ({"default": 10}, "K must be at most 9."),
        ({"help": "x" * 111}, "its help is too long"),
        ({"help": ""}, "an option has a label and a help"),
        ({"setting": "rang"}, "it names a field that the RunSpec does not have"),
        ({"setting": "rank", "ours": "Why."}, "one of setting, ours and refused"),
    ],
)
def test_a_slip_in_a_table_is_found_when_it_is_loaded(change, problem, tmp_path, monkeypatch):
    entry = {name: value for name, value in (ENTRY | change).items() if value is not None}
    table = {"trainer": "t", "version": "1", "read_from": [], "option": [entry]}
    (tmp_path / "slip.toml").write_text(toml.dumps(table))
    monkeypatch.setattr(option_table, "FOLDER", tmp_path)
    load_table.cache_clear()
    with pytest.raises(ValueError, match=problem):
        load_table("slip")
    load_table.cache_clear()


def test_option_of_a_table_is_frozen():
    option = load_table("kohya").options["network_dim"]
    assert isinstance(option, StackOption)
    with pytest.raises(AttributeError):
        option.setting = ""
