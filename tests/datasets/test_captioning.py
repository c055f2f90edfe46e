"""Automatic captions of providers, from a server on this machine that speaks as they do: proposed, reviewed, undone."""

import email.utils
import io
import json
import logging
import time

import pytest
from PIL import Image

from datasets import caption_edits
from datasets import services as dataset_services
from datasets.caption_edits import set_caption, undo_captions
from datasets.captioning import asking, job, services
from datasets.captioning.asking import Asker, Busy
from datasets.captioning.options import checked_options, cost_of, filled_prompt, with_trigger
from datasets.captioning.providers import ProviderError, provider_of
from datasets.captioning.selectors import captionings_of, counts_of
from datasets.captioning.services import Order
from datasets.captioning.shrinking import as_jpeg
from datasets.models import Captioning, CaptionProposal
from lorapilot import jobs
from lorapilot.errors import Conflict, Missing, UserError
from lorapilot.models import Job
from lorapilot.services import set_secret
from tests.datasets.caption_server import chat_answer, gemini_answer, running_stand

pytestmark = pytest.mark.django_db
KEY = "sk-alice"
CUT = "The answer was cut off. Allow more tokens, then try again."
PLAIN = {"prompt": "Look", "begin_with_trigger": False, "requests_per_minute": 6000}


@pytest.fixture
def stand(settings, monkeypatch):
    monkeypatch.setattr(job, "PAUSES", (0, 0))
    with running_stand() as started:
        url = f"http://{started.host}/v1"
        settings.CAPTION_URLS = {"openai": url, "gemini": url, "xai": url}
        settings.CAPTION_LOCAL_HOSTS = [started.host]
        yield started


@pytest.fixture
def keys(alice):
    for name in ("openai", "gemini", "xai"):
        set_secret(alice, name=name, value=KEY)


@pytest.fixture
def pictures(add, dataset):
    """Red, green and blue; blue has a caption."""
    found = add("red", "green", "blue")
    dataset.pictures.exclude(original_name="blue.png").update(caption="")
    return found


def order(captioner="openai", *, options=None, **values):
    return Order(captioner=captioner, model="eye-1", options=PLAIN | (options or {}), **values)


def tell_nobody(*_):
    pass


def work(captioning):
    return job.caption_remotely(tell_nobody, captioning_id=captioning.pk)


def states(captioning):
    rows = captioning.proposals.order_by("pk").values_list("picture__original_name", "state", "caption", "reason")
    return [tuple(filter(None, row)) for row in rows]


def captions(dataset):
    return dict(dataset.pictures.order_by("pk").values_list("original_name", "caption"))


# --- Asking -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("captioner", "path", "tokens"),
    [
        ("openai", "/v1/chat/completions", (200, 20)),
        ("xai", "/v1/chat/completions", (200, 20)),
        ("gemini", "/v1/models/eye-1:generateContent", (180, 18)),
    ],
)
def test_provider_proposes_what_is_missing_and_changes_no_caption(
    stand, alice, dataset, pictures, keys, captioner, path, tokens
):
    captioning = services.start_remote(alice, dataset, order(captioner))
    assert work(captioning) == {"proposed": 2, "failed": 0}
    assert states(captioning) == [
        ("red.png", "proposed", "Look: a red square"),
        ("green.png", "proposed", "Look: a green square"),
    ]
    assert {asked[0] for asked in stand.asked} == {path}
    counts = counts_of(captionings_of(dataset).get())
    assert (counts.input_tokens, counts.output_tokens, counts.proposed, counts.total) == (*tokens, 2, 2)
    assert captions(dataset) == {"red.png": "", "green.png": "", "blue.png": "a blue picture"}


def test_keys_go_into_the_header_of_each_provider(stand, alice, dataset, pictures, keys):
    for captioner in ("openai", "gemini"):
        work(services.start_remote(alice, dataset, order(captioner)))
    headers = [headers for _path, headers, *_ in stand.asked]
    assert [found.get("Authorization") for found in headers] == [f"Bearer {KEY}"] * 2 + [None] * 2
    assert [found.get("x-goog-api-key") for found in headers] == [None] * 2 + [KEY] * 2


def test_token_limits_have_the_names_that_servers_know(settings):
    limits = []
    for captioner, url in (("openai", "https://api.openai.com/v1"), ("openai", "http://here:1/v1")):
        settings.CAPTION_URLS = {captioner: url}
        provider = provider_of(captioner, "m", KEY)
        limits.append(sorted(provider.protocol.body(provider, "p", b"", 7)))
    assert limits == [["max_completion_tokens", "messages", "model"], ["max_tokens", "messages", "model"]]


def test_pictures_are_made_smaller_and_put_on_white(stand, alice, dataset, draw, keys):
    dataset_services.import_files(
        dataset, files=[("tall.png", io.BytesIO(draw((255, 0, 0, 0), size=(300, 600), mode="RGBA")))]
    )
    work(services.start_remote(alice, dataset, order(options={"pixels": 200})))
    assert stand.asked[0][3:] == ((100, 200), "yellow")  # white is nearest to it of the colours


def test_picture_is_turned_as_exif_says(tmp_path, draw):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    path.write_bytes(draw("red", "JPEG", (64, 32), exif=exif))
    assert Image.open(io.BytesIO(as_jpeg(path, pixels=1024))).size == (32, 64)
    with pytest.raises(UserError, match="gone"):
        as_jpeg(tmp_path / "none.png", pixels=10)
    path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot be read"):
        as_jpeg(path, pixels=10)


@pytest.mark.parametrize(("kind", "ending"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_picture_of_every_stored_kind_is_sent(tmp_path, draw, kind, ending):
    path = tmp_path / f"red.{ending}"
    path.write_bytes(draw("red", kind))
    assert Image.open(io.BytesIO(as_jpeg(path, pixels=32))).size == (32, 24)


def test_trigger_word_is_in_the_prompt_and_at_the_beginning(stand, alice, dataset, pictures, keys):
    options = {"prompt": "{trigger} it", "begin_with_trigger": True}
    work(services.start_remote(alice, dataset, order(options=options)))
    assert [row[2] for row in states(Captioning.objects.get())] == ["ohwx: a red square", "ohwx: a green square"]
    assert with_trigger("a cat", "ohwx") == "ohwx, a cat"
    assert filled_prompt("", "") + " Call the main subject “ohwx”." == filled_prompt("", "ohwx")


def test_order_for_all_overwrites_only_if_asked(stand, alice, dataset, pictures, keys):
    skipping = services.start_remote(alice, dataset, order(which="all"))
    overwriting = services.start_remote(alice, dataset, order(which="all", overwrite=True))
    assert (skipping.proposals.count(), overwriting.proposals.count()) == (2, 3)


def test_order_for_selected_pictures(stand, alice, dataset, pictures, keys):
    blue = dataset.pictures.get(original_name="blue.png").pk
    red = dataset.pictures.get(original_name="red.png").pk
    captioning = services.start_remote(alice, dataset, order(which="selected", pictures=[red, blue]))
    assert list(captioning.proposals.values_list("picture", flat=True)) == [red]
    with pytest.raises(UserError, match="no picture without a caption"):
        services.start_remote(alice, dataset, order(which="selected", pictures=[blue]))
    with pytest.raises(UserError, match="no longer in the dataset"):
        services.start_remote(alice, dataset, order(which="selected", pictures=[red, 10**6]))


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"captioner": "clippy"}, "captioner"),
        ({"captioner": "tagger"}, "captioner"),
        ({"model": " "}, "model"),
        ({"which": "some"}, "which"),
        ({"which": "selected"}, "pictures"),
        ({"options": {"pixels": 5}}, "pixels"),
        ({"options": {"pixels": True}}, "pixels"),
        ({"options": {"max_tokens": "many"}}, "max_tokens"),
        ({"options": {"max_tokens": 10.5}}, "max_tokens"),
        ({"options": {"input_price": -1}}, "input_price"),
        ({"options": {"input_price": "nan"}}, "input_price"),
        ({"options": {"general_threshold": 0.5}}, "general_threshold"),
        ({"options": {"prompt": "x" * 4001}}, "prompt"),
        ({"options": {"prompt": 5}}, "prompt"),
        ({"options": {"begin_with_trigger": "perhaps"}}, "begin_with_trigger"),
        ({"options": {"colour": "red"}}, "colour"),
    ],
)
def test_order_that_cannot_be_leaves_nothing(stand, alice, dataset, pictures, keys, values, field):
    with pytest.raises(UserError) as error:
        services.start_remote(alice, dataset, Order(**{"captioner": "openai", "model": "eye-1"} | values))
    assert (error.value.field, Captioning.objects.count(), Job.objects.count()) == (field, 0, 0)


def test_order_without_a_key_or_pictures_is_refused(stand, alice, bob, dataset, keys, settings):
    with pytest.raises(UserError, match="no picture without a caption"):
        services.start_remote(alice, dataset, order())
    with pytest.raises(UserError, match="Set your key of Google Gemini on your account page first"):
        services.start_remote(bob, dataset, order("gemini"))
    settings.CAPTION_URLS = {"openai": "https://api.openai.com/v1"}
    with pytest.raises(UserError, match="Set your key of OpenAI"):
        services.start_remote(bob, dataset, order())


def test_tagger_options_take_lists_and_texts():
    options = checked_options("tagger", {"exclude": "solo, 1girl,\nsolo", "general_threshold": "0.2"})
    assert (options["exclude"], options["general_threshold"], options["underscores_to_spaces"]) == (
        ["solo", "1girl"],
        0.2,
        True,
    )
    assert checked_options("tagger", {"exclude": ["a_b"]})["exclude"] == ["a_b"]
    for wrong in ([1], 5, ["x"] * 1001):
        with pytest.raises(UserError):
            checked_options("tagger", {"exclude": wrong})


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
def test_options_that_no_database_can_store_are_refused(text):
    for captioner, options in (
        ("openai", {"prompt": text}),
        ("tagger", {"exclude": text}),
        ("tagger", {"exclude": [text]}),
    ):
        with pytest.raises(UserError) as error:
            checked_options(captioner, options)
        assert error.value.field == next(iter(options))


def test_cost_is_counted_from_prices_of_the_user():
    assert cost_of({"input_price": 2.0, "output_price": 8.0}, 1_000_000, 500_000) == 6.0
    assert cost_of({"input_price": None, "output_price": 8.0}, 10**6, 10**6) == 8.0
    assert cost_of({"input_price": None, "output_price": None}, 10**6, 10**6) is None


# --- What goes wrong --------------------------------------------------------------------------------------------------
def test_busy_provider_is_asked_again_after_its_own_pause(stand, alice, dataset, pictures, keys, monkeypatch):
    told = []
    stand.faults = [
        {"status": 429, "headers": {"Retry_After": "0"}, "body": {"error": {"message": "Slow down"}}},
        {"status": 500, "body": b"<html>oops</html>"},
        {"status": 503},
    ]
    captioning = services.start_remote(alice, dataset, order())
    monkeypatch.setattr(job, "REQUESTS_AT_ONCE", 1)
    job.caption_remotely(lambda _done, _total, message: told.append(message), captioning_id=captioning.pk)
    assert [row[1] for row in states(captioning)] == ["proposed", "proposed"]
    assert len(stand.asked) == 5
    assert any("status 429): Slow down" in message for message in told)


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ({"Retry-After": "17"}, {}, 17),
        ({"Retry-After": email.utils.formatdate(0, usegmt=True)}, {}, 0),
        ({"Retry-After": "soon"}, {}, None),
        ({}, {"error": {"details": [{"@type": "…RetryInfo", "retryDelay": "34.5s"}]}}, 34.5),
        ({}, {"error": {"details": ["no object", {"retryDelay": "a while"}]}}, None),
        ({}, None, None),
    ],
)
def test_seconds_to_wait(headers, body, seconds):
    assert asking._seconds_to_wait(headers, body) == seconds


def test_retry_after_holds_back_every_request(stand, alice, dataset, pictures, keys, monkeypatch):
    captioning = services.start_remote(alice, dataset, order())
    round_ = job._Round(captioning, tell_nobody)
    before = time.monotonic()
    round_._try_again(captioning.proposals.first().pk, Busy("busy.", 300))
    assert round_.next_at >= before + 300
    assert round_.message == "busy. Asks again in 300 s."


def test_long_pause_of_the_provider_ends_the_job(stand, alice, dataset, pictures, keys):
    stand.faults = [{"status": 429, "headers": {"Retry_After": "7200"}}] * 4
    captioning = services.start_remote(alice, dataset, order())
    with pytest.raises(ProviderError, match="wants to be asked again in 120 minutes only"):
        work(captioning)
    assert {row[1] for row in states(captioning)} == {"waiting"}


@pytest.mark.parametrize(
    ("captioner", "body", "reason"),
    [
        ("openai", chat_answer(None, refusal="I can't look at this."), "The model declines: I can't look at this."),
        ("openai", chat_answer("", finish="content_filter"), "The provider's content filter stopped the answer."),
        (
            "openai",
            chat_answer("half a", finish="length"),
            CUT,
        ),
        ("openai", chat_answer("  "), "The answer is empty."),
        ("gemini", gemini_answer("", finish="SAFETY"), "The provider stopped the answer: SAFETY."),
        (
            "gemini",
            gemini_answer("", finish="MAX_TOKENS"),
            CUT,
        ),
        (
            "gemini",
            {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}},
            "The provider blocks this picture or prompt: PROHIBITED_CONTENT.",
        ),
        ("openai", chat_answer("word " * 1001), "The caption has 5,004 characters; the most is 5,000. Shorten it."),
    ],
)
def test_declined_picture_is_named_with_the_reason_and_others_go_on(
    stand, alice, dataset, pictures, keys, captioner, body, reason
):
    stand.faults = [lambda seen: {"body": body} if seen == "red" else None] * 2
    captioning = services.start_remote(alice, dataset, order(captioner))
    assert work(captioning) == {"proposed": 1, "failed": 1}
    assert states(captioning)[0] == ("red.png", "failed", reason)


@pytest.mark.parametrize("body", [b"{not JSON", b"[]", b'{"choices": []}', b'{"choices": [{"message": 5}]}', b"5"])
def test_malformed_answers_are_retried_then_reported(stand, alice, dataset, pictures, keys, body):
    stand.faults = [lambda seen: {"body": body} if seen == "red" else None] * 4
    captioning = services.start_remote(alice, dataset, order())
    assert work(captioning) == {"proposed": 1, "failed": 1}
    assert "Gave up after 3 tries." in states(captioning)[0][2]


def test_wrong_key_ends_the_job_at_once_and_is_not_repeated(stand, alice, dataset, pictures, keys, caplog):
    stand.keys = {"another"}
    for captioner in ("openai", "gemini"):
        captioning = services.start_remote(alice, dataset, order(captioner))
        with pytest.raises(ProviderError) as error:
            work(captioning)
        assert "does not accept your key" in error.value.message
        assert (KEY in error.value.message, error.value.status) == (False, 424)
        assert {row[1] for row in states(captioning)} == {"waiting"}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"status": 403, "body": {"error": "No."}}, "does not accept your key: No."),
        (
            {"status": 400, "body": {"error": "Incorrect API key provided: sk-alice"}},
            "Incorrect API key provided: …",
        ),
        ({"status": 402}, "no credit left"),
        ({"status": 429, "body": {"error": {"code": "insufficient_quota", "message": "Pay"}}}, "no credit left: Pay."),
        ({"status": 404, "body": {"error": {"message": "No such"}}}, "has no model called eye-1 for you: No such."),
        ({"status": 301, "headers": {"Location": "http://elsewhere.invalid/"}}, "refuses (status 301)."),
    ],
)
def test_what_concerns_every_picture_ends_the_job(stand, alice, dataset, pictures, keys, fault, reason):
    stand.faults = [fault] * 4
    with pytest.raises(ProviderError) as error:
        work(services.start_remote(alice, dataset, order()))
    assert reason in error.value.message
    assert len(stand.asked) <= 2


def test_same_refusal_again_and_again_ends_the_job(stand, alice, dataset, add, keys, monkeypatch):
    monkeypatch.setattr(job, "REQUESTS_AT_ONCE", 1)
    add("red", "green", "blue", "yellow", "orange", "pink", "gray")
    stand.faults = [{"status": 400, "body": {"error": {"message": "Unsupported parameter"}}}] * 9
    captioning = services.start_remote(alice, dataset, order(which="all", overwrite=True))
    with pytest.raises(ProviderError, match=r"5 pictures failed in a row.*Unsupported parameter"):
        work(captioning)
    assert [row[1] for row in states(captioning)] == ["failed"] * 5 + ["waiting"] * 2


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:1/v1", "without encryption"),
        ("https://127.0.0.1:1/v1", "inside a private network"),
        ("https://user@localhost/v1", "is no address"),
    ],
)
def test_addresses_that_are_not_asked(settings, url, reason):
    settings.CAPTION_URLS = {"openai": url}
    with pytest.raises(ProviderError, match=reason):
        Asker(provider_of("openai", "m", KEY)).ask("p", b"", 10)


def test_server_that_does_not_answer_is_busy(stand, settings):
    stand.server.server_close()
    with pytest.raises(Busy, match="does not answer"):
        Asker(provider_of("openai", "m", KEY)).ask("p", b"", 10)


# --- Restart, cancel --------------------------------------------------------------------------------------------------
def test_job_started_over_asks_only_for_what_waits(stand, alice, dataset, pictures, keys):
    captioning = services.start_remote(alice, dataset, order())
    work(captioning)
    stand.asked.clear()
    captioning.proposals.filter(picture__original_name="red.png").update(state="waiting", caption="")
    assert work(captioning) == {"proposed": 2, "failed": 0}
    assert [asked[4] for asked in stand.asked] == ["red"]


def test_picture_that_got_a_caption_or_went_meanwhile_is_not_sent(stand, alice, dataset, pictures, keys):
    captioning = services.start_remote(alice, dataset, order())
    set_caption(dataset.pictures.get(original_name="red.png"), caption="by hand")
    dataset.pictures.get(original_name="green.png").delete()
    assert work(captioning) == {"proposed": 0, "failed": 0}
    assert states(captioning) == [("red.png", "discarded", "Somebody has written a caption meanwhile.")]
    assert stand.asked == []


def test_cancel_ends_requests_that_are_under_way(stand, alice, dataset, pictures, keys):
    """The provider never answers; the work ends all the same, and what was not captioned still waits."""
    stand.faults = [{"waits": True}] * 4
    captioning = services.start_remote(alice, dataset, order())

    def cancelled_once_asked(*_):
        if stand.reached.is_set():
            raise jobs.JobCancelled

    with pytest.raises(jobs.JobCancelled):
        job.caption_remotely(cancelled_once_asked, captioning_id=captioning.pk)
    assert {row[1] for row in states(captioning)} == {"waiting"}


def test_cancel_and_go_on(stand, alice, dataset, pictures, keys):
    captioning = services.start_remote(alice, dataset, order())
    with pytest.raises(Conflict, match="at work already"):
        services.go_on(captioning)
    services.cancel(captioning)
    captioning.job.refresh_from_db()
    assert captioning.job.status == "cancelled"
    with pytest.raises(Conflict, match="ended already"):
        services.cancel(captioning)
    captioning.proposals.filter(picture__original_name="red.png").update(state="failed", reason="busy")
    services.go_on(captioning)
    jobs.run_job(str(captioning.job.pk))
    assert states(captioning) == [
        ("red.png", "proposed", "Look: a red square"),
        ("green.png", "proposed", "Look: a green square"),
    ]
    captioning.job.refresh_from_db()
    assert (captioning.job.status, captioning.job.result) == ("succeeded", {"proposed": 2, "failed": 0})
    with pytest.raises(Conflict, match="nothing left"):
        services.go_on(captioning)


def test_job_of_a_deleted_dataset_says_so(stand, alice, dataset, pictures, keys):
    captioning = services.start_remote(alice, dataset, order())
    pk = captioning.pk
    dataset_services.delete_dataset(dataset)
    with pytest.raises(Missing):
        job.caption_remotely(tell_nobody, captioning_id=pk)


def test_key_that_was_deleted_meanwhile_fails_the_job_with_a_sentence(stand, alice, dataset, pictures, keys, settings):
    from lorapilot.services import delete_secret

    captioning = services.start_remote(alice, dataset, order("xai"))
    delete_secret(alice, name="xai")
    jobs.run_job(str(captioning.job.pk))
    captioning.job.refresh_from_db()
    assert (captioning.job.status, captioning.job.message) == (
        "failed",
        "Set your key of xAI on your account page first.",
    )


def test_key_is_in_no_log_job_or_order(stand, alice, dataset, pictures, keys, caplog):
    caplog.set_level(logging.DEBUG)
    stand.faults = [{"status": 400, "body": {"error": {"message": f"odd request with {KEY}"}}}] * 2
    captioning = services.start_remote(alice, dataset, order())
    jobs.run_job(str(captioning.job.pk))
    rows = [list(table.objects.values()) for table in (Job, Captioning, CaptionProposal)]
    assert "odd request with …" in str(rows)
    assert (KEY in str(rows), KEY in caplog.text) == (False, False)
    assert KEY not in repr(provider_of("openai", "m", KEY))


# --- Review -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def proposed(stand, alice, dataset, pictures, keys):
    captioning = services.start_remote(alice, dataset, order(which="all", overwrite=True))
    work(captioning)
    return captioning


def ids(captioning, *names):
    return list(captioning.proposals.filter(picture__original_name__in=names).values_list("pk", flat=True))


def test_accept_all_then_undo(proposed, dataset, alice):
    before = captions(dataset)
    assert services.accept(proposed, actor=alice) == services.Accepted(3, 0)
    assert captions(dataset) == {f"{name}.png": f"Look: a {name} square" for name in ("red", "green", "blue")}
    set_caption(dataset.pictures.get(original_name="red.png"), caption="changed by hand")
    assert services.undo(proposed, actor=alice) == services.Accepted(2, 1)
    assert captions(dataset) == before | {"red.png": "changed by hand"}
    assert [row[1] for row in states(proposed)] == ["accepted", "proposed", "proposed"]


def test_accept_some_discard_some_edit_one(proposed, dataset, alice):
    services.edit(proposed.proposals.get(picture__original_name="blue.png"), caption=" better\nblue ")
    assert services.accept(proposed, actor=alice, proposals=ids(proposed, "blue.png")) == services.Accepted(1, 0)
    assert services.discard(proposed, proposals=ids(proposed, "red.png", "blue.png")) == 1
    assert captions(dataset) == {"red.png": "", "green.png": "", "blue.png": "better blue"}
    assert [row[1] for row in states(proposed)] == ["discarded", "proposed", "accepted"]
    with pytest.raises(Conflict):
        services.accept(proposed, actor=alice, proposals=ids(proposed, "red.png"))
    with pytest.raises(Conflict):
        services.discard(proposed, proposals=ids(proposed, "red.png"))
    with pytest.raises(Conflict):
        services.edit(proposed.proposals.get(picture__original_name="red.png"), caption="late")


def test_accept_leaves_what_somebody_changed_meanwhile(proposed, dataset, alice):
    set_caption(dataset.pictures.get(original_name="red.png"), caption="by hand")
    assert services.accept(proposed, actor=alice) == services.Accepted(2, 1)
    assert captions(dataset)["red.png"] == "by hand"
    assert services.accept(proposed, actor=alice, even_if_changed=True) == services.Accepted(1, 0)
    assert captions(dataset)["red.png"] == "Look: a red square"
    assert services.undo(proposed, actor=alice) == services.Accepted(3, 0)
    assert captions(dataset)["red.png"] == "by hand"


def test_undo_of_nothing_is_refused(proposed, alice):
    with pytest.raises(Conflict):
        services.undo(proposed, actor=alice)


def test_many_that_are_accepted_are_one_of_the_last_edits(proposed, dataset, alice, monkeypatch):
    monkeypatch.setattr(caption_edits, "FEW", 2)
    before = captions(dataset)
    assert services.accept(proposed, actor=alice) == services.Accepted(3, 0)
    edit = dataset.bulk_edits.get()
    assert (edit.label, edit.actor, edit.picture_count) == ("Captions by eye-1", alice, 3)
    undo_captions(edit)
    assert captions(dataset) == before


def test_try_one_keeps_nothing(stand, alice, dataset, pictures, keys):
    red = dataset.pictures.get(original_name="red.png")
    answer = services.try_one(alice, red, order(options={"begin_with_trigger": True}))
    assert (answer.caption, answer.input_tokens) == ("ohwx, Look: a red square", 100)
    assert (Captioning.objects.count(), captions(dataset)["red.png"]) == (0, "")
    stand.faults = [{"status": 500}]
    with pytest.raises(ProviderError, match="Try again later"):
        services.try_one(alice, red, order())
    with pytest.raises(UserError, match="runs in the queue"):
        services.try_one(alice, red, Order(captioner="tagger", model="x"))


def test_proposals_go_with_their_pictures(proposed, dataset):
    dataset_services.delete_picture(dataset.pictures.get(original_name="red.png"))
    assert (proposed.proposals.count(), json.dumps(states(proposed)).count("red")) == (2, 0)
