"""The figures of a run, drawn from its own numbers. Each function writes one PNG and returns its path."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor

from scoresde_cli import likelihood
from scoresde_cli.datasets.base import Dataset
from scoresde_cli.losses.dsm_cv import sparse
from scoresde_cli.networks.model import ScoreModel

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator, ScalarFormatter

STYLE: Any = {
    "figure.dpi": 110, "savefig.dpi": 150, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "figure.constrained_layout.use": True,
}  # fmt: skip
MODEL, DATA = "#c2410c", "#1d4ed8"


def finish(figure: Any, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path


def loss_curve(rows: list[dict[str, Any]], baseline: float | None, title: str, path: Path) -> Path:
    """Training loss by step, its running median, and the baseline (a Gaussian with the data's moments)."""
    steps = np.array([row["step"] for row in rows])
    loss = np.array([row["loss"] for row in rows], dtype=float)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 3.4))
        axes.plot(steps, loss, color=MODEL, alpha=0.35, lw=1, label="training, mean of each window")
        width = max(3, len(loss) // 12)
        half = [
            min(width // 2, i, len(loss) - 1 - i) for i in range(len(loss))
        ]  # even on both sides, so it does not lag
        smooth = [np.median(loss[i - h : i + h + 1]) for i, h in enumerate(half)]
        axes.plot(steps, smooth, color=MODEL, lw=1.8, label="running median")
        if baseline is not None:
            axes.axhline(baseline, color="0.3", ls="--", lw=1.2, label="baseline: Gaussian with the data's moments")
        finite = loss[np.isfinite(loss)]
        if len(finite) > 4:
            shown = np.append(finite, baseline if baseline is not None else finite[-1])
            low, high = np.quantile(shown, [0.0, 0.97])
            high = max(high, baseline if baseline is not None else high)
            margin = 0.08 * (high - low + 1e-9)
            axes.set_ylim(low - margin, high + margin)
        axes.set(xlabel="step", ylabel="loss")
        axes.set_title(title, fontsize=8)
        axes.legend(fontsize=8)
        return finish(figure, path)


def mixing(entries: Sequence[dict[str, Any]], title: str, path: Path) -> Path:
    """Of dsm_cv, by noise level: the weight of SSM at each estimate, and the variances of the gradient at the last ones.

    Args:
        entries: `threshold` of the summaries of one run or several seeds; the second half of each curve is averaged.
    """
    levels = np.array(entries[0]["levels"])
    curve = entries[0]["curve"]
    late = [row for entry in entries for row in entry["curve"][len(entry["curve"]) // 2 :]]
    dsm, ssm, found = np.mean([noises(row) for row in late], axis=0)
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4))
        for i, row in enumerate(curve):
            shade = 0.15 + 0.85 * (i + 1) / len(curve)
            name = f"step {row['step']}" if i in (0, len(curve) - 1) else None
            left.plot(levels, row["w"], color=MODEL, alpha=shade, lw=1.4, label=name)
        left.set(xscale="log", xlabel="sigma / alpha", ylabel="weight of SSM-VR", ylim=(-0.03, 1.03))
        for values, colour, name in (
            (dsm, DATA, "DSM"),
            (ssm, "0.35", "SSM-VR"),
            (found, MODEL, "DSM with SSM-VR as control"),
        ):
            right.plot(levels, values, color=colour, lw=1.6, marker="o", ms=2.5, label=name)
        low = np.minimum(dsm, ssm)
        right.set(xscale="log", yscale="log", xlabel="sigma / alpha", ylabel="E|gradient of a sample|^2")
        right.set_ylim(0.3 * low[low > 0].min(initial=1e9), 3 * max(dsm.max(), ssm.max()))
        for axes in (left, right):
            axes.legend(fontsize=8)
        figure.suptitle(title, fontsize=8)
        return finish(figure, path)


def noises(row: dict[str, Any]) -> np.ndarray:
    """(3, levels): E|g + w delta|^2 for w = 0 (DSM), w = 1 (SSM) and the w that an estimate leads to, up to one factor."""
    plain, cross, square = (np.array(row[name]) for name in ("plain", "cross", "square"))
    w = sparse(torch.tensor(row["w"], dtype=torch.float64)).numpy()
    return np.stack([plain - 2.0 * v * cross + v**2 * square for v in (np.zeros_like(w), np.ones_like(w), w)])


def samples(data: Dataset, drawn: Tensor, reference: Tensor, title: str, path: Path) -> Path:
    """Samples beside data, in the user's units: points, images, or the marginals of each column."""
    a = data.units.to_user(drawn).numpy()
    b = data.units.to_user(reference, rounded=True).numpy()
    if data.kind == "image":
        return image_grids(a, b, title, path)
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    names = data.columns or [f"x{i}" for i in range(a.shape[1])]
    return plane(a, b, names, title, path) if a.shape[1] == 2 else marginals(a, b, names, title, path)


def plane(a: np.ndarray, b: np.ndarray, names: list[str], title: str, path: Path) -> Path:
    low, high = np.quantile(b, 0.001, axis=0), np.quantile(b, 0.999, axis=0)
    pad = 0.15 * (high - low)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(7, 3.6), sharex=True, sharey=True)
        for panel, points, name, colour in ((axes[0], b, "data", DATA), (axes[1], a, "samples", MODEL)):
            panel.scatter(*points[:10_000].T, s=1.2, alpha=0.35, color=colour, lw=0, rasterized=True)
            outside = np.mean(np.any((points < low - pad) | (points > high + pad), axis=1))
            note = f" ({outside:.1%} outside the frame)" if outside > 5e-4 else ""
            panel.set_title(f"{name}{note}", fontsize=9)
            panel.set_xlabel(names[0])
        axes[0].set_ylabel(names[1])
        axes[0].set(xlim=(low[0] - pad[0], high[0] + pad[0]), ylim=(low[1] - pad[1], high[1] + pad[1]))
        figure.suptitle(title, fontsize=8)
        return finish(figure, path)


def marginals(a: np.ndarray, b: np.ndarray, names: list[str], title: str, path: Path, most: int = 24) -> Path:
    shown = min(len(names), most)
    across = min(4, shown)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            -(-shown // across), across, figsize=(2.4 * across, 1.9 * -(-shown // across)), squeeze=False
        )
        for i, panel in enumerate(axes.flat):
            if i >= shown:
                panel.axis("off")
                continue
            low, high = np.quantile(b[:, i], [0.001, 0.999])
            pad = 0.1 * (high - low) + 1e-12
            bins = np.linspace(low - pad, high + pad, 40).tolist()
            for u, how in (
                (b, {"color": DATA, "alpha": 0.45, "label": "data"}),
                (a, {"color": MODEL, "histtype": "step", "lw": 1.4, "label": "samples"}),
            ):  # densities of all rows: what is outside the frame is missing in it
                panel.hist(u[:, i], bins=bins, weights=np.full(len(u), 1 / len(u) / (bins[1] - bins[0])), **how)
            panel.set_title(names[i], fontsize=8)
            panel.xaxis.set_major_locator(MaxNLocator(4))
            panel.set_yticks([])
        axes.flat[0].legend(fontsize=7)
        more = f"; {len(names) - shown} more columns not shown" if shown < len(names) else ""
        figure.suptitle(title + more, fontsize=8)
        return finish(figure, path)


def tiles(images: np.ndarray, side: int, low: float, high: float, down: int | None = None) -> np.ndarray:
    """Images (n, C, H, W) as one picture in [0, 1] of `down` (side) x side tiles, lines of half grey between them, (., ., C)."""
    down = down or side
    count, (channels, height, width) = down * side, images.shape[1:]
    grey = np.clip((images[:count] - low) / (high - low), 0, 1)
    framed = np.full((count, channels, height + 1, width + 1), 0.5)
    framed[: len(grey), :, 1:, 1:] = grey
    rows = framed.reshape(down, side, channels, height + 1, width + 1).transpose(0, 3, 1, 4, 2)
    return rows.reshape(down * (height + 1), side * (width + 1), channels)


def grey_ends(data: Dataset) -> tuple[float, float]:
    """The grey levels, in the user's units, that the model's -1 and 1 stand for."""
    ends = data.units.to_user(torch.tensor([-1.0, 1.0]).reshape(2, *[1] * len(data.shape)).expand(2, *data.shape))
    return float(ends[0].min()), float(ends[1].max())


def picture(data: Dataset, u: np.ndarray, path: Path) -> Path:
    """Samples alone, in the user's units: a grid of up to 16 x 16 images, or points in the plane."""
    if data.kind == "image":
        side = min(16, int(np.ceil(np.sqrt(len(u)))))
        grid = np.kron(tiles(u, side, *grey_ends(data)), np.ones((4, 4, 1)))
        plt.imsave(path, grid.squeeze(-1) if grid.shape[-1] == 1 else grid, cmap="gray", vmin=0, vmax=1)
        return path
    points = u.reshape(len(u), -1)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4, 4))
        axes.scatter(points[:, 0], points[:, 1], s=1.2, alpha=0.4, color=MODEL, lw=0)
        if data.columns is None:  # columns of a table have units of their own
            axes.set_aspect("equal")
        else:
            axes.set(xlabel=data.columns[0], ylabel=data.columns[1])
        return finish(figure, path)


def inpainting(data: Dataset, u: np.ndarray, given: np.ndarray, path: Path, across: int = 10) -> Path:
    """A row for each given image (m, C, H, W), its gaps (nan) in half grey, and samples given it: sample i is of row i modulo m."""
    low, high = grey_ends(data)
    rows = min(len(given), len(u), 24)
    drawn = min(across, len(u) // len(given) or 1)
    completed = u[: drawn * len(given)].reshape(-1, len(given), *u.shape[1:]) if len(u) >= len(given) else u[None]
    shown = np.concatenate([np.nan_to_num(given[None, :rows], nan=0.5 * (low + high)), completed[:, :rows]])
    images = shown.swapaxes(0, 1).reshape(-1, *u.shape[1:])
    grid = np.kron(tiles(images, len(shown), low, high, down=rows), np.ones((4, 4, 1)))
    plt.imsave(path, grid.squeeze(-1) if grid.shape[-1] == 1 else grid, cmap="gray", vmin=0, vmax=1)
    return path


def frame_painter(data: Dataset, path: np.ndarray) -> Callable[[Any, np.ndarray], None]:
    """Draws one frame (m, *D) of a path (frames, m, *D), in the user's units, into axes whose limits are the data's."""
    if data.kind == "image":
        side, ends = min(8, int(np.sqrt(path.shape[1]))), grey_ends(data)

        def images(axes: Any, u: np.ndarray) -> None:
            grid = tiles(u, side, *ends)
            axes.imshow(grid.squeeze(-1) if grid.shape[-1] == 1 else grid, cmap="gray", vmin=0, vmax=1)
            axes.axis("off")

        return images
    low, high = (end.numpy() for end in data.units.to_user(torch.stack(data.bounds).reshape(2, *data.shape)))
    low, high = np.minimum(low, high), np.maximum(low, high)
    pad = 0.2 * (high - low) + 1e-9

    def points(axes: Any, u: np.ndarray) -> None:
        axes.scatter(*u.reshape(len(u), -1).T, s=1.5, alpha=0.5, color=MODEL, lw=0)
        axes.set(xlim=(low[0] - pad[0], high[0] + pad[0]), ylim=(low[1] - pad[1], high[1] + pad[1]))

    return points


def frames(data: Dataset, path: np.ndarray, times: list[float], file: Path) -> Path:
    """The way from noise to data, (frames, m, *D) in the user's units, one panel a frame."""
    paint, across = frame_painter(data, path), min(6, len(path))
    down = -(-len(path) // across)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, panels = plt.subplots(down, across, figsize=(2.1 * across, 2.2 * down), squeeze=False)
        for i, axes in enumerate(panels.flat):
            if i >= len(path):
                axes.axis("off")
                continue
            paint(axes, path[i])
            axes.set_title(f"t = {times[i]:.3g}", fontsize=8)
            axes.set(xticks=[], yticks=[])
        return finish(figure, file)


def film(data: Dataset, path: np.ndarray, times: list[float], file: Path) -> Path:
    """The same as an animated GIF, 12 frames a second, the last one held for two seconds."""
    from matplotlib.animation import PillowWriter

    paint = frame_painter(data, path)
    with plt.rc_context(STYLE | {"axes.grid": False, "figure.constrained_layout.use": False}):
        figure, axes = plt.subplots(figsize=(3.6, 3.8))
        writer = PillowWriter(fps=12)
        with writer.saving(figure, str(file), dpi=100):
            for u, t in [*zip(path, times, strict=True), *[(path[-1], times[-1])] * 24]:
                axes.clear()
                paint(axes, u)
                axes.set_title(f"t = {t:.3f}", fontsize=9)
                writer.grab_frame()
        plt.close(figure)
    return file


def image_grids(a: np.ndarray, b: np.ndarray, title: str, path: Path, side: int = 8) -> Path:
    """Two grids of images (n, C, H, W), data and samples, on the data's grey scale."""
    low, high = float(b.min()), float(b.max())

    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(1, 2, figsize=(7.4, 4))
        for panel, images, name in ((axes[0], b, "data"), (axes[1], a, "samples")):
            grid = tiles(images, side, low, high)
            panel.imshow(grid.squeeze(-1) if grid.shape[-1] == 1 else grid, cmap="gray", vmin=0, vmax=1)
            panel.set_title(name, fontsize=9)
            panel.axis("off")
        figure.suptitle(title, fontsize=8)
        return finish(figure, path)


def class_grid(data: Dataset, of_classes: Tensor, title: str, path: Path, across: int = 10) -> Path:
    """Samples (classes, k, *D) drawn for each class, in model coordinates, one row of images a class, on the data's grey scale."""
    u = of_classes[:, :across].contiguous()
    rows, columns = u.shape[:2]
    grid = tiles(data.units.to_user(u.flatten(0, 1)).numpy(), columns, *grey_ends(data), down=rows)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(figsize=(5, 0.5 + 4.5 * rows / columns))
        axes.imshow(grid.squeeze(-1) if grid.shape[-1] == 1 else grid, cmap="gray", vmin=0, vmax=1)
        axes.set_yticks((np.arange(rows) + 0.5) * grid.shape[0] / rows, data.classes, fontsize=8)
        axes.set_xticks([])
        axes.set_title(title, fontsize=8)
        return finish(figure, path)


def score_curves(curves: dict[str, dict[str, list[float]]], title: str, path: Path) -> Path:
    """The error of a field by time, on logarithmic axes, with its interval: the model's and the baseline's."""
    field = next(iter(curves)).removesuffix("_error")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 3.6))
        for (name, curve), colour in zip(curves.items(), (MODEL, "0.35"), strict=False):
            label = "model" if not name.endswith("_baseline") else "Gaussian with the data's moments"
            axes.plot(curve["t"], curve["value"], color=colour, lw=1.6, marker="o", ms=3, label=label)
            axes.fill_between(curve["t"], curve["low"], curve["high"], color=colour, alpha=0.2, lw=0)
        axes.set(xscale="log", yscale="log", xlabel="t", ylabel="E |error|², scaled")
        axes.set_title(f"error of the {field} by time; {title}", fontsize=8)
        axes.legend(fontsize=8)
        return finish(figure, path)


def against_chance(summary: dict[str, dict[str, Any]], title: str, path: Path) -> Path:
    """Every number of samples on one axis: 0 is what fresh data gives on average, 1 its 95 percent quantile; right is worse."""
    shown = {n: e for n, e in summary.items() if "better" in e["protocol"] and e["floor_high"] != e["floor"]}
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(figsize=(6.4, 1.2 + 0.3 * len(shown)))
        axes.axvspan(-1, 1, color=DATA, alpha=0.12, lw=0)
        for i, entry in enumerate(reversed(shown.values())):
            scale = entry["floor_high"] - entry["floor"]
            ends = sorted((end - entry["floor"]) / scale for end in entry["ci"])
            axes.plot(ends, [i, i], color=MODEL, lw=1.6)
            axes.plot((entry["value"] - entry["floor"]) / scale, i, "o", color=MODEL, ms=5)
        axes.set_yticks(range(len(shown)), list(reversed(shown)), fontsize=8)
        axes.set_xscale("symlog", linthresh=3)
        low, high = axes.get_xlim()
        axes.set_xticks([t for t in (-100, -30, -10, -3, 0, 1, 3, 10, 30, 100, 300, 1000) if low <= t <= high])
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.minorticks_off()
        axes.set_xlabel("0: fresh data on average   1: worse than 95 percent of fresh data")
        axes.set_title(f"samples against fresh data; {title}", fontsize=8)
        return finish(figure, path)


@torch.no_grad()
def field(model: ScoreModel, data: Dataset, t_min: float, title: str, path: Path, side: int = 72) -> Path:
    """For data in the plane, in model units: the learnt log-density (probability-flow ODE) and score field at t = 0.05."""
    x = data.splits["test"][:5000].double()
    first, last = x.quantile(0.001, dim=0), x.quantile(0.999, dim=0)
    pad = 0.2 * (last - first)
    low, high = (first - pad).tolist(), (last + pad).tolist()
    like = model.mean

    def mesh(k: int) -> tuple[np.ndarray, np.ndarray, Tensor]:
        u, v = np.meshgrid(np.linspace(low[0], high[0], k), np.linspace(low[1], high[1], k))
        return u, v, torch.from_numpy(np.stack([u.ravel(), v.ravel()], axis=1)).to(like)

    u, v, points = mesh(side)
    still, t_field = model.sde.still, 0.05 * model.sde.T
    if still:  # an energy network: up to a constant
        found = model.log_density(points, torch.full((len(points),), t_min).to(like))
    else:
        found = likelihood.log_prob(model, model.sde, points, t_min, likelihood.Flow(steps=20)).value
    log = found.cpu().numpy().reshape(side, side)
    top = float(np.nanmax(log))
    a, b, coarse = mesh(22)
    score = model.score(coarse, torch.full((len(coarse),), t_field).to(like)).cpu().double().numpy()
    length = np.linalg.norm(score, axis=1, keepdims=True)
    arrows = score / np.maximum(length, 1e-9) * np.minimum(length / np.quantile(length, 0.6), 1.0)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(1, 2, figsize=(7.8, 3.6), sharex=True, sharey=True)
        shown = axes[0].contourf(u, v, np.maximum(log, top - 9), levels=np.linspace(top - 9, top, 19), cmap="magma")
        whole = np.arange(np.ceil(top - 9), top)
        figure.colorbar(shown, ax=axes[0], label="log p, up to a constant" if still else "log p, nats", ticks=whole)
        at, when = ("", "") if still else (f", t = {t_min:g}", f", t = {t_field:g}")
        axes[0].set_title(f"learnt log-density{at} (black: 9 below the top)", fontsize=9)
        axes[1].scatter(*x[:3000].T.numpy(), s=1, alpha=0.25, color=DATA, lw=0)
        axes[1].quiver(a, b, arrows[:, 0], arrows[:, 1], color=MODEL, scale=26, width=0.004)
        axes[1].set_title(f"learnt score{when} (long arrows cut)", fontsize=9)
        across, up = (f"{name}, scaled" if data.columns else name for name in data.columns or ("x0", "x1"))
        for panel in axes:
            panel.set_xlabel(across)
        axes[0].set_ylabel(up)
        figure.suptitle(title, fontsize=8)
        return finish(figure, path)
