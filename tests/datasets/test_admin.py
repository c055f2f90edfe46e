"""The admin shows what datasets consist of, and changes none of it."""

from __future__ import annotations

import pytest
from django.urls import reverse

from datasets import bulk_edits, services
from datasets.caption_operations import Operation
from datasets.models import BulkEdit, CaptionChange, Dataset, DatasetVersion, Picture, Upload
from datasets.selections import Selection

MODELS = (Dataset, Picture, DatasetVersion, BulkEdit, CaptionChange, Upload)


@pytest.fixture
def rows(dataset, add, alice):
    add("red")
    services.pin_version(dataset)
    bulk_edits.apply_edit(dataset, operation=Operation("add", "x"), selection=Selection(None), actor=alice)
    services.start_upload(alice, dataset=dataset, filename="cats.zip", size=9)
    return {model: model.objects.get() for model in MODELS}


def test_admin_shows_everything_and_changes_nothing(rows, staff, client_of, everything):
    before, browser = everything(), client_of(staff)
    for model, row in rows.items():
        name = f"admin:datasets_{model._meta.model_name}"
        assert browser.get(reverse(f"{name}_changelist")).status_code == 200
        assert browser.get(reverse(f"{name}_change", args=[row.pk])).status_code == 200
        changing = [reverse(f"{name}_{what}", args=[row.pk]) for what in ("change", "delete")]
        posted = [browser.post(address, {"post": "yes"}).status_code for address in (*changing, reverse(f"{name}_add"))]
        assert posted == [403, 403, 403]
    assert everything() == before
