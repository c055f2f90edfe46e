from __future__ import annotations

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from lorapilot.jobs import run_job
from models_registry.models import BaseModel
from models_registry.services import register_base_model
from tests.models_registry.conftest import SD15, SDXL, write_file

pytestmark = pytest.mark.django_db


@pytest.fixture
def base_model(models, staff):
    write_file(models / "first.safetensors", SDXL)
    return register_base_model(path="first.safetensors", registered_by=staff)


@pytest.mark.parametrize(("method", "address"), [("get", ""), ("post", ""), ("get", "{pk}/"), ("delete", "{pk}/")])
def test_api_refuses_who_is_not_signed_in(base_model, client, method, address):
    response = getattr(client, method)(f"/api/v1/models/{address.format(pk=base_model.pk)}")
    assert response.status_code == 401
    assert BaseModel.objects.count() == 1


def test_api_list_and_filter(base_model, models, api_of, charlie):
    write_file(models / "b.safetensors", SD15)
    second = register_base_model(path="b.safetensors")
    api = api_of(charlie)
    rows = api.get("/api/v1/models/").json()["results"]
    assert [(row["id"], row["architecture"]) for row in rows] == [(second.pk, "sd15"), (base_model.pk, "sdxl")]
    assert rows[1] == {
        "id": base_model.pk,
        "name": "first",
        "path": "first.safetensors",
        "layout": "file",
        "architecture": "sdxl",
        "resolution": 1024,
        "prediction_type": "epsilon",
        "bytes": base_model.bytes,
        "sha256": "",
        "hashing": {"id": str(base_model.hashing_id), "status": "queued", "done": 0, "total": 0, "message": ""},
        "registered_by": "staff",
        "created_at": rows[1]["created_at"],
    }
    found = api.get("/api/v1/models/?architecture=sd15").json()["results"]
    assert [row["id"] for row in found] == [second.pk]
    assert api.get("/api/v1/models/?architecture=nothing").status_code == 400


def test_api_list_takes_as_many_queries_for_three_models_as_for_one(base_model, models, api_of, charlie):
    api = api_of(charlie)
    api.get("/api/v1/models/")
    with CaptureQueriesContext(connection) as one:
        api.get("/api/v1/models/")
    for name in ("b", "c"):
        write_file(models / f"{name}.safetensors", SD15)
        register_base_model(path=f"{name}.safetensors")
    with CaptureQueriesContext(connection) as three:
        api.get("/api/v1/models/")
    assert len(three) == len(one)


def test_api_retrieve(base_model, models, api_of, charlie):
    run_job(str(base_model.hashing_id))
    found = api_of(charlie).get(f"/api/v1/models/{base_model.pk}/").json()
    component = base_model.components.get()
    assert found["components"] == [
        {
            "id": component.pk,
            "role": "checkpoint",
            "path": "first.safetensors",
            "bytes": base_model.bytes,
            "dtype": "F16",
            "parameters": component.parameters,
            "sha256": component.sha256,
            "is_attached": False,
        }
    ]
    assert found["sha256"] == component.sha256 != ""
    assert found["problems"] == []
    (models / "first.safetensors").unlink()
    found = api_of(charlie).get(f"/api/v1/models/{base_model.pk}/").json()
    assert found["problems"] == ["first.safetensors is missing from the models folder."]


def test_one_model_asks_for_its_files_once(base_model, api_of, client_of, charlie):
    for client, address in ((api_of(charlie), "/api/v1/models/"), (client_of(charlie), "/models/")):
        client.get(f"{address}{base_model.pk}/")
        with CaptureQueriesContext(connection) as queries:
            assert client.get(f"{address}{base_model.pk}/").status_code == 200
        assert sum("models_registry_modelcomponent" in query["sql"] for query in queries) == 1, address


@pytest.mark.parametrize("pk", ["99", "x", "9" * 40])
def test_api_retrieve_nothing(base_model, api_of, charlie, pk):
    assert api_of(charlie).get(f"/api/v1/models/{pk}/").status_code == 404


def test_api_create(models, api_of, staff):
    write_file(models / "a.safetensors", SD15)
    response = api_of(staff).post("/api/v1/models/", {"path": "a.safetensors"})
    assert response.status_code == 201
    base_model = BaseModel.objects.get()
    assert (response.json()["id"], base_model.name, base_model.registered_by) == (base_model.pk, "a", staff)


@pytest.mark.parametrize(
    ("sent", "status", "field"),
    [
        ({"path": "../secret"}, 400, "path"),
        ({"path": "first.safetensors"}, 409, "path"),
        ({"path": "b.safetensors", "name": "First"}, 409, "name"),
        ({}, 400, "path"),
    ],
)
def test_api_create_bad_input(base_model, models, api_of, staff, sent, status, field):
    write_file(models / "b.safetensors", SD15)
    response = api_of(staff).post("/api/v1/models/", sent)
    assert response.status_code == status
    assert list(response.json()["errors"]) == [field]
    assert BaseModel.objects.count() == 1


def test_api_writes_are_for_staff_with_a_writing_token(base_model, models, api_of, alice, staff):
    write_file(models / "b.safetensors", SD15)
    for api in (api_of(alice), api_of(staff, "read")):
        created = api.post("/api/v1/models/", {"path": "b.safetensors"})
        deleted = api.delete(f"/api/v1/models/{base_model.pk}/")
        assert (created.status_code, deleted.status_code) == (403, 403)
        assert created.json()["detail"]
    assert BaseModel.objects.get() == base_model


def test_api_delete(base_model, models, api_of, staff):
    assert api_of(staff).delete(f"/api/v1/models/{base_model.pk}/").status_code == 204
    assert BaseModel.objects.count() == 0
    assert (models / "first.safetensors").exists()


@pytest.mark.parametrize("method", ["put", "patch"])
def test_api_wrong_method(base_model, api_of, staff, method):
    response = getattr(api_of(staff), method)(f"/api/v1/models/{base_model.pk}/", {"name": "x"})
    assert response.status_code == 405
