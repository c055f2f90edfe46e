"""How fast are large datasets? Prints the table of docs/benchmarks.md.

    python -m benchmarks.datasets            about a minute
    python -m benchmarks.datasets --quick    a look whether all is well

Grid: parts of 60 pictures of a dataset with 10,000 pictures against one with 100, requested in turn. Edits: of 10,000
captions at once, each kind previewed, applied and undone. Everything goes through Django's test client and an SQLite
file in a workspace of its own; there is no network, and nobody else asks. There are no limits to keep.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.live_log import end_on_sigterm, environment, head, row

TAGS = [f"tag {number}" for number in range(400)]
FEW, MANY = 100, 10_000
TAGS_A_CAPTION = 12


def main() -> int:
    options = _options()
    end_on_sigterm()
    with tempfile.TemporaryDirectory() as name:
        _set_up(Path(name))
        load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
        print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPUs, load {load} before", end="\n\n", flush=True)
        for part in options.parts:
            PARTS[part](options)
    return 0


def _set_up(folder: Path) -> None:
    os.environ.update(environment(folder, SECRET_KEY="benchmark-" + "x" * 50, ALLOWED_HOSTS="testserver", DEBUG="0"))
    import django
    from django.core.management import call_command

    django.setup()
    call_command("migrate", verbosity=0)
    call_command("collectstatic", interactive=False, verbosity=0)


# --- Rows -------------------------------------------------------------------------------------------------------------
def make_dataset(owner: Any, *, name: str, count: int) -> Any:
    """Pictures with thumbnails and captions of tags, but without their files: nothing here opens them."""
    from datasets.models import Picture
    from datasets.pictures import thumbnail_path
    from datasets.services import create_dataset

    chance = random.Random(count)
    dataset = create_dataset(owner, name=name, trigger_word="ohwx")
    rows = [
        Picture(
            dataset=dataset,
            sha256=f"{chance.getrandbits(256):064x}",
            extension="png",
            width=chance.choice((768, 1024, 1536)),
            height=1024,
            bytes=1_500_000,
            original_name=f"{chance.getrandbits(40):010x}.png",
            caption=", ".join(["ohwx", *chance.sample(TAGS, TAGS_A_CAPTION)]),
        )
        for _ in range(count)
    ]
    for picture in rows:
        path = thumbnail_path(picture.sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    Picture.objects.bulk_create(rows, batch_size=500)
    return dataset


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# --- The grid ---------------------------------------------------------------------------------------------------------
def grid(options: argparse.Namespace) -> None:
    from django.db import connection
    from django.test import Client
    from django.test.utils import CaptureQueriesContext

    from lorapilot.models import User

    user = User.objects.create_user("grid")
    few, many = (make_dataset(user, name=f"of {count}", count=count) for count in (FEW, MANY))
    browser = Client()
    browser.force_login(user)
    middle = many.pictures.order_by("pk").values_list("pk", flat=True)[MANY // 2]
    pages = {
        "the page": ("", "", ""),
        "its next part": ("grid/", "", ""),
        "a part in the middle": ("grid/", "", f"after={middle}"),
        "ordered by name": ("grid/", "sort=name", "sort=name"),
        # Each has 60 pictures: of the few, only what stands in every caption is there so often.
        "a tag": ("grid/", "tag=ohwx", "tag=tag+7"),
        "a word": ("grid/", "q=ohwx", "q=tag+39"),
        "a bucket": ("grid/", "", "bucket=1024x1024"),
        "tags and trigger word": ("captions/tools/", "", ""),
    }

    def ask(dataset: Any, part: str, query: str) -> float:
        return seconds(lambda: _right(browser.get(f"/datasets/{dataset.pk}/{part}?{query}")))

    def queries(dataset: Any, part: str, query: str) -> int:
        with CaptureQueriesContext(connection) as asked:
            ask(dataset, part, query)
        return len(asked)

    print(head("grid", f"{FEW}: median, ms", "95 %", f"{MANY:,}: median, ms", "95 %", "95 %: ratio", "queries"))
    for name, (part, of_few, of_many) in pages.items():
        counts = (queries(few, part, of_few), queries(many, part, of_many))
        times: list[tuple[float, float]] = [
            (ask(few, part, of_few), ask(many, part, of_many)) for _ in range(options.requests)
        ]
        small, large = zip(*times, strict=True)
        cells = [f"{1000 * value:.1f}" for value in (median(small), p95(small), median(large), p95(large))]
        print(row(name, *cells, f"{p95(large) / p95(small):.2f}", f"{counts[0]}, {counts[1]}"), flush=True)
    print()


def _right(answer: Any) -> None:
    if answer.status_code != 200:
        raise RuntimeError(f"{answer.status_code}: {answer.content[:500]!r}")


def p95(values: Any) -> float:
    return quantiles(values, n=20)[-1]


# --- Edits of many ----------------------------------------------------------------------------------------------------
def edits(options: argparse.Namespace) -> None:
    from datasets.bulk_edits import apply_edit, plan_edit, undo_edit
    from datasets.caption_operations import Operation
    from datasets.selections import Selection
    from lorapilot.models import User

    user = User.objects.create_user("edits")
    count = FEW if options.quick else MANY
    dataset, every = make_dataset(user, name="edited", count=count), Selection(None)
    operations = [
        Operation("add", "masterpiece, best quality"),
        Operation("remove", "ohwx"),
        Operation("replace", "tag", "word"),
        Operation("regex", r"tag (\d+)", r"\1. tag"),
    ]
    print(head(f"edit of {count:,} captions", "preview, s", "apply, s", "undo, s", "captions/s"))
    for operation in operations:
        done: list[Any] = []

        def change(operation: Any = operation, done: list[Any] = done) -> None:
            done.append(apply_edit(dataset, operation=operation, selection=every, actor=user).edit)

        shown = seconds(lambda operation=operation: plan_edit(dataset, operation=operation, selection=every))
        applied = seconds(change)
        undone = seconds(lambda done=done: undo_edit(done[0]))
        rate = f"{done[0].picture_count / applied:,.0f}"
        print(row(operation.kind, f"{shown:.2f}", f"{applied:.2f}", f"{undone:.2f}", rate), flush=True)
    print()


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {"grid": grid, "edits": edits}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="fewer requests, fewer captions")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS), help="all of them by default")
    options = parser.parse_args()
    options.requests = 10 if options.quick else 60
    return options


if __name__ == "__main__":
    sys.exit(main())
