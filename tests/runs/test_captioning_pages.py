"""Automatic captions by their pages and their API, with a provider that stands on this machine."""

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from datasets import services as dataset_services
from datasets.caption_edits import set_caption
from datasets.captioning import job
from datasets.captioning.services import Order
from datasets.models import Captioning, CaptionProposal, Dataset
from lorapilot import jobs
from lorapilot.models import Job
from lorapilot.services import set_secret
from runs import captioning as captions
from runs.models import Run
from tests.datasets.caption_server import running_stand
from tests.factories import make_dataset

pytestmark = pytest.mark.django_db
KEY = "sk-alice"
ORDER = {
    "captioner": "openai",
    "model": "eye-1",
    "options": {"prompt": "Look", "begin_with_trigger": False, "requests_per_minute": 6000},
}


@pytest.fixture
def stand(settings, monkeypatch):
    monkeypatch.setattr(job, "PAUSES", (0, 0))
    with running_stand() as started:
        url = f"http://{started.host}/v1"
        settings.CAPTION_URLS = {"openai": url, "gemini": url, "xai": url}
        settings.CAPTION_LOCAL_HOSTS = [started.host]
        yield started


@pytest.fixture
def dataset(alice, team, workspace):
    """Alice's, shared with Bob's team: red and green without a caption, blue with one."""
    made = make_dataset(alice)
    made.pictures.exclude(original_name="blue.png").update(caption="")
    return dataset_services.share_dataset(made, groups=[team])


@pytest.fixture
def ordered(stand, alice, dataset):
    """A provider's order; red and green are proposed."""
    set_secret(alice, name="openai", value=KEY)
    made = captions.start(alice, dataset, Order(**ORDER))
    jobs.run_job(str(made.job.pk))
    return made


def page_of(name, captioning, *arguments):
    return reverse(f"captioning:{name}", args=[captioning.dataset_id, captioning.pk, *arguments])


def api(dataset, rest=""):
    return f"/api/v1/datasets/{dataset.pk}/captioning/{rest}"


def texts(dataset):
    return dict(dataset.pictures.order_by("pk").values_list("original_name", "caption"))


def states(captioning):
    return list(captioning.proposals.order_by("pk").values_list("picture__original_name", "state", "caption"))


def everything():
    return [list(table.objects.order_by("pk").values()) for table in (Captioning, CaptionProposal, Job, Run, Dataset)]


# --- Who may, and how -------------------------------------------------------------------------------------------------
def pages(captioning):
    proposal = captioning.proposals.first().pk
    reads = [reverse("captioning:new", args=[captioning.dataset_id]), page_of("show", captioning)]
    reads.append(page_of("status", captioning))
    writes = [page_of(name, captioning) for name in ("review", "undo", "cancel", "go_on")]
    return reads, [*writes, page_of("edit", captioning, proposal)]


def test_pages_are_for_those_who_change_the_dataset(ordered, client, client_of, bob, charlie):
    before = everything()
    reads, writes = pages(ordered)
    for address in reads + writes:
        assert client.post(address).url == f"/accounts/login/?next={address}"
    for user, status in ((charlie, 404), (bob, 403)):
        browser = client_of(user)
        assert {browser.get(address).status_code for address in reads} == {status}
        assert {browser.post(address, {"do": "accept:all"}).status_code for address in writes} == {status}
        assert browser.post(reads[0], {"captioner": "openai", "model": "eye-1", "which": "all"}).status_code == status
    assert everything() == before


def test_pages_refuse_the_wrong_method(ordered, client_of, alice):
    reads, writes = pages(ordered)
    browser = client_of(alice)
    assert {browser.post(address).status_code for address in reads[1:]} == {405}
    assert {browser.get(address).status_code for address in writes} == {405}


def test_api_is_for_those_who_change_the_dataset(ordered, dataset, client, api_of, alice, bob, charlie):
    before = everything()
    pk, proposal = ordered.pk, ordered.proposals.first().pk
    reads = ["", "captioners/", f"{pk}/", f"{pk}/proposals/"]
    writes = ["", "try/", *(f"{pk}/{name}/" for name in ("cancel", "go-on", "accept", "discard", "undo"))]
    for user, status in ((charlie, 404), (bob, 403)):
        caller = api_of(user)
        assert {caller.get(api(dataset, rest)).status_code for rest in reads} == {status}
        assert {caller.post(api(dataset, rest), ORDER | {"all": True}).status_code for rest in writes} == {status}
        assert caller.patch(api(dataset, f"{pk}/proposals/{proposal}/"), {"caption": "x"}).status_code == status
    assert client.get(api(dataset)).status_code == 401
    assert {api_of(alice, "read").post(api(dataset, rest), ORDER).status_code for rest in writes} == {403}
    assert api_of(alice).delete(api(dataset, f"{pk}/")).status_code == 405
    assert everything() == before


# --- A provider, by the pages -----------------------------------------------------------------------------------------
FORM = {
    "captioner": "openai",
    "model": "eye-1",
    "which": "missing",
    "prompt": "Look",
    "max_tokens": "50",
    "requests_per_minute": "6000",
}


def test_page_starts_an_order_that_a_job_does(stand, client_of, alice, dataset):
    set_secret(alice, name="openai", value=KEY)
    browser = client_of(alice)
    address = reverse("captioning:new", args=[dataset.pk])
    assert "Caption automatically" in browser.get(reverse("datasets:detail", args=[dataset.pk])).content.decode()
    page = browser.get(address).content.decode()
    assert ("Your key is set" in page, KEY in page) == (True, False)
    answer = browser.post(address, FORM | {"input_price": "2.5", "output_price": "10"})
    made = Captioning.objects.get()
    assert (answer.status_code, answer.url) == (302, page_of("show", made))
    assert (made.options["max_tokens"], made.options["begin_with_trigger"], made.job.status) == (50, False, "queued")
    assert 'hx-trigger="every 2s"' in browser.get(answer.url).content.decode()
    jobs.run_job(str(made.job.pk))
    page = browser.get(answer.url).content.decode()
    assert ("Look: a red square" in page, 'hx-trigger="every 2s"' in page, KEY in page) == (True, False, False)
    assert "200 tokens in, 20 out" in page
    assert "cost 0.0007, by your prices" in page  # 200 * 2.5 / 1e6 + 20 * 10 / 1e6
    assert "eye-1" in browser.get(address).content.decode()


def test_review_comes_by_itself_when_there_is_something_and_at_the_end(ordered, client_of, alice):
    browser = client_of(alice)
    came = {"HX-Trigger": '{"captioning-came": {}}'}

    def asked(seen):
        answer = browser.get(page_of("status", ordered) + f"?seen={seen}")
        page = answer.content.decode()
        link = "Show what has come" in page
        asks = page.partition("/status/?seen=")[2].partition('"')[0]
        return {key: answer[key] for key in came if key in answer}, link, asks

    assert asked("2") == (came, True, "")  # it has ended
    Job.objects.update(status="running", finished_at=None)
    listens = 'hx-trigger="captioning-came from:body" hx-select="#review"'
    page = browser.get(page_of("show", ordered) + "?page=1").content.decode()
    assert (listens in page, f'hx-get="{page_of("show", ordered)}?page=1"' in page) == (True, True)
    assert asked("0") == (came, True, "2")  # the first ones
    assert asked("1") == ({}, True, "1")  # some are being reviewed
    assert asked("x") == ({}, True, "2")
    ordered.proposals.update(state="waiting")
    assert asked("0") == ({}, True, "0")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"model": ""}, "This field is required"),
        ({"captioner": "clippy"}, "Select a valid choice"),
        ({"max_tokens": "5"}, "enter a whole number from 8 to 8,192"),
        ({"which": "selected", "pictures": "1,x"}, "by their ids"),
        ({"which": "selected"}, "Select between 1 and"),
        ({"captioner": "tagger"}, "There is no such model below the models folder"),
        ({"captioner": "tagger", "model": "../outside"}, "There is no such model below the models folder"),
        ({"captioner": "sentences", "model": "/"}, "of the kind blip"),
        ({"captioner": "xai"}, "Set your key of xAI on your account page first"),
    ],
)
def test_page_says_what_is_wrong_and_keeps_what_was_typed(stand, client_of, alice, dataset, values, told):
    answer = client_of(alice).post(reverse("captioning:new", args=[dataset.pk]), FORM | values)
    page = answer.content.decode()
    assert (answer.status_code, told in page, "Look" in page) == (400, True, True)
    assert (Captioning.objects.count(), Run.objects.count(), Job.objects.count()) == (0, 0, 0)


def test_page_asks_for_no_key_of_the_operator_s_own_server(client_of, api_of, alice, dataset, settings):
    wants, needs_none = "Set your key</a>", "Yes, without a key;"
    for url, count in (("https://api.openai.com/v1", 3), ("http://captions.example:8000/v1", 2)):
        settings.CAPTION_URLS = settings.CAPTION_URLS | {"openai": url}
        page = client_of(alice).get(reverse("captioning:new", args=[dataset.pk])).content.decode()
        assert (page.count(wants), page.count(needs_none)) == (count, 3 - count)
        remote = api_of(alice).get(api(dataset, "captioners/")).json()["remote"]
        assert sum(one["needs_key"] for one in remote) == count


def test_page_for_selected_pictures(stand, client_of, alice, dataset):
    set_secret(alice, name="openai", value=KEY)
    red = dataset.pictures.get(original_name="red.png").pk
    browser, address = client_of(alice), reverse("captioning:new", args=[dataset.pk])
    for answer in (browser.get(f"{address}?pictures={red},nonsense"), browser.post(address, {"picture": [red]})):
        page = answer.content.decode()
        assert ("1 picture selected." in page, f'name="pictures" value="{red}"' in page) == (True, True)
    browser.post(address, FORM | {"which": "selected", "pictures": str(red)})
    assert list(Captioning.objects.get().proposals.values_list("picture", flat=True)) == [red]


def test_page_tries_one_picture_and_keeps_nothing(stand, client_of, alice, dataset):
    set_secret(alice, name="openai", value=KEY)
    browser, address = client_of(alice), reverse("captioning:new", args=[dataset.pk])
    answer = browser.post(address, FORM | {"try": "yes", "begin_with_trigger": "on"})
    assert (answer.status_code, "sks, Look: a red square" in answer.content.decode()) == (200, True)
    stand.keys = set()
    answer = browser.post(address, FORM | {"try": "yes"})
    page = answer.content.decode()
    assert (answer.status_code, "does not accept your key" in page, KEY in page) == (424, True, False)
    assert Captioning.objects.count() == 0


def test_review_accepts_ticked_with_edits_and_undo_gives_back(ordered, dataset, client_of, alice):
    browser = client_of(alice)
    red, green = ordered.proposals.order_by("pk")
    edits = {f"caption-{red.pk}": "a better red", f"caption-{green.pk}": green.caption}
    answer = browser.post(
        page_of("review", ordered), edits | {"do": "accept:ticked", "proposal": [red.pk], "page": "1"}, follow=True
    )
    assert "Captions accepted: 1." in answer.content.decode()
    assert texts(dataset) == {"red.png": "a better red", "green.png": "", "blue.png": "sks blue"}
    answer = browser.post(page_of("review", ordered), {"do": f"discard:{green.pk}"}, follow=True)
    assert "Discarded: 1." in answer.content.decode()
    assert [state for _, state, _ in states(ordered)] == ["accepted", "discarded"]
    shown = browser.get(page_of("show", ordered) + "?show=accepted").content.decode()
    assert "a better red" in shown
    answer = browser.post(page_of("undo", ordered), follow=True)
    assert "Captions given back: 1." in answer.content.decode()
    assert texts(dataset)["red.png"] == ""


def test_review_of_all_leaves_what_was_changed_meanwhile(ordered, dataset, client_of, alice):
    set_caption(dataset.pictures.get(original_name="red.png"), caption="by hand")
    browser = client_of(alice)
    assert "The caption was changed after this was proposed" in browser.get(page_of("show", ordered)).content.decode()
    answer = browser.post(page_of("review", ordered), {"do": "accept:all"}, follow=True)
    assert "Captions accepted: 1. Left for you" in answer.content.decode()
    assert texts(dataset) == {"red.png": "by hand", "green.png": "Look: a green square", "blue.png": "sks blue"}
    left = ordered.proposals.get(state="proposed").pk
    browser.post(page_of("review", ordered), {"do": f"accept:{left}"})
    assert texts(dataset)["red.png"] == "Look: a red square"


@pytest.mark.parametrize("do", ["accept:ticked", "accept:x", "discard:999999", "accept:"])
def test_review_without_a_choice_is_refused(ordered, dataset, client_of, alice, do):
    before = texts(dataset)
    assert client_of(alice).post(page_of("review", ordered), {"do": do}).status_code in (400, 409)
    assert texts(dataset) == before


def test_review_keeps_edits_without_any_other_action(ordered, client_of, alice):
    red = ordered.proposals.first()
    client_of(alice).post(page_of("review", ordered), {"do": "save", f"caption-{red.pk}": "edited"})
    assert states(ordered)[0] == ("red.png", "proposed", "edited")


def test_edit_is_kept_as_soon_as_the_field_is_left(ordered, client_of, alice):
    red = ordered.proposals.first()
    browser, address = client_of(alice), page_of("edit", ordered, red.pk)
    assert "Edited" in browser.post(address, {f"caption-{red.pk}": "edited"}).content.decode()
    assert "has 5,001 characters" in browser.post(address, {f"caption-{red.pk}": "x" * 5001}).content.decode()
    assert states(ordered)[0] == ("red.png", "proposed", "edited")
    assert browser.post(page_of("edit", ordered, 10**6), {}).status_code == 404


def test_failed_pictures_are_named_with_the_reason_and_tried_again(stand, client_of, alice, dataset):
    set_secret(alice, name="openai", value=KEY)
    refusal = {"choices": [{"message": {"content": None, "refusal": "Not this one."}}]}
    stand.faults = [lambda seen: {"body": refusal} if seen == "red" else None] * 2
    made = captions.start(alice, dataset, Order(**ORDER))
    jobs.run_job(str(made.job.pk))
    browser = client_of(alice)
    page = browser.get(page_of("show", made) + "?show=failed").content.decode()
    assert ("red.png" in page, "The model declines: Not this one." in page) == (True, True)
    browser.post(page_of("go_on", made))
    made.refresh_from_db()
    jobs.run_job(str(made.job.pk))
    assert [state for _, state, _ in states(made)] == ["proposed", "proposed"]
    assert browser.post(page_of("go_on", made)).status_code == 409
    assert browser.post(page_of("cancel", made)).status_code == 409


def test_cancel_by_the_page(stand, client_of, alice, dataset):
    set_secret(alice, name="openai", value=KEY)
    made = captions.start(alice, dataset, Order(**ORDER))
    browser = client_of(alice)
    assert browser.post(page_of("cancel", made)).status_code == 302
    assert "Cancelled" in browser.get(page_of("show", made)).content.decode()
    assert Job.objects.get().status == "cancelled"


def test_list_of_orders_asks_as_often_for_three_as_for_one(ordered, dataset, client_of, alice):
    browser, address = client_of(alice), reverse("captioning:new", args=[dataset.pk])
    counts = []
    for _ in range(2):
        with CaptureQueriesContext(connection) as asked:
            browser.get(address)
        counts.append(len(asked))
        for _ in range(2):
            captions.start(alice, dataset, Order(**ORDER))
    assert counts[0] == counts[1]


# --- A provider, by the API -------------------------------------------------------------------------------------------
def test_api_from_order_to_undo(stand, api_of, alice, dataset):
    set_secret(alice, name="openai", value=KEY)
    caller = api_of(alice)
    answer = caller.post(api(dataset), ORDER | {"which": "all", "overwrite": True})
    made = answer.json()
    assert (answer.status_code, made["activity"]["status"], made["counts"]["waiting"]) == (201, "queued", 3)
    jobs.run_job(made["activity"]["job"])
    shown = caller.get(api(dataset, f"{made['id']}/")).json()
    assert (shown["activity"]["status"], shown["counts"]["proposed"], shown["cost"]) == ("succeeded", 3, None)
    listed = caller.get(api(dataset)).json()["results"]
    assert [row["id"] for row in listed] == [made["id"]]
    rows = caller.get(api(dataset, f"{made['id']}/proposals/?state=proposed")).json()["results"]
    assert [(row["picture_name"], row["caption"], row["current"], row["differs_since"]) for row in rows] == [
        ("red.png", "Look: a red square", "", False),
        ("green.png", "Look: a green square", "", False),
        ("blue.png", "Look: a blue square", "sks blue", False),
    ]
    red, green, blue = (row["id"] for row in rows)
    edited = caller.patch(api(dataset, f"{made['id']}/proposals/{red}/"), {"caption": "crimson"})
    assert (edited.status_code, edited.json()["caption"]) == (200, "crimson")
    act = lambda name, **body: caller.post(api(dataset, f"{made['id']}/{name}/"), body)  # noqa: E731
    assert act("accept", proposals=[red]).json() == {"accepted": 1, "changed": 0}
    assert act("discard", proposals=[blue]).json() == {"discarded": 1}
    assert act("accept", all=True).json() == {"accepted": 1, "changed": 0}
    assert texts(dataset) == {"red.png": "crimson", "green.png": "Look: a green square", "blue.png": "sks blue"}
    assert act("undo").json() == {"accepted": 2, "changed": 0}
    assert texts(dataset) == {"red.png": "", "green.png": "", "blue.png": "sks blue"}
    everything_told = str([shown, listed, rows, caller.get(api(dataset, "captioners/")).json()])
    assert KEY not in everything_told
    assert caller.patch(api(dataset, f"{made['id']}/proposals/{blue}/"), {"caption": "late"}).status_code == 409
    assert (green in {row["id"] for row in rows}, act("cancel").status_code) == (True, 409)


def test_api_try_maps_the_provider_s_refusals_to_424(stand, api_of, alice, dataset):
    set_secret(alice, name="gemini", value=KEY)
    caller, red = api_of(alice), dataset.pictures.get(original_name="red.png").pk
    asked = ORDER | {"captioner": "gemini", "picture": red}
    assert caller.post(api(dataset, "try/"), asked).json() == {
        "caption": "Look: a red square",
        "input_tokens": 90,
        "output_tokens": 9,
    }
    answer = caller.post(api(dataset, "try/"), asked | {"model": "eye-2"})
    assert (answer.status_code, answer.json()["detail"]) == (
        424,
        "Google Gemini has no model called eye-2 for you: There is no eye-2.",
    )
    stand.faults = [{"status": 503, "body": {"error": {"message": "Overloaded"}}}]
    answer = caller.post(api(dataset, "try/"), asked)
    assert (answer.status_code, "Overloaded. Try again later." in answer.json()["detail"]) == (424, True)
    stand.keys = set()
    answer = caller.post(api(dataset, "try/"), asked)
    assert (answer.status_code, KEY in answer.content.decode()) == (424, False)
    assert caller.post(api(dataset, "try/"), asked | {"picture": 10**6}).status_code == 404
    assert Captioning.objects.count() == 0


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "captioner"),
        ({"captioner": "clippy"}, "captioner"),
        ({"pictures": "all"}, "pictures"),
        ({"options": []}, "options"),
        ({"options": {"pixels": 1}}, "pixels"),
        ({"options": {"colour": "red"}}, "colour"),
        ({"which": "some"}, "which"),
    ],
)
def test_api_refuses_a_wrong_order(stand, api_of, alice, dataset, body, field):
    set_secret(alice, name="openai", value=KEY)
    answer = api_of(alice).post(api(dataset), ORDER | body if body else {})
    assert (answer.status_code, field in answer.json()["errors"], Captioning.objects.count()) == (400, True, 0)


@pytest.mark.parametrize("body", [{}, {"all": False}, {"proposals": [1], "all": True}, {"proposals": "x"}])
def test_api_refuses_an_unclear_choice(ordered, dataset, api_of, alice, body):
    assert api_of(alice).post(api(dataset, f"{ordered.pk}/accept/"), body).status_code == 400
    assert api_of(alice).get(api(dataset, f"{ordered.pk}/proposals/?state=lost")).status_code == 400
    assert {state for _, state, _ in states(ordered)} == {"proposed"}
