"""What does correlation in the diffusion matrix do to the dynamics? Closed forms on Gaussian data, and trained models."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field, PositiveInt

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.studies import analysis
from scoresde_cli.studies import mode_dynamics as modes
from scoresde_cli.studies.base import Findings, GridStudy, Job, Setting
from scoresde_cli.studies.charts import Curve, curves
from scoresde_cli.studies.report import Figure, Table

Rho = Annotated[float, Field(gt=0, lt=1)]
KINDS = ("equi", "ar1")
Laws = dict[str, Callable[[np.ndarray], np.ndarray]]
MISMATCHED: Laws = {
    "data Sigma, noise I": lambda lam: lam,
    "data I, noise Sigma": lambda lam: 1.0 / lam,
}


def number(value: float | None) -> str:
    return "never" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def spectrum(rhos: Sequence[float], dims: Sequence[int]) -> Table:
    rows = []
    for kind in KINDS:
        for rho in rhos:
            found = [modes.eigenvalues(kind, rho, d) for d in dims]
            cells = [f"{number(modes.condition(lam))} / {modes.effective_dimension(lam):.2f}" for lam in found]
            rows.append([f"{kind} {rho:g}", *cells])
    note = "Of equi the condition number grows like d and the effective dimension stays below 1/rho^2; of ar1 it is the other way."
    return Table(
        "Spectrum of Sigma: condition number / effective dimension", ["", *(f"d = {d}" for d in dims)], rows, note
    )


def forgetting(rhos: Sequence[float], dims: Sequence[int]) -> Table:
    rows = []
    for kind, rho in [("none", 0.0), *((kind, rho) for kind in KINDS for rho in rhos)]:
        cells = []
        for d in dims:
            lam, one = modes.eigenvalues(kind, rho, d), np.ones(d)
            times = (
                modes.time_to_forget(0.25 / lam, one), modes.time_to_forget(0.25 * one, one), modes.time_to_forget(0.25 * one, lam),
            )  # fmt: skip
            cells.append(" / ".join(number(t) for t in times))
        rows.append([kind if kind == "none" else f"{kind} {rho:g}", *cells])
    note = (
        "Isotropic drift on data 0.25 I / isotropic drift on data 0.25 Sigma / reversible drift -b/2 Sigma x on data 0.25 I. The "
        "isotropic drift pays a logarithm of the condition number, the reversible one 1/lam_min."
    )
    title = "Time to forget: b t until KL(p_t || prior) <= 0.01 nats"
    return Table(title, ["", *(f"d = {d}" for d in dims)], rows, note)


def steps(rhos: Sequence[float], dims: Sequence[int], worst: bool) -> Table:
    laws: Laws = {**MISMATCHED, "data and noise Sigma": np.ones_like}
    rows = []
    for kind in KINDS:
        for rho in rhos:
            for name, kappa in laws.items():
                cells = []
                for d in dims:
                    k = kappa(modes.eigenvalues(kind, rho, d))
                    if worst:
                        cells.append(number(modes.steps_to(k, False, "worst", 0.05)))
                    else:
                        cells.append(" / ".join(number(modes.steps_to(k, way, "mean", 1e-3)) for way in (False, True)))
                rows.append([f"{kind} {rho:g}: {name}", *cells])
    what = (
        "the worst eigenmode's variance is within 5 percent (flow)" if worst else "KL / d <= 0.001 (flow / reverse SDE)"
    )
    note = (
        "Exact score, Euler's method, b = 8, T = 1, times from 1 to 0.001 even in t^(1/3); numbers of steps on a ladder of 1.15. "
        "never: the prior, which knows nothing of the data, is already off by more in that mode. Data of smaller variance, 0.25, "
        "takes 53 steps whatever Sigma is, where it matches."
    )
    return Table(f"Steps until {what}", ["", *(f"d = {d}" for d in dims)], rows, note)


def forgotten_matrix(rhos: Sequence[float], dims: Sequence[int]) -> Table:
    rows = []
    for kind in KINDS:
        for rho in rhos:
            cells = []
            for d in dims:
                lam = modes.eigenvalues(kind, rho, d)
                (flow, _), (sde, ratio) = (modes.cost_of_forgetting(lam, way) for way in (False, True))
                cells.append(f"{number(flow)} / {number(sde)} (x{number(ratio)})")
            rows.append([f"{kind} {rho:g}", *cells])
    note = "KL / d in nats with the flow / the reverse SDE (its worst mode's variance over the true one). With Sigma: below 1e-6."
    title = "The reversal takes I for Sigma: exact score, data 0.25 I, 4000 steps"
    return Table(title, ["", *(f"d = {d}" for d in dims)], rows, note)


def span(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def in_words(rhos: Sequence[float], dims: Sequence[int]) -> list[str]:
    """What the tables say, with the numbers at their ends."""
    rho, low, high = max(rhos), min(dims), max(dims)
    ends = {kind: [modes.eigenvalues(kind, rho, d) for d in (low, high)] for kind in KINDS}

    def mean(kappa: np.ndarray) -> float:
        return modes.steps_to(kappa, False, "mean", 1e-3) or math.inf

    def worst(lam: np.ndarray) -> str:
        return number(modes.steps_to(lam, False, "worst", 0.05))

    pairs = [(mean(1.0 / lam), mean(lam)) for found in ends.values() for lam in found]
    ratios = sorted(a / b for a, b in pairs if max(a, b) < math.inf)
    times = (
        span(f"{ratios[0]:.2g}", f"{ratios[-1]:.2g}")
        if ratios
        else "(no number of steps is enough on either side, so unknown)"
    )
    spread = "; ".join(
        f"{kind}, condition number {span(number(modes.condition(a)), number(modes.condition(b)))}, steps of the flow until the "
        f"worst mode is right {span(worst(a), worst(b))}"
        for kind, (a, b) in ends.items()
    )
    lam, least = ends["equi"][1], modes.eigenvalues("equi", min(rhos), low)
    slow, fast = modes.time_to_forget(0.25 * np.ones(high), lam), modes.time_to_forget(0.25 / lam, np.ones(high))
    mild, much = ([number(modes.cost_of_forgetting(x, way)[0]) for way in (True, False)] for x in (least, lam))
    return [
        "With the isotropic drift, correlated noise is isotropic noise in the coordinates z = L^{-1} x, exactly: only the "
        "eigenvalues of Sigma^{-1} K_0 matter, K_0 the data's covariance. Sigma proportional to K_0 is best: every mode loses its "
        "signal at the same rate, and on Gaussian data one Euler step of the flow is exact.",
        f"Correlation of the noise that the data has not takes {times} times the steps of correlation of the data that the noise "
        f"has not (rho = {rho:g}, flow, KL / d <= 0.001).",
        f"Dimension matters through the spread of these eigenvalues. At rho = {rho:g}, d = {span(str(low), str(high))}: {spread}. "
        "Under one common factor the largest grows like d rho, until a mode is not forgotten by T; under local correlation the "
        f"condition number stays below ((1 + rho)/(1 - rho))^2 = {number(((1 + rho) / (1 - rho)) ** 2)}.",
        "Under the reversible drift -b/2 Sigma x correlation changes the dynamics itself: the time to forget goes with 1/lam_min, "
        f"b t = {number(slow)} against {number(fast)} with the isotropic drift (equi, rho = {rho:g}, d = {high}).",
        "A reversal that forgets the matrix (tr Sigma / d in its place) ends elsewhere, equi: KL / d of "
        f"{mild[0]} nats by the reverse SDE and {mild[1]} by the flow at rho = {min(rhos):g}, d = {low}; "
        f"{much[0]} and {much[1]} at rho = {rho:g}, d = {high}.",
    ]


def score_errors(cells: Sequence[analysis.Cell]) -> Table:
    """Of the trained models, by setting: means over seeds."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for cell in cells:
        row = tuple(str(cell.setting.get(key, "")) for key in ("data.d", "budget", "law", "Sigma", "parameterisation"))
        groups.setdefault(row, []).append(cell.summary["score_error"]["value"])
    rows = [[*row, number(float(np.mean(values))), str(len(values))] for row, values in groups.items()]
    note = "Each in units of its own noise, (s - s*)^T C (s - s*), so between different Sigma only the order of magnitude compares."
    return Table(
        "Errors of the trained scores",
        ["d", "budget", "data", "Sigma", "parameterisation", "error", "seeds"],
        rows,
        note,
    )


def figure(rhos: Sequence[float], path: Path) -> Path:
    """Steps of the flow against d, by the worst mode."""
    dims = [2, 4, 8, 16, 32, 64, 128, 256, 512]
    panels = {}
    for kind in KINDS:
        found = []
        for rho in rhos:
            for name, kappa in MISMATCHED.items():
                taken = [modes.steps_to(kappa(modes.eigenvalues(kind, rho, d)), False, "worst", 0.05) for d in dims]
                there = [(d, n) for d, n in zip(dims, taken, strict=True) if n is not None]
                if there:
                    x, y = zip(*there, strict=True)
                    found.append(Curve(f"rho {rho:g}, {name}", list(x), [float(v) for v in y]))
        panels[kind] = found
    return curves(
        panels, path, "d", "steps", "steps of the flow until the worst mode is within 5 percent (gaps: never)"
    )


@dataclass(kw_only=True)
class Correlation(GridStudy):
    """
    Args:
        rhos: correlations of the closed forms. spectrum_dims: their dimensions.
        data: laws of the data of the trained part, as correlation and rho, or none.
        noise: Sigmas of the trained part, as kind and rho, identity, or data.
        parameterisations: of the trained part; eps, unlike residual, knows nothing of the data's covariance.
    """

    rhos: list[Rho] | None = None
    spectrum_dims: list[PositiveInt] | None = None
    data: list[str] | None = None
    noise: list[str] | None = None
    parameterisations: list[str] | None = None

    title = "What does correlation in the diffusion matrix do?"
    question = (
        "dx = -b/2 x dt + sqrt(b) L dW with L L^T = Sigma: when does a Sigma that is not the identity help, when does it hurt, "
        "and how does that depend on the dimension?"
    )
    varies: ClassVar[tuple[str, ...]] = (*GridStudy.varies, "sde", "sde.sigma", "sde.rho", "parameterisation")

    def check(self, overrides: Sequence[str], config: Mapping[str, Any]) -> None:
        for override in overrides:
            if override.startswith("data="):
                raise ScoreSDEError(
                    f"{override}: this study brings its own data, of known correlation (study.data=[none,'ar1 0.95']); on yours "
                    "compare train -m sde=correlated sde.sigma=identity,data"
                )
        super().check(overrides, config)

    def settings(self, d: int, loss: str) -> list[Setting]:
        found: list[Setting] = []
        for law in self.of_size("data"):
            kind, _, rho = law.partition(" ")
            data = {"data": "two_modes", "data.correlation": kind, **({"data.rho": rho} if rho else {})}
            for noise in self.of_size("noise"):
                sigma, _, r = noise.partition(" ")
                sde = {"sde": "correlated", "sde.sigma": sigma, **({"sde.rho": r} if r else {})}
                found += [{**data, **sde, "parameterisation": p} for p in self.of_size("parameterisations")]
        return found

    def shown(self, setting: Setting) -> Setting:
        def named(kind: str, rho: Any) -> str:
            return kind if rho is None else f"{kind} {rho}"

        return {
            "law": named(setting["data.correlation"], setting.get("data.rho")),
            "Sigma": named(setting["sde.sigma"], setting.get("sde.rho")), "parameterisation": setting["parameterisation"],
        }  # fmt: skip

    def findings(self, folder: Path, jobs: Sequence[Job], out: Path, metrics: Sequence[str] | None = None) -> Findings:
        from scoresde_cli.studies.base import METRICS, collect, compare

        alike = [
            name for name in METRICS if name not in ("score_error", "denoising_loss", "loss")
        ]  # the rest is in units of Sigma
        numbers = metrics or ("whitened_sliced_wasserstein", *alike)
        found = compare(collect(folder, jobs), numbers, ("data.d", "budget", "law"), out, self.conclude)
        cells = [c for c in collect(folder, jobs) if "score_error" in c.summary]
        rhos, dims = self.of_size("rhos"), self.of_size("spectrum_dims")
        if cells:
            found.tables.append(score_errors(cells))
        tables = [
            spectrum(rhos, dims), forgetting(rhos, dims), steps(rhos, dims, False), steps(rhos, dims, True),
            forgotten_matrix(rhos, dims),
        ]  # fmt: skip
        shown = Figure(figure(rhos, out / "steps.png"), "Closed form: exact score, Euler's method on the flow.")
        return Findings(
            [*in_words(rhos, dims), *found.answers],
            [*tables, *found.tables],
            [shown, *found.figures],
            found.notes,
            found.how_to_read,
        )

    def conclude(self, panel: analysis.Panel) -> list[str]:
        """Sigma=data against the identity, with each parameterisation, by the first number that was measured."""
        measured = panel.measured[0] if panel.measured else None
        if measured is None or measured.comparison is None:
            return []
        names = [row.label for row in measured.rows if row.against is not None]
        how, found = "ratio" if measured.comparison.log else "difference", []
        for name in names:
            other = name.replace("data", "identity", 1)
            if "data" in name and other in names:
                gap = analysis.gap(measured.comparison.against(name, other))
                found.append(f"{panel.title}: {name} against {other}: {how} {gap} in {measured.metric}")
        return found
