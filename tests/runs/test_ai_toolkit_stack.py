"""AI Toolkit: what is written for it, what is read of it, and whole runs with a stand-in for its program."""

import json
import math
import os
import random
import re
import sqlite3
import struct
import sys
from pathlib import Path

import pytest
import yaml

from lorapilot.errors import UserError
from runs import endings, services
from runs.enums import DeviceKind, Status
from runs.models import Run
from runs.spec import OPTIMIZERS, SCHEDULES, RunSpec
from runs.stacks import ai_toolkit, ask_ai_toolkit, get_stack
from runs.stacks.ai_toolkit import FAMILIES, AiToolkitStack
from runs.stacks.base import (
    Cause,
    CheckpointRemoved,
    CheckpointSaved,
    Exit,
    Hopeless,
    ModelFacts,
    Noted,
    Progress,
    Reading,
    Stage,
    Started,
    StateSaved,
    TrainingJob,
    TrainingPicture,
)
from runs.stacks.option_table import load_table
from runs.supervision import follow
from runs.supervision.follow import supervise_slice
from tests.factories import make_run, make_slot

DATA = Path(__file__).parent / "data"
LOGS = DATA / "trainer-logs"
GOLDEN = DATA / "golden"
WRITE_GOLDEN = "WRITE_GOLDEN" in os.environ  # writes the files anew instead of comparing
STACK = AiToolkitStack()


@pytest.fixture
def installed(settings, tmp_path):
    """AI Toolkit's folder with the stand-in as its program."""
    home = tmp_path / "ai-toolkit"
    home.mkdir()
    (home / "run.py").write_bytes((Path(__file__).parent / "ai_toolkit_stand_in.py").read_bytes())
    (home / "recording.log").write_bytes((LOGS / "ai-toolkit-sd1-30steps.log").read_bytes())
    (home / "behaviour").write_text("finishes")
    settings.TRAINERS = settings.TRAINERS | {"ai_toolkit": {"home": str(home), "python": sys.executable}}
    return home


def job_of(folder, architecture="sdxl", **changes):
    family = FAMILIES[architecture]
    known = {
        "name": folder.name,
        "folder": folder,
        "attempt_folder": folder / "_attempts" / "1",
        "spec": RunSpec.from_values(changes.pop("values", {})),
        "base_model": Path("/workspace/models/base"),
        "architecture": architecture,
        "layout": family.layouts[0],
        "parts": {role: Path(f"/workspace/models/{role}.safetensors") for role in family.parts},
        "pictures": [
            TrainingPicture("/pictures/a.png", "a cat", 1),
            TrainingPicture("/pictures/b.JPG", "two cats", 3),
        ],
        "device": DeviceKind.CUDA,
        "device_uuids": ["GPU-1"],
        "provenance": {"run": "7", "trigger_word": "sks"},
    }
    return TrainingJob(**(known | changes))


def process_of(plan):
    return yaml.safe_load(plan.files[plan.config])["config"]["process"][0]


def reading_of(folder, **changes):
    known = {"name": folder.name, "folder": folder, "attempt_folder": folder / "_attempts" / "1", "spec": RunSpec()}
    reading = Reading(**(known | changes))
    reading.log.parent.mkdir(parents=True, exist_ok=True)
    reading.attempt_folder.mkdir(parents=True, exist_ok=True)
    return reading


def write_weights(folder, name, step, *, at=None, torn=False):
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"training_info": json.dumps({"step": step, "epoch": 1})}
    header = {"__metadata__": metadata, "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    path = folder / name
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(3 if torn else 8))
    if at is not None:
        os.utime(path, (at, at))
    return path


def write_optimizer(folder, at):
    (folder / "optimizer.pt").write_bytes(b"state")
    os.utime(folder / "optimizer.pt", (at, at))


# --- The configuration ------------------------------------------------------------------------------------------------
FULL = {
    "resolution": 768,
    "repeats": 2,
    "flip": True,
    "caption_dropout": 0.1,
    "rank": 8,
    "alpha": 4.0,
    "conv_rank": 4,
    "network_dropout": 0.2,
    "steps": 500,
    "batch_size": 2,
    "gradient_accumulation_steps": 3,
    "gradient_checkpointing": True,
    "ema_decay": 0.99,
    "lr_schedule": "constant",
    "warmup_steps": 20,
    "min_snr_gamma": 5.0,
    "noise_offset": 0.05,
    "save_every_steps": 100,
    "keep_last": 2,
    "sample_every_steps": 50,
    "sample_prompts": ["sks cat, “in” a box: yes", "1e5"],
}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_configuration_of_each_architecture_is_as_it_was_checked(workspace, installed, architecture):
    folder = Path("/workspace/outputs/ai-toolkit/cat")
    plan = STACK.compile(job_of(folder, architecture, values=FULL))
    golden = GOLDEN / f"ai_toolkit-{architecture}.yaml"
    if WRITE_GOLDEN:
        golden.write_text(plan.files[plan.config])
    assert plan.files[plan.config] == golden.read_text()
    assert plan.config == folder / "_attempts" / "1" / "cat.yaml"


def test_process_is_started_in_the_folder_of_ai_toolkit_with_its_job(workspace, installed, tmp_path):
    plan = STACK.compile(job_of(tmp_path / "cat"))
    assert plan.argv == [sys.executable, "run.py", str(plan.config)]
    assert (plan.cwd, plan.env["AITK_JOB_ID"], plan.env["HF_HUB_OFFLINE"]) == (installed, "lorapilot", "1")
    database = tmp_path / "job.sqlite3"
    database.write_bytes(plan.files[tmp_path / "cat" / "_attempts" / "1" / "job.sqlite3"])
    with sqlite3.connect(database) as connection:
        found = connection.execute("SELECT id, stop, save_now, sample_now, return_to_queue FROM Job").fetchall()
    connection.close()
    assert found == [("lorapilot", 0, 0, 0, 0)]


def test_pictures_are_staged_by_repeats_with_their_captions(workspace, installed, tmp_path):
    plan = STACK.compile(job_of(tmp_path / "cat", values={"repeats": 2}, options={"datasets.flip_y": True}))
    data = tmp_path / "cat" / "_data"
    assert dict(plan.links) == {
        data / "2x" / "000001.png": Path("/pictures/a.png"),
        data / "6x" / "000002.jpg": Path("/pictures/b.JPG"),
    }
    assert plan.files[data / "6x" / "000002.txt"] == "two cats"
    datasets = process_of(plan)["datasets"]
    assert [(found["folder_path"], found["num_repeats"]) for found in datasets] == [
        (str(data / "2x"), 2),
        (str(data / "6x"), 6),
    ]
    assert all(found["flip_y"] and found["cache_latents_to_disk"] for found in datasets)


def test_options_win_over_settings_and_the_platform_over_options(workspace, installed, tmp_path):
    options = {
        "train.noise_scheduler": "euler",
        "train.optimizer": "automagic3",
        "train.optimizer_params.max_lr": 0.5,
        "network.type": "lokr",
        "datasets.random_crop": True,
        "sample.neg": "blurry",
    }
    process = process_of(STACK.compile(job_of(tmp_path / "cat", options=options)))
    assert process["train"]["noise_scheduler"] == "euler"
    assert process["train"]["optimizer"] == "automagic3"
    assert process["train"]["optimizer_params"] == {"weight_decay": 0.01, "max_lr": 0.5}
    assert (process["network"]["type"], process["sample"]["neg"]) == ("lokr", "blurry")
    assert process["datasets"][0]["cache_latents_to_disk"] is False
    assert process["logging"] == {"log_every": 1, "use_ui_logger": True}
    assert process["save"]["max_step_saves_to_keep"] == 1_000_000


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "AdamWScheduleFree"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_optimizer_goes_with_every_schedule(workspace, installed, tmp_path, optimizer, schedule):
    values = {"optimizer": optimizer, "lr_schedule": schedule, "steps": 20, "learning_rate": 1}
    plan = STACK.compile(job_of(tmp_path / "cat", values=values))
    train = process_of(plan)["train"]
    assert (train["optimizer"], train["steps"], plan.not_expressed) == (optimizer.lower(), 20, [])
    assert train["lr_scheduler"] == ("constant" if schedule == "constant_with_warmup" else schedule)


def test_text_that_ai_toolkit_would_change_reaches_it_as_it_is(workspace, installed, tmp_path):
    prompts = ["a ${HOME} $x", "a --ctrl_img /etc/passwd cat", "1e5", "yes", "#x: 'y' \"z\"\\", "çat\u2028\t猫"]
    plan = STACK.compile(job_of(tmp_path / "1e5", values={"sample_prompts": prompts}))
    text = plan.files[plan.config]
    read = yaml.safe_load(text)["config"]
    assert "$" not in text
    assert read["name"] == "1e5"
    assert 'name: "1e5"' in text
    said = [sample["prompt"] for sample in read["process"][0]["sample"]["samples"]]
    assert said == [*prompts[:1], "a –ctrl_img /etc/passwd cat", *prompts[2:]]


def test_samples_have_seeds_of_their_own(workspace, installed, tmp_path):
    sample = process_of(
        STACK.compile(job_of(tmp_path / "cat", values={"sample_prompts": ["a", "b"], "sample_seed": 5, "steps": 70}))
    )["sample"]
    assert sample["samples"] == [{"prompt": "a", "seed": 5}, {"prompt": "b", "seed": 6}]
    assert (sample["sample_every"], sample["neg"]) == (140, "")


def test_saving_has_a_cadence_of_its_own_when_only_the_last_is_wanted(workspace, installed, tmp_path):
    wanted = [process_of(STACK.compile(job_of(tmp_path / "cat", values={"steps": n})))["save"] for n in (5, 1000)]
    assert [save["save_every"] for save in wanted] == [1, 100]


def test_resume_goes_on_with_other_noise(workspace, installed, tmp_path):
    state = write_weights(tmp_path / "cat", "cat_000000100.safetensors", 100)
    job = job_of(tmp_path / "cat", values={"seed": 7}, resume_state=state, start_step=100)
    plan = STACK.compile(job)
    assert process_of(plan)["training_seed"] == 107
    assert plan.stop[0].command[-1] == "100"


@pytest.mark.parametrize("architecture", FAMILIES)
def test_no_option_leads_out_of_the_run(workspace, installed, tmp_path, architecture):
    """Each path in the file is below the run's folder, or is a model's; options never add one."""
    options = {
        option.key: option.default if option.default is not None else option.example
        for option in load_table("ai_toolkit").options.values()
        if option.is_open and option.suits(architecture)
    }
    folder = tmp_path / "outputs" / "ai-toolkit" / "cat"
    job = job_of(folder, architecture, options={key: value for key, value in options.items() if value is not None})
    plan = STACK.compile(job)
    paths = [Path(text) for text in texts_of(process_of(plan)) if "/" in text]
    own = [path for path in paths if not path.is_relative_to("/workspace/models")]
    assert own
    assert all(path == folder.parent or path.is_relative_to(folder) for path in own)
    assert all(path.is_relative_to(folder) for path in [*plan.files, *plan.links])


def texts_of(value):
    if isinstance(value, dict):
        return [text for item in value.values() for text in texts_of(item)]
    if isinstance(value, list):
        return [text for item in value for text in texts_of(item)]
    return [value] if isinstance(value, str) else []


# --- What it cannot ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (ModelFacts("m", "sdxl", "folder"), ""),
        (ModelFacts("m", "wan", "folder"), ""),
        (ModelFacts("m", "hidream", "folder", frozenset({"llm"})), ""),
        (ModelFacts("m", "ltx", "folder"), "AI Toolkit cannot train m: its kind is LTX-Video."),
        (ModelFacts("m", "unknown", "folder"), "AI Toolkit cannot train m: it is of no known kind."),
        (ModelFacts("m", "flux", "file"), "AI Toolkit reads models of this kind from a diffusers folder"),
        (ModelFacts("m", "chroma", "folder"), "AI Toolkit reads models of this kind from a single file"),
        (ModelFacts("m", "hidream", "folder"), "m has no language model for AI Toolkit: add the file under"),
        (ModelFacts("m", "sdxl", "file"), "AI Toolkit takes stabilityai/stable-diffusion-xl-base-1.0 from"),
        (ModelFacts("m", "chroma", "file"), "AI Toolkit takes ostris/Flex.1-alpha from Hugging Face for this"),
    ],
)
def test_refusal_says_what_is_missing(workspace, model, sentence):
    refusal = STACK.refusal(model)
    assert refusal.startswith(sentence)
    assert bool(refusal) == bool(sentence)


def test_what_comes_from_hugging_face_may_be_in_the_cache(workspace):
    snapshots = workspace / "cache/huggingface/hub/models--stabilityai--stable-diffusion-xl-base-1.0/snapshots"
    (snapshots / "abc").mkdir(parents=True)
    assert STACK.refusal(ModelFacts("m", "sdxl", "file")) == ""


def test_check_names_a_path_in_which_it_would_not_find_its_checkpoints(settings, tmp_path, installed):
    settings.WORKSPACE = tmp_path / "my_cn"
    assert STACK.check().startswith("The path of the workspace has _cn in it")
    settings.WORKSPACE = tmp_path / "mine"
    assert STACK.check() == ""


@pytest.mark.parametrize("name", ["s", "samples", "c", "config", "optimizer.pt", "loss", "t"])
def test_name_that_begins_a_file_of_ai_toolkit_is_refused(workspace, installed, tmp_path, name):
    with pytest.raises(UserError, match="under another name"):
        STACK.compile(job_of(tmp_path / name))


@pytest.mark.parametrize(
    ("values", "options", "field"),
    [
        ({"optimizer": "AdamWScheduleFree"}, {}, "optimizer"),
        ({}, {"datasets.cache_latents": True, "datasets.random_crop": True}, "options.datasets.random_crop"),
        ({"shuffle_caption": True}, {"train.cache_text_embeddings": True}, "options.train.cache_text_embeddings"),
        ({}, {"train.train_unet": False}, "options.train.train_unet"),
        ({}, {"train.diff_output_preservation": True}, "options.train.diff_output_preservation"),
        (
            {},
            {"model.model_kwargs.train_high_noise": False, "model.model_kwargs.train_low_noise": False},
            "options.model.model_kwargs.train_low_noise",
        ),
    ],
)
def test_settings_that_ai_toolkit_would_refuse_are_refused_before_the_run_is_queued(values, options, field):
    with pytest.raises(UserError) as refused:
        STACK.check_spec(RunSpec.from_values(values), options)
    assert refused.value.field == field


def test_optimizer_of_its_own_stands_in_for_one_that_it_does_not_have():
    STACK.check_spec(RunSpec(optimizer="AdamWScheduleFree"), {"train.optimizer": "automagic3"})


NONE = "{} has no counterpart in AI Toolkit."


@pytest.mark.parametrize(
    ("architecture", "values", "sentences"),
    [
        ("sdxl", {}, []),
        ("sdxl", {"caption_tokens": 150}, [NONE.format("Caption tokens (150)")]),
        ("flux", {"noise_offset": 0.1}, [NONE.format("Noise offset (0.1)")]),
        ("sdxl", {"noise_offset": 0.1}, []),
        ("sdxl", {"warmup_steps": 5}, [NONE.format("Warm-up steps (5)")]),
        ("sdxl", {"warmup_steps": 5, "lr_schedule": "constant"}, []),
        ("sdxl", {"keep_tokens": 1, "shuffle_caption": True}, [NONE.format("Keep first tags (1)")]),
        ("sdxl", {"lr_cycles": 3, "lr_schedule": "cosine_with_restarts"}, [NONE.format("Restarts (3)")]),
        ("flux", {"text_encoder_learning_rate": 1e-4}, [NONE.format("Text-encoder rate (0.0001)")]),
        ("sdxl", {"text_encoder_learning_rate": 1e-4}, []),
        (
            "sdxl",
            {"text_encoder_learning_rate": 5e-5},
            ["AI Toolkit trains text encoders with the same learning rate as the rest."],
        ),
        ("sdxl", {"optimizer": "Prodigy"}, ["With Prodigy AI Toolkit takes a learning rate below 0.1 for 1."]),
    ],
)  # fmt: skip
def test_settings_without_a_counterpart_are_named(architecture, values, sentences):
    assert STACK.not_expressed(RunSpec.from_values(values), architecture) == sentences


def test_vae_in_a_single_file_is_said_to_be_left_out(workspace, installed, tmp_path):
    job = job_of(tmp_path / "cat", parts={"vae": Path("/workspace/models/vae.safetensors")})
    plan = STACK.compile(job)
    assert plan.not_expressed == ["The VAE file of the model is not used: AI Toolkit reads it from a diffusers folder."]
    assert "vae_path" not in process_of(plan)["model"]


def test_language_model_in_a_single_file_is_refused(workspace, installed, tmp_path):
    (tmp_path / "llama.safetensors").touch()
    with pytest.raises(UserError, match="from a folder with their tokenizer"):
        STACK.compile(job_of(tmp_path / "cat", "hidream", parts={"llm": tmp_path / "llama.safetensors"}))


# --- States -----------------------------------------------------------------------------------------------------------
def test_newest_state_is_that_of_the_last_whole_save(tmp_path):
    folder = tmp_path / "cat"
    first = write_weights(folder, "cat_000000100.safetensors", 100, at=1000)
    second = write_weights(folder, "cat_000000200.safetensors", 200, at=2000)
    write_weights(folder, "cat_000000300.safetensors", 300, at=2500, torn=True)
    write_weights(folder, "cats_000000900.safetensors", 900, at=900)
    write_optimizer(folder, 2001)
    assert STACK.states(folder) == [(second, 200), (first, 100)]


def test_weights_without_their_optimizer_do_not_count(tmp_path):
    folder = tmp_path / "cat"
    first = write_weights(folder, "cat_000000100.safetensors", 100, at=1000)
    write_weights(folder, "cat_000000200.safetensors", 200, at=2000)
    write_optimizer(folder, 1001)
    assert STACK.states(folder) == [(first, 100)]


def test_two_stages_are_one_state(tmp_path):
    folder = tmp_path / "cat"
    high = write_weights(folder, "cat_000000100_high_noise.safetensors", 100, at=1000)
    write_weights(folder, "cat_000000100_low_noise.safetensors", 100, at=1001)
    write_optimizer(folder, 1002)
    assert STACK.states(folder) == [(high, 100)]


def test_folder_without_a_save_has_no_state(tmp_path):
    assert STACK.states(tmp_path / "cat") == []


def test_resume_makes_the_meant_state_the_newest_and_removes_torn_files(workspace, installed, tmp_path):
    folder = tmp_path / "cat"
    meant = write_weights(folder, "cat_000000100.safetensors", 100, at=1000)
    other = write_weights(folder, "cat_000000050.safetensors", 50)
    torn = write_weights(folder, "cat_000000150.safetensors", 150, torn=True)
    os.link(other, tmp_path / "published.safetensors")  # which changes its ctime
    assert other.stat().st_ctime_ns >= meant.stat().st_ctime_ns
    job = job_of(folder, resume_state=meant, start_step=100)
    STACK.compile(job)
    assert torn.exists()  # a configuration that is only shown changes nothing
    STACK.prepare(job)
    assert meant.stat().st_ctime_ns > other.stat().st_ctime_ns
    assert meant.stat().st_mtime == 1000
    assert not torn.exists()


# --- What it prints ---------------------------------------------------------------------------------------------------
def replay(name, reading, seed=0):
    """The observations of a recorded log that is read in random chunks, as it grows."""
    log = (LOGS / f"ai-toolkit-{name}.log").read_bytes()
    rng = random.Random(seed)
    found, taken, end = [], 0, 0
    while taken < len(log):
        end = min(len(log), max(end, taken) + rng.randint(1, 900))
        reading.log.write_bytes(log[:end])
        is_over = end == len(log)
        current = Reading(**{slot: getattr(reading, slot) for slot in Reading.__slots__} | {"is_over": is_over})
        observations, consumed = STACK.parse(log[taken:end], current)
        found += observations
        taken += consumed
        progress = [found_one.step for found_one in observations if isinstance(found_one, Progress)]
        if progress:
            reading = Reading(**{slot: getattr(reading, slot) for slot in Reading.__slots__} | {"step": progress[-1]})
    return found


def of(kind, found):
    return [observation for observation in found if isinstance(observation, kind)]


@pytest.mark.parametrize("seed", range(6))
def test_recorded_run_is_read_the_same_in_any_chunks(tmp_path, seed):
    folder = tmp_path / "tiny_lora"
    for step in (10, 20):
        write_weights(folder, f"tiny_lora_{step:09d}.safetensors", step)
    final = write_weights(folder, "tiny_lora.safetensors", 30)
    spec = RunSpec(steps=30, save_every_steps=10, sample_prompts=("a", "b"))
    found = replay("sd1-30steps", reading_of(folder, spec=spec), seed)
    assert of(Started, found) == [Started(0, 30)]
    steps = [progress.step for progress in of(Progress, found)]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (1, 30)
    assert of(Progress, found)[0].loss == 1.129
    assert {progress.learning_rate for progress in of(Progress, found)} == {1e-4}
    saved = [(one.path, one.step, one.is_final) for one in of(CheckpointSaved, found)]
    assert saved == [
        ("tiny_lora_000000010.safetensors", 10, False),
        ("tiny_lora_000000020.safetensors", 20, False),
        ("tiny_lora.safetensors", 30, True),
    ]
    assert of(CheckpointSaved, found)[-1].bytes == final.stat().st_size
    assert [(one.path, one.step) for one in of(StateSaved, found)] == [path[:2] for path in saved[:2]]
    assert list(dict.fromkeys(stage.text for stage in of(Stage, found))) == [
        "Loading the model",
        "Preparing the network",
        "Encoding the pictures",
        "Drawing samples",
        "Saving",
    ]
    assert of(Noted, found) == of(Hopeless, found) == []


@pytest.mark.parametrize("seed", range(3))
def test_run_without_losses_is_hopeless_and_its_first_step_is_named(tmp_path, seed):
    folder = tmp_path / "t_nan"
    reading = reading_of(folder, spec=RunSpec(steps=6))
    found = replay("nan-loss-exit0", reading, seed)
    assert of(Hopeless, found)
    outcome = STACK.outcome(reading, Exit(code=0, stop_requested=True, signals=["SIGKILL"]))
    assert outcome.status == Status.FAILED
    assert outcome.reason.startswith("The loss was no number (NaN) from step 2 on")


def test_single_step_without_a_loss_is_thrown_away_and_no_end(tmp_path):
    bar = "\rcat:  20%|##  | {}/9 [00:01<00:07,  1.42s/it, lr: 1.0e-04 loss: 1.0e+00]"
    log = bar.format(1) + "loss is nan\n" + bar.format(2) + bar.format(3) + bar.format(4) + "\n"
    reading = reading_of(tmp_path / "cat", spec=RunSpec(steps=9), is_over=True)
    reading.log.write_text(log)
    assert of(Hopeless, STACK.parse(log.encode(), reading)[0]) == []


@pytest.mark.parametrize(("expected", "notes"), [(11, []), (0, ["AI Toolkit goes on from step 11, not from step 0."])])
def test_resume_says_where_it_really_goes_on(tmp_path, expected, notes):
    chunk = b"#### IMPORTANT RESUMING FROM /x ####\n\rcat:  28%|##    | 11/40 [00:00<?, ?it/s]\r"
    found, consumed = STACK.parse(chunk, reading_of(tmp_path / "cat", spec=RunSpec(steps=40), start_step=expected))
    assert (of(Started, found), consumed) == ([Started(11, 40)], len(chunk))
    assert [note.message for note in of(Noted, found)] == notes


def test_bar_of_a_step_that_was_skipped_is_no_start(tmp_path):
    chunk = b"\rcat:   2%|#     | 1/40 [00:05<03:00,  5.00s/it]\r"
    assert STACK.parse(chunk, reading_of(tmp_path / "cat", spec=RunSpec(steps=40))) == ([], len(chunk))


def test_optimizer_that_cannot_be_read_is_noted(tmp_path):
    found, _ = STACK.parse(b"Failed to load optimizer state from /x/optimizer.pt\n", reading_of(tmp_path / "cat"))
    assert [note.message for note in of(Noted, found)] == [
        "AI Toolkit could not read the optimizer's state: its averages start afresh."
    ]


def test_prompt_that_looks_like_a_report_is_none(tmp_path):
    chunk = b'  "prompt": "Saved checkpoint to /x/cat.safetensors"\n "Saved checkpoint to /x/cat.safetensors"\n\n'
    write_weights(tmp_path / "cat", "cat.safetensors", 5)
    assert STACK.parse(chunk, reading_of(tmp_path / "cat")) == ([], len(chunk))


def test_states_on_the_way_are_dropped_when_only_the_last_file_is_wanted(tmp_path):
    folder = tmp_path / "cat"
    for step in (1, 2, 3):
        write_weights(folder, f"cat_{step:09d}.safetensors", step)
    reading = reading_of(folder, spec=RunSpec(steps=4))
    chunk = b"Saved checkpoint to /x/cat_000000003.safetensors\nSaved optimizer to /x/optimizer.pt\n"
    found, consumed = STACK.parse(chunk, reading)
    assert consumed == len(chunk)
    assert of(CheckpointRemoved, found) == [CheckpointRemoved("cat_000000001.safetensors")]
    assert of(StateSaved, found) == [StateSaved("cat_000000003.safetensors", 3)]
    write_weights(folder, "cat.safetensors", 4)
    STACK.parse(b"Saved checkpoint to /x/cat.safetensors\nSaved optimizer to /x/optimizer.pt\n", reading)
    assert [path.name for path in folder.glob("*.safetensors")] == ["cat.safetensors"]


def test_weights_are_taken_when_the_next_piece_is_there(tmp_path):
    write_weights(tmp_path / "cat", "cat_000000003.safetensors", 3)
    reading = reading_of(tmp_path / "cat", spec=RunSpec(steps=4, save_every_steps=3))
    assert STACK.parse(b"Saved checkpoint to /x/cat_000000003.safetensors\n", reading) == ([], 0)


# --- What it measures -------------------------------------------------------------------------------------------------
def write_losses(folder, rows, at=2000.0):
    folder.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(folder / "loss_log.db")
    connection.executescript(
        "PRAGMA journal_mode=WAL; CREATE TABLE IF NOT EXISTS steps (step INTEGER PRIMARY KEY, wall_time REAL);"
        "CREATE TABLE IF NOT EXISTS metrics (step INTEGER, key TEXT, value_real REAL, value_text TEXT, "
        "PRIMARY KEY (step, key));"
    )
    for step, loss in rows:
        connection.execute("INSERT INTO steps VALUES (?, ?)", (step, at + step * 0.5))
        values = [(step, "learning_rate", 1e-4, None), (step, "loss/loss", loss, None)]
        connection.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?)", values)
    connection.commit()
    connection.close()


def test_losses_are_those_after_the_last_step_that_was_told(tmp_path):
    folder = tmp_path / "cat"
    write_losses(folder, [(step, 1 / step) for step in range(1, 12)])
    found = STACK.measure(reading_of(folder, spec=RunSpec(steps=20), step=10))
    assert found == [Progress(11, 20, 2005.0, 0.1, 1e-4, 2.0, 4.5), Progress(12, 20, 2005.5, 1 / 11, 1e-4, 2.0, 4.0)]


def test_losses_of_an_earlier_attempt_are_not_told_again(tmp_path):
    folder = tmp_path / "cat"
    write_losses(folder, [(1, 0.5), (2, 0.4)])
    reading = reading_of(folder)
    (reading.attempt_folder / "launch.json").write_text("{}")
    assert STACK.measure(reading) == []


def test_measuring_takes_only_so_many_rows_at_once_and_no_loss_for_zero(tmp_path):
    folder = tmp_path / "cat"
    write_losses(folder, [(step, 0.0) for step in range(1, 3000)])
    found = STACK.measure(reading_of(folder, spec=RunSpec(steps=5000)))
    assert len(found) == ai_toolkit.MOST_ROWS + ai_toolkit.LOOK_BACK
    assert all(math.isnan(progress.loss) for progress in found)


def test_measuring_waits_for_a_database_that_is_not_there_or_held(tmp_path):
    folder = tmp_path / "cat"
    assert STACK.measure(reading_of(folder)) == []
    (folder / "loss_log.db").write_bytes(b"no database" * 100)
    assert STACK.measure(reading_of(folder)) == []


def test_bar_is_read_for_the_first_step_only_while_there_is_a_database_of_losses(tmp_path):
    write_losses(tmp_path / "cat", [])
    reading = reading_of(tmp_path / "cat", spec=RunSpec(steps=9), start_step=1, step=1)
    said = (f"\rcat:  20%|##  | {n}/9 [00:01<00:07,  2.00s/it, lr: 1.0e-04 loss: {n}.0e+00]" for n in (1, 2, 2, 3))
    found, _ = STACK.parse("".join([*said, "\r"]).encode(), reading)
    assert [(one.step, one.loss, one.eta_seconds) for one in of(Progress, found)] == [(2, 1.0, 14.0)]


# --- How it ends ------------------------------------------------------------------------------------------------------
def ended(tmp_path, log, code, *, steps=30, saved=None, **exit_):
    folder = tmp_path / "cat"
    reading = reading_of(folder, spec=RunSpec(steps=steps), is_over=True)
    (reading.attempt_folder / "launch.json").write_text("{}")
    os.utime(reading.attempt_folder / "launch.json", (1000, 1000))
    reading.log.write_bytes(log)
    if saved:
        write_weights(folder, "cat.safetensors", saved[0], at=saved[1])
    return STACK.outcome(reading, Exit(code=code, stop_requested=exit_.pop("stop_requested", False), **exit_))


def recorded(name):
    return (LOGS / f"ai-toolkit-{name}.log").read_bytes()


def test_success_is_the_last_file_with_all_steps_in_it(tmp_path):
    assert ended(tmp_path, b"", 0, saved=(30, 2000)).status == Status.SUCCEEDED


@pytest.mark.parametrize(
    ("saved", "reason"),
    [
        (None, "AI Toolkit ended without saving the LoRA."),
        ((30, 500), "AI Toolkit ended without saving the LoRA."),
        ((29, 2000), "AI Toolkit ended after 29 of 30 steps."),
    ],
)
def test_exit_code_zero_alone_is_no_success(tmp_path, saved, reason):
    outcome = ended(tmp_path, b"what it said\n", 0, saved=saved)
    assert outcome.status == Status.FAILED
    assert outcome.reason == f"{reason} These are its last lines:\nwhat it said"


def test_interruption_from_outside_is_no_success_and_goes_on(tmp_path):
    outcome = ended(tmp_path, recorded("sigint-exit0"), 0, steps=4000)
    assert (outcome.status, outcome.cause) == (Status.ERRORED, Cause.KILLED)


def test_stop_by_a_signal_is_a_stop(tmp_path):
    outcome = ended(tmp_path, recorded("sigint-exit0"), 0, steps=4000, stop_requested=True, signals=["SIGINT"])
    assert outcome.status == Status.STOPPED
    assert outcome.reason == "Stopped. Resume goes on from the last saved state, if there is one."


@pytest.mark.parametrize(
    ("log", "cause", "words"),
    [
        (recorded("missing-model-exit1"), Cause.OWN, "AI Toolkit found no base model at its path."),
        (b"AssertionError: no images found in /x\n", Cause.OWN, "AI Toolkit found no picture that it can read"),
        (
            b"RuntimeError: OOM during training step 3 times in a row, aborting training\n",
            Cause.OUT_OF_MEMORY,
            "The GPU ran out of memory in several steps in a row.",
        ),
        (b"torch.OutOfMemoryError: CUDA out of memory. Tried\n", Cause.OUT_OF_MEMORY, "The GPU ran out of memory."),
        (b"ModuleNotFoundError: No module named 'bitsandbytes'\n", Cause.OWN, "This optimizer needs bitsandbytes"),
        (b"ImportError: Please install lion_pytorch to use\n", Cause.OWN, "This optimizer needs a package"),
        (b"RuntimeError: operator torchvision::nms does not exist\n", Cause.OWN, "torch, torchvision and torchaudio"),
        (b"ValueError: config file is invalid. Unknown process type: x\n", Cause.OWN, "This version of AI Toolkit"),
        (
            b"OSError: Error no file named model_index.json found in\n",
            Cause.OWN,
            "The base model's folder has no model",
        ),
        (b"sqlite3.OperationalError: database is locked\n", Cause.OWN, "AI Toolkit could not use its job's database."),
        (b"something else\n", Cause.OWN, "The trainer ended with exit code 1. These are its last lines:\nsomething"),
    ],
)
def test_failure_has_a_reason_and_a_remedy(tmp_path, log, cause, words):
    outcome = ended(tmp_path, log, 1)
    assert (outcome.status, outcome.cause) == (Status.FAILED, cause)
    assert outcome.reason.startswith(words)


# --- Configurations that people bring ---------------------------------------------------------------------------------
THEIRS = """
job: extension
config:
  name: my_lora
  process:
    - type: sd_trainer
      training_folder: output
      trigger_word: p3r5on
      device: cuda:0
      network: {type: lora, linear: 16, linear_alpha: 8}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4, push_to_hub: false}
      datasets:
        - folder_path: /path/to/images
          caption_ext: txt
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          cache_latents_to_disk: true
          resolution: [512, 768, 1024]
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation_steps: 2
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: flowmatch
        optimizer: adamw8bit
        lr: 1e-4
        ema_config: {use_ema: true, ema_decay: 0.99}
        dtype: bf16
      model: {name_or_path: black-forest-labs/FLUX.1-dev, is_flux: true, quantize: true}
      sample:
        sampler: flowmatch
        sample_every: 250
        width: 1024
        height: 1024
        prompts: ["[trigger] holding a sign", "another"]
        neg: ""
        seed: 42
        walk_seed: true
        guidance_scale: 4
        sample_steps: 20
meta: {name: "[name]", version: '1.0'}
"""


def test_usual_configuration_is_read_in_our_words():
    read = STACK.read_config(THEIRS)
    assert RunSpec.from_values(read.values) == RunSpec(
        rank=16,
        alpha=8.0,
        resolution=1024,
        caption_dropout=0.05,
        steps=2000,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        optimizer="AdamW8bit",
        learning_rate=1e-4,
        ema_decay=0.99,
        save_every_steps=250,
        keep_last=4,
        sample_every_steps=250,
        sample_prompts=("[trigger] holding a sign", "another"),
        sample_seed=42,
        sample_scale=4.0,
    )
    assert read.options == {
        "network.type": "lora",
        "trigger_word": "p3r5on",
        "train.train_unet": True,
        "train.noise_scheduler": "flowmatch",
        "model.quantize": True,
        "sample.sampler": "flowmatch",
        "sample.walk_seed": True,
        "datasets.cache_latents_to_disk": True,
    }
    assert read.model == "black-forest-labs/FLUX.1-dev"
    assert read.notes == ["Of several resolutions the largest is read: here a run has one."]


def test_what_was_written_for_it_is_read_back(workspace, installed, tmp_path):
    spec = RunSpec.from_values(FULL | {"keep_last": 0, "lr_schedule": "constant_with_warmup", "sample_seed": 9})
    job = job_of(tmp_path / "cat", values=spec.as_values(), options={"train.loss_type": "mae"})
    read = STACK.read_config(STACK.compile(job).files[job.attempt_folder / "cat.yaml"])
    again = RunSpec.from_values(read.values)
    changed = {"conv_alpha": 4.0}  # 0 was: as the rank
    assert again.as_values() == spec.as_values() | changed
    assert read.options["train.loss_type"] == "mae"


def test_json_is_read_too():
    assert STACK.read_config('{"train": {"steps": 7}, "train_x": 1}').values == {"steps": 7}


def test_what_is_left_out_is_said():
    text = """
config:
  process:
    - train: {steps: 5, adapter_lr: 1, optimizer: adam8bit, lr_scheduler: step, train_text_encoder: true, lr: 0.001}
      datasets: [{folder_path: a, num_repeats: 3}, {folder_path: b}]
      network: {pretrained_lora_path: /x/y.safetensors}
      bogus: 1
      sample: {samples: [{prompt: a, width: 64}]}
    - {}
"""
    read = STACK.read_config(text)
    assert read.values == {
        "steps": 5,
        "repeats": 3,
        "learning_rate": 0.001,
        "text_encoder_learning_rate": 0.001,
        "sample_prompts": ("a",),
    }
    assert read.options == {"train.optimizer": "adam8bit"}
    assert read.notes == [
        "Only the first of 2 processes is read.",
        "Settings of the first of 2 datasets are read: here they are for all pictures.",
        "Samples of their own size, seed or guidance are drawn with those of all samples.",
        "train.adapter_lr is left out. It is for adapters other than LoRAs.",
        "network.pretrained_lora_path is left out. It reads another file; start from a LoRA by resuming its run.",
        "bogus is no option of AI Toolkit: left out.",
        "The schedule step is left out: choose another one.",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "The configuration is empty."),
        ("a: [1\nb: 2", "This is no YAML: "),
        ("{", "This is no JSON: "),
        ("just words", "This is no configuration for AI Toolkit: it has no keys."),
        ("config: {process: []}", "This is no configuration for AI Toolkit: config.process"),
        ("config: {process: 5}", "This is no configuration for AI Toolkit: config.process"),
        ("a: &x [1]\nb: *x", "Line 2: references (*) are not read."),
        ("a: !!python/object/apply:os.system ['id']", "This is no YAML: "),
        ("[" * 3000, "This is no YAML that can be read."),
        ("[" * 40 + "]" * 40, "A configuration has at most 32 levels."),
        ('{"a":' * 200 + "1" + "}" * 200, "A configuration has at most 32 levels."),
        ("train: {noise_offset: .inf}", "Noise offset is a number."),
        ("a: 1\n" * 50_000, "A configuration has at most 200,000 characters."),
        ("train: {steps: many}", "Steps is a whole number."),
        ("train: {dtype: float8}", "'float8' is no number format: use fp32, fp16 or bf16."),
    ],
)
def test_configuration_that_cannot_be_read_says_where(text, words):
    with pytest.raises(UserError) as refused:
        STACK.read_config(text)
    assert refused.value.message.startswith(words)


# --- Whole runs -------------------------------------------------------------------------------------------------------
@pytest.fixture
def worker(workspace, alice, installed, handed_out, monkeypatch, db):
    """What a test needs to play the worker: (how it goes, settings) → the run, played so far as it says."""
    monkeypatch.setattr(follow, "OBSERVE_SECONDS", 0.05)
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(follow, "ROW_SECONDS", 0.05)
    monkeypatch.setattr(endings, "PAUSES", (0,) * 5)
    make_slot(trainers=["ai_toolkit"])

    class Worker:
        def start(self, behaviour, **values):
            (installed / "behaviour").write_text(behaviour)
            known = {"steps": 6, "save_every_steps": 2, "sample_prompts": ["a cat"]}
            return make_run(alice, output_name="cat", stack="ai_toolkit", values=known | values)

        def behave(self, behaviour):
            (installed / "behaviour").write_text(behaviour)

        def until(self, run, is_so):
            """Slices until the run is as wanted."""
            monkeypatch.setattr(follow, "SLICE_SECONDS", 0.1)
            for _ in range(300):
                supervise_slice(handed_out.pop().pk)
                run.refresh_from_db()
                if is_so(run):
                    break
            else:
                pytest.fail(f"{run.status} at step {run.step}: {run.reason}")
            monkeypatch.setattr(follow, "SLICE_SECONDS", 6.0)

        def to_the_end(self, run):
            self.until(run, lambda run: run.status in {"succeeded", "failed", "errored", "stopped"})

    return Worker()


on_disk = pytest.mark.django_db(transaction=True)


@on_disk
def test_run_trains_to_its_end(worker):
    run = worker.start("finishes")
    worker.to_the_end(run)
    assert (run.status, run.step, run.total_steps, run.exit_code, run.reason) == ("succeeded", 6, 6, 0, "")
    assert list(run.metrics.values_list("step", "loss")) == [(step, 1 / step) for step in range(1, 7)]
    assert list(run.checkpoints.values_list("path", "step", "is_final").order_by("step")) == [
        ("cat_000000002.safetensors", 2, False),
        ("cat_000000004.safetensors", 4, False),
        ("cat.safetensors", 6, True),
    ]
    assert [(sample.step, sample.prompt) for sample in run.samples.order_by("step")] == [(0, "a cat"), (6, "a cat")]
    assert all((run.folder / sample.path).is_file() for sample in run.samples.all())
    assert run.folder.parts[-3:] == ("outputs", "ai-toolkit", "cat")


@on_disk
def test_provenance_is_in_the_files_metadata(worker):
    run = worker.start("finishes")
    worker.to_the_end(run)
    metadata = ai_toolkit.read_header(run.folder / "cat.safetensors").metadata
    assert (metadata["run"], metadata["base_model"]) == (str(run.pk), "pilot-tiny")
    assert metadata["dataset_digest"] == run.dataset_version.digest


@on_disk
def test_stop_saves_first_and_resume_goes_on_at_the_true_step(worker, alice):
    run = worker.start("slow", steps=40, save_every_steps=0)
    worker.until(run, lambda run: run.step >= 5)
    services.stop_run(run, actor=alice)
    worker.to_the_end(run)
    saved = run.step
    assert (run.status, run.exit_code) == ("stopped", 1)
    assert run.reason == f"Stopped at step {saved}; weights and state are saved."
    assert STACK.states(run.folder)[0] == (run.folder / f"cat_{saved:09d}.safetensors", saved)
    assert run.checkpoints.filter(step=saved).exists()
    bars = re.findall(rb"cat: +\d+%\|[^|]*\| (\d+)/40", run.log_path.read_bytes())
    assert int(bars[-1]) == saved  # no step was trained for nothing
    worker.behave("finishes")
    services.resume_run(run, actor=alice)
    worker.to_the_end(run)
    assert (run.status, run.step, run.attempt) == ("succeeded", 40, 2)
    assert run.attempts.last().start_step == saved
    assert list(run.metrics.values_list("step", flat=True)) == list(range(1, 41))
    assert not run.events.filter(message__startswith="AI Toolkit goes on").exists()
    assert [path.name for path in run.folder.glob("*.safetensors")] == ["cat.safetensors"]


@on_disk
def test_run_that_is_killed_goes_on_from_its_state(worker):
    run = worker.start("is killed")
    worker.to_the_end(run)
    assert (run.status, run.step, run.attempt) == ("succeeded", 6, 2)
    assert run.attempts.last().start_step == 2


@on_disk
def test_run_that_is_killed_while_it_saves_goes_on_from_the_save_before(worker):
    run = worker.start("is killed while it saves")
    worker.to_the_end(run)
    assert (run.status, run.step, run.attempt) == ("succeeded", 6, 2)
    assert run.attempts.last().start_step == 2


@on_disk
def test_run_without_a_loss_is_ended_at_once(worker):
    run = worker.start("loses its loss", steps=5000)
    worker.to_the_end(run)
    assert run.status == "failed"
    assert run.reason.startswith("The loss was no number (NaN) from step 3 on")


@on_disk
def test_run_out_of_memory_says_what_to_do(worker):
    run = worker.start("runs out of memory")
    worker.to_the_end(run)
    assert (run.status, run.attempts.last().ending) == ("failed", "out_of_memory")
    assert run.reason.startswith("The GPU ran out of memory in several steps in a row.")
    assert run.events.filter(message__startswith="Memory ran out in 3 steps").count() == 1


@on_disk
def test_stop_before_the_first_step_does_not_wait_for_a_save(worker, alice):
    run = worker.start("slow", steps=40)
    services.stop_run(Run.objects.get(pk=run.pk), actor=alice)
    worker.to_the_end(run)
    assert run.status == "stopped"


def test_asking_before_the_first_step_only_stops(tmp_path, monkeypatch):
    database = tmp_path / "job.sqlite3"
    database.write_bytes(ai_toolkit._job_database())
    monkeypatch.setattr(ask_ai_toolkit, "LAST_WORDS_SECONDS", 0)
    monkeypatch.setattr(ask_ai_toolkit, "ENDED", ("",))
    ask_ai_toolkit.main(str(database), str(tmp_path / "optimizer.pt"), "0")
    with sqlite3.connect(database) as connection:
        assert connection.execute("SELECT save_now, stop FROM Job").fetchone() == (0, 1)
    connection.close()


def test_asking_without_a_database_ends(tmp_path):
    with pytest.raises(SystemExit):
        ask_ai_toolkit.main(str(tmp_path / "none"), "", "0")


def test_stack_is_registered():
    assert get_stack("ai_toolkit").name == "AI Toolkit"
