"""What the Diffusion Pipe stack writes, reads and concludes; and attempts of a stand-in, from slot to end."""

import base64
import dataclasses
import hashlib
import json
import random
import struct
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from lorapilot.errors import UserError
from lorapilot.services import set_secret
from models_registry.enums import Architecture, role_within
from runs import endings, services, stacks
from runs.enums import DeviceKind, Status
from runs.models import Run
from runs.spec import OPTIMIZERS, SCHEDULES, RunSpec
from runs.stacks import save_and_quit
from runs.stacks.base import (
    Cause,
    CheckpointSaved,
    Exit,
    Hopeless,
    ModelFacts,
    Noted,
    Outcome,
    Progress,
    Reading,
    Stage,
    Started,
    StateSaved,
    TrainingJob,
    TrainingPicture,
)
from runs.stacks.diffusion_pipe import DiffusionPipeStack
from runs.stacks.diffusion_pipe_models import FAMILIES, SDXL_CONFIGURATION
from runs.stacks.option_table import check_options
from runs.supervision import follow, process
from runs.supervision.follow import supervise_slice
from runs.trainer_secrets import VARIABLES
from tests.factories import make_run, make_slot
from tests.runs import diffusion_pipe_stand_in as stand_in

DATA = Path(__file__).resolve().parent / "data"
TOY = DATA / "trainer-logs" / "deepspeed-pipeline-engine-toy-model.log"
RESUMED = DATA / "trainer-logs" / "deepspeed-pipeline-engine-resumed-at-step3.log"
STACK = DiffusionPipeStack()


@pytest.fixture
def home(settings, tmp_path):
    """A folder with the stand-in, as an installation."""
    home = tmp_path / "diffusion-pipe-home"
    stand_in.install(home)
    settings.TRAINERS = settings.TRAINERS | {"diffusion_pipe": {"home": str(home), "python": sys.executable}}
    return home


def base_model_of(models, architecture):
    """A base model of this kind with all that it needs, in the models root: path, layout, parts."""
    folder = models / architecture
    parts = {}
    for role in {**FAMILIES[architecture].parts, **FAMILIES[architecture].encoders}:
        parts[role] = folder / f"{role}.safetensors"
    if architecture in {"sd3", "flux", "omnigen2", "hidream"}:
        parts = {"llm": whole_folder(folder / "llama")} if architecture == "hidream" else {}
        return folder / "pipeline", "folder", parts
    if architecture in {"chroma", "ltx"}:
        pipeline = folder / "pipeline"
        pipeline.mkdir(parents=True)
        (pipeline / "model_index.json").touch()
        parts["t5"] = pipeline / "text_encoder"
    if architecture == "hunyuan_video":
        parts |= {"llm": whole_folder(folder / "llava"), "clip_l": whole_folder(folder / "clip") / "model.safetensors"}
    if architecture in {"wan", "wan22"}:
        folder.mkdir(parents=True)
        (folder / "Wan2.1_VAE.pth").touch()
        parts["t5"] = folder / "umt5.safetensors"
    return folder / "low" / "model.safetensors", "file", parts


def whole_folder(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    (folder / "tokenizer.json").touch()
    return folder


def job_of(workspace, architecture="lumina2", values=None, **fields):
    folder = workspace / "outputs" / "cat"
    path, layout, parts = base_model_of(workspace / "models", architecture)
    facts = {
        "name": "cat",
        "folder": folder,
        "attempt_folder": folder / "_attempts" / "1",
        "spec": RunSpec.from_values({"steps": 100, **(values or {})}),
        "base_model": path,
        "architecture": architecture,
        "layout": layout,
        "parts": parts,
        "pictures": [TrainingPicture(f"/p/{n}.png", f"a cat, {n}", 1 + n % 2) for n in range(6)],
        "device": DeviceKind.CUDA,
        "device_uuids": ["GPU-1"],
        "provenance": {"run": "7"},
    }
    return TrainingJob(**facts | fields)


def tables(plan):
    """The two TOML files of a plan, read again."""
    return [tomllib.loads(plan.files[path]) for path in (plan.config, plan.config.with_name("dataset.toml"))]


# --- The configuration ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_configuration_of_each_architecture(workspace, home, architecture):
    values = {
        "batch_size": 2,
        "warmup_steps": 5,
        "save_every_steps": 20,
        "caption_dropout": 0.1,
        "gradient_checkpointing": True,
    }
    plan = STACK.compile(job_of(workspace, architecture, values))
    text = "\n".join(plan.files[path] for path in (plan.config, plan.config.with_name("dataset.toml")))
    golden = DATA / "golden" / f"diffusion_pipe-{architecture}.toml"
    assert text.replace(str(workspace), "/w") == golden.read_text()


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_paths_lie_in_the_run_or_in_the_models(workspace, home, architecture):
    plan = STACK.compile(job_of(workspace, architecture))
    for path in [*plan.files, *plan.links]:
        assert path.is_relative_to(workspace / "outputs" / "cat")
    named = [text for table in tables(plan) for text in texts(table) if "/" in text]
    assert named
    for text in named:
        assert text.startswith((f"{workspace}/outputs/cat/", f"{workspace}/models/"))


def texts(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    return [value] if isinstance(value, str) else []


def test_architectures_are_those_of_the_registry():
    assert frozenset(Architecture.values) - {"sd15", "sd2", "unknown"} == STACK.architectures


def test_command_pins_the_run_to_its_devices_by_uuid(workspace, home):
    plan = STACK.compile(job_of(workspace, device_uuids=["GPU-7", "MIG-2"]))
    python, dash_m, launcher, world, address, port, *trainer = plan.argv
    assert (python, dash_m, launcher) == (sys.executable, "-m", "deepspeed.launcher.launch")
    assert json.loads(base64.urlsafe_b64decode(world.removeprefix("--world_info="))) == {
        "localhost": ["GPU-7", "MIG-2"]
    }
    number = port.removeprefix("--master_port=")
    assert 1024 <= int(number) < 65536
    assert address == "--master_addr=127.0.0.1"
    assert trainer == ["train.py", "--deepspeed", "--master_port", number, "--config", str(plan.config)]
    assert plan.env["CUDA_VISIBLE_DEVICES"] == "GPU-7,MIG-2"
    assert (plan.env["NCCL_P2P_DISABLE"], plan.env["NCCL_IB_DISABLE"], plan.cwd) == ("1", "1", home)


def test_regenerate_cache_is_a_flag_of_the_command(workspace, home):
    plan = STACK.compile(job_of(workspace, options={"regenerate_cache": True}))
    assert plan.argv[-1] == "--regenerate_cache"
    assert "regenerate_cache" not in tables(plan)[0]


def test_options_come_where_its_configuration_nests_them(workspace, home):
    given = {
        "adapter.type": "lokr",
        "optimizer.type": "Prodigy",
        "optimizer.betas": [0.9, 0.99],
        "checkpoint_every_n_epochs": 2,
        "activation_checkpointing": "unsloth",
        "dataset.max_ar": 3,
    }
    options = check_options(STACK.table(), given, architecture="lumina2")
    config, dataset = tables(STACK.compile(job_of(workspace, options=options)))
    assert config["adapter"] == {"type": "lokr", "rank": 16}
    assert (config["optimizer"]["type"], config["optimizer"]["betas"]) == ("Prodigy", [0.9, 0.99])
    assert (config["checkpoint_every_n_epochs"], config["activation_checkpointing"]) == (2, "unsloth")
    assert "checkpoint_every_n_minutes" not in config
    assert (dataset["max_ar"], dataset["min_ar"]) == (3.0, 0.5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_optimizer_and_schedule_has_a_name_that_it_knows(workspace, home, optimizer, schedule):
    config, _ = tables(STACK.compile(job_of(workspace, values={"optimizer": optimizer, "lr_schedule": schedule})))
    assert config["optimizer"]["type"] in STACK.table().options["optimizer.type"].choices
    assert config["lr_scheduler"] in {"constant", "linear", "cosine"}


def updates_of_a_pass(dataset, folders, update):
    """As utils/dataset.py counts them: each bucket is cut to whole updates. `folders`: buckets' sizes, by folder."""
    buckets = {}
    for directory, sizes in zip(dataset["directory"], folders, strict=True):
        for bucket, size in sizes.items():
            buckets[bucket] = buckets.get(bucket, 0) + int(size * directory["num_repeats"])
    return sum(size // update for size in buckets.values())


@pytest.mark.parametrize("seed", range(20))
def test_one_pass_over_the_dataset_is_the_whole_run(workspace, home, seed):
    """A falling schedule is as long as the pass; a pass that ends too early would end the training."""
    chance = random.Random(seed)
    counts = [chance.randint(1, 40) for _ in range(chance.randint(1, 3))]
    pictures = [TrainingPicture("/p/a.png", "", repeats) for repeats, n in enumerate(counts, 1) for _ in range(n)]
    values = {
        "steps": chance.randint(5, 3000),
        "batch_size": chance.randint(1, 8),
        "gradient_accumulation_steps": chance.randint(1, 4),
        "lr_schedule": "cosine",
    }
    job = job_of(workspace, values=values, pictures=pictures)
    config, dataset = tables(STACK.compile(job))
    folders = [dict.fromkeys(range(7), 0) for _ in counts]
    for folder, count in zip(folders, counts, strict=True):
        for _ in range(count):
            folder[chance.randrange(7)] += 1
    updates = updates_of_a_pass(dataset, folders, values["batch_size"] * values["gradient_accumulation_steps"])
    assert config["epochs"] == 1
    assert values["steps"] <= updates <= values["steps"] + 7 * 4 + 1


def test_schedule_that_does_not_fall_may_pass_over_the_dataset_again(workspace, home):
    config, _ = tables(STACK.compile(job_of(workspace, values={"lr_schedule": "constant"})))
    assert config["epochs"] == config["max_steps"] == 100


def test_settings_without_a_counterpart_are_named():
    spec = RunSpec(rank=48, alpha=24, seed=5, flip=True, min_snr_gamma=5, lr_schedule="cosine_with_restarts")
    assert STACK.not_expressed(spec, "flux") == [
        "Alpha (24) has no counterpart: it is fixed to the rank (48).",
        "Mirror at random (on) has no counterpart in Diffusion Pipe.",
        "Seed (5) has no counterpart in Diffusion Pipe.",
        "Min-SNR gamma (5) has no counterpart in Diffusion Pipe.",
        "Schedule (cosine_with_restarts) has no counterpart: it is cosine.",
    ]
    spec = RunSpec(min_snr_gamma=5, text_encoder_learning_rate=1e-5, sample_prompts=("a cat",))
    assert STACK.not_expressed(spec, "sdxl") == ["Diffusion Pipe draws no sample pictures."]
    assert STACK.not_expressed(RunSpec(), "flux") == []


@pytest.mark.parametrize(
    ("values", "options", "field"),
    [
        ({"gpus": 3}, {"pipeline_stages": 2}, "pipeline_stages"),
        ({"gpus": 2}, {"pipeline_stages": 2, "blocks_to_swap": 3}, "blocks_to_swap"),
        (
            {"gpus": 2},
            {"pipeline_stages": 2, "partition_method": "manual", "partition_split": [1, 2]},
            "partition_split",
        ),
        ({"gpus": 2}, {"optimizer.gradient_release": True}, "optimizer.gradient_release"),
        ({}, {"checkpoint_every_n_minutes": 5, "checkpoint_every_n_epochs": 5}, "checkpoint_every_n_epochs"),
    ],
)
def test_options_that_contradict_each_other_are_refused(values, options, field):
    with pytest.raises(UserError) as refused:
        STACK.check_spec(RunSpec.from_values(values), options)
    assert refused.value.field == f"options.{field}"


# --- Base models ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_complete_model_is_taken_and_an_incomplete_one_refused(workspace, architecture):
    snapshot = workspace / "cache/huggingface/hub" / f"models--{SDXL_CONFIGURATION.replace('/', '--')}" / "snapshots/0"
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").touch()
    _, layout, parts = base_model_of(workspace / "models", architecture)
    facts = ModelFacts("M", architecture, layout, frozenset(parts))
    assert STACK.refusal(facts) == ""
    needed = parts if architecture not in {"wan", "wan22"} else {}  # their text encoder may lie beside them
    for role in needed:
        refused = STACK.refusal(dataclasses.replace(facts, parts=facts.parts - {role}))
        assert role_within(role) in refused
        assert "Other files it is trained with" in refused


@pytest.mark.parametrize(
    ("architecture", "layout", "says"),
    [
        ("sd15", "file", "cannot train M: its kind is Stable Diffusion 1.5. Choose a model of Anima, AuraFlow, Chroma"),
        ("sdxl", "folder", "from a single file"),
        ("flux", "file", "from a diffusers folder"),
        ("sdxl", "file", f"hf download {SDXL_CONFIGURATION}"),
    ],
)
def test_refusal_says_what_to_do(workspace, architecture, layout, says):
    assert says in STACK.refusal(ModelFacts("M", architecture, layout))


@pytest.mark.parametrize(
    ("architecture", "spoil", "says"),
    [
        ("wan", lambda job: (job.base_model.parents[1] / "Wan2.1_VAE.pth").unlink(), "Wan2.1_VAE.pth"),
        ("chroma", lambda job: (job.parts["t5"].parent / "model_index.json").unlink(), "whole diffusers folder"),
        ("hidream", lambda job: (job.parts["llm"] / "tokenizer.json").unlink(), "its tokenizer"),
        ("z_image", lambda job: (job.parts["vae"]).mkdir(parents=True), "one .safetensors file"),
    ],
)
def test_part_of_another_shape_is_refused_at_the_start(workspace, home, architecture, spoil, says):
    job = job_of(workspace, architecture)
    spoil(job)
    with pytest.raises(UserError, match=says):
        STACK.compile(job)


def test_lokr_that_it_could_not_save_and_a_cpu_are_refused(workspace, home):
    with pytest.raises(UserError, match="cannot save a LoKr of Stable Diffusion XL"):
        STACK.compile(job_of(workspace, "sdxl", options={"adapter.type": "lokr"}))
    with pytest.raises(UserError, match="NVIDIA GPUs only"):
        STACK.compile(job_of(workspace, device=DeviceKind.CPU))


# --- States and resuming ----------------------------------------------------------------------------------------------
def put_state(run, step, *, latest=True):
    state = run / f"global_step{step}"
    state.mkdir(parents=True)
    if latest:
        (run / "latest").write_text(state.name)
    return state


def reading_of(folder, **fields):
    facts = {"name": "cat", "folder": folder, "attempt_folder": folder / "_attempts" / "1", "spec": RunSpec(steps=6)}
    return Reading(**facts | {"provenance": {"run": "7"}} | fields)


def test_state_counts_when_latest_names_it_or_did(tmp_path):
    run = tmp_path / "diffusion-pipe" / "20260820_10-00-00"
    first = put_state(run, 10)
    assert STACK.states(tmp_path) == [(first, 10)]
    assert STACK.measure(reading_of(tmp_path)) == [StateSaved("diffusion-pipe/20260820_10-00-00/global_step10", 10)]
    assert STACK.measure(reading_of(tmp_path)) == []
    torn = put_state(run, 20, latest=False)  # killed while it was being written
    assert STACK.states(tmp_path) == [(first, 10)]
    (run / "latest").write_text("")  # killed between opening and writing it
    assert STACK.states(tmp_path) == [(first, 10)]
    (run / "latest").write_text(torn.name)
    assert STACK.states(tmp_path) == [(torn, 20), (first, 10)]


def test_two_newest_states_are_kept(tmp_path):
    run = tmp_path / "diffusion-pipe" / "20260820_10-00-00"
    for step in (10, 20, 30):
        put_state(run, step)
        STACK.measure(reading_of(tmp_path))
    assert sorted(path.name for path in run.glob("global_step*")) == ["global_step20", "global_step30"]


def test_resume_goes_on_from_the_state_and_clears_what_is_in_the_way(workspace, home):
    folder = workspace / "outputs" / "cat"
    run = folder / "diffusion-pipe" / "20260820_10-00-00"
    state = put_state(run, 10)
    put_state(run, 20, latest=False)
    (run / "step20" / "tmp").mkdir(parents=True)
    (run / "save_quit").touch()
    STACK.prepare(job_of(workspace, resume_state=state, start_step=10))
    plan = STACK.compile(job_of(workspace, resume_state=state, start_step=10))
    assert plan.argv[-2:] == ["--resume_from_checkpoint", "20260820_10-00-00"]
    assert plan.files[run / "latest"] == "global_step10"
    assert sorted(path.name for path in run.iterdir()) == ["global_step10", "latest", "step20"]
    assert list((run / "step20").iterdir()) == []


@pytest.mark.parametrize(("optimizer", "flags"), [("AdamW", []), ("AdamW8bit", ["--reset_optimizer"])])
def test_state_of_another_optimizer_is_loaded_without_it(workspace, home, optimizer, flags):
    folder = workspace / "outputs" / "cat"
    state = put_state(folder / "diffusion-pipe" / "20260820_10-00-00", 10)
    STACK.measure(reading_of(folder))
    plan = STACK.compile(job_of(workspace, values={"optimizer": optimizer}, resume_state=state, start_step=10))
    assert plan.argv[plan.argv.index("20260820_10-00-00") + 1 :] == flags
    assert len(plan.not_expressed) == len(flags)


def test_state_of_elsewhere_is_refused(workspace, home, tmp_path):
    state = put_state(tmp_path / "other" / "20260820_10-00-00", 10)
    with pytest.raises(UserError, match="no state of this run"):
        STACK.prepare(job_of(workspace, resume_state=state))
    assert state.is_dir()


# --- What it prints ---------------------------------------------------------------------------------------------------
def parse_all(data, reading, seed=None):
    """As a slice does: what was not consumed comes again, in pieces of any size."""
    chance = random.Random(seed)
    found, start, end = [], 0, 0
    while end < len(data):
        end = len(data) if seed is None else min(len(data), end + chance.randint(1, 200))
        over = dataclasses.replace(reading, is_over=end == len(data))
        observations, consumed = STACK.parse(data[start:end], over)
        found += observations
        start += consumed
        steps = [observation.step for observation in observations if isinstance(observation, Progress)]
        reading = dataclasses.replace(reading, step=steps[-1] if steps else reading.step)
    return found


def facts_of(observations):
    """Without the time of day."""
    return [
        dataclasses.replace(observation, at=0.0) if isinstance(observation, Progress) else observation
        for observation in observations
    ]


@pytest.mark.parametrize("seed", [None, *range(5)])
def test_recorded_log_of_the_engine_is_progress(tmp_path, seed):
    told = parse_all(TOY.read_bytes(), reading_of(tmp_path), seed)
    assert all(isinstance(observation, Progress) for observation in told)
    assert [(one.step, one.loss) for one in told] == [
        (1, 0.0304), (2, 0.1417), (3, 0.0477), (4, 0.0064), (5, 0.407), (6, 0.0979),
    ]  # fmt: skip
    assert (told[1].steps_per_second, told[1].eta_seconds, told[1].total_steps) == (500.0, 0.008, 6)


@pytest.mark.parametrize("seed", [None, *range(5)])
def test_recorded_log_of_a_resume_goes_on_at_the_true_step(tmp_path, seed):
    """DeepSpeed 0.18.4 on a CPU, given a UUID: its own lines of the step, the rate and the state."""
    started, *told = parse_all(RESUMED.read_bytes(), reading_of(tmp_path, start_step=3), seed)
    assert started == Started(3, 6)
    assert [(one.step, one.loss, one.learning_rate) for one in told] == [
        (4, 1.0506, 0.001), (5, 0.2311, 0.001), (6, 0.1266, 0.001),
    ]  # fmt: skip


PRINTED = """\
[2026-08-20 10:00:00,000] [INFO] [launch.py:184:main] Setting CUDA_VISIBLE_DEVICES=GPU-1
using video_clip_mode=single_beginning
caching latents: /w/outputs/cat/_data/1x
Caching ungrouped metadata.
\rMap (num_proc=2):   0%| | 0/3 [00:00<?, ? examples/s]\rMap (num_proc=2): 100%|#| 3/3 [00:01<00:00, 2.9 examples/s]
caching latents: (1.0, 512, 512, 1)
caching text embeddings: (1.0, 512, 512, 1)
trainable params: 4,194,304 || all params: 2,614,194,304 || trainable%: 0.1604
Global batch size = 1
steps: 1 loss: 0.5000 iter time (s): 2.000 samples/sec: 0.500
[2026-08-20 10:00:00,000] [WARNING] [dataset.py:396:_make_divisible_by] size bucket (0.5, 1, 2, 1) is being completely \
dropped because it doesn't have enough images
[2026-08-20 10:00:03,424] [INFO] [logging.py:123:log_dist] [Rank 0] step=2, skipped=0, lr=[5e-05, 0.0], mom=[(0.9, 0.9)]
steps: 2 loss: 0.4000 iter time (s): 2.000 samples/sec: 0.500
Saving model to directory step2
/venv/lib/peft/utils/save_and_load.py:300: UserWarning: Could not find a config file in None
steps: 3 loss: 0.3000 iter time (s): 2.000 samples/sec: 0.500
Started new epoch: 2
steps: 4 loss: 0.2000 iter time (s): 2.000 samples/sec: 0.500
Saving model to directory step4
[2026-08-20 10:00:09,000] [INFO] [logging.py:128:log_dist] [Rank 0] [Torch] Checkpoint global_step4 is about \
to be saved!
[2026-08-20 10:00:09,000] [INFO] [logging.py:128:log_dist] [Rank 0] Saving model checkpoint: \
/w/global_step4/mp_rank_00_model_states.pt
TRAINING COMPLETE!
[2026-08-20 10:00:12,000] [INFO] [launch.py:367:main] Process 100 exits successfully.
"""


def lora_file(content=b"abcd"):
    header = json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}, "__metadata__": {"format": "pt"}})
    return struct.pack("<Q", len(header)) + header.encode() + content


def put_lora(folder, name, file="adapter_model.safetensors"):
    target = folder / "diffusion-pipe" / "20260820_10-00-00" / name
    target.mkdir(parents=True)
    (target / file).write_bytes(lora_file())
    return target


def metadata_of(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]


@pytest.mark.parametrize("seed", [None, *range(8)])
def test_log_of_a_run_is_told_the_same_however_it_is_cut(tmp_path, seed):
    put_lora(tmp_path, "step2")
    put_lora(tmp_path, "step4", "lora.safetensors")  # as for SDXL
    told = facts_of(parse_all(PRINTED.encode(), reading_of(tmp_path, spec=RunSpec(steps=4, save_every_steps=2)), seed))
    saved = [observation for observation in told if isinstance(observation, CheckpointSaved)]
    others = [observation for observation in told if not isinstance(observation, CheckpointSaved)]
    assert [(one.path, one.step, one.is_final) for one in saved] == [
        ("cat-step00000002.safetensors", 2, False),
        ("cat.safetensors", 4, True),
    ]
    assert others == [
        Stage("Encoding the pictures"),
        Stage("Reading the pictures"),
        Stage("Encoding the pictures"),
        Stage("Encoding the captions"),
        Started(0, 4),
        Progress(1, 4, 0.0, loss=0.5, steps_per_second=0.5, eta_seconds=6.0),
        Noted("Pictures of the size (0.5, 1, 2, 1) are left out: there are too few for one update."),
        Progress(2, 4, 0.0, loss=0.4, learning_rate=5e-05, steps_per_second=0.5, eta_seconds=4.0),
        Progress(3, 4, 0.0, loss=0.3, steps_per_second=0.5, eta_seconds=2.0),
        Progress(4, 4, 0.0, loss=0.2, steps_per_second=0.5, eta_seconds=0.0),
    ]
    assert metadata_of(tmp_path / "cat.safetensors") == {"format": "pt", "run": "7", "lorapilot_step": "4"}
    assert list((tmp_path / "diffusion-pipe").glob("*/step*")) == []


def test_lora_is_taken_again_when_it_could_not_be_stored(tmp_path):
    put_lora(tmp_path, "step6", "pytorch_lora_weights.safetensors")
    data = b"Saving model to directory step6\nTRAINING COMPLETE!\n"
    reading = reading_of(tmp_path)
    assert STACK.parse(data, reading) == STACK.parse(data, reading)
    assert [type(one) for one in STACK.parse(data, reading)[0]] == [CheckpointSaved]


@pytest.mark.parametrize("half", ["tmp", "torn", "nothing"])
def test_half_a_lora_is_told_and_not_taken(tmp_path, half):
    folder = put_lora(tmp_path, "step6")
    if half == "tmp":
        (folder / "tmp").mkdir()
    else:
        (folder / "adapter_model.safetensors").write_bytes(lora_file(b"ab") if half == "torn" else b"")
    told = STACK.parse(b"Saving model to directory step6\n", reading_of(tmp_path, is_over=True))[0]
    assert told == [Noted("The LoRA of step 6 was announced, but is no complete file.")]
    assert not (tmp_path / "cat.safetensors").exists()


def test_lora_waits_until_the_main_process_goes_on(tmp_path):
    put_lora(tmp_path, "step6")
    data = b"steps: 6 loss: 1.0 iter time (s): 1.0 samples/sec: 1.0\nSaving model to directory step6\nsome warning\n"
    told, consumed = STACK.parse(data, reading_of(tmp_path))
    assert [type(one) for one in told] == [Progress]
    assert data[consumed:].startswith(b"Saving model")


@pytest.mark.parametrize(("start", "notes"), [(4, 0), (3, 1)])
def test_step_that_it_resumes_at_is_checked(tmp_path, start, notes):
    line = b"Global batch size = 1\nResuming training from checkpoint. Resuming at epoch: 2, step: 5\n"
    told = STACK.parse(line, reading_of(tmp_path, start_step=start))[0]
    assert told[-1] == Started(4, 6)
    assert [type(one) for one in told[:-1]] == [Noted] * notes


def test_loss_that_is_no_number_is_hopeless(tmp_path):
    told = STACK.parse(b"steps: 3 loss: nan iter time (s): 0.5 samples/sec: 2.0\n", reading_of(tmp_path))[0]
    assert isinstance(told[-1], Hopeless)


def test_loss_with_others_beside_it_is_read(tmp_path):
    line = b"steps: 3 loss: 0.2500 aux_loss: 0.1000 iter time (s): 0.500 samples/sec: inf\n"
    assert STACK.parse(line, reading_of(tmp_path))[0][0].loss == 0.25


# --- The end ----------------------------------------------------------------------------------------------------------
def end_of(folder, text, code, **fields):
    reading = reading_of(folder, is_over=True)
    reading.log.parent.mkdir(exist_ok=True)
    reading.log.write_text(text)
    return STACK.outcome(reading, Exit(code, fields.pop("stop_requested", False), **fields))


STEPS = "".join(f"steps: {n} loss: 0.5 iter time (s): 1.0 samples/sec: 1.0\n" for n in range(1, 7))


def test_success_needs_every_proof(tmp_path):
    text = f"{STEPS}TRAINING COMPLETE!\n"
    assert "cat.safetensors is not there" in end_of(tmp_path, text, 0).reason
    (tmp_path / "cat.safetensors").write_bytes(lora_file())
    assert end_of(tmp_path, text, 0) == Outcome(Status.SUCCEEDED)
    assert end_of(tmp_path, text, 1).status == Status.FAILED
    assert "after 6 of 6 steps without saying" in end_of(tmp_path, STEPS, 0).reason
    short = text.replace("steps: 6", "step: 6")
    assert end_of(tmp_path, short, 0).reason.startswith("Diffusion Pipe ended after 5 of 6 steps.")


def test_state_that_was_asked_for_is_a_stop(tmp_path):
    put_state(tmp_path / "diffusion-pipe" / "20260820_10-00-00", 6)
    told = end_of(tmp_path, f"{STEPS}Manually quitting\n", 0, stop_requested=True)
    assert told == Outcome(Status.STOPPED, "Stopped at step 6; its state is saved.")


def test_stop_without_a_state_is_a_stop(tmp_path):
    told = end_of(tmp_path, "exits with return code = -15\n", 1, stop_requested=True, signals=["SIGTERM"])
    assert (told.status, told.cause) == (Status.STOPPED, Cause.OWN)


TRACEBACK = "Traceback (most recent call last):\n  File ...\n{}\n[2026] [ERROR] exits with return code = 1\n"


@pytest.mark.parametrize(
    ("error", "says", "cause"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "ran out of memory",
         Cause.OUT_OF_MEMORY),
        ("OSError: [Errno 28] No space left on device", "disk is full", Cause.DISK_FULL),
        ("RuntimeError: The server socket has failed to listen: EADDRINUSE", "another one", Cause.KILLED),
        ("ModuleNotFoundError: No module named 'comfy_api'", "git submodule update", Cause.OWN),
        ("ModuleNotFoundError: No module named 'hyvideo.config'", "git submodule update", Cause.OWN),
        ("ModuleNotFoundError: No module named 'einops'", "no package einops", Cause.OWN),
        ("AttributeError: module 'torch._C' has no attribute '_cuda_setDevice'", "sees no GPU", Cause.OWN),
        ("AssertionError: Directory /w/_data/1x had no images/videos!", "no picture that it can read", Cause.OWN),
        ("RuntimeError: Invalid path: /w/_data/1x", "is gone: /w/_data/1x", Cause.OWN),
        ("RuntimeError: Processed dataset was empty. Probably caused by", "not enough pictures", Cause.OWN),
        ("NotImplementedError: WebP videos are not supported.", "an animation", Cause.OWN),
        ("ValueError: fp8_scaled weights are not supported. Please use bf16", "get the bf16 file", Cause.OWN),
        ("RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)", "does not fit", Cause.OWN),
        ("NotImplementedError: Model type flux2 is not implemented", "does not know flux2", Cause.OWN),
        ("TypeError: Automagic.__init__() got an unexpected keyword argument 'eps'", "optimizer.eps", Cause.OWN),
        ("AttributeError: module 'pytorch_optimizer' has no attribute 'Adan'", "has no Adan", Cause.OWN),
        ("FileExistsError: [Errno 17] File exists: '/w/step20/tmp'", "clears it away", Cause.OWN),
        ("    assert load_path is not None\nAssertionError", "could not be loaded", Cause.OWN),
        ("torch.distributed.DistBackendError: NCCL error in: x.cpp", "could not talk", Cause.OWN),
        ("huggingface_hub.errors.LocalEntryNotFoundError: x", "Hugging Face", Cause.OWN),
        ("SafetensorError: Error while deserializing header", "damaged", Cause.OWN),
        ("KeyError: 'nobody knows'", "KeyError: 'nobody knows'", Cause.OWN),
    ],
)  # fmt: skip
def test_failure_is_explained(tmp_path, error, says, cause):
    told = end_of(tmp_path, TRACEBACK.format(error), 1)
    assert (told.status, told.cause) == (Status.FAILED, cause)
    assert says in told.reason


@pytest.mark.parametrize(
    ("last", "code", "kills", "cause"),
    [
        ("exits with return code = -9", 247, 0, Cause.KILLED),  # the worker
        ("exits with return code = -9", 247, 1, Cause.OUT_OF_MEMORY),
        ("steps: 3", -9, 0, Cause.KILLED),  # the launcher
        ("exits with return code = -15", 241, 0, Cause.KILLED),
        ("Main process received SIGTERM, exiting", 1, 0, Cause.KILLED),
    ],
)
def test_kill_from_outside_is_told_from_a_failure(tmp_path, last, code, kills, cause):
    assert end_of(tmp_path, f"{STEPS}[2026] [INFO] {last}\n", code, oom_kills=kills).cause == cause


# --- Attempts, with the stand-in and real processes -------------------------------------------------------------------
class OnThisMachine(DiffusionPipeStack):
    """The stack as it is, for a machine without a GPU and with our smallest base model."""

    def refusal(self, model):
        return ""

    def compile(self, job):
        parts = {"llm": job.base_model / "llm.safetensors", "vae": job.base_model / "vae.safetensors"}
        facts = {"device": DeviceKind.CUDA, "device_uuids": ["GPU-1"], "architecture": "lumina2", "parts": parts}
        return super().compile(dataclasses.replace(job, layout="file", **facts))


@pytest.fixture
def run(transactional_db, workspace, alice, home, handed_out, monkeypatch):
    monkeypatch.setitem(stacks.STACKS, "diffusion_pipe", OnThisMachine())
    make_slot(trainers=["diffusion_pipe"])
    return make_run(alice, stack="diffusion_pipe", values={"steps": 4, "save_every_steps": 2})


def play_worker(attempts, seconds=30):
    deadline = time.monotonic() + seconds
    while attempts:
        assert time.monotonic() < deadline
        supervise_slice(attempts.pop().pk)


def play_until(run, attempts, monkeypatch, text):
    """Slices until the log holds `text`."""
    monkeypatch.setattr(follow, "SLICE_SECONDS", 0.3)
    deadline = time.monotonic() + 30
    while not (run.log_path.exists() and text in run.log_path.read_text()):
        assert time.monotonic() < deadline
        supervise_slice(attempts.pop().pk)


def test_run_trains_to_its_end(run, handed_out):
    play_worker(handed_out)
    run.refresh_from_db()
    assert (run.status, run.reason, run.step, run.exit_code) == ("succeeded", "", 4, 0)
    assert list(run.metrics.values_list("step", "loss")) == [(1, 1.0), (2, 0.5), (3, 0.3333), (4, 0.25)]
    assert sorted((found.path, found.is_final) for found in run.checkpoints.all()) == [
        ("first-step00000002.safetensors", False),
        ("first.safetensors", True),
    ]
    assert [state.step for state in run.states.all()][-1] == 4
    assert metadata_of(run.folder / "first.safetensors")["run"] == str(run.pk)


# --- Weights & Biases -------------------------------------------------------------------------------------------------
KEY = "wandb-key-0123456789-0123456789-01234567"
ASKS = {"monitoring.enable_wandb": True}


def test_nothing_is_sent_without_the_option(workspace, home):
    assert "monitoring" not in tables(STACK.compile(job_of(workspace)))[0]
    names = {"monitoring.wandb_run_name": "x", "monitoring.enable_wandb": False}
    assert "monitoring" not in tables(STACK.compile(job_of(workspace, options=names)))[0]


def test_curves_are_named_by_the_run_unless_the_options_say_more(workspace, home):
    told = [
        tables(STACK.compile(job_of(workspace, options=ASKS | more)))[0]["monitoring"]
        for more in ({}, {"monitoring.wandb_tracker_name": "loras", "monitoring.wandb_run_name": "cat 1"})
    ]
    common = {"enable_wandb": True, "wandb_api_key": ""}
    assert told == [
        common | {"wandb_tracker_name": "lora-pilot", "wandb_run_name": "cat"},
        common | {"wandb_tracker_name": "loras", "wandb_run_name": "cat 1"},
    ]


def test_key_reaches_the_trainer_and_no_file(run, alice, home, handed_out):
    set_secret(alice, name="wandb", value=KEY)
    play_worker(handed_out)  # the first one trains without
    values = {"steps": 4, "save_every_steps": 2}
    other = make_run(alice, output_name="with-curves", stack="diffusion_pipe", values=values, options=ASKS)
    play_worker(handed_out)
    for one in (run, other):
        one.refresh_from_db()
        assert (one.status, one.reason) == ("succeeded", "")
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    assert f"wandb: lora-pilot with-curves {digest}\n" in other.log_path.read_text()
    asked = [json.loads((one.attempt_folder() / "launch.json").read_text())["secrets"] for one in (run, other)]
    assert asked == [[], ["WANDB_API_KEY"]]
    files = [file for one in (run, other) for file in one.folder.rglob("*") if file.is_file()]
    assert len(files) > 20
    assert [file for file in files if KEY.encode() in file.read_bytes()] == []


def test_run_without_the_key_is_refused_before_it_starts(run, alice, bob, home, handed_out):
    sentence = (
        "monitoring.enable_wandb needs your key of Weights & Biases: set it on your account page, or leave it off."
    )
    with pytest.raises(UserError) as refused:
        make_run(alice, output_name="second", stack="diffusion_pipe", options=ASKS)
    assert (refused.value.message, refused.value.field) == (sentence, "options.monitoring.enable_wandb")
    Run.objects.filter(pk=run.pk).update(options=ASKS)  # as when the key is deleted while the run waits
    play_worker(handed_out)
    run.refresh_from_db()
    assert (run.status, run.reason) == ("failed", sentence)
    assert not (run.attempt_folder() / "launch.json").exists()


def test_every_secret_that_an_option_names_has_a_variable():
    tables = [table for stack in stacks.STACKS.values() if (table := stack.table())]
    named = {option.secret for table in tables for option in table.options.values()}
    assert named == {"", *VARIABLES}


def test_stop_saves_the_state_and_resume_goes_on_at_the_true_step(run, home, alice, handed_out, monkeypatch):
    stand_in.behave(home, "waits for a stop")
    play_until(run, handed_out, monkeypatch, "steps: 1 ")
    services.stop_run(run, actor=alice)
    play_worker(handed_out)
    run.refresh_from_db()
    assert (run.status, run.exit_code, run.reason) == ("stopped", 0, "Stopped at step 1; its state is saved.")
    stand_in.behave(home, "finishes")
    services.resume_run(run, actor=alice)
    play_worker(handed_out)
    run.refresh_from_db()
    assert (run.status, run.attempt, run.step) == ("succeeded", 2, 4)
    assert run.attempts.last().start_step == 1
    assert [point.step for point in run.metrics.all()] == [1, 2, 3, 4]


def test_stop_before_the_first_step_does_not_wait(run, home, alice, handed_out, monkeypatch):
    stand_in.behave(home, "waits before it trains")
    play_until(run, handed_out, monkeypatch, "caching latents")
    services.stop_run(run, actor=alice)
    play_worker(handed_out)
    run.refresh_from_db()
    assert (run.status, run.exit_code) == ("stopped", 1)
    assert process.read_exit(run.attempt_folder(1))["signals"] == ["SIGTERM"]


@pytest.mark.parametrize("behaviour", ["is killed", "is killed while it saves"])
def test_killed_worker_goes_on_from_its_state(run, home, handed_out, monkeypatch, behaviour):
    monkeypatch.setattr(endings, "PAUSES", (0,) * 5)
    stand_in.behave(home, behaviour)
    play_until(run, handed_out, monkeypatch, "exits with return code = -9")
    stand_in.behave(home, "finishes")
    play_worker(handed_out)
    run.refresh_from_db()
    assert (run.status, run.step) == ("succeeded", 4)
    assert run.attempts.first().ending == "interrupted"
    assert (run.folder / "first-step00000002.safetensors").is_file()


@pytest.mark.parametrize(
    ("behaviour", "code", "says"),
    [
        ("runs out of memory", 1, "The GPU ran out of memory."),
        ("learns nothing", -9, "The loss was no number (NaN) from step 3 on"),
        ("loses its launcher", 0, "Diffusion Pipe ended after 3 of 4 steps without saying that it finished."),
    ],
)
def test_run_that_fails_says_why(run, home, handed_out, behaviour, code, says):
    stand_in.behave(home, behaviour)
    play_worker(handed_out)
    run.refresh_from_db()
    assert (run.status, run.exit_code) == ("failed", code)
    assert run.reason.startswith(says)


def test_request_to_save_waits_for_a_first_step(tmp_path):
    log, output = tmp_path / "train.log", tmp_path / "diffusion-pipe"
    for name in ("20260820_10-00-00", "20260821_10-00-00"):
        (output / name).mkdir(parents=True)
    earlier = STEPS.encode()
    log.write_bytes(earlier + b"caching latents: /w\n")
    command = [sys.executable, "-I", save_and_quit.__file__, str(output), str(log), str(len(earlier))]
    subprocess.run(command, check=True, timeout=20)
    assert list(output.glob("*/save_quit")) == []
    assert save_and_quit.ask(output, log, 0) is True
    assert list(output.glob("*/save_quit")) == [output / "20260821_10-00-00" / "save_quit"]


# --- Configurations that people bring ---------------------------------------------------------------------------------
BROUGHT = """
output_dir = '/data/runs'
dataset = 'examples/dataset.toml'
epochs = 1000
max_steps = 500
micro_batch_size_per_gpu = [[512, 4], [1024, 1]]
gradient_clipping = 1.0
warmup_steps = 100
save_every_n_epochs = 2
activation_checkpointing = 'unsloth'
save_dtype = 'bfloat16'
blocks_to_swap = 20
caching_batch_size = 1
mystery = 1
[model]
type = 'flux'
diffusers_path = '/data/FLUX.1-dev'
dtype = 'bfloat16'
transformer_dtype = 'float8'
flux_shift = true
[adapter]
type = 'lora'
rank = 32
dtype = 'bfloat16'
[optimizer]
type = 'AdamW_Optimi'
lr = 2e-5
betas = [0.9, 0.99]
weight_decay = 0.01
[monitoring]
enable_wandb = false
wandb_api_key = ''
"""


def test_configuration_that_somebody_brings_is_taken_over():
    taken = STACK.read_config(BROUGHT)
    assert taken.values == {
        "steps": 500,
        "batch_size": 4,
        "max_grad_norm": 1.0,
        "warmup_steps": 100,
        "save_precision": "bf16",
        "precision": "bf16",
        "rank": 32,
        "alpha": 32.0,
        "optimizer": "AdamW",
        "learning_rate": 2e-5,
        "weight_decay": 0.01,
        "lr_schedule": "constant",
    }
    assert taken.options == {
        "activation_checkpointing": "unsloth",
        "blocks_to_swap": 20,
        "caching_batch_size": 1,
        "model.transformer_dtype": "float8",
        "model.flux_shift": True,
        "adapter.type": "lora",
        "adapter.dtype": "bfloat16",
        "optimizer.betas": [0.9, 0.99],
    }
    assert taken.model == "/data/FLUX.1-dev"
    assert taken.notes == [
        "save_every_n_epochs is left out: set Checkpoint every instead.",
        "mystery is no option of Diffusion Pipe: left out.",
    ]
    assert RunSpec.from_values(taken.values).rank == 32


def test_configuration_for_sdxl_trains_text_encoders_at_its_rate():
    taken = STACK.read_config(
        "max_steps = 5\n[model]\ntype = 'sdxl'\nunet_lr = 4e-5\n[optimizer]\ntype = 'automagic'\nlr = 1e-5\n"
    )
    assert (taken.values["learning_rate"], taken.values["text_encoder_learning_rate"]) == (4e-5, 4e-5)
    assert taken.options == {"optimizer.type": "automagic"}


def test_dataset_file_is_taken_over():
    taken = STACK.read_config(
        "resolutions = [[1280, 720], 512]\nenable_ar_bucket = true\nmin_ar = 0.5\n[[directory]]\npath = '/d'\n"
    )
    assert (taken.values, taken.options) == ({"resolution": 960, "enable_bucket": True}, {"dataset.min_ar": 0.5})


@pytest.mark.parametrize("text", ["", "a = ", "[model]\ndtype = 5\n[adapter]\nrank = 'x'\n"])
def test_configuration_that_cannot_be_read_is_refused(text):
    with pytest.raises(UserError):
        STACK.read_config(text)
