"""Folders of Kohya's kind in the workspace: found, shown to staff, and copied without being touched."""

from __future__ import annotations

import os

import pytest

from datasets import adoption, services
from datasets.models import Dataset
from lorapilot import jobs, workspace
from lorapilot.models import AuditEntry, Job

URL = "/api/v1/datasets/found/"
STAFF_ONLY = "Only staff adopt folders of the server. Ask one of them, or upload the folder."


@pytest.fixture
def folder(workspace, draw):
    """1_my cat: two pictures, a caption, a deeper folder with repeats, and what is passed over."""
    made = workspace / "datasets" / "1_my cat"
    (made / "5_close").mkdir(parents=True)
    (made / "red.png").write_bytes(draw("red"))
    (made / "red.txt").write_text("a red cat")
    (made / "5_close" / "blue.png").write_bytes(draw("blue"))
    (made / ".DS_Store").write_bytes(b"x")
    (made / "notes.md").write_text("x")
    (made / "link.png").symlink_to("/etc/hostname")
    (made / "elsewhere").symlink_to("/etc")
    os.mkfifo(made / "pipe.png")
    for other in ("cats", "2024_trip", "exports/1_x"):
        (workspace / "datasets" / other).mkdir(parents=True)
    (workspace / "datasets" / "3_link").symlink_to(made)
    return made


def state(folder):
    return {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


FOUND = {"folder": "1_my cat", "name": "my cat", "repeats": 1, "pictures": 2, "captions": 1}


def test_found_folder_is_adopted_and_stays_as_it_is(folder, staff, alice, api_of):
    before, api = state(folder), api_of(staff)
    assert api.get(URL).json() == [FOUND]
    answer = api.post(URL, {"folder": "1_my cat", "owner": "alice"})
    dataset = Dataset.objects.get()
    assert (answer.status_code, answer.json()["dataset"], answer.json()["name"]) == (201, dataset.pk, "my cat")
    assert (dataset.owner, dataset.adopted_from, dataset.pictures.count()) == (alice, "1_my cat", 0)
    jobs.run_job(answer.json()["job"]["id"])
    job = Job.objects.get()
    assert (job.result["added"], job.result["refused"]) == (
        2,
        [{"name": "1_my cat/notes.md", "reason": services.batches.FOREIGN}],
    )
    assert list(dataset.pictures.order_by("original_name").values_list("original_name", "caption", "repeats")) == [
        ("blue.png", "", 5),
        ("red.png", "a red cat", 1),
    ]
    red = dataset.pictures.get(original_name="red.png")
    stored = services.picture_path(red.sha256, "png")
    assert stored.read_bytes() == (folder / "red.png").read_bytes()
    assert stored.stat().st_nlink == 1
    assert state(folder) == before
    assert AuditEntry.objects.get().action == "folder adopted as a dataset"
    assert api.get(URL).json() == []


def test_adopting_twice_makes_one_dataset(folder, staff, api_of):
    api = api_of(staff)
    answers = [api.post(URL, {"folder": "1_my cat"}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 409]
    assert answers[1].json()["detail"] == "There is a dataset of this folder already."
    assert (Dataset.objects.get().owner, Job.objects.count()) == (staff, 1)


def test_job_that_starts_over_finds_its_work(folder, staff):
    dataset, job = adoption.adopt_folder(staff, folder="1_my cat")
    jobs.run_job(str(job.pk))
    before = list(dataset.pictures.values())
    again = adoption.import_folder(lambda *_: None, dataset_id=dataset.pk)
    assert (again["added"], again["duplicates"]) == (0, 2)
    assert list(dataset.pictures.values()) == before


def test_name_that_is_taken_gets_a_number(folder, staff):
    services.create_dataset(staff, name="My Cat")
    assert adoption.adopt_folder(staff, folder="1_my cat")[0].name == "my cat-2"


@pytest.mark.parametrize(("folder_name", "name"), [("7_Ünï/x", "n"), ("7_猫", "adopted"), ("7_..", "adopted")])
def test_name_that_no_dataset_may_have_is_changed(workspace, staff, folder_name, name):
    (workspace / "datasets" / folder_name).mkdir(parents=True)
    (found,) = adoption.found_folders(staff)
    assert (found.name, found.repeats, found.pictures) == (name, 7, 0)
    dataset, job = adoption.adopt_folder(staff, folder=found.folder)
    jobs.run_job(str(job.pk))
    job.refresh_from_db()
    assert (dataset.name, job.status, job.message) == (name, "failed", "The folder is empty, or gone.")


@pytest.mark.parametrize(
    "name", ["", "..", "../datasets/1_my cat", "/etc", "1_no such", "cats", "2024_trip", "3_link", "1_my cat/5_close"]
)
def test_only_found_folders_are_adopted(folder, staff, api_of, name):
    assert api_of(staff).post(URL, {"folder": name}).status_code in (400, 404)
    assert Dataset.objects.count() == 0


def test_found_folders_are_for_staff(folder, alice, staff, api_of, client_of, client):
    assert [api_of(alice).get(URL).status_code, api_of(alice).post(URL, {"folder": "1_my cat"}).status_code] == [
        403
    ] * 2
    assert api_of(alice).get(URL).json() == {"detail": STAFF_ONLY}
    assert [client.get(URL).status_code, client.post(URL).status_code] == [401, 401]
    assert api_of(staff).put(URL).status_code == 405
    assert api_of(staff).post(URL, {"folder": "1_my cat", "owner": "nobody"}).status_code == 400
    assert client_of(alice).post("/datasets/adopt/", {"folder": "1_my cat"}).status_code == 403
    assert client_of(alice).get("/datasets/found/").status_code == 403
    assert b"Folders on the server" not in client_of(alice).get("/datasets/").content
    assert Dataset.objects.count() == 0


def test_page_shows_folders_and_adopts_with_one_click(folder, staff, client_of, monkeypatch):
    browser = client_of(staff)
    with monkeypatch.context() as without:
        without.setattr(adoption, "_files_of", None)  # the page itself looks at no file
        content = browser.get("/datasets/").content.decode()
    assert ('<strong class="mono">1_my cat</strong>' in content, 'hx-get="/datasets/found/"' in content) == (True, True)
    content = browser.get("/datasets/found/").content.decode()
    assert "hx-get" not in content
    assert '<strong class="mono">1_my cat</strong> <span class="muted small">2 pictures, 1 caption</span>' in content
    answer = browser.post("/datasets/adopt/", {"folder": "1_my cat"})
    dataset = Dataset.objects.get()
    assert (answer.status_code, answer.url) == (302, f"/datasets/{dataset.pk}/")
    assert Job.objects.get().arguments == {"dataset_id": dataset.pk}
    assert b"Folders on the server" not in browser.get("/datasets/").content


def test_folder_that_is_gone_fails_with_a_sentence(folder, staff):
    _, job = adoption.adopt_folder(staff, folder="1_my cat")
    folder.rename(workspace.datasets() / "moved")
    jobs.run_job(str(job.pk))
    job.refresh_from_db()
    assert (job.status, job.message) == ("failed", "The folder is empty, or gone.")
