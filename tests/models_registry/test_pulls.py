"""Pulls: who may, what is checked before, the job with its kills, and what the page and the API say about it."""

import hashlib
import os
import random
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from django.conf import settings as django_settings
from django.db import connections
from django.utils import timezone

from lorapilot import jobs
from lorapilot.errors import Conflict, Missing, NotAllowed, UserError
from lorapilot.models import AuditEntry, Job, JobStatus
from lorapilot.services import set_secret
from models_registry import manifest, pulls
from models_registry.manifest_selectors import manifest_row, manifest_rows, pull_status
from models_registry.models import Pull

pytestmark = pytest.mark.django_db
ROOT = Path(__file__).resolve().parents[2]
BODY = random.Random(1).randbytes(2_000_000)
FILE = "one|hf_file|a/b:split/one.safetensors|vae||2MB|mit|no|sdxl|kohya|vae"
FOLDER = "folder|hf_repo|a/folder|diffusers/folder|*.json,*.safetensors"
GATED = "gated|hf_file|g/b:one.safetensors|checkpoints|||other|yes|flux|kohya|transformer"


@pytest.fixture
def stocked(hub, manifest_of):
    """A hub with files, and a manifest that names them."""
    manifest_of(FILE, FOLDER, GATED)
    hub.files["a/b"] = {"split/one.safetensors": BODY}
    hub.files["a/folder"] = {
        ".gitattributes": b"x",
        "README.md": b"x",
        "model_index.json": b"{}",
        "unet/config.json": b'{"a": 1}',
        "unet/model.safetensors": BODY[:1_000_000],
        "unet/model.bin": b"pickle",
        "vae/model.safetensors": BODY[1_000_000:],
    }
    hub.files["g/b"] = {"one.safetensors": BODY}
    hub.gated.add("g/b")
    return hub


def run(pull):
    jobs.run_job(str(pull.job_id))
    pull.refresh_from_db()
    return pull.job


# --- The work ---------------------------------------------------------------------------------------------------------
def test_pull_of_a_file(stocked, models, staff):
    pull = pulls.start_pull(staff, "one")
    assert (pull_status(staff, "one").state, manifest_row(staff, "one").installed) == ("running", False)
    job = run(pull)
    assert (job.status, job.message) == (JobStatus.SUCCEEDED, "")
    assert job.result == {"path": "vae/one.safetensors", "files": 1, "bytes": len(BODY)}
    assert (models / "vae" / "one.safetensors").read_bytes() == BODY
    assert pull.files == [["vae/one.safetensors", len(BODY)]]
    row = manifest_row(staff, "one")
    assert (row.installed, row.size_bytes, row.target_path) == (True, len(BODY), str(models / "vae/one.safetensors"))
    status = pull_status(staff, "one")
    assert (status.name, status.state, status.progress_pct, status.error) == ("one", "done", 100.0, "")
    assert list(AuditEntry.objects.values_list("actor__username", "action", "subject")) == [
        ("staff", "model pull started", "one from a/b:split/one.safetensors")
    ]


def test_pull_of_a_repository_takes_what_is_included_and_no_pickles(stocked, models, staff):
    pull = pulls.start_pull(staff, "folder")
    assert run(pull).status == JobStatus.SUCCEEDED
    folder = models / "diffusers" / "folder"
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    wanted = ("model_index.json", "unet/config.json", "unet/model.safetensors", "vae/model.safetensors")
    assert found == {path: stocked.files["a/folder"][path] for path in wanted}
    assert manifest_row(staff, "folder").installed
    (folder / "vae" / "model.safetensors").write_bytes(b"short")
    assert not manifest_row(staff, "folder").installed


def test_pull_into_another_folder(stocked, models, staff):
    run(pulls.start_pull(staff, "one", "mine/deep"))
    assert (models / "mine" / "deep" / "one.safetensors").read_bytes() == BODY
    row = manifest_row(staff, "one")
    assert (row.installed, row.path, row.subdir) == (True, "mine/deep/one.safetensors", "mine/deep")


def test_pull_of_an_address_asks_for_its_size_and_checks_it(stocked, models, staff, manifest_of):
    address = f"http://{stocked.storage_host}/a/b/split/one.safetensors"
    manifest_of(f"url|url|{address}#sha256={'0' * 64}|loras|mine.safetensors")
    job = run(pulls.start_pull(staff, "url"))
    assert job.status == JobStatus.FAILED
    assert job.message == (
        "mine.safetensors does not have the checksum that the manifest names: its sha256 is "
        f"{hashlib.sha256(BODY).hexdigest()}. "
        "Check the manifest's line; if that is right, the server has another file."
    )
    manifest_of(f"url|url|{address}|loras|mine.safetensors")
    assert run(pulls.start_pull(staff, "url")).status == JobStatus.SUCCEEDED
    assert (models / "loras" / "mine.safetensors").read_bytes() == BODY


def test_pull_of_an_address_without_a_size_is_refused(stocked, staff, manifest_of):
    manifest_of(f"url|url|http://{stocked.storage_host}/a/b/split/one.safetensors|loras|mine.safetensors")
    stocked.faults["split/one.safetensors"] = [{"length": "unknown"}]
    job = run(pulls.start_pull(staff, "url"))
    assert (job.status, "does not say how large" in job.message) == (JobStatus.FAILED, True)


def test_pull_of_an_address_that_leads_to_a_sign_in_page_is_refused(stocked, models, staff, manifest_of):
    manifest_of(f"url|url|http://{stocked.storage_host}/a/b/split/one.safetensors|loras|mine.safetensors")
    stocked.faults["split/one.safetensors"] = [{"body": b"<html>Sign in", "type": "text/html; charset=utf-8"}]
    job = run(pulls.start_pull(staff, "url"))
    assert (job.status, "sends a page instead of the file" in job.message) == (JobStatus.FAILED, True)
    assert list(models.rglob("*.safetensors")) == []


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../../evil.safetensors", "has no file"),
        ("a/../../b.safetensors", "no safe name"),
        ("a\\b.safetensors", "no safe name"),
        ("/x.safetensors", "no safe name"),
    ],
)
def test_names_from_the_hub_stay_in_the_folder(stocked, models, staff, path, reason):
    stocked.files["a/folder"] = {path: BODY}
    job = run(pulls.start_pull(staff, "folder"))
    assert job.status == JobStatus.FAILED
    assert reason in job.message
    assert list(models.parent.rglob("*.safetensors")) == []


def test_pull_does_not_leave_the_models_folder_through_a_link(stocked, models, staff, tmp_path):
    (models / "vae").symlink_to(tmp_path)
    job = run(pulls.start_pull(staff, "one"))
    assert (job.status, job.message) == (JobStatus.FAILED, "vae is a link that leaves the models folder.")
    assert not (tmp_path / "one.safetensors").exists()


def test_pull_of_what_the_hub_has_no_more(stocked, staff):
    stocked.files["a/b"] = {"other.safetensors": BODY}
    job = run(pulls.start_pull(staff, "one"))
    assert job.message == "a/b has no split/one.safetensors. The manifest is out of date."
    del stocked.files["a/b"]
    assert run(pulls.start_pull(staff, "one")).message == "127.0.0.1 has no such file or repository."
    status = pull_status(staff, "one")
    assert (status.state, status.error) == ("error", "127.0.0.1 has no such file or repository.")


@pytest.mark.parametrize(
    "answer", ["[]", '{"siblings": [{}]}', '{"siblings": [{"rfilename": "split/one.safetensors"}]}', "<"]
)
def test_pull_from_something_that_is_no_hub(stocked, staff, monkeypatch, answer):
    from tests.models_registry.hub import Handler

    monkeypatch.setattr(Handler, "send_json", lambda self, _repository: self.send_text(200, answer))
    job = run(pulls.start_pull(staff, "one"))
    assert (job.status, "HF_ENDPOINT" in job.message) == (JobStatus.FAILED, True)


def test_pull_needs_space_above_the_floor(stocked, models, staff, settings):
    settings.DISK_FLOOR_BYTES = 10**18
    with pytest.raises(UserError, match="not enough space on the disk: 1\\.9\xa0MB are missing"):
        pulls.start_pull(staff, "one")
    assert Pull.objects.count() == 0
    settings.DISK_FLOOR_BYTES = 0
    pull = pulls.start_pull(staff, "one")
    settings.DISK_FLOOR_BYTES = 10**18
    job = run(pull)
    assert (job.status, "not enough space" in job.message) == (JobStatus.FAILED, True)
    assert list(models.rglob("*.safetensors")) == []


def test_progress_tells_speed_and_time_left(stocked, models, monkeypatch):
    told = []
    stocked.faults["split/one.safetensors"] = [{"after": 1_000_000, "waits": True}]

    def tell(done, total, message):
        told.append((done, total, message))
        if done == 1_000_000 and "/s" in message:
            stocked.go_on.set()

    monkeypatch.setattr(pulls, "LOOK_SECONDS", 0.02)
    files = pulls.perform(manifest.find("one"), "", tokens={}, tell=tell)
    assert files == [("vae/one.safetensors", len(BODY))]
    assert told[0] == (0, 2_000_000, "Asking for the list of files")
    with_speed = [row for row in told if "/s" in row[2]]
    assert with_speed[0][:2] == (1_000_000, 2_000_000)
    assert with_speed[0][2].endswith(" s left")


def test_cancel_keeps_what_has_arrived(stocked, models, staff, monkeypatch):
    """As the job's Progress does when somebody has asked to cancel."""
    stocked.faults["split/one.safetensors"] = [{"after": 1_000_000, "waits": True}]

    def tell(done, _total, _message):
        if done == 1_000_000:
            raise jobs.JobCancelled

    monkeypatch.setattr(pulls, "LOOK_SECONDS", 0.02)
    with pytest.raises(jobs.JobCancelled):
        pulls.perform(manifest.find("one"), "", tokens={}, tell=tell)
    assert (models / "vae" / "one.safetensors.part").read_bytes() == BODY[:1_000_000]
    assert run(pulls.start_pull(staff, "one")).status == JobStatus.SUCCEEDED
    assert stocked.requests_of("one.safetensors")[-1]["Range"] == "bytes=1000000-"


def test_one_file_that_fails_ends_the_others(stocked, models, monkeypatch):
    stocked.faults["unet/model.safetensors"] = [{"after": 1000, "waits": True}]
    stocked.faults["vae/model.safetensors"] = [{"body": bytes(1_000_000)}]
    with pytest.raises(UserError, match="arrived damaged"):
        pulls.perform(manifest.find("folder"), "", tokens={}, tell=lambda *_args: None)
    assert not (models / "diffusers/folder/unet/model.safetensors").exists()
    assert not (models / "diffusers/folder/vae/model.safetensors").exists()


@pytest.mark.django_db(transaction=True)
def test_killed_job_goes_on_and_the_file_is_the_same(stocked, models, staff, tmp_path):
    database = connections["default"].settings_dict
    if database["ENGINE"] != "django.db.backends.sqlite3":
        pytest.skip("The job's process opens the test's SQLite file.")
    stocked.faults["split/one.safetensors"] = [{"after": 1_200_000, "waits": True}]
    pull = pulls.start_pull(staff, "one")
    environment = os.environ | {
        "DATABASE_URL": f"sqlite:///{database['NAME']}",
        "LORAPILOT_WORKSPACE": str(django_settings.WORKSPACE),
        "DJANGO_SETTINGS_MODULE": "lorapilot.settings",
        "HF_ENDPOINT": stocked.address,
        "DOWNLOAD_LOCAL_HOSTS": f"{stocked.host},{stocked.storage_host}",
        "MODELS_MANIFEST": str(django_settings.MODELS_MANIFEST),
    }
    program = f"import django; django.setup(); from lorapilot.jobs import run_job; run_job('{pull.job_id}')"
    worker = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment)
    assert stocked.reached.wait(60)
    worker.send_signal(signal.SIGKILL)
    worker.wait(20)
    job = Job.objects.get(pk=pull.job_id)
    assert job.status == JobStatus.RUNNING
    assert not (models / "vae" / "one.safetensors").exists()
    kept = (models / "vae" / "one.safetensors.part").stat().st_size
    Job.objects.filter(pk=job.pk).update(heartbeat_at=timezone.now() - timedelta(minutes=1))
    assert jobs.restart_silent_jobs() == 1
    assert run(pull).status == JobStatus.SUCCEEDED
    assert (models / "vae" / "one.safetensors").read_bytes() == BODY
    assert stocked.requests_of("one.safetensors")[-1].get("Range") == (f"bytes={kept}-" if kept else None)
    assert [path.name for path in (models / "vae").iterdir()] == ["one.safetensors"]


# --- Who may, and licences --------------------------------------------------------------------------------------------
def test_pull_is_for_staff(stocked, alice):
    with pytest.raises(NotAllowed, match="Only staff can pull models"):
        pulls.start_pull(alice, "one")
    with pytest.raises(NotAllowed, match="Only staff can pull models"):
        pulls.cancel_pull(alice, "one")
    assert (Pull.objects.count(), Job.objects.count(), stocked.asked) == (0, 0, [])


def test_pull_of_an_unknown_model(stocked, staff):
    with pytest.raises(Missing):
        pulls.start_pull(staff, "nothing")
    with pytest.raises(Missing):
        pull_status(staff, "nothing")


@pytest.mark.parametrize("subdir", ["../out", "/abs", "a//b", ".hidden", "a\\b", "a/"])
def test_pull_into_an_impossible_folder(stocked, staff, subdir):
    with pytest.raises(UserError, match="The folder") as error:
        pulls.start_pull(staff, "one", subdir)
    assert (error.value.field, Pull.objects.count()) == ("subdir", 0)


def test_pull_twice_at_a_time_is_refused(stocked, staff):
    pulls.start_pull(staff, "one")
    with pytest.raises(Conflict, match="one is being pulled already"):
        pulls.start_pull(staff, "one")
    assert Job.objects.count() == 1


def test_cancel_before_it_has_begun(stocked, staff):
    pull = pulls.start_pull(staff, "one")
    pulls.cancel_pull(staff, "one")
    pull.job.refresh_from_db()
    assert (pull.job.status, pull_status(staff, "one").state) == (JobStatus.CANCELLED, "idle")
    with pytest.raises(Conflict, match="not being pulled"):
        pulls.cancel_pull(staff, "one")


def test_gated_model_is_explained_before_the_start(stocked, staff):
    with pytest.raises(UserError) as error:
        pulls.start_pull(staff, "gated")
    assert error.value.message == (
        "gated is gated. Accept its licence at https://huggingface.co/g/b with the account of your token, and set that "
        "token on your account page."
    )
    assert stocked.asked == []


def test_gated_model_with_a_token_that_has_not_accepted(stocked, staff):
    set_secret(staff, name="huggingface", value="hf_other")
    job = run(pulls.start_pull(staff, "gated"))
    assert job.status == JobStatus.FAILED
    assert job.message == (
        "gated is gated. Accept its licence at https://huggingface.co/g/b with the account of your token, then pull it "
        "again."
    )


def test_gated_model_with_its_token(stocked, models, staff):
    stocked.tokens.add("hf_good")
    set_secret(staff, name="huggingface", value="hf_good")
    assert run(pulls.start_pull(staff, "gated")).status == JobStatus.SUCCEEDED
    assert (models / "checkpoints" / "one.safetensors").read_bytes() == BODY
    assert {headers.get("Authorization") for server, _, headers in stocked.asked if server == "hub"} == {
        "Bearer hf_good"
    }
    assert {headers.get("Authorization") for server, _, headers in stocked.asked if server == "storage"} == {None}
    assert "hf_good" not in str(list(Job.objects.values())) + str(list(AuditEntry.objects.values()))


def test_model_that_has_become_gated_is_explained(stocked, staff):
    stocked.gated.add("a/b")
    job = run(pulls.start_pull(staff, "one"))
    assert "one is gated. Accept its licence at https://huggingface.co/a/b" in job.message


# --- Several, and what the list says ----------------------------------------------------------------------------------
def test_third_pull_waits_and_comes_back(stocked, staff, manifest_of):
    manifest_of(FILE, *(f"p{n}|hf_repo|a/folder|x{n}" for n in range(2)))
    others = [pulls.start_pull(staff, f"p{n}") for n in range(2)]
    Job.objects.update(status=JobStatus.RUNNING, heartbeat_at=timezone.now())
    pull = pulls.start_pull(staff, "one")
    job = run(pull)
    assert (job.status, job.message, job.lease) == (JobStatus.QUEUED, "Waits: 2 other models are being pulled.", None)
    Job.objects.filter(pk=others[0].job_id).update(status=JobStatus.FAILED, finished_at=timezone.now())
    assert run(pull).status == JobStatus.SUCCEEDED


def test_cancelled_pull_says_so_before_it_has_stopped(stocked, staff, client_of):
    pull = pulls.start_pull(staff, "one")
    Job.objects.update(status=JobStatus.RUNNING, message="Asking for the list of files")
    pulls.cancel_pull(staff, "one")
    status = pull_status(staff, "one")
    assert (status.state, status.last_line) == ("running", "Being cancelled")
    page = client_of(staff).get("/models/get/one/").content.decode()
    assert "Being cancelled" in page
    assert "Asking for the list" not in page
    Job.objects.filter(pk=pull.job_id).update(
        status=JobStatus.CANCELLED, message="Cancelled.", finished_at=timezone.now()
    )
    assert pull_status(staff, "one").last_line == "Cancelled."


def test_of_three_pulls_that_look_at_the_same_time_the_older_two_begin(stocked, staff, manifest_of):
    manifest_of(FILE, *(f"p{n}|hf_repo|a/folder|x{n}" for n in range(2)))
    first, second, third = (pulls.start_pull(staff, name) for name in ("p1", "one", "p0"))
    Job.objects.update(status=JobStatus.RUNNING, heartbeat_at=timezone.now(), message="")  # all claimed, none begun
    pulls._wait_for_others(first)
    pulls._wait_for_others(second)
    with pytest.raises(jobs.JobPostponed):
        pulls._wait_for_others(third)


def test_pull_waits_for_younger_ones_that_have_begun(stocked, staff, manifest_of):
    manifest_of(FILE, *(f"p{n}|hf_repo|a/folder|x{n}" for n in range(2)))
    pull, *_ = (pulls.start_pull(staff, name) for name in ("one", "p0", "p1"))
    Job.objects.exclude(pk=pull.job_id).update(status=JobStatus.RUNNING, heartbeat_at=timezone.now(), message="Pulling")
    assert run(pull).message == "Waits: 2 other models are being pulled."


def test_rows_of_what_somebody_copied_here(stocked, models, alice):
    assert [row.installed for row in manifest_rows(alice)] == [False, False, False]
    folder = models / "diffusers" / "folder"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    assert [row.installed for row in manifest_rows(alice)] == [False, False, False]
    (folder / "model.safetensors").write_bytes(b"1234")
    row = manifest_rows(alice)[1]
    assert (row.installed, row.size_bytes, row.target_path) == (True, 6, "diffusers/folder")
    (folder / "other.safetensors.part").write_bytes(b"1")
    assert not manifest_rows(alice)[1].installed


def test_rows_have_the_fields_that_clients_know(stocked, models, staff):
    row = manifest_rows(staff)[0]
    assert (row.name, row.kind, row.source, row.subdir, row.include) == (
        "one",
        "hf_file",
        "a/b:split/one.safetensors",
        "vae",
        "",
    )
    assert (row.expected_size_bytes, row.category, row.installed, row.size_bytes) == (2_000_000, "vae", False, 0)
    assert row.target_path == str(models / "vae" / "one.safetensors")


def test_rows_take_as_many_queries_for_three_models_as_for_one(stocked, staff, manifest_of, django_assert_num_queries):
    for lines in ([FILE], [FILE, FOLDER, GATED]):
        manifest_of(*lines)
        with django_assert_num_queries(2):
            assert len(manifest_rows(staff)) == len(lines)


@pytest.mark.parametrize(("seconds", "told"), [(5, "5 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h")])
def test_duration(seconds, told):
    assert pulls.duration(seconds) == told
