import pytest

from lora_trainer.buckets import BucketRules, Placement, bucket_sizes, place

SDXL = BucketRules((1024, 1024), enabled=True, minimum=256, maximum=2048, step=64)


def test_without_buckets_every_picture_covers_the_resolution():
    assert place((2000, 1000), BucketRules((512, 512))) == Placement((512, 512), (1024, 512), (256, 0))
    assert place((100, 200), BucketRules((512, 512))) == Placement((512, 512), (512, 1024), (0, 256))


def test_picture_of_the_right_size_is_left_as_it_is():
    assert place((512, 512), BucketRules((512, 512))) == Placement((512, 512), (512, 512), (0, 0))


def test_bucket_sizes_keep_area_bounds_and_step():
    sizes = bucket_sizes(SDXL)
    assert len(sizes) == len(set(sizes))
    assert all(width * height <= 1024 * 1024 for width, height in sizes)
    assert {side % 64 for size in sizes for side in size} == {0}
    assert (min(map(min, sizes)), max(map(max, sizes))) == (256, 2048)
    assert {(1024, 1024), (832, 1216), (1216, 832), (512, 2048)} - set(sizes) == set()


def test_bucket_sizes_are_symmetric():
    assert {(height, width) for width, height in bucket_sizes(SDXL)} == set(bucket_sizes(SDXL))


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1000, 1000), (1024, 1024)),
        ((3000, 2000), (1216, 832)),
        ((2000, 3000), (832, 1216)),
        ((5000, 500), (2048, 256)),
    ],
)
def test_nearest_aspect_ratio_is_chosen(size, bucket):
    assert place(size, SDXL).bucket == bucket


def test_resized_picture_always_covers_its_bucket():
    for width in range(50, 3000, 173):
        for height in range(50, 3000, 211):
            placed = place((width, height), SDXL)
            assert placed.resized[0] >= placed.bucket[0]
            assert placed.resized[1] >= placed.bucket[1]
            assert min(placed.crop) >= 0


def test_no_upscale_keeps_small_pictures_and_cuts_to_the_step():
    rules = BucketRules((1024, 1024), enabled=True, step=64, no_upscale=True)
    assert place((300, 200), rules) == Placement((256, 192), (300, 200), (22, 4))


def test_no_upscale_shrinks_large_pictures_to_the_area():
    rules = BucketRules((1024, 1024), enabled=True, step=64, no_upscale=True)
    placed = place((3000, 2000), rules)
    assert placed.bucket == (1216, 832)
    assert placed.resized[0] / placed.resized[1] == pytest.approx(1.5, abs=0.01)


def test_no_upscale_drops_a_picture_below_one_step():
    assert place((300, 50), BucketRules((1024, 1024), enabled=True, step=64, no_upscale=True)) is None


def test_largest_side_is_rounded_up_to_a_step():
    rules = BucketRules((1024, 1024), enabled=True, minimum=256, maximum=2000, step=64)
    assert bucket_sizes(rules) == bucket_sizes(SDXL)


@pytest.mark.parametrize(
    ("size", "placement"),
    [
        # height 1280 keeps the aspect ratio as well as width 768 does: the height's rounding is taken, as in sd-scripts
        ((2432, 3840), Placement((768, 1280), (811, 1280), (21, 0))),
        ((2752, 1408), Placement((1344, 704), (1376, 704), (16, 0))),
        ((2938, 571), Placement((2304, 448), (2305, 448), (0, 0))),
    ],
)
def test_no_upscale_rounds_as_sd_scripts_does_when_both_ways_are_as_good(size, placement):
    assert place(size, BucketRules((1024, 1024), enabled=True, step=64, no_upscale=True)) == placement
