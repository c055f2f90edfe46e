"""What has to hold after every fault, from the database, the disk and the process table."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

from tests.chaos.faults import Scene
from tests.chaos.installation import STEPS, Installation, Witness

ACTIVE = {"starting", "running", "stopping"}
ENDS = {"succeeded", "stopped", "failed", "errored"}
STEADY_SECONDS = 1.0


def is_truthful(run: dict | None, runner: dict | None) -> bool:
    """Whether what a user is shown agrees with the processes. A run that starts may or may not have one yet."""
    if run is None:
        return False
    if run["status"] in ("running", "stopping"):
        return runner is not None
    return run["status"] == "starting" or runner is None


def seconds_to_truth(scene: Scene, since: float, patience: float = 120.0) -> float:
    """From `since` (monotonic) to the moment from which pages and processes agree for a second."""
    agree_since = None
    while time.monotonic() - since < patience:
        run = scene.installation.look(scene.run)
        runner = scene.installation.runner_of(scene.name, run["attempt"]) if run else None
        if not is_truthful(run, runner):
            agree_since = None
        elif agree_since is None:
            agree_since = time.monotonic()
        elif time.monotonic() - agree_since > STEADY_SECONDS:
            return agree_since - since
        time.sleep(0.1)
    return float("inf")


def wait_for_end(scene: Scene, patience: float = 300.0) -> dict:
    """The run when it has ended by itself, or as it is when patience ends."""
    deadline = time.monotonic() + patience
    while True:
        run = scene.installation.look(scene.run)
        if (run and run["status"] in ENDS) or time.monotonic() > deadline:
            return run or {"status": "unknown", "reason": "the platform does not answer"}
        time.sleep(0.5)


def weights_of(path: Path) -> tuple[dict, bytes]:
    """Metadata and tensors of a safetensors file."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    metadata = header.pop("__metadata__", {})
    return metadata, json.dumps(header, sort_keys=True).encode() + content[8 + size :]


def broken(scene: Scene, witness: Witness, reference: dict) -> list[str]:
    """Everything that does not hold after the run has ended; `reference` is an uninterrupted one's."""
    installation: Installation = scene.installation
    facts = installation.facts(scene.run)
    log = (scene.folder / "_logs" / "train.log").read_bytes()
    witness.finish(log)
    checks = {
        "log as followed": (bytes(witness.log) == log, f"{len(witness.log)} of {len(log)} bytes"),
        "one active run a slot": (not facts["crowded"], facts["crowded"]),
        "no run left behind": (not facts["unfinished"], facts["unfinished"]),
        "no open attempt": (facts["open_attempts"] == 0, facts["open_attempts"]),
        "step count": (facts["step"] == [STEPS, STEPS], facts["step"]),
        "loss curve": (facts["points"] == reference["points"], f"{len(facts['points'])} points"),
        "no orphans": (_are_gone(installation), [one.cmdline() for one in installation.trainers()]),
        "endings": (scene.endings <= set(facts["endings"]), facts["endings"]),
        "LoRA, bit for bit": (weights_of(_final(scene))[1] == reference["weights"], _final(scene)),
    }
    return witness.faults + [f"{what}: {evidence}" for what, (holds, evidence) in checks.items() if not holds]


def _final(scene: Scene) -> Path:
    return scene.folder / f"{scene.name}.safetensors"


def _are_gone(installation: Installation, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while installation.trainers():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
