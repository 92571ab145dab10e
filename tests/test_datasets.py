"""Contract of every data set, exactness of the oracles, and the user's own tables."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from scoresde_cli import configs
from scoresde_cli.advice import lonely
from scoresde_cli.compose import build
from scoresde_cli.datasets.digits import Digits
from scoresde_cli.datasets.heavy import AlphaStable, LaplaceMixture, StudentT
from scoresde_cli.datasets.oracle import Oracle
from scoresde_cli.datasets.table import Table
from scoresde_cli.errors import ScoreSDEError, Unreadable
from scoresde_cli.rng import generator, normal
from scoresde_cli.sdes.vp import VP
from tests.laws import MIXTURES, SDES, name
from tests.pictures import write_hf, write_idx, write_pictures

FILES = {  # for the data sets that are a user's own: (folder) -> path
    "table": lambda folder: str(frame().to_csv(folder / "t.csv", index=False) or folder / "t.csv"),
    "idx": lambda folder: str(write_idx(folder)),
    "image_folder": lambda folder: str(write_pictures(folder)),
    "hf": lambda folder: str(write_hf(folder)),
}


def make(option, **changes):
    node = {**configs.load(configs.conf_dir() / "data" / f"{option}.yaml"), **changes}
    if node.get("n") is not None:
        node["n"] = changes.get("n", 4000)
    return build(node, "data")


@pytest.mark.parametrize("option", configs.options("data"))
def test_every_data_set_keeps_the_contract(option, tmp_path):
    files = {"path": FILES[option](tmp_path)} if option in FILES else {}
    data = make(option, **files)
    for split in ("train", "valid", "test"):
        x = data.splits[split]
        assert x.dtype == torch.float32
        assert tuple(x.shape[1:]) == tuple(data.shape)
        assert x.isfinite().all()
    x = data.splits["test"][:50]
    assert torch.allclose(data.units.to_model(data.units.to_user(x, rounded=False)).float(), x, atol=1e-5)
    again = make(option, **files)
    assert all(torch.equal(again.splits[s], data.splits[s]) for s in data.splits)
    heavy = "tail_index" in data.facts  # no fourth moment, or no variance: quartiles take the place of moments
    if data.kind == "points" and not heavy:
        variance = float(data.splits["train"].var(0).mean())
        assert 0.5 < variance < 2.0  # so that VP's times mean the same everywhere
    fresh = data.fresh(4000, generator(9, "fresh"))
    if fresh is not None and heavy:
        a, b = (x.abs().median() for x in (fresh, data.splits["train"]))
        assert abs(float(a / b) - 1) < 0.1  # a median of 4000: a standard error of 2 percent
    elif fresh is not None:
        # Mean and standard deviation of new draws against the training split's: 5 standard errors.
        a, b = fresh.flatten(1).double(), data.splits["train"].flatten(1).double()
        assert ((a.mean(0) - b.mean(0)) / (a.std(0) * math.sqrt(2 / 4000))).abs().max() < 5
        assert (a.std(0) / b.std(0) - 1).abs().max() < 0.1


@pytest.mark.parametrize("option", ["eight_gaussians", "gmm", "gaussian"])
def test_sampled_mixtures_have_an_oracle_and_unit_scale(option):
    data = make(option, **({} if option == "eight_gaussians" else {"d": 5}))
    assert data.oracle(VP()) is not None
    assert abs(float(data.splits["train"].var(0).mean()) - (0.99 if option == "eight_gaussians" else 1.0)) < 0.1


@pytest.mark.parametrize("sde", SDES, ids=name)
@pytest.mark.parametrize("law", MIXTURES.values(), ids=MIXTURES)
def test_oracle_score_is_the_gradient_of_its_log_density(law, sde):
    oracle = Oracle(law(), sde)
    x = 2 * normal((30, 2), generator(0, "x"), torch.float64).requires_grad_()
    t = torch.linspace(1e-3, sde.T, 30, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(oracle.log_prob(x, t).sum(), x)
    assert torch.allclose(oracle.score(x, t), gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("law", MIXTURES.values(), ids=MIXTURES)
def test_oracle_density_integrates_to_one(law):
    oracle = Oracle(law(), VP())
    u = torch.linspace(-7, 7, 700, dtype=torch.float64)
    grid = torch.cartesian_prod(u, u)
    for t in (0.01, 0.3, 1.0):
        mass = oracle.log_prob(grid, torch.full((len(grid),), t)).exp().sum() * (u[1] - u[0]) ** 2
        assert float(mass) == pytest.approx(1, abs=1e-6)  # a smooth density: the rectangle rule is spectrally accurate


def test_heavy_tailed_laws_are_scipys_in_each_coordinate():
    """Kolmogorov-Smirnov on 3000 draws of a coordinate: p above 1e-3; the laws are isotropic, so a turned one passes too."""
    turned = torch.tensor([0.6, 0.8])
    for data, law in (
        (StudentT(n=3000), stats.t(3.0, scale=0.5)), (AlphaStable(n=3000), stats.levy_stable(1.7, 0.0, scale=0.5)),
    ):  # fmt: skip
        rows = data.splits["train"][:3000]
        grid = np.linspace(-6, 6, 400)  # scipy's stable distribution function is slow: interpolated, to 1e-4
        below = law.cdf(grid)
        for x in (rows[:, 0], rows @ turned):
            assert stats.kstest(x.numpy(), lambda y, g=grid, c=below: np.interp(y, g, c)).pvalue > 1e-3
    x = LaplaceMixture(n=20_000, modes=1, radius=1.0).splits["train"] - torch.tensor([1.0, 0.0])
    assert float(x.var(0).mean()) == pytest.approx(0.15**2, rel=0.05)  # 4 standard errors
    # Isotropic Laplace: E x_1^4 = 3 E w^2 s^4 = 6 s^4.
    assert float((x[:, 0] ** 4).mean()) == pytest.approx(6 * 0.15**4, rel=0.2)


def test_mixture_samples_have_the_mixtures_moments():
    law = MIXTURES["three_modes"]()
    x = law.sample(100_000, generator(0, "s"))
    mean = law.weights @ law.means
    covariances = torch.einsum("kij,kj,klj->kil", law.bases, law.lam, law.bases)
    second = torch.einsum("k,kij->ij", law.weights, covariances + law.means[:, :, None] * law.means[:, None, :])
    assert ((x.mean(0) - mean) / (x.std(0) / math.sqrt(len(x)))).abs().max() < 4
    assert torch.allclose(torch.cov(x.T), second - mean[:, None] * mean[None], atol=0.02)


def frame(n=60):
    rng = np.random.default_rng(0)
    return pd.DataFrame({"a b": rng.normal(5, 2, n), "c": rng.integers(0, 9, n), "d": rng.exponential(1, n).round(2)})


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".npy", ".npz", "; .csv"])
def test_tables_are_read_from_every_format(tmp_path, suffix):
    df, path = frame(), tmp_path / f"my, [odd] näme{suffix[-4:] if ';' in suffix else suffix}"
    match suffix:
        case ".csv":
            df.to_csv(path, index=False)
        case ".tsv":
            df.to_csv(path, index=False, sep="\t")
        case "; .csv":
            df.to_csv(path, index=False, sep=";")
        case ".parquet":
            df.to_parquet(path)
        case ".npy":
            np.save(path, df.to_numpy())
        case ".npz":
            np.savez(path, rows=df.to_numpy())
    data = Table(str(path))
    assert data.columns == (["x0", "x1", "x2"] if suffix.startswith(".np") else ["a b", "c", "d"])
    back = torch.cat([data.units.to_user(data.splits[s]) for s in ("train", "valid", "test")]).numpy()
    assert np.allclose(np.sort(back, 0), np.sort(df.to_numpy(float), 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaling", ["standardise", "whiten", "none"])
def test_scaling_and_its_jacobian(tmp_path, scaling):
    frame().to_csv(tmp_path / "t.csv", index=False)
    data = Table(str(tmp_path / "t.csv"), scaling=scaling)
    x = data.splits["train"].double()
    if scaling != "none":
        assert torch.allclose(x.mean(0), torch.zeros(3).double(), atol=1e-5)
        assert torch.allclose(x.var(0, correction=0), torch.ones(3).double(), atol=1e-4)
    if scaling == "whiten":
        assert torch.allclose(torch.cov(x.T, correction=0), torch.eye(3).double(), atol=1e-4)
    J = torch.autograd.functional.jacobian(
        lambda u: data.units.to_model(u[None])[0], torch.zeros(3, dtype=torch.float64)
    )
    assert data.units.log_det() == pytest.approx(float(torch.linalg.slogdet(J)[1]), abs=1e-9)


def test_columns_are_chosen_by_name_in_the_given_order(tmp_path):
    frame().to_csv(tmp_path / "t.csv", index=False)
    data = Table(str(tmp_path / "t.csv"), columns=["d", "a b"])
    assert data.columns == ["d", "a b"]
    assert data.shape == (2,)


def test_dequantised_columns_come_back_on_their_grid(tmp_path):
    frame().to_csv(tmp_path / "t.csv", index=False)
    data = Table(str(tmp_path / "t.csv"), columns=["c", "d"], dequantise=True)
    assert torch.allclose(data.units.resolution, torch.tensor([1.0, 0.01], dtype=torch.float64))
    back = torch.cat([data.units.to_user(data.splits[s]) for s in data.splits]).numpy()
    assert np.allclose(np.sort(back[:, 0]), np.sort(frame()["c"]))
    assert np.allclose(np.sort(back[:, 1]), np.sort(frame()["d"]), atol=1e-9)


def test_missing_values_are_refused_or_dropped(tmp_path):
    df = frame()
    df.loc[[3, 7], "d"] = np.nan
    df.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(Unreadable, match=r"2 row.*row 4.*'d'.*data.missing=drop"):
        Table(str(tmp_path / "t.csv"))
    data = Table(str(tmp_path / "t.csv"), missing="drop")
    assert data.facts["rows"] == 58
    assert data.facts["rows_dropped"] == 2


def test_arrays_of_any_shape_are_data(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(40, 3, 2)))
    data = Table(str(tmp_path / "x.npy"))
    assert data.shape == (3, 2)
    assert data.columns is None


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        ("", Unreadable, "empty"),
        ("a,b\n", Unreadable, "no rows"),
        ("a,b\n1,2\n", Unreadable, "1 row"),
        ("a;b\n" + "1;2,5\n" * 30, Unreadable, r"'b' does not hold numbers.*'2,5'.*decimal comma, expected a point"),
        ("a,b\n" + "1,x\n" * 30, Unreadable, r"'b' does not hold numbers.*'x'.*data.columns=\[a\]"),
        ("a,a\n" + "1,2\n" * 30, Unreadable, "more than once"),
        ("a,b\n" + "1,2\n" * 30, Unreadable, "constant"),
        ("1,2\n" + "1,3\n" * 30, Unreadable, "first line holds numbers"),
        ("a,b\n" + "1,inf\n" * 30, Unreadable, "infinite"),
    ],
)
def test_files_that_cannot_serve_are_refused(tmp_path, content, error, says):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(error, match=says):
        Table(str(tmp_path / "t.csv"))


def test_objects_in_arrays_are_not_unpickled(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{"a": 1}] * 30, dtype=object), allow_pickle=True)
    with pytest.raises(Unreadable, match="not an array of numbers"):
        Table(str(tmp_path / "x.npy"))


def test_an_absent_file_names_the_nearest(tmp_path):
    frame().to_csv(tmp_path / "wine.csv", index=False)
    with pytest.raises(ScoreSDEError, match=r"does not exist; did you mean 'wine\.csv'"):
        Table(str(tmp_path / "wien.csv"))


def test_red_wine_is_read_with_its_columns(wine):
    data = Table(str(wine))
    assert data.columns is not None
    assert data.columns[0] == "fixed acidity"
    assert data.facts["rows"] == 1599
    assert sum(len(x) for x in data.splits.values()) == 1599


def test_equal_rows_never_stand_in_two_splits(wine):
    data = Table(str(wine))
    rows = {name: {tuple(r) for r in x.tolist()} for name, x in data.splits.items()}
    assert not rows["train"] & rows["test"]
    assert not rows["train"] & rows["valid"]
    assert not rows["valid"] & rows["test"]
    assert data.facts["rows_repeated"] == 240
    assert abs(len(data.splits["test"]) / 1599 - 0.2) < 0.01


def test_digits_are_the_real_ones_in_grey_levels():
    data = Digits()
    u = data.units.to_user(data.splits["train"])
    assert data.shape == (1, 8, 8)
    assert u.min() == 0
    assert u.max() == 16
    assert torch.equal(u, u.round())
    noisy = Digits(dequantise=True)
    assert torch.equal(noisy.units.to_user(noisy.splits["train"]), u)


def test_dequantised_columns_come_back_as_the_file_has_them(tmp_path):
    """Grids off zero and of decimal steps: every training row is, to the last digit, a row of the file."""
    k = np.random.default_rng(0).integers(0, 30, size=(200, 3))
    text = [f"{273.15 + a:.2f},{3.3 + 0.1 * b:.1f},{0.99 + 0.00001 * c:.5f}" for a, b, c in k]
    (tmp_path / "t.csv").write_text("a,b,c\n" + "\n".join(text) + "\n")
    data = Table(str(tmp_path / "t.csv"), dequantise=True)
    written = {tuple(map(float, line.split(","))) for line in text}
    for x in data.splits.values():
        assert {tuple(row) for row in data.units.to_user(x).tolist()} <= written


def test_a_table_whose_rows_are_nearly_all_equal_is_refused(tmp_path):
    (tmp_path / "t.csv").write_text("a\n" + "\n".join(str(i % 2) for i in range(200)) + "\n")
    with pytest.raises(Unreadable, match="fewer than two"):
        Table(str(tmp_path / "t.csv"))


def test_a_value_that_float32_cannot_hold_beside_the_others_is_refused_in_whatever_split_it_falls(tmp_path):
    rows = np.random.default_rng(0).normal(size=(200, 2))
    for value in (1e30, -1e12):
        for place in range(8):
            u = rows.copy()
            u[place, 1] = value
            np.save(tmp_path / "x.npy", u)
            with pytest.raises(Unreadable, match=r"'x1' holds .*1e"):
                Table(str(tmp_path / "x.npy"))
    np.save(tmp_path / "x.npy", rows + np.array([0.0, 1.7e9]))  # seconds since 1970
    assert Table(str(tmp_path / "x.npy")).splits["train"].std() > 0.9
    with pytest.raises(Unreadable, match=r"too far from zero .* data.scaling=standardise"):
        Table(str(tmp_path / "x.npy"), scaling="none")


def test_small_units_are_not_taken_for_a_constant(tmp_path):
    u = np.random.default_rng(0).normal(size=(200, 2))
    found = []
    for unit in (1.0, 1.6e-19):
        np.save(tmp_path / "x.npy", u * [1.0, unit])
        found.append(Table(str(tmp_path / "x.npy")).everything())
    assert torch.allclose(*(x.sort(0).values for x in found), atol=1e-6)  # float32


def test_one_row_far_from_all_others_is_pointed_out(tmp_path):
    rows, said = np.random.default_rng(0).normal(size=(2000, 2)), []
    for place in range(8):
        u = rows.copy()
        u[place, 1] = 1e6
        pd.DataFrame(u, columns=["near", "far"]).to_csv(tmp_path / "x.csv", index=False)
        table = Table(str(tmp_path / "x.csv"))
        said.append(lonely(SimpleNamespace(data=table)))
        assert (said[-1] is not None) == (
            table.splits["train"].abs().max() > 30
        )  # whether it is among the training rows
    assert any(line and line.startswith("one row holds 100 percent of the variance of far") for line in said)
    for law in (
        Table(str(frame(200).to_csv(tmp_path / "y.csv", index=False) or tmp_path / "y.csv")),
        StudentT(n=4000, d=2),
    ):
        assert lonely(SimpleNamespace(data=law)) is None


def test_a_coordinate_that_does_not_vary_hides_no_lonely_row(tmp_path):
    u = np.random.default_rng(0).normal(size=(300, 2, 3))
    u[:, 0, 0], u[:, 1, 2] = 1.0, np.where(u[:, 1, 2] == u[:, 1, 2].max(), 1e6, u[:, 1, 2])
    said = set()
    for turn in range(8):  # the row is among the training rows in most of them
        np.save(tmp_path / "x.npy", np.roll(u, 37 * turn, axis=0))
        said.add(lonely(SimpleNamespace(data=Table(str(tmp_path / "x.npy")))))
    assert any(line and "variance of coordinate 5" in line for line in said)
