"""Turning and cropping: real pixels, the uploaded file untouched, and back."""

from __future__ import annotations

import io
import os

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.urls import reverse
from PIL import Image

from datasets import edits, pictures, selectors, services
from datasets.edit_services import edit_picture
from datasets.models import Picture
from lorapilot.errors import Conflict, Missing, UserError

COLOURS = ["red", "lime", "blue", "white"]


def quarters(size=(64, 48)):
    """Red and lime above, blue and white below."""
    image = Image.new("RGB", size)
    half = size[0] // 2, size[1] // 2
    for number, colour in enumerate(COLOURS):
        image.paste(colour, (number % 2 * half[0], number // 2 * half[1], size[0], size[1]))
    return image


def content_of(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def put(dataset):
    def stored(name="q.png", content=None):
        files = [(name, io.BytesIO(content or content_of(quarters())))]
        services.import_files(dataset, files=files)
        return dataset.pictures.get(original_name=name)

    return stored


def image_of(picture):
    with Image.open(pictures.picture_path(picture.sha256, picture.extension)) as image:
        return image.convert("RGB").copy()


def corners(image):
    right, bottom = image.width - 1, image.height - 1
    names = {(255, 0, 0): "red", (0, 255, 0): "lime", (0, 0, 255): "blue", (255, 255, 255): "white"}
    return [names[image.getpixel(place)] for place in ((0, 0), (right, 0), (0, bottom), (right, bottom))]


@pytest.mark.parametrize(
    ("rotation", "size", "seen"),
    [
        (90, (48, 64), ["blue", "red", "white", "lime"]),
        (180, (64, 48), ["white", "blue", "lime", "red"]),
        (270, (48, 64), ["lime", "white", "red", "blue"]),
    ],
)
def test_turned_picture_is_turned_clockwise_and_comes_back(put, rotation, size, seen):
    picture = put()
    before = Picture.objects.values("sha256", "extension", "width", "height", "bytes").get()
    original = pictures.picture_path(picture.sha256, "png").read_bytes()
    edit_picture(picture, rotation=rotation, crop=None)
    assert ((picture.width, picture.height), corners(image_of(picture))) == (size, seen)
    assert picture.edit == {"rotation": rotation, "crop": None, "original": before}
    assert pictures.thumbnail_path(picture.sha256).exists()
    edit_picture(picture, rotation=0, crop=None)
    assert Picture.objects.values("sha256", "extension", "width", "height", "bytes").get() == before
    assert picture.edit is None
    assert pictures.picture_path(picture.sha256, "png").read_bytes() == original


def test_cropped_picture_has_exactly_those_pixels_of_the_turned_one(put):
    picture = put()
    edit_picture(picture, rotation=90, crop=(8, 4, 30, 40))
    expected = quarters().transpose(Image.Transpose.ROTATE_270).crop((8, 4, 38, 44))
    assert image_of(picture).tobytes() == expected.tobytes()
    assert (picture.width, picture.height) == (30, 40)
    edit_picture(picture, rotation=0, crop=(0, 0, 32, 24))  # of the uploaded one, not of the cropped one
    assert corners(image_of(picture)) == ["red"] * 4


def test_picture_of_an_upright_camera_is_cropped_as_it_is_seen(put):
    image = quarters()
    exif = image.getexif()
    exif[0x0112] = 6
    picture = put("camera.jpg", content_of(image, "JPEG", exif=exif, quality=100, subsampling=0))
    assert (picture.width, picture.height) == (48, 64)
    edit_picture(picture, rotation=0, crop=(0, 0, 24, 64))
    upright = image.transpose(Image.Transpose.ROTATE_270)
    left = [upright.getpixel((0, 0)), upright.getpixel((0, 63))]
    found = image_of(picture)
    for expected, place in zip(left, [(0, 0), (0, 63)], strict=True):
        assert max(abs(a - b) for a, b in zip(expected, found.getpixel(place), strict=True)) < 4
    with Image.open(pictures.picture_path(picture.sha256, "png")) as edited:
        assert edited.getexif().get(0x0112) is None


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK"])
def test_every_kind_of_picture_can_be_turned(put, mode):
    kind, name = ("JPEG", "x.jpg") if mode == "CMYK" else ("PNG", "x.png")
    picture = put(name, content_of(quarters().convert(mode), kind))
    edit_picture(picture, rotation=90, crop=None)
    with Image.open(pictures.picture_path(picture.sha256, "png")) as image:
        assert (image.size, image.mode) == ((48, 64), "RGB" if mode == "CMYK" else mode)


@pytest.mark.parametrize(
    ("rotation", "crop", "message"),
    [
        (45, None, "A picture is turned by 0, 90, 180 or 270 degrees."),
        (0, (0, 0, 15, 40), "A side has at least 16 pixels: choose a larger part."),
        (0, (40, 0, 25, 20), "The part reaches beyond the picture, which has 64 × 48 pixels."),
        (90, (0, 40, 20, 25), "The part reaches beyond the picture, which has 48 × 64 pixels."),
        (0, (-1, 0, 20, 20), "The part reaches beyond the picture, which has 64 × 48 pixels."),
    ],
)
def test_edits_that_cannot_be_are_refused(put, everything, rotation, crop, message):
    picture = put()
    before = everything()
    with pytest.raises(UserError) as refused:
        edit_picture(picture, rotation=rotation, crop=crop)
    assert refused.value.message == message
    assert everything() == before


def test_edit_of_what_somebody_else_edited_meanwhile_is_refused(put):
    picture = put()
    stale = Picture.objects.get()
    edit_picture(picture, rotation=90, crop=None)
    with pytest.raises(Conflict):
        edit_picture(stale, rotation=180, crop=None)
    assert Picture.objects.get().edit["rotation"] == 90


def test_edit_that_makes_a_picture_of_the_dataset_is_refused(put, dataset):
    picture = put()
    edit_picture(picture, rotation=180, crop=None)
    content = pictures.picture_path(picture.sha256, "png").read_bytes()
    edit_picture(picture, rotation=0, crop=None)
    put("same.png", content)
    with pytest.raises(Conflict, match="looks exactly like this"):
        edit_picture(picture, rotation=180, crop=None)
    assert dataset.pictures.get(pk=picture.pk).edit is None


def test_edit_without_the_file_says_so(put):
    picture = put()
    pictures.picture_path(picture.sha256, "png").unlink()
    with pytest.raises(Missing):
        edit_picture(picture, rotation=90, crop=None)
    assert Picture.objects.get().edit is None


def test_version_pins_the_edited_picture_and_both_files_stay(put, dataset, monkeypatch):
    picture = put()
    root = picture.sha256
    edit_picture(picture, rotation=90, crop=None)
    (listed,) = services.pin_version(dataset).pictures
    assert (listed["sha256"], listed["edit"]["original"]["sha256"]) == (picture.sha256, root)
    (file,) = selectors.version_files(dataset.versions.get())
    assert file["image"] == str(pictures.picture_path(picture.sha256, "png").resolve())
    monkeypatch.setattr(pictures, "UNUSED_SECONDS", -1)
    services.delete_dataset(dataset)
    assert services.remove_unused_pictures() == 0
    assert pictures.picture_path(root, "png").exists()


def test_uploading_the_original_again_is_a_duplicate(put, dataset):
    picture = put()
    content = pictures.picture_path(picture.sha256, "png").read_bytes()
    edit_picture(picture, rotation=90, crop=None)
    report = services.import_files(dataset, files=[("again.png", SimpleUploadedFile("again.png", content))])
    assert (report.duplicates, dataset.pictures.count()) == (["again.png"], 1)


def test_deleted_picture_comes_back_with_its_edit(put, dataset):
    picture = edit_picture(put(), rotation=90, crop=(0, 0, 20, 20))
    for file in pictures.workspace.datasets().glob("pictures/??/*"):
        os.utime(file, (0, 0))
    before = Picture.objects.values("sha256", "edit", "width", "caption").get()
    deleted = services.delete_picture(picture)
    assert services.remove_unused_pictures() == 0
    restored = services.restore_picture(dataset, deleted=deleted)
    assert Picture.objects.values("sha256", "edit", "width", "caption").get() == before
    edit_picture(restored, rotation=0, crop=None)
    assert (restored.width, restored.height) == (64, 48)


@pytest.mark.parametrize("degrees", [90, 180, 270, 360])
def test_box_goes_along_when_the_picture_is_turned(degrees):
    image, box = quarters((60, 40)), (10, 5, 25, 20)
    image.putpixel((10, 5), (9, 9, 9))
    left, top, width, height = edits.turned_box(box, image.size, degrees)
    turned = edits.turned(image, degrees % 360).crop((left, top, left + width, top + height))
    expected = edits.turned(image.crop((10, 5, 35, 25)), degrees % 360)
    assert turned.tobytes() == expected.tobytes()


# --- Pages and API ----------------------------------------------------------------------------------------------------
def page_of(picture):
    return reverse("datasets:picture-edit", args=[picture.dataset_id, picture.pk])


def test_page_crops_turns_further_and_undoes(put, alice, client_of):
    picture, browser = put(), client_of(alice)
    assert browser.get(page_of(picture)).status_code == 200
    fields = {"rotation": "0", "left": "0", "top": "0", "width": "32", "height": "24"}
    answer = browser.post(page_of(picture), fields)
    assert (answer.status_code, answer.url) == (302, page_of(picture))
    picture.refresh_from_db()
    assert corners(image_of(picture)) == ["red"] * 4
    browser.post(page_of(picture), {"turn": "90"})
    picture.refresh_from_db()
    assert (picture.edit["rotation"], picture.edit["crop"]) == (90, [24, 0, 24, 32])
    assert corners(image_of(picture)) == ["red"] * 4
    browser.post(page_of(picture), {"turn": "270"})
    picture.refresh_from_db()
    assert (picture.edit["rotation"], picture.edit["crop"]) == (0, [0, 0, 32, 24])
    browser.post(page_of(picture), {"undo": "1"})
    picture.refresh_from_db()
    assert picture.edit is None


def test_page_shows_what_is_wrong(put, alice, client_of):
    picture, browser = put(), client_of(alice)
    fields = {"rotation": "0", "left": "60", "top": "0", "width": "32", "height": "24"}
    for wrong in (fields, fields | {"width": "wide"}, fields | {"rotation": "45"}, {}):
        assert browser.post(page_of(picture), wrong).status_code == 400
    assert "reaches beyond the picture" in browser.post(page_of(picture), fields).content.decode()
    assert Picture.objects.get().edit is None


def test_pages_of_edits_are_not_there_for_strangers_and_closed_to_the_team(put, bob, charlie, client_of, client):
    picture = put()
    unedited = reverse("datasets:unedited", args=[picture.dataset_id, picture.pk])
    assert [client_of(charlie).get(address).status_code for address in (page_of(picture), unedited)] == [404, 404]
    assert client_of(charlie).post(page_of(picture), {"turn": "90"}).status_code == 404
    assert [client_of(bob).get(address).status_code for address in (page_of(picture), unedited)] == [403, 200]
    assert client_of(bob).post(page_of(picture), {"turn": "90"}).status_code == 403
    assert [client.get(address).status_code for address in (page_of(picture), unedited)] == [302, 302]
    assert client_of(bob).post(unedited).status_code == 405
    assert client_of(bob).put(page_of(picture)).status_code == 405
    assert Picture.objects.get().edit is None


def test_unedited_picture_is_shown_turned_and_whole(put, alice, client_of):
    picture = edit_picture(put(), rotation=90, crop=(0, 0, 20, 20))
    address = reverse("datasets:unedited", args=[picture.dataset_id, picture.pk])
    for query, size in (({}, (64, 48)), ({"rotation": "90"}, (48, 64)), ({"rotation": "45"}, (64, 48))):
        answer = client_of(alice).get(address, query)
        assert (answer["Content-Type"], Image.open(io.BytesIO(answer.content)).size) == ("image/webp", size)
        assert client_of(alice).get(address, query, headers={"If-None-Match": answer["ETag"]}).status_code == 304
    pictures.picture_path(picture.edit["original"]["sha256"], "png").unlink()
    assert client_of(alice).get(address).status_code == 404


def test_edited_picture_is_not_shown_from_the_cache(put, alice, client_of):
    picture, browser = put(), client_of(alice)
    address = reverse("datasets:thumbnail", args=[picture.dataset_id, picture.pk])
    first = browser.get(address)
    edit_picture(picture, rotation=90, crop=None)
    again = browser.get(address, headers={"If-None-Match": first["ETag"]})
    assert (again.status_code, Image.open(io.BytesIO(again.content)).size) == (200, (48, 64))


def test_api_of_edits(put, alice, bob, charlie, api_of):
    picture = put()
    address = f"/api/v1/datasets/{picture.dataset_id}/pictures/{picture.pk}/edit/"
    assert api_of(bob).get(address).json() == {"rotation": 0, "crop": None}
    answer = api_of(alice).put(address, {"rotation": 90, "crop": [0, 0, 20, 30]}, format="json")
    assert (answer.status_code, answer.json()["width"], answer.json()["height"]) == (200, 20, 30)
    assert api_of(bob).get(address).json() == {"rotation": 90, "crop": [0, 0, 20, 30]}
    wrong = [{"rotation": 1}, {"crop": [1]}, {"crop": [0, 0, 900, 900]}, {"crop": "all"}]
    assert [api_of(alice).put(address, body, format="json").status_code for body in wrong] == [400] * 4
    for user, status in ((bob, 403), (charlie, 404)):
        assert api_of(user).put(address, {"rotation": 180}, format="json").status_code == status
        assert api_of(user).delete(address).status_code == status
    assert api_of(charlie).get(address).status_code == 404
    assert api_of(alice).post(address).status_code == 405
    picture.refresh_from_db()
    assert picture.edit["rotation"] == 90
    assert api_of(alice).delete(address).json()["width"] == 64
    assert Picture.objects.get().edit is None
