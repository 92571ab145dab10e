"""Laws of directions that look at the Jacobian: hutchpp and xtrace, each with E[v] = 0 and E[v v^T] = I for any Jacobian.

They sketch its range by products that need no gradient, and spend fewer directions where nothing is left to be found.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from scoresde_cli.errors import ScoreSDEError
from scoresde_cli.projections import Orthogonal, Projection, Push, Rademacher
from scoresde_cli.rng import normal


class Sketch(Projection):
    """Laws that aim directions at the Jacobian J of each sample, from products J w that need no gradient.

    With W = mean_k v_k v_k^T a sliced loss is linear in W: S^T W S + 2 tr(J W); and so is its gradient in the weights with the
    directions held constant: d(S^T) W S + S^T W dS + 2 tr(dJ W). So E[W | x, weights] = I makes the loss and its gradient unbiased.
    """

    adapted = True

    def sample(
        self, shape: tuple[int, ...], n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        raise ScoreSDEError(f"projection {type(self).__name__} draws its directions by products with the Jacobian only")

    def whole(self, d: int) -> int:
        """How many directions have W = I exactly."""
        return d

    @abstractmethod
    def aimed(self, push: Push, batch: int, d: int, n: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """n <= whole(d) columns (B, d, n) with W the sum of their outer products; push takes and gives (B, d, m)."""

    def directions(
        self, push: Push, shape: tuple[int, ...], n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        batch, d = shape[0], int(torch.Size(shape[1:]).numel())

        def columns(w: Tensor) -> Tensor:
            return push(w.permute(2, 0, 1).reshape(-1, *shape)).flatten(2).permute(1, 2, 0)

        size = self.whole(d)
        counts = [size] * (n // size) + ([n % size] if n % size else [])
        parts = [self.aimed(columns, batch, d, m, generator, dtype) * m**0.5 for m in counts]
        signs = Rademacher().sample((batch, 1), n, generator, dtype)  # E[v] = 0
        return (torch.cat(parts, dim=2).permute(2, 0, 1) * signs).reshape(n, *shape)


def sketch(push: Push, w: Tensor) -> Tensor:
    """J w less its part along w, and of that a little: (B, d, m), each column a function of its own w alone.

    A multiple of I in J has the same mean v^T J v for all directions with tr W = d, so nothing of it is worth aiming at; the
    little keeps m columns independent where J has a smaller rank.
    """
    unit = w / w.norm(dim=1, keepdim=True)
    found = push(unit)
    found = found - (unit * found).sum(1, keepdim=True) * unit
    size = found.norm(dim=1, keepdim=True)
    return found / size.clamp_min(torch.finfo(w.dtype).tiny) + 1e-2 * unit


class HutchPP(Sketch):
    """Hutch++ (Meyer, Musco, Musco and Woodruff, SOSA 2021): the trace on the range of a sketch, and an estimate on the rest.

    Q = orth(J S), S normal (d, q), q = n // 2; O a Haar-distributed frame of n - q vectors in the complement of Q:

        W = Q Q^T + (d - q)/(n - q) O O^T,        E[W | Q] = Q Q^T + (I - Q Q^T) = I.

    One QR decomposition of [J S, G], G normal, holds both. The n tangents of the loss cost q pushes without gradient more;
    with n = 1 there is no sketch, and the law is `orthogonal`'s. J in place of its symmetric part, the only one that v^T J v
    sees, needs no reverse pass and serves as well: P sym(J) P = sym(P J P) vanishes with P J, P = I - Q Q^T.
    """

    def aimed(self, push: Push, batch: int, d: int, n: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        q = n // 2
        w = normal((batch, d, n), generator, dtype)
        frame, _ = torch.linalg.qr(torch.cat([sketch(push, w[..., :q]), w[..., q:]], dim=2))
        return torch.cat([frame[..., :q], frame[..., q:] * ((d - q) / (n - q)) ** 0.5], dim=2)


class XTrace(Sketch):
    """XTrace (Epperly, Tropp and Webber, SIAM J. Matrix Anal. Appl. 45, 2024): each test vector is the rest of the others' sketch.

    Of p test vectors w_i, normal, the first m = n // 2 are sketched, Q R = J [w_1 .. w_m]; leaving out i, the range is that of
    Q (I - s_i s_i^T), s_i the unit vector along column i of R^{-T} (s_i = 0 for i > m: the sketch never saw w_i). With P_i the
    projection onto its complement, of dimension d_i, and u_i = sqrt(d_i) P_i w_i / |P_i w_i|:

        W = 1/p sum_i [ Q (I - s_i s_i^T) Q^T + u_i u_i^T ] = Q (I - 1/p sum_i s_i s_i^T) Q^T + 1/p sum_i u_i u_i^T.

    w_i is independent of P_i and its law invariant under rotations, so u_i / sqrt(d_i) is uniform on the unit sphere of that
    complement, E[u_i u_i^T | P_i] = P_i, and E[W] = I. p = n - m, so n directions: m of a square root of the first term, and
    the u_i. The n tangents of the loss cost m pushes without gradient more; below n = 3 there is no sketch to leave anything
    out of, and the law is `orthogonal`'s.
    """

    def whole(self, d: int) -> int:
        return 2 * d

    def aimed(self, push: Push, batch: int, d: int, n: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        if n < 3:
            return Orthogonal().sample((batch, d), n, generator, dtype).permute(1, 2, 0) / n**0.5
        m, p = n // 2, n - n // 2
        w = normal((batch, d, p), generator, dtype)
        Q, R = torch.linalg.qr(sketch(push, w[..., :m]))
        eye = torch.eye(m, dtype=dtype, device=w.device)
        s = torch.linalg.solve_triangular(R.mT, eye.expand_as(R), upper=False)
        s = torch.nn.functional.pad(s / s.norm(dim=1, keepdim=True), (0, p - m))
        seen = Q.mT @ w
        u = w - Q @ (seen - s * (s * seen).sum(1, keepdim=True))
        free = d - m + s.square().sum(1, keepdim=True)
        values, vectors = torch.linalg.eigh(eye - s @ s.mT / p)
        known = Q @ (vectors * values.clamp_min(0.0).sqrt().unsqueeze(1))
        return torch.cat([known, u * (free / p).sqrt() / u.norm(dim=1, keepdim=True)], dim=2)
