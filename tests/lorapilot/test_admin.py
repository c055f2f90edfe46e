"""The admin: staff only; what services own is shown, not edited; actions call the services."""

import pytest
from django.contrib import admin
from django.contrib.auth.models import Permission
from django.core.cache import cache
from django.test import Client
from django.utils import timezone

from lorapilot import services
from lorapilot.admin import ServiceOwnedAdmin
from lorapilot.models import ApiToken, AuditEntry, Job, JobStatus, SocketTicket, User

LOGIN = "/admin/login/"
OURS = ["lorapilot", "datasets", "models_registry", "runs"]


@pytest.fixture(autouse=True)
def no_attempts_yet():
    cache.clear()


@pytest.fixture
def browser(client_of, staff):
    return client_of(staff)


def test_every_model_of_ours_is_registered():
    from django.apps import apps

    models = {model for label in OURS for model in apps.get_app_config(label).get_models()}
    assert {model.__name__ for model in models - set(admin.site._registry)} == set()


def test_every_list_opens(browser):
    for model in admin.site._registry:
        path = f"/admin/{model._meta.app_label}/{model._meta.model_name}/"
        assert browser.get(path).status_code == 200, path


@pytest.mark.parametrize("who", ["alice", "charlie"])
def test_not_for_other_people(client_of, request, who):
    answer = client_of(request.getfixturevalue(who)).get("/admin/")
    assert (answer.status_code, answer.headers["Location"]) == (302, "/admin/login/?next=/admin/")


def test_sign_in_of_staff(staff):
    browser = Client()
    answer = browser.post(LOGIN, {"username": "staff", "password": "staff", "next": "/admin/"})
    assert (answer.status_code, answer.headers["Location"]) == (302, "/admin/")
    assert browser.get("/admin/").status_code == 200


def test_sign_in_of_others_is_refused(alice):
    answer = Client().post(LOGIN, {"username": "alice", "password": "alice"})
    assert (answer.status_code, "_auth_user_id" in answer.client.session) == (200, False)


def test_sign_in_stops_after_too_many_attempts(staff):
    browser = Client()
    for _ in range(5):
        assert browser.post(LOGIN, {"username": "staff", "password": "wrong"}).status_code == 200
    answer = browser.post(LOGIN, {"username": "staff", "password": "staff"})
    assert (answer.status_code, "_auth_user_id" in browser.session) == (200, False)
    assert AuditEntry.objects.filter(action="sign-in failed", subject="staff").count() == 5


def test_staff_see_what_their_permissions_allow(client_of, alice):
    alice.is_staff = True
    alice.save()
    browser = client_of(alice)
    assert browser.get("/admin/lorapilot/job/").status_code == 403
    alice.user_permissions.add(Permission.objects.get(codename="view_job"))
    assert browser.get("/admin/lorapilot/job/").status_code == 200


def test_staff_set_a_password(browser, alice):
    new = {"password1": "a-long-enough-one", "password2": "a-long-enough-one", "usable_password": "true"}
    assert browser.post(f"/admin/lorapilot/user/{alice.pk}/password/", new).status_code == 302
    alice.refresh_from_db()
    assert alice.check_password("a-long-enough-one")


# --- Rows that services own -------------------------------------------------------------------------------------------
def _rows(alice):
    token, _ = services.create_token(alice, name="laptop")
    services.issue_ticket(alice)
    return {
        "apitoken": token.pk,
        "socketticket": SocketTicket.objects.get().pk,
        "job": Job.objects.create(kind="nothing", label="Import", owner=alice).pk,
        "auditentry": AuditEntry.objects.get(action="token created").pk,
    }


def test_service_owned_rows_open_and_cannot_be_added_or_changed(browser, alice):
    for model, key in _rows(alice).items():
        page = f"/admin/lorapilot/{model}/"
        assert browser.get(f"{page}add/").status_code == 403
        shown = browser.get(f"{page}{key}/change/")
        assert (shown.status_code, b'name="_save"' in shown.content) == (200, False)
        assert browser.post(f"{page}{key}/change/", {"label": "other"}).status_code == 403
    assert Job.objects.get().label == "Import"


@pytest.mark.parametrize(
    ("model", "status"), [("apitoken", 200), ("socketticket", 200), ("job", 403), ("auditentry", 403)]
)
def test_service_owned_rows_are_deleted_only_where_they_may(browser, alice, model, status):
    key = _rows(alice)[model]
    assert browser.get(f"/admin/lorapilot/{model}/{key}/delete/").status_code == status


def test_token_page_shows_no_digest_but_in_its_address(browser, alice):
    token, _ = services.create_token(alice, name="laptop")
    page = browser.get(f"/admin/lorapilot/apitoken/{token.pk}/change/").content.decode()
    assert (token.token_key in page, f">{token.digest}<" in page) == (True, False)


def test_deleting_tokens_is_in_the_audit_trail(browser, alice, staff):
    token, _ = services.create_token(alice, name="one")
    browser.post(f"/admin/lorapilot/apitoken/{token.pk}/delete/", {"post": "yes"})
    others = [services.create_token(alice, name=name)[0].pk for name in ("two", "three")]
    body = {"action": "delete_selected", "_selected_action": others, "post": "yes"}
    browser.post("/admin/lorapilot/apitoken/", body)
    assert ApiToken.objects.count() == 0
    revoked = AuditEntry.objects.filter(action="token revoked", actor=staff)
    assert sorted(entry.subject.split(" ")[0] for entry in revoked) == ["one", "three", "two"]


def test_jobs_are_cancelled(browser, alice):
    queued = Job.objects.create(kind="nothing", label="a", owner=alice)
    running = Job.objects.create(kind="nothing", label="b", owner=alice, status=JobStatus.RUNNING)
    ended = Job.objects.create(
        kind="nothing", label="c", owner=alice, status=JobStatus.SUCCEEDED, finished_at=timezone.now()
    )
    keys = [str(job.pk) for job in (queued, running, ended)]
    answer = browser.post("/admin/lorapilot/job/", {"action": "cancel", "_selected_action": keys})
    assert answer.status_code == 302
    for job in (queued, running, ended):
        job.refresh_from_db()
    assert (queued.status, ended.status) == (JobStatus.CANCELLED, JobStatus.SUCCEEDED)
    assert running.cancel_requested_at is not None


def test_jobs_are_not_cancelled_without_the_permission(client_of, alice):
    job = Job.objects.create(kind="nothing", label="a", owner=alice)
    viewer = User.objects.create_user("viewer", password="viewer", is_staff=True)
    viewer.user_permissions.add(Permission.objects.get(codename="view_job"))
    client_of(viewer).post("/admin/lorapilot/job/", {"action": "cancel", "_selected_action": [str(job.pk)]})
    job.refresh_from_db()
    assert job.status == JobStatus.QUEUED


def test_base_leaves_editable_fields_to_edit(rf, staff):
    class Labelled(ServiceOwnedAdmin):
        editable = ("label",)

    request = rf.get("/")
    request.user = staff
    page = Labelled(Job, admin.site)
    assert page.has_change_permission(request) is True
    assert "label" not in page.get_readonly_fields(request)
    assert {"kind", "status", "created_at"} <= set(page.get_readonly_fields(request))


def test_user_without_anything_can_be_deleted_and_an_owner_cannot(browser, alice, charlie):
    from datasets.models import Dataset

    services.issue_ticket(charlie)
    Dataset.objects.create(owner=alice, name="cats")
    for user in (alice, charlie):
        browser.post(f"/admin/lorapilot/user/{user.pk}/delete/", {"post": "yes"})
    assert sorted(User.objects.values_list("username", flat=True)) == ["alice", "staff"]
