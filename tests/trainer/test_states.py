"""Which states are complete, which are kept, and which are read."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from lora_trainer.errors import ConfigError
from lora_trainer.state import TrainingState, load_state, save_state
from lora_trainer.state_files import complete_states, is_complete
from tests.trainer.conftest import REPOSITORY


def state(step):
    return TrainingState(
        step=step,
        batches_per_epoch=3,
        lora={"unet.down": torch.full((2, 3), float(step))},
        optimizer={},
        scaler=None,
        ema=None,
        generators=[{"noise": torch.Generator().get_state(), "torch": None, "cuda": None}],
        validation={},
    )


def save(folder, *steps):
    return [save_state(folder, state(step)) for step in steps][-1]


def tear(path, name="training.pt"):
    """Cut the last byte off."""
    (path / name).write_bytes((path / name).read_bytes()[:-1])


def steps_of(folder):
    return [step for _, step in complete_states(folder)]


def test_complete_lists_every_file_with_its_size(tmp_path):
    path = save(tmp_path, 3)
    sizes = {name: (path / name).stat().st_size for name in ("lora.safetensors", "training.pt", "state.json")}
    assert json.loads((path / "COMPLETE").read_text()) == {"files": sizes}
    assert sorted(one.name for one in path.iterdir()) == sorted(["COMPLETE", *sizes])


def test_states_are_listed_from_the_newest_on(tmp_path):
    save(tmp_path / "state", 9, 1_000_000_000)
    (tmp_path / "state" / "step-by-step").mkdir()
    assert complete_states(tmp_path / "state") == [
        (tmp_path / "state" / "step1000000000", 1_000_000_000),
        (tmp_path / "state" / "step00000009", 9),
    ]
    assert complete_states(tmp_path / "nowhere") == []


@pytest.mark.parametrize("name", ["lora.safetensors", "training.pt", "state.json", "COMPLETE"])
def test_state_with_a_torn_or_missing_file_is_not_complete(tmp_path, name):
    path = save(tmp_path, 3)
    whole = (path / name).read_bytes()
    for content in (whole[:-1], whole + b" ", None):
        (path / name).unlink()
        if content is not None:
            (path / name).write_bytes(content)
        # a blank behind COMPLETE's JSON says nothing else
        assert is_complete(path) is (name == "COMPLETE" and content == whole + b" ")
        (path / name).write_bytes(whole)
    assert is_complete(path)


@pytest.mark.parametrize("proof", ["{}", "[]", "1", '{"files": []}', '{"files": {}}', '{"files": {"state.json": 1}}'])
def test_proof_that_says_too_little_proves_nothing(tmp_path, proof):
    path = save(tmp_path, 3)
    (path / "COMPLETE").write_text(proof)
    assert not is_complete(path)


def test_empty_proof_of_former_states_counts_while_all_files_are_there(tmp_path):
    path = save(tmp_path, 3)
    (path / "COMPLETE").write_bytes(b"")
    tear(path)
    assert steps_of(tmp_path) == [3]
    (path / "training.pt").unlink()
    assert steps_of(tmp_path) == []


def test_newest_two_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["step00000003", "step00000004"]


def test_damaged_state_does_not_count_as_one_of_the_two(tmp_path):
    save(tmp_path, 1)
    tear(save(tmp_path, 2))
    save(tmp_path, 3)
    assert steps_of(tmp_path) == [3, 1]
    tear(tmp_path / "step00000003")
    save(tmp_path, 4)
    assert steps_of(tmp_path) == [4, 1]


def test_state_of_an_earlier_step_than_others_is_kept(tmp_path):
    save(tmp_path, 8, 9)
    save(tmp_path, 5)
    assert steps_of(tmp_path) == [9, 8, 5]
    save(tmp_path, 6)
    assert steps_of(tmp_path) == [9, 8, 6]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    shutil.copytree(save(tmp_path, 1), tmp_path / ".step00000002.77.tmp")
    save(tmp_path, 3)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["step00000001", "step00000003"]


def test_saved_state_is_read_back(tmp_path):
    found = load_state(save(tmp_path, 3))
    assert torch.equal(found.lora["unet.down"], torch.full((2, 3), 3.0))
    assert (found.step, found.setup) == (3, None)


def test_incomplete_and_damaged_states_are_refused(tmp_path):
    path = save(tmp_path, 3)
    (path / "training.pt").write_bytes(bytes((path / "training.pt").stat().st_size))
    assert is_complete(path)
    with pytest.raises(ConfigError, match=r"^'resume': the state .*/step00000003 is damaged \(\w+\); choose another.$"):
        load_state(path)
    tear(path)
    with pytest.raises(
        ConfigError, match=r"^'resume': .*/step00000003 is not a complete state folder of this trainer.$"
    ):
        load_state(path)


@pytest.mark.parametrize("number", [1, 4])
def test_state_of_another_version_is_refused(tmp_path, number):
    path = save(tmp_path, 3)
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"format": 3', f'"format": {number}'))
    with pytest.raises(ConfigError, match="was written by another version; start again without it"):
        load_state(path)


def test_lack_of_memory_is_not_taken_for_damage(tmp_path, monkeypatch):
    def load(*arguments, **options):
        return torch.empty(1 << 55)

    path = save(tmp_path, 3)
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load_state(path)


def test_looking_for_states_needs_no_torch():
    code = "import sys, lora_trainer.state_files; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr
