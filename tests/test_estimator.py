"""The study `estimator`: unbiased splits, intervals that cover, closed forms that agree and wrong ones that do not, and words."""

import json
import math
from dataclasses import replace

import pytest
import torch

from scoresde_cli.compose import compose
from scoresde_cli.identity import bonferroni
from scoresde_cli.losses.ssm_vr import SSMVR
from scoresde_cli.projections import Orthogonal, Rademacher, Sphere
from scoresde_cli.rng import generator, normal
from scoresde_cli.studies import closed_forms
from scoresde_cli.studies.closed_forms import (
    batch_at,
    drawn,
    exact_loss,
    log_times,
    parts,
    quadratic_forms,
    wide,
)
from scoresde_cli.studies.costs import Costs, Line, Work
from scoresde_cli.studies.estimator_report import report_parts
from scoresde_cli.studies.gradients import Gradients, centred_squares, gradients, ratio, split
from scoresde_cli.studies.measurement import best_rows, fitted, gradient_row, law_rows, measure, settings
from tests.laws import PROJECTIONS, name
from tests.test_evaluation import config

LAWS = {name(law).lower(): law for law in PROJECTIONS if not law.adapted}


def done(_):
    pass


def plan(d, **changes):
    changes = {
        "data": "gmm",
        "data__d": d,
        "data__n": 2000,
        "tracker__mode": "disabled",
        "network__width": 32,
    } | changes
    return compose(config(**changes)).plan()


@pytest.fixture(scope="module")
def four():
    """Four dimensions, after 100 steps of training, so that the last layer is not zero."""
    return fitted(plan(4), 100, done)


def compare(plan, laws, counts=(1, 3)):
    return closed_forms.compare(plan, settings(plan, laws, counts), times=3, rows=24, draws=64, progress=done)


def test_in_one_dimension_where_one_direction_is_exact_there_is_a_report(tmp_path, cli):
    code, _, err = cli("ablate", "study=estimator", "size=smoke", "data=gaussian", "study.dims=[1]")
    assert code == 0, err
    assert list(tmp_path.rglob("report.html"))


def test_measured_variances_of_the_loss_are_the_closed_forms_and_there_is_no_bias(four):
    rows = [row for row in compare(four, LAWS) if row["law"] != "exact"]
    cells = [cell for row in rows for cell in (row, *row["by_time"])]
    assert len(rows) == 4 * len(LAWS)
    assert all(abs(cell["z"]) < bonferroni(len(cells)) for cell in cells)
    assert all(abs(row["bias_z"]) < bonferroni(len(rows)) for row in rows)
    # 95 percent intervals that share their samples: 80 percent of them is more than three of their spreads below 95.
    held = [cell["ratio"]["low"] <= 1.0 <= cell["ratio"]["high"] for cell in cells]
    assert sum(held) > 0.8 * len(held)
    # With 64 draws of 72 samples a ratio is known to a tenth, the kurtosis of a rank-one form included.
    assert all(abs(row["ratio"]["value"] - 1.0) < 0.25 for row in rows)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_wrong_closed_form_is_found_out(four, factor):
    class Wrong(Rademacher):
        def variance(self, A, n):
            return factor * super().variance(A, n)

    rows = [row for row in compare(four, {"wrong": Wrong()}) if row["law"] == "wrong"]
    assert all(abs(row["z"]) > bonferroni(1000) for row in rows)
    assert all(math.copysign(1.0, row["z"]) == math.copysign(1.0, 1.0 - factor) for row in rows)


def test_a_loss_is_its_quadratic_form_and_a_constant(four):
    """In float64: with the directions of the loss itself, l = const + mean_k v_k^T M v_k to rounding."""
    wider = wide(four)
    batch = batch_at(wider, log_times(wider, 3), 5)
    exact, forms = batch.losses(exact_loss(four.loss), "exact"), quadratic_forms(batch)
    for setting in settings(wider, {"sphere": Sphere()}, [3])[:2]:
        drawn_from = generator(four.seed, "directions", "closed forms", 0)
        v = Sphere().sample(tuple(batch.x0.shape), 3, drawn_from, torch.float64)
        M = forms[setting.loss]
        form = torch.einsum("kbi,bij,kbj->kb", v, M, v).mean(0) - M.diagonal(dim1=1, dim2=2).sum(1)
        with torch.no_grad():
            assert torch.allclose(batch.losses(setting.value, 0) - exact, form, rtol=0, atol=1e-9)


def test_whole_frames_are_exact_and_said_to_be(four):
    rows = compare(four, {"orthogonal": Orthogonal()}, (4,))
    assert [(row["law"], row["z"], row["ratio"]) for row in rows if row["law"] != "exact"] == [
        ("orthogonal", 0.0, None)
    ]


def test_both_parts_of_a_known_variance_are_found():
    """l = x + noise with Var x = 4 and Var noise = 9: the mean of 400 estimates within 4 of its standard errors."""
    source = generator(0, "toy")
    found = []
    for _ in range(400):
        x = 2.0 * normal((1, 1, 10), source, torch.float64)
        values = x + 3.0 * normal((4, 1, 10), source, torch.float64)
        each = parts(values, None, None)
        found.append([each["data"]["value"], each["projection"]["value"]])
    estimates = torch.tensor(found)
    z = (estimates.mean(0) - torch.tensor([4.0, 9.0])) / (estimates.std(0) / 20.0)
    assert z.abs().max() < 4


def test_the_trace_of_a_covariance_is_unbiased():
    e = normal((3000, 5, 3), generator(1, "toy"), torch.float64)  # 5 vectors, tr Cov = 3
    found = torch.stack([centred_squares(each).mean() for each in e])
    assert abs(float((found.mean() - 3.0) / (found.std() / math.sqrt(3000)))) < 4


def test_two_routes_to_the_parts_of_the_gradients_variance_agree(four):
    """Against the exact gradient, and by variance.split; each ratio is known to about a fifth, so 3 in its logarithm's errors."""
    chosen = [s for s in settings(four, {"rademacher": Rademacher()}, [1]) if s.law != "exact"]
    first, second = gradients(four, chosen, 24, done), split(four, chosen, 24, done, ("other",), None)
    for i in range(len(chosen)):
        a, b = (ratio(found.projection[i], found.data[i]) for found in (first, second))
        assert abs(math.log(a.value / b.value)) < 3.0 * math.hypot(a.se / a.value, b.se / b.value)


def test_the_interval_of_a_ratio_covers():
    """Of 2000 ratios of correlated gamma means over 16 batches (coefficients of variation 0.7 and 0.4), 95 percent within 2."""
    source = torch.distributions.Gamma
    torch.manual_seed(0)
    shared = source(2.0, 2.0).sample((2000, 16)).double()
    a, b = (shared + source(shape, shape).sample((2000, 16)).double() for shape in (1.0, 4.0))
    found = [ratio(x, y, 3.0) for x, y in zip(a, b, strict=True)]
    covered = sum(each.low <= 3.0 <= each.high for each in found) / 2000
    assert 0.93 < covered < 0.97


def test_the_line_of_costs_is_that_of_the_steps():
    line = Line.fit([1, 2, 4, 8], [0.005 * (1 + 0.2 * n) for n in (1, 2, 4, 8)])
    assert line.rest == pytest.approx(0.005)
    assert line.c == pytest.approx(0.2)
    assert line.squares == pytest.approx(0.0, abs=1e-20)


def made_up(spread):
    """What measure would find with r = 3.2 and c = 0.2 at n = 1, d = 64: sqrt(r/c) = 4; plain ssm has ten times the r.

    The batches differ by `spread`, in the projection part alone, and the seconds lie on their line but for a thousandth.
    """
    counts, d = [1, 2, 4, 8, 16], 64
    laws = {"rademacher": Rademacher(), "sphere": Sphere()}
    chosen = settings(plan(d), laws, counts)
    data, projection, seconds = [], [], []
    for i, setting in enumerate(chosen):
        noise = 1.0 + spread * normal((12,), generator(i, "made up"), torch.float64).tanh()
        r = (
            0.0
            if setting.law == "exact"
            else 3.2 * (10.0 if setting.loss == "ssm" else 1.0) * (1.5 if setting.law == "sphere" else 1.0)
        )
        data.append(torch.ones(12, dtype=torch.float64))
        projection.append(r / setting.n * noise / noise.mean())
        seconds.append(0.005 * (1 + 0.2 * setting.n) * (1 + 1e-3 * (-1) ** i))
    work = Work(Gradients(data, projection, None), Costs.of(chosen, seconds))
    still = {"value": 1.0, "se": 0.0, "low": 1.0, "high": 1.0, "n": 9}
    cell = {"data": still, "projection": still, "predicted": 1.0, "ratio": still | {"low": 0.9, "high": 1.1}, "z": 0.3}
    loss = cell | {"bias": still, "bias_z": 0.1, "by_time": [cell]}
    rows = [s.name | loss | gradient_row(work, chosen, laws, d, i) | {"gradient_z": 1.0} for i, s in enumerate(chosen)]
    return {
        "data": "made up", "d": d, "exact": True, "adapted": [], "batch_size": 256, "fit_steps": 100, "replicates": 12, "rows": 9,
        "draws": 9, "times": 1, "settings": rows, "laws": law_rows(work, chosen), "best": best_rows(work, chosen),
        "by_time": [s.name | {"t": t, "r": still} for s in chosen if s.n == 1 for t in (0.1, 1.0)],
    }  # fmt: skip


def test_the_report_names_the_count_of_least_cost_times_variance(tmp_path):
    answers, tables, figures, notes = report_parts([made_up(1e-3)], tmp_path)
    count, law, plain, closed, bias = answers
    assert "least with rademacher, K = 4; every other K of rademacher is told apart from it" in count
    assert "sqrt(r/c): 4 (" in count
    assert "told apart: sphere" in law
    assert "sphere has" in law
    assert "told apart from it. With K = 1 (rademacher) its directions bring 32 times the data's variance" in plain
    assert "agree with" in closed
    assert bias.startswith("No bias")
    assert all(figure.path.stat().st_size > 10_000 for figure in figures)
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    assert "100 steps" in notes[0]


def test_the_report_says_what_the_numbers_do_not_tell_apart(tmp_path):
    count, law, *_ = report_parts([made_up(0.9)], tmp_path)[0]
    assert "not told apart from it: K = " in count
    assert "not told apart: " in law


def test_a_closed_form_that_disagrees_is_an_answer(tmp_path):
    found = made_up(1e-3)
    found["settings"][0]["z"] = -9.0
    assert any("do NOT agree" in answer for answer in report_parts([found], tmp_path)[0])


def test_measure_is_plain_data_and_leaves_the_plan_as_it_was(tmp_path):
    asked = plan(2, data__labels="true")
    before = [p.detach().clone() for p in asked.model.parameters()]
    found = measure(asked, LAWS, [1, 2], replicates=4, fit_steps=5, times=2, rows=4, draws=4, turns=1)
    assert all(torch.equal(p, q) for p, q in zip(asked.model.parameters(), before, strict=True))
    found = json.loads(json.dumps(found)) | {"data": "gmm"}
    assert {(row["loss"], row["n"]) for row in found["settings"]} == {
        ("ssm_vr", 1),
        ("ssm", 1),
        ("ssm", 2),
        ("ssm_vr", 2),
    }
    assert report_parts([found], tmp_path)[0]


def test_the_same_seed_gives_the_same_variances():
    twice = [
        measure(plan(2), {"r": Rademacher()}, [1], replicates=4, fit_steps=2, times=2, rows=4, draws=4, turns=1)
        for _ in "ab"
    ]
    first, second = ([row["r"] for row in found["settings"]] for found in twice)
    assert first == second


def test_beyond_the_exact_trace_the_parts_are_still_found(tmp_path):
    few = replace(plan(130), batch_size=16)
    found = measure(
        few, {"rademacher": Rademacher()}, [1, 2], replicates=4, fit_steps=0, times=2, rows=4, draws=4, turns=1
    )
    assert not found["exact"]
    assert all(row["predicted"] is None and row["gradient_z"] is None for row in found["settings"])
    answers, *_, notes = report_parts([found | {"data": "gmm"}], tmp_path)
    assert any("too many dimensions" in note for note in notes)
    assert answers


def test_draws_do_not_depend_on_how_many_rows_are_taken_at_once(four, monkeypatch):
    """Copies of a batch draw other directions, so the two agree in law: the mean variance within a fifth at 400 draws."""
    wider = wide(four)
    batch = batch_at(wider, log_times(wider, 3), 4)
    loss = SSMVR(Rademacher(), 1)
    with torch.no_grad():
        many = drawn(batch, loss, 400).var(0).mean()
        monkeypatch.setattr(closed_forms, "AT_ONCE", 1)
        one = drawn(batch, loss, 400).var(0).mean()
    assert float(many / one) == pytest.approx(1.0, abs=0.2)


def test_settings_below_d_are_sliced_and_the_rest_is_the_exact_trace():
    found = settings(plan(4), {"rademacher": Rademacher()}, [8, 1, 4])
    assert [s.n for s in found if s.loss == "ssm_vr"] == [1, 4]
    assert [s.law for s in found if s.loss == "ssm_vr"] == ["rademacher", "exact"]
    assert [s.n for s in found if s.loss == "ssm"] == [1, 4, 8]
