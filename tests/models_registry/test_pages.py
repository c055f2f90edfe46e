from __future__ import annotations

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from lorapilot.jobs import run_job
from lorapilot.models import Job
from models_registry.models import BaseModel
from models_registry.services import register_base_model
from tests.models_registry.conftest import SD15, SDXL, write_file

pytestmark = pytest.mark.django_db


@pytest.fixture
def base_model(models):
    write_file(models / "first.safetensors", SDXL, metadata={"made <b>by</b>": "me"})
    return register_base_model(path="first.safetensors")


@pytest.mark.parametrize("page", ["list", "register", "detail", "hashing", "rehash", "forget"])
def test_pages_ask_anonymous_visitors_to_sign_in(base_model, client, page):
    address = reverse(f"models:{page}", args=[] if page in {"list", "register"} else [base_model.pk])
    for response in (client.get(address), client.post(address)):
        assert (response.status_code, response.url) == (302, f"{reverse('account_login')}?next={address}")


@pytest.mark.parametrize(
    ("page", "refused"), [("list", "post"), ("detail", "post"), ("hashing", "post"), ("rehash", "get")]
)
def test_pages_refuse_the_wrong_method(base_model, client_of, staff, page, refused):
    address = reverse(f"models:{page}", args=[] if page == "list" else [base_model.pk])
    assert getattr(client_of(staff), refused)(address).status_code == 405


def test_list_of_an_architecture_that_is_none_is_empty(base_model, client_of, charlie):
    assert list(client_of(charlie).get("/models/?architecture=nothing").context["base_models"]) == []
    assert client_of(charlie).get("/models/?architecture=%00").context["architecture"] == ""


def test_list_shows_models_to_everybody_and_candidates_to_staff(base_model, models, client_of, charlie, staff):
    write_file(models / "other.safetensors", SD15)
    seen = client_of(charlie).get(reverse("models:list")).content.decode()
    assert "first" in seen
    assert "Stable Diffusion XL" in seen
    assert "F16" in seen
    assert f"/runs/new/?base_model={base_model.pk}" in seen
    assert "other.safetensors" not in seen
    assert reverse("models:register") not in seen
    seen = client_of(staff).get(reverse("models:list")).content.decode()
    assert "other.safetensors" in seen


def test_list_by_architecture(base_model, client_of, charlie):
    browser = client_of(charlie)
    assert list(browser.get("/models/?architecture=sdxl").context["base_models"]) == [base_model]
    response = browser.get("/models/?architecture=sd15")
    assert list(response.context["base_models"]) == []
    assert "No model of this architecture" in response.content.decode()


def test_list_without_models(models, client_of, charlie, staff):
    assert "Ask whoever runs this installation" in client_of(charlie).get("/models/").content.decode()
    assert str(models) in client_of(staff).get("/models/").content.decode()


def test_list_takes_as_many_queries_for_three_models_as_for_one(base_model, models, client_of, staff):
    browser = client_of(staff)
    with CaptureQueriesContext(
        connection,
    ) as one:
        browser.get("/models/")
    for name in ("b", "c"):
        write_file(models / f"{name}.safetensors", SD15)
        register_base_model(path=f"{name}.safetensors", registered_by=staff)
    with CaptureQueriesContext(connection) as three:
        browser.get("/models/")
    assert len(three) == len(one)


def test_detail(base_model, client_of, charlie):
    response = client_of(charlie).get(reverse("models:detail", args=[base_model.pk]))
    seen = response.content.decode()
    assert response.status_code == 200
    for words in ("first.safetensors", "1024 px", "epsilon", "Text encoder 2", "made &lt;b&gt;by&lt;/b&gt;"):
        assert words in seen
    assert f"/runs/new/?base_model={base_model.pk}" in seen
    assert reverse("models:forget", args=[base_model.pk]) not in seen


def test_detail_of_nothing(client_of, charlie):
    assert client_of(charlie).get("/models/99/").status_code == 404


def test_detail_says_which_files_are_gone(base_model, models, client_of, charlie):
    (models / "first.safetensors").unlink()
    response = client_of(charlie).get(reverse("models:detail", args=[base_model.pk]))
    assert response.status_code == 200
    assert "first.safetensors is missing from the models folder." in response.content.decode()


def test_hashing_polls_until_it_is_done(base_model, client_of, charlie):
    browser = client_of(charlie)
    address, detail = reverse("models:hashing", args=[base_model.pk]), reverse("models:detail", args=[base_model.pk])
    assert f'hx-get="{address}" hx-trigger="every 2s"' in browser.get(address).content.decode()
    part = browser.get(detail, headers={"HX-Request": "true"}).content.decode()
    assert f'hx-get="{detail}" hx-trigger="every 2s"' in part
    assert "<html" not in part
    Job.objects.update(status="running", done=512, total=1024)
    assert 'max="1024" value="512"' in browser.get(address).content.decode()
    Job.objects.update(status="queued")
    run_job(str(base_model.hashing_id))
    base_model.refresh_from_db()
    for response in (
        browser.get(address),
        browser.get(detail, headers={"HX-Request": "true"}),
        browser.get("/models/"),
    ):
        assert "every 2s" not in response.content.decode()
    assert base_model.sha256 in browser.get(detail).content.decode()


def test_hashing_says_why_it_failed(base_model, models, client_of, charlie):
    (models / "first.safetensors").unlink()
    run_job(str(base_model.hashing_id))
    seen = client_of(charlie).get(reverse("models:hashing", args=[base_model.pk])).content.decode()
    assert "first.safetensors cannot be read." in seen
    assert "every 2s" not in seen


def test_register(models, client_of, staff):
    write_file(models / "a.safetensors", SD15)
    browser = client_of(staff)
    assert "a.safetensors" in browser.get("/models/register/").content.decode()
    response = browser.post("/models/register/", {"path": "a.safetensors", "name": "Mine"})
    base_model = BaseModel.objects.get()
    assert (response.status_code, response.url) == (302, reverse("models:detail", args=[base_model.pk]))
    assert (base_model.name, base_model.registered_by) == ("Mine", staff)


@pytest.mark.parametrize(
    ("sent", "field", "words"),
    [
        ({}, "path", "This field is required."),
        ({"path": "../x"}, "path", "outside the models folder"),
        ({"path": "first.safetensors"}, "path", "registered already, as first"),
        ({"path": "other.safetensors", "name": "FIRST"}, "name", "exists already"),
    ],
)
def test_register_shows_errors_at_their_field(base_model, models, client_of, staff, sent, field, words):
    write_file(models / "other.safetensors", SD15)
    response = client_of(staff).post("/models/register/", sent)
    assert response.status_code == 400
    assert list(response.context["form"].errors) == [field]
    assert words in response.context["form"].errors[field][0]
    assert BaseModel.objects.count() == 1


@pytest.mark.parametrize("page", ["register", "forget"])
@pytest.mark.parametrize("method", ["get", "post"])
def test_writing_pages_refuse_who_is_not_staff(base_model, client_of, alice, page, method):
    address = reverse(f"models:{page}", args=[] if page == "register" else [base_model.pk])
    response = getattr(client_of(alice), method)(address)
    assert response.status_code == 403
    assert "Only staff can register and remove base models." in response.content.decode()
    assert BaseModel.objects.count() == 1


def test_rehash(base_model, client_of, staff, alice):
    run_job(str(base_model.hashing_id))
    address = reverse("models:rehash", args=[base_model.pk])
    assert client_of(alice).post(address).status_code == 403
    assert Job.objects.count() == 1
    assert client_of(staff).post(address).status_code == 302
    assert Job.objects.filter(status="queued").count() == 1
    assert client_of(staff).post(address).status_code == 409


def test_forget(base_model, models, client_of, staff):
    browser = client_of(staff)
    address = reverse("models:forget", args=[base_model.pk])
    assert "stay where they are" in browser.get(address).content.decode()
    assert BaseModel.objects.count() == 1
    response = browser.post(address)
    assert (response.status_code, response.url) == (302, "/models/")
    assert BaseModel.objects.count() == 0
    assert (models / "first.safetensors").exists()


def test_admin_looks_and_hashes_again(base_model, client_of, staff):
    browser = client_of(staff)
    listing = reverse("admin:models_registry_basemodel_changelist")
    change = reverse("admin:models_registry_basemodel_change", args=[base_model.pk])
    assert "first" in browser.get(listing).content.decode()
    assert browser.get(change).status_code == 200
    assert browser.post(change, {"name": "other"}).status_code == 403
    assert browser.get(reverse("admin:models_registry_modelcomponent_changelist")).status_code == 200
    run_job(str(base_model.hashing_id))
    browser.post(listing, {"action": "hash_again", "_selected_action": [base_model.pk]})
    base_model.refresh_from_db()
    assert (base_model.name, base_model.sha256, base_model.hashing.status) == ("first", "", "queued")
