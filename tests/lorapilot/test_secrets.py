"""Keys of other services: encrypted, never shown again, one's own alone."""

import pytest
from django.db import connection

from lorapilot import services, vault
from lorapilot.models import AuditEntry, Secret
from lorapilot.selectors import reveal_secret

pytestmark = pytest.mark.django_db
API = "/api/v1/secrets/"
KEY = "hf_verysecretkey"


def in_the_database():
    with connection.cursor() as cursor:
        cursor.execute("SELECT value FROM lorapilot_secret")
        return [row[0] for row in cursor.fetchall()]


def test_set_is_encrypted_and_can_be_used(alice, bob):
    services.set_secret(alice, name="huggingface", value=f" {KEY}\n")
    assert (reveal_secret(alice, "huggingface"), reveal_secret(bob, "huggingface")) == (KEY, "")
    assert (reveal_secret(alice, "civitai"), reveal_secret(None, "huggingface")) == ("", "")
    assert (len(in_the_database()), KEY in in_the_database()[0]) == (1, False)


def test_set_again_replaces(alice):
    services.set_secret(alice, name="huggingface", value="hf_old")
    services.set_secret(alice, name="huggingface", value=KEY)
    assert (reveal_secret(alice, "huggingface"), Secret.objects.count()) == (KEY, 1)


def test_another_secret_key_cannot_read_it(alice, settings):
    services.set_secret(alice, name="huggingface", value=KEY)
    settings.SECRET_KEY = "another" * 10
    assert reveal_secret(alice, "huggingface") == ""


def test_vault_notices_a_change():
    written = vault.encrypt(KEY)
    assert vault.decrypt(written) == KEY
    assert vault.decrypt(("B" if written[20] == "A" else "A").join([written[:20], written[21:]])) is None


def test_api(api_of, alice, bob):
    api = api_of(alice)
    assert api.get(API).json() == []
    answer = api.put(f"{API}huggingface/", {"value": KEY})
    assert (answer.status_code, sorted(answer.json())) == (200, ["name", "updated_at"])
    assert [row["name"] for row in api.get(API).json()] == ["huggingface"]
    assert KEY not in answer.content.decode() + api.get(API).content.decode()
    assert api_of(bob).get(API).json() == []
    assert api_of(bob).delete(f"{API}huggingface/").status_code == 404
    assert reveal_secret(alice, "huggingface") == KEY
    assert api.delete(f"{API}huggingface/").status_code == 204
    assert (Secret.objects.count(), api.delete(f"{API}huggingface/").status_code) == (0, 404)
    told = list(AuditEntry.objects.order_by("pk").values_list("actor__username", "action", "subject"))
    assert told == [
        ("alice", "key of another service set", "Hugging Face"),
        ("alice", "key of another service deleted", "Hugging Face"),
    ]


@pytest.mark.parametrize("value", ["", "   ", "two words", "späm", "a\nb", "x" * 501])
def test_api_refuses_what_is_no_key(api_of, alice, value):
    answer = api_of(alice).put(f"{API}huggingface/", {"value": value})
    assert (answer.status_code, list(answer.json()["errors"])) == (400, ["value"])
    assert Secret.objects.count() == 0


def test_api_refuses_other_names_methods_and_people(api_of, alice, client):
    api = api_of(alice)
    assert api.put(f"{API}aws/", {"value": KEY}).status_code == 404
    assert (api.post(API).status_code, api.get(f"{API}huggingface/").status_code) == (405, 405)
    assert api_of(alice, "read").put(f"{API}huggingface/", {"value": KEY}).status_code == 403
    assert (client.get(API).status_code, client.put(f"{API}huggingface/").status_code) == (401, 401)
    assert Secret.objects.count() == 0


def test_page(client_of, alice, bob):
    browser = client_of(alice)
    assert "You have set none." in browser.get("/account/").content.decode()
    answer = browser.post("/account/secrets/", {"name": "civitai", "value": KEY})
    assert (answer.status_code, answer.url) == (302, "/account/")
    page = browser.get("/account/").content.decode()
    assert ("set on" in page, KEY in page, in_the_database()[0] in page) == (True, False, False)
    assert "set on" not in client_of(bob).get("/account/").content.decode()
    assert client_of(bob).post("/account/secrets/civitai/delete/").status_code == 404
    assert browser.post("/account/secrets/civitai/delete/").status_code == 302
    assert Secret.objects.count() == 0


def test_page_says_what_is_wrong(client_of, alice):
    answer = client_of(alice).post("/account/secrets/", {"name": "civitai", "value": "two words"})
    page = answer.content.decode()
    assert (answer.status_code, "This is not a key" in page, "two words" in page) == (400, True, False)
    assert client_of(alice).post("/account/secrets/", {"name": "aws", "value": KEY}).status_code == 400
    assert Secret.objects.count() == 0


@pytest.mark.parametrize("address", ["/account/secrets/", "/account/secrets/civitai/delete/"])
def test_page_refuses_the_wrong_method_and_strangers(client, client_of, alice, address):
    assert client_of(alice).get(address).status_code == 405
    assert client.post(address).url == f"/accounts/login/?next={address}"


def test_admin_shows_that_there_is_one_and_no_more(client_of, staff, alice):
    secret = services.set_secret(alice, name="wandb", value=KEY)
    page = client_of(staff).get(f"/admin/lorapilot/secret/{secret.pk}/change/").content.decode()
    assert ("alice" in page, KEY in page, secret.value in page) == (True, False, False)
