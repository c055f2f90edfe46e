"""The page of models that can be pulled, its parts for htmx, and the API."""

import pytest
from django.urls import reverse

from lorapilot.jobs import run_job
from lorapilot.models import AuditEntry, Job, JobStatus
from lorapilot.services import set_secret
from models_registry.models import BaseModel, Pull
from tests.models_registry.conftest import SDXL, write_file

pytestmark = pytest.mark.django_db
PAGE = "/models/get/"
API = "/api/v1/models/manifest/"
BASE = "base|hf_file|a/b:base.safetensors|checkpoints||1500|openrail++|no|sdxl|builtin,kohya|checkpoint"
VAE = "part|hf_file|a/b:vae.safetensors|vae|||mit|no|sdxl|kohya|vae"
GATED = "locked|hf_file|g/b:locked.safetensors|diffusion_models|||other|yes|flux|kohya|transformer"
IDLE = {"name": "base", "state": "idle", "progress_pct": 0.0, "last_line": "", "error": ""}


@pytest.fixture
def stocked(hub, manifest_of, tmp_path):
    manifest_of(BASE, VAE, GATED)
    hub.files["a/b"] = {
        "base.safetensors": write_file(tmp_path / "base.safetensors", SDXL).read_bytes(),
        "vae.safetensors": b"x" * 2000,
    }
    return hub


def text(response):
    return response.content.decode()


# --- Pages ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("address", [PAGE, f"{PAGE}base/", f"{PAGE}base/pull/", f"{PAGE}base/cancel/"])
def test_pages_ask_anonymous_visitors_to_sign_in(stocked, client, db, address):
    for response in (client.get(address), client.post(address)):
        assert (response.status_code, response.url) == (302, f"{reverse('account_login')}?next={address}")
    assert Pull.objects.count() == 0


@pytest.mark.parametrize(
    ("method", "address"),
    [("post", PAGE), ("post", f"{PAGE}base/"), ("get", f"{PAGE}base/pull/"), ("get", f"{PAGE}base/cancel/")],
)
def test_pages_refuse_the_wrong_method(stocked, client_of, staff, method, address):
    assert getattr(client_of(staff), method)(address).status_code == 405


def test_page_for_staff(stocked, client_of, staff):
    page = text(client_of(staff).get(PAGE))
    for words in (
        "checkpoints/base.safetensors",
        "1.5\xa0KB",
        "openrail++",
        "built-in, Kohya",
        "https://huggingface.co/a/b",
    ):
        assert words in page
    assert f'action="{PAGE}base/pull/"' in page
    assert f'action="{PAGE}locked/pull/"' not in page
    assert 'Accept its <a href="https://huggingface.co/g/b" rel="noreferrer">licence</a>' in page
    assert "Only staff can pull models" not in page


def test_page_for_others_explains_and_offers_nothing(stocked, client_of, charlie):
    page = text(client_of(charlie).get(PAGE))
    assert "Only staff can pull models. Ask whoever runs this installation." in page
    assert "set that token" not in page
    assert '<form method="post" action="/models/' not in page


def test_page_offers_a_gated_model_to_who_has_a_token(stocked, client_of, staff):
    set_secret(staff, name="huggingface", value="hf_x")
    page = text(client_of(staff).get(PAGE))
    assert f'action="{PAGE}locked/pull/"' in page
    assert "hf_x" not in page


def test_page_of_a_family(stocked, client_of, charlie):
    response = client_of(charlie).get(f"{PAGE}?family=flux")
    assert [item["row"].name for item in response.context["items"]] == ["locked"]
    assert response.context["families"] == {"sdxl": "Stable Diffusion XL", "flux": "FLUX.1"}
    assert "has no model of this family" in text(client_of(charlie).get(f"{PAGE}?family=none"))


def test_page_tells_staff_what_is_wrong_with_the_manifest(manifest_of, models, client_of, staff, charlie):
    manifest_of("a|b", "<b>|hf_repo|a/b|c")
    page = text(client_of(staff).get(PAGE))
    assert "Line 1: 2 columns instead of 4" in page
    assert "Line 2: the name &#x27;&lt;b&gt;&#x27;" in page
    assert "The manifest is empty." in page
    assert "Line 1" not in text(client_of(charlie).get(PAGE))


def test_list_leads_to_the_page(models, client_of, charlie):
    assert f'href="{PAGE}"' in text(client_of(charlie).get("/models/"))


def test_pull_watch_and_register(stocked, models, client_of, staff, charlie):
    browser = client_of(staff)
    response = browser.post(f"{PAGE}base/pull/")
    assert (response.status_code, response.url) == (302, f"{PAGE}?family=sdxl")
    pull = Pull.objects.get()
    assert (pull.name, pull.requested_by, pull.job.owner) == ("base", staff, staff)
    Job.objects.update(status=JobStatus.RUNNING, done=512, total=1024, message="3.0 MB/s, 2 min left")
    part = text(browser.get(f"{PAGE}base/"))
    assert f'hx-get="{PAGE}base/" hx-trigger="every 2s"' in part
    assert 'max="100" value="50"' in part
    assert "3.0 MB/s, 2 min left" in part
    assert f'action="{PAGE}base/cancel/"' in part
    seen = text(client_of(charlie).get(f"{PAGE}base/"))
    assert ('value="50"' in seen, "/cancel/" in seen) == (True, False)
    Job.objects.update(status=JobStatus.QUEUED)
    run_job(str(pull.job_id))
    part = text(browser.get(f"{PAGE}base/"))
    assert ("every 2s" in part, "Installed" in part, "Register as base model" in part) == (False, True, True)
    browser.post("/models/register/", {"path": "checkpoints/base.safetensors"})
    base_model = BaseModel.objects.get()
    assert (base_model.path, base_model.architecture) == ("checkpoints/base.safetensors", "sdxl")
    part = text(browser.get(f"{PAGE}base/"))
    assert ("Registered" in part, f'href="/models/{base_model.pk}/"' in part) == (True, True)


def test_part_that_is_no_base_model_is_not_offered_for_registering(stocked, models, client_of, staff):
    (models / "vae").mkdir()
    (models / "vae" / "vae.safetensors").write_bytes(b"x")
    part = text(client_of(staff).get(f"{PAGE}part/"))
    assert ("Installed" in part, "Register" in part) == (True, False)


def test_state_says_why_a_pull_failed(stocked, client_of, staff):
    stocked.files["a/b"].clear()
    browser = client_of(staff)
    browser.post(f"{PAGE}base/pull/")
    run_job(str(Pull.objects.get().job_id))
    part = text(browser.get(f"{PAGE}base/"))
    assert "a/b has no base.safetensors. The manifest is out of date." in part
    assert "Pull again" in part


def test_cancel_on_the_page(stocked, client_of, staff):
    browser = client_of(staff)
    browser.post(f"{PAGE}base/pull/")
    response = browser.post(f"{PAGE}base/cancel/")
    assert (response.status_code, response.url) == (302, f"{PAGE}?family=sdxl")
    assert Job.objects.get().status == JobStatus.CANCELLED
    assert browser.post(f"{PAGE}base/cancel/").status_code == 409


def test_pull_by_others_is_refused(stocked, client_of, charlie):
    browser = client_of(charlie)
    assert [browser.post(f"{PAGE}base/{what}/").status_code for what in ("pull", "cancel")] == [403, 403]
    assert (Pull.objects.count(), Job.objects.count(), AuditEntry.objects.filter(action__contains="pull").count()) == (
        0,
        0,
        0,
    )


@pytest.mark.parametrize("name", ["nothing", "..", "a b"])
def test_pages_of_an_unknown_model(stocked, client_of, staff, name):
    browser = client_of(staff)
    assert browser.get(f"{PAGE}{name}/").status_code == 404
    assert browser.post(f"{PAGE}{name}/pull/").status_code == 404


# --- API --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("method", "address"),
    [("get", API), ("get", f"{API}base/pull/"), ("post", f"{API}base/pull/"), ("delete", f"{API}base/pull/")],
)
def test_api_refuses_who_is_not_signed_in(stocked, client, db, method, address):
    assert getattr(client, method)(address).status_code == 401
    assert Pull.objects.count() == 0


@pytest.mark.parametrize(("method", "address"), [("post", API), ("put", f"{API}base/pull/")])
def test_api_refuses_the_wrong_method(stocked, api_of, staff, method, address):
    assert getattr(api_of(staff), method)(address).status_code == 405


def test_api_manifest(stocked, api_of, charlie, manifest_of):
    manifest_of(BASE, "wrong", GATED)
    body = api_of(charlie).get(API).json()
    assert [row["name"] for row in body["models"]] == ["base", "locked"]
    assert body["models"][0] == {
        "name": "base",
        "kind": "hf_file",
        "source": "a/b:base.safetensors",
        "subdir": "checkpoints",
        "include": "",
        "expected_size_bytes": 1500,
        "category": "checkpoints",
        "installed": False,
        "size_bytes": 0,
        "target_path": "checkpoints/base.safetensors",
        "licence": "openrail++",
        "gated": False,
        "architecture": "sdxl",
        "stacks": ["builtin", "kohya"],
        "role": "checkpoint",
        "base_model": None,
    }
    assert [problem["line"] for problem in body["problems"]] == [2]


def test_api_pull(stocked, models, api_of, staff, charlie):
    api = api_of(staff)
    assert api.get(f"{API}base/pull/").json() == IDLE
    response = api.post(f"{API}base/pull/", {"subdir": "mine"})
    assert (response.status_code, response.json()) == (202, IDLE | {"state": "running"})
    assert api.post(f"{API}base/pull/").status_code == 409
    run_job(str(Pull.objects.get().job_id))
    done = IDLE | {"state": "done", "progress_pct": 100.0, "last_line": "Installed."}
    assert api_of(charlie).get(f"{API}base/pull/").json() == done
    assert (models / "mine" / "base.safetensors").read_bytes() == stocked.files["a/b"]["base.safetensors"]


def test_api_pull_reports_errors(stocked, api_of, staff):
    api = api_of(staff)
    assert api.post(f"{API}base/pull/", {"subdir": "../x"}).json()["errors"].keys() == {"subdir"}
    assert api.post(f"{API}nothing/pull/").status_code == 404
    response = api.post(f"{API}locked/pull/")
    assert (response.status_code, "Accept its licence at https://huggingface.co/g/b" in response.json()["detail"]) == (
        400,
        True,
    )
    assert Pull.objects.count() == 0
    stocked.files["a/b"].clear()
    api.post(f"{API}base/pull/")
    run_job(str(Pull.objects.get().job_id))
    status = api.get(f"{API}base/pull/").json()
    reason = "a/b has no base.safetensors. The manifest is out of date."
    assert (status["state"], status["error"], status["last_line"]) == ("error", reason, reason)


def test_api_cancel(stocked, api_of, staff):
    api = api_of(staff)
    assert api.delete(f"{API}base/pull/").status_code == 409
    api.post(f"{API}base/pull/")
    assert api.delete(f"{API}base/pull/").json() == IDLE | {"last_line": "Cancelled."}
    assert Job.objects.get().status == JobStatus.CANCELLED


def test_api_pull_is_for_staff_with_a_write_token(stocked, api_of, charlie, staff):
    assert api_of(charlie).post(f"{API}base/pull/").status_code == 403
    assert api_of(staff, "read").post(f"{API}base/pull/").status_code == 403
    assert (Pull.objects.count(), Job.objects.count()) == (0, 0)
