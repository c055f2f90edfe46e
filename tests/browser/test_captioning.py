"""The review of automatic captions in a real browser: it comes by itself, and never over what somebody types."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.chromium

SETUP = """
import django; django.setup()
from django.utils import timezone
from datasets.models import Captioning, CaptionProposal, Dataset
from lorapilot.models import Job
"""
BEGIN = """
dataset = Dataset.objects.get(name="shapes")
job = Job.objects.create(kind="none", label="none", owner=dataset.owner, status="running", heartbeat_at=timezone.now())
made = Captioning.objects.create(dataset=dataset, owner=dataset.owner, captioner="openai", model="eye", job=job)
for picture in dataset.pictures.all():
    CaptionProposal.objects.create(captioning=made, picture=picture)
print(f"/datasets/{dataset.pk}/captioning/{made.pk}/")
"""
COME = """
first, *others = CaptionProposal.objects.filter(captioning__job__kind="none", state="waiting").order_by("pk")
CaptionProposal.objects.filter(pk=first.pk).update(state="proposed", caption="proposed first")
"""
END = """
CaptionProposal.objects.filter(captioning__job__kind="none", state="waiting").update(state="proposed", caption="later")
Job.objects.filter(kind="none").update(status="succeeded", finished_at=timezone.now())
"""
REMOVE = """
Captioning.objects.filter(job__kind="none").delete()
Job.objects.filter(kind="none").delete()
"""


@pytest.fixture
def order(live_platform):
    """order(code): on the server; order.address is the page of an order that waits for three captions."""

    def does(code):
        return live_platform.run(
            "-c", "import os; os.environ['DJANGO_SETTINGS_MODULE']='lorapilot.settings'" + SETUP + code
        )

    does.address = live_platform.address + does(BEGIN).strip()
    yield does
    does(REMOVE)


@pytest.mark.parametrize("is_typing", [False, True])
def test_review_comes_by_itself_but_not_over_what_is_typed(order, browser_of, is_typing):
    page = browser_of("alice")
    page.goto(order.address)
    proposals = page.locator("#review textarea")
    expect(page.locator("#review")).to_contain_text("Nothing to review yet")
    order(COME)
    expect(proposals).to_have_count(1)
    expect(proposals.first).to_have_value("proposed first")
    if is_typing:
        proposals.first.fill("mine")
    order(END)
    expect(page.locator("#captioning-status")).to_contain_text("3 to be reviewed")
    if is_typing:
        page.wait_for_timeout(500)
        expect(proposals).to_have_count(1)
        expect(proposals.first).to_have_value("mine")
        page.get_by_role("link", name="Show what has come").click()
    expect(proposals).to_have_count(3)
    assert page.complaints == []
