import itertools
import json

import pytest
from PIL import Image

from lora_trainer import config
from lora_trainer.data import BatchOrder, read_dataset, upright_rgb
from lora_trainer.errors import DatasetError
from lora_trainer.lora_metadata import tag_frequency


def settings(**changes):
    return config.from_table(
        {"pretrained_model_name_or_path": "/model", "output_dir": "/out", "resolution": 64} | changes
    )


def picture(path, size=(64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


def manifest(folder, *rows):
    path = folder / "set.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return settings(dataset_manifest=str(path))


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
    assert tag_frequency(dataset) == {"dataset": {"a": 1, "b": 2}}


def test_kohya_folders_are_read_and_others_reported(tmp_path):
    picture(tmp_path / "10_face" / "a.png")
    (tmp_path / "10_face" / "a.txt").write_text("a face\n")
    picture(tmp_path / "2_house" / "b.jpg")
    picture(tmp_path / "loose" / "c.png")
    dataset = read_dataset(settings(train_data_dir=str(tmp_path)))
    assert [(p.path.name, p.caption, p.repeats, p.group) for p in dataset.pictures] == [
        ("a.png", "a face", 10, "10_face"),
        ("b.jpg", "", 2, "2_house"),
    ]
    assert [notice.code for notice in dataset.notices] == ["folder_ignored", "caption_missing"]
    assert "loose" in dataset.notices[0].message
    assert "b.jpg" in dataset.notices[1].message


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


def test_truncated_picture_is_named(tmp_path):
    path = picture(tmp_path / "torn.png", (300, 300))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DatasetError, match=r"torn\.png is damaged"):
        upright_rgb(path)


def test_missing_picture_is_named(tmp_path):
    with pytest.raises(DatasetError, match=r"gone\.png does not exist"):
        read_dataset(manifest(tmp_path, {"image": str(tmp_path / "gone.png")}))


@pytest.mark.parametrize(
    "row", ["{", "[]", '{"image": 3}', '{"image": "a.png", "repeats": 0}', '{"image": "a", "caption": 1}']
)
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


def test_batch_order_is_the_same_when_entered_later(tmp_path):
    rows = [{"image": str(picture(tmp_path / f"{i}.png")), "caption": "x"} for i in range(7)]
    order = BatchOrder(read_dataset(manifest(tmp_path, *rows)), 2, seed=1)
    whole = list(itertools.islice(order.from_batch(0), 20))
    assert list(itertools.islice(order.from_batch(6), 14)) == whole[6:]
    assert whole[:4] != whole[4:8]
    assert whole != list(
        itertools.islice(BatchOrder(read_dataset(manifest(tmp_path, *rows)), 2, seed=2).from_batch(0), 20)
    )
