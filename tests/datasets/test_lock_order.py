"""Who changes a dataset locks its row before anything in it, so that two who do it in different ways cannot wait for
each other. SQLite has one lock for all; this looks at what PostgreSQL is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.services import postgres_url

ROOT = Path(__file__).resolve().parents[2]
CHANGES = """
import io, json, re
import django; django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
from django.db import connection
from datasets import bulk_edits, caption_edits, checking, destruction, picture_removal, services, versions
from datasets.caption_operations import Operation
from datasets.captioning import services as captioning
from datasets.captioning.services import Order
from datasets.edit_services import edit_picture
from datasets.models import CaptionProposal
from datasets.selections import Selection
from lorapilot.models import User
from tests.factories import make_dataset, picture_file

alice = User.objects.create_user("alice")
colours = ("red", "green", "blue", "white", "black")
dataset = make_dataset(alice, pictures=colours)
red, green, blue, white, black = dataset.pictures.order_by("original_name").values_list("pk", flat=True)
first = {}

def locks(execute, sql, params, many, context):
    found = re.match(r'(?:SELECT.*? FROM|UPDATE|DELETE FROM|INSERT INTO) "(\\w+)"', sql)
    if found and (not sql.startswith("SELECT") or "FOR UPDATE" in sql):
        first.setdefault(what, found[1])
    return execute(sql, params, many, context)

def change(name, work, *args, **options):
    global what
    what = name
    with connection.execute_wrapper(locks):
        return work(*args, **options)

def picture(pk):
    return dataset.pictures.get(pk=pk)

def propose():
    order = Order(captioner="tagger", model="m", which="all", overwrite=True)
    ordered = change("order captions", captioning.create_captioning, alice, dataset, order)
    for proposal in ordered.proposals.select_related("picture"):
        CaptionProposal.objects.filter(pk=proposal.pk).update(
            state="proposed", caption="tagged", previous=proposal.picture.caption
        )
    return ordered

version = change("pin", services.pin_version, dataset)
change("caption", caption_edits.set_caption, picture(red), caption="one")
change("undo caption", caption_edits.undo_caption, picture(red))
everything = Selection(None)
edit = change(
    "bulk edit", bulk_edits.apply_edit, dataset, operation=Operation("add", "tag"), selection=everything, actor=alice
).edit
change("undo bulk edit", bulk_edits.undo_edit, edit)
edit = change("delete many", picture_removal.remove_pictures, dataset, selection=Selection.of([red]), actor=alice)
change("undo delete many", bulk_edits.undo_edit, edit)
deleted = change("delete", services.delete_picture, picture(green))
change("undo delete", services.restore_picture, dataset, deleted=deleted)
ordered = propose()
change("accept captions", captioning.accept, ordered, actor=alice)
change("undo accepting", captioning.undo, ordered, actor=alice)
change("discard captions", captioning.discard, ordered)
captions = [(f"{colour}.txt", io.BytesIO(b"imported")) for colour in colours]
replacing = services.ImportChoices(replaces_captions=True)
change("import", services.import_files, dataset, files=captions, choices=replacing)
change("turn", edit_picture, picture(blue), rotation=90, crop=(0, 0, 32, 64))
change("keep one", checking.keep_one, dataset, pictures=[white, black], keep=white, caption_of=black)
change("restore version", versions.restore_version, dataset, version)
change("delete for good", destruction.destroy_picture, picture(white), everywhere=False)
change("delete dataset", services.delete_dataset, dataset)
print(json.dumps(first))
"""


@pytest.mark.postgres
def test_dataset_is_locked_before_what_is_in_it(tmp_path):
    with postgres_url(f"lorapilot_locks_{uuid.uuid4().hex[:8]}") as url:
        environment = {"LORAPILOT_WORKSPACE": str(tmp_path), "DJANGO_SETTINGS_MODULE": "lorapilot.settings"}
        done = subprocess.run(
            [sys.executable, "-c", CHANGES],
            cwd=ROOT,
            env=os.environ | environment | {"DATABASE_URL": url},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    assert [name for name, table in first.items() if table != "datasets_dataset"] == []
    assert len(first) == 19
