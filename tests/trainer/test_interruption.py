"""Runs that are killed, stopped and resumed: real processes, real signals."""

import json
import re
import resource
import signal
from pathlib import Path

import pytest

from lora_trainer.state_files import complete_states, is_complete
from tests.trainer.conftest import ASSETS, Trainer, differing, run_script, weights

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
    assert complete_states(trainer.output / "state")[0] == (trainer.output / state["path"], state["step"])

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


@pytest.fixture(scope="module")
def in_process(tmp_path_factory):
    """What resume_in_process.py found."""
    trainer = Trainer(tmp_path_factory.mktemp("in_process"))
    script = Path(__file__).with_name("resume_in_process.py")
    done = run_script(script, ASSETS / "pilot-tiny", trainer.manifest(), trainer.folder / "states")
    return json.loads(done.splitlines()[-1])


def test_every_optimizer_goes_on_exactly_from_its_saved_state(in_process):
    assert in_process["tried"] == ["AdamW", "SGD", "SGDNesterov", "Lion", "Adafactor", "Prodigy", "AdamWScheduleFree"]
    assert in_process["different"] == []


def test_state_of_another_lora_or_dataset_is_refused(in_process):
    counts = "it had 5 pictures (5 an epoch with repeats), now it has 4 (4)"
    assert in_process["refused"] == [
        "'resume': the state does not fit the configuration: the saved LoRA has other modules or another rank.",
        f"'resume': the dataset has changed since this state was saved: {counts}.",
        "'resume': 'ema_decay' was switched on or off since this state was saved.",
        "'resume': the dataset or the batch size has changed since this state was saved.",
        "'resume': this state is of 2 processes; start as many.",
    ]


OTHER_BATCHES = (
    "1 x 2 pictures a step instead of 2 x 1 (as many pictures; the rest of the epoch comes in another order)"
)
OTHER_SIZE = "32x32 instead of 64x64 pixels (losses before and after cannot be compared)"
OTHER_OPTIMIZER = "Lion instead of AdamW (it starts without a memory of earlier steps)"
CHECKPOINTING = "gradient checkpointing (slower; it may round otherwise)"


def test_state_is_taken_up_under_another_configuration(in_process):
    # two steps of two pictures are done
    taken = {"step": 2, "place": [2, 0, 4], "taken": True, "moments": True, "trained": True}
    stopped_again = {"told_again": [], "exact_again": True}
    assert in_process["adapted"] == {
        "format 2": taken | {"told": [], "place": [0, 0, 0]},
        # five pictures, of which the second batch is a single one: after the third one, four and more are used
        "batch": taken | {"told": [OTHER_BATCHES], "place": [2, 1, 0]} | stopped_again,
        "resolution": taken | {"told": [OTHER_SIZE]},
        "optimizer": taken | {"told": [OTHER_OPTIMIZER], "moments": False} | stopped_again,
    }


def test_run_goes_on_with_less_memory_and_says_how(trainer, short_run):
    done = trainer.run(
        resume=str(short_run.output / "state" / "step00000004"),
        train_batch_size=1,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        optimizer_type="SGD",
        resolution=32,
        min_bucket_reso=32,
    )
    assert done.returncode == 0, done.stdout
    sentence = (
        "The run goes on after step 4 with 2 x 1 pictures a step instead of 1 x 2 (as many pictures; the rest of the "
        f"epoch comes in another order), {OTHER_SIZE}, SGD instead of AdamW (it starts without a memory of earlier "
        f"steps) and {CHECKPOINTING}."
    )
    (warning,) = trainer.named("warning")
    assert (warning["code"], warning["message"]) == ("resume_adapted", sentence)
    assert f"Warning: {sentence}" in done.stdout.splitlines()
    (started,) = trainer.named("started")
    assert (started["start_step"], started["total_steps"], started["resume"]) == (4, 6, "close")
    assert [(event["step"], event["epoch"]) for event in trainer.named("progress")] == [(5, 2), (6, 2)]


def test_resuming_with_another_recipe_is_not_called_exact(trainer, short_run):
    done = trainer.run(learning_rate=1e-3, max_train_steps=5, resume=str(short_run.output / "state" / "step00000004"))
    assert done.returncode == 0, done.stdout
    assert [event["resume"] for event in trainer.named("started")] == ["close"]
    assert trainer.named("warning") == []
    assert [event["step"] for event in trainer.named("progress")] == [5]


def test_memory_that_runs_out_costs_a_sample_but_in_a_step_ends_the_run_with_3(trainer):
    # every large tensor then asks the system for memory, which it gets no more of
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    process = trainer.start(
        environment,
        max_train_steps=100_000,
        train_batch_size=5,
        resolution=128,
        sample_every_n_steps=6,
        sample_prompts=[{"prompt": "sks face", "width": 768, "height": 768, "steps": 1}],
    )
    trainer.wait_for_step(process, 2)
    limit_memory(process.pid, more_bytes=48 << 20)
    trainer.wait_for_step(process, 7)
    sentence = "Sample 1 after step 6 was left out: memory ran out while it was drawn."
    advice = "Give it a smaller width and height than 768x768."
    warning = trainer.named("warning")[0]
    assert (warning["code"], warning["message"]) == ("sample_memory", f"{sentence} {advice}")
    assert trainer.named("sample") == []

    limit_memory(process.pid, more_bytes=256 << 10)  # without any, the C library itself ends the process now and then
    assert process.wait(120) == 3
    (error,) = trainer.named("error")
    assert (error["code"], error["message"][:31]) == ("out_of_memory", "This machine ran out of memory.")
    saved = trainer.named("checkpoint") + trainer.named("state")
    assert {event["step"] for event in saved} >= {2, 4}
    assert is_complete(trainer.output / trainer.named("state")[-1]["path"])


def limit_memory(pid, *, more_bytes):
    """Let a process have so much more than it has now."""
    now_kilobytes = re.search(r"VmSize:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1]
    limit = 1024 * int(now_kilobytes) + more_bytes
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))


def test_sigint_saves_and_exits_with_130(trainer):
    process = trainer.start(max_train_steps=100_000, save_every_n_steps=0, save_state=False)
    assert trainer.signal_at_step(process, 2, signal.SIGINT) == 130
    last = trainer.events()[-1]
    assert last["event"] == "stopped"
    assert last["checkpoint"] == f"face-step{last['step']:08d}.safetensors"
    assert last["state"] == f"state/step{last['step']:08d}"
    assert (trainer.output / last["checkpoint"]).is_file()
    assert complete_states(trainer.output / "state") == [(trainer.output / last["state"], last["step"])]
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
