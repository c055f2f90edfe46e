"""Every error of the API is JSON with one sentence in `detail`."""

import pytest
from django.core.cache import cache
from django.core.exceptions import PermissionDenied, RequestDataTooBig
from rest_framework import serializers
from rest_framework.exceptions import ValidationError
from rest_framework.test import APIClient
from rest_framework.throttling import SimpleRateThrottle

from lorapilot.api import BoundedJSONParser, exception_handler
from lorapilot.errors import Conflict, UserError
from lorapilot.models import ApiToken, Secret


def test_user_error_names_its_field():
    answer = exception_handler(UserError("Give it a name.", field="name"), {})
    assert (answer.status_code, answer.data) == (
        400,
        {"detail": "Give it a name.", "errors": {"name": ["Give it a name."]}},
    )
    answer = exception_handler(Conflict("The name is taken."), {})
    assert (answer.status_code, answer.data) == (409, {"detail": "The name is taken."})


@pytest.mark.parametrize(
    ("detail", "sentence", "errors"),
    [
        ("No.", "No.", {"non_field_errors": ["No."]}),
        (["No.", "And no."], "No.", {"non_field_errors": ["No.", "And no."]}),
        ({"name": ["Too long."], "days": ["No."]}, "name: Too long.", {"name": ["Too long."], "days": ["No."]}),
        ({"spec": {"rank": ["Too big."]}}, "spec: Too big.", {"spec": {"rank": ["Too big."]}}),
        ([{}, {"a": ["No."]}], "No.", {"non_field_errors": [{}, {"a": ["No."]}]}),
        ([{}], "This is not valid.", {"non_field_errors": [{}]}),
    ],
)
def test_validation_error_has_its_first_sentence(detail, sentence, errors):
    answer = exception_handler(ValidationError(detail), {})
    assert (answer.status_code, answer.data) == (400, {"detail": sentence, "errors": errors})


def test_validation_error_of_a_list_of_rows():
    class Row(serializers.Serializer):
        number = serializers.IntegerField()

    rows = Row(data=[{"number": 1}, {"number": "x"}], many=True)
    with pytest.raises(ValidationError) as refused:
        rows.is_valid(raise_exception=True)
    assert exception_handler(refused.value, {}).data["detail"] == "1: A valid integer is required."


def test_our_own_fault_is_not_turned_into_an_answer():
    assert exception_handler(RuntimeError("a bug"), {}) is None


def test_body_too_large_for_a_form_is_413():
    answer = exception_handler(RequestDataTooBig("…"), {})
    assert (answer.status_code, answer.data) == (413, {"detail": "That is more than one request may carry."})


def test_body_too_large_is_413(api_of, alice, settings):
    settings.MAX_JSON_BYTES = 1000
    answer = api_of(alice).post("/api/v1/tokens/", {"name": "x" * 2000})
    assert (answer.status_code, answer.json()) == (413, {"detail": "A JSON body may have at most 1,000 bytes."})
    settings.DATA_UPLOAD_MAX_MEMORY_SIZE = 1000
    body = "name=" + "x" * 2000
    answer = api_of(alice).post("/api/v1/tokens/", body, content_type="application/x-www-form-urlencoded")
    assert (answer.status_code, answer.json()) == (413, {"detail": "That is more than one request may carry."})


def test_unknown_content_type_is_415(api_of, alice):
    answer = api_of(alice).post("/api/v1/tokens/", b"<a/>", content_type="application/xml")
    assert (answer.status_code, list(answer.json())) == (415, ["detail"])


@pytest.mark.parametrize("body", ["{", "[" * 100_000, b"\xff\xfe", '{"name": NaN}'])
def test_json_that_cannot_be_read_is_400(api_of, alice, body):
    answer = api_of(alice).post("/api/v1/tokens/", body, content_type="application/json")
    assert (answer.status_code, list(answer.json())) == (400, ["detail"])
    assert ApiToken.objects.count() == 1


@pytest.mark.parametrize("body", ["[]", '"text"', "1", "null"])
def test_json_that_is_no_object_is_400(db, body):
    answer = APIClient().post("/api/v1/tokens/", body, content_type="application/json")
    assert (answer.status_code, list(answer.json())) == (400, ["detail", "errors"])


NULL, HALF = "Null characters are not allowed.", "Surrogate characters are not allowed: U+D800."


@pytest.mark.parametrize(
    ("body", "sentence", "field"),
    [
        (r'{"value": "a\u0000b"}', f"value: {NULL}", "value"),
        (r'{"other": {"deep": [1, ["\ud800"]]}}', f"other: {HALF}", "other"),
        (r'{"other": {"\ud800": 1}}', f"other: {HALF}", "other"),
        (r'{"\ud800": 1}', HALF, "non_field_errors"),
        (r'["\ud800"]', HALF, "non_field_errors"),
    ],
)
def test_text_that_no_database_keeps_is_400(api_of, alice, body, sentence, field):
    answer = api_of(alice).put("/api/v1/secrets/wandb/", body, content_type="application/json")
    assert (answer.status_code, answer.json()["detail"], list(answer.json()["errors"])) == (400, sentence, [field])
    assert Secret.objects.count() == 0


def test_text_of_whole_characters_is_taken(rf):
    body = rf.post("/", r'{"a": "\ud83d\ude00", "b": ["\u00e9"]}', content_type="application/json")
    assert BoundedJSONParser().parse(body, parser_context={"request": body}) == {"a": "\U0001f600", "b": ["é"]}


def test_wrong_method_is_405_and_says_which(api_of, alice):
    answer = api_of(alice).delete("/api/v1/me/")
    assert (answer.status_code, answer.json()) == (405, {"detail": 'Method "DELETE" not allowed.'})
    assert answer.headers["Allow"] == "GET, HEAD, OPTIONS"


@pytest.mark.parametrize("path", ["/api/", "/api/v1/", "/api/v1/nothing/", "/api/v2/me/", "/api/v1/jobs/abc/"])
def test_unknown_address_is_404_in_json(db, path):
    answer = APIClient().get(path)
    assert (answer.status_code, answer.json()) == (404, {"detail": "There is nothing at this address."})


@pytest.mark.parametrize(
    ("error", "status", "detail"),
    [
        (RuntimeError("secret"), 500, "Something went wrong on our side. The server's log has the details."),
        (RequestDataTooBig("secret"), 413, "That is more than one request may carry."),
    ],
)
def test_fault_is_json_for_the_api(api_of, alice, monkeypatch, error, status, detail):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("lorapilot.api_views.MeSerializer", fail)
    api = api_of(alice)
    api.raise_request_exception = False
    answer = api.get("/api/v1/me/")
    assert (answer.status_code, answer.json()) == (status, {"detail": detail})


def test_forbidden_outside_rest_framework_is_json(rf):
    from lorapilot.views import bad_request, permission_denied

    request = rf.get("/api/v1/somewhere/")
    assert permission_denied(request, PermissionDenied()).status_code == 403
    assert permission_denied(request, PermissionDenied()).content == b'{"detail": "You may not do this."}'
    assert bad_request(request, ValueError()).content == b'{"detail": "The request could not be read."}'


def test_user_is_throttled_with_429(api_of, alice, bob, monkeypatch):
    cache.clear()
    monkeypatch.setattr(SimpleRateThrottle, "THROTTLE_RATES", SimpleRateThrottle.THROTTLE_RATES | {"user": "2/min"})
    api = api_of(alice)
    assert [api.get("/api/v1/me/").status_code for _ in range(3)] == [200, 200, 429]
    refused = api.get("/api/v1/me/")
    assert 0 < int(refused.headers["Retry-After"]) <= 60
    assert refused.json()["detail"].startswith("Request was throttled. Expected available in ")
    assert api_of(bob).get("/api/v1/me/").status_code == 200


def test_nobody_is_throttled_by_address(db, monkeypatch):
    cache.clear()
    monkeypatch.setattr(SimpleRateThrottle, "THROTTLE_RATES", SimpleRateThrottle.THROTTLE_RATES | {"anon": "0/min"})
    # Without sign-in the permission comes first: it costs nothing, so 401 and not 429.
    assert APIClient().get("/api/v1/me/").status_code == 401
