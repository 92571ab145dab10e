"""The user's own data: tables from CSV, Parquet, NPY and NPZ files."""

import csv
import hashlib
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from scoresde_cli.datasets.base import Dataset, Kind, Units, check_rows, check_splits, existing, label_name, split_rows
from scoresde_cli.errors import ScoreSDEError, Unreadable, nearest, one_line
from scoresde_cli.rng import generator, uniform

MANY_CLASSES = 1000
SEPARATORS = ",;\t|"
FARTHEST = 1e9  # in model coordinates: squares of it, and their sums, are far from the end of float32


class Table(Dataset):
    """Rows of a file; columns keep their names and units.

    Args:
        path: a .csv, .tsv, .txt, .parquet, .npy or .npz file.
        columns: names to keep, in this order; None for all.
        missing: refuse rows with missing values, or drop them.
        scaling: standardise (mean 0, variance 1 by column), whiten (covariance I) or none; moments of the training rows.
        dequantise: add uniform noise of each column's smallest step, so that a density exists; samples are rounded back.
        key: name of the array in an .npz file that holds several.
        labels: name of the column, of numbers or words, that holds the class of each row; it is not modelled itself.
        seed: of the split and of the dequantisation.

    Raises Unreadable (exit code 4) where the file cannot serve, ScoreSDEError (2) where a setting does not fit it.
    """

    kind: Kind = "table"

    def __init__(
        self, path: str, columns: list[str] | None = None, missing: Literal["refuse", "drop"] = "refuse",
        scaling: Literal["standardise", "whiten", "none"] = "standardise", dequantise: bool = False,
        key: str | None = None, labels: str | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        file = existing(path)
        if not file.is_file():
            raise ScoreSDEError(f"data.path={path}: it is a folder, expected a file")
        u, names, words = read(file, columns, key, labels)
        keep, dropped = handle_missing(u, names, words, missing, path)
        u = u[keep]
        check_rows(len(u), path)
        self.shape = tuple(u.shape[1:])
        if names is not None:
            self.columns = names
        else:
            self.kind = "points"
        rows, repeated = split_rows(u, seed)
        resolution = origin = None
        if dequantise:
            resolution = torch.tensor(
                [smallest_step(column) for column in u[rows["train"]].flatten(1).T.numpy()], dtype=torch.float64
            )
            origin = u[rows["train"]].flatten(1).amin(0)  # where the grid begins
            noise = uniform((len(u), len(resolution)), generator(seed, "dequantise"), torch.float64) - 0.5
            u = u + (noise * resolution).reshape(u.shape)
        self.units = fit_units(u[rows["train"]], scaling, names, resolution, origin)
        check_splits(rows, path)
        x = self.units.to_model(u)
        check_range(x, u, names, path, scaling)
        x = x.float()
        self.splits = {name: x[index] for name, index in rows.items()}
        if words is not None:
            self.classes, codes = classes_of(words[keep.numpy()], path, str(labels))
            self.labels = {name: codes[index] for name, index in rows.items()}
        self.facts = {
            "path": str(file.resolve()), "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "rows": len(u),
            "rows_dropped": dropped, "rows_repeated": repeated, "scaling": scaling, "dequantised": dequantise,
        }  # fmt: skip


Read = tuple[torch.Tensor, list[str] | None, np.ndarray | None]


def read(file: Path, columns: list[str] | None, key: str | None, labels: str | None) -> Read:
    """The file as a float64 tensor (n, *D), its column names if it is a table, and the column of labels as it stands (n,)."""
    suffix = file.suffix.lower()
    if file.stat().st_size == 0:
        raise Unreadable(f"data.path={file}: the file is empty")
    try:
        if suffix in (".npy", ".npz"):
            return read_array(file, columns, key, labels)
        if suffix in (".csv", ".tsv", ".txt", ".parquet", ".pq"):
            if key is not None:
                raise ScoreSDEError(f"data.key={key}: only an .npz file has arrays by name")
            return read_frame(file, columns, labels)
    except ScoreSDEError:
        raise
    except UnicodeDecodeError:
        raise Unreadable(f"data.path={file}: not text in UTF-8; save it in that encoding") from None
    except Exception as problem:
        if suffix in (".npy", ".npz") and "pickle" in str(problem):
            raise Unreadable(f"data.path={file}: not an array of numbers (or not a NumPy file at all)") from problem
        raise Unreadable(f"data.path={file}: not readable as {suffix[1:]} ({one_line(problem)[:200]})") from problem
    raise ScoreSDEError(f"data.path={file}: expected a .csv, .tsv, .txt, .parquet, .npy or .npz file, got {suffix!r}")


def read_array(file: Path, columns: list[str] | None, key: str | None, labels: str | None) -> Read:
    loaded: Any = np.load(file, allow_pickle=False)
    if isinstance(loaded, np.lib.npyio.NpzFile):
        names = list(loaded.files)
        if key is None and len(names) != 1:
            raise ScoreSDEError(f"data.path={file}: it holds the arrays {names}; choose one with data.key=NAME")
        if key is not None and key not in names:
            raise ScoreSDEError(f"data.key={key}: {file} holds the arrays {names}{nearest(key, names)}")
        loaded = loaded[key or names[0]]
    if loaded.dtype.kind not in "fiub":
        raise Unreadable(f"data.path={file}: an array of type {loaded.dtype}, expected numbers")
    if loaded.ndim == 1:
        loaded = loaded[:, None]
    if loaded.ndim < 2 or loaded[:1].size == 0:
        raise Unreadable(f"data.path={file}: an array of shape {loaded.shape}, expected (rows, ...)")
    u = torch.from_numpy(loaded.astype(np.float64))
    if u.ndim > 2:
        if columns is not None or labels is not None:
            raise ScoreSDEError(
                f"data.columns or data.labels: {file} is an array of shape {tuple(u.shape)}, it has no columns"
            )
        return u, None, None
    names = [f"x{i}" for i in range(u.shape[1])]
    words = None if labels is None else u[:, position(labels, names, file)].numpy()
    kept = [name for name in (columns or names) if name != labels]
    return u[:, [position(name, names, file) for name in kept]], kept, words


def position(name: str, names: list[str], file: Path) -> int:
    if name not in names:
        raise ScoreSDEError(
            f"data.columns: no column {name!r} in {file}; it has {', '.join(names)}{nearest(name, names)}"
        )
    return names.index(name)


def read_frame(file: Path, columns: list[str] | None, labels: str | None) -> Read:
    import pandas as pd

    if file.suffix.lower() in (".parquet", ".pq"):
        frame = pd.read_parquet(file)
    else:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            head = lines.readline()
        separator = max(SEPARATORS, key=head.count)
        check_header(file, next(csv.reader([head], delimiter=separator), []))
        frame = pd.read_csv(file, sep=separator, encoding="utf-8-sig", skipinitialspace=True, index_col=False)
    names = [str(name).strip() for name in frame.columns]
    frame.columns = pd.Index(names)
    words = None
    if labels is not None:
        position(labels, names, file)
        words = frame.pop(labels).to_numpy()
        if not len(frame.columns):
            raise ScoreSDEError(f"data.labels={labels}: {file} has no other column to model")
        columns = None if columns is None else [name for name in columns if name != labels]
    if columns is not None:
        if not columns or len(set(columns)) < len(columns):
            raise ScoreSDEError(f"data.columns={columns}: expected at least one column, and each once")
        for name in columns:
            position(name, names, file)
        frame = frame[list(columns)]
    if not len(frame):
        raise Unreadable(f"data.path={file}: a header and no rows")
    text = [name for name in frame.columns if not pd.api.types.is_numeric_dtype(frame[name])]
    if text:
        numeric = [name for name in frame.columns if name not in text]
        bad = frame[text[0]].dropna()
        example = f" (for instance {str(bad.iloc[0])[:40]!r})" if len(bad) else " (it is empty)"
        if len(bad) and re.fullmatch(r"\s*[-+]?\d+,\d+\s*", str(bad.iloc[0])):
            example += ": a decimal comma, expected a point"
        hint = f"; keep the others with data.columns=[{','.join(numeric)}]" if numeric else ""
        raise Unreadable(f"data.path={file}: column {text[0]!r} does not hold numbers{example}{hint}")
    return torch.from_numpy(frame.to_numpy(dtype=np.float64, na_value=np.nan).copy()), list(frame.columns), words


def check_header(file: Path, names: list[str]) -> None:
    """The first line of a text file holds a name for each column, each once."""
    names = [name.strip() for name in names]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise Unreadable(f"data.path={file}: the column names {doubled} stand more than once")

    def numeric(name: str) -> bool:
        try:
            float(name)
        except ValueError:
            return False
        return True

    if names and all(map(numeric, names)):
        raise Unreadable(f"data.path={file}: its first line holds numbers; put a line with the columns' names above it")


def handle_missing(
    u: torch.Tensor, names: list[str] | None, words: np.ndarray | None, missing: str, path: str
) -> tuple[torch.Tensor, int]:
    """Which rows have no missing or infinite value, and how many are left out."""
    import pandas as pd

    bad = ~torch.isfinite(u.flatten(1))
    if words is not None:
        bad, names = (
            torch.cat([bad, torch.from_numpy(pd.isna(words))[:, None]], 1),
            [*(names or []), "that data.labels names"],
        )
    rows = bad.any(1)
    count = int(rows.sum())
    if count and missing == "refuse":
        first, column = int(rows.nonzero()[0]), int(bad.any(0).nonzero()[0])
        where = f"column {names[column]!r}" if names is not None else f"element {column}"
        raise Unreadable(
            f"data.path={path}: {count} row(s) with missing or infinite values (the first is row {first + 1} of the data; "
            f"{where} has some); drop them with data.missing=drop"
        )
    return ~rows, count


def check_range(x: torch.Tensor, u: torch.Tensor, names: list[str] | None, path: str, scaling: str) -> None:
    """Refuse values that float32 cannot hold beside the others, such as an error code of 1e30.

    Args:
        x, u: all rows (n, *D), in model coordinates and in the user's units.
    """
    x, u = x.flatten(1), u.flatten(1)
    for i, far in enumerate(x.abs().amax(0).tolist()):
        one = far > 0.4 * len(x) ** 0.5  # so far only where a few values are most of the variance
        if far > FARTHEST or (one and 2 * len(x[:, i].float().unique()) < len(u[:, i].unique())):
            gaps = (u - u.median(0).values).abs()
            row = int((x[:, i] - x[:, i].median()).abs().argmax())
            column = int((gaps[row] / gaps.mean(0)).argmax())
            where = f"column {names[column]!r}" if names is not None else f"element {column}"
            far_from = (
                "zero for numbers of 32 bits; take data.scaling=standardise, or"
                if scaling == "none"
                else ("its other values for numbers of 32 bits;")
            )
            raise Unreadable(
                f"data.path={path}: {where} holds {float(u[row, column]):.6g}, too far from {far_from} leave out that row or column"
            )


def classes_of(words: np.ndarray, path: str, column: str) -> tuple[list[str], torch.Tensor]:
    """(names of the classes in order, the number of each row's class (n,))."""
    values, codes = np.unique(words, return_inverse=True)
    if not 2 <= len(values) <= min(MANY_CLASSES, len(words) // 2):
        raise Unreadable(
            f"data.path={path}: the column {column!r} of labels has {len(values)} distinct values in {len(words)} rows; expected "
            f"classes, at least 2 and at most {min(MANY_CLASSES, len(words) // 2)}"
        )
    return [label_name(value) for value in values.tolist()], torch.from_numpy(codes).long()


def smallest_step(column: np.ndarray) -> float:
    """The smallest gap between distinct values of a column: the grid it was rounded to, a short decimal where that fits."""
    values = np.unique(column)
    if len(values) < 2:
        return 0.0
    gaps = np.diff(values)
    # Gaps of decimal numbers differ by rounding errors: those far below the typical one are not steps.
    step = float(gaps[gaps > 1e-9 * np.abs(values).max()].min())
    short = float(f"{step:.6g}")
    return short if abs(short - step) < 1e-9 * np.abs(values).max() else step


def fit_units(
    train: torch.Tensor,
    scaling: str,
    names: list[str] | None,
    resolution: torch.Tensor | None,
    origin: torch.Tensor | None,
) -> Units:
    shape, flat = tuple(train.shape[1:]), train.flatten(1)
    mean, std = flat.mean(0), flat.std(0, correction=0)
    if scaling == "none":
        plain = Units.identity(shape)
        return Units(shape, plain.shift, plain.scale, resolution=resolution, origin=origin)
    constant = (std <= 1e-12 * flat.abs().amax(0)).nonzero().flatten().tolist()
    if constant and (names is not None or scaling == "whiten"):
        listed = ", ".join(repr(names[i]) if names else str(i) for i in constant[:5])
        raise Unreadable(f"data.path: constant in the training rows: {listed}; leave it out with data.columns=[...]")
    if scaling == "whiten":
        centred = flat - mean
        lam, basis = torch.linalg.eigh(centred.T @ centred / len(flat))
        if lam[0] <= 1e-10 * lam[-1]:
            raise Unreadable(
                "data.scaling=whiten: the columns are linearly dependent (covariance of deficient rank); "
                "leave one out with data.columns=[...], or take data.scaling=standardise"
            )
        return Units(shape, mean, None, basis * lam.sqrt(), resolution, origin)
    std = torch.where(std > 0, std, torch.ones_like(std))
    return Units(shape, mean, std, resolution=resolution, origin=origin)
