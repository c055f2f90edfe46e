"""Kohya's sd-scripts as a stack: its configuration, what it prints (recorded runs, byte for byte), and how it ends."""

import json
import os
import random
import shutil
import sys
import threading
import tomllib
from pathlib import Path

import pytest

from lorapilot.errors import UserError
from runs import services
from runs.enums import DeviceKind, Profile, Status
from runs.models import Attempt, Run
from runs.profiles import fill
from runs.spec import RunSpec
from runs.stacks.base import (
    Cause,
    Exit,
    Hopeless,
    ModelFacts,
    Progress,
    Reading,
    Started,
    StateSaved,
    TrainingJob,
    TrainingPicture,
)
from runs.stacks.builtin import BuiltinStack
from runs.stacks.kohya import FAMILIES, KohyaStack
from runs.supervision import follow
from runs.supervision.follow import supervise_slice
from tests.factories import make_run, make_slot

DATA = Path(__file__).with_name("data")
LOGS = DATA / "trainer-logs"
STAND_IN = Path(__file__).with_name("kohya_stand_in.py")


def job(folder, architecture="sdxl", *, options=None, parts=(), resume=0, **values):
    parts = {role: folder / "models" / f"{role}.safetensors" for role in parts}
    return TrainingJob(
        name="cat",
        folder=folder / "cat",
        attempt_folder=folder / "cat" / "_attempts" / "1",
        spec=RunSpec.from_values(values),
        base_model=folder / "models" / "base.safetensors",
        architecture=architecture,
        pictures=[TrainingPicture("/pictures/a.png", "a cat", 2), TrainingPicture("/pictures/b.webp", "a dog", 1)],
        device=DeviceKind.CUDA,
        device_uuids=["GPU-a"],
        parts=parts,
        options=options or {},
        resume_state=folder / "state" if resume else None,
        start_step=resume,
        provenance={"run": "7"},
    )


def configuration(plan):
    return tomllib.loads(plan.files[plan.config])


def parts_of(architecture):
    return list(FAMILIES[architecture].parts)


# --- What it writes ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_configuration_of_each_architecture_is_the_one_on_file(workspace, architecture):
    """`GOLDEN=write pytest …` writes the files anew: read the difference before it is committed."""
    plan = KohyaStack().compile(
        job(Path("/runs"), architecture, parts=parts_of(architecture), steps=100, rank=8, alpha=4, warmup_steps=5)
    )
    text = plan.files[plan.config].replace(str(workspace), "/workspace")
    text += "\n# dataset.toml\n" + plan.files[plan.config.with_name("dataset.toml")]
    text += "\n# argv\n# " + " ".join(plan.argv[1:]) + "\n"
    golden = DATA / "golden" / f"kohya-{architecture}.toml"
    if os.environ.get("GOLDEN") == "write":
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("profile", list(Profile))
def test_profile_is_written_in_kohya_s_keys(workspace, tmp_path, profile):
    values = fill(profile, images=20, resolution=1024, device=DeviceKind.CUDA, model_name="SDXL").values
    config = configuration(KohyaStack().compile(job(tmp_path, **values)))
    assert (config["network_dim"], config["network_alpha"]) == (values["rank"], values["alpha"])
    assert config["network_args"] == [f"conv_dim={values['rank']}", f"conv_alpha={values['alpha']:g}"]
    assert (config["max_train_steps"], config["max_token_length"]) == (values["steps"], values["caption_tokens"])
    assert (config["text_encoder_lr"], config["learning_rate"]) == (values["text_encoder_learning_rate"], 2.5e-4)
    for trap in ("max_train_epochs", "conv_dim", "conv_alpha", "learning_rate_te1", "save_starting_epoch", "sdxl"):
        assert trap not in config


def test_pictures_are_linked_by_repeats_with_captions_beside_them(workspace, tmp_path):
    plan = KohyaStack().compile(job(tmp_path, repeats=3))
    subsets = tomllib.loads(plan.files[plan.config.with_name("dataset.toml")])["datasets"][0]["subsets"]
    assert [(subset["num_repeats"], Path(subset["image_dir"]).name) for subset in subsets] == [(3, "3x"), (6, "6x")]
    data = tmp_path / "cat" / "_data"
    assert plan.links == {
        data / "6x" / "000001.png": Path("/pictures/a.png"),
        data / "3x" / "000002.webp": Path("/pictures/b.webp"),
    }
    assert plan.files[data / "6x" / "000001.txt"] == "a cat"


def test_options_win_and_lists_are_joined(workspace, tmp_path):
    options = {
        "min_bucket_reso": 256,
        "network_args": ["rank_dropout=0.1"],
        "optimizer_args": ["betas=0.9,0.99"],
        "xformers": True,
        "dataset.face_crop_aug_range": [1.0, 2.0],
    }
    plan = KohyaStack().compile(job(tmp_path, options=options, conv_rank=4))
    config = configuration(plan)
    assert (config["min_bucket_reso"], config["sdpa"]) == (256, False)
    assert config["network_args"] == ["conv_dim=4", "conv_alpha=4", "rank_dropout=0.1"]
    assert config["optimizer_args"] == ["weight_decay=0.01", "betas=0.9,0.99"]
    subset = tomllib.loads(plan.files[plan.config.with_name("dataset.toml")])["datasets"][0]["subsets"][0]
    assert subset["face_crop_aug_range"] == [1.0, 2.0]


def test_clipping_that_is_off_is_told_since_kohya_would_clip(workspace, tmp_path):
    assert configuration(KohyaStack().compile(job(tmp_path, max_grad_norm=0)))["max_grad_norm"] == 0


@pytest.mark.parametrize(
    ("schedule", "function"),
    [("cosine", "get_cosine_schedule_with_warmup"), ("linear", "get_linear_schedule_with_warmup")],
)
def test_resume_trains_what_is_left_on_the_schedule_of_the_whole_run(workspace, tmp_path, schedule, function):
    config = configuration(
        KohyaStack().compile(job(tmp_path, steps=100, warmup_steps=5, seed=7, lr_schedule=schedule, resume=60))
    )
    assert (config["max_train_steps"], config["initial_step"], config["seed"]) == (40, 0, 67)
    assert (config["resume"], config["log_prefix"]) == (str(tmp_path / "state"), "from-step-60-")
    assert config["lr_scheduler_type"] == f"transformers.optimization.{function}"
    assert config["lr_scheduler_args"] == ["num_warmup_steps=5", "num_training_steps=100"]
    assert "skip_until_initial_step" not in config


def test_every_path_of_a_configuration_is_in_the_run_s_folder_or_among_the_models(workspace, tmp_path):
    plan = KohyaStack().compile(job(tmp_path, sample_prompts=["a cat"]))
    roots = [tmp_path, workspace / "models", Path("/KOHYA_HOME")]
    texts = [value for value in configuration(plan).values() if isinstance(value, str) and "/" in value]
    assert len(texts) > 5
    for path in [*map(Path, texts), *plan.files, *plan.links]:
        assert any(path.is_relative_to(root) for root in roots), path


def test_several_devices_are_launched_by_accelerate_with_every_flag(workspace, tmp_path):
    from dataclasses import replace

    plan = KohyaStack().compile(replace(job(tmp_path, gpus=2), device_uuids=["GPU-a", "GPU-b"]))
    assert plan.argv[1:6] == ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    assert configuration(plan)["lr_scheduler_args"][0] == "num_warmup_steps=0"


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        (ModelFacts("Flux", "flux", "file", frozenset({"clip_l"})), "Flux has no T5 text encoder or VAE for Kohya"),
        (ModelFacts("Flux", "flux", "folder"), "Kohya sd-scripts reads Flux from a single file"),
        (ModelFacts("Wan", "wan", "file"), "Kohya sd-scripts cannot train Wan: its kind is Wan 2.1."),
        (
            ModelFacts("Flux", "flux", "file", frozenset({"clip_l", "t5", "vae"})),
            "Kohya sd-scripts needs more files for Flux: get tokenizer-t5-xxl",
        ),
    ],
)
def test_model_that_it_cannot_train_is_refused(workspace, facts, sentence):
    assert KohyaStack().refusal(facts).startswith(sentence)


def test_what_it_cannot_express_is_said():
    spec = RunSpec.from_values({"ema_decay": 0.999, "min_snr_gamma": 5, "text_encoder_learning_rate": 1e-5})
    assert KohyaStack().not_expressed(spec, "sdxl") == [
        "Moving average (0.999) has no counterpart in Kohya sd-scripts."
    ]
    lost = KohyaStack().not_expressed(spec, "lumina2")
    assert "Min-SNR gamma (5) has no counterpart in Kohya sd-scripts." in lost
    assert "Text-encoder rate (1e-05) has no counterpart in Kohya sd-scripts." in lost


# --- What people bring along ------------------------------------------------------------------------------------------
def test_own_configuration_comes_back_as_it_was(workspace, tmp_path):
    values = {
        "steps": 120,
        "save_every_steps": 40,
        "rank": 24,
        "alpha": 12.0,
        "conv_rank": 8,
        "min_snr_gamma": 5.0,
        "optimizer": "Lion",
    }
    options = {"min_bucket_reso": 256, "scale_weight_norms": 1.0, "network_args": ["rank_dropout=0.1"]}
    plan = KohyaStack().compile(job(tmp_path, options=options, **values))
    read = KohyaStack().read_config(plan.files[plan.config])
    assert RunSpec.from_values(read.values | {"conv_alpha": 0.0}) == RunSpec.from_values(
        values | {"text_encoder_learning_rate": 0.0}
    )
    assert {key: read.options[key] for key in options} == options
    assert read.model == str(tmp_path / "models" / "base.safetensors")


def test_foreign_configuration_says_what_is_left_out(tmp_path):
    read = KohyaStack().read_config(
        """
        [model]
        pretrained_model_name_or_path = "sd_xl_base_1.0.safetensors"
        [training]
        network_dim = 32
        learning_rate = 1e-4
        max_train_epochs = 10
        lr_warmup_steps = 0.1
        optimizer_type = "dadaptadam"
        lr_scheduler_type = "torch.optim.lr_scheduler.OneCycleLR"
        wandb_api_key = "secret"
        train_data_dir = "/home/me/pictures"
        sdxl = true
        """
    )
    assert read.values == {"rank": 32, "learning_rate": 1e-4, "text_encoder_learning_rate": 1e-4}
    assert read.options == {"optimizer_type": "DAdaptAdam"}
    assert read.model == "sd_xl_base_1.0.safetensors"
    assert [note.split()[0] for note in read.notes] == ["lr_scheduler_type", "wandb_api_key", "sdxl"]
    assert (read.epochs, read.warmup_share) == (10, 0.1)


@pytest.mark.parametrize("stack", [KohyaStack(), BuiltinStack()])
@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("AdamW8Bit", "AdamW8bit"),
        ("prodigy", "Prodigy"),
        ("torch.optim.AdamW", "AdamW"),
        ("bitsandbytes.optim.AdamW8bit", "AdamW8bit"),
    ],
)
def test_optimizer_is_read_in_any_spelling(stack, written, read):
    assert stack.read_config(f'optimizer_type = "{written}"').values["optimizer"] == read


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("network_dim = \n", "This is no TOML: Invalid value (at line 1, column 15)."),
        ("", "The configuration is empty."),
        ('network_dim = "many"', "Rank is a whole number."),
        ('mixed_precision = "int4"', "mixed_precision: 'int4' is none of no, fp16, bf16."),
        ("x = 1\n" * 40_000, "A configuration has at most 200,000 characters."),
        (f"a{'.a' * 101} = 1", "Line 1 has more than 100 dots: split it."),
        (f"a{'.a' * 100} = 1", "A configuration has at most 32 levels."),
        (f"a = {'[' * 5000}{']' * 5000}", "This is no TOML that can be read."),
        (f"max_train_steps = {'9' * 5000}", "This is no TOML that can be read."),
        ("learning_rate = nan", "Learning rate is a number."),
        ("noise_offset = inf", "Noise offset is a number."),
        ('resolution = "-5,7"', "resolution: '-5,7' is no size in pixels."),
        (f'resolution = "{"9" * 400},1"', f"resolution: '{'9' * 400},1' is no size in pixels."),
    ],
)
def test_configuration_that_cannot_be_read_is_refused(text, sentence):
    with pytest.raises(UserError) as refused:
        KohyaStack().read_config(text)
    assert refused.value.message == sentence


@pytest.mark.parametrize("text", ["unet_lr = 1e-4\nlearning_rate = 2e-4", "learning_rate = 2e-4\nunet_lr = 1e-4"])
def test_rate_of_the_denoiser_wins_wherever_it_is(text):
    assert KohyaStack().read_config(text).values == {"learning_rate": 1e-4, "text_encoder_learning_rate": 2e-4}


def test_configuration_of_a_windows_editor_is_read():
    assert KohyaStack().read_config("\ufeffnetwork_dim = 4\r\nseed = 1\r\n").values == {"rank": 4, "seed": 1}


# --- What it prints: recorded runs ------------------------------------------------------------------------------------
def reading(folder, *, total, start=0, step=0, is_over=False):
    return Reading(
        name="blob",
        folder=folder,
        attempt_folder=folder / "_attempts" / "1",
        spec=RunSpec.from_values({"steps": total, "save_every_steps": 5}),
        start_step=start,
        step=step,
        is_over=is_over,
    )


def replay(folder, name, *, total, start=0, seed=0):
    """The recording in chunks of random sizes: (what was observed, its last progress)."""
    data = (LOGS / name).read_bytes()
    (folder / "_logs").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(LOGS / name, folder / "_logs" / "train.log")
    chance, found, at, end, step = random.Random(seed), [], 0, 0, start
    while at < len(data):
        end = min(len(data), max(at, end) + chance.randint(1, 900))
        is_over = end == len(data)
        observations, consumed = KohyaStack().parse(
            data[at:end], reading(folder, total=total, start=start, step=step, is_over=is_over)
        )
        at += consumed
        found += observations
        step = next((one.step for one in reversed(found) if isinstance(one, Progress)), start)
        assert consumed or not is_over
    return found


def steps_and_losses(found):
    """By step, its last loss; NaN as text."""
    return {one.step: str(one.loss) if one.loss != one.loss else one.loss for one in found if isinstance(one, Progress)}


def ended(code, **facts):
    return Exit(code, stop_requested=False, **facts)


def outcome(folder, exit_, *, total, start=0):
    return KohyaStack().outcome(reading(folder, total=total, start=start, is_over=True), exit_)


def test_recorded_run_is_read_the_same_in_whatever_chunks_it_comes(tmp_path):
    name = "sd-scripts-sd15-24steps-rich-logging.log"
    first = steps_and_losses(replay(tmp_path, name, total=24))
    assert list(first) == list(range(1, 25))
    assert (first[1], first[12], first[24]) == (1.03, 1.09, 1.07)
    for seed in range(1, 6):
        assert steps_and_losses(replay(tmp_path, name, total=24, seed=seed)) == first


def test_recorded_resume_has_true_steps(tmp_path):
    found = replay(tmp_path, "sd-scripts-resumed-at-step4-of-8.log", total=8, start=4)
    assert Started(4, 8) in found
    assert steps_and_losses(found) == {5: 0.966, 6: 1.03, 7: 1.07, 8: 1.04}


def test_recorded_nan_ends_the_run_and_names_the_step(tmp_path):
    found = replay(tmp_path, "sd-scripts-nan-loss-exit0.log", total=4)
    assert steps_and_losses(found) == {1: 1.2, 2: "nan", 3: "nan", 4: "nan"}
    assert Hopeless() in found
    told = outcome(tmp_path, ended(0), total=4)
    assert (told.status, told.cause) == (Status.FAILED, Cause.OWN)
    assert told.reason.startswith("The loss was no number (NaN) from step 2 on")


@pytest.mark.parametrize(
    ("name", "exit_", "status", "cause", "sentence"),
    [
        ("empty-dataset-exit0", ended(0), "failed", Cause.OWN, "sd-scripts found no picture"),
        ("missing-model-exit1", ended(1), "failed", Cause.OWN, "sd-scripts found no base model"),
        ("sdxl-killed-by-kernel-oom", ended(1, oom_kills=1), "failed", Cause.OUT_OF_MEMORY, "Memory ran out"),
        ("sdxl-killed-by-kernel-oom", ended(1), "errored", Cause.KILLED, "The trainer was killed from outside."),
        ("sigterm-group", ended(-15), "errored", Cause.KILLED, "The trainer was killed from outside."),
        ("sigterm-group", Exit(-15, stop_requested=True, signals=("SIGINT",)), "stopped", Cause.OWN, "Stopped."),
        ("sd15-24steps-rich-logging", ended(0), "failed", Cause.OWN, "sd-scripts finished, but blob.safetensors is"),
    ],
)  # fmt: skip
def test_recorded_ends_are_told_as_what_they_were(tmp_path, name, exit_, status, cause, sentence):
    replay(tmp_path, f"sd-scripts-{name}.log", total=24)
    told = outcome(tmp_path, exit_, total=24)
    assert (told.status, told.cause) == (status, cause)
    assert told.reason.startswith(sentence)


def test_recorded_run_with_its_file_has_succeeded(tmp_path):
    replay(tmp_path, "sd-scripts-sd15-24steps-rich-logging.log", total=24)
    (tmp_path / "blob.safetensors").write_bytes(b"")
    assert outcome(tmp_path, ended(0), total=24).status == Status.SUCCEEDED
    early = outcome(tmp_path, ended(0), total=30)
    assert early.reason.startswith("sd-scripts ended after 24 of 30 steps. These are its last lines:\n")


def test_failure_that_nobody_knows_shows_the_last_thirty_lines(tmp_path):
    (tmp_path / "_logs").mkdir()
    (tmp_path / "_logs" / "train.log").write_text("".join(f"line {number}\n" for number in range(50)))
    reason = outcome(tmp_path, ended(1), total=4).reason.splitlines()
    assert reason[0] == "The trainer ended with exit code 1. These are its last lines:"
    assert reason[1:] == [f"line {number}" for number in range(20, 50)]


@pytest.mark.parametrize(
    ("text", "cause", "word"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 MiB", Cause.OUT_OF_MEMORY, "memory"),
        ("OSError: [Errno 28] No space left on device", Cause.DISK_FULL, "disk"),
        ("ModuleNotFoundError: No module named 'prodigyopt'", Cause.OWN, "prodigyopt"),
        ("TypeError: expected str, bytes or os.PathLike object, not NoneType", Cause.OWN, "tokenizer"),
        (
            "voluptuous.error.MultipleInvalid: extra keys not allowed @ data['datasets'][0]['x']",
            Cause.OWN,
            "'datasets'",
        ),
        ("AssertionError: max_train_steps should be greater than initial step", Cause.OWN, "nothing left"),
    ],
)
def test_known_failure_is_a_sentence_with_a_remedy(tmp_path, text, cause, word):
    (tmp_path / "_logs").mkdir()
    (tmp_path / "_logs" / "train.log").write_text(f"Traceback\n{text}\n")
    told = outcome(tmp_path, ended(1), total=4)
    assert (told.status, told.cause) == (Status.FAILED, cause)
    assert word in told.reason
    assert "last lines" not in told.reason


# --- The whole way, with a stand-in ----------------------------------------------------------------------------------
@pytest.fixture
def kohya(tmp_path, settings):
    """A folder like sd-scripts', whose programs are stand-ins. Call it to say how they behave."""
    home = tmp_path / "sd-scripts"
    home.mkdir()
    for script in ("train_network.py", "sdxl_train_network.py"):
        shutil.copyfile(STAND_IN, home / script)
    settings.TRAINERS = settings.TRAINERS | {"kohya": {"home": str(home), "python": sys.executable}}

    def behave(how):
        (home / "behaviour").write_text(how)

    behave("finishes")
    return behave


@pytest.fixture
def slot(workspace, db):
    """On a host that has told of sd-scripts."""
    return make_slot(trainers=["kohya"])


def train(run, handed_out, *, until=None):
    """Play the worker until the attempt has ended, or `until` is so."""
    while handed_out:
        supervise_slice(handed_out.pop().pk)
        run.refresh_from_db()
        if until and until(run):
            return run
    return run


@pytest.mark.django_db(transaction=True)
class TestWithAStandIn:
    def test_run_is_trained_to_its_end(self, workspace, alice, slot, kohya, handed_out):
        run = train(make_kohya_run(alice, steps=6, save_every_steps=2, sample_every_steps=3), handed_out)
        assert (run.status, run.reason, run.step, run.total_steps) == ("succeeded", "", 6, 6)
        files = {(one.path, one.step, one.is_final) for one in run.checkpoints.all()}
        steps = {(f"first-step{step:08d}.safetensors", step, False) for step in (2, 4, 6)}
        assert files == {*steps, ("first.safetensors", 6, True)}
        assert {(one.step, one.index, one.prompt) for one in run.samples.all()} == {
            (step, index, prompt) for step in (0, 3, 6) for index, prompt in enumerate(run.spec["sample_prompts"])
        }
        metadata = metadata_of(run.folder / "first.safetensors")
        assert (metadata["ss_steps"], metadata["run"]) == ("6", str(run.pk))
        assert [point.step for point in run.metrics.all()] == [1, 2, 3, 4, 5, 6]

    def test_lease_is_kept_while_a_long_log_is_judged(self, workspace, alice, slot, kohya, handed_out, monkeypatch):
        beaten, beat, judge = threading.Event(), follow._Slice._beat, KohyaStack.outcome

        def judge_late(*arguments):
            beaten.clear()
            assert beaten.wait(10)
            return judge(*arguments)

        monkeypatch.setattr(follow, "BEAT_SECONDS", 0.01)
        monkeypatch.setattr(follow._Slice, "_beat", lambda self: (beat(self), beaten.set()))
        monkeypatch.setattr(KohyaStack, "outcome", judge_late)
        run = train(make_kohya_run(alice, steps=2), handed_out)
        assert run.status == "succeeded"

    def test_stopped_run_goes_on_at_the_true_step(self, workspace, alice, slot, kohya, handed_out, monkeypatch):
        monkeypatch.setattr(follow, "SLICE_SECONDS", 0.5)
        kohya("slow")
        run = make_kohya_run(alice, steps=12, save_every_steps=3)
        train(run, handed_out, until=lambda run: run.states.filter(step=3).exists())
        services.stop_run(run, actor=alice)
        train(run, handed_out)
        assert (run.status, services.newest_state_step(run)) == ("stopped", run.states.order_by("-step")[0].step)
        kohya("finishes")
        before = services.newest_state_step(run)
        services.resume_run(run, actor=alice)
        train(run, handed_out)
        assert (run.status, run.step, run.attempt, run.reason) == ("succeeded", 12, 2, "")
        assert Attempt.objects.get(run=run, number=2).start_step == before
        assert [point.step for point in run.metrics.all()] == list(range(1, 13))
        config = tomllib.loads((run.attempt_folder(2) / "first.toml").read_text())
        assert config["max_train_steps"] == 12 - before
        assert metadata_of(run.folder / "first.safetensors")["ss_steps"] == "12"

    def test_nan_ends_it_early(self, workspace, alice, slot, kohya, handed_out):
        kohya("nan")
        run = train(make_kohya_run(alice, steps=50), handed_out)
        assert run.status == "failed"
        assert run.reason.startswith("The loss was no number (NaN) from step 2 on")
        assert run.step < 10

    def test_memory_that_runs_out_takes_the_ladder(self, workspace, alice, slot, kohya, handed_out):
        kohya("oom")
        run = make_kohya_run(alice, steps=8, less_memory_when_out=True)
        train(run, handed_out, until=lambda run: run.attempt == 2)
        assert run.adaptations == {"gradient_checkpointing": True}
        config = tomllib.loads((run.attempt_folder(1) / "first.toml").read_text())
        assert config.get("gradient_checkpointing", False) is False

    @pytest.mark.parametrize(
        ("how", "sentence"),
        [("empty", "sd-scripts found no picture"), ("breaks", "The trainer ended with exit code 1.")],
    )
    def test_exit_codes_prove_nothing(self, workspace, alice, slot, kohya, handed_out, how, sentence):
        kohya(how)
        run = train(make_kohya_run(alice, steps=4), handed_out)
        assert (run.status, run.checkpoints.count()) == ("failed", 0)
        assert run.reason.startswith(sentence)


def make_kohya_run(owner, **values):
    run = make_run(owner, stack="kohya", values=values)
    return Run.objects.get(pk=run.pk)


def metadata_of(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"]


def test_states_are_those_that_were_seen_complete(tmp_path):
    for number, step in ((1, 5), (2, 9)):
        state = tmp_path / "_attempts" / str(number) / "output" / f"blob-step{step:08d}-state"
        state.mkdir(parents=True)
        (state / "random_states_0.pkl").write_bytes(b"")
    assert KohyaStack().states(tmp_path) == []
    (state / "lorapilot.json").write_text('{"step": 9}')
    assert KohyaStack().states(tmp_path) == [(state, 9)]
    assert StateSaved("x", 1) != StateSaved("x", 2)


@pytest.mark.parametrize(("step", "is_state"), [(19, True), (20, False)])
def test_state_with_all_steps_is_none_to_go_on_from(tmp_path, step, is_state):
    state = tmp_path / "_attempts" / "1" / "output" / "blob-state"
    state.mkdir(parents=True)
    line = f"Random states saved in {state}/random_states_0.pkl\n".encode()
    found, _ = KohyaStack().parse(line, reading(tmp_path, total=20, step=step))
    assert found == ([StateSaved("_attempts/1/output/blob-state", step)] if is_state else [])
    assert KohyaStack().states(tmp_path) == ([(state, step)] if is_state else [])
