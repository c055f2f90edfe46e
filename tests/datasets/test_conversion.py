"""Pictures that trainers would read differently: what is changed, what is told, and what stays byte for byte."""

from __future__ import annotations

import hashlib
import io
import struct
import threading

import pytest
from PIL import Image, ImageChops, ImageCms

from datasets import pictures, services
from lorapilot.errors import UserError

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped_profile():
    """A valid RGB profile that shows red as green: sRGB with two entries of its tag table swapped."""
    raw = bytearray(SRGB)
    places = {}
    for number in range(struct.unpack(">I", raw[128:132])[0]):
        at = 132 + 12 * number
        places[bytes(raw[at : at + 4])] = at
    red, green = places[b"rXYZ"], places[b"gXYZ"]
    raw[red + 4 : red + 12], raw[green + 4 : green + 12] = raw[green + 4 : green + 12], raw[red + 4 : red + 12]
    return bytes(raw)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def four_colours(mode="RGB", size=(40, 20)):
    """Red, green, blue and white quarters: every turn of it is another picture."""
    image = Image.new("RGB", size, "white")
    width, height = size[0] // 2, size[1] // 2
    for colour, at in (("red", (0, 0)), ("green", (width, 0)), ("blue", (0, height))):
        image.paste(colour, (*at, at[0] + width, at[1] + height))
    return image.convert(mode)


@pytest.fixture
def imported(dataset):
    """imported(content): the stored picture's row and pixels, and the notes of its import."""

    def one(content, name="cat.png", **choices):
        files = [(name, io.BytesIO(content))]
        report = services.import_files(dataset, files=files, choices=services.ImportChoices(**choices))
        assert report.refused == []
        row = dataset.pictures.latest("pk")
        with Image.open(services.picture_path(row.sha256, row.extension)) as image:
            image.load()
        assert image.size == (row.width, row.height)
        return row, image, [note for _, note in report.notes]

    return one


def is_same(one, other, *, within=0):
    extrema = ImageChops.difference(one.convert("RGBA"), other.convert("RGBA")).getextrema()
    return one.size == other.size and max(highest for _, highest in extrema) <= within


# --- What stays ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "L", {}),
        ("PNG", "LA", {}),
        ("PNG", "P", {}),
        ("PNG", "1", {}),
        ("PNG", "RGB", {"icc_profile": SRGB}),
        ("JPEG", "RGB", {"icc_profile": SRGB}),
        ("JPEG", "L", {}),
        ("WEBP", "RGBA", {"lossless": True}),
    ],
)
def test_plain_picture_stays_byte_for_byte(imported, kind, mode, options):
    content = saved(four_colours(mode), kind, **options)
    row, _, notes = imported(content)
    assert (row.sha256, row.source_sha256) == (hashlib.sha256(content).hexdigest(),) * 2
    assert services.picture_path(row.sha256, row.extension).read_bytes() == content
    assert notes == []


@pytest.mark.parametrize("profile", [b"garbage", SRGB[:200], SRGB[:16] + b"GRAY" + SRGB[20:], bytes(5000)])
def test_profile_that_makes_no_sense_is_ignored_and_told(imported, profile):
    content = saved(four_colours(), "JPEG", icc_profile=profile)
    row, _, notes = imported(content)
    assert row.sha256 == hashlib.sha256(content).hexdigest()
    assert notes == ["Its colour profile is unreadable and was ignored."]


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"]
)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # it is corrupt, and Pillow says so
def test_exif_data_that_makes_no_sense_is_ignored(imported, exif):
    content = saved(four_colours(), "JPEG", exif=exif)
    row, _, notes = imported(content)
    assert (row.sha256, notes) == (hashlib.sha256(content).hexdigest(), [])


# --- What is changed -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("turn", range(2, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_turned_picture_is_stored_upright(imported, turn, kind):
    seen = four_colours()
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that gives the file's pixels
    exif = Image.Exif()
    exif[0x0112] = turn
    row, image, notes = imported(saved(seen.transpose(undo[turn]), kind, exif=exif))
    assert is_same(image, seen)
    assert (row.extension, row.original_name) == ("png", "cat.png")
    assert "exif" not in image.info
    assert notes[-1:] == (
        ["It was turned upright, as its EXIF data says."] if kind == "PNG" else ["TIFF was converted to PNG."]
    )


def test_colours_of_another_profile_become_srgb(imported):
    _row, image, notes = imported(
        saved(Image.new("RGBA", (8, 8), (200, 30, 30, 77)), "PNG", icc_profile=swapped_profile())
    )
    red, green, _, alpha = image.getpixel((0, 0))
    assert green > red + 100
    assert alpha == 77
    assert "icc_profile" not in image.info
    assert notes == ["Its colours were converted to sRGB."]


@pytest.mark.parametrize(("kind", "name"), [("BMP", "cat.bmp"), ("TIFF", "cat.tiff"), ("AVIF", "cat.avif")])
def test_other_kinds_become_png(imported, kind, name):
    seen = Image.new("RGB", (40, 20), (200, 40, 30)) if kind == "AVIF" else four_colours()  # it blurs edges
    content = saved(seen, kind, **({"quality": 100} if kind == "AVIF" else {}))
    row, image, notes = imported(content, name)
    assert is_same(image, seen, within=6 if kind == "AVIF" else 0)
    assert (row.extension, row.original_name, notes) == ("png", name, [f"{kind} was converted to PNG."])
    assert row.source_sha256 == hashlib.sha256(content).hexdigest()


def test_converted_picture_that_comes_again_is_known(dataset, imported):
    content = saved(four_colours(), "BMP")
    imported(content)
    again = services.import_files(dataset, files=[("copy.bmp", io.BytesIO(content))])
    assert (again.added, again.duplicates, dataset.pictures.count()) == ([], ["copy.bmp"], 1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight(imported, kind):
    deep = Image.frombytes("I;16", (4, 1), struct.pack("<4H", 0, 257, 32768, 65535))
    _, image, notes = imported(saved(deep, kind))
    assert (image.mode, [image.getpixel((x, 0)) for x in range(4)]) == ("L", [0, 1, 128, 255])
    assert "16 bits a channel were converted to 8." in notes


def test_cmyk_becomes_rgb(imported):
    _, image, notes = imported(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert image.mode == "RGB"
    assert is_same(image, Image.new("RGB", (8, 8), (255, 0, 0)), within=3)
    assert notes == ["CMYK was converted to RGB."]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF"])
def test_first_frame_of_several_is_taken_and_told(imported, kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    row, image, notes = imported(content)
    assert is_same(image, frames[0], within=6 if kind == "AVIF" else 0)
    assert (row.extension, notes[0]) == ("png", "It has several frames: the first was taken.")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_kept_or_filled_by_choice(dataset, imported, mode):
    image = Image.new("RGBA", (8, 8), (255, 255, 255, 0)).convert(mode)
    content = saved(image, "PNG", **({"transparency": 0} if mode == "P" else {}))
    row, kept, notes = imported(content)
    assert (row.sha256, kept.has_transparency_data, notes) == (hashlib.sha256(content).hexdigest(), True, [])
    row.delete()
    _, filled, notes = imported(content, flatten="#102030")
    assert (filled.mode, filled.getpixel((0, 0))) == ("RGB", (16, 32, 48))
    assert notes == ["Its transparency was filled with #102030."]


def test_opaque_picture_is_not_filled(imported):
    content = saved(four_colours("RGBA"), "PNG")
    row, _, notes = imported(content, flatten="#ffffff")
    assert (row.sha256, notes) == (hashlib.sha256(content).hexdigest(), [])


def test_pictures_are_decoded_together_up_to_the_pixels_of_one(settings):
    settings.MAX_PICTURE_PIXELS = 100
    decoding, came = pictures.Decoding(), threading.Event()

    def come(pixels):
        with decoding.admit(pixels):
            came.set()

    with decoding.admit(60), decoding.admit(40):
        assert decoding._pixels == 100
        another = threading.Thread(target=come, args=(1,))
        another.start()
        assert not came.wait(0.2)
    assert came.wait(10)
    another.join()
    assert decoding._pixels == 0
    with decoding.admit(1000):  # alone, whatever it has: its size is checked elsewhere
        assert decoding._pixels == 1000


@pytest.mark.parametrize("colour", ["white", "#fff", "#ffffff00", "#gggggg"])
def test_colour_that_is_none_is_refused(colour):
    with pytest.raises(UserError, match="six hexadecimal digits"):
        services.batches.checked_choices(flatten=colour)
