"""`manage.py models`: list, where, pull, pull-all, and its exit codes."""

import io

import pytest
from django.core.management import CommandError, call_command

from lorapilot.services import set_secret
from models_registry.models import Pull

pytestmark = pytest.mark.django_db
BODY = b"x" * 5000


@pytest.fixture
def stocked(hub, manifest_of):
    manifest_of(
        "one|hf_file|a/b:one.safetensors|vae||5000",
        "locked|hf_file|g/b:two.safetensors|checkpoints||||yes",
        "gone|hf_file|a/b:gone.safetensors|vae",
    )
    hub.files |= {"a/b": {"one.safetensors": BODY}, "g/b": {"two.safetensors": BODY}}
    hub.gated.add("g/b")
    hub.tokens.add("hf_good")
    return hub


def models_command(*arguments):
    out, err = io.StringIO(), io.StringIO()
    call_command("models", *arguments, stdout=out, stderr=err)
    return out.getvalue()


def test_list(stocked, models, manifest_of):
    lines = [line.split() for line in models_command("list").splitlines()]
    assert lines == [
        ["one", "4.9", "KB", "-", "vae/one.safetensors"],
        ["locked", "?", "gated", "checkpoints/two.safetensors"],
        ["gone", "?", "-", "vae/gone.safetensors"],
    ]
    models_command("pull", "one")
    assert models_command("list").splitlines()[0].split() == ["one", "4.9", "KB", "installed", "vae/one.safetensors"]


def test_pull_and_where(stocked, models):
    assert models_command("pull", "one", "--dir", "mine") == f"{models}/mine/one.safetensors\n"
    assert (models / "mine" / "one.safetensors").read_bytes() == BODY
    assert models_command("where", "one") == f"{models}/mine/one.safetensors\n"
    pull = Pull.objects.get()
    assert (pull.name, pull.subdir, pull.job, pull.files) == ("one", "mine", None, [["mine/one.safetensors", 5000]])


def test_where_of_what_is_not_there_tells_the_path_and_ends_with_1(stocked, models):
    out = io.StringIO()
    with pytest.raises(CommandError, match="one is not there, or not as a whole") as error:
        call_command("models", "where", "one", stdout=out)
    assert (error.value.returncode, out.getvalue()) == (1, f"{models}/vae/one.safetensors\n")


def test_pull_with_somebody_s_token(stocked, models, staff):
    set_secret(staff, name="huggingface", value="hf_good")
    models_command("pull", "locked", "--user", "staff")
    assert (models / "checkpoints" / "two.safetensors").read_bytes() == BODY


def test_pull_all_tells_at_the_end_what_failed(stocked, models):
    with pytest.raises(CommandError) as error:
        models_command("pull-all")
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["locked", "gone"]
    assert (models / "vae" / "one.safetensors").read_bytes() == BODY
    assert Pull.objects.count() == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("where", "nothing"),
        ("pull", "nothing"),
        ("pull", "one", "--dir", "../x"),
        ("pull", "locked"),
        ("pull", "gone"),
        ("pull", "one", "--user", "nobody"),
    ],
)
def test_refusals_end_with_2(stocked, models, arguments):
    with pytest.raises(CommandError) as error:
        models_command(*arguments)
    assert error.value.returncode == 2
    assert list(models.rglob("*.safetensors")) == []


def test_interrupted_by_hand_ends_with_130(stocked, models, monkeypatch):
    from models_registry import pulls

    def interrupt(*_args, **_values):
        raise KeyboardInterrupt

    monkeypatch.setattr(pulls, "perform", interrupt)
    with pytest.raises(CommandError, match="What has arrived is kept") as error:
        models_command("pull", "one")
    assert error.value.returncode == 130
