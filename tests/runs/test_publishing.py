"""LoRA files in models/loras: put there once, described, taken away again; over pages and API alike."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from django.urls import reverse

from lorapilot.errors import Conflict, Missing, UserError
from lorapilot.models import AuditEntry
from models_registry import selectors
from runs import publishing
from runs.models import Checkpoint, Run, Sample
from tests.factories import make_run

pytestmark = pytest.mark.django_db
WEIGHTS = b"weights"
NOT_YOURS = "Only the owner and staff can change this. Ask the owner, or make a copy of your own."


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def save(run, path, content=WEIGHTS, **values):
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / path).write_bytes(content)
    values = {"step": 4, "bytes": len(content), "sha256": sha256(content)} | values
    return Checkpoint.objects.create(run=run, path=path, **values)


@pytest.fixture
def final(workspace, alice, team, handed_out):
    """The LoRA of a run of Alice's, shared with Bob's team, which has not ended."""
    run = make_run(alice)
    run.groups.add(team)
    return save(run, "first.safetensors", is_final=True)


@pytest.fixture
def loras(workspace):
    return workspace / "models" / "loras"


def there(loras):
    """What lies in the folder, drafts included."""
    return sorted(path.name for path in loras.iterdir()) if loras.is_dir() else []


def done():
    entries = AuditEntry.objects.filter(action__contains="publish").order_by("pk")
    return [(entry.actor.username, entry.action, entry.subject) for entry in entries]


def api_address(checkpoint):
    return f"/api/v1/runs/{checkpoint.run_id}/artifacts/{checkpoint.pk}/publish/"


def page_address(name, checkpoint):
    return reverse(f"runs:{name}", args=[checkpoint.run_id, checkpoint.pk])


# --- Publish ----------------------------------------------------------------------------------------------------------
def test_publish_links_the_file_and_says_what_it_is(final, loras, alice):
    (final.run.folder / "drawn.png").write_bytes(b"picture")
    Sample.objects.create(run=final.run, step=4, index=0, path="drawn.png", prompt="sks red", seed=1)
    found = publishing.publish_checkpoint(final, actor=alice)
    assert (found.path, found.sidecar, found.is_new) == ("loras/first.safetensors", "loras/first.json", True)
    assert there(loras) == ["first.json", "first.png", "first.safetensors"]
    assert (loras / "first.safetensors").samefile(final.run.folder / "first.safetensors")
    assert (loras / "first.png").read_bytes() == b"picture"
    version, base = final.run.dataset_version, final.run.base_model
    assert json.loads((loras / "first.json").read_text()) == {
        "description": "LoRA for Stable Diffusion XL, trained with LoRA Pilot.",
        "activation text": "sks",
        "sd version": "SDXL",
        "preferred weight": 0,
        "notes": "Run first of alice, step 4. Base model: pilot-tiny. Dataset: shapes v1.",
        "lorapilot": {
            "name": "first",
            "trigger_word": "sks",
            "sha256": sha256(WEIGHTS),
            "base_model": {"name": "pilot-tiny", "sha256": base.sha256, "architecture": "sdxl"},
            "rank": 2,
            "alpha": 2.0,
            "run": {"id": final.run.pk, "name": "first", "owner": "alice"},
            "checkpoint": "first.safetensors",
            "step": 4,
            "dataset": {"name": "shapes", "version": 1, "digest": version.digest},
            "stack": "builtin",
            "options": {},
            "sample_prompts": final.run.spec["sample_prompts"],
            "created_at": final.created_at.isoformat(),
            "files": {"first.safetensors": sha256(WEIGHTS), "first.png": sha256(b"picture")},
        },
    }
    assert done() == [("alice", "LoRA published", "loras/first.safetensors")]


def test_publish_twice_changes_nothing(final, loras, alice):
    publishing.publish_checkpoint(final, actor=alice)
    before = {path: path.stat().st_mtime_ns for path in loras.iterdir()}
    for name in ("", "first", "first.safetensors"):
        assert not publishing.publish_checkpoint(final, actor=alice, name=name).is_new
    assert {path: path.stat().st_mtime_ns for path in loras.iterdir()} == before
    assert len(done()) == 1


def test_publish_of_a_published_file_under_another_name_is_refused(final, loras, alice):
    publishing.publish_checkpoint(final, actor=alice)
    with pytest.raises(Conflict, match=r"It is published as loras/first\.safetensors\. Unpublish it first"):
        publishing.publish_checkpoint(final, actor=alice, name="second")
    assert there(loras) == ["first.json", "first.safetensors"]


def test_steps_have_names_of_their_own(final, loras, alice):
    step = save(final.run, "first-step00000002.safetensors", b"two", step=2)
    assert publishing.publish_checkpoint(step, actor=alice).path == "loras/first-step2.safetensors"
    assert set(publishing.published_of(final.run)) == {(step.path, sha256(b"two"))}


def test_default_name_of_a_long_name_is_a_name(final):
    final.run.output_name, final.is_final, final.step = "x" * 100, False, 12
    assert publishing.default_name(final) == "x" * 93 + "-step12"


@pytest.mark.parametrize("taken", ["first.safetensors", "First.safetensors", "first.json", "first.png"])
def test_publish_overwrites_nothing(final, loras, alice, taken):
    loras.mkdir(parents=True)
    (loras / taken).write_bytes(b"somebody's")
    (loras / "first-2.json").write_text("{}")
    with pytest.raises(Conflict, match=r"nothing is overwritten\. 'first-3' is free") as refused:
        publishing.publish_checkpoint(final, actor=alice)
    assert refused.value.field == "name"
    assert there(loras) == sorted([taken, "first-2.json"])
    assert (loras / taken).read_bytes() == b"somebody's"
    assert publishing.publish_checkpoint(final, actor=alice, name="first-3").is_new


def test_publish_of_what_somebody_copied_there_only_describes_it(final, loras, alice):
    loras.mkdir(parents=True)
    (loras / "first.safetensors").write_bytes(WEIGHTS)
    assert not publishing.publish_checkpoint(final, actor=alice).is_new
    assert there(loras) == ["first.json", "first.safetensors"]
    publishing.unpublish_checkpoint(final, actor=alice)
    assert there(loras) == ["first.safetensors"]


@pytest.mark.parametrize("name", ["../first", "a/b", "/etc/passwd", ".hidden", "nul", "x" * 101, "a b"])
def test_publish_refuses_what_is_no_name(final, loras, alice, name):
    with pytest.raises(UserError, match="Use letters, digits") as refused:
        publishing.publish_checkpoint(final, actor=alice, name=name)
    assert (refused.value.field, there(loras), done()) == ("name", [], [])


def test_publish_copies_where_links_cannot_be(final, loras, alice, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    publishing.publish_checkpoint(final, actor=alice)
    assert there(loras) == ["first.json", "first.safetensors"]
    assert (loras / "first.safetensors").read_bytes() == WEIGHTS
    assert (loras / "first.safetensors").stat().st_nlink == 1


def test_publish_copies_what_its_trainer_may_write_into_again(final, loras, alice):
    Run.objects.filter(pk=final.run_id).update(stack="ai_toolkit")
    final.run.refresh_from_db()
    save(final.run, "other.safetensors")
    publishing.publish_checkpoint(final.run.checkpoints.get(path="other.safetensors"), actor=alice, name="other")
    assert (loras / "other.safetensors").stat().st_nlink == 1


def test_publish_refuses_a_file_that_is_not_what_was_saved(final, loras, alice):
    (final.run.folder / final.path).write_bytes(b"other")
    with pytest.raises(Conflict, match="has changed since the run saved it"):
        publishing.publish_checkpoint(final, actor=alice)
    (final.run.folder / final.path).unlink()
    with pytest.raises(Missing, match="is no longer in the run's folder"):
        publishing.publish_checkpoint(final, actor=alice)
    assert (there(loras), done()) == ([], [])


def test_publish_that_breaks_leaves_nothing(final, loras, alice, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(Conflict, match="cannot be written to models/loras: No space left on device"):
        publishing.publish_checkpoint(final, actor=alice)
    assert (there(loras), done()) == ([], [])


def test_publish_goes_on_where_a_kill_or_a_hand_left_off(final, loras, alice):
    publishing.publish_checkpoint(final, actor=alice)
    (loras / "first.safetensors").unlink()
    (loras / ".first.safetensors.tmp").write_bytes(b"half")
    assert publishing.published_of(final.run) == {}
    assert publishing.publish_checkpoint(final, actor=alice).is_new
    assert there(loras) == ["first.json", "first.safetensors"]


def test_folder_that_leads_out_of_the_models_is_refused(final, loras, alice, tmp_path):
    loras.parent.mkdir(exist_ok=True)
    loras.symlink_to(tmp_path)
    with pytest.raises(Conflict, match="is a link that leaves the models folder"):
        publishing.publish_checkpoint(final, actor=alice)
    assert publishing.published_of(final.run) == {}


@pytest.mark.parametrize("content", ["", "[]", '{"lorapilot": 1}', '{"lorapilot": {"run": {"id": "x"}}}', "\ud800"])
def test_json_of_others_is_passed_by(final, loras, alice, content):
    publishing.publish_checkpoint(final, actor=alice)
    (loras / "other.json").write_bytes(content.encode(errors="surrogatepass"))
    assert [found.name for found in publishing.published_of(final.run).values()] == ["first"]


# --- Unpublish --------------------------------------------------------------------------------------------------------
def test_unpublish_removes_what_was_made_and_nothing_else(final, loras, alice):
    publishing.publish_checkpoint(final, actor=alice)
    (loras / "first.png").write_bytes(b"a picture of somebody's")
    (loras / "first-2.safetensors").write_bytes(WEIGHTS)
    publishing.unpublish_checkpoint(final, actor=alice)
    assert there(loras) == ["first-2.safetensors", "first.png"]
    assert (final.run.folder / final.path).read_bytes() == WEIGHTS
    assert done()[1:] == [("alice", "LoRA unpublished", "loras/first.safetensors")]
    with pytest.raises(Missing, match=r"first\.safetensors is not published"):
        publishing.unpublish_checkpoint(final, actor=alice)


def test_unpublish_leaves_a_file_that_was_changed(final, loras, alice):
    publishing.publish_checkpoint(final, actor=alice)
    (loras / "first.safetensors").unlink()
    (loras / "first.safetensors").write_bytes(b"merged")
    with pytest.raises(Conflict, match="was changed since it was published"):
        publishing.unpublish_checkpoint(final, actor=alice)
    assert (loras / "first.safetensors").read_bytes() == b"merged"
    assert len(done()) == 1


def test_unpublish_leaves_what_another_run_published(final, loras, alice):
    other = save(make_run(alice, output_name="other"), "other.safetensors", is_final=True)
    publishing.publish_checkpoint(other, actor=alice)
    with pytest.raises(Missing):
        publishing.unpublish_checkpoint(final, actor=alice)
    assert there(loras) == ["other.json", "other.safetensors"]


# --- API --------------------------------------------------------------------------------------------------------------
def test_api_publishes_and_unpublishes(final, loras, alice, api_of):
    api = api_of(alice)
    artifacts = f"/api/v1/runs/{final.run_id}/artifacts/"
    assert [one["published"] for one in api.get(artifacts).json()] == [None]
    made = api.post(api_address(final), {"name": "cat"})
    expected = {"path": "loras/cat.safetensors", "sidecar": "loras/cat.json", "sha256": sha256(WEIGHTS)}
    assert (made.status_code, made.json()) == (201, expected)
    again = api.post(api_address(final))
    assert (again.status_code, again.json()) == (200, expected)
    assert [one["published"] for one in api.get(artifacts).json()] == ["loras/cat.safetensors"]
    assert api.delete(api_address(final)).status_code == 204
    assert api.delete(api_address(final)).status_code == 404
    assert there(loras) == []
    assert [action for _, action, _ in done()] == ["LoRA published", "LoRA unpublished"]


def test_api_refuses_bad_input(final, loras, alice, api_of):
    api = api_of(alice)
    assert api.post(api_address(final), {"name": "../x"}).json()["errors"].keys() == {"name"}
    assert api.post(api_address(final), {"name": []}, format="json").status_code == 400
    assert api.put(api_address(final)).status_code == 405
    assert api.post(f"/api/v1/runs/{final.run_id}/artifacts/99/publish/").status_code == 404
    loras.mkdir(parents=True)
    (loras / "first.safetensors").write_bytes(b"other")
    assert api.post(api_address(final)).status_code == 409
    assert (there(loras), done()) == (["first.safetensors"], [])


def test_api_is_for_those_who_may_change_the_run(final, loras, alice, bob, charlie, staff, api_of):
    assert [api_of(user).post(api_address(final)).status_code for user in (bob, charlie)] == [403, 404]
    assert api_of(alice, "read").post(api_address(final)).status_code == 403
    assert there(loras) == []
    assert api_of(staff).post(api_address(final)).status_code == 201
    assert [api_of(user).delete(api_address(final)).status_code for user in (bob, charlie)] == [403, 404]
    assert there(loras) == ["first.json", "first.safetensors"]


# --- Pages ------------------------------------------------------------------------------------------------------------
def test_page_publishes_under_the_name_that_was_typed(final, loras, alice, client_of):
    browser = client_of(alice)
    assert 'value="first"' in browser.get(page_address("publish", final)).content.decode()
    answer = browser.post(page_address("publish", final), {"name": "cat"})
    assert (answer.status_code, answer.url) == (302, reverse("runs:detail", args=[final.run_id]))
    assert there(loras) == ["cat.json", "cat.safetensors"]
    seen = browser.get(reverse("runs:artifacts", args=[final.run_id])).content.decode()
    assert "loras/cat.safetensors" in seen
    assert page_address("unpublish", final) in seen
    assert page_address("publish", final) not in seen


def test_page_proposes_a_free_name_and_keeps_what_was_typed(final, loras, alice, client_of):
    loras.mkdir(parents=True)
    (loras / "first.safetensors").write_bytes(b"other")
    browser = client_of(alice)
    assert 'value="first-2"' in browser.get(page_address("publish", final)).content.decode()
    answer = browser.post(page_address("publish", final), {"name": "first"})
    seen = answer.content.decode()
    assert (answer.status_code, 'value="first"' in seen, "&#x27;first-2&#x27; is free" in seen) == (422, True, True)
    assert browser.post(page_address("publish", final), {}).status_code == 422
    assert (there(loras), done()) == (["first.safetensors"], [])


def test_page_asks_before_it_unpublishes(final, loras, alice, client_of):
    browser = client_of(alice)
    assert browser.get(page_address("unpublish", final)).status_code == 404
    publishing.publish_checkpoint(final, actor=alice)
    assert "loras/first.safetensors" in browser.get(page_address("unpublish", final)).content.decode()
    assert there(loras) == ["first.json", "first.safetensors"]
    assert browser.post(page_address("unpublish", final)).url == reverse("runs:detail", args=[final.run_id])
    assert there(loras) == []


@pytest.mark.parametrize("name", ["publish", "unpublish"])
def test_pages_are_for_those_who_may_change_the_run(final, loras, alice, bob, charlie, client, client_of, name):
    publishing.publish_checkpoint(final, actor=alice)
    address = page_address(name, final)
    for ask in ("get", "post"):
        assert getattr(client, ask)(address).url == f"{reverse('account_login')}?next={address}"
        assert getattr(client_of(charlie), ask)(address).status_code == 404
        answer = getattr(client_of(bob), ask)(address)
        assert (answer.status_code, NOT_YOURS in answer.content.decode()) == (403, True)
    assert client_of(alice).put(address).status_code == 405
    assert client_of(alice).get(reverse(f"runs:{name}", args=[final.run_id, 99])).status_code == 404
    assert there(loras) == ["first.json", "first.safetensors"]


def test_readers_see_what_is_published_and_no_buttons(final, alice, bob, client_of):
    publishing.publish_checkpoint(final, actor=alice)
    seen = client_of(bob).get(reverse("runs:detail", args=[final.run_id])).content.decode()
    assert "loras/first.safetensors" in seen
    assert "publish/" not in seen


# --- The models page --------------------------------------------------------------------------------------------------
def test_published_files_are_not_looked_at_as_base_models(final, loras, alice):
    publishing.publish_checkpoint(final, actor=alice)
    root = selectors.workspace.models().resolve()
    (root / "sd").mkdir()
    (root / "sd" / "loras").mkdir()  # only the folder at the top is that of LoRAs
    (root / "sd" / "loras" / "model.safetensors").touch()
    expected = [root / "sd" / "loras" / "model.safetensors"]
    assert list(selectors._models_below(root, {"pilot-tiny"})) == expected
    assert list(selectors._parts_below(root)) == expected
