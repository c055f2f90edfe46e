"""The owner, members of the groups it is shared with, and staff see a thing; the owner and staff change it."""

import pytest
from django.contrib.auth.models import AnonymousUser
from django.http import Http404

from datasets.models import Dataset
from lorapilot.access import get_editable, get_visible
from lorapilot.errors import NotAllowed


@pytest.fixture
def shared(alice, team):
    dataset = Dataset.objects.create(owner=alice, name="cats")
    dataset.groups.add(team)
    return dataset


@pytest.fixture
def private(alice):
    return Dataset.objects.create(owner=alice, name="secret")


def test_visible_to_each_person(shared, private, alice, bob, charlie, staff):
    def seen_by(user):
        return set(Dataset.objects.visible_to(user))

    assert seen_by(alice) == {shared, private}
    assert seen_by(bob) == {shared}
    assert seen_by(charlie) == set()
    assert seen_by(staff) == {shared, private}
    assert seen_by(AnonymousUser()) == set()


def test_visible_once_though_shared_with_two_groups(shared, bob):
    from django.contrib.auth.models import Group

    second = Group.objects.create(name="second")
    shared.groups.add(second)
    bob.groups.add(second)
    assert list(Dataset.objects.visible_to(bob)) == [shared]


@pytest.mark.parametrize("who", ["alice", "staff"])
def test_visible_to_nobody_who_is_inactive(shared, request, who):
    user = request.getfixturevalue(who)
    user.is_active = False
    assert set(Dataset.objects.visible_to(user)) == set()
    assert shared.is_editable_by(user) is False


def test_leaving_the_group_ends_the_view(shared, bob, team):
    bob.groups.remove(team)
    with pytest.raises(Http404):
        get_visible(Dataset, bob, pk=shared.pk)


def test_get_editable_of_owner_and_staff(shared, alice, staff):
    assert get_editable(Dataset, alice, pk=shared.pk) == shared
    assert get_editable(Dataset, staff, pk=shared.pk) == shared


def test_get_editable_refuses_a_viewer_and_hides_from_a_stranger(shared, bob, charlie):
    with pytest.raises(NotAllowed):
        get_editable(Dataset, bob, pk=shared.pk)
    with pytest.raises(Http404):
        get_editable(Dataset, charlie, pk=shared.pk)


def test_get_visible_of_nothing_is_404(alice):
    with pytest.raises(Http404):
        get_visible(Dataset, alice, pk=12345)


@pytest.mark.parametrize("key", ["abc", "", "1e3", "9" * 40, None, "-1"])
def test_get_visible_of_what_no_key_can_be_is_404(shared, alice, key):
    with pytest.raises(Http404):
        get_visible(Dataset, alice, pk=key)
