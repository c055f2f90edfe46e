"""How fast pictures are imported, against a bare loop of Pillow that decodes each and draws its thumbnail.

    python benchmarks/datasets_import.py [--pictures 2000] [--size 1024]

Both read the same files (PNG and JPEG in turn) from the same disk, in as many threads. The import does more: it copies
each file to the disk for good, checks it to its last byte, and writes rows. Goal: at least 0.8 of the bare loop.
A workspace and database of its own in a temporary folder; nothing else is touched.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOAL = 0.8


def prepare(folder: Path) -> None:
    """Django with a database in `folder`."""
    os.environ.update(
        LORAPILOT_WORKSPACE=str(folder / "workspace"),
        LORAPILOT_ENV_FILE=os.devnull,
        DJANGO_SETTINGS_MODULE="lorapilot.settings",
    )
    sys.path.insert(0, str(ROOT))
    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", verbosity=0)


def draw_pictures(folder: Path, count: int, size: int) -> list[Path]:
    """Soft shapes with some grain: they shrink about as photographs do."""
    from PIL import Image, ImageFilter

    chance = random.Random(1)
    folder.mkdir()
    grain = Image.effect_noise((size, size), 12).convert("RGB")
    paths = []
    for number in range(count):
        colours = bytes(chance.randrange(256) for _ in range(8 * 8 * 3))
        soft = Image.frombytes("RGB", (8, 8), colours).resize((size, size), Image.Resampling.BICUBIC)
        picture = Image.blend(soft.filter(ImageFilter.GaussianBlur(2)), grain, 0.15)
        path = folder / f"{number:05d}.{'png' if number % 2 else 'jpg'}"
        picture.save(path, **({"compress_level": 3} if number % 2 else {"quality": 92}))
        paths.append(path)
    return paths


def bare(paths: list[Path], target: Path, threads: int) -> float:
    """Seconds that Pillow alone takes."""
    from PIL import Image

    def one(path: Path) -> None:
        with Image.open(path) as image:
            image.load()
            small = image.convert("RGB")
            small.thumbnail((256, 256))
            small.save(target / f"{path.stem}.webp", "WEBP", quality=80)

    target.mkdir()
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, paths))
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def imported(paths: list[Path], name: str) -> float:
    """Seconds until all are in a dataset."""
    from datasets import services
    from lorapilot.models import User

    owner, _ = User.objects.get_or_create(username="benchmark")
    dataset = services.create_dataset(owner, name=name)
    files = [(path.name, path) for path in paths]
    start = time.perf_counter()
    report = services.import_files(dataset, files=files)
    seconds = time.perf_counter() - start
    assert (len(report.added), report.refused) == (len(paths), [])  # noqa: S101 a program, not part of the product
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--size", type=int, default=1024)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root)
        from datasets.batches import MAX_WORKERS

        threads = min(MAX_WORKERS, len(os.sched_getaffinity(0)))
        paths = draw_pictures(root / "pictures", given.pictures, given.size)
        # One after the other, in turns: a busy machine slows both.
        half = len(paths) // 2
        alone = bare(paths[:half], root / "thumbnails", threads)
        ours = imported(paths[:half], "first")
        ours += imported(paths[half:], "second")
        alone += bare(paths[half:], root / "thumbnails", threads)
    ratio = alone / ours
    print(f"{given.pictures} pictures of {given.size} px, {threads} threads")
    print(f"bare Pillow  {given.pictures / alone:8.1f} pictures/s")
    print(f"import       {given.pictures / ours:8.1f} pictures/s, {ratio:.2f} of it (goal {GOAL})")
    return 0 if ratio >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
