from __future__ import annotations

import hashlib
import os
import shutil

import pytest
from django.utils import timezone

from datasets.models import DatasetVersion
from lorapilot.errors import Conflict, NotAllowed, UserError
from lorapilot.jobs import JobCancelled, run_job
from lorapilot.models import AuditEntry, Job, JobStatus
from models_registry import services
from models_registry.models import BaseModel, ModelComponent
from models_registry.selectors import (
    Candidate,
    absolute_path,
    inspect,
    list_base_models,
    missing_files,
    unregistered_candidates,
)
from runs.models import Run
from tests.models_registry.conftest import ASSETS, SD15, SDXL, write_file

pytestmark = pytest.mark.django_db


def test_register_a_file(models, staff):
    path = write_file(models / "sd/lora-of-a-vae.safetensors", SD15)
    base_model = services.register_base_model(path="sd/lora-of-a-vae.safetensors", registered_by=staff)
    base_model.refresh_from_db()
    assert (base_model.name, base_model.path, base_model.layout, base_model.architecture) == (
        "lora-of-a-vae",
        "sd/lora-of-a-vae.safetensors",
        "file",
        "sd15",
    )
    assert (base_model.resolution, base_model.prediction_type, base_model.bytes, base_model.sha256) == (
        512,
        "epsilon",
        path.stat().st_size,
        "",
    )
    assert base_model.registered_by == staff
    assert base_model.precision == "F16"
    assert absolute_path(base_model) == path
    assert [(row.role, row.path, row.bytes) for row in base_model.components.all()] == [
        ("checkpoint", "sd/lora-of-a-vae.safetensors", path.stat().st_size)
    ]
    assert (base_model.hashing.status, base_model.hashing.owner) == (JobStatus.QUEUED, staff)
    assert base_model.is_hashing


def test_register_by_absolute_path_and_own_name(models):
    write_file(models / "x.safetensors", SDXL)
    base_model = services.register_base_model(path=f" {models}/x.safetensors ", name="  Mine ")
    assert (base_model.name, base_model.path) == ("Mine", "x.safetensors")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "Enter the path"),
        ("nothing.safetensors", "There is no nothing.safetensors"),
        (".", "models folder itself"),
        ("../secret.safetensors", "outside the models folder"),
        ("/etc/passwd", "outside the models folder"),
        ("~/x.safetensors", "outside the models folder"),
        ("a\0b", "outside the models folder"),
        ("link.safetensors", "outside the models folder"),
        ("linked/secret.safetensors", "outside the models folder"),
        ("circle", "outside the models folder"),
        ("x" * 300, "outside the models folder"),
        ("notes.txt", r"no \.safetensors file"),
        ("old.ckpt", "pickle file"),
        ("plain", r"no model_index\.json"),
    ],
)
def test_register_a_path_that_is_no_model(models, tmp_path, path, words):
    write_file(tmp_path / "secret.safetensors", SDXL)
    write_file(models.parent / "secret.safetensors", SDXL)
    (models / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (models / "linked").symlink_to(tmp_path)
    (models / "circle").symlink_to(models / "circle")
    (models / "notes.txt").write_text("a")
    (models / "old.ckpt").write_bytes(b"a")
    (models / "plain").mkdir()
    with pytest.raises(UserError, match=words) as refusal:
        services.register_base_model(path=path)
    assert refusal.value.field == "path"
    assert BaseModel.objects.count() == Job.objects.count() == 0


def test_register_twice_even_through_a_link(models):
    write_file(models / "x.safetensors", SDXL)
    (models / "again.safetensors").symlink_to(models / "x.safetensors")
    services.register_base_model(path="x.safetensors", name="First")
    for path in ("x.safetensors", "./x.safetensors", "again.safetensors"):
        with pytest.raises(Conflict, match="registered already, as First") as refusal:
            services.register_base_model(path=path, name="Second")
        assert refusal.value.field == "path"
    assert BaseModel.objects.count() == Job.objects.count() == 1


def test_register_a_name_that_is_taken(models):
    write_file(models / "a.safetensors", SDXL)
    write_file(models / "b.safetensors", SDXL)
    services.register_base_model(path="a.safetensors", name="Mine")
    with pytest.raises(Conflict, match="called MINE exists already") as refusal:
        services.register_base_model(path="b.safetensors", name="MINE")
    assert refusal.value.field == "name"


@pytest.mark.parametrize("name", ["x" * 101, "a\nb", "a\x07"])
def test_register_an_impossible_name(models, name):
    write_file(models / "a.safetensors", SDXL)
    with pytest.raises(UserError, match="at most 100 characters"):
        services.register_base_model(path="a.safetensors", name=name)


def test_only_staff_write(models, alice):
    write_file(models / "a.safetensors", SDXL)
    with pytest.raises(NotAllowed):
        services.register_base_model(path="a.safetensors", registered_by=alice)
    base_model = services.register_base_model(path="a.safetensors")
    with pytest.raises(NotAllowed):
        services.rehash_base_model(base_model, requested_by=alice)
    with pytest.raises(NotAllowed):
        services.forget_base_model(base_model, forgotten_by=alice)
    assert BaseModel.objects.get() == base_model


def test_hash_of_a_file_is_hashlibs(models):
    path = models / "a.safetensors"
    write_file(path, SDXL)
    base_model = services.register_base_model(path="a.safetensors")
    run_job(str(base_model.hashing_id))
    base_model = BaseModel.objects.get()
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert base_model.sha256 == base_model.components.get().sha256 == expected
    assert base_model.hashing.status == JobStatus.SUCCEEDED
    assert base_model.hashing.result == {"sha256": expected, "bytes": path.stat().st_size}
    assert not base_model.is_hashing


def test_hash_of_a_folder_is_that_of_its_sorted_digests(tiny, models):
    base_model = services.register_base_model(path="tiny")
    run_job(str(base_model.hashing_id))
    base_model.refresh_from_db()
    digests = {row.path: row.sha256 for row in base_model.components.all()}
    assert digests == {path: hashlib.sha256((models / path).read_bytes()).hexdigest() for path in digests}
    lines = "".join(f"{digest}\n" for digest in sorted(digests.values()))
    assert base_model.sha256 == hashlib.sha256(lines.encode()).hexdigest()


def test_hash_goes_on_behind_what_is_done_and_counts_bytes(tiny, monkeypatch):
    monkeypatch.setattr("lorapilot.workspace.READ_BYTES", 1024**2)
    base_model = services.register_base_model(path="tiny")
    seen = []

    def cancelled_in_the_unet(done, total, message):
        seen.append(done)
        if done > 4_000_000:
            raise JobCancelled

    with pytest.raises(JobCancelled):
        services.hash_base_model(cancelled_in_the_unet, base_model_id=base_model.pk)
    before = list(base_model.components.exclude(sha256="").values_list("path", "sha256"))
    assert before
    done_before = sum(base_model.components.exclude(sha256="").values_list("bytes", flat=True))

    calls = []
    services.hash_base_model(lambda done, total, message: calls.append((done, total)), base_model_id=base_model.pk)

    base_model.refresh_from_db()
    assert base_model.sha256
    assert set(before) <= set(base_model.components.values_list("path", "sha256"))
    assert seen == sorted(seen)
    assert calls == sorted(calls)
    assert calls[0][0] > done_before
    assert calls[-1] == (base_model.bytes, base_model.bytes)


@pytest.mark.parametrize(("change", "words"), [("grow", "was changed"), ("remove", "cannot be read")])
def test_hash_of_a_file_that_changed_fails_with_a_sentence(models, change, words):
    path = write_file(models / "a.safetensors", SDXL)
    base_model = services.register_base_model(path="a.safetensors")
    if change == "grow":
        path.write_bytes(path.read_bytes() + b"x")
    else:
        path.unlink()
    run_job(str(base_model.hashing_id))
    base_model = BaseModel.objects.get()
    assert base_model.hashing.status == JobStatus.FAILED
    assert words in base_model.hashing.message
    assert base_model.sha256 == ""


def test_hash_of_a_forgotten_model_ends_quietly(db):
    assert services.hash_base_model(lambda *_: None, base_model_id=99) == {}


def test_hash_again(models):
    write_file(models / "a.safetensors", SDXL)
    base_model = services.register_base_model(path="a.safetensors")
    with pytest.raises(Conflict, match="being computed already"):
        services.rehash_base_model(base_model)
    run_job(str(base_model.hashing_id))
    again = services.rehash_base_model(base_model)
    assert (BaseModel.objects.get().sha256, ModelComponent.objects.get().sha256) == ("", "")
    assert again.hashing_id != base_model.hashing_id
    run_job(str(again.hashing_id))
    assert BaseModel.objects.get().sha256 != ""


def test_forget_leaves_the_files(models, staff):
    path = write_file(models / "a.safetensors", SDXL)
    base_model = services.register_base_model(path="a.safetensors", registered_by=staff)
    services.forget_base_model(base_model, forgotten_by=staff)
    assert BaseModel.objects.count() == ModelComponent.objects.count() == 0
    assert path.exists()
    assert Job.objects.get().status == JobStatus.CANCELLED
    assert list(AuditEntry.objects.values_list("actor", "action", "subject")) == [(staff.pk, "base model removed", "a")]


def test_forget_while_a_run_uses_it(models, alice):
    write_file(models / "a.safetensors", SDXL)
    base_model = services.register_base_model(path="a.safetensors")
    version = DatasetVersion.objects.create(owner=alice, name="d", number=1, digest="0" * 64, pictures=[])
    Run.objects.create(
        owner=alice,
        output_name="r",
        stack="builtin",
        spec={},
        dataset_version=version,
        base_model=base_model,
        queued_at=timezone.now(),
    )
    with pytest.raises(Conflict, match="a cannot be removed: a run uses it"):
        services.forget_base_model(base_model)
    assert BaseModel.objects.get() == base_model
    assert Job.objects.get().status == JobStatus.QUEUED
    assert AuditEntry.objects.count() == 0


def test_bundled_models_are_registered_once(workspace):
    first = services.register_bundled_models()
    assert [(row.name, row.path, row.architecture, row.resolution, row.prediction_type) for row in first] == [
        ("pilot-tiny", "pilot-tiny", "sdxl", 128, "epsilon")
    ]
    assert services.register_bundled_models() == first
    assert BaseModel.objects.count() == Job.objects.count() == 1
    placed = workspace / "models/pilot-tiny"
    assert {file.relative_to(placed): file.read_bytes() for file in placed.rglob("*") if file.is_file()} == {
        file.relative_to(ASSETS / "pilot-tiny"): file.read_bytes()
        for file in (ASSETS / "pilot-tiny").rglob("*")
        if file.is_file()
    }
    assert [path.name for path in (workspace / "models").iterdir()] == ["pilot-tiny"]


def test_bundled_models_are_copied_where_links_cannot_be(workspace, monkeypatch):
    def no_links(source, target):
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    assert [row.name for row in services.register_bundled_models()] == ["pilot-tiny"]
    assert (workspace / "models/pilot-tiny/model_index.json").stat().st_ino != (
        ASSETS / "pilot-tiny/model_index.json"
    ).stat().st_ino


def test_bundled_models_never_overwrite(models, caplog):
    (models / "pilot-tiny").mkdir()
    (models / "pilot-tiny/mine.txt").write_text("mine")
    assert services.register_bundled_models() == []
    assert [path.name for path in (models / "pilot-tiny").iterdir()] == ["mine.txt"]
    assert "pilot-tiny is not registered: pilot-tiny is no diffusers folder" in caplog.text


def test_bundled_model_comes_back_when_its_files_are_gone(workspace):
    (base_model,) = services.register_bundled_models()
    shutil.rmtree(workspace / "models/pilot-tiny")
    assert services.register_bundled_models() == [base_model]
    assert missing_files(base_model) == []


def test_missing_files_are_named(tiny, models, tmp_path):
    base_model = services.register_base_model(path="tiny")
    assert missing_files(base_model) == []
    (tiny / "vae/config.json").unlink()
    (tiny / "unet/config.json").write_text("{}")
    (tiny / "tokenizer/tokenizer.json").unlink()
    (tiny / "tokenizer/tokenizer.json").symlink_to(tmp_path / "elsewhere")
    assert sorted(missing_files(base_model)) == [
        "tiny/tokenizer/tokenizer.json is now a link that leaves the models folder.",
        "tiny/unet/config.json has 2 bytes instead of 1,761: it was changed or is being copied.",
        "tiny/vae/config.json is missing from the models folder.",
    ]
    assert "vae/config.json is missing" in inspect(base_model).problem


def test_name_that_is_no_text_is_passed_by(models):
    write_file(models / "a.safetensors", SD15)
    for name in (b"\xff.safetensors", b"\xfe/b.safetensors"):
        write_file(models / os.fsdecode(name), SD15)
    assert [candidate.path for candidate in unregistered_candidates()] == ["a.safetensors"]


def test_unregistered_candidates(tiny, models):
    write_file(models / "b.safetensors", SD15)
    write_file(models / "deep/a.safetensors", SDXL)
    write_file(models / "deep/lora.safetensors", {"x.lora_up.weight": (1, 1)})
    write_file(models / ".hidden/a.safetensors", SDXL)
    (models / "link.safetensors").symlink_to(models / "b.safetensors")
    (models / "broken.safetensors").write_bytes(b"x")
    size = (models / "b.safetensors").stat().st_size
    found = unregistered_candidates()
    assert found[0] == Candidate("b.safetensors", "Stable Diffusion 1.5", size)
    assert [candidate.path for candidate in found] == ["b.safetensors", "deep/a.safetensors", "tiny"]
    for candidate in found[1:]:
        services.register_base_model(path=candidate.path)
    assert [candidate.path for candidate in unregistered_candidates()] == ["b.safetensors"]


def test_list_base_models_is_for_everybody_who_is_signed_in(models, charlie):
    from django.contrib.auth.models import AnonymousUser

    write_file(models / "a.safetensors", SDXL)
    base_model = services.register_base_model(path="a.safetensors")
    assert list(list_base_models(charlie)) == [base_model]
    assert list(list_base_models(AnonymousUser())) == []
