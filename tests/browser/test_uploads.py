"""Adding files on a dataset's page: folders, large files in pieces, pause, and a reload in the middle."""

from __future__ import annotations

import io
import json
import re
import zipfile

import pytest
from PIL import Image
from playwright.sync_api import expect

pytestmark = pytest.mark.chromium
SLOW_MS = 30_000  # of 16 MiB on a busy machine

NEW = """
import os, sys, django
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "lorapilot.settings"); django.setup()
from datasets.models import Dataset
from lorapilot.models import Job, User
if sys.argv[1] == "new":
    print(Dataset.objects.create(owner=User.objects.get(username="alice"), name=sys.argv[2]).pk)
else:
    import json
    from lorapilot import jobs
    for job in Job.objects.filter(status="queued"):
        jobs.run_job(str(job.pk))
    rows = Dataset.objects.get(pk=sys.argv[2]).pictures.order_by("original_name")
    print(json.dumps([[row.original_name, row.repeats, row.caption] for row in rows]))
"""


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(NEW)
    return str(path)


def test_folder_goes_in_with_repeats_and_captions(live_platform, browser_of, program, tmp_path):
    dataset = live_platform.run(program, "new", "Folder").strip()
    folder = tmp_path / "train" / "7_cat"
    folder.mkdir(parents=True)
    for name, content in {
        "a.png": png("red"),
        "a.txt": b"a red cat",
        "b.png": png("blue"),
        ".hidden.png": b"x",
    }.items():
        (folder / name).write_bytes(content)
    (folder / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "a blue cat"}')
    page = browser_of("alice")
    page.goto(f"{live_platform.address}/datasets/{dataset}/")
    page.set_input_files("[data-folder-input]", str(tmp_path / "train"))
    expect(page.locator("#pictures-heading")).to_have_text("2 pictures", timeout=SLOW_MS)
    expect(page.locator("#upload-list .error")).to_have_count(0)
    assert json.loads(live_platform.run(program, "rows", dataset)) == [
        ["a.png", 7, "a red cat"],
        ["b.png", 7, "a blue cat"],
    ]
    assert page.complaints == []


DROP = """
([name, content]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([Uint8Array.from(content)], name));
  return transfer;
}
"""


def test_files_are_dropped_on_the_folded_box(live_platform, browser_of, program):
    dataset = live_platform.run(program, "new", "Dropped").strip()
    page = browser_of("alice")
    page.goto(f"{live_platform.address}/datasets/{dataset}/")
    box = page.locator("details#upload")
    expect(box).to_have_attribute("open", "")
    for number, colour in enumerate(["red", "blue"], start=1):
        transfer = page.evaluate_handle(DROP, [f"{colour}.png", list(png(colour))])
        box.locator("summary").dispatch_event("drop", {"dataTransfer": transfer})
        expect(page.locator("#pictures-heading")).to_contain_text(f"{number} picture", timeout=SLOW_MS)
        expect(box).to_have_attribute("open", "")
        page.reload()
        expect(box).not_to_have_attribute("open", "")
    assert page.complaints == []


def test_upload_that_ends_leaves_what_is_being_typed_alone(live_platform, browser_of, program, tmp_path):
    dataset = live_platform.run(program, "new", "Typing").strip()
    page = browser_of("alice")
    page.goto(f"{live_platform.address}/datasets/{dataset}/")
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        (tmp_path / name).write_bytes(png(colour))
    files, cards = page.locator("#upload-form input[type=file][name]"), page.locator("[data-picture]")
    files.set_input_files(tmp_path / "a.png")
    expect(cards).to_have_count(1, timeout=SLOW_MS)
    expect(page.get_by_role("link", name="Train a LoRA on this")).to_be_visible()
    page.get_by_role("button", name="Tags").click()  # the grid has its keys and switches at once
    page.get_by_role("button", name="Sentences").click()
    expect(page.locator("[data-without-script]:visible")).to_have_count(0)
    page.locator("[data-select]").check()
    caption = page.locator("#picture-grid textarea").nth(0)
    caption.press_sequentially("a red")
    files.set_input_files(tmp_path / "b.png")
    show = page.get_by_role("button", name="Show what was added")
    expect(show).to_be_visible(timeout=SLOW_MS)
    caption.press_sequentially(" square")
    show.click()
    expect(cards).to_have_count(2)
    expect(caption).to_have_value("a red square")
    expect(page.locator("[data-select]").nth(0)).to_be_checked()
    caption.press("Alt+ArrowDown")
    expect(page.locator("#picture-grid textarea").nth(1)).to_be_focused()
    rows = json.loads(live_platform.run(program, "rows", dataset))
    assert rows == [["a.png", 1, "a red square"], ["b.png", 1, ""]]
    assert page.complaints == []


def test_large_file_is_paused_survives_a_reload_and_goes_on(live_platform, browser_of, program, tmp_path):
    dataset = live_platform.run(program, "new", "Large").strip()
    with zipfile.ZipFile(tmp_path / "large.zip", "w") as archive:
        archive.writestr("a.png", png("red"))
        archive.writestr("filling.bin", bytes(20 * 1024**2))
    page = browser_of("alice")
    page.goto(f"{live_platform.address}/datasets/{dataset}/")
    pieces = []

    def first_only(route):
        """Later pieces stay on their way, as on a slow line."""
        pieces.append(route.request.headers["upload-offset"])
        if len(pieces) == 1:
            route.continue_()

    page.route(
        "**/api/v1/uploads/*/",
        lambda route: first_only(route) if route.request.method == "PATCH" else route.continue_(),
    )
    page.set_input_files("#upload-form input[name=files]", str(tmp_path / "large.zip"))
    row = page.locator("#upload-list li")
    expect(row).to_contain_text("39 %", timeout=SLOW_MS)
    pause = page.get_by_role("button", name="Pause")
    pause.click()
    expect(row).to_contain_text("Paused", timeout=SLOW_MS)
    page.get_by_role("button", name="Resume").click()
    expect(row).to_contain_text("Going on", timeout=SLOW_MS)
    page.on("dialog", lambda dialog: dialog.accept())
    page.reload()
    page.unroute_all(behavior="ignoreErrors")
    expect(row).to_contain_text("39 % is here. Choose the same file again to go on.", timeout=SLOW_MS)
    with page.expect_response(lambda answer: answer.request.method == "PATCH" and answer.status == 200) as last:
        page.set_input_files("#upload-form input[name=files]", str(tmp_path / "large.zip"))
    assert last.value.request.headers["upload-offset"] == str(16 * 1024**2)
    assert re.fullmatch(r"sha256 [A-Za-z0-9+/]{43}=", last.value.request.headers["upload-checksum"])
    assert json.loads(live_platform.run(program, "rows", dataset)) == [["a.png", 1, ""]]
    expect(row).to_contain_text("1 added", timeout=SLOW_MS)
    expect(row).to_contain_text("filling.bin: It is neither a picture", timeout=SLOW_MS)
    assert page.evaluate("Object.keys(localStorage).filter((key) => key.startsWith('upload:'))") == []
    assert page.complaints == []
