"""Uploads in chunks over the API: resumable, one writer at a time, imported by a job, forgotten after a week."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import threading
import time
import uuid
import zipfile
from datetime import timedelta

import pytest
from django.db import connection
from django.utils import timezone
from django_q.models import OrmQ
from PIL import Image

from datasets import pictures, services
from datasets.models import Dataset, Upload
from lorapilot import jobs, partials
from lorapilot.models import Job, JobStatus

URL = "/api/v1/uploads/"
CHUNK = "application/offset+octet-stream"
OLD = timedelta(days=7, minutes=1)


def begin(api, dataset, content=b"", **changes):
    """The address of a new upload."""
    asked = {"dataset": dataset.pk, "filename": "cat.png", "size": len(content)} | changes
    return f"{URL}{api.post(URL, asked).json()['id']}/"


def send(api, url, offset, chunk):
    return api.patch(url, chunk, content_type=CHUNK, headers={"Upload-Offset": str(offset)})


def sent_whole(api, dataset, content, **changes):
    """The address of an upload whose bytes have all arrived."""
    url = begin(api, dataset, content, **changes)
    assert send(api, url, 0, content).status_code == 200
    return url


def upload_at(url):
    return Upload.objects.get(pk=url.split("/")[-2])


def bytes_at(url):
    """What has arrived, as it lies on the disk; None without a file."""
    path = partials.partial_path(url.split("/")[-2])
    return path.read_bytes() if path.exists() else None


def run_job_of(url):
    jobs.run_job(str(upload_at(url).job_id))
    return upload_at(url).job


def zipped(*entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return file.getvalue()


@pytest.fixture
def api(alice, api_of):
    return api_of(alice)


# --- From the first byte to the picture -------------------------------------------------------------------------------
def test_start_tells_a_client_what_it_needs(dataset, alice, api):
    asked = {"dataset": dataset.pk, "filename": "/home/alice/cat.png", "size": 1000, "sha256": "AB" * 32}
    answer = api.post(URL, asked)
    upload = Upload.objects.get()
    assert (answer.status_code, answer["Upload-Offset"], answer["Cache-Control"]) == (201, "0", "no-store")
    assert answer.json() == {
        "id": str(upload.pk),
        "dataset": dataset.pk,
        "filename": "cat.png",
        "size": 1000,
        "offset": 0,
        "sha256": "ab" * 32,
        "chunk_bytes": 8 * 1024**2,
        "job": None,
        "created_at": answer.json()["created_at"],
        "finished_at": None,
    }
    assert (upload.owner, upload.dataset, upload.job) == (alice, dataset, None)


def test_pieces_become_a_file_and_the_job_a_picture(dataset, draw, api):
    content = draw("red")
    url = begin(api, dataset, content, sha256=hashlib.sha256(content).hexdigest())
    for first, last in ((0, 10), (10, 11), (11, 100)):
        answer = send(api, url, first, content[first:last])
        assert (answer.status_code, answer.content, answer["Upload-Offset"]) == (204, b"", str(last))
        shown = api.get(url)
        assert (shown.json()["offset"], shown["Upload-Offset"], bytes_at(url)) == (last, str(last), content[:last])
    assert (dataset.pictures.count(), Job.objects.count()) == (0, 0)
    answer = send(api, url, 100, content[100:])
    assert (answer.status_code, answer["Upload-Offset"]) == (200, str(len(content)))
    job = answer.json()["job"]
    assert (job["label"], job["owner"], job["status"]) == ("Import cat.png", "alice", "queued")
    assert (bytes_at(url), dataset.pictures.count()) == (content, 0)
    jobs.run_job(job["id"])
    picture = dataset.pictures.get()
    assert (picture.original_name, picture.sha256) == ("cat.png", hashlib.sha256(content).hexdigest())
    assert pictures.picture_path(picture.sha256, "png").read_bytes() == content
    shown = api.get(url).json()
    assert (shown["offset"], shown["job"]["status"]) == (len(content), "succeeded")
    assert shown["job"]["result"] == {"added": 1, "captioned": 0, "duplicates": 0, "refused": [], "notes": []}
    assert bytes_at(url) is None


def test_last_piece_hands_the_import_to_a_worker(dataset, draw, api, django_capture_on_commit_callbacks):
    with django_capture_on_commit_callbacks(execute=True):
        url = sent_whole(api, dataset, draw())
    task = OrmQ.objects.get()
    assert (task.key, task.task["func"]) == ("io", "lorapilot.jobs.run_job")
    assert task.task["args"] == (str(upload_at(url).job_id),)


def test_archive_goes_in_whole(dataset, draw, api):
    content = zipped(("a/1.png", draw("red")), ("a/1.txt", "red"), ("b/1.webp", draw("blue", "WEBP")))
    url = begin(api, dataset, content, filename="Cats.ZIP")
    for offset in range(0, len(content), 100):
        send(api, url, offset, content[offset : offset + 100])
    job = run_job_of(url)
    assert (job.status, job.message) == (JobStatus.SUCCEEDED, "")
    assert job.result == {"added": 2, "captioned": 0, "duplicates": 0, "refused": [], "notes": []}
    assert list(dataset.pictures.values_list("original_name", "caption")) == [("1.png", "red"), ("1.webp", "")]
    assert bytes_at(url) is None


def test_archive_that_is_refused_says_why_and_leaves_nothing(dataset, draw, add, api, everything):
    add("green")
    rows, files, staging = everything()
    url = sent_whole(api, dataset, zipped(("a.png", draw("red")), ("../b.png", draw("blue"))), filename="cats.zip")
    run_job_of(url)
    job = api.get(url).json()["job"]
    assert (job["status"], job["result"]) == ("failed", {})
    assert job["message"] == (
        "cats.zip: ../b.png: its name points outside of the archive. Create the archive again with plain names."
        " Nothing was imported."
    )
    after = everything()
    assert {name: after[0][name] for name in ("Dataset", "Picture")} == {
        name: rows[name] for name in ("Dataset", "Picture")
    }
    assert after[1:] == (files, staging)


def test_picture_that_is_refused_is_told_in_the_result(dataset, api):
    url = sent_whole(api, dataset, b"no picture")
    job = run_job_of(url)
    assert job.status == JobStatus.SUCCEEDED
    refused = [{"name": "cat.png", "reason": "This is not a PNG, JPEG, WebP, AVIF, BMP or TIFF picture."}]
    assert job.result == {"added": 0, "captioned": 0, "duplicates": 0, "refused": refused, "notes": []}
    assert (dataset.pictures.count(), bytes_at(url)) == (0, None)


def test_caption_file_goes_to_its_picture(dataset, add, api):
    add("red")
    run_job_of(sent_whole(api, dataset, b"another caption", filename="red.txt"))
    assert dataset.pictures.get().caption == "a red picture"
    run_job_of(sent_whole(api, dataset, b"another caption", filename="red.txt", replace_captions=True))
    assert dataset.pictures.get().caption == "another caption"


def test_path_and_choices_of_an_upload_reach_its_import(dataset, draw, api):
    see_through = draw((255, 0, 0, 0), "PNG", mode="RGBA")
    url = sent_whole(api, dataset, see_through, filename="my pictures/7_cat/a.png", flatten="#00FF00")
    assert (upload_at(url).filename, upload_at(url).options["folders"]) == ("a.png", ["my pictures", "7_cat"])
    job = run_job_of(url)
    assert job.result["notes"] == [{"name": "a.png", "reason": "Its transparency was filled with #00ff00."}]
    picture = dataset.pictures.get()
    assert (picture.original_name, picture.repeats) == ("a.png", 7)
    with Image.open(pictures.picture_path(picture.sha256, "png")) as stored:
        assert (stored.mode, stored.getpixel((0, 0))) == ("RGB", (0, 255, 0))


def test_piece_with_its_checksum_is_taken_and_a_damaged_one_is_not(dataset, api):
    url = begin(api, dataset, bytes(10))
    right = base64.b64encode(hashlib.sha256(b"abcd").digest()).decode()

    def send_sum(chunk, checksum):
        headers = {"Upload-Offset": "0", "Upload-Checksum": checksum}
        return api.patch(url, chunk, content_type=CHUNK, headers=headers)

    answer = send_sum(b"abce", f"sha256 {right}")
    assert (answer.status_code, answer["Upload-Offset"]) == (409, "0")
    assert answer.json()["detail"] == "The piece arrived damaged: its checksum differs. Send it again."
    assert send_sum(b"abcd", "md5 abc").status_code == 400
    assert upload_at(url).offset == 0
    assert send_sum(b"abcd", f"sha256 {right}").status_code == 204
    assert (upload_at(url).offset, bytes_at(url)) == (4, b"abcd")


# --- Trouble on the way -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("offset", [0, 3, 5, 10, 11, 10**18])
def test_piece_that_begins_elsewhere_is_told_the_right_place(dataset, api, offset):
    url = begin(api, dataset, bytes(10))
    send(api, url, 0, b"abcd")
    answer = send(api, url, offset, b"xy")
    assert (answer.status_code, answer["Upload-Offset"]) == (409, "4")
    assert answer.json() == {"detail": "4 bytes have arrived. Go on from there.", "offset": 4}
    assert (upload_at(url).offset, bytes_at(url)) == (4, b"abcd")


def test_piece_whose_answer_was_lost_is_not_written_twice(dataset, draw, api):
    content = draw()
    url = begin(api, dataset, content)
    send(api, url, 0, content[:50])
    assert send(api, url, 0, content[:50]).json() == {
        "detail": "50 bytes have arrived. Go on from there.",
        "offset": 50,
    }
    first = send(api, url, 50, content[50:])
    again = send(api, url, 50, content[50:])
    assert (again.status_code, again.json()) == (200, first.json())
    assert (Job.objects.count(), bytes_at(url)) == (1, content)
    run_job_of(url)
    late = send(api, url, 50, content[50:])
    assert (late.status_code, late.json()["job"]["status"]) == (200, "succeeded")
    assert (dataset.pictures.count(), Job.objects.count(), bytes_at(url)) == (1, 1, None)


def test_piece_that_breaks_off_is_sent_again(dataset, draw, api):
    content = draw()
    url = begin(api, dataset, content, sha256=hashlib.sha256(content).hexdigest())

    def breaks_off():
        yield b"half of the pie"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        services.append_chunk(upload_at(url), offset=0, chunk=breaks_off())
    assert api.get(url).json()["offset"] == 0
    assert send(api, url, 0, content).status_code == 200
    assert bytes_at(url) == content


def test_piece_without_bytes_changes_nothing(dataset, api):
    url = begin(api, dataset, bytes(10))
    answer = send(api, url, 0, b"")
    assert (answer.status_code, answer["Upload-Offset"], upload_at(url).offset) == (204, "0", 0)


def test_wrong_checksum_starts_the_upload_again(dataset, draw, api):
    content = draw()
    damaged = content[:-1] + b"x"
    url = begin(api, dataset, content, sha256=hashlib.sha256(content).hexdigest())
    send(api, url, 0, damaged[:100])
    answer = send(api, url, 100, damaged[100:])
    sentence = "The file arrived damaged: its checksum differs. Upload it again from the start."
    assert (answer.status_code, answer.json()) == (400, {"detail": sentence, "errors": {"sha256": [sentence]}})
    shown = api.get(url).json()
    assert (shown["offset"], shown["job"], shown["finished_at"]) == (0, None, None)
    assert Job.objects.count() == 0
    assert send(api, url, 100, content[100:]).status_code == 409
    send(api, url, 0, content[:100])
    assert send(api, url, 100, content[100:]).status_code == 200
    run_job_of(url)
    assert dataset.pictures.get().sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("value", [None, "", "-1", "1.0", "0x1", "٣", "one", "9" * 20, "9" * 5000])
def test_piece_without_a_proper_offset_is_refused(dataset, api, value):
    url = begin(api, dataset, bytes(10))
    answer = api.patch(url, b"abc", content_type=CHUNK, headers={} if value is None else {"Upload-Offset": value})
    sentence = "Send the header Upload-Offset: the place of the chunk's first byte."
    assert (answer.status_code, answer.json()) == (400, {"detail": sentence, "errors": {"offset": [sentence]}})
    assert (upload_at(url).offset, bytes_at(url)) == (0, None)


def test_piece_of_another_media_type_is_refused(dataset, api):
    url = begin(api, dataset, bytes(10))
    answer = api.patch(url, b"abc", content_type="application/octet-stream", headers={"Upload-Offset": "0"})
    assert (answer.status_code, upload_at(url).offset) == (415, 0)


# --- Limits -----------------------------------------------------------------------------------------------------------
def test_piece_beyond_the_end_is_refused(dataset, api):
    url = begin(api, dataset, bytes(10))
    send(api, url, 0, b"abcd")
    answer = send(api, url, 4, b"1234567")
    assert answer.status_code == 400
    assert answer.json() == {"detail": "The chunk has more than the 6 bytes that may come now. Send fewer."}
    assert (upload_at(url).offset, bytes_at(url)) == (4, b"abcd")


def test_piece_larger_than_a_request_is_refused(dataset, api, settings):
    settings.MAX_BODY_BYTES = 1000
    url = begin(api, dataset, bytes(5000))
    answer = send(api, url, 0, bytes(1001))
    assert answer.status_code == 400
    assert answer.json() == {"detail": "The chunk has more than the 1,000 bytes that may come now. Send fewer."}
    assert send(api, url, 0, bytes(1000)).status_code == 204
    assert upload_at(url).offset == 1000


@pytest.mark.parametrize(
    ("change", "field", "sentence"),
    [
        ({"filename": "cat.gif"}, "filename", "Upload a ZIP archive, a picture, or a caption file."),
        (
            {"filename": "a.zip.exe"},
            "filename",
            "Upload a ZIP archive, a picture, or a caption file.",
        ),
        ({"filename": ".."}, "filename", "Upload a ZIP archive, a picture, or a caption file."),
        ({"filename": ""}, "filename", "filename: This field may not be blank."),
        ({"size": 0}, "size", "size: Ensure this value is greater than or equal to 1."),
        ({"size": 20 * 1024**3 + 1}, "size", "A file has between 1 byte and 20 GiB. Split a larger archive."),
        ({"size": 10**30}, "size", "A file has between 1 byte and 20 GiB. Split a larger archive."),
        ({"size": "big"}, "size", "size: A valid integer is required."),
        ({"sha256": "abc"}, "sha256", "The checksum is not a sha256: 64 hexadecimal digits."),
        ({"sha256": "g" * 64}, "sha256", "The checksum is not a sha256: 64 hexadecimal digits."),
        ({"flatten": "white"}, "flatten", "Give the colour as six hexadecimal digits, such as #ffffff."),
        ({"replace_captions": "maybe"}, "replace_captions", "replace_captions: Must be a valid boolean."),
        ({"dataset": "Cats"}, "dataset", "dataset: A valid integer is required."),
    ],
)
def test_start_refuses_bad_input_and_changes_nothing(dataset, api, change, field, sentence):
    answer = api.post(URL, {"dataset": dataset.pk, "filename": "cat.png", "size": 10} | change)
    assert (answer.status_code, answer.json()["detail"], list(answer.json()["errors"])) == (400, sentence, [field])
    assert Upload.objects.count() == 0


def test_start_names_what_is_missing(dataset, api):
    answer = api.post(URL, {})
    assert (answer.status_code, list(answer.json()["errors"])) == (400, ["dataset", "filename", "size"])


@pytest.mark.parametrize("pk", [0, 10**30])
def test_start_for_no_dataset_is_not_found(dataset, api, pk):
    assert api.post(URL, {"dataset": pk, "filename": "cat.png", "size": 10}).status_code == 404
    assert Upload.objects.count() == 0


def test_start_without_room_on_the_disk_is_refused(dataset, api, monkeypatch):
    monkeypatch.setattr(partials, "SPARE_BYTES", 2**60)
    answer = api.post(URL, {"dataset": dataset.pk, "filename": "cat.png", "size": 10})
    sentence = "The server's disk has no room for this file. Ask the operator to free some."
    assert (answer.status_code, answer.json()) == (400, {"detail": sentence})
    assert Upload.objects.count() == 0


def test_start_with_a_hundred_unfinished_uploads_is_refused(dataset, alice, bob, api):
    options = {"dataset": dataset, "filename": "cat.png", "size": 10}
    Upload.objects.bulk_create(Upload(owner=alice, **options) for _ in range(99))
    Upload.objects.create(owner=alice, finished_at=timezone.now(), **options)
    Upload.objects.create(owner=bob, **options)
    asked = options | {"dataset": dataset.pk}
    assert [api.post(URL, asked).status_code for _ in range(2)] == [201, 409]
    assert api.post(URL, asked).json() == {
        "detail": "You have 100 unfinished uploads. Finish or cancel some first.",
    }
    assert Upload.objects.filter(owner=alice, finished_at=None).count() == 100


# --- Cancelling -------------------------------------------------------------------------------------------------------
def test_cancel_forgets_the_upload_and_its_bytes(dataset, api):
    url, other = begin(api, dataset, bytes(10)), begin(api, dataset, bytes(10))
    for address in (url, other):
        send(api, address, 0, b"abcd")
    assert api.delete(url).status_code == 204
    assert bytes_at(url) is None
    assert [api.get(url).status_code, send(api, url, 4, b"ef").status_code, api.delete(url).status_code] == [404] * 3
    assert (Upload.objects.get(), bytes_at(other)) == (upload_at(other), b"abcd")


def test_cancel_before_the_import_ends_its_job(dataset, draw, api):
    url = sent_whole(api, dataset, draw())
    job = upload_at(url).job
    assert api.delete(url).status_code == 204
    jobs.run_job(str(job.pk))
    job.refresh_from_db()
    assert (job.status, dataset.pictures.count(), bytes_at(url)) == (JobStatus.CANCELLED, 0, None)


def test_cancel_during_the_import_stops_it_and_changes_nothing(dataset, draw, api):
    url = sent_whole(api, dataset, zipped(("a.png", draw())), filename="cats.zip")
    job = upload_at(url).job
    Job.objects.update(cancel_requested_at=timezone.now())  # as jobs.cancel does while a worker has it
    jobs.run_job(str(job.pk))
    job.refresh_from_db()
    assert (job.status, dataset.pictures.count()) == (JobStatus.CANCELLED, 0)
    assert list(pictures.staging_root().iterdir()) == []


def test_deleted_dataset_takes_its_uploads_along(dataset, draw, api):
    unfinished, finished = begin(api, dataset, bytes(10)), sent_whole(api, dataset, draw())
    job = upload_at(finished).job
    send(api, unfinished, 0, b"abcd")
    services.delete_dataset(Dataset.objects.get())
    assert [api.get(url).status_code for url in (unfinished, finished)] == [404, 404]
    assert [bytes_at(url) for url in (unfinished, finished)] == [None, None]
    jobs.run_job(str(job.pk))
    job.refresh_from_db()
    assert (job.status, job.message) == (
        JobStatus.FAILED,
        "The uploaded file is no longer there. Look at the dataset, and upload what is missing.",
    )


# --- Workers that die -------------------------------------------------------------------------------------------------
def test_import_that_was_killed_at_its_end_starts_over_and_finds_its_work(dataset, draw, api, monkeypatch):
    url = sent_whole(api, dataset, zipped(("a.png", draw("red")), ("b.png", draw("blue"))), filename="cats.zip")

    def killed(_upload_id):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(partials, "remove_partial", killed)
        with pytest.raises(SystemExit):
            run_job_of(url)
    before = list(dataset.pictures.values())
    assert (len(before), upload_at(url).job.status) == (2, JobStatus.RUNNING)
    Job.objects.update(heartbeat_at=timezone.now() - timedelta(minutes=1))
    assert jobs.restart_silent_jobs() == 1
    job = run_job_of(url)
    assert (job.status, job.result["duplicates"], job.result["added"]) == (JobStatus.SUCCEEDED, 2, 0)
    assert (list(dataset.pictures.values()), bytes_at(url)) == (before, None)


# --- Who may ----------------------------------------------------------------------------------------------------------
def test_upload_does_not_exist_for_anybody_else(dataset, draw, api, bob, charlie, staff, api_of):
    url = begin(api, dataset, bytes(10))
    send(api, url, 0, b"abcd")
    before = Upload.objects.values().get()
    for user in (bob, charlie, staff):
        other = api_of(user)
        answers = [other.get(url), send(other, url, 4, b"ef"), other.delete(url)]
        assert [answer.status_code for answer in answers] == [404, 404, 404]
        assert answers[0].json() == {"detail": "There is no such thing, or it is not shared with you."}
    assert (Upload.objects.values().get(), bytes_at(url)) == (before, b"abcd")


def test_start_is_for_those_who_may_change_the_dataset(dataset, bob, charlie, staff, api_of):
    asked = {"dataset": dataset.pk, "filename": "cat.png", "size": 10}
    answers = [api_of(user).post(URL, asked) for user in (bob, charlie, staff)]
    assert [answer.status_code for answer in answers] == [403, 404, 201]
    assert answers[0].json() == {
        "detail": "Only the owner and staff can change this. Ask the owner, or make a copy of your own."
    }
    assert Upload.objects.get().owner == staff


def test_read_only_token_looks_and_changes_nothing(dataset, alice, api, api_of):
    url, reader = begin(api, dataset, bytes(10)), api_of(alice, "read")
    before = Upload.objects.values().get()
    assert reader.get(url).status_code == 200
    asked = {"dataset": dataset.pk, "filename": "cat.png", "size": 10}
    answers = [reader.post(URL, asked), send(reader, url, 0, b"abcd"), reader.delete(url)]
    sentence = "This token can only read. Create one with scope `write` on the account page."
    assert [(answer.status_code, answer.json()["detail"]) for answer in answers] == [(403, sentence)] * 3
    assert (Upload.objects.values().get(), bytes_at(url)) == (before, None)


def test_uploads_want_a_token_and_the_right_method(dataset, api, client):
    url = begin(api, dataset, bytes(10))
    assert [client.post(URL).status_code, client.get(url).status_code, client.delete(url).status_code] == [401] * 3
    assert [api.get(URL).status_code, api.delete(URL).status_code] == [405, 405]
    assert [api.post(url).status_code, api.put(url).status_code] == [405, 405]
    assert api.get(f"{URL}{uuid.uuid4()}/").status_code == 404
    assert api.get(f"{URL}x/").status_code == 404


# --- Two at once ------------------------------------------------------------------------------------------------------
@pytest.mark.django_db(transaction=True)
def test_of_several_writers_one_wins(dataset, alice, api, api_of):
    url = begin(api, dataset, bytes(400_000))
    start, answers = threading.Barrier(4), {}

    def write(letter, writer):
        start.wait()
        answers[letter] = send(writer, url, 0, letter * 300_000).status_code
        connection.close()

    threads = [threading.Thread(target=write, args=(letter, api_of(alice))) for letter in (b"a", b"b", b"c", b"d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers.values()) == [204, 409, 409, 409]
    (winner,) = [letter for letter, status in answers.items() if status == 204]
    assert (upload_at(url).offset, bytes_at(url)) == (300_000, winner * 300_000)


@pytest.mark.django_db(transaction=True)
def test_writer_that_comes_meanwhile_is_told_to_wait(dataset, api):
    url = begin(api, dataset, bytes(10))
    begun, go_on = threading.Event(), threading.Event()

    def slow():
        yield b"ab"
        begun.set()
        assert go_on.wait(20)
        yield b"cd"

    def write():
        services.append_chunk(upload_at(url), offset=0, chunk=slow())
        connection.close()

    first = threading.Thread(target=write)
    first.start()
    try:
        assert begun.wait(20)
        answer = send(api, url, 0, b"xyz")
    finally:
        go_on.set()
        first.join()
    assert (answer.status_code, answer["Upload-Offset"]) == (409, "0")
    assert answer.json() == {
        "detail": "Another request is writing to this upload. Ask for its offset, then go on there.",
        "offset": 0,
    }
    assert (upload_at(url).offset, bytes_at(url)) == (4, b"abcd")


@pytest.mark.django_db(transaction=True)
def test_finishing_several_times_at_once_gives_one_job(dataset, draw, api, monkeypatch):
    content = draw()
    url = begin(api, dataset, content, sha256=hashlib.sha256(content).hexdigest())
    services.append_chunk(upload_at(url), offset=0, chunk=[content])
    checksum, together, found = partials.hash_partial, threading.Barrier(4), []

    def all_at_once(upload_id):
        together.wait(20)  # nobody has queued the job before everybody is here
        return checksum(upload_id)

    def finish():
        found.append(services.finish_upload(upload_at(url)))
        connection.close()

    monkeypatch.setattr(partials, "hash_partial", all_at_once)
    threads = [threading.Thread(target=finish) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [Job.objects.get()] * 4
    assert upload_at(url).job == found[0]


# --- What nobody finished ---------------------------------------------------------------------------------------------
def made_long_ago(url):
    Upload.objects.filter(pk=upload_at(url).pk).update(created_at=timezone.now() - OLD)


def test_stale_uploads_go_after_seven_days(dataset, draw, api):
    stale, fresh, importing, ended = (begin(api, dataset, bytes(10)) for _ in range(4))
    for url in (stale, fresh, importing, ended):
        send(api, url, 0, b"abcd")
    for url, status in ((importing, JobStatus.RUNNING), (ended, JobStatus.FAILED)):
        finished_at = timezone.now() if status == JobStatus.FAILED else None
        job = Job.objects.create(kind="datasets.services.import_upload", status=status, finished_at=finished_at)
        Upload.objects.filter(pk=upload_at(url).pk).update(job=job)
    for url in (stale, importing, ended):
        made_long_ago(url)
    Upload.objects.filter(pk=upload_at(fresh).pk).update(created_at=timezone.now() - timedelta(days=6, hours=23))
    assert services.remove_stale_uploads() == 2
    assert set(Upload.objects.all()) == {upload_at(fresh), upload_at(importing)}
    assert [bytes_at(url) for url in (stale, fresh, importing, ended)] == [None, b"abcd", b"abcd", None]
    assert api.get(stale).status_code == 404
    assert services.remove_stale_uploads() == 0


def test_bytes_of_a_cancelled_import_go_at_once(dataset, draw, api):
    url = sent_whole(api, dataset, draw())
    jobs.cancel(upload_at(url).job)
    assert bytes_at(url) == draw()
    assert services.remove_stale_uploads() == 0
    assert (bytes_at(url), Upload.objects.count()) == (None, 1)


def test_files_that_nobody_knows_of_go_after_seven_days(dataset, workspace):
    pictures.staging_root().mkdir(parents=True)
    partials.uploads_root().mkdir(parents=True)
    old, young = [], []
    for found, age in ((old, OLD.total_seconds()), (young, OLD.total_seconds() - 3600)):
        folder = pictures.staging_root() / str(uuid.uuid4())
        folder.mkdir()
        (folder / "picture").write_bytes(b"x")
        partial, foreign = partials.partial_path(uuid.uuid4()), partials.uploads_root() / f".nfs{len(old)}{len(young)}"
        found += [folder, partial, foreign]
        for path in (partial, foreign):
            path.write_bytes(b"x")
        for path in found:
            os.utime(path, (time.time() - age,) * 2)
    assert services.remove_stale_uploads() == 0
    assert [path.exists() for path in old] == [False] * 3
    assert [path.exists() for path in young] == [True] * 3


def test_nothing_to_clean_in_an_empty_workspace(dataset, workspace):
    assert services.remove_stale_uploads() == 0
