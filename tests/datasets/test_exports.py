"""Downloads and folders: what goes in comes out, byte for byte; names that every system can store."""

from __future__ import annotations

import io
import zipfile

import pytest
from django.test import AsyncClient

from datasets import exports, services
from lorapilot import jobs, workspace
from lorapilot.models import AuditEntry, Job, JobStatus

API = "/api/v1/datasets/"


def zipped(entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    file.seek(0)
    return file


def unzipped(content):
    """{name: bytes} of an archive, in its order; all of it readable."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def body(answer):
    return b"".join(answer.streaming_content)


def below(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def files(draw):
    return {
        "01.png": draw("red"),
        "01.txt": b"a red cat",
        "02.JPG": draw("blue", "JPEG"),
        "03.webp": draw("green", "WEBP", lossless=True),
        "03.txt": "ein grünes Kätzchen".encode(),
        "bär & co.jpeg": draw("white", "JPEG"),
    }


# --- Round trips -----------------------------------------------------------------------------------------------------
def test_archive_comes_out_as_it_went_in(dataset, files, alice, api_of):
    services.import_zip(dataset, path=zipped(files), filename="x.zip")
    answer = api_of(alice).get(f"{API}{dataset.pk}/export/")
    assert (answer.status_code, answer["Content-Type"]) == (200, "application/zip")
    assert answer["Content-Disposition"] == 'attachment; filename="Cats.zip"'
    first = body(answer)
    assert unzipped(first) == files
    other = services.create_dataset(alice, name="Other")
    services.import_zip(other, path=io.BytesIO(first), filename="x.zip")
    assert body(api_of(alice).get(f"{API}{other.pk}/export/")) == first


@pytest.mark.django_db(transaction=True)
def test_folders_of_kohya_come_out_as_they_went_in(dataset, files, alice, api_of):
    kohya = {f"10_Cats/{name}": content for name, content in list(files.items())[:3]}
    kohya |= {f"3_Cats/{name}": content for name, content in list(files.items())[3:]}
    given = [(f"mine/{name}", io.BytesIO(content)) for name, content in kohya.items()]
    services.import_files(dataset, files=given)
    assert unzipped(body(api_of(alice).get(f"{API}{dataset.pk}/export/?layout=kohya"))) == kohya
    answer = api_of(alice).post(f"{API}{dataset.pk}/export/")
    assert answer.status_code == 202
    jobs.run_job(answer.json()["id"])
    job = Job.objects.get()
    assert (job.status, job.result) == (JobStatus.SUCCEEDED, {"path": "datasets/exports/Cats"})
    assert below(workspace.datasets() / "exports" / "Cats") == kohya
    assert AuditEntry.objects.get().action == "dataset exported to a folder"


def test_folder_that_is_there_is_left_alone(dataset, add, alice):
    add("red")
    there = workspace.datasets() / "exports" / "Cats"
    there.mkdir(parents=True)
    (there / "mine.txt").write_text("mine")
    job = exports.start_folder_export(alice, dataset=dataset)
    jobs.run_job(str(job.pk))
    job.refresh_from_db()
    assert job.result == {"path": "datasets/exports/Cats-2"}
    assert below(there) == {"mine.txt": b"mine"}
    picture = dataset.pictures.get()
    exported = workspace.datasets() / "exports" / "Cats-2" / "1_Cats" / "red.png"
    assert exported.read_bytes() == services.picture_path(picture.sha256, "png").read_bytes()
    assert exported.stat().st_nlink == 1  # a copy: changing it reaches no dataset
    assert list((workspace.datasets() / "incoming").iterdir()) == []


def test_version_comes_out_as_it_was_pinned(dataset, add, alice, api_of):
    red, blue = add("red", "blue")
    version = services.pin_version(dataset)
    services.set_caption(red, caption="changed")
    services.delete_picture(blue)
    answer = api_of(alice).get(f"{API}{dataset.pk}/versions/{version.pk}/export/")
    found = unzipped(body(answer))
    assert answer["Content-Disposition"] == 'attachment; filename="Cats v1.zip"'
    assert sorted(found) == ["blue.png", "blue.txt", "red.png", "red.txt"]
    assert found["red.txt"] == b"a red picture"


@pytest.mark.django_db(transaction=True)
async def test_download_streams_under_asgi(dataset, alice, files):
    from asgiref.sync import sync_to_async

    await sync_to_async(services.import_zip)(dataset, path=zipped(files), filename="x.zip")
    client = AsyncClient()
    await client.aforce_login(alice)
    answer = await client.get(f"/datasets/{dataset.pk}/export/")
    pieces = [piece async for piece in answer.streaming_content]
    assert unzipped(b"".join(pieces)) == files
    assert len(pieces) > len(files)


def test_archive_is_written_in_pieces_of_bounded_size(tmp_path):
    large = tmp_path / "large"
    large.write_bytes(bytes(3 * exports.READ_BYTES + 1))
    files = [exports.Exported(f"{number}.png", large) for number in range(4)]
    pieces = list(exports.zip_stream(files))
    assert max(map(len, pieces)) < exports.READ_BYTES + 1000
    assert set(map(len, unzipped(b"".join(pieces)).values())) == {3 * exports.READ_BYTES + 1}


# --- Names -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "exported"),
    [
        ("cat.png", "cat.png"),
        ("CAT.PNG", "CAT.PNG"),
        ("cat", "cat.png"),
        ("cat.bmp", "cat.png"),
        ("cat.tar.png", "cat.tar.png"),
        (".hidden.png", "_hidden.png"),
        ("..png", "unnamed.png"),
        ("a:b*c?.png", "a_b_c_.png"),
        ("CON.png", "_CON.png"),
        ("aux.x.png", "_aux.x.png"),
        ("trailing. .png", "trailing.png"),
        ("猫.png", "猫.png"),
        ("x" * 250 + ".png", "x" * 200 + ".png"),
        ("é" * 120 + ".png", "é" * 100 + ".png"),
        ("abc\u202egnp.png", "abc_gnp.png"),
    ],
)
def test_names_can_be_stored_everywhere(dataset, add, name, exported):
    add("red")
    dataset.pictures.update(original_name=name, caption="")
    assert [file.path for file in exports.dataset_files(dataset, is_kohya=False)] == [exported]


def test_names_that_are_the_same_somewhere_get_numbers(dataset, add):
    names = ["cat.png", "CAT.png", "cat.jpg", "Bär.png", "Ba\u0308r.png"]
    for picture, name in zip(add("red", "green", "blue", "white", "black"), names, strict=True):
        type(picture).objects.filter(pk=picture.pk).update(original_name=name)
    found = [file.path for file in exports.dataset_files(dataset, is_kohya=False) if file.source]
    assert found == ["cat.png", "CAT_2.png", "cat_3.png", "Bär.png", "Ba\u0308r_2.png"]
    captions = {file.path: file.text for file in exports.dataset_files(dataset, is_kohya=False) if not file.source}
    assert captions["cat_3.txt"] == "a blue picture"


def test_picture_that_was_converted_has_the_ending_of_what_it_is(dataset, draw):
    services.import_files(dataset, files=[("cat.jpg", io.BytesIO(draw("red", "BMP")))])
    assert [file.path for file in exports.dataset_files(dataset, is_kohya=False)] == ["cat.png"]


# --- Who may, and what cannot be -------------------------------------------------------------------------------------
def test_downloads_are_for_those_who_see_the_dataset(dataset, add, alice, bob, charlie, api_of, client):
    add("red")
    version = services.pin_version(dataset)
    addresses = [f"{API}{dataset.pk}/export/", f"{API}{dataset.pk}/versions/{version.pk}/export/"]
    for address in addresses:
        assert [api_of(user).get(address).status_code for user in (alice, bob, charlie)] == [200, 200, 404]
        assert api_of(alice, "read").get(address).status_code == 200
        assert client.get(address).status_code == 401
        assert api_of(alice).delete(address).status_code == 405
        assert api_of(alice).get(f"{address}?layout=odd").status_code == 400
    assert [api_of(user).post(addresses[0]).status_code for user in (bob, charlie)] == [403, 404]
    assert api_of(alice, "read").post(addresses[0]).status_code == 403
    assert Job.objects.count() == 0


def test_dataset_without_pictures_has_no_download(dataset, alice, api_of):
    for ask in (api_of(alice).get, api_of(alice).post):
        answer = ask(f"{API}{dataset.pk}/export/")
        assert (answer.status_code, answer.json()["detail"]) == (404, "There are no pictures here to export.")


def test_picture_whose_file_is_gone_is_named_before_anything_is_sent(dataset, add, alice, api_of):
    red, _ = add("red", "blue")
    services.picture_path(red.sha256, "png").unlink()
    answer = api_of(alice).get(f"{API}{dataset.pk}/export/")
    told = "The file of red.png is gone from the server. Delete or upload the picture."
    assert (answer.status_code, answer.json()["detail"]) == (404, told)


def test_version_of_another_dataset_is_not_found(dataset, add, alice, client_of):
    add("red")
    version = services.pin_version(dataset)
    other = services.create_dataset(alice, name="Other")
    assert client_of(alice).get(f"/datasets/{other.pk}/versions/{version.pk}/export/").status_code == 404
    assert client_of(alice).get(f"/datasets/{dataset.pk}/versions/{version.pk}/export/").status_code == 200
