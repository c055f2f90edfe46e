"""Runs beside each other: what is read, and the pages and the API that show it."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from django.db import connection
from django.http import Http404
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from lorapilot.errors import UserError
from runs import comparison
from runs.models import Attempt, MetricPoint, Run, Sample, ValidationPoint
from tests.factories import make_run, make_slot

API = "/api/v1/runs/compare/"
COMPARE = "/runs/compare/"
CHOOSE = "/runs/compare/choose/"
START = timezone.now()


def at(address, *keys, **more):
    asked = [f"run={getattr(key, 'pk', key)}" for key in keys] + [f"{name}={value}" for name, value in more.items()]
    return f"{address}?{'&'.join(asked)}"


def measure(run, losses, *, attempt=1, since=0, start=START, seconds=2):
    """One loss a step, `seconds` apart."""
    MetricPoint.objects.bulk_create(
        MetricPoint(run=run, step=step, attempt=attempt, loss=loss, at=start + timedelta(seconds=seconds * step))
        for step, loss in enumerate(losses, start=since + 1)
    )


def draw(run, *steps, prompt="sks red", seed=1, index=0):
    return [
        Sample.objects.create(
            run=run, step=step, index=index, path=f"{prompt}-{seed}-{step}.png", prompt=prompt, seed=seed
        )
        for step in steps
    ]


@pytest.fixture
def runs(workspace, alice, team, handed_out):
    """Alice's two, shared with Bob's team: the second has another rank and learning rate, and a longer course."""
    first = make_run(alice, output_name="first")
    second = make_run(alice, output_name="second", values={"rank": 8, "learning_rate": 0.0005})
    for run in (first, second):
        run.groups.add(team)
    Run.objects.update(started_at=START)
    measure(first, [0.4, 0.2, 0.3, None])
    measure(second, [0.4, 0.3, 0.2, 0.1] * 5)
    return [first, second]


@pytest.fixture
def six(runs, alice):
    more = [make_run(alice, output_name=f"more-{number}") for number in range(4)]
    Run.objects.update(started_at=START)
    for run in more:
        measure(run, [0.5, 0.4])
        ValidationPoint.objects.create(run=run, step=2, attempt=1, loss=0.3)
        Attempt.objects.create(run=run, number=1, slot=make_slot(name=run.output_name), ended_at=START)
        draw(run, 0, 2)
    return [*runs, *more]


# --- Selectors --------------------------------------------------------------------------------------------------------
def test_runs_come_in_the_order_of_their_ids(runs, bob):
    first, second = runs
    assert comparison.find_runs(bob, [second.pk, first.pk]) == [second, first]


def test_run_of_a_stranger_is_not_there(runs, charlie):
    mine = make_run(charlie, output_name="mine")
    with pytest.raises(Http404):
        comparison.find_runs(charlie, [mine.pk, runs[0].pk])


def test_ids_count_once():
    assert comparison.run_ids(["3", "1", "3", "03"]) == [3, 1]


@pytest.mark.parametrize("text", ["x", "-1", "", "1.5", "9" * 19])
def test_ids_are_whole_numbers(text):
    with pytest.raises(UserError, match="Name runs by their ids"):
        comparison.run_ids(["1", text])


def test_differences_are_the_settings_that_differ(runs):
    found = [(row.name, row.label, row.values) for row in comparison.differences(runs)]
    assert found == [("rank", "Rank", [2, 8]), ("learning_rate", "Learning rate", [0.0001, 0.0005])]


def test_differences_know_pictures_model_trainer_and_what_was_adapted(runs):
    first, second = runs
    second.stack, second.profile, second.adaptations = "other", "regular", {"batch_size": 4, "rank": 2}
    second.dataset_version.digest = "d" * 64
    second.base_model.sha256 = "e" * 64
    second.spec["learning_rate"] = first.spec["learning_rate"]
    assert [row.name for row in comparison.differences(runs)] == [
        "stack", "profile", "dataset_digest", "base_model_sha256", "batch_size",
    ]  # fmt: skip


def test_differences_know_the_trainers_own_options(runs):
    first, second = runs
    first.stack = second.stack = "kohya"
    first.options, second.options = {"ip_noise_gamma": 0.1, "made_up": [1]}, {"ip_noise_gamma": 0.2}
    labels = comparison.STACKS["kohya"].table().options
    own = [row for row in comparison.differences(runs) if row.name.startswith("options.")]
    assert [(row.name, row.label, row.values) for row in own] == [
        ("options.ip_noise_gamma", labels["ip_noise_gamma"].label, [0.1, 0.2]),
        ("options.made_up", "made_up", [[1], None]),
    ]


def test_runs_with_the_same_settings_do_not_differ(runs, alice):
    assert comparison.differences([runs[0], make_run(alice, output_name="twin")]) == []


def test_figures_of_a_run(runs):
    second = runs[1]
    for step, loss in ((10, 0.5), (15, 0.3), (20, 0.4)):
        ValidationPoint.objects.create(run=second, step=step, attempt=1, loss=loss)
    attempt = Attempt.objects.create(run=second, number=1, slot=make_slot())
    Attempt.objects.filter(pk=attempt.pk).update(created_at=START, ended_at=START + timedelta(seconds=50))
    Run.objects.filter(pk=second.pk).update(loss=0.1)
    second.refresh_from_db()
    figures = comparison.courses(runs)[1].figures
    assert figures == comparison.Figures(
        loss=0.1,
        mean_loss=pytest.approx(0.15),
        best_loss=0.1,
        best_loss_step=4,
        validation_loss=0.4,
        best_validation_loss=0.3,
        best_validation_step=15,
        seconds=50,
        steps_per_second=pytest.approx(0.5),
    )


def test_figures_of_a_run_that_has_measured_nothing(runs, alice):
    course = comparison.courses([make_run(alice, output_name="new")])[0]
    assert (course.figures, course.curve) == (comparison.Figures(), [])


def test_time_between_attempts_does_not_count(runs, alice):
    run = make_run(alice, output_name="resumed")
    measure(run, [0.5, 0.4, 0.3])
    measure(run, [0.2, 0.1], attempt=2, since=3, start=START + timedelta(hours=5))
    course = comparison.courses([run])[0]
    assert course.curve == [(1, 0.5, 0.0), (2, 0.4, 2.0), (3, 0.3, 4.0), (4, 0.2, 4.0), (5, 0.1, 6.0)]
    assert course.figures.steps_per_second == 0.5


def test_curve_of_a_long_run_keeps_its_peak(runs):
    measure(runs[0], [9.0 if step == 3000 else 0.5 for step in range(5, 10_001)], since=4)
    curve = comparison.courses(runs)[0].curve
    assert len(curve) <= 2000
    assert [step for step, loss, _ in curve if loss == 9.0] == [3000]


def test_samples_of_the_same_prompt_and_seed_stand_beside_each_other(runs):
    first, second = runs
    draw(first, 0, 10, 20)
    draw(second, 0, 15)
    draw(second, 15, prompt="sks blue", seed=2, index=1)
    draw(second, 15, prompt="sks red", seed=3, index=2)
    found = comparison.samples(runs)
    assert found.steps == [0, 10, 15, 20]
    assert [(row.prompt, row.seed, [[one.step for one in own] for own in row.samples]) for row in found.rows] == [
        ("sks red", 1, [[0, 10, 20], [0, 15]]),
        ("sks blue", 2, [[], [15]]),
        ("sks red", 3, [[], [15]]),
    ]
    steps = {step: [one and one.step for one in found.rows[0].at(step)] for step in (0, 12, 15, 99)}
    assert steps == {0: [0, 0], 12: [10, 0], 15: [10, 15], 99: [20, 15]}
    assert found.rows[1].at(10) == [None, None]


# --- The pages --------------------------------------------------------------------------------------------------------
@pytest.fixture
def browser(bob, client_of):
    return client_of(bob)


def test_page_shows_runs_beside_each_other(runs, browser):
    draw(runs[0], 4)
    answer = browser.get(at(COMPARE, *runs))
    text = answer.content.decode()
    assert answer.status_code == 200
    assert [column["run"] for column in answer.context["columns"]] == runs
    assert '<tr id="setting-rank"><th scope="row">Rank</th><td>2</td><td>8</td></tr>' in text
    assert '<tr id="setting-steps" class="is-same"><th scope="row">Steps</th><td>4</td><td>4</td></tr>' in text
    curves = json.loads(answer.context["curves"])
    assert [(one["name"], len(one["points"])) for one in curves] == [("first", 4), ("second", 20)]
    assert curves[0]["points"][1] == [2, 0.2, 2.0]


def test_page_shows_digests_when_the_pictures_differ(runs, browser, alice):
    version = runs[1].dataset_version
    version.pk, version.number, version.digest = None, 2, "d" * 64
    version.save()
    Run.objects.filter(pk=runs[1].pk).update(dataset_version=version)
    text = browser.get(at(COMPARE, *runs)).content.decode()
    assert '<tr id="setting-dataset"><th scope="row">Dataset</th><td>shapes v1</td><td>shapes v2</td></tr>' in text
    row = text.partition('<tr id="setting-dataset_digest">')[2].partition("</tr>")[0]
    assert [f"sha256 {digest}" in row for digest in (runs[0].dataset_version.digest, "d" * 64)] == [True, True]


def test_page_without_differences_says_so(runs, browser, alice, team):
    twin = make_run(alice, output_name="twin")
    twin.groups.add(team)
    text = browser.get(at(COMPARE, runs[0], twin)).content.decode()
    assert "None: same settings, pictures, base model and trainer." in text


def test_page_shows_samples_up_to_a_step(runs, browser):
    early, late = draw(runs[0], 1, 4)
    (other,) = draw(runs[1], 3)

    def shown(step):
        answer = browser.get(at(COMPARE, *runs, step=step), headers={"HX-Request": "true"})
        text = answer.content.decode()
        assert "<html" not in text
        return [
            f'<img src="/runs/{sample.run_id}/samples/{sample.pk}/"' in text for sample in (early, late, other)
        ], text.count("Not drawn by step")

    assert shown(1) == ([True, False, False], 1)
    assert shown(3) == ([True, False, True], 0)
    assert shown(4) == ([False, True, True], 0)
    assert [shown(step) for step in ("", "x", "2", "9" * 5000)] == [shown(4)] * 4  # of the last step


def test_page_costs_the_same_for_two_and_six_runs(six, alice, client_of):
    browser = client_of(alice)

    def queries(address):
        with CaptureQueriesContext(connection) as found:
            assert browser.get(address).status_code == 200
        return len(found)

    browser.get(at(COMPARE, *six))
    assert queries(at(COMPARE, *six[:2])) == queries(at(COMPARE, *six))
    assert queries(at(CHOOSE, *six[:2])) == queries(at(CHOOSE, *six))


@pytest.mark.parametrize("count", [0, 1, 7])
def test_page_asks_again_for_two_to_six_runs(six, alice, client_of, count):
    every = [*six, make_run(alice, output_name="seventh")]
    answer = client_of(alice).get(at(COMPARE, *every[:count]))
    assert (answer.status_code, f"Choose 2 to 6 runs: these are {count}." in answer.content.decode()) == (400, True)
    assert answer.content.decode().count(" checked>") == count


@pytest.mark.parametrize("address", [COMPARE, CHOOSE])
def test_pages_refuse_what_is_no_id(runs, browser, address):
    answer = browser.get(at(address, runs[0], "x"))
    assert (answer.status_code, "Name runs by their ids" in answer.content.decode()) == (400, True)


@pytest.mark.parametrize("address", [COMPARE, CHOOSE])
def test_pages_of_nothing_and_of_strangers_are_not_found(runs, browser, charlie, client_of, address):
    mine = make_run(charlie, output_name="mine")
    assert browser.get(at(address, runs[0], 999)).status_code == 404
    assert browser.get(at(address, runs[0], mine)).status_code == 404
    assert client_of(charlie).get(at(address, mine, runs[0])).status_code == 404


@pytest.mark.parametrize("address", [COMPARE, CHOOSE])
def test_pages_refuse_the_wrong_method(runs, browser, address):
    assert {getattr(browser, method)(at(address, *runs)).status_code for method in ("post", "put", "delete")} == {405}


def test_chooser_offers_what_one_sees_and_has_trained(six, browser, charlie, client_of):
    make_run(charlie, output_name="mine")
    Run.objects.filter(output_name="mine").update(started_at=START)
    answer = browser.get(at(CHOOSE, six[0]))
    assert [run.output_name for run in answer.context["runs"]] == ["first", "second"]
    assert answer.content.decode().count(" checked>") == 1
    assert [run.output_name for run in client_of(charlie).get(CHOOSE).context["runs"]] == ["mine"]


def test_chooser_finds_by_name_and_keeps_what_is_chosen(six, alice, client_of):
    answer = client_of(alice).get(at(CHOOSE, six[0], name="MORE-1%00"))
    assert [run.output_name for run in answer.context["runs"]] == ["first", "more-1"]


def test_list_and_run_page_lead_to_the_comparison(runs, browser):
    Run.objects.filter(pk=runs[0].pk).update(status="stopped", finished_at=START)
    shown = browser.get("/runs/").content.decode()
    assert f'<input type="checkbox" form="compare-form" name="run" value="{runs[0].pk}"' in shown
    assert f'<form id="compare-form" class="compare-bar" action="{COMPARE}">' in shown
    assert f'href="{at(CHOOSE, runs[0])}"' in browser.get(reverse("runs:detail", args=[runs[0].pk])).content.decode()


# --- The API ----------------------------------------------------------------------------------------------------------
def test_api_compares_runs(runs, bob, api_of):
    drawn = draw(runs[1], 0, 4)
    answer = api_of(bob, "read").get(at(API, *reversed(runs)))
    found = answer.json()
    assert answer.status_code == 200
    assert [one["run"]["output_name"] for one in found["runs"]] == ["second", "first"]
    assert [one["figures"]["best_loss"] for one in found["runs"]] == [0.1, 0.2]
    assert found["differences"] == [
        {"name": "rank", "label": "Rank", "values": [8, 2]},
        {"name": "learning_rate", "label": "Learning rate", "values": [0.0005, 0.0001]},
    ]
    assert found["samples"] == [
        {
            "prompt": "sks red",
            "negative_prompt": "",
            "seed": 1,
            "samples": [[{"id": one.pk, "run": runs[1].pk, "step": one.step} for one in drawn], []],
        }
    ]


def test_api_costs_the_same_for_two_and_six_runs(six, alice, api_of):
    api = api_of(alice)

    def queries(runs):
        with CaptureQueriesContext(connection) as found:
            assert api.get(at(API, *runs)).status_code == 200
        return len(found)

    queries(six)
    assert queries(six[:2]) == queries(six)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda runs: runs[:1], "Choose 2 to 6 runs: these are 1."),
        (lambda runs: [runs[0], runs[0]], "Choose 2 to 6 runs: these are 1."),
        (lambda runs: [*runs, 7], "Choose 2 to 6 runs: these are 7."),
        (lambda runs: [], "Choose 2 to 6 runs: these are 0."),
        (lambda runs: [runs[0], "x"], "Name runs by their ids: run=1&run=2."),
    ],
)
def test_api_refuses_bad_input(six, alice, api_of, ask, sentence):
    answer = api_of(alice).get(at(API, *ask(six)))
    assert (answer.status_code, answer.json()) == (400, {"detail": sentence, "errors": {"run": [sentence]}})


def test_api_does_not_know_strangers_runs(runs, alice, charlie, api_of):
    mine = make_run(charlie, output_name="mine")
    assert api_of(charlie).get(at(API, mine, runs[0])).status_code == 404
    assert api_of(alice).get(at(API, *runs, 999)).status_code == 404


def test_api_refuses_the_wrong_method_and_visitors(runs, alice, api_of, client):
    api = api_of(alice)
    assert [getattr(api, method)(at(API, *runs)).status_code for method in ("post", "put", "delete")] == [405] * 3
    assert client.get(at(API, *runs)).status_code == 401
