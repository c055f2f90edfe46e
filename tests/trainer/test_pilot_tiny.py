"""The scripts that made the bundled base model: drawing, building, training and scoring, each for a moment."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lora_trainer.pilot_tiny import progress
from lora_trainer.pilot_tiny.draw import COLOURS, SHAPES, Scene, draw_clutter, draw_scene, random_scene, write_caption
from lora_trainer.pilot_tiny.evaluate import read_picture, scenes_to_ask, score_pictures, score_report
from lora_trainer.safetensors_header import read_header

REPOSITORY = Path(__file__).resolve().parents[2]
BUNDLED = REPOSITORY / "lora_trainer" / "assets" / "pilot-tiny"
# In a fresh interpreter, as the app named `datasets` must not pass for Hugging Face's.
COMMANDS = """
import json, sys
from lora_trainer.__main__ import hide_neighbours, stay_offline, stay_quiet
from lora_trainer.pilot_tiny.__main__ import main
hide_neighbours(), stay_offline(), stay_quiet()
for arguments in json.loads(sys.argv[1]):
    main(arguments)
"""


def digest(image):
    return hashlib.sha256(image.tobytes()).hexdigest()[:16]


def test_drawing_is_reproducible_from_a_seed():
    random = Random(7)
    scene = random_scene(random)
    assert scene == Scene("yellow", "purple", "circle")
    assert write_caption(scene, random) == "a picture of a purple circle on a yellow background"
    assert [digest(draw_scene(scene, random)), digest(draw_clutter(random))] == ["3cb3d5bfb3505892", "4272ce916698b5be"]


def test_a_thousand_scenes_show_everything():
    random = Random(0)
    scenes = [random_scene(random) for _ in range(1000)]
    assert {scene.shape for scene in scenes} == {"", *SHAPES}
    assert {scene.foreground for scene in scenes} == {"", *COLOURS}
    assert {scene.background for scene in scenes} == set(COLOURS)
    assert 30 <= sum(not scene.shape for scene in scenes) <= 70
    assert [scene for scene in scenes if scene.foreground == scene.background] == []


def test_the_checker_is_right_on_drawn_pictures():
    random = Random(1)
    scenes = scenes_to_ask(300)
    score = score_pictures(scenes, [draw_scene(scene, random) for scene in scenes])
    assert score.mistakes == []
    assert score.right == score.total == 300
    assert 0.5 < score.edge_pixels < 0.65


@pytest.mark.parametrize("shown", SHAPES)
def test_the_checker_denies_any_other_shape(shown):
    picture = draw_scene(Scene("white", "blue", shown), Random(2))
    others = [Scene("white", "blue", shape) for shape in SHAPES if shape != shown]
    assert score_pictures(others, [picture] * len(others)).shapes == 0


@pytest.mark.parametrize(
    ("asked", "right"),
    [
        (Scene("white", "blue", "ring"), (1, 1, 1, 1)),
        (Scene("white", "purple", "ring"), (0, 1, 0, 1)),
        (Scene("pink", "blue", "ring"), (0, 1, 1, 0)),
        (Scene("blue", "white", "ring"), (0, 1, 0, 0)),
    ],
)
def test_the_checker_tells_the_parts_of_a_scene_apart(asked, right):
    score = score_pictures([asked], [draw_scene(Scene("white", "blue", "ring"), Random(3))])
    assert (score.right, score.shapes, score.foregrounds, score.backgrounds) == right


def test_the_checker_sees_nothing_on_a_plain_background():
    reading = read_picture(draw_scene(Scene("brown"), Random(4)))
    assert (reading.background, reading.foreground, reading.shape) == ("brown", "", "")


def test_the_checker_refuses_a_shape_that_is_none():
    stripes = Image.new("RGB", (128, 128), COLOURS["white"])
    for x in range(20, 110, 20):
        stripes.paste(COLOURS["black"], (x, 20, x + 6, 108))
    reading = read_picture(stripes)
    assert (reading.background, reading.foreground, reading.shape) == ("white", "black", "")


def test_a_blurred_edge_is_wider():
    scene = Scene("white", "red", "circle")
    sharp = draw_scene(scene, Random(5))
    soft = sharp.resize((32, 32), Image.Resampling.BOX).resize((128, 128), Image.Resampling.BICUBIC)
    assert read_picture(sharp).edge_pixels < 1
    assert read_picture(soft).edge_pixels > 2


def test_sixty_prompts_ask_for_every_shape_in_every_colour():
    scenes = scenes_to_ask(120)
    assert len({(scene.shape, scene.foreground) for scene in scenes[:60]}) == 60
    assert len(set(scenes)) == 120
    assert {scene.background for scene in scenes} == set(COLOURS)
    assert scenes[0].prompt == "a red circle on a orange background"


def test_a_report_names_the_mistakes():
    scenes = [Scene("white", "blue", "ring"), Scene("white", "purple", "ring")]
    report = score_report(score_pictures(scenes, [draw_scene(scenes[0], Random(3))] * 2))
    assert report.splitlines()[0] == "1 of 2 right"
    assert report.splitlines()[-1].startswith(
        "  picture 1, a purple ring on a white background: blue ring on white, overlap 0.9"
    )


def train_a_line(state, *, stop_after=None):
    """Fit a line for six steps, in full or killed after some."""
    torch.manual_seed(0)
    line = torch.nn.Linear(3, 1)
    training = progress.Training(
        line.parameters(), learning_rate=0.1, betas=(0.9, 0.99), weight_decay=0.01, average=0.9, seed=5, state=state,
        report=lambda text: None,
    )  # fmt: skip
    for step in training.steps(progress.Steps(6), warmup=2, floor=0.1):
        if step == stop_after:
            return None
        training.take_step(line(torch.randn(4, 3, generator=training.generator)).square().mean())
    training.average.store()
    return [weight.detach() for weight in training.weights]


def test_a_killed_training_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SAVE_EVERY", 2)
    in_one_go = train_a_line(tmp_path / "one.state")
    train_a_line(tmp_path / "two.state", stop_after=5)
    resumed = train_a_line(tmp_path / "two.state")
    assert all(torch.equal(one, two) for one, two in zip(in_one_go, resumed, strict=True))


def test_the_learning_rate_rises_then_falls_to_its_floor():
    factors = [progress.learning_rate_factor(step, 100, warmup=10, floor=0.1) for step in (0, 9, 55, 100)]
    assert factors == pytest.approx([0.1, 1, 0.55, 0.1])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An untrained model, and what two steps of each kind make of it or of the bundled one."""
    folder = tmp_path_factory.mktemp("pilot-tiny")
    short = ["--steps", "2", "--pictures", "4", "--batch", "2", "--seed", "3"]
    commands = [
        ["build", "--out", folder / "built", "--seed", "3"],
        ["train", "decoder", "--start", BUNDLED, "--out", folder / "decoder", *short],
    ]
    for name in ("one", "two"):
        commands += [
            ["train", "autoencoder", "--start", folder / "built", "--out", folder / f"autoencoder-{name}", *short],
            ["train", "unet", "--start", BUNDLED, "--out", folder / f"unet-{name}", *short],
        ]
    arguments = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


def shapes_in(path):
    return {name: tensor.shape for name, tensor in read_header(path).tensors.items()}


def test_a_build_has_the_sizes_of_the_bundled_model(models):
    parameters = {}
    for path in sorted(BUNDLED.rglob("*.safetensors")):
        built = models / "built" / path.relative_to(BUNDLED)
        assert shapes_in(built) == shapes_in(path)
        parameters[path.parent.name] = read_header(built).parameters
    assert parameters == {"text_encoder": 90_432, "text_encoder_2": 296_400, "unet": 3_368_388, "vae": 667_127}


def test_a_build_has_the_configuration_of_the_bundled_model(models):
    # what training fits, and how transformers found its files
    ignored = {"scaling_factor", "local_files_only"}
    for path in (BUNDLED / "model_index.json", *sorted(BUNDLED.rglob("*config.json"))):
        built, bundled = (
            {key: value for key, value in json.loads(file.read_text()).items() if key not in ignored}
            for file in (models / "built" / path.relative_to(BUNDLED), path)
        )
        assert built == bundled


def test_the_bundled_model_stays_small():
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*")) < 10_000_000


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("autoencoder", "vae/diffusion_pytorch_model.safetensors"),
        ("unet", "unet/diffusion_pytorch_model.safetensors"),
        ("unet", "text_encoder/model.safetensors"),
        ("unet", "text_encoder_2/model.safetensors"),
    ],
)
def test_two_steps_from_a_seed_give_the_same_weights_twice(models, kind, file):
    start = models / "built" if kind == "autoencoder" else BUNDLED
    before, one, two = (
        (folder / file).read_bytes() for folder in (start, models / f"{kind}-one", models / f"{kind}-two")
    )
    assert one == two
    assert one != before


def test_training_the_decoder_leaves_the_latents_alone(models):
    file = "vae/diffusion_pytorch_model.safetensors"
    before, after = (load_file(folder / file) for folder in (BUNDLED, models / "decoder"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
