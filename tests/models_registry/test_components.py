"""Parts of models: what a file is, and attaching it to a base model through the service, the page and the API."""

from __future__ import annotations

import hashlib
import json

import pytest
from django.db import IntegrityError, connection, transaction
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from lorapilot.errors import Conflict, NotAllowed, UserError
from lorapilot.jobs import run_job
from lorapilot.models import AuditEntry, Job, JobStatus
from models_registry import services
from models_registry.enums import ATTACHABLE, Role, describe_role
from models_registry.models import BaseModel, ModelComponent
from models_registry.parts import FOLDER_ENCODERS, recognise_part
from models_registry.recognition import TITLES, Unrecognised
from models_registry.selectors import (
    PartCandidate,
    attached_components,
    component_paths,
    missing_files,
    part_candidates,
    unregistered_candidates,
)
from tests.models_registry import published
from tests.models_registry.conftest import FLUX, SD15, SDXL, VAE, write_file
from tests.models_registry.published import GEMMA2, PARTS, QWEN3, clip, t5, vae

pytestmark = pytest.mark.django_db

REFUSED = [
    (SDXL, "is no part of a model that is known here: VAE, CLIP-L"),
    (FLUX, "is no part of a model"),
    (FLUX | VAE, "is no part of a model"),
    (clip(640), "is no part of a model"),
    ({"vision_model.encoder.layers.0.self_attn.q_proj.weight": (8, 768)}, "is no part of a model"),
    ({}, "is no part of a model"),
    (t5(4096) | {"encoder.block.0.quant_state.bitsandbytes__nf4": (8,)}, "quantised with bitsandbytes"),
    ({"lora_te_x.lora_up.weight": (8, 4)}, "is a LoRA"),
]


@pytest.fixture
def flux(models):
    write_file(models / "flux/flux.safetensors", FLUX)
    return services.register_base_model(path="flux/flux.safetensors", name="FLUX")


@pytest.fixture
def files(models):
    """One file of each kind, and a folder of the transformers kind in two pieces."""
    write_file(models / "parts/ae.safetensors", vae(16), dtype="F32")
    write_file(models / "parts/l.safetensors", clip(768))
    write_file(models / "parts/xxl.safetensors", t5(4096))
    names = list(QWEN3)
    for piece, held in (("1", names[:1]), ("2", names[1:])):
        write_file(models / f"qwen/model-{piece}.safetensors", {name: QWEN3[name] for name in held})
    (models / "qwen/config.json").write_text("{}")
    (models / "qwen/model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    (models / "qwen/README.md").write_text("not counted")
    return models / "parts"


@pytest.mark.parametrize(("role", "title", "tensors"), PARTS)
def test_part_is_recognised_by_its_tensors(tmp_path, role, title, tensors):
    path = write_file(tmp_path / "surely-a-checkpoint.safetensors", tensors)
    part = recognise_part(path)
    assert (part.role, part.title, part.bytes, part.dtype) == (role, title, path.stat().st_size, "F16")


@pytest.mark.parametrize(("tensors", "words"), REFUSED)
def test_what_is_no_part(tmp_path, tensors, words):
    with pytest.raises(Unrecognised, match=words):
        recognise_part(write_file(tmp_path / "vae.safetensors", tensors))


def test_part_that_is_a_folder(files, models):
    part = recognise_part(models / "qwen")
    counted = ["config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]
    assert (part.role, part.title, part.bytes) == (
        "llm",
        "Qwen3 4B",
        sum((models / "qwen" / name).stat().st_size for name in counted),
    )
    with pytest.raises(Unrecognised, match=r"one of several pieces\. Name the folder qwen"):
        recognise_part(models / "qwen/model-1.safetensors")
    with pytest.raises(Unrecognised, match=r"needs a config\.json"):
        recognise_part(files)


@pytest.mark.parametrize("name", ["x.pt", "x.bin"])
def test_part_that_is_a_pickle_is_refused_unread(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(Unrecognised, match="can run any program"):
        recognise_part(tmp_path / name)


def test_part_candidates(files, models, tiny, flux):
    assert part_candidates() == [
        PartCandidate(path, role, title, size)
        for path, role, title, size in (
            ("parts/ae.safetensors", Role.VAE, published.PARTS[1][1], (files / "ae.safetensors").stat().st_size),
            ("parts/l.safetensors", Role.CLIP_L, "CLIP-L", (files / "l.safetensors").stat().st_size),
            ("parts/xxl.safetensors", Role.T5, "T5-XXL", (files / "xxl.safetensors").stat().st_size),
            ("qwen", Role.LLM, "Qwen3 4B", recognise_part(models / "qwen").bytes),
        )
    ]
    assert [candidate.path for candidate in unregistered_candidates()] == ["tiny"]


def test_words_are_those_of_the_database():
    roles = {role for encoders in FOLDER_ENCODERS.values() for role in encoders.values()}
    assert roles < set(ATTACHABLE)
    assert set(FOLDER_ENCODERS) <= set(TITLES)
    assert describe_role("clip_l") == "CLIP-L text encoder"
    with pytest.raises(ValueError, match="nothing"):
        describe_role("nothing")


def test_attach(flux, files, models, staff):
    component = services.attach_component(flux, role="vae", path=" parts/ae.safetensors ", by=staff)
    size = (files / "ae.safetensors").stat().st_size
    assert (component.role, component.path, component.bytes, component.dtype, component.is_attached) == (
        "vae",
        "parts/ae.safetensors",
        size,
        "F32",
        True,
    )
    assert attached_components(flux) == [component]
    assert list(AuditEntry.objects.values_list("actor", "action", "subject")) == [
        (staff.pk, "model file attached", "FLUX: parts/ae.safetensors")
    ]
    flux.refresh_from_db()
    assert (flux.precision, flux.bytes) == ("F16", (models / "flux/flux.safetensors").stat().st_size)
    assert [row.status for row in Job.objects.order_by("created_at")] == [JobStatus.CANCELLED, JobStatus.QUEUED]


def test_attach_leaves_the_models_own_checksum_and_adds_one(flux, files, models):
    run_job(str(flux.hashing_id))
    own = BaseModel.objects.get().sha256
    component = services.attach_component(flux, role="vae", path="parts/ae.safetensors")
    run_job(str(component.base_model.hashing_id))
    component.refresh_from_db()
    flux.refresh_from_db()
    assert flux.sha256 == own == hashlib.sha256((models / "flux/flux.safetensors").read_bytes()).hexdigest()
    assert component.sha256 == hashlib.sha256((files / "ae.safetensors").read_bytes()).hexdigest()
    assert not flux.is_hashing


def test_attach_while_the_model_is_being_hashed_loses_no_checksum(flux, files):
    for role, path in (("vae", "parts/ae.safetensors"), ("clip_l", "parts/l.safetensors")):
        component = services.attach_component(flux, role=role, path=path)
    run_job(str(component.base_model.hashing_id))
    assert not flux.components.filter(sha256="").exists()
    assert BaseModel.objects.get().sha256 != ""


def test_attach_a_folder(flux, files, models):
    component = services.attach_component(flux, role="llm", path="qwen")
    run_job(str(component.base_model.hashing_id))
    component.refresh_from_db()
    counted = ["config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]
    digests = [hashlib.sha256((models / "qwen" / name).read_bytes()).hexdigest() for name in counted]
    assert component.bytes == sum((models / "qwen" / name).stat().st_size for name in counted)
    assert component.sha256 == services.combined_sha256(digests)
    assert missing_files(flux) == []
    (models / "qwen/model-2.safetensors").unlink()
    (sentence,) = missing_files(flux)
    assert sentence.startswith("qwen has ")


def test_attach_again_replaces(flux, files, models):
    services.attach_component(flux, role="vae", path="parts/ae.safetensors")
    services.attach_component(flux, role="vae", path="parts/ae.safetensors")
    write_file(models / "other.safetensors", vae(4))
    services.attach_component(flux, role="vae", path="other.safetensors")
    assert [row.path for row in attached_components(BaseModel.objects.get())] == ["other.safetensors"]


def test_one_file_can_be_attached_to_two_models(flux, files, models):
    write_file(models / "second.safetensors", published.CHROMA)
    second = services.register_base_model(path="second.safetensors")
    for base_model in (flux, second):
        services.attach_component(base_model, role="t5", path="parts/xxl.safetensors")
    assert ModelComponent.objects.filter(is_attached=True).count() == 2


def test_database_refuses_two_attached_files_of_a_role(flux):
    flux.components.create(role="vae", path="a", bytes=1, is_attached=True)
    with pytest.raises(IntegrityError), transaction.atomic():
        flux.components.create(role="vae", path="b", bytes=1, is_attached=True)


@pytest.mark.parametrize(
    ("role", "path", "field", "words"),
    [
        ("clip_l", "parts/ae.safetensors", "path", "^This file is a VAE, not a CLIP-L text encoder.$"),
        ("vae", "parts/l.safetensors", "path", "^This file is a CLIP-L text encoder, not a VAE.$"),
        ("clip_g", "parts/l.safetensors", "path", "^This file is a CLIP-L text encoder, not a CLIP-G text encoder.$"),
        ("vae", "qwen", "path", "^This folder is a language model, not a VAE.$"),
        ("clip_g", "h.safetensors", "path", "^This file is a CLIP-H text encoder, not a CLIP-G text encoder.$"),
        ("clip_l", "clip", "path", r"one \.safetensors file"),
        ("llm", "qwen/model-1.safetensors", "path", "one of several pieces"),
        ("vae", "flux/flux.safetensors", "path", "is no part of a model"),
        ("vae", "", "path", "Enter the path of a file"),
        ("vae", "nothing.safetensors", "path", "There is no nothing.safetensors"),
        ("vae", ".", "path", "models folder itself"),
        ("vae", "../ae.safetensors", "path", "outside the models folder"),
        ("vae", "link.safetensors", "path", "outside the models folder"),
        ("t5", "linked", "path", "a link that leaves the models folder"),
        ("vae", "ae.pt", "path", "pickle"),
        ("vae", "notes.txt", "path", r"no \.safetensors file"),
        ("unet", "parts/ae.safetensors", "role", "Choose what it is: VAE, CLIP-L text encoder"),
        ("checkpoint", "parts/ae.safetensors", "role", "Choose what it is"),
        ("nothing", "parts/ae.safetensors", "role", "Choose what it is"),
    ],
)
def test_attach_what_cannot_be(flux, files, models, tmp_path, role, path, field, words):
    for outside in (models.parent / "ae.safetensors", tmp_path / "outside.safetensors"):
        write_file(outside, vae(16))
    (models / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    write_file(tmp_path / "t5.safetensors", t5(64))
    (models / "linked").mkdir()
    (models / "linked/config.json").write_text("{}")
    (models / "linked/model.safetensors").symlink_to(tmp_path / "t5.safetensors")
    write_file(models / "clip/model.safetensors", clip(768))
    (models / "clip/config.json").write_text("{}")
    write_file(models / "h.safetensors", clip(1024))
    (models / "ae.pt").write_bytes(b"x")
    (models / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=words) as refusal:
        services.attach_component(flux, role=role, path=path)
    assert refusal.value.field == field
    assert ModelComponent.objects.filter(is_attached=True).count() == AuditEntry.objects.count() == 0
    assert Job.objects.get().status == JobStatus.QUEUED


def test_attach_a_link_that_stays_inside_is_its_file(flux, files, models):
    (models / "again.safetensors").symlink_to(files / "ae.safetensors")
    assert services.attach_component(flux, role="vae", path="again.safetensors").path == "parts/ae.safetensors"


def test_attach_a_file_of_the_model_itself(tiny, models):
    base_model = services.register_base_model(path="tiny")
    with pytest.raises(Conflict, match="is a file of tiny already"):
        services.attach_component(base_model, role="vae", path="tiny/vae/diffusion_pytorch_model.safetensors")
    assert not ModelComponent.objects.filter(is_attached=True).exists()


def test_attach_and_detach_are_for_staff(flux, files, alice):
    with pytest.raises(NotAllowed):
        services.attach_component(flux, role="vae", path="parts/ae.safetensors", by=alice)
    component = services.attach_component(flux, role="vae", path="parts/ae.safetensors")
    with pytest.raises(NotAllowed):
        services.detach_component(component, by=alice)
    assert attached_components(flux) == [component]


def test_detach(flux, files, staff):
    component = services.attach_component(flux, role="vae", path="parts/ae.safetensors")
    services.detach_component(component, by=staff)
    assert attached_components(flux) == []
    assert (files / "ae.safetensors").exists()
    assert AuditEntry.objects.get(action="model file detached").subject == "FLUX: parts/ae.safetensors"
    with pytest.raises(Conflict, match="belongs to FLUX itself"):
        services.detach_component(flux.components.get(), by=staff)


def test_missing_files_covers_what_is_attached(flux, files):
    services.attach_component(flux, role="vae", path="parts/ae.safetensors")
    (files / "ae.safetensors").unlink()
    assert missing_files(flux) == ["parts/ae.safetensors is missing from the models folder."]


def test_hash_of_an_attached_file_that_is_gone_says_so_and_keeps_the_models_own(flux, files):
    component = services.attach_component(flux, role="vae", path="parts/ae.safetensors")
    (files / "ae.safetensors").unlink()
    run_job(str(component.base_model.hashing_id))
    flux.refresh_from_db()
    assert flux.sha256 != ""
    assert flux.hashing.status == JobStatus.FAILED
    assert flux.hashing.message == "parts/ae.safetensors cannot be read. Put it back, or take it off the model."


def test_component_paths_of_a_file(flux, files, models):
    assert component_paths(flux) == {Role.TRANSFORMER: models / "flux/flux.safetensors"}
    services.attach_component(flux, role="vae", path="parts/ae.safetensors")
    services.attach_component(flux, role="llm", path="qwen")
    assert component_paths(flux) == {
        Role.TRANSFORMER: models / "flux/flux.safetensors",
        Role.VAE: files / "ae.safetensors",
        Role.LLM: models / "qwen",
    }


def test_component_paths_of_a_folder_and_what_is_attached_to_it(tiny, files, models):
    base_model = services.register_base_model(path="tiny")
    parts = {
        Role.UNET: tiny / "unet",
        Role.VAE: tiny / "vae",
        Role.TEXT_ENCODER: tiny / "text_encoder",
        Role.TEXT_ENCODER_2: tiny / "text_encoder_2",
        Role.CLIP_L: tiny / "text_encoder",
        Role.CLIP_G: tiny / "text_encoder_2",
        Role.TOKENIZER: tiny / "tokenizer",
        Role.TOKENIZER_2: tiny / "tokenizer_2",
        Role.SCHEDULER: tiny / "scheduler",
    }
    assert component_paths(base_model) == parts
    services.attach_component(base_model, role="vae", path="parts/ae.safetensors")
    assert component_paths(base_model) == parts | {Role.VAE: files / "ae.safetensors"}


def test_component_paths_take_one_query_whatever_is_attached(flux, files):
    with CaptureQueriesContext(connection) as none:
        component_paths(flux)
    services.attach_component(flux, role="vae", path="parts/ae.safetensors")
    services.attach_component(flux, role="clip_l", path="parts/l.safetensors")
    with CaptureQueriesContext(connection) as two:
        component_paths(flux)
    assert len(none) == len(two) == 1


def address_of(page, *keys):
    return reverse(f"models:{page}", args=keys)


def test_page_shows_what_is_attached_to_everybody_and_the_form_to_staff(flux, files, client_of, charlie, staff):
    address = address_of("detail", flux.pk)
    assert "<h2>Other files" not in client_of(charlie).get(address).content.decode()
    component = services.attach_component(flux, role="vae", path="parts/ae.safetensors")
    seen = client_of(charlie).get(address).content.decode()
    assert "Other files it is trained with" in seen
    assert "parts/ae.safetensors" in seen
    assert address_of("attach", flux.pk) not in seen
    assert address_of("detach", flux.pk, component.pk) not in seen
    seen = client_of(staff).get(address).content.decode()
    for words in (
        address_of("attach", flux.pk),
        address_of("detach", flux.pk, component.pk),
        'value="parts/xxl.safetensors"',
        "qwen – Qwen3 4B",
    ):
        assert words in seen


@pytest.mark.parametrize(
    "sent", [{"found": "parts/ae.safetensors"}, {"path": "parts/ae.safetensors", "found": "parts/l.safetensors"}]
)
def test_page_attaches_what_was_found_or_typed(flux, files, client_of, staff, sent):
    response = client_of(staff).post(address_of("attach", flux.pk), {"role": "vae"} | sent)
    assert (response.status_code, response.url) == (302, address_of("detail", flux.pk))
    assert [row.path for row in attached_components(flux)] == ["parts/ae.safetensors"]


@pytest.mark.parametrize(
    ("sent", "field", "words"),
    [
        ({}, "role", "required"),
        ({"role": "unet", "path": "parts/ae.safetensors"}, "role", "not one of the available choices"),
        ({"role": "vae"}, "path", "Enter the path of a file"),
        ({"role": "vae", "found": "flux/flux.safetensors"}, "found", "not one of the available choices"),
        ({"role": "vae", "found": "parts/l.safetensors"}, "found", "This file is a CLIP-L text encoder, not a VAE."),
        ({"role": "vae", "path": "parts/l.safetensors"}, "path", "This file is a CLIP-L text encoder, not a VAE."),
    ],
)
def test_page_shows_why_a_file_cannot_be_attached(flux, files, client_of, staff, sent, field, words):
    response = client_of(staff).post(address_of("attach", flux.pk), sent)
    assert response.status_code == 400
    assert words in response.context["attach_form"].errors[field][0]
    assert '<details class="more" open>' in response.content.decode()
    assert attached_components(flux) == []


def test_page_detaches(flux, files, client_of, staff):
    component = services.attach_component(flux, role="vae", path="parts/ae.safetensors")
    browser = client_of(staff)
    response = browser.post(address_of("detach", flux.pk, component.pk))
    assert (response.status_code, response.url) == (302, address_of("detail", flux.pk))
    assert attached_components(flux) == []
    assert browser.post(address_of("detach", flux.pk, component.pk)).status_code == 404
    assert browser.post(address_of("detach", flux.pk, flux.components.get().pk)).status_code == 404
    assert browser.post(address_of("detach", flux.pk + 1, component.pk)).status_code == 404


@pytest.mark.parametrize("page", ["attach", "detach"])
def test_pages_that_write_refuse_get_strangers_and_who_is_not_staff(flux, files, client, client_of, alice, page):
    component = services.attach_component(flux, role="vae", path="parts/ae.safetensors")
    address = address_of(page, flux.pk, *([component.pk] if page == "detach" else []))
    assert client_of(alice).get(address).status_code == 405
    assert client_of(alice).post(address, {"role": "t5", "path": "parts/xxl.safetensors"}).status_code == 403
    assert client.post(address).url == f"{reverse('account_login')}?next={address}"
    assert attached_components(flux) == [component]


def test_progress_brings_the_checksums_of_what_is_attached_when_they_are_there(flux, files, client_of, charlie):
    component = services.attach_component(flux, role="vae", path="parts/ae.safetensors")
    browser, address = client_of(charlie), address_of("detail", flux.pk)
    assert "hx-swap-oob" not in browser.get(address, headers={"HX-Request": "true"}).content.decode()
    run_job(str(component.base_model.hashing_id))
    component.refresh_from_db()
    part = browser.get(address, headers={"HX-Request": "true"}).content.decode()
    assert 'id="attached" hx-swap-oob="true"' in part
    assert component.sha256 in part
    assert "hx-swap-oob" not in browser.get(address).content.decode()


def test_detail_takes_as_many_queries_for_three_attached_files_as_for_one(flux, files, client_of, staff):
    browser, address = client_of(staff), address_of("detail", flux.pk)
    services.attach_component(flux, role="vae", path="parts/ae.safetensors")
    browser.get(address)
    with CaptureQueriesContext(connection) as one:
        browser.get(address)
    services.attach_component(flux, role="clip_l", path="parts/l.safetensors")
    services.attach_component(flux, role="t5", path="parts/xxl.safetensors")
    with CaptureQueriesContext(connection) as three:
        browser.get(address)
    assert len(three) == len(one)


def test_admin_shows_what_is_attached(flux, files, client_of, staff):
    services.attach_component(flux, role="vae", path="parts/ae.safetensors")
    change = reverse("admin:models_registry_basemodel_change", args=[flux.pk])
    assert "parts/ae.safetensors" in client_of(staff).get(change).content.decode()


def api_address(base_model, component=None):
    return f"/api/v1/models/{base_model.pk}/components/" + (f"{component.pk}/" if component else "")


def test_api_lists_own_and_attached_files(flux, files, api_of, charlie):
    component = services.attach_component(flux, role="vae", path="parts/ae.safetensors")
    rows = api_of(charlie).get(api_address(flux)).json()
    assert [(row["role"], row["path"], row["is_attached"]) for row in rows] == [
        ("transformer", "flux/flux.safetensors", False),
        ("vae", "parts/ae.safetensors", True),
    ]
    assert rows[1]["id"] == component.pk
    assert api_of(charlie).get("/api/v1/models/99/components/").status_code == 404


def test_api_attaches(flux, files, api_of, staff):
    response = api_of(staff).post(api_address(flux), {"role": "t5", "path": "parts/xxl.safetensors"})
    (component,) = attached_components(flux)
    assert response.status_code == 201
    assert response.json() == {
        "id": component.pk,
        "role": "t5",
        "path": "parts/xxl.safetensors",
        "bytes": component.bytes,
        "dtype": "F16",
        "parameters": component.parameters,
        "sha256": "",
        "is_attached": True,
    }


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        ({}, "path"),
        ({"role": "unet", "path": "parts/ae.safetensors"}, "role"),
        ({"role": "vae", "path": "parts/l.safetensors"}, "path"),
        ({"role": "vae", "path": "../x"}, "path"),
    ],
)
def test_api_attach_bad_input(flux, files, api_of, staff, sent, field):
    response = api_of(staff).post(api_address(flux), sent)
    assert response.status_code == 400
    assert field in response.json()["errors"]
    assert attached_components(flux) == []


def test_api_detaches(flux, files, api_of, staff):
    component = services.attach_component(flux, role="vae", path="parts/ae.safetensors")
    api = api_of(staff)
    assert api.delete(api_address(flux, flux.components.get(is_attached=False))).status_code == 409
    assert api.delete(api_address(flux, component)).status_code == 204
    assert api.delete(api_address(flux, component)).status_code == 404
    assert attached_components(flux) == []


def test_api_of_components_is_for_staff_with_a_writing_token(flux, files, client, api_of, alice, staff):
    component = services.attach_component(flux, role="vae", path="parts/ae.safetensors")
    sent = {"role": "t5", "path": "parts/xxl.safetensors"}
    for api in (api_of(alice), api_of(staff, "read")):
        assert api.post(api_address(flux), sent).status_code == 403
        assert api.delete(api_address(flux, component)).status_code == 403
    assert client.get(api_address(flux)).status_code == client.post(api_address(flux), sent).status_code == 401
    assert api_of(staff).put(api_address(flux), sent).status_code == 405
    assert api_of(staff).get(api_address(flux, component)).status_code == 405
    assert attached_components(flux) == [component]


def test_unet_alone_is_still_refused(models):
    write_file(models / "unet.safetensors", {name: shape for name, shape in SD15.items() if name not in VAE})
    with pytest.raises(UserError, match="but not the VAE"):
        services.register_base_model(path="unet.safetensors")


def test_gemma_is_not_taken_for_a_transformer(models):
    write_file(models / "gemma.safetensors", GEMMA2)
    with pytest.raises(UserError, match="holds only a text encoder"):
        services.register_base_model(path="gemma.safetensors")
