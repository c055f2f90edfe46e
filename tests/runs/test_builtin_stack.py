"""What the built-in stack writes for its trainer: a configuration that the trainer takes, key by key."""

import tomllib

import pytest

from lora_trainer import config as trainer_config
from lorapilot.errors import UserError
from runs.enums import DeviceKind, Profile
from runs.profiles import fill
from runs.spec import OPTIMIZERS, SCHEDULES, RunSpec
from runs.stacks.base import CheckpointRemoved, Noted, Started, TrainingJob, TrainingPicture, Validated
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
        BuiltinStack().check_spec(RunSpec.from_values(values))
    assert refused.value.message.startswith(sentence)


def test_default_settings_leave_text_encoders_alone_and_memory_to_the_trainer(workspace, tmp_path):
    read = configuration(compiled(tmp_path))
    assert (read.network_train_unet_only, read.gradient_checkpointing) == (True, None)
    assert read.cache_dir == str(workspace / "cache" / "encoded")
    assert (read.validation_split, read.save_best, read.ema_decay) == (0.0, False, 0.0)


def test_validation_and_best_are_handed_on(workspace, tmp_path):
    read = configuration(compiled(tmp_path, validation_share=0.2, save_best=True, ema_decay=0.99))
    assert (read.validation_split, read.save_best, read.ema_decay) == (0.2, True, 0.99)


def test_parse_tells_validation_removed_files_and_how_exactly_it_goes_on():
    lines = (
        b'{"v": 1, "event": "started", "at": 1.0, "start_step": 4, "total_steps": 9, "resume": "exact"}\n'
        b'{"v": 1, "event": "validation", "at": 2.0, "step": 5, "loss": 0.25}\n'
        b'{"v": 1, "event": "checkpoint_removed", "at": 3.0, "path": "cat-000001.safetensors", "step": 5}\n'
        b'{"v": 1, "event": "warn'
    )
    observations, consumed = BuiltinStack().parse(lines)
    assert observations == [
        Started(4, 9),
        Noted("Goes on after step 4: exact, bit for bit."),
        Validated(5, 0.25),
        CheckpointRemoved("cat-000001.safetensors"),
    ]
    assert consumed == lines.rindex(b"\n") + 1
