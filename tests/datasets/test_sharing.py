"""Alice owns a dataset, Bob's team looks at it, the editors' group changes it, and Charlie is a stranger."""

import pytest
from django.contrib.auth.models import Group
from django.core.files.uploadedfile import SimpleUploadedFile
from django.urls import reverse

from datasets import services
from datasets.models import Dataset
from lorapilot.models import AuditEntry, User
from lorapilot.services import share

URL = "/api/v1/datasets/"
ONLY_OWNER = "Only the owner and staff can share and delete this. Ask the owner."


@pytest.fixture
def editors(db):
    return Group.objects.create(name="editors")


@pytest.fixture
def erin(editors):
    user = User.objects.create_user("erin", "erin@example.org", "erin")
    user.groups.add(editors)
    return user


@pytest.fixture
def shared(dataset, add, editors):
    add("red")
    share(dataset, editor_groups=[editors])
    return dataset


@pytest.fixture
def picture(shared):
    return shared.pictures.get()


def to(name, *args):
    return reverse(f"datasets:{name}", args=args)


def test_who_may_do_what(shared, alice, bob, erin, charlie, staff):
    may = {
        user.username: (
            Dataset.objects.visible_to(user).exists(),
            shared.is_editable_by(user),
            shared.is_owned_by(user),
        )
        for user in (alice, bob, erin, charlie, staff)
    }
    assert may == {
        "alice": (True, True, True),
        "bob": (True, False, False),
        "erin": (True, True, False),
        "charlie": (False, False, False),
        "staff": (True, True, True),
    }


def test_editor_changes_captions_and_pictures_on_pages(shared, picture, erin, client_of, draw):
    browser = client_of(erin)
    browser.post(to("caption", shared.pk, picture.pk), {"caption": "by Erin"})
    browser.post(to("upload", shared.pk), {"files": SimpleUploadedFile("blue.png", draw("blue"))})
    assert shared.pictures.get(pk=picture.pk).caption == "by Erin"
    assert shared.pictures.count() == 2
    assert shared.pictures.filter(caption="").exists()


def test_editor_changes_captions_and_pictures_by_api(shared, picture, erin, api_of, draw):
    api = api_of(erin)
    assert api.patch(f"{URL}{shared.pk}/pictures/{picture.pk}/", {"caption": "by Erin"}).status_code == 200
    files = {"files": SimpleUploadedFile("blue.png", draw("blue"))}
    assert api.post(f"{URL}{shared.pk}/pictures/", files, format="multipart").status_code == 201
    assert api.patch(f"{URL}{shared.pk}/", {"trigger_word": "sks"}).json()["trigger_word"] == "sks"
    assert api.post(f"{URL}{shared.pk}/versions/").status_code == 201


def test_editor_neither_shares_nor_deletes_on_pages(shared, team, erin, client_of, everything):
    browser, before = client_of(erin), everything()
    refused = [
        browser.get(to("delete", shared.pk)),
        browser.post(to("delete", shared.pk)),
        browser.post(to("share", shared.pk), {f"group_{team.pk}": "edit"}),
    ]
    assert [(answer.status_code, ONLY_OWNER in answer.content.decode()) for answer in refused] == [(403, True)] * 3
    assert everything() == before
    seen = browser.get(to("detail", shared.pk)).content.decode()
    assert (to("caption", shared.pk, shared.pictures.get().pk) in seen, to("edit", shared.pk) in seen) == (True, True)
    assert (to("share", shared.pk) in seen, to("delete", shared.pk) in seen) == (False, False)


def test_editor_does_not_delete_for_good(shared, picture, erin, client_of, api_of, everything):
    browser, before = client_of(erin), everything()
    page = reverse("runs:destroy_picture", args=[shared.pk, picture.pk])
    answers = [browser.get(page), browser.post(page)]
    answers.append(api_of(erin).post(f"{URL}{shared.pk}/pictures/{picture.pk}/for-good/"))
    answers.append(api_of(erin).delete(f"{URL}{shared.pk}/pictures/{picture.pk}/for-good/"))
    assert {answer.status_code for answer in answers} <= {403, 405}
    assert [answer.status_code for answer in answers[:2]] == [403, 403]
    assert everything() == before
    of_picture = reverse("runs:of_picture", args=[shared.pk, picture.pk])
    assert page not in browser.get(of_picture).content.decode()


@pytest.mark.parametrize("change", [{"groups": []}, {"editor_groups": []}, {"name": "Mine", "groups": ["editors"]}])
def test_editor_neither_shares_nor_deletes_by_api(shared, erin, api_of, everything, change):
    api, before = api_of(erin), everything()
    answers = [api.patch(f"{URL}{shared.pk}/", change), api.delete(f"{URL}{shared.pk}/")]
    assert [(answer.status_code, answer.json()) for answer in answers] == [(403, {"detail": ONLY_OWNER})] * 2
    assert everything() == before


def test_owner_gives_and_takes_the_right_to_change_on_the_page(shared, team, alice, bob, client_of):
    alice_browser, bob_browser = client_of(alice), client_of(bob)
    caption = to("caption", shared.pk, shared.pictures.get().pk)
    assert bob_browser.post(caption, {"caption": "x"}).status_code == 403
    alice_browser.post(to("share", shared.pk), {f"group_{team.pk}": "edit"})
    assert bob_browser.post(caption, {"caption": "by Bob"}).status_code == 302
    assert set(shared.groups.all()) == set(shared.editor_groups.all()) == {team}
    alice_browser.post(to("share", shared.pk), {f"group_{team.pk}": "view"})
    assert bob_browser.post(caption, {"caption": "x"}).status_code == 403
    assert shared.pictures.get().caption == "by Bob"
    told = AuditEntry.objects.filter(action="dataset shared").order_by("pk").values_list("subject", flat=True)
    assert list(told) == ["Cats: team (edit)", "Cats: team"]


def test_groups_that_change_also_look_and_what_is_left_out_stays(shared, alice, api_of):
    api = api_of(alice)

    def after(change):
        shown = api.patch(f"{URL}{shared.pk}/", change).json()
        return sorted(shown["groups"]), shown["editor_groups"]

    assert after({"editor_groups": ["team"]}) == (["editors", "team"], ["team"])
    assert after({"groups": ["editors"]}) == (["editors"], [])
    assert after({"groups": [], "editor_groups": ["editors"]}) == (["editors"], ["editors"])


def test_share_with_a_group_of_others_is_refused(shared, alice, api_of, everything):
    Group.objects.create(name="others")
    before = everything()
    answer = api_of(alice).patch(f"{URL}{shared.pk}/", {"editor_groups": ["others"]})
    assert (answer.status_code, answer.json()["errors"]) == (
        400,
        {"editor_groups": ["You are not in the group others."]},
    )
    assert everything() == before


def test_upload_ends_with_the_right_to_change(shared, erin, editors, api_of):
    api = api_of(erin)
    upload = api.post("/api/v1/uploads/", {"dataset": shared.pk, "filename": "a.png", "size": 4}).json()
    erin.groups.remove(editors)
    sent = api.patch(
        f"/api/v1/uploads/{upload['id']}/",
        b"1234",
        content_type="application/octet-stream",
        headers={"Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"},
    )
    assert sent.status_code == 404
    assert services.Upload.objects.get().offset == 0
