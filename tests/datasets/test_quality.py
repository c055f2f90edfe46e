"""What the report finds: on real pictures, and the same buckets as the trainer's."""

from __future__ import annotations

import io
import json
import random
import string

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from PIL import Image, ImageDraw, ImageEnhance

from datasets import checking, fingerprints, lint, pictures, quality, services
from datasets.caption_operations import has_word
from datasets.models import DatasetVersion, Picture
from lora_trainer import config, data
from lora_trainer.buckets import BucketRules, rules_in_proportion
from lorapilot.errors import Conflict, UserError
from lorapilot.jobs import run_job
from lorapilot.models import Job


def scene(seed, size=(640, 480)):
    """A picture of some shapes, different for each seed."""
    chance = random.Random(seed)
    colour = lambda: tuple(chance.randrange(256) for _ in range(3))  # noqa: E731
    image = Image.new("RGB", size, colour())
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        left, top = chance.randrange(size[0]), chance.randrange(size[1])
        box = left, top, left + chance.randrange(30, 250), top + chance.randrange(30, 250)
        getattr(draw, chance.choice(["ellipse", "rectangle"]))(box, fill=colour())
    return image


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def put(dataset, **images):
    """put(dataset, cat=image): a picture cat.png, or that of bytes as they are."""
    files = [
        (f"{name}.png", saved(image) if isinstance(image, Image.Image) else image) for name, image in images.items()
    ]
    services.import_files(dataset, files=files)
    return [dataset.pictures.get(original_name=f"{name}.png") for name in images]


def check(dataset, **options):
    job = checking.check_dataset(dataset, actor=dataset.owner, **options)
    run_job(str(job.pk))
    job.refresh_from_db()
    assert job.status == "succeeded", job.message
    return job.result


def report(dataset, rules=None):
    return quality.report_on(dataset.owner, dataset, rules or rules_in_proportion(256))


# --- What looks alike -------------------------------------------------------------------------------------------------
def test_near_duplicates_are_grouped_and_others_are_not(dataset):
    first, second = scene(1), scene(2)
    copy = Image.open(saved(first, "JPEG", quality=50))
    cut = first.crop((6, 5, 634, 475))
    made = put(
        dataset,
        first=first,
        other=second,
        smaller=first.resize((320, 240)),
        jpeg=saved(first, "JPEG", quality=40),
        brighter=ImageEnhance.Brightness(copy).enhance(1.04),
        cut=cut,
        other_smaller=second.resize((400, 300)),
        **{f"stranger{seed}": scene(seed) for seed in range(3, 20)},
    )
    assert report(dataset).unchecked == len(made)
    assert check(dataset) == {"checked": len(made), "unreadable": 0}
    found = report(dataset)
    names = [[picture.original_name for picture in group] for group in found.alike]
    assert names == [
        ["first.png", "smaller.png", "jpeg.png", "brighter.png", "cut.png"],
        ["other.png", "other_smaller.png"],
    ]
    assert (found.unchecked, found.counts["alike"]) == (0, 2)


def test_flat_pictures_are_told_apart_by_their_colour(dataset):
    put(dataset, red=Image.new("RGB", (64, 64), "red"), blue=Image.new("RGB", (64, 64), "blue"))
    put(dataset, also_red=Image.new("RGB", (80, 64), "red"))
    check(dataset)
    assert [[picture.original_name for picture in group] for group in report(dataset).alike] == [
        ["red.png", "also_red.png"]
    ]


def test_groups_of_many_are_those_of_comparing_each_with_each():
    chance = random.Random(5)
    made = []
    for _ in range(60):
        bits, colour = chance.getrandbits(128), chance.randbytes(3).hex()
        made += [f"{bits ^ (1 << chance.randrange(128)) ^ (1 << chance.randrange(128)):032x}{colour}" for _ in range(3)]
    made += ["", "", made[0], made[0]]
    chance.shuffle(made)

    def near(one, other):
        bits = (int(one[:32], 16) ^ int(other[:32], 16)).bit_count()
        levels = zip(bytes.fromhex(one[32:]), bytes.fromhex(other[32:]), strict=True)
        return bits <= fingerprints.MOST_BITS and all(abs(a - b) <= fingerprints.MOST_COLOUR for a, b in levels)

    expected = {place: {place} for place, text in enumerate(made) if text}
    for place in sorted(expected):
        for other in range(place):
            if made[other] and near(made[place], made[other]) and expected[place] is not expected[other]:
                expected[other] |= expected[place]
                for member in expected[other]:
                    expected[member] = expected[other]
    groups = {tuple(sorted(group)) for group in expected.values() if len(group) > 1}
    assert set(fingerprints.alike(tuple(made))) == groups
    assert len(groups) >= 40


def test_grouping_ten_thousand_finds_the_planted_pairs():
    chance = random.Random(6)
    made = [f"{chance.getrandbits(128):032x}{chance.randbytes(3).hex()}" for _ in range(9_990)]
    made += [f"{int(text[:32], 16) ^ 0b1011:032x}{text[32:]}" for text in made[:10]]
    assert fingerprints.alike(tuple(made)) == tuple((place, 9_990 + place) for place in range(10))


def test_keep_one_keeps_the_picture_and_the_caption_that_were_chosen(dataset):
    one, other, third = put(dataset, one=scene(1), other=scene(1).resize((320, 240)), third=scene(3))
    for picture in (one, other, third):
        services.set_caption(picture, caption=f"of {picture.original_name}")
    before = checking.keep_one(dataset, pictures=[one.pk, other.pk], keep=one.pk, caption_of=other.pk)
    assert list(dataset.pictures.values_list("pk", "caption")) == [
        (one.pk, "of other.png"),
        (third.pk, "of third.png"),
    ]
    assert {listed["caption"] for listed in before.pictures} == {"of one.png", "of other.png", "of third.png"}


@pytest.mark.parametrize(
    ("chosen", "keep", "caption_of", "error"),
    [
        ((0,), 0, 0, UserError),
        ((0, 1), 2, 0, UserError),
        ((0, 1), 0, 2, UserError),
        ((0, 3), 0, 3, Conflict),
        ((0, 4), 0, 0, Conflict),
    ],
)
def test_keep_one_refuses_what_is_no_choice(dataset, alice, chosen, keep, caption_of, error):
    made = put(dataset, a=scene(1), b=scene(2), c=scene(3))
    made += put(services.create_dataset(alice, name="Other"), d=scene(4))
    ids = [*(picture.pk for picture in made), 2**70]
    rows = list(Picture.objects.values())
    with pytest.raises(error):
        checking.keep_one(dataset, pictures=[ids[i] for i in chosen], keep=ids[keep], caption_of=ids[caption_of])
    assert (list(Picture.objects.values()), DatasetVersion.objects.count()) == (rows, 0)


# --- Files ------------------------------------------------------------------------------------------------------------
def test_unreadable_files_are_found_and_mended_ones_are_no_longer(dataset):
    good, lost, hurt = put(dataset, good=scene(1), lost=scene(2), hurt=scene(3))
    file = pictures.picture_path(hurt.sha256, "png")
    content = file.read_bytes()
    file.write_bytes(content[:-20])
    pictures.picture_path(lost.sha256, "png").unlink()
    pictures.thumbnail_path(lost.sha256).unlink()
    assert check(dataset) == {"checked": 3, "unreadable": 2}
    found = {picture.original_name: picture.fault for picture in report(dataset).unreadable}
    assert found == {"lost.png": "missing", "hurt.png": "damaged"}
    file.write_bytes(content)
    assert check(dataset) == {"checked": 0, "unreadable": 0}
    assert check(dataset, again=True) == {"checked": 3, "unreadable": 1}
    assert [picture.pk for picture in report(dataset).unreadable] == [lost.pk]
    good.refresh_from_db()
    assert (len(good.fingerprint), good.fault) == (38, "")


def test_check_goes_on_once(dataset, alice, bob):
    put(dataset, good=scene(1))
    job = checking.check_dataset(dataset, actor=alice)
    assert checking.check_dataset(dataset, actor=bob) == job
    run_job(str(job.pk))
    assert checking.check_dataset(dataset, actor=bob) != job
    assert Job.objects.count() == 2


def test_tiny_pictures_are_those_with_fewer_pixels_than_are_trained(dataset):
    sizes = {"square": (256, 256), "small": (255, 256), "strip": (1024, 100), "wide": (512, 256)}
    put(dataset, **{name: scene(1, size) for name, size in sizes.items()})
    assert {picture.original_name for picture in report(dataset).tiny} == {"small.png", "strip.png"}
    assert len(report(dataset, rules_in_proportion(1024)).tiny) == 4
    assert {picture.original_name for picture in report(dataset, rules_in_proportion(64)).tiny} == set()


def test_same_file_in_other_datasets_of_the_user_is_told_and_in_those_of_others_is_not(dataset, alice, charlie):
    put(dataset, here=scene(1), alone=scene(2))
    for owner, name in ((alice, "Second"), (alice, "First"), (charlie, "Secret")):
        put(services.create_dataset(owner, name=name), copy=scene(1))
    found = report(dataset).elsewhere
    assert [(picture.original_name, names) for picture, names in found] == [("here.png", ["First", "Second"])]
    assert quality.report_on(charlie, dataset, rules_in_proportion(256)).elsewhere[0][1] == ["Secret"]


# --- Buckets ----------------------------------------------------------------------------------------------------------
RULES = [
    rules_in_proportion(64),
    rules_in_proportion(512),
    rules_in_proportion(512, enabled=False),
    BucketRules((512, 512), enabled=True, minimum=256, maximum=768, step=64, no_upscale=True),
    BucketRules((256, 256), enabled=True, minimum=64, maximum=1024, step=32),
]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_bucket_preview_is_what_the_trainer_does(dataset, tmp_path, rules):
    sizes = [(640, 480), (480, 640), (1000, 300), (300, 1000), (512, 512), (40, 40), (70, 50), (1024, 1000), (333, 777)]
    for number, size in enumerate(sizes):
        put(dataset, **{string.ascii_lowercase[number]: scene(number, size)})
    turned = scene(50, (400, 300))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held upright
    services.import_files(dataset, files=[("turned.jpg", saved(turned, "JPEG", exif=exif))])
    manifest = tmp_path / "pictures.jsonl"
    paths = {str(pictures.picture_path(p.sha256, p.extension)): p.pk for p in dataset.pictures.all()}
    manifest.write_text("".join(json.dumps({"image": path, "caption": "x"}) + "\n" for path in paths))
    trained = data.read_dataset(
        config.TrainingConfig(
            pretrained_model_name_or_path="unused",
            dataset_manifest=str(manifest),
            output_dir=str(tmp_path),
            resolution=rules.resolution,
            enable_bucket=rules.enabled,
            min_bucket_reso=rules.minimum,
            max_bucket_reso=rules.maximum,
            bucket_reso_steps=rules.step,
            bucket_no_upscale=rules.no_upscale,
        )
    )
    found = report(dataset, rules)
    expected = {paths[str(picture.path)]: picture.placement for picture in trained.pictures}
    assert {one.picture.pk: one.placement for one in found.placed if one.placement} == expected
    assert {one.picture.pk for one in found.dropped} == {paths[str(path)] for path in trained.dropped}
    assert {bucket.size: len(bucket.placed) for bucket in found.buckets} == dict(trained.bucket_counts())
    if rules.no_upscale:
        assert (len(found.dropped), len(found.enlarged)) == (2, 0)


def test_part_and_scale_of_a_placed_picture():
    picture = Picture(width=400, height=100)
    (placed,) = quality._placed([picture], rules_in_proportion(512, enabled=False))
    assert (placed.scale, placed.part) == (5.12, (150, 0, 100, 100))
    assert placed.lost_percent == pytest.approx(75)


# --- Captions ---------------------------------------------------------------------------------------------------------
def test_lint_finds_what_is_wrong_with_captions():
    found = lint.lint(
        [
            "ohwx, 1girl, 2girls, day",
            "1girl, day, night_sky, night, red hair",
            "",
            "OHWX, cat, cat, Dog, dog",
            "ohwxish, cat, " + ", ".join(f"word{letter}" for letter in string.ascii_lowercase * 2),
        ],
        trigger_word="ohwx",
    )
    assert found.empty == [2]
    assert found.without_trigger == [1, 4]
    assert found.contradictory == [(0, "1girl", "2girls"), (1, "day", "night")]
    assert found.repeated[0] == (3, ["cat", "dog"])
    assert [place for place, _ in found.long] == [4]
    assert found.in_all == []


def test_lint_tells_what_never_varies():
    tags = [f"ohwx, {one}, red hair, smile" for one in ("cat", "dog", "cow")]
    assert lint.lint(tags, trigger_word="ohwx").in_all == ["red hair", "smile"]
    sentences = [f"a photo of ohwx, the woman {one}" for one in ("in a garden", "on a sofa", "by the sea")]
    assert lint.lint(sentences, trigger_word="ohwx").in_all == ["photo", "woman"]
    assert lint.lint(sentences[:2], trigger_word="ohwx").in_all == []
    assert lint.lint(["ohwx red", "ohwx blue", "ohwx green"], trigger_word="ohwx").in_all == []


def test_lint_finds_the_trigger_word_as_a_word():
    assert has_word("a photo of OHWX, smiling", "ohwx")
    assert has_word("my (cat+dog) here", "(cat+dog)")
    assert not has_word("ohwxy", "ohwx")


@pytest.mark.parametrize(("caption", "tokens"), [("", 0), ("a cat", 3), ("1girl, solo", 5), ("…!", 1)])
def test_tokens_are_estimated(caption, tokens):
    assert lint.about_tokens(caption) == tokens


# --- Cost -------------------------------------------------------------------------------------------------------------
def test_report_asks_the_database_as_often_for_one_picture_as_for_many(dataset):
    def queries():
        with CaptureQueriesContext(connection) as captured:
            quality.as_dict(report(dataset))
        return len(captured)

    put(dataset, a=scene(1))
    check(dataset)
    one = queries()
    put(dataset, b=scene(2), c=scene(3), d=scene(1).resize((320, 240)))
    check(dataset)
    assert (queries(), one) == (2, 2)
