"""Runs that are killed, stopped and resumed: real processes, real signals."""

import signal

import numpy as np
from safetensors import safe_open


def weights(path):
    with safe_open(path, framework="np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict


def test_killed_and_resumed_run_ends_with_the_same_bits(trainer, short_run):
    process = trainer.start()
    assert trainer.signal_at_step(process, 3, signal.SIGKILL) == -signal.SIGKILL
    state = trainer.named("state")[-1]
    assert (trainer.output / state["path"] / "COMPLETE").is_file()

    done = trainer.run(resume=str(trainer.output / state["path"]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [event["start_step"] for event in trainer.named("started")] == [0, state["step"]]
    expected, found = weights(short_run.output / "face.safetensors"), weights(trainer.output / "face.safetensors")
    assert expected.keys() == found.keys()
    assert [key for key in expected if not np.array_equal(expected[key], found[key])] == []
    losses = [event["loss"] for event in trainer.named("progress") if event["step"] > state["step"]]
    assert losses[-(6 - state["step"]) :] == [
        event["loss"] for event in short_run.named("progress") if event["step"] > state["step"]
    ]


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
