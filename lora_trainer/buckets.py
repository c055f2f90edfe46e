"""Aspect-ratio buckets in the way that Kohya's sd-scripts define them, so that the same settings give the same shapes.

A bucket is a (width, height) in pixels. Pictures of one bucket are resized and cropped to it and can share a batch.
"""

import functools
import math
from dataclasses import dataclass

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class BucketRules:
    """How buckets are made: one fixed size, or every shape with about the same area."""

    resolution: Size
    enabled: bool = False
    minimum: int = 256
    maximum: int = 1024
    step: int = 64
    no_upscale: bool = False


@dataclass(frozen=True)
class Placement:
    """Where a picture goes: resized to `resized`, then the middle `bucket` is cut out, starting at `crop`."""

    bucket: Size
    resized: Size
    crop: tuple[int, int]
    """(left, top) in pixels of the resized picture."""


def rules_in_proportion(resolution: int, *, enabled: bool = True) -> BucketRules:
    """Buckets for a square of this side: SDXL's step of 64 px at 1024, in proportion for smaller models, whose VAE
    needs multiples of 8."""
    return BucketRules(
        resolution=(resolution, resolution),
        enabled=enabled,
        minimum=max(64, resolution // 2),
        maximum=resolution * 2,
        step=max(8, min(64, resolution // 16 // 8 * 8)),
    )


def place(size: Size, rules: BucketRules) -> Placement | None:
    """Choose the bucket for a picture of this size; None when it is smaller than one bucket step and may not grow."""
    if rules.enabled and rules.no_upscale:
        return _place_without_upscaling(size, rules)
    bucket = _nearest_aspect(size, bucket_sizes(rules)) if rules.enabled else rules.resolution
    return _cover(size, bucket)


@functools.lru_cache(maxsize=16)  # asked anew for each picture
def bucket_sizes(rules: BucketRules) -> tuple[Size, ...]:
    """Every bucket of at most the resolution's area, both sides multiples of step and within [minimum, maximum], with
    the maximum rounded up to one."""
    area = rules.resolution[0] * rules.resolution[1]
    square = _floor(math.isqrt(area), rules.step)
    sizes = {(square, square)}
    maximum = -(-rules.maximum // rules.step) * rules.step
    for width in range(rules.minimum, maximum + 1, rules.step):
        height = min(maximum, _floor(area // width, rules.step))
        if height >= rules.minimum:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes))


def _nearest_aspect(size: Size, sizes: tuple[Size, ...]) -> Size:
    if size in sizes:
        return size
    aspect = size[0] / size[1]
    return min(sizes, key=lambda bucket: abs(bucket[0] / bucket[1] - aspect))


def _place_without_upscaling(size: Size, rules: BucketRules) -> Placement | None:
    resized = _shrink_to_area(size, rules)
    bucket = _floor(resized[0], rules.step), _floor(resized[1], rules.step)
    return Placement(bucket, resized, _middle(resized, bucket)) if min(bucket) else None


def _shrink_to_area(size: Size, rules: BucketRules) -> Size:
    """The picture's size, brought down to the resolution's area with one side on a bucket step."""
    width, height = size
    area = rules.resolution[0] * rules.resolution[1]
    if width * height <= area:
        return size
    aspect = width / height
    by_width = _floor(int(math.sqrt(area * aspect) + 0.5), rules.step) or rules.step
    by_height = _floor(int(math.sqrt(area / aspect) + 0.5), rules.step) or rules.step
    candidates = [(int(by_height * aspect + 0.5), by_height), (by_width, int(by_width / aspect + 0.5))]
    # of the two roundings, the one whose cut-off bucket keeps the aspect ratio better; the first when both are as good
    return min(candidates, key=lambda c: abs(_floor(c[0], rules.step) / max(1, _floor(c[1], rules.step)) - aspect))


def _cover(size: Size, bucket: Size) -> Placement:
    """Scale the picture until it just covers the bucket."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    resized = max(bucket[0], int(size[0] * scale + 0.5)), max(bucket[1], int(size[1] * scale + 0.5))
    return Placement(bucket, resized, _middle(resized, bucket))


def _middle(resized: Size, bucket: Size) -> tuple[int, int]:
    return (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2


def _floor(value: int, step: int) -> int:
    return value // step * step
