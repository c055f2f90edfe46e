from __future__ import annotations

from django.urls import reverse


def test_detail_of_a_dataset_shows_pictures_and_captions(dataset, add, alice, client_of):
    add("red", "blue")
    answer = client_of(alice).get(reverse("datasets:detail", args=[dataset.pk]))
    assert answer.status_code == 200
    page = answer.content.decode()
    assert page.count('class="card picture-card"') == 2
    assert "a red picture" in page
    assert "ohwx" in page
