"""From runs to a report: nothing is silently dropped or wrongly compared, and the page needs nothing beside itself."""

import base64
import html
import itertools
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.studies import charts
from scoresde_cli.studies.analysis import Cell, analyse, answers, gap, labels, left_out, panels, shown, tables
from scoresde_cli.studies.base import compare as compare_cells
from scoresde_cli.studies.report import Figure, Report, Table, markdown, text, write
from scoresde_cli.studies.statistics import Difference, compare, mean

HOSTILE = '<script>alert("1|2")</script> & `a` *b* $c$'


def entry(value, unit="sigma^2 |s - s*|^2", **protocol):
    return {"value": value, "ci": None, "floor": None, "floor_high": None, "unit": unit, "protocol": protocol}


def cell(setting, seed, value, metric="score_error", status="finished", unit="error", **protocol):
    summary = {
        metric: entry(value, unit, seed=seed, data="d0", **protocol),
        "train_seconds": entry(10.0 + seed, "s", step=1000 + 50 * seed),
    }
    return Cell(setting, seed, summary if status == "finished" else {}, status, f"runs/{seed}")


NUMBERS = {"a": [1.0, 1.1, 1.2, 0.9], "b": [1.02, 1.12, 1.19, 0.93], "c": [2.1, 2.2, 2.45, 1.9]}


def grid(numbers=NUMBERS, **more):
    return [cell({"loss": name}, seed, v, **more) for name, row in numbers.items() for seed, v in enumerate(row)]


def rows(panel, i=0):
    return {row[0]: row for row in tables(panel)[i].rows}


def test_the_table_holds_the_numbers_of_the_statistics():
    panel = analyse("d = 16", grid(), ["score_error"])
    (found,) = panel.measured
    assert found.comparison == compare(NUMBERS, log=True)
    assert [row.estimate for row in found.rows] == [mean(values) for values in NUMBERS.values()]
    (table,) = tables(panel)
    shown_of = dict(zip(table.columns, rows(panel)["c"], strict=True))
    expected, ratio = mean(NUMBERS["c"]), compare(NUMBERS, log=True).against("c", "a")
    assert float(shown_of["mean"]) == pytest.approx(expected.value, abs=0.005)
    assert [float(v) for v in shown_of["95% interval"].split(" to ")] == pytest.approx(
        [expected.low, expected.high], abs=0.005
    )
    assert shown_of["ratio to the best"] == f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    assert [rows(panel)[name][6] for name in "abc"] == ["best", "not told apart from the best", "told apart"]
    assert (shown_of["seeds"], shown_of["steps"], shown_of["seconds"]) == ("4", "1075", "11.5")


def test_settings_are_paired_by_seed_in_whatever_order_they_come():
    backwards = analyse("", grid()[::-1], ["score_error"]).measured[0].comparison
    forwards = analyse("", grid(), ["score_error"]).measured[0].comparison
    assert backwards.se == pytest.approx(forwards.se, rel=1e-12)


def test_an_unfinished_setting_is_listed_and_not_compared():
    runs = [each for each in grid() if (each.setting["loss"], each.seed) != ("a", 2)]
    panel = analyse("d = 16", [*runs, cell({"loss": "a"}, 2, 0.0, status="diverged")], ["score_error"])
    assert rows(panel)["a"][6] == "3 of 4 finished"
    assert left_out(panel) == ["d = 16: a: 3 of 4 finished (1 diverged: runs/2)"]
    assert set(panel.measured[0].comparison.means) == {"b", "c"}
    assert answers(panel)[0].startswith("d = 16: b has the least score_error")


def test_a_setting_that_never_finished_is_in_the_table_too():
    failed = [cell({"loss": "z"}, seed, 0.0, status="failed") for seed in range(4)]
    panel = analyse("", [*grid(), *failed], ["score_error"])
    assert rows(panel)["z"][1:7] == ["", "", "", "", "", "0 of 4 finished"]
    assert "z: 0 of 4 finished (4 failed: runs/0, runs/1, runs/2, runs/3)" in left_out(panel)


@pytest.mark.parametrize("value", ["nan", math.inf])
def test_a_finished_run_without_a_finite_number_is_not_compared(value):
    panel = analyse("", [*grid()[:-1], cell({"loss": "c"}, 3, value)], ["score_error"])
    assert left_out(panel) == ["score_error: c: 3 of 4 finished runs have a finite number; not compared"]
    assert set(panel.measured[0].comparison.means) == {"a", "b"}


def test_seeds_of_one_setting_that_did_unlike_amounts_of_work_are_noted():
    """Twice the steps from seed to seed: another job held the machine for some, so equal time was not equal work."""
    busy = grid()
    busy[0].summary["train_seconds"]["protocol"]["step"] = 500
    assert left_out(analyse("", busy, ["score_error"])) == [
        "a: 500 to 1150 steps from seed to seed: was the machine equally free for all?"
    ]


def test_seeds_that_not_all_settings_have_are_dropped_with_a_note():
    panel = analyse("", grid({**NUMBERS, "b": NUMBERS["b"][:3]}), ["score_error"])
    assert panel.measured[0].comparison == compare({name: row[:3] for name, row in NUMBERS.items()}, log=True)
    assert left_out(panel) == ["score_error: compared over 0, 1, 2: not all settings have seed 3"]


def test_numbers_of_unlike_protocol_are_in_no_table():
    panel = analyse("", [*grid(), *[cell({"loss": "z"}, s, 1.0 + s, n=7) for s in range(4)]], ["score_error"])
    assert tables(panel) == []
    assert left_out(panel) == ["score_error is not compared, the protocols differ: n None against 7"]


def test_seeds_may_differ_but_data_may_not_neither_between_settings_nor_between_seeds():
    """A table that changed between two runs of a study has another fingerprint."""

    def with_data(of):
        return [
            Cell(
                c.setting,
                c.seed,
                {"score_error": entry(c.number("score_error"), seed=c.seed, data=of(c))},
                c.status,
                c.path,
            )
            for c in grid()
        ]

    assert left_out(analyse("", with_data(lambda c: "the same"), ["score_error"])) == []
    (note,) = left_out(analyse("", with_data(lambda c: f"drawn by {c.seed}"), ["score_error"]))
    assert "data drawn by 0 against drawn by 1" in note
    (note,) = left_out(analyse("", with_data(lambda c: c.setting["loss"]), ["score_error"]))
    assert "data a against b" in note


@pytest.mark.parametrize(
    ("seeds", "over"),
    [
        ({"a": range(5), "b": range(1, 6), "c": [0]}, [1, 2, 3, 4]),
        ({"a": [0, 1, 2], "b": [1, 2, 3], "c": [5]}, [1, 2]),
        ({"a": [0, 1], "b": [1, 2]}, [1]),
        ({"a": [0, 1, 2], "b": [0, 1], "c": [0, 1, 2]}, [0, 1]),
    ],
)
def test_a_setting_with_few_seeds_takes_none_away_from_the_others(seeds, over):
    cells = [cell({"loss": name}, seed, 1.0 + 0.1 * seed) for name, those in seeds.items() for seed in those]
    (found,) = analyse("", cells, ["score_error"]).measured
    assert found.seeds == over
    assert {row.label for row in found.rows if row.against} == {
        n for n, those in seeds.items() if set(over) <= set(those)
    }


def test_a_seed_that_stands_twice_is_refused():
    with pytest.raises(ScoreSDEError, match="a seed stands twice"):
        analyse("", [*grid(), cell({"loss": "a"}, 0, 1.0)], ["score_error"])


def test_what_may_be_negative_is_compared_by_difference():
    losses = analyse("", grid(metric="nll", unit="nats"), ["nll"]).measured[0]
    below = analyse("", grid({k: [v - 1.0 for v in row] for k, row in NUMBERS.items()}), ["score_error"]).measured[0]
    assert not losses.comparison.log
    assert not below.comparison.log
    assert losses.comparison.against("c", "a").value == pytest.approx(np.mean(NUMBERS["c"]) - np.mean(NUMBERS["a"]))


def test_the_answer_names_the_best_its_ties_and_how_far_the_others_are():
    (answer,) = answers(analyse("d = 16", grid(), ["score_error"]))
    best, ratio = mean(NUMBERS["a"]), compare(NUMBERS, log=True).against("c", "a")
    assert answer == (
        f"d = 16: a has the least score_error, {shown(best.value, best.se)} ({shown(best.low, best.se)} to "
        f"{shown(best.high, best.se)}); not told apart from it: b; "
        f"c is {ratio.value:.2f} times worse ({ratio.low:.2f} to {ratio.high:.2f})"
    )


def test_where_more_is_better_the_greatest_is_the_best_and_worse_is_still_above_one():
    (answer,) = answers(analyse("", grid(better="higher"), ["score_error"]))
    ratio = compare(NUMBERS, log=True).against("c", "a")
    assert answer.startswith("c has the greatest score_error")
    assert f"a is {ratio.value:.2f} times worse" in answer


def test_a_difference_is_told_in_its_unit():
    (answer,) = answers(analyse("", grid(metric="nll", unit="nats"), ["nll"]))
    assert re.search(r"c is 1\.1\d nats worse \(0\.\d+ to 1\.\d+\)", answer)


def test_where_nothing_is_told_apart_no_winner_is_named():
    tied = {name: NUMBERS[name] for name in "ab"}
    (answer,) = answers(analyse("", grid(tied), ["score_error"]))
    assert answer.startswith("with 4 seeds no setting is told apart from another in score_error: from a, ")
    assert "least" not in answer
    assert answers(analyse("", grid({k: v[:1] for k, v in NUMBERS.items()}), ["score_error"])) == [
        "score_error: with one seed nothing can be told apart"
    ]
    assert "over 4 seeds" in answers(analyse("", grid({"a": NUMBERS["a"]}), ["score_error"]))[0]


def test_the_least_geometric_mean_is_called_so_where_the_least_mean_is_another():
    """a has the least geometric mean (one seed is far better), b the least mean; c is far from both."""
    numbers = {"a": [1.0, 1.0, 1.0, 0.6], "b": [0.93, 0.93, 0.93, 0.79], "c": [9.0, 9.1, 9.2, 7.0]}
    assert np.mean(numbers["b"]) < np.mean(numbers["a"])
    (answer,) = answers(analyse("", grid(numbers), ["score_error"]))
    assert answer.startswith("a has the least geometric mean of score_error; its mean is 0.90")


def test_many_that_are_worse_are_counted_not_listed():
    numbers = {"best": NUMBERS["a"], **{f"s{i}": [v * (2 + i) for v in NUMBERS["b"]] for i in range(6)}}
    (answer,) = answers(analyse("", grid(numbers), ["score_error"]))
    assert answer.count("worse") == 3
    assert "4 more, the last s5, 7.1" in answer


def test_an_end_that_touches_no_difference_is_not_rounded_onto_it():
    """A ratio whose interval begins at 1.002 is told apart: two decimals would print 1.00."""
    assert gap(Difference("b", "a", 1.07, 1.002, 1.142, True)) == "1.070 (1.002 to 1.142)"
    assert gap(Difference("b", "a", 1.31, 1.12, 1.52, True), " times") == "1.31 times (1.12 to 1.52)"


@pytest.mark.parametrize(
    ("value", "se", "text"),
    [(0.0216432, 0.00058, "0.02164"), (12.3456, 0.031, "12.346"), (1234.5, 20.0, "1234"), (3e-7, 1e-8, "3e-07"), (2.5, 0.0, "2.5")],
)  # fmt: skip
def test_a_number_is_shown_to_two_digits_of_its_error(value, se, text):
    assert shown(value, se) == text


def test_a_label_is_as_short_as_it_is_told_apart_by():
    vr = [{"data.d": 16, "loss": "ssm_vr", "n_proj": n} for n in (1, 4)]
    assert labels(vr) == ["n_proj=1", "n_proj=4"]
    assert labels([*vr, {"data.d": 16, "loss": "ism", "n_proj": None}]) == ["ssm_vr n_proj=1", "ssm_vr n_proj=4", "ism"]
    assert labels([{"a": "x", "b": "y"}, {"a": "y", "b": "x"}, {"a": None, "b": "x"}, {"a": "x", "b": None}]) == [
        "a=x b=y", "a=y b=x", "b=x", "a=x",
    ]  # fmt: skip
    assert len(set(labels([{"f.x": 1}, {"g.x": 1}, {"g.x": "1"}]))) == 3


def test_panels_split_by_what_is_not_compared():
    cells = [
        cell({"data.d": d, "budget": b, "loss": name}, 0, 1.0)
        for d in (2, 16)
        for b in ("steps", "seconds")
        for name in "ab"
    ]
    found = panels(cells, ["data.d", "budget"])
    assert list(found)[:2] == ["d = 2, budget = steps", "d = 2, budget = seconds"]
    assert all([c.setting for c in group] == [{"loss": "a"}, {"loss": "b"}] for group in found.values())


def test_the_summary_of_a_real_run_fills_every_table(trained):
    """What `train` writes, as two settings and two seeds: values moved a little, the seed in the protocol as evaluate() puts it."""
    summary = json.loads((trained / "summary.json").read_text())
    metrics = ["score_error", "sliced_wasserstein", "energy_distance", "loss", "loss_gain"]

    def moved(seed, factor):
        return {
            name: {
                **e,
                "value": e["value"] * factor,
                "protocol": e["protocol"] | ({"seed": seed} if "seed" in e["protocol"] else {}),
            }
            for name, e in summary.items()
        }

    cells = [
        Cell({"loss": loss}, seed, moved(seed, f * (1 + 0.1 * seed)), "finished", "r")
        for loss, f in (("ssm", 1.0), ("ism", 0.9))
        for seed in (0, 1)
    ]
    panel = analyse("", cells, metrics)
    assert [found.metric for found in panel.measured] == metrics
    assert panel.notes == []
    assert {row[8] for table in tables(panel) for row in table.rows} == {"60"}
    assert "95 percent of fresh data" in tables(panel)[1].note


@pytest.fixture
def report(tmp_path):
    """A report of hostile words, with a real figure and a run that failed."""
    runs = [
        *grid(),
        *[cell({"loss": HOSTILE}, s, 1.5 + s / 10, status="failed" if s == 1 else "finished") for s in range(4)],
    ]
    panel = analyse(HOSTILE, runs, ["score_error"])
    (tmp_path / "study").mkdir()
    path = charts.dots(panel, tmp_path / "study" / "figures" / "a b.png")
    return Report(
        f"title {HOSTILE}", f"question {HOSTILE}", [*answers(panel), HOSTILE], tables(panel), [Figure(path, HOSTILE)],
        {HOSTILE: HOSTILE}, f"scoresde study '{HOSTILE}'", {"torch": "2.13"}, 3725.0, left_out(panel),
    )  # fmt: skip


class Page(HTMLParser):
    """Tags with attributes, and the text of each table cell."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.cells, self.words, self.inside = [], [], "", False
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("td", "th"):
            self.cells.append("")
            self.inside = True

    def handle_data(self, data):
        self.words += data
        if self.inside:
            self.cells[-1] += data

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")


def markdown_cells(source):
    """The cells of all tables as a reader sees them: split at bars that are not escaped, escapes undone."""
    lines = [line for line in source.splitlines() if line.startswith("|") and not set(line) <= set("|-: ")]
    cells = [part.strip() for line in lines for part in re.split(r"(?<!\\)\|", line)[1:-1]]
    return [html.unescape(re.sub(r"\\(.)", r"\1", part)) for part in cells]


def test_the_page_needs_nothing_beside_itself(report, tmp_path):
    source = write(report, tmp_path / "study")[0].read_text()
    page = Page(source)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base", "form"}
    addresses = [v for _, found in page.tags for k, v in found.items() if k in ("src", "href", "srcset", "action")]
    assert [address.split(",")[0] for address in addresses] == ["data:image/png;base64"]
    assert base64.b64decode(addresses[0].split(",")[1]) == report.figures[0].path.read_bytes()
    assert not [k for _, found in page.tags for k in found if k.startswith("on")]
    assert re.search(r"https?:|file:|url\(|@import", source) is None


def test_hostile_words_are_words_in_both_formats(report, tmp_path):
    page, plain = (path.read_text() for path in write(report, tmp_path / "study"))
    assert "<script" not in page
    assert "<script" not in plain.split("To make this report again")[0]
    words = Page(page).words
    assert words.count(HOSTILE) >= 8  # title twice, question, answer, caption, row, protocol twice, command
    assert r"\*b\*" in plain
    assert r"\`a\`" in plain
    bars = [len(re.findall(r"(?<!\\)\|", line)) for line in plain.splitlines() if line.startswith("|")]
    assert sorted(set(bars)) == [3, 11]  # two columns of the protocol, ten of the table
    assert f"\n    {report.command}\n" in plain


def test_both_formats_hold_the_same_numbers(report, tmp_path):
    page, plain = (path.read_text() for path in write(report, tmp_path / "study"))
    expected = [cell for table in report.tables for row in (table.columns, *table.rows) for cell in row]
    assert Page(page).cells[: len(expected)] == expected
    assert markdown_cells(plain)[: len(expected)] == expected
    assert "1 h 2 min" in page
    assert "1 h 2 min" in plain


def test_the_failed_run_and_the_answers_are_in_every_form(report, tmp_path):
    page, plain = (path.read_text() for path in write(report, tmp_path / "study"))
    failed = "3 of 4 finished (1 failed: runs/1)"
    for form in (Page(page).words, plain, "\n".join(text(report))):
        assert failed in form
        assert "a has the least score_error" in form
    assert text(report)[0] == report.question


def test_figures_stand_by_a_relative_path_in_markdown(report, tmp_path):
    _, path = write(report, tmp_path / "study")
    assert path.read_text().count("](figures/a%20b.png)") == 1
    _, elsewhere = write(report, tmp_path / "other")
    assert "](../study/figures/a%20b.png)" in elsewhere.read_text()


def test_a_report_that_cannot_be_written_leaves_the_old_one(report, tmp_path):
    before = [path.read_bytes() for path in write(report, tmp_path / "study")]
    report.figures[0].path.unlink()
    with pytest.raises(FileNotFoundError):
        write(report, tmp_path / "study")
    assert [(tmp_path / "study" / name).read_bytes() for name in ("report.html", "report.md")] == before
    assert [path for path in (tmp_path / "study").iterdir() if path.suffix == ".tmp"] == []


def test_numbers_are_aligned_to_the_right_and_names_are_not():
    table = Table(
        "t", ["setting", "mean", "verdict", "gap"], [["4", "-0.1", "best", ""], ["8", "0.2 to 0.3", "2 of 5", ".5"]]
    )
    assert table.numeric == [False, True, False, True]


def test_markdown_keeps_names_with_underscores_readable():
    assert markdown("score_error of _x_\n# y") == r"score_error of \_x\_ # y"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that the charts would have saved."""
    found = []
    monkeypatch.setattr(charts, "finish", lambda figure, path: found.append(figure) or path)
    yield found
    for figure in found:
        charts.plt.close(figure)


def twelve():
    """ssm and ssm_vr at five n_proj, ism and dsm, over five seeds and two budgets; one setting lost a run."""
    rng = np.random.default_rng(0)
    settings = [{"loss": loss, "n_proj": n} for loss in ("ssm", "ssm_vr") for n in (1, 2, 4, 8, 16)]
    settings += [{"loss": "ism", "n_proj": None}, {"loss": "dsm", "n_proj": None}]
    cells = [
        cell(
            {"budget": b, **s}, seed, 0.1 * np.exp(rng.normal()), status="failed" if (i, seed) == (3, 1) else "finished"
        )
        for b in ("steps", "seconds")
        for i, s in enumerate(settings)
        for seed in range(5)
    ]
    return [analyse(title, group, ["score_error"]) for title, group in panels(cells, ["budget"]).items()]


def test_lines_by_number_are_the_means_and_settings_without_it_are_bands(drawn, tmp_path):
    found = twelve()
    charts.by_number(found, "n_proj", tmp_path / "x.png")
    by_label = {row.label: row for row in found[1].measured[0].rows}
    axes = drawn[0].axes[1]
    long = [line.get_ydata() for line in axes.lines if len(line.get_xdata()) == 5]
    assert long[1].tolist() == [by_label[f"ssm_vr n_proj={n}"].estimate.value for n in (1, 2, 4, 8, 16)]
    flat = {line.get_ydata()[0] for line in axes.lines if len(line.get_xdata()) == 2}
    assert flat == {by_label[name].estimate.value for name in ("ism", "dsm")}
    hollow = [line.get_xdata()[0] for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert hollow == [8]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "2", "4", "8", "16"]


def test_dots_are_sorted_and_show_every_seed(drawn, tmp_path):
    panel = twelve()[0]
    charts.dots(panel, tmp_path / "x.png")
    axes = drawn[0].axes[0]
    means = {row.label: row.estimate.value for row in panel.measured[0].rows}
    assert [t.get_text() for t in axes.get_yticklabels()] == sorted(means, key=means.get)
    assert sum(len(line.get_xdata()) for line in axes.lines if line.get_markersize() == 3) == 12 * 5 - 1


@pytest.mark.parametrize(("counts", "names"), [((1, 4), ["comparison-0.png"]), ((1, 4, 16), ["n_proj.png"])])
def test_two_numbers_of_directions_are_dots_and_three_a_curve(tmp_path, counts, names):
    cells = [cell({"projection": law, "n_proj": n}, seed, seed + n) for law in "ab" for n in counts for seed in (1, 2)]
    assert [figure.path.name for figure in compare_cells(cells, ["score_error"], (), tmp_path).figures] == names


@pytest.mark.parametrize("kind", ["by_number", "dots", "curves"])
def test_no_words_overlap_in_a_figure_of_twelve_settings(drawn, tmp_path, kind):
    path = tmp_path / "x.png"
    if kind == "by_number":
        charts.by_number(twelve(), "n_proj", path)
    elif kind == "dots":
        charts.dots(twelve()[0], path, "a title")
    else:
        x = [1, 2, 4, 8]
        lines = [charts.Curve(f"law {i}", x, [i / n for n in x], theory=[i / n for n in x]) for i in range(1, 13)]
        charts.curves({"d = 4": lines, "d = 64": lines}, path, "n_proj", "variance", "a title")
    (figure,) = drawn
    figure.canvas.draw()
    axis_of = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    beyond = {  # ticks outside of the axes, never drawn
        tick.label1
        for axis in axis_of
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    words = [t for t in figure.findobj(charts.plt.Text) if t.get_text() and t.get_visible() and t not in beyond]
    boxes = [(t.get_text(), t.get_window_extent().shrunk(0.98, 0.9)) for t in words]
    assert len(boxes) > 12
    assert [(a, b) for (a, p), (b, q) in itertools.combinations(boxes, 2) if p.overlaps(q)] == []
    frame = figure.bbox.padded(1)
    assert [name for name, box in boxes if not (frame.contains(*box.p0) and frame.contains(*box.p1))] == []


def test_each_of_many_lines_looks_like_no_other():
    assert len(set(charts.looks([str(i) for i in range(49)]).values())) == 49
