"""Runs with a stand-in for the trainer: a real small process that writes the events of the built-in one."""

import json
import sys
import textwrap

import pytest

from runs.stacks import base, builtin

STAND_IN = textwrap.dedent(
    """
    import hashlib, json, os, signal, sys, time
    folder, events, steps, behaviour = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    stopped = []
    signal.signal(signal.SIGINT, lambda *_: stopped.append(True))
    def tell(event, **content):
        with open(events, "a") as file:
            file.write(json.dumps({"v": 1, "event": event, "at": time.time(), **content}) + "\\n")
    def save(step, final):
        name = "lora.safetensors" if final else f"lora-step{step:08d}.safetensors"
        with open(os.path.join(folder, name), "wb") as file:
            file.write(b"weights")
        sha256 = hashlib.sha256(b"weights").hexdigest()
        tell("checkpoint", path=name, step=step, bytes=7, sha256=sha256, final=final)
        return name
    def save_state(step):
        path = f"state/step{step:08d}"
        os.makedirs(os.path.join(folder, path), exist_ok=True)
        for name in ("lora.safetensors", "training.pt", "state.json", "COMPLETE"):
            open(os.path.join(folder, path, name), "w").close()
        tell("state", path=path, step=step)
    print("hello from the trainer", flush=True)
    start = int(sys.argv[5])
    tell("started", start_step=start, total_steps=steps)
    if behaviour == "refuses":
        tell("error", code="dataset", message="There are no pictures. Add some.")
        sys.exit(2)
    if behaviour == "breaks":
        sys.exit(1)
    if behaviour == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "is terminated":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    if behaviour == "ignores signals":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behaviour == "says nothing":
        sys.exit(0)
    step = start
    while step < steps:
        step += 1
        tell("progress", step=step, total_steps=steps, loss=1 / step, lr=0.1, steps_per_second=2.0, eta_seconds=1.0)
        print(f"\\rstep {step}", end="", flush=True)
        if step == 2:
            save_state(step)
        if step >= 3 and behaviour == "runs out of memory":
            tell("error", code="out_of_memory", message="The GPU ran out of memory.")
            sys.exit(3)
        if step >= 3 and behaviour == "fills the disk":
            tell("error", code="disk_full", message="The disk is full.")
            sys.exit(5)
        time.sleep({"slow": 0.15, "slower": 0.5, "ignores signals": 0.3}.get(behaviour, 0.01))
        if stopped:
            name = save(step, False)
            save_state(step)
            tell("stopped", step=step, checkpoint=name, state=f"state/step{step:08d}")
            sys.exit(130)
    name = save(steps, True)
    tell("finished", step=steps, checkpoint=name, sha256="")
    """
)


class StandInStack(builtin.BuiltinStack):
    """The built-in stack's parser and outcome with another program."""

    behaviour = "finishes"
    then = enough = None  # with the settings `enough`, behave so
    grace_seconds = 1

    def compile(self, job):
        values = job.spec.as_values()
        is_enough = self.enough and all(values[name] == value for name, value in self.enough.items())
        behaviour = self.then if is_enough else self.behaviour
        program = job.attempt_folder / "trainer.py"
        events = str(job.attempt_folder / builtin.EVENTS_FILE)
        start = "2" if job.resume_state else "0"
        return base.LaunchPlan(
            files={program: STAND_IN, job.attempt_folder / "job.json": json.dumps(list(job.pictures and ["pictures"]))},
            argv=[sys.executable, str(program), str(job.folder), events, str(job.spec.steps), behaviour, start],
            env={"PATH": ""},
            cwd=job.folder,
            stop=[base.StopStep("SIGINT", self.grace_seconds), base.StopStep("SIGKILL", 1)],
        )


@pytest.fixture
def stand_in(monkeypatch):
    from runs import stacks

    stack = StandInStack()
    monkeypatch.setitem(stacks.STACKS, "builtin", stack)
    return stack


@pytest.fixture
def handed_out(monkeypatch):
    """Attempts given to a worker, which the test plays itself."""
    attempts = []
    for module in ("runs.dispatch", "runs.supervision.follow", "runs.reconcile"):
        monkeypatch.setattr(f"{module}.hand_out", attempts.append)
    return attempts
