"""What the built-in stack writes for its trainer: a configuration that the trainer takes, key by key."""

import tomllib

import pytest

from lora_trainer import config as trainer_config
from lorapilot.errors import UserError
from runs.enums import DeviceKind, Profile
from runs.profiles import fill
from runs.spec import OPTIMIZERS, SCHEDULES, RunSpec
from runs.stacks.base import (
    Cause,
    CheckpointRemoved,
    Exit,
    Noted,
    Reading,
    Started,
    TrainingJob,
    TrainingPicture,
    Validated,
)
from runs.stacks.builtin import BuiltinStack


def compiled(folder, **values):
    job = TrainingJob(
        name="cat",
        folder=folder,
        attempt_folder=folder / "_attempts" / "1",
        spec=RunSpec.from_values(values),
        base_model=folder / "model.safetensors",
        architecture="sdxl",
        pictures=[TrainingPicture("/pictures/a.png", "a cat", 2)],
        device=DeviceKind.CPU,
        provenance={"run": "7"},
    )
    return BuiltinStack().compile(job)


def reading(folder):
    return Reading(name="cat", folder=folder, attempt_folder=folder, spec=RunSpec())


def configuration(plan):
    text = next(text for path, text in plan.files.items() if path.suffix == ".toml")
    return trainer_config.from_table(trainer_config._without_sections(tomllib.loads(text)))


@pytest.mark.parametrize("profile", list(Profile))
def test_profile_is_a_configuration_that_the_trainer_takes(workspace, tmp_path, profile):
    values = fill(profile, images=20, resolution=1024, device=DeviceKind.CUDA, model_name="SDXL").values
    read = configuration(compiled(tmp_path, **values))
    assert (read.network_dim, read.network_alpha) == (values["rank"], values["alpha"])
    assert (read.network.conv_dim, read.network.conv_alpha) == (values["conv_rank"], values["conv_alpha"])
    assert read.text_encoder_rates(2) == [values["text_encoder_learning_rate"]] * 2
    assert (read.max_token_length, read.optimizer_type) == (values["caption_tokens"], "AdamW")
    assert read.gradient_checkpointing is True


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_optimizer_goes_with_every_schedule(workspace, tmp_path, optimizer, schedule):
    plan = compiled(tmp_path, optimizer=optimizer, lr_schedule=schedule, steps=20)
    assert configuration(plan).optimizer_type == optimizer
    has_own = optimizer == "AdamWScheduleFree" and not schedule.startswith("constant")
    assert len(plan.not_expressed) == has_own


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"optimizer": "AdamWScheduleFree", "ema_decay": 0.9},
            "'optimizer_type' = 'AdamWScheduleFree' averages the weights itself: leave out 'ema_decay'.",
        ),
        ({"optimizer": "Prodigy", "text_encoder_learning_rate": 0.5}, "'optimizer_type' = 'Prodigy'"),
    ],
)
def test_settings_that_the_trainer_would_refuse_are_refused_before_the_run_is_queued(workspace, values, sentence):
    with pytest.raises(UserError) as refused:
        BuiltinStack().check_spec(RunSpec.from_values(values), {})
    assert refused.value.message.startswith(sentence)


def test_default_settings_leave_text_encoders_alone_and_memory_to_the_trainer(workspace, tmp_path):
    read = configuration(compiled(tmp_path))
    assert (read.network_train_unet_only, read.gradient_checkpointing) == (True, None)
    assert read.cache_dir == str(workspace / "cache" / "encoded")
    assert (read.validation_split, read.save_best, read.ema_decay) == (0.0, False, 0.0)


def test_validation_and_best_are_handed_on(workspace, tmp_path):
    read = configuration(compiled(tmp_path, validation_share=0.2, save_best=True, ema_decay=0.99))
    assert (read.validation_split, read.save_best, read.ema_decay) == (0.2, True, 0.99)


def test_parse_tells_validation_removed_files_and_how_exactly_it_goes_on(tmp_path):
    lines = (
        b'{"v": 1, "event": "started", "at": 1.0, "start_step": 4, "total_steps": 9, "resume": "exact"}\n'
        b'{"v": 1, "event": "validation", "at": 2.0, "step": 5, "loss": 0.25}\n'
        b'{"v": 1, "event": "checkpoint_removed", "at": 3.0, "path": "cat-000001.safetensors", "step": 5}\n'
        b'{"v": 1, "event": "warn'
    )
    observations, consumed = BuiltinStack().parse(lines, reading(tmp_path))
    assert observations == [
        Started(4, 9),
        Noted("Goes on after step 4: exact, bit for bit."),
        Validated(5, 0.25),
        CheckpointRemoved("cat-000001.safetensors"),
    ]
    assert consumed == lines.rindex(b"\n") + 1


@pytest.mark.parametrize(
    ("exit_", "log", "status", "cause"),
    [
        (Exit(-9, stop_requested=False, oom_kills=1), b"", "failed", Cause.OUT_OF_MEMORY),
        (Exit(137, stop_requested=False, oom_kills=1), b"", "failed", Cause.OUT_OF_MEMORY),
        (Exit(-9, stop_requested=False), b"", "errored", Cause.KILLED),
        (Exit(-15, stop_requested=False), b"", "errored", Cause.KILLED),
        (Exit(-9, stop_requested=True, signals=("SIGINT", "SIGKILL"), oom_kills=1), b"", "stopped", Cause.OWN),
        (Exit(3, stop_requested=False), b"", "failed", Cause.OUT_OF_MEMORY),
        (Exit(5, stop_requested=False), b"", "failed", Cause.DISK_FULL),
        (Exit(1, stop_requested=False), b"torch.OutOfMemoryError: CUDA out of memory.", "failed", Cause.OUT_OF_MEMORY),
        (Exit(1, stop_requested=False), b"RuntimeError: CUBLAS_STATUS_ALLOC_FAILED", "failed", Cause.OUT_OF_MEMORY),
        (Exit(1, stop_requested=False), b"OSError: [Errno 28] No space left on device", "failed", Cause.DISK_FULL),
        (Exit(1, stop_requested=False), b"Traceback", "errored", Cause.OWN),
        (Exit(0, stop_requested=False), b"CUDA out of memory", "errored", Cause.OWN),
        (Exit(-11, stop_requested=False), b"", "errored", Cause.OWN),
    ],
)
def test_cause_of_an_end_without_a_word(tmp_path, exit_, log, status, cause):
    (tmp_path / "_logs").mkdir()
    (tmp_path / "_logs" / "train.log").write_bytes(log)
    outcome = BuiltinStack().outcome(reading(tmp_path), exit_)
    assert (outcome.status, outcome.cause) == (status, cause)
    assert outcome.reason


def test_only_the_attempt_s_own_output_tells_why_it_ended(tmp_path):
    (tmp_path / "_logs").mkdir()
    before = b"an earlier attempt: CUDA out of memory\n"
    (tmp_path / "_logs" / "train.log").write_bytes(before + b"Traceback\n")
    outcome = BuiltinStack().outcome(reading(tmp_path), Exit(1, stop_requested=False, log_offset=len(before)))
    assert outcome.cause == Cause.OWN


@pytest.mark.parametrize(
    ("exit_", "status"),
    [
        (Exit(0, stop_requested=False), "succeeded"),
        (Exit(1, stop_requested=True, signals=("SIGINT",)), "succeeded"),  # accelerate's word for any end by a signal
        (Exit(-9, stop_requested=False), "errored"),
    ],
)
def test_stop_that_comes_when_all_is_done_changes_nothing(tmp_path, exit_, status):
    (tmp_path / "_logs").mkdir()
    (tmp_path / "_logs" / "train.log").touch()
    (tmp_path / "cat.safetensors").touch()
    event = '{"v": 1, "event": "finished", "at": 1.0, "step": 9, "checkpoint": "cat.safetensors", "early": false}\n'
    (tmp_path / "events.jsonl").write_text(event)
    assert BuiltinStack().outcome(reading(tmp_path), exit_).status == status


@pytest.mark.parametrize(("oom_kills", "cause"), [(0, Cause.KILLED), (1, Cause.OUT_OF_MEMORY)])
def test_one_of_several_processes_that_is_gone_was_killed(tmp_path, oom_kills, cause):
    event = '{"v": 1, "event": "error", "at": 1.0, "code": "process_lost", "message": "Another process is gone."}\n'
    (tmp_path / "events.jsonl").write_text(event)
    outcome = BuiltinStack().outcome(reading(tmp_path), Exit(1, stop_requested=False, oom_kills=oom_kills))
    assert outcome.cause == cause


def test_several_devices_are_launched_by_accelerate(tmp_path):
    uuids = ["GPU-a", "GPU-b"]
    plan = BuiltinStack().compile(
        TrainingJob(
            name="cat",
            folder=tmp_path,
            attempt_folder=tmp_path,
            spec=RunSpec(gpus=2),
            base_model=tmp_path,
            architecture="sdxl",
            pictures=(),
            device=DeviceKind.CUDA,
            device_uuids=uuids,
        )
    )
    assert plan.argv[1:7] == ["-P", "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    assert plan.env["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    assert plan.env["PET_SHUTDOWN_TIMEOUT"] == str(plan.stop[0].grace_seconds)
