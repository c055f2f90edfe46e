"""Runs that are killed, stopped and resumed: real processes, real signals."""

import json
import re
import resource
import signal
from pathlib import Path

import pytest

from tests.trainer.conftest import ASSETS, differing, run_script, weights

# everything that has a state of its own: dropout, moving average, validation, several batches a step
DEMANDING = {
    "network_train_unet_only": False,
    "text_encoder_lr": [1e-3, 2e-3],
    "ema_decay": 0.9,
    "gradient_accumulation_steps": 2,
    "train_batch_size": 1,
    "shuffle_caption": True,
    "caption_tag_dropout_rate": 0.2,
    "multires_noise_iterations": 2,
    "ip_noise_gamma": 0.1,
    "validation_split": 0.2,
    "validate_every_n_steps": 2,
    "save_best": True,
    "sample_prompts": [{"prompt": "sks face", "steps": 2}],
    "sample_every_n_steps": 1,
}


@pytest.mark.parametrize("options", [{}, DEMANDING], ids=["plain", "demanding"])
def test_killed_and_resumed_run_ends_with_the_same_bits(trainer, trainer_in, short_run, options):
    whole = short_run
    if options:
        whole = trainer_in("whole")
        done = whole.run(**options)
        assert done.returncode == 0, done.stdout + done.stderr
    process = trainer.start(**options)
    assert trainer.signal_at_step(process, 3, signal.SIGKILL) == -signal.SIGKILL
    state = trainer.named("state")[-1]
    assert (trainer.output / state["path"] / "COMPLETE").is_file()

    done = trainer.run(**options, resume=str(trainer.output / state["path"]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(event["start_step"], event["resume"]) for event in trainer.named("started")] == [
        (0, None),
        (state["step"], "exact"),
    ]
    final = "face.safetensors"
    assert differing(weights(whole.output / final), weights(trainer.output / final)) == []
    assert progress_after(trainer, state["step"]) == progress_after(whole, state["step"])
    assert [event["loss"] for event in trainer.named("validation")][-1:] == [
        event["loss"] for event in whole.named("validation")
    ][-1:]


def progress_after(trainer, step):
    return [
        {key: event[key] for key in ("step", "epoch", "loss", "lr", "grad_norm")}
        for event in trainer.named("progress")
        if event["step"] > step
    ][-(6 - step) :]


def test_every_optimizer_goes_on_exactly_from_its_saved_state(trainer):
    script = Path(__file__).with_name("resume_in_process.py")
    model, manifest = ASSETS / "pilot-tiny", trainer.manifest()
    done = run_script(script, model, manifest, trainer.folder / "states")
    assert json.loads(done.splitlines()[-1]) == {
        "tried": ["AdamW", "SGD", "SGDNesterov", "Lion", "Adafactor", "Prodigy", "AdamWScheduleFree"],
        "different": [],
        "refused": [
            "'resume': the state does not fit the configuration: the saved LoRA has other modules or another rank.",
            "'resume': the dataset or the batch size has changed since this state was saved.",
            "'resume': 'ema_decay' was switched on or off since this state was saved.",
        ],
    }


def test_resuming_with_another_recipe_is_not_called_exact(trainer, short_run):
    done = trainer.run(learning_rate=1e-3, max_train_steps=5, resume=str(short_run.output / "state" / "step00000004"))
    assert done.returncode == 0, done.stdout
    assert [event["resume"] for event in trainer.named("started")] == ["close"]
    assert [event["step"] for event in trainer.named("progress")] == [5]


def test_memory_that_runs_out_ends_with_3_and_keeps_what_was_saved(trainer):
    # every large tensor then asks the system for memory, which it gets no more of
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    process = trainer.start(environment, max_train_steps=100_000, train_batch_size=5, resolution=128)
    trainer.wait_for_step(process, 3)
    status = Path(f"/proc/{process.pid}/status").read_text()
    now_bytes = 1024 * int(re.search(r"VmSize:\s+(\d+) kB", status)[1])
    resource.prlimit(process.pid, resource.RLIMIT_AS, (now_bytes, now_bytes))
    assert process.wait(120) == 3
    (error,) = trainer.named("error")
    assert (error["code"], error["message"][:31]) == ("out_of_memory", "This machine ran out of memory.")
    saved = trainer.named("checkpoint") + trainer.named("state")
    assert {event["step"] for event in saved} >= {2}
    assert (trainer.output / trainer.named("state")[-1]["path"] / "COMPLETE").is_file()


def test_sigint_saves_and_exits_with_130(trainer):
    process = trainer.start(max_train_steps=100_000, save_every_n_steps=0, save_state=False)
    assert trainer.signal_at_step(process, 2, signal.SIGINT) == 130
    last = trainer.events()[-1]
    assert last["event"] == "stopped"
    assert last["checkpoint"] == f"face-step{last['step']:08d}.safetensors"
    assert last["state"] == f"state/step{last['step']:08d}"
    assert (trainer.output / last["checkpoint"]).is_file()
    assert (trainer.output / last["state"] / "COMPLETE").is_file()
    assert (
        (trainer.folder / "log").read_text().splitlines()[-1].startswith(f"Stopped after step {last['step']}; resume")
    )


def test_sigterm_before_the_first_step_leaves_nothing(trainer):
    process = trainer.start()
    while not trainer.named("stage"):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    status = process.wait(120)
    assert status == 130
    assert trainer.events()[-1]["event"] == "stopped"
