import itertools
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image, features

from lora_trainer import config
from lora_trainer.data import BatchOrder, read_dataset, split_validation
from lora_trainer.errors import DatasetError
from lora_trainer.lora_metadata import tag_frequency
from lora_trainer.picture_files import picture_size, upright_rgb


def settings(**changes):
    return config.from_table(
        {"pretrained_model_name_or_path": "/model", "output_dir": "/out", "resolution": 64} | changes
    )


def picture(path, size=(64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


def manifest(folder, *rows, **changes):
    path = folder / "set.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return settings(dataset_manifest=str(path), **changes)


def test_manifest_is_read_with_captions_and_repeats(tmp_path):
    one, two = picture(tmp_path / "1.png"), picture(tmp_path / "2.png", (64, 128))
    dataset = read_dataset(
        manifest(tmp_path, {"image": str(one), "caption": " a, b\n", "repeats": 3}, {"image": str(two), "caption": "b"})
    )
    assert [(p.path, p.caption, p.repeats, p.size) for p in dataset.pictures] == [
        (one, "a, b", 3, (64, 64)),
        (two, "b", 1, (64, 128)),
    ]
    assert dataset.images_per_epoch == 4
    assert dataset.notices == []
    assert tag_frequency(dataset.pictures) == {"dataset": {"a": 1, "b": 2}}


def test_kohya_folders_are_read_and_others_reported(tmp_path):
    picture(tmp_path / "10_face" / "a.png")
    (tmp_path / "10_face" / "a.txt").write_text("a face\n")
    picture(tmp_path / "2_house" / "b.jpg")
    picture(tmp_path / "loose" / "c.png")
    dataset = read_dataset(settings(train_data_dir=str(tmp_path)))
    assert [(p.path.name, p.caption, p.repeats, p.group) for p in dataset.pictures] == [
        ("a.png", "a face", 10, "10_face"),
        ("b.jpg", "house", 2, "2_house"),
    ]
    assert [notice.code for notice in dataset.notices] == ["folder_ignored", "caption_missing"]
    assert "loose" in dataset.notices[0].message
    assert dataset.notices[1].message == "No caption file: b.jpg. They are trained with the name of their folder."


def test_empty_caption_is_trained_and_reported(tmp_path):
    picture(tmp_path / "1_face" / "a.png")
    (tmp_path / "1_face" / "a.txt").write_text("\n")
    dataset = read_dataset(settings(train_data_dir=str(tmp_path)))
    assert dataset.pictures[0].caption == ""
    assert [notice.message for notice in dataset.notices] == ["No caption: a.png. They are trained with an empty one."]


def test_first_line_of_a_caption_is_trained_and_the_rest_reported(tmp_path):
    picture(tmp_path / "1_face" / "a.png")
    (tmp_path / "1_face" / "a.txt").write_text("\ufeffa face \r\nwith a smile\r\n", encoding="utf-8")
    row = {"image": str(picture(tmp_path / "b.png")), "caption": "a house\nby night"}
    folder, lines = read_dataset(settings(train_data_dir=str(tmp_path))), read_dataset(manifest(tmp_path, row))
    assert [folder.pictures[0].caption, lines.pictures[0].caption] == ["a face", "a house"]
    assert [notice.code for notice in folder.notices + lines.notices] == ["caption_lines", "caption_lines"]


def test_caption_extension_is_used(tmp_path):
    picture(tmp_path / "1_face" / "a.png")
    (tmp_path / "1_face" / "a.caption").write_text("a face")
    dataset = read_dataset(settings(train_data_dir=str(tmp_path), caption_extension=".caption"))
    assert [p.caption for p in dataset.pictures] == ["a face"]


def test_empty_dataset_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="has no pictures to train on"):
        read_dataset(settings(train_data_dir=str(tmp_path)))


def test_unreadable_picture_is_named(tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    with pytest.raises(DatasetError, match=r"bad\.png cannot be read; replace or remove it"):
        read_dataset(manifest(tmp_path, {"image": str(bad)}))


def test_zero_byte_picture_is_named(tmp_path):
    (tmp_path / "nothing.jpg").touch()
    with pytest.raises(DatasetError, match=r"nothing\.jpg cannot be read; replace or remove it"):
        read_dataset(manifest(tmp_path, {"image": str(tmp_path / "nothing.jpg")}))


def test_gigantic_picture_is_named(tmp_path):
    Image.new("1", (21_000, 10_000)).save(tmp_path / "poster.png")
    with pytest.raises(DatasetError, match=r"poster\.png has too many pixels to be read safely; make it smaller"):
        picture_size(tmp_path / "poster.png")


def test_truncated_picture_is_named(tmp_path):
    path = picture(tmp_path / "torn.png", (300, 300))
    path.write_bytes(path.read_bytes()[:-40])
    assert picture_size(path) == (300, 300)
    with pytest.raises(DatasetError, match=r"torn\.png is damaged"):
        upright_rgb(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about what it can read around
def test_damage_anywhere_in_a_file_is_named_or_does_no_harm(tmp_path):
    """Whatever Pillow stumbles over: never an exception of its own."""
    sentences = []
    for ending in ("jpg", "png", "webp", "bmp", "tiff"):
        whole = picture(tmp_path / f"whole.{ending}", (40, 30)).read_bytes()
        torn = tmp_path / f"torn.{ending}"
        for place in range(0, len(whole), max(1, len(whole) // 40)):
            for damaged in (whole[:place], whole[:place] + b"\xff\x00\xff" + whole[place + 3 :]):
                torn.write_bytes(damaged)
                sentences.append(refusal(torn))
    assert all(torn in (sentence or torn) for torn, sentence in sentences)
    assert sum(bool(sentence) for _, sentence in sentences) > len(sentences) / 3


def refusal(path):
    try:
        picture_size(path)
        upright_rgb(path)
    except DatasetError as error:
        return path.name, str(error)
    return path.name, ""


def test_missing_picture_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"gone\.png does not exist"):
        read_dataset(manifest(tmp_path, {"image": str(tmp_path / "gone.png")}))


@pytest.mark.parametrize(
    "row",
    [
        "{", "[]", '{"image": 3}', '{"image": "a.png", "repeats": 0}', '{"image": "a", "caption": 1}',
        '{"image": "a", "regularisation": 1}',
    ],
)  # fmt: skip
def test_bad_manifest_line_is_named(tmp_path, row):
    (tmp_path / "set.jsonl").write_text("\n" + row)
    with pytest.raises(DatasetError, match=r"^Line 2 of .*set\.jsonl"):
        read_dataset(settings(dataset_manifest=str(tmp_path / "set.jsonl")))


def test_turned_photograph_is_upright(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 128)).save(path, exif=exif)
    dataset = read_dataset(manifest(tmp_path, {"image": str(path), "caption": "x"}))
    assert dataset.pictures[0].size == (128, 64) == upright_rgb(path).size


def test_exif_behind_the_content_of_a_png_is_ignored_by_both_readers(tmp_path):
    path, exif = tmp_path / "late.png", Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 128)).save(path, exif=exif)
    early = path.read_bytes()
    start = early.index(b"eXIf") - 4
    chunk = early[start : start + 12 + int.from_bytes(early[start : start + 4], "big")]
    assert picture_size(path) == (128, 64) == upright_rgb(path).size
    path.write_bytes(early.replace(chunk, b"").replace(early[-12:], chunk + early[-12:]))
    assert picture_size(path) == (64, 128) == upright_rgb(path).size


def test_sixteen_bit_grey_keeps_its_tones(tmp_path):
    tones = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(tones).save(tmp_path / "deep.png")
    read = np.asarray(upright_rgb(tmp_path / "deep.png"))
    assert np.array_equal(read, np.repeat((tones >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_picture_of_floating_point_numbers_is_refused(tmp_path):
    Image.fromarray(np.zeros((64, 64), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(DatasetError, match=r"float\.tiff has more than 16 bits a pixel and colour"):
        upright_rgb(tmp_path / "float.tiff")


@pytest.mark.parametrize("ending", ["png", "jpg", "JPEG", "webp", "bmp", "tif", "tiff", "avif"])
def test_every_known_kind_of_picture_is_read(tmp_path, ending):
    if ending == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    picture(tmp_path / "1_face" / f"a.{ending}", (72, 64))
    dataset = read_dataset(settings(train_data_dir=str(tmp_path)))
    assert [one.size for one in dataset.pictures] == [(72, 64)]
    assert upright_rgb(dataset.pictures[0].path).getpixel((9, 9))[0] > 240


def test_dropped_picture_is_reported(tmp_path):
    picture(tmp_path / "1_face" / "a.png")
    picture(tmp_path / "1_face" / "b.png", (20, 64))
    changes = {"enable_bucket": True, "bucket_no_upscale": True, "min_bucket_reso": 64}
    dataset = read_dataset(settings(train_data_dir=str(tmp_path), **changes))
    assert [path.name for path in dataset.dropped] == ["b.png"]
    assert dataset.notices[0].message == "b.png (20x64) is smaller than one bucket step and was left out."


def test_batch_order_uses_each_picture_as_often_as_it_repeats_and_keeps_buckets_apart(tmp_path):
    wide, square = picture(tmp_path / "w.png", (128, 32)), picture(tmp_path / "s.png")
    path = tmp_path / "set.jsonl"
    rows = [{"image": str(wide), "repeats": 3, "caption": "w"}, {"image": str(square), "repeats": 5, "caption": "s"}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    changes = {"enable_bucket": True, "min_bucket_reso": 32, "bucket_reso_steps": 32}
    order = BatchOrder(read_dataset(settings(dataset_manifest=str(path), **changes)), 2, seed=1)
    batches = order.epoch(0)
    assert len(batches) == order.batches_per_epoch == 5
    assert sorted(itertools.chain(*batches)) == [0] * 3 + [1] * 5
    assert all(len(set(batch)) == 1 for batch in batches)


def plain_dataset(folder, count, **changes):
    rows = [{"image": str(distinct(folder / f"{index}.png", index)), "caption": "x"} for index in range(count)]
    return read_dataset(manifest(folder, *rows, **changes))


def distinct(path, index):
    Image.new("RGB", (64, 64), (index, 7, 7)).save(path)
    return path


def test_batch_order_is_a_function_of_seed_and_epoch(tmp_path):
    dataset = plain_dataset(tmp_path, 7)
    order, again, other = (BatchOrder(dataset, 2, seed) for seed in (1, 1, 2))
    assert order.epoch(3) == again.epoch(3)
    assert len({json.dumps(one.epoch(number)) for one in (order, other) for number in range(4)}) == 8


@pytest.mark.parametrize("world_size", [2, 3, 5, 9])
def test_processes_share_the_batches_of_an_epoch(tmp_path, world_size):
    dataset = plain_dataset(tmp_path, 9)
    alone = BatchOrder(dataset, 2, 1).epoch(0)
    parts = [BatchOrder(dataset, 2, 1, rank, world_size) for rank in range(world_size)]
    each = -(-5 // world_size)
    assert [part.batches_per_epoch for part in parts] == [each] * world_size
    dealt = list(itertools.chain(*zip(*(part.epoch(0) for part in parts), strict=True)))
    assert dealt == [*alone, *alone][: each * world_size]


# --- regularisation ---------------------------------------------------------------------------------------------------


def with_regularisation(folder, training, *groups):
    """`training` uses of one picture, and a folder of (repeats, pictures) for each group."""
    picture(folder / "train" / f"{training}_sks face" / "t.png")
    for number, (repeats, count) in enumerate(groups):
        for index in range(count):
            picture(folder / "reg" / f"{repeats}_face{number}" / f"{index}.png")
    return settings(train_data_dir=str(folder / "train"), reg_data_dir=str(folder / "reg"))


@pytest.mark.parametrize(
    ("training", "groups", "repeats"),
    [
        (7, [(1, 3)], [3, 2, 2]),  # 1 1 1 are 3; 2 2 2 are 6; one more for the first
        (6, [(1, 3)], [2, 2, 2]),
        (3, [(1, 3)], [1, 1, 1]),
        (2, [(1, 3)], [1, 1]),  # more than enough: the third is not used
        (5, [(3, 3)], [3, 3]),  # 3 are too few, 6 are enough
        (9, [(1, 2), (3, 1)], [3, 2, 4]),  # 1 1 3 are 5; 2 2 4 are 8; one more for the first
        (1, [(10, 1)], [10]),
    ],
)
def test_regularisation_pictures_are_used_as_often_as_the_others(tmp_path, training, groups, repeats):
    dataset = read_dataset(with_regularisation(tmp_path, training, *groups))
    assert [(one.is_regularisation, one.repeats) for one in dataset.pictures] == [
        (False, training),
        *((True, number) for number in repeats),
    ]
    unused = sum(count for _, count in groups) - len(repeats)
    assert [notice.code for notice in dataset.notices] == ["caption_missing"] + ["regularisation_unused"] * bool(unused)
    assert {one.caption for one in dataset.pictures[1:]} <= {"face0", "face1"}


def test_manifest_names_regularisation_pictures(tmp_path):
    rows = [{"image": str(picture(tmp_path / f"{index}.png")), "caption": "x", "repeats": 2} for index in range(3)]
    dataset = read_dataset(manifest(tmp_path, rows[0] | {"regularisation": True}, *rows[1:]))
    assert [(one.path.name, one.repeats, one.is_regularisation) for one in dataset.pictures] == [
        ("1.png", 2, False),
        ("2.png", 2, False),
        ("0.png", 4, True),
    ]


def test_regularisation_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "reg").mkdir()
    with pytest.raises(DatasetError, match=r"reg has no regularisation pictures\. Add some"):
        read_dataset(with_regularisation(tmp_path, 1))


def test_regularisation_pictures_alone_are_no_dataset(tmp_path):
    row = {"image": str(picture(tmp_path / "a.png")), "regularisation": True}
    with pytest.raises(DatasetError, match="has no pictures to train on"):
        read_dataset(manifest(tmp_path, row))


# --- validation -------------------------------------------------------------------------------------------------------


def split(folder, count, **changes):
    changes = {"validation_split": 0.2} | changes
    dataset = plain_dataset(folder, count, **changes)
    train, kept_out = split_validation(dataset, settings(dataset_manifest="x", **changes))
    assert sorted([*train.pictures, *kept_out.pictures], key=dataset.pictures.index) == dataset.pictures
    return train, {one.path.name for one in kept_out.pictures}


@pytest.mark.parametrize(
    ("count", "share", "kept_out"), [(20, 0.2, 4), (20, 0.01, 1), (3, 0.5, 2), (2, 0.5, 1), (7, 0.3, 2)]
)
def test_share_of_the_pictures_is_kept_out(tmp_path, count, share, kept_out):
    assert len(split(tmp_path, count, validation_split=share)[1]) == kept_out


def test_nothing_is_kept_out_unless_asked(tmp_path):
    dataset = plain_dataset(tmp_path, 3)
    train, kept_out = split_validation(dataset, settings(dataset_manifest="x"))
    assert train is dataset
    assert kept_out.pictures == []


def test_only_picture_cannot_be_kept_out(tmp_path):
    with pytest.raises(DatasetError, match="only one picture"):
        split(tmp_path, 1)


def test_choice_follows_the_seed_and_not_the_names(tmp_path):
    chosen = split(tmp_path, 20)[1]
    assert split(tmp_path, 20)[1] == chosen
    assert split(tmp_path, 20, validation_seed=42)[1] == chosen  # 42 is the default seed
    assert split(tmp_path, 20, seed=1, validation_seed=42)[1] == chosen
    assert len({frozenset(split(tmp_path, 20, seed=seed)[1]) for seed in range(5)}) == 5
    for index in range(20):
        (tmp_path / f"{index}.png").rename(tmp_path / f"renamed{19 - index}.png")
    rows = [{"image": str(path), "caption": "x"} for path in sorted(tmp_path.glob("*.png"))]
    options = settings(dataset_manifest="x", validation_split=0.2)
    renamed = split_validation(read_dataset(manifest(tmp_path, *rows)), options)[1]
    assert {one.path.name for one in renamed.pictures} == {f"renamed{19 - int(name[:-4])}.png" for name in chosen}


def test_added_picture_moves_at_most_one_other(tmp_path):
    before = split(tmp_path, 10)[1]
    for count in range(11, 22):
        after = split(tmp_path, count)[1]
        assert len((after ^ before) - {f"{count - 1}.png"}) <= 1
        before = after


def test_regularisation_is_balanced_again_and_never_kept_out(tmp_path):
    rows = [
        {"image": str(distinct(tmp_path / f"{index}.png", index)), "caption": "x", "repeats": 3,
         "regularisation": index >= 10}
        for index in range(12)
    ]  # fmt: skip
    options = {"validation_split": 0.3}
    dataset = read_dataset(manifest(tmp_path, *rows, **options))
    assert dataset.images_per_epoch == 60
    train, kept_out = split_validation(dataset, settings(dataset_manifest="x", **options))
    assert [(one.repeats, one.is_regularisation) for one in kept_out.pictures] == [(1, False)] * 3
    uses = Counter()
    for one in train.pictures:
        uses[one.is_regularisation] += one.repeats
    assert uses == {False: 21, True: 21}
