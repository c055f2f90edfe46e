"""The LoRA library: the final LoRAs of runs and uploaded files, for those who may see them, over pages and API."""

import errno
import hashlib
import io
import json
import uuid
from pathlib import Path

import pytest
from django.contrib.auth.models import Group
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from lorapilot import jobs, partials
from lorapilot.models import AuditEntry, Job, JobStatus, User
from lorapilot.services import share
from lorapilot.workspace import sha256_of
from models_registry import adapter_services
from models_registry.models import Adapter, AdapterTag, AdapterUpload, BaseModel
from runs import library, publishing, services
from runs.library_urls import urlpatterns
from runs.models import Checkpoint, Run, Sample
from tests.factories import make_run, picture_file
from tests.models_registry.loras import SD15, SDXL, peft, write_lora

pytestmark = pytest.mark.django_db
API, UPLOADS = "/api/v1/loras/", "/api/v1/lora-uploads/"
NOT_YOURS = "Only the owner and staff can change this. Ask the owner, or make a copy of your own."
ONLY_OWNER = "Only the owner and staff can share and delete this. Ask the owner."
METADATA = {"ss_sd_model_name": "base.safetensors", "modelspec.trigger_phrase": "sks cat", "modelspec.title": "Cat"}


def to(name, *args):
    return reverse(f"loras:{name}", args=args)


def page(answer):
    return answer.content.decode()


def status(answer):
    """Read to the end: a file that is sent is closed then."""
    if answer.streaming:
        list(answer.streaming_content)
    return answer.status_code


def names(user):
    return set(Adapter.objects.visible_to(user).values_list("name", flat=True))


def finish(run, *, shapes=SDXL, path=None, metadata=None):
    """Save the run's final LoRA, as its trainer would."""
    file = write_lora(run.folder / (path or f"{run.output_name}.safetensors"), shapes, metadata=metadata)
    values = {"step": 4, "bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    return Checkpoint.objects.update_or_create(run=run, path=file.name, defaults=values | {"is_final": True})[0]


@pytest.fixture
def run(workspace, alice, handed_out):
    return make_run(alice)


@pytest.fixture
def produced(run):
    finish(run)
    library.catch_up()
    return Adapter.objects.get()


@pytest.fixture
def lora_file(tmp_path):
    """lora_file(shapes, metadata=…): the bytes of a LoRA file."""

    def made(shapes=SD15, *, metadata=METADATA):
        return write_lora(tmp_path / f"{uuid.uuid4()}.safetensors", shapes, metadata=metadata).read_bytes()

    return made


@pytest.fixture
def add(workspace, lora_file):
    """add(owner, "cat", shapes): an uploaded LoRA."""

    def added(owner, name="cat", shapes=SD15, **options):
        content = io.BytesIO(lora_file(shapes, **options))
        return adapter_services.add_file(owner, filename=f"{name}.safetensors", content=content)

    return added


@pytest.fixture
def shared(add, alice, team):
    """Alice's upload: Bob's team looks, Erin's group changes."""
    adapter = add(alice)
    editors = Group.objects.create(name="editors")
    User.objects.create_user("erin", "erin@example.org", "erin").groups.add(editors)
    share(adapter, groups=[team], editor_groups=[editors])
    return adapter


@pytest.fixture
def erin(shared):
    return User.objects.get(username="erin")


@pytest.fixture
def everything():
    def found():
        tables = (Adapter, AdapterTag, AdapterUpload, Adapter.groups.through, Adapter.editor_groups.through)
        return [list(table.objects.order_by("pk").values()) for table in tables]

    return found


def run_jobs():
    for job in Job.objects.filter(status=JobStatus.QUEUED):
        jobs.run_job(str(job.pk))


# --- What runs make ---------------------------------------------------------------------------------------------------
def test_final_lora_of_a_run_enters_the_library(run, alice):
    step = write_lora(run.folder / "first-step2.safetensors")
    Checkpoint.objects.create(run=run, path=step.name, step=2, bytes=1, sha256="0" * 64)
    final = finish(run)
    assert [library.catch_up(), library.catch_up()] == [1, 0]
    adapter = Adapter.objects.get()
    assert (adapter.name, adapter.owner, adapter.checkpoint, adapter.path) == (
        "first",
        alice,
        final.pk,
        "outputs/first/first.safetensors",
    )
    assert (adapter.architecture, adapter.rank, adapter.style, adapter.trigger_word) == ("sdxl", 4, "kohya", "sks")
    assert (adapter.base_model, adapter.bytes, adapter.sha256) == (run.base_model, final.bytes, final.sha256)


def test_file_that_cannot_be_read_enters_with_what_the_run_knows(run):
    final = finish(run)
    (run.folder / final.path).write_bytes(b"torn")
    library.catch_up()
    assert Adapter.objects.values_list("rank", "alpha", "architecture", "bytes").get() == (2, 2.0, "sdxl", final.bytes)


def test_lora_that_is_saved_again_keeps_its_name_tags_and_sharing(produced, run, team):
    adapter_services.edit_adapter(produced, name="Mine", tags=["good"])
    share(produced, groups=[team])
    final = finish(run, shapes=peft("x.y", rank=8))
    assert library.catch_up() == 1
    again = Adapter.objects.get()
    assert (again.pk, again.name, again.sha256, again.rank) == (produced.pk, "Mine", final.sha256, 8)
    assert ([tag.word for tag in again.tags.all()], list(again.groups.all())) == (["good"], [team])


def test_lora_leaves_with_its_run(produced, run, add, alice):
    add(alice)
    services.stop_run(run, actor=alice)
    run.refresh_from_db()
    services.delete_run(run)
    assert names(alice) == {"cat"}


def test_lora_whose_checkpoint_is_gone_leaves(produced):
    Checkpoint.objects.all().delete()
    library.catch_up()
    assert not Adapter.objects.exists()


def test_lora_is_shared_with_whom_its_run_is(produced, run, team, bob, charlie):
    others = Group.objects.create(name="others")
    share(produced, groups=[others])
    services.share_run(run, groups=[team])
    assert (names(bob), names(charlie)) == ({"first"}, set())
    services.share_run(run, groups=[])
    assert names(bob) == set()
    assert list(produced.groups.all()) == [others]


def test_groups_of_the_run_are_those_of_a_lora_that_enters(run, team, bob):
    services.share_run(run, groups=[team])
    finish(run)
    library.catch_up()
    assert names(bob) == {"first"}


# --- Uploads ----------------------------------------------------------------------------------------------------------
def test_upload_in_one_request_is_checked_and_private(workspace, alice, bob, client_of, lora_file):
    content = lora_file()
    answer = client_of(alice).post(to("upload"), {"file": SimpleUploadedFile("My cat.safetensors", content)})
    adapter = Adapter.objects.get()
    assert (answer.status_code, answer.url) == (302, to("detail", adapter.pk))
    assert (workspace / adapter.path).read_bytes() == content
    assert adapter.path.startswith("adapters/")
    assert (adapter.name, adapter.owner, adapter.checkpoint) == ("My cat", alice, None)
    assert (adapter.architecture, adapter.rank, adapter.trigger_word) == ("sd15", 4, "sks cat")
    assert (adapter.base_model, adapter.base_model_name) == (None, "base.safetensors")
    assert (names(bob), partials.kept_uploads()) == (set(), [])


def test_base_model_is_found_by_the_checksum_in_the_metadata(add, alice, run):
    BaseModel.objects.update(sha256="ab" * 32)
    assert add(alice, metadata={"ss_new_sd_model_hash": "ab" * 32}).base_model == run.base_model
    assert add(alice, "other", SDXL, metadata={"ss_new_sd_model_hash": ""}).base_model is None


BAD_FILES = [
    ("evil.ckpt", b"x", "is a pickle file"),
    ("cat.png", b"x", "Upload a .safetensors file."),
    ("cat.safetensors", b"x", "cat.safetensors has only 1 bytes"),
    ("cat.safetensors", b"\x02\0\0\0\0\0\0\0{}", "cat.safetensors is no LoRA"),
    ("cat.safetensors", b"\xff" * 64, "does not start with the length of a header"),
]


@pytest.mark.parametrize(("filename", "content", "sentence"), BAD_FILES)
def test_upload_of_something_else_is_refused_and_leaves_nothing(
    workspace, alice, client_of, everything, filename, content, sentence
):
    before = everything()
    answer = client_of(alice).post(to("upload"), {"file": SimpleUploadedFile(filename, content)})
    assert (answer.status_code, sentence in page(answer)) == (400, True)
    assert (everything(), partials.kept_uploads()) == (before, [])
    assert [path for path in (workspace / "adapters").rglob("*") if path.is_file()] == []


def test_upload_that_breaks_off_leaves_nothing(workspace, alice, everything):
    class Broken(io.BytesIO):
        def read(self, *_args):
            raise OSError(28, "No space left on device")

    before = everything()
    with pytest.raises(OSError, match="No space left"):
        adapter_services.add_file(alice, filename="cat.safetensors", content=Broken())
    assert (everything(), partials.kept_uploads()) == (before, [])


def test_upload_in_one_request_needs_room_on_the_disk(add, alice, monkeypatch):
    monkeypatch.setattr(partials, "SPARE_BYTES", 1 << 60)
    with pytest.raises(adapter_services.UserError, match="disk has no room"):
        add(alice)
    assert (Adapter.objects.count(), partials.kept_uploads()) == (0, [])


@pytest.fixture
def cache_on_another_disk(workspace, monkeypatch):
    replace = Path.replace

    def refuse(path, target):
        if path.is_relative_to(workspace / "cache") and not Path(target).is_relative_to(workspace / "cache"):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refuse)


def test_upload_goes_from_one_disk_to_another(cache_on_another_disk, workspace, add, alice, lora_file):
    adapter = add(alice)
    assert (workspace / adapter.path).read_bytes() == lora_file()
    assert ([path.name for path in (workspace / "adapters").iterdir()], partials.kept_uploads()) == (
        [Path(adapter.path).name],
        [],
    )


def test_upload_that_does_not_fit_on_the_other_disk_leaves_nothing(
    cache_on_another_disk, workspace, add, alice, monkeypatch
):
    def fill(_source, target, *_args):
        target.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(adapter_services.shutil, "copyfileobj", fill)
    with pytest.raises(OSError, match="No space left"):
        add(alice)
    assert (list((workspace / "adapters").iterdir()), Adapter.objects.count()) == ([], 0)


def test_upload_of_a_lora_that_one_has_is_refused(add, alice, bob):
    first = add(alice)
    with pytest.raises(adapter_services.Conflict, match="You have this LoRA already: cat"):
        add(alice, "again")
    assert add(bob, "again").path != first.path


def sent(api, content, *, filename="cat.safetensors", pieces=1, **options):
    """A finished upload in pieces, whose job has run."""
    upload = api.post(UPLOADS, {"filename": filename, "size": len(content)} | options).json()
    size = -(-len(content) // pieces)
    for start in range(0, len(content), size):
        answer = send_piece(api, upload["id"], content[start : start + size], start)
    run_jobs()
    return answer, api.get(f"{UPLOADS}{upload['id']}/").json()


def send_piece(api, upload, content, offset, **headers):
    kind = "application/offset+octet-stream"
    headers = {"Upload-Offset": str(offset)} | headers
    return api.generic("PATCH", f"{UPLOADS}{upload}/", content, content_type=kind, headers=headers)


def test_upload_in_pieces_ends_in_the_library(workspace, alice, api_of, lora_file):
    content = lora_file()
    _, upload = sent(api_of(alice), content, pieces=3, sha256=hashlib.sha256(content).hexdigest())
    adapter = Adapter.objects.get()
    assert (upload["job"]["status"], upload["job"]["result"]) == ("succeeded", {"adapter": adapter.pk, "name": "cat"})
    assert (adapter.owner, adapter.sha256) == (alice, hashlib.sha256(content).hexdigest())
    assert (workspace / adapter.path).read_bytes() == content
    assert partials.kept_uploads() == []


def test_upload_whose_checksum_was_compared_is_read_once(workspace, alice, api_of, lora_file, monkeypatch):
    content, read = lora_file(), []

    def counted(path, *tell):
        read.append(path)
        return sha256_of(path, *tell)

    monkeypatch.setattr("lorapilot.workspace.sha256_of", counted)
    sent(api_of(alice), content, sha256=hashlib.sha256(content).hexdigest())
    assert (Adapter.objects.get().sha256, len(read)) == (hashlib.sha256(content).hexdigest(), 1)


def test_upload_goes_on_where_the_server_is(workspace, alice, api_of, lora_file):
    api, content = api_of(alice), lora_file()
    upload = api.post(UPLOADS, {"filename": "cat.safetensors", "size": len(content)}).json()["id"]
    assert send_piece(api, upload, content[:10], 0).status_code == 204
    wrong = send_piece(api, upload, content[:10], 0)
    assert (wrong.status_code, wrong.json()["offset"], wrong.headers["Upload-Offset"]) == (409, 10, "10")
    assert api.get(f"{UPLOADS}{upload}/").json()["offset"] == 10
    assert send_piece(api, upload, content[10:], 10).json()["job"]["status"] == "queued"


@pytest.mark.parametrize(("filename", "content", "sentence"), BAD_FILES[2:])
def test_upload_in_pieces_of_something_else_fails_with_a_sentence(
    workspace, alice, api_of, filename, content, sentence
):
    _, upload = sent(api_of(alice), content, filename=filename)
    assert (upload["job"]["status"], sentence in upload["job"]["message"]) == ("failed", True)
    assert (Adapter.objects.count(), partials.kept_uploads()) == (0, [])


def test_upload_refuses_bad_input(workspace, alice, api_of, settings):
    api = api_of(alice)
    good = {"filename": "cat.safetensors", "size": 10}
    for change in ({"filename": "a.ckpt"}, {"size": 0}, {"size": (8 << 30) + 1}, {"size": "x"}, {"sha256": "x"}):
        assert api.post(UPLOADS, good | change).status_code == 400, change
    upload = api.post(UPLOADS, good).json()["id"]
    assert send_piece(api, upload, b"x" * 11, 0).status_code == 400
    assert send_piece(api, upload, b"x", "-1").status_code == 400
    assert AdapterUpload.objects.get().offset == 0


def test_piece_that_arrives_damaged_is_sent_again(workspace, alice, api_of):
    api = api_of(alice)
    upload = api.post(UPLOADS, {"filename": "cat.safetensors", "size": 10}).json()["id"]
    wrong = send_piece(api, upload, b"x", 0, **{"Upload-Checksum": "sha256 " + "A" * 43 + "="})
    assert (wrong.status_code, AdapterUpload.objects.get().offset) == (409, 0)
    assert send_piece(api, upload, b"x", 0, **{"Upload-Checksum": "md5 x"}).status_code == 400


def test_upload_is_for_who_began_it(workspace, alice, bob, api_of):
    upload = api_of(alice).post(UPLOADS, {"filename": "cat.safetensors", "size": 10}).json()["id"]
    other = api_of(bob)
    asked = [other.get(f"{UPLOADS}{upload}/"), send_piece(other, upload, b"x", 0), other.delete(f"{UPLOADS}{upload}/")]
    assert [answer.status_code for answer in asked] == [404] * 3
    assert api_of(alice, "read").post(UPLOADS, {}).status_code == 403
    assert api_of(alice).delete(f"{UPLOADS}{upload}/").status_code == 204
    assert not AdapterUpload.objects.exists()


@pytest.mark.parametrize("is_moved", [False, True])
def test_import_that_was_killed_goes_on(workspace, alice, api_of, lora_file, is_moved):
    """Before the file was moved to its place, or before its row was written."""
    api, content = api_of(alice), lora_file()
    upload = api.post(UPLOADS, {"filename": "cat.safetensors", "size": len(content)}).json()["id"]
    send_piece(api, upload, content, 0)
    if is_moved:
        (workspace / "adapters").mkdir()
        partials.partial_path(upload).rename(workspace / "adapters" / f"{upload}.safetensors")
    run_jobs()
    Job.objects.update(status=JobStatus.QUEUED, finished_at=None)
    run_jobs()
    assert Job.objects.get().status == JobStatus.SUCCEEDED
    assert (workspace / Adapter.objects.get().path).read_bytes() == content


def test_stale_uploads_are_removed(workspace, alice):
    from datetime import timedelta

    from django.utils import timezone

    for _ in range(2):
        adapter_services.start_upload(alice, filename="a.safetensors", size=1)
    kept, stale = AdapterUpload.objects.all()
    AdapterUpload.objects.filter(pk=stale.pk).update(created_at=timezone.now() - timedelta(days=8))
    assert adapter_services.remove_stale_uploads() == 1
    assert AdapterUpload.objects.get() == kept


# --- Who may what -----------------------------------------------------------------------------------------------------
OF_ADAPTER = ("detail", "edit", "share", "delete", "download", "publish", "unpublish")


def test_every_page_is_tested_here():
    assert {pattern.name for pattern in urlpatterns} == {"list", "upload", "sample", *OF_ADAPTER}


def test_pages_ask_visitors_to_sign_in_and_do_not_exist_for_strangers(shared, charlie, client, client_of, everything):
    before, stranger = everything(), client_of(charlie)
    for name in OF_ADAPTER:
        address = to(name, shared.pk)
        for ask in ("get", "post"):
            assert getattr(client, ask)(address).url == f"{reverse('account_login')}?next={address}"
    assert [stranger.get(to(name, shared.pk)).status_code for name in ("detail", "download")] == [404] * 2
    of_owner = ("edit", "share", "delete", "publish", "unpublish")
    assert [stranger.post(to(name, shared.pk)).status_code for name in of_owner] == [404] * 5
    assert stranger.get(to("list")).context["rows"] == []
    assert everything() == before


def test_viewers_look_and_download(shared, bob, client_of, everything):
    before, viewer = everything(), client_of(bob)
    assert [status(viewer.get(to(name, shared.pk))) for name in ("detail", "download")] == [200, 200]
    for name in ("edit", "share", "delete", "publish", "unpublish"):
        answer = viewer.post(to(name, shared.pk), {"name": "mine"})
        assert (answer.status_code, NOT_YOURS in page(answer)) == (403, True), name
    seen = page(viewer.get(to("detail", shared.pk)))
    assert [to(name, shared.pk) in seen for name in ("edit", "share", "delete", "publish")] == [False] * 4
    assert everything() == before


def test_editors_change_it_and_neither_share_nor_delete(shared, erin, client_of, everything):
    editor = client_of(erin)
    editor.post(to("edit", shared.pk), {"name": "Tidied", "tags": "b, A ,,a"})
    shared.refresh_from_db()
    assert (shared.name, [tag.word for tag in shared.tags.all()]) == ("Tidied", ["a", "b"])
    before = everything()
    for name in ("share", "delete"):
        answer = editor.post(to(name, shared.pk))
        assert (answer.status_code, ONLY_OWNER in page(answer)) == (403, True)
    seen = page(editor.get(to("detail", shared.pk)))
    assert [to(name, shared.pk) in seen for name in ("edit", "publish", "share", "delete")] == [
        True,
        True,
        False,
        False,
    ]
    assert everything() == before


def test_owner_shares_and_deletes(shared, workspace, team, alice, bob, client_of):
    browser = client_of(alice)
    assert browser.post(to("share", shared.pk), {f"group_{team.pk}": "edit"}).status_code == 302
    assert shared.is_editable_by(bob)
    assert browser.post(to("share", shared.pk), {f"group_{team.pk}": "x"}).status_code == 400
    file = workspace / shared.path
    assert (browser.get(to("delete", shared.pk)).status_code, file.exists()) == (200, True)
    assert browser.post(to("delete", shared.pk)).url == to("list")
    assert (Adapter.objects.count(), file.exists()) == (0, False)
    entries = AuditEntry.objects.filter(actor=alice, action__startswith="LoRA").order_by("pk")
    told = entries.values_list("action", "subject")
    assert list(told) == [("LoRA shared", "cat: team (edit)"), ("LoRA deleted", "cat")]


def test_pages_refuse_the_wrong_method(shared, alice, client_of):
    browser = client_of(alice)
    assert {browser.get(to(name, shared.pk)).status_code for name in ("edit", "share")} == {405}
    assert {browser.post(to(name, shared.pk)).status_code for name in ("detail", "download")} == {405}
    assert (browser.get(to("upload")).status_code, browser.post(to("list")).status_code) == (405, 405)
    assert {browser.put(to(name, shared.pk)).status_code for name in OF_ADAPTER} == {405}


def test_edit_changes_only_what_is_given(shared, alice):
    first, second = Adapter.objects.get(pk=shared.pk), Adapter.objects.get(pk=shared.pk)
    adapter_services.edit_adapter(first, name="Mine", trigger_word="mycat")
    adapter_services.edit_adapter(second, tags=["good"])  # by somebody who had loaded it before
    shared.refresh_from_db()
    assert (shared.name, shared.trigger_word, [tag.word for tag in shared.tags.all()]) == ("Mine", "mycat", ["good"])


def test_edit_refuses_bad_input(shared, alice, client_of, everything):
    browser, before = client_of(alice), everything()
    for given in (
        {"name": ""},
        {"name": "x" * 101},
        {"name": "a", "tags": "x" * 41},
        {"name": "a", "tags": ",".join("abcdefghijklmnopqrstuvwxyz12345")},
    ):
        assert browser.post(to("edit", shared.pk), given).status_code == 400, given
    assert everything() == before


def test_lora_of_a_run_is_not_deleted_alone(produced, alice, client_of, api_of):
    assert client_of(alice).post(to("delete", produced.pk)).status_code == 409
    assert api_of(alice).delete(f"{API}{produced.pk}/").status_code == 409
    assert Adapter.objects.exists()


# --- Look -------------------------------------------------------------------------------------------------------------
def test_list_is_filtered(produced, add, alice, bob, team, staff, client_of):
    dog = add(bob, "dog", peft("single_transformer_blocks.0.attn.to_q"), metadata={})
    adapter_services.edit_adapter(dog, tags=["Animal"])
    share(dog, groups=[team])
    browser = client_of(alice)

    def found(**asked):
        return sorted(adapter.name for adapter, _ in browser.get(to("list"), asked).context["rows"])

    assert found() == ["dog", "first"]
    assert [found(architecture=name) for name in ("flux", "sdxl", "sd15")] == [["dog"], ["first"], []]
    assert [found(q=text) for text in ("DO", "sks", "pilot", "anim", "bob", "x" * 999)] == [
        ["dog"],
        ["first"],
        ["first"],
        ["dog"],
        ["dog"],
        [],
    ]
    assert [found(tag=word) for word in ("animal", "other")] == [["dog"], []]
    assert [found(owner=name) for name in ("alice", "bob", "charlie")] == [["first"], ["dog"], []]
    assert found(page="x", q="\x00", tag="\x00") == ["dog", "first"]


def test_list_asks_the_database_as_often_for_three_as_for_one(run, alice, team, client_of, api_of):
    browser, api, counts = client_of(alice), api_of(alice), []
    api.get(API)  # notes when the token was used
    for number in (1, 3):
        while Adapter.objects.count() < number:
            other = make_run(alice, output_name=f"run{number}{Run.objects.count()}")
            finish(other)
            Sample.objects.create(run=other, step=4, index=0, path="a.png", prompt="p", seed=1)
            library.catch_up()
        share(Adapter.objects.first(), groups=[team])
        with CaptureQueriesContext(connection) as of_page:
            browser.get(to("list"))
        with CaptureQueriesContext(connection) as of_api:
            api.get(API)
        counts.append((len(of_page), len(of_api)))
    assert counts[0] == counts[1]


def test_page_tells_what_it_is_and_where_it_comes_from(produced, run, alice, client_of):
    seen = page(client_of(alice).get(to("detail", produced.pk)))
    told = [
        reverse("runs:detail", args=[run.pk]),
        reverse("datasets:detail", args=[run.dataset_version.dataset_id]),
        reverse("models:detail", args=[run.base_model_id]),
        run.dataset_version.digest,
        produced.sha256,
        "shapes v1",
    ]
    assert [text for text in told if text not in seen] == []


def test_origin_is_hidden_from_those_who_do_not_see_the_run(produced, run, team, bob, client_of):
    share(produced, groups=[team])
    seen = page(client_of(bob).get(to("detail", produced.pk)))
    hidden = [reverse("runs:detail", args=[run.pk]), run.dataset_version.digest, "shapes v1"]
    assert [text for text in hidden if text in seen] == []
    assert "A run that is not shared with you." in seen
    assert reverse("models:detail", args=[run.base_model_id]) in seen


def test_upload_of_the_same_file_is_traced_to_its_run(produced, run, alice, bob, team, client_of):
    content = (run.folder / "first.safetensors").read_bytes()
    copy = adapter_services.add_file(bob, filename="copy.safetensors", content=io.BytesIO(content))
    assert library.origin_of(copy, bob).run is None
    services.share_run(run, groups=[team])
    assert library.origin_of(copy, bob).run == run
    assert library.origin_of(copy, bob).dataset is None


def test_metadata_is_shown_as_text(add, alice, client_of):
    evil = add(alice, metadata={"ss_training_comment": "<script>alert(1)</script>", "modelspec.title": "x" * 3000})
    seen = page(client_of(alice).get(to("detail", evil.pk)))
    assert ("<script>alert(1)" in seen, "&lt;script&gt;alert(1)" in seen, "(longer in the file)" in seen) == (
        False,
        True,
        True,
    )


@pytest.mark.parametrize("change", ["torn", "gone", "link"])
def test_page_of_a_file_that_cannot_be_read_says_so(add, workspace, alice, tmp_path, client_of, api_of, change):
    adapter = add(alice)
    file = workspace / adapter.path
    file.unlink()
    if change == "torn":
        file.write_bytes(b"x")
    if change == "link":
        (tmp_path / "outside").write_bytes(b"secret")
        file.symlink_to(tmp_path / "outside")
    answer = client_of(alice).get(to("detail", adapter.pk))
    assert (answer.status_code, bool(answer.context["look"].problem)) == (200, True)
    assert api_of(alice).get(f"{API}{adapter.pk}/").json()["problem"] == answer.context["look"].problem
    if change != "torn":
        assert client_of(alice).get(to("download", adapter.pk)).status_code == 404


def test_download_answers_ranges(shared, workspace, bob, client_of, api_of):
    content = (workspace / shared.path).read_bytes()
    for browser, address in ((client_of(bob), to("download", shared.pk)), (api_of(bob), f"{API}{shared.pk}/download/")):
        whole = browser.get(address)
        assert b"".join(whole.streaming_content) == content
        assert 'filename="cat.safetensors"' in whole.headers["Content-Disposition"]
        part = browser.get(address, headers={"Range": "bytes=8-15"})
        assert (part.status_code, b"".join(part.streaming_content)) == (206, content[8:16])


def test_samples_are_those_of_its_step_and_seen_with_the_lora(produced, run, team, bob, charlie, client_of, api_of):
    for index, step in enumerate((2, 4)):
        (run.folder / f"{step}.png").write_bytes(picture_file().read())
        Sample.objects.create(run=run, step=step, index=index, path=f"{step}.png", prompt=f"at {step}", seed=1)
    share(produced, groups=[team])
    early, late = Sample.objects.order_by("step")
    viewer = client_of(bob)
    assert "at 4" in page(viewer.get(to("detail", produced.pk)))
    addresses = [to("sample", produced.pk, sample.pk) for sample in (early, late)]
    assert [status(viewer.get(address)) for address in addresses] == [404, 200]
    assert client_of(charlie).get(addresses[1]).status_code == 404
    assert viewer.get(reverse("runs:sample_file", args=[run.pk, late.pk])).status_code == 404
    shown = api_of(bob).get(f"{API}{produced.pk}/").json()
    assert [status(api_of(bob).get(address)) for address in shown["samples"]] == [200]


def test_run_page_leads_to_the_library(produced, run, alice, client_of):
    assert to("detail", produced.pk) in page(client_of(alice).get(reverse("runs:detail", args=[run.pk])))


# --- models/loras -----------------------------------------------------------------------------------------------------
def test_uploaded_lora_is_published_and_taken_away(shared, workspace, alice, client_of):
    browser, loras = client_of(alice), workspace / "models" / "loras"
    assert 'value="cat"' in page(browser.get(to("publish", shared.pk)))
    assert browser.post(to("publish", shared.pk), {"name": "cat"}).url == to("detail", shared.pk)
    assert (loras / "cat.safetensors").samefile(workspace / shared.path)
    told = json.loads((loras / "cat.json").read_text())
    assert (told["activation text"], told["sd version"]) == ("sks cat", "SD1")
    assert told["lorapilot"]["adapter"] == {"id": shared.pk, "name": "cat", "owner": "alice"}
    adapter_services.edit_adapter(shared, name="Renamed")
    assert "loras/cat.safetensors" in page(browser.get(to("detail", shared.pk)))
    assert "loras/cat.safetensors" in page(browser.get(to("unpublish", shared.pk)))
    assert browser.post(to("publish", shared.pk), {"name": "other"}).status_code == 422
    browser.post(to("unpublish", shared.pk))
    assert list(loras.iterdir()) == []
    assert browser.get(to("unpublish", shared.pk)).status_code == 404


@pytest.mark.parametrize(("name", "proposed"), [("My cat (v2)!", "My-cat-v2"), ("猫", "lora"), ("con", "lora")])
def test_names_of_people_become_names_of_files(shared, alice, client_of, name, proposed):
    adapter_services.edit_adapter(shared, name=name)
    assert f'value="{proposed}"' in page(client_of(alice).get(to("publish", shared.pk)))


def test_lora_of_a_run_is_published_as_on_the_page_of_the_run(produced, run, alice, api_of):
    checkpoint = run.checkpoints.select_related("run").get()
    publishing.publish_checkpoint(checkpoint, actor=alice)
    api = api_of(alice)
    assert api.get(f"{API}{produced.pk}/").json()["published"] == "loras/first.safetensors"
    assert api.post(f"{API}{produced.pk}/publish/", {}).status_code == 200
    assert api.delete(f"{API}{produced.pk}/publish/").status_code == 204
    assert publishing.published_of(run) == {}


# --- API --------------------------------------------------------------------------------------------------------------
def test_api_shows_lists_and_changes(shared, alice, api_of):
    api = api_of(alice)
    changed = api.patch(f"{API}{shared.pk}/", {"name": "Cat", "tags": ["B", "a"], "groups": []}).json()
    expected = {
        "id": shared.pk,
        "name": "Cat",
        "owner": "alice",
        "groups": [],
        "editor_groups": [],
        "is_produced": False,
        "run": None,
        "architecture": "sd15",
        "style": "kohya",
        "algorithm": "LoRA",
        "rank": 4,
        "alpha": 0.0,
        "dtype": "F16",
        "trigger_word": "sks cat",
        "base_model": None,
        "base_model_name": "base.safetensors",
        "tags": ["a", "b"],
        "samples": [],
        "problem": "",
        "notes": [],
        "published": None,
        "parts": [
            {"title": "UNet", "modules": 1, "ranks": {"4": 1}, "alphas": {"0": 1}},
            {"title": "Text encoder", "modules": 1, "ranks": {"4": 1}, "alphas": {"0": 1}},
        ],
    }
    assert {key: changed[key] for key in expected} == expected
    assert api.get(f"{API}{shared.pk}/").json() == changed
    listed = api.get(API, {"q": "ca", "architecture": "sd15", "tag": "b", "owner": "alice"}).json()["results"]
    assert listed == [{key: changed[key] for key in listed[0]}]
    assert api.get(API, {"tag": "c"}).json()["results"] == []
    assert api.get(API, {"architecture": "nothing"}).status_code == 400
    rows = api.get(f"{API}{shared.pk}/metadata/").json()
    assert {row["key"]: row["value"] for row in rows} == METADATA


def test_api_tells_what_a_lora_is_made_from(produced, run, alice, api_of):
    shown = api_of(alice).get(f"{API}{produced.pk}/").json()
    assert (shown["run"], shown["made_from"]) == (
        run.pk,
        {
            "run": "first",
            "dataset": "shapes",
            "dataset_version": 1,
            "dataset_digest": run.dataset_version.digest,
            "base_model": "pilot-tiny",
            "base_model_sha256": run.base_model.sha256,
        },
    )


def test_api_takes_a_small_file_in_one_request(workspace, alice, api_of, lora_file):
    api = api_of(alice)
    made = api.post(API, {"file": SimpleUploadedFile("cat.safetensors", lora_file())}, format="multipart")
    assert (made.status_code, made.json()["id"]) == (201, Adapter.objects.get().pk)
    assert api.post(API, {}, format="multipart").status_code == 400
    again = api.post(API, {"file": SimpleUploadedFile("cat.safetensors", lora_file())}, format="multipart")
    assert again.status_code == 409


def test_api_is_for_those_who_may(shared, alice, bob, charlie, erin, api_of, everything):
    before = everything()
    address = f"{API}{shared.pk}/"
    for user, refused in ((bob, 403), (charlie, 404)):
        api = api_of(user)
        writes = [
            api.patch(address, {"name": "x"}),
            api.delete(address),
            api.post(f"{address}publish/", {}),
            api.delete(f"{address}publish/"),
        ]
        assert [answer.status_code for answer in writes] == [refused] * 4
    editor = api_of(erin)
    assert [editor.patch(address, {"groups": []}).status_code, editor.delete(address).status_code] == [403, 403]
    assert api_of(alice, "read").patch(address, {"name": "x"}).status_code == 403
    reads = [address, f"{address}metadata/", f"{address}download/"]
    assert [api_of(charlie).get(read).status_code for read in reads] == [404] * 3
    assert [status(api_of(bob).get(read)) for read in reads] == [200] * 3
    assert everything() == before
    assert editor.patch(address, {"tags": ["x"]}).json()["tags"] == ["x"]


def test_api_refuses_bad_input_and_wrong_methods(shared, alice, api_of, everything):
    api, before, address = api_of(alice), everything(), f"{API}{shared.pk}/"
    for given in (
        {"name": ""},
        {"tags": "x"},
        {"tags": ["x" * 50]},
        {"groups": ["nobody"]},
        {"trigger_word": "x" * 101},
    ):
        assert api.patch(address, given).status_code == 400, given
    assert [api.put(address, {}).status_code, api.post(address, {}).status_code] == [405, 405]
    assert [api.get(f"{API}{key}/").status_code for key in (99, "9" * 40, "x")] == [404] * 3
    assert everything() == before
