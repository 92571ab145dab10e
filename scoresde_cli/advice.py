"""What the user should know of a setting before the work starts: risky, but legal."""

from typing import Any

import torch

from scoresde_cli import projections
from scoresde_cli.compose import Parts
from scoresde_cli.sdes.whitened import MatrixKernel


def remembered(parts: Parts) -> float:
    """The largest ratio of the data's to the noise's variance that correlated noise leaves in a direction at T; else 0."""
    white = parts.sde.whitening()
    if white is None:
        return 0.0
    kernel, lam = parts.model.kernel, parts.model.lam.double().cpu()
    t = torch.full((1,), parts.sde.T, dtype=torch.float64)
    alpha, sigma = kernel.levels(t, lam) if isinstance(kernel, MatrixKernel) else (kernel.alpha(t), kernel.sigma(t))
    return float((alpha.square() * lam / sigma.square()).max())


def lonely(parts: Parts) -> str | None:
    """What one row does to the scale of a column: it is wrong, or the law has tails that no score here is right about."""
    if parts.data.kind == "image":
        return None
    x = parts.data.splits["train"].flatten(1)
    mean, var = x.mean(0), x.var(0, correction=0)
    shares = torch.maximum(x.amax(0) - mean, mean - x.amin(0)).square() / (len(x) * var)
    share, column = shares.nan_to_num(0.0).max(0)  # 0/0 where a coordinate does not vary
    if share < 0.5:
        return None
    names = parts.data.columns or [f"coordinate {i}" for i in range(x.shape[1])]
    return (
        f"one row holds {100 * float(share):.0f} percent of the variance of {names[int(column)]} in the training data, and the "
        "others stand close together beside it: is it a mistake?"
    )


def advice(parts: Parts, overrides: list[str]) -> tuple[list[str], list[str]]:
    """(notes, warnings): what the user should know before the work starts, a line each."""
    loss, d, s = parts.loss, parts.d, parts.settings
    exact = loss.name == "ssm_vr" and s.n_proj != "auto" and s.n_proj >= d
    notes, warnings = [], []
    law = getattr(loss, "projection", None)
    if law is None:
        ignored = [o for o in overrides if o.split("=")[0] in ("n_proj", "projection")]
        if ignored:
            notes.append(f"loss={loss.name} draws no directions: {', '.join(ignored)} has no effect")
    elif exact:
        notes.append(f"n_proj={s.n_proj} >= d={d}: the trace is exact ({d} unit directions), no direction is drawn")
    elif loss.name == "dsm_cv" and s.n_proj != "auto" and s.n_proj >= d:
        notes.append(f"n_proj={s.n_proj} >= d={d}: the trace is exact where it is taken")
    elif loss.name == "ssm" and s.n_proj != "auto" and s.n_proj >= d:
        notes.append(f"n_proj={s.n_proj} >= d={d}: loss=ism would be exact for {d} directions; ssm draws as asked")
    if loss.name == "ssm" and d > 8:
        warnings.append(
            f"loss=ssm at d={d}: the variance of (v^T S)^2 grows like d; loss=ssm_vr keeps the square exact"
        )
    if isinstance(law, projections.Gaussian) and d <= 4 and not exact:
        warnings.append(f"projection=gaussian at d={d}: about three times the variance of rademacher")
    if loss.name == "ism" and d > 16:
        warnings.append(f"loss=ism at d={d}: {d} directions a sample; ssm_vr with 1 to 4 learns as well for less")
    if getattr(parts.model.network, "conservative", False) and parts.optimizer.lr > 2e-3:
        warnings.append(
            f"an energy network with optimizer.lr={parts.optimizer.lr:g}: the loss has spikes, which some runs end in; "
            "2e-3 is steady and more exact"
        )
    if getattr(parts.model.network, "spatial", False) and parts.data.kind != "image":
        warnings.append(
            f"network=unet is for images, and the data are {parts.data.kind}: mlp or resmlp learn more in the time"
        )
    elif getattr(parts.model.network, "spatial", False) and loss.second_order and not loss.needs_kernel:
        warnings.append(
            f"loss={loss.name} on images: a step of loss=dsm takes less than half the time, and learnt as much on the digits"
        )
    net: Any = parts.model.network
    if getattr(net, "coarsest", 0) > max(getattr(net, "image", (0, 0))[1:]):
        sides, padded = (" x ".join(map(str, each)) for each in (net.image[1:], net.padded))
        warnings.append(
            f"the levels of network=unet halve {sides} pixels to less than one, so images are padded to {padded}: take fewer "
            "network.multipliers, or a smaller network.patch"
        )
    if loss.second_order and parts.model.parameterisation.warning:
        warnings.append(parts.model.parameterisation.warning)
    if far := lonely(parts):
        warnings.append(far)
    left = remembered(parts)
    if left > 0.05:
        warnings.append(
            f"at T one direction still holds {left:.2g} times as much variance of the data as of noise, and the prior knows "
            "nothing of it: take a larger sde.beta_max, sde.sigma=data, or sde.drift=isotropic"
        )
    if parts.sde.jumps is not None and parts.sde.kernel() is None and parts.optimizer.lr > 1e-3:
        warnings.append(
            f"jumps beside a drift that is known by its paths, with optimizer.lr={parts.optimizer.lr:g}: the flux is great where "
            "few samples are, and runs diverge; optimizer.lr=1e-3 sde.refresh=8 held"
        )
    if parts.sde.jumps is not None:
        first = torch.full((1,), s.t_min)
        share = float(parts.sde.jumps.rate(first)) * s.t_min
        if share > 2e-3:
            notes.append(
                f"at t_min={s.t_min:g} a share of {share:.2g} has jumped, and is not brought back: a smaller t_min leaves fewer"
            )
    if parts.optimizer.schedule == "constant" and s.ema is None:
        warnings.append("a constant learning rate without ema: the last weights carry the noise of the last steps")
    if s.steps < 2000:
        warnings.append(f"steps={s.steps}: under 2000 steps score matching is rarely done learning")
    return notes, warnings
