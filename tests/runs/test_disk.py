"""How much a run writes, whether it fits, and which checkpoints stay."""

from types import SimpleNamespace

import pytest

from runs import disk, retention
from runs.dispatch import dispatch
from runs.models import Checkpoint, ValidationPoint
from runs.spec import RunSpec
from tests.factories import make_base_model, make_run, make_slot


def test_estimate_is_above_what_a_run_writes_and_grows_with_what_is_kept(workspace, db):
    model = make_base_model()
    few = RunSpec(resolution=64, rank=16, steps=100)
    many = RunSpec(resolution=64, rank=16, steps=100, save_every_steps=10)
    kept = RunSpec(resolution=64, rank=16, steps=100, save_every_steps=10, keep_last=2)
    sizes = [disk.needed_bytes(spec, model, images=20) for spec in (few, kept, many)]
    assert sizes == sorted(sizes)
    assert sizes[0] > disk.LOG_BYTES


def test_lora_of_full_width_has_as_many_numbers_as_its_layers():
    unet = SimpleNamespace(role="unet", parameters=2_567_463_684)
    model = SimpleNamespace(architecture="sdxl", components=SimpleNamespace(all=lambda: [unet]))
    assert disk.lora_numbers(RunSpec(rank=8), model) == 8 * 2_659_840
    with_text = RunSpec(rank=8, text_encoder_learning_rate=1e-5, conv_rank=4)
    assert disk.lora_numbers(with_text, model) == 8 * (2_659_840 + 903_168) + 4 * 414_400


def test_run_that_does_not_fit_waits_and_starts_when_there_is_space(
    workspace, alice, handed_out, monkeypatch, settings
):
    make_slot()
    run = make_run(alice)
    monkeypatch.setattr(disk, "free_bytes", lambda: settings.DISK_FLOOR_BYTES + run.needed_bytes - 1)
    assert dispatch() == 0
    monkeypatch.setattr(disk, "free_bytes", lambda: settings.DISK_FLOOR_BYTES + run.needed_bytes)
    assert dispatch() == 1


# --- retention --------------------------------------------------------------------------------------------------------


def keep(run, **settings):
    run.spec |= settings
    run.save()


@pytest.fixture
def run(workspace, alice, handed_out):
    """Checkpoints of steps 10 to 60; validation was best at 20. A file of somebody else lies beside them."""
    run = make_run(alice)
    run.folder.mkdir(parents=True)
    (run.folder / "notes.safetensors").write_text("mine")
    for step in range(10, 70, 10):
        name = f"lora-step{step:08d}.safetensors"
        (run.folder / name).write_text("weights")
        Checkpoint.objects.create(run=run, step=step, path=name, bytes=7, sha256="")
        ValidationPoint.objects.create(run=run, step=step, attempt=1, loss=abs(step - 20) + 1)
    return run


def steps(run):
    on_disk = sorted(int(path.name[9:17]) for path in run.folder.glob("lora-step*"))
    assert on_disk == [checkpoint.step for checkpoint in run.checkpoints.filter(is_final=False)]
    return on_disk


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ({}, [10, 20, 30, 40, 50, 60]),
        ({"keep_last": 2}, [20, 50, 60]),
        ({"keep_last": 1, "keep_every_steps": 30}, [20, 30, 60]),
        ({"keep_last": 9}, [10, 20, 30, 40, 50, 60]),
        ({"keep_every_steps": 30}, [10, 20, 30, 40, 50, 60]),
    ],
)
def test_last_best_and_every_so_many_stay(run, kept, expected):
    keep(run, **kept)
    retention.remove_surplus(run)
    assert steps(run) == expected
    assert (run.folder / "notes.safetensors").exists()


def test_final_file_is_never_counted_nor_removed(run):
    keep(run, keep_last=1)
    (run.folder / "lora.safetensors").write_text("final")
    Checkpoint.objects.create(run=run, step=70, path="lora.safetensors", bytes=5, sha256="", is_final=True)
    run.validations.all().delete()
    retention.remove_surplus(run)
    assert steps(run) == [60]
    assert run.checkpoints.filter(is_final=True).exists()


def test_file_that_is_gone_already_is_no_trouble(run):
    keep(run, keep_last=1)
    (run.folder / "lora-step00000010.safetensors").unlink()
    assert len(retention.remove_surplus(run)) == 4
    assert steps(run) == [20, 60]
