"""The density of a symmetric operator's whole spectrum, by stochastic Lanczos quadrature."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from meanfield_jax import precise
from meanfield_jax.arguments import checked
from meanfield_jax.checks import numbers, scalar
from meanfield_jax.empirical.krylov import Krylov, begin, check_dtype, expand
from meanfield_jax.empirical.linearized import Operator, dual_of, linearized, loops_on_host
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.limits import within
from meanfield_jax.pytree import pytree
from meanfield_jax.status import Status, first_failure

Quadrature = tuple[Float[Array, "*draws steps"], Float[Array, "*draws steps"]]
"""Nodes and weights."""


@pytree
class SpectralDensity:
    """Quadrature nodes and weights of the spectral density, one row per random start.

    Attributes:
        nodes: (num_draws, num_steps), Ritz values, ascending; 0 after an early end.
        weights: (num_draws, num_steps), non-negative; each row sums to 1; 0 after an early end.
    """

    nodes: Float[Array, "*runs draws steps"]
    weights: Float[Array, "*runs draws steps"]

    @property
    def status(self) -> Int[Array, "*draws"]:
        """(num_draws,), a :class:`Status` as an integer: CONVERGED or NOT_FINITE."""
        finite = jnp.isfinite(self.nodes).all(-1)
        return jnp.where(finite, Status.CONVERGED, Status.NOT_FINITE)

    def moment(self, order: int) -> Float[Array, ""]:
        """Estimate of tr(A^order) / size, a scalar."""
        return jnp.mean(jnp.sum(self.weights * self.nodes**order, axis=-1))

    def mean(self) -> Float[Array, ""]:
        """Estimate of the mean eigenvalue tr(A) / size, a scalar."""
        return self.moment(1)

    def density(
        self, grid: Any, *, sigma: float | None = None, relative_sigma: float = 0.0
    ) -> Float[Array, " points"]:
        r"""The density per unit eigenvalue, with each node widened to a Gaussian.

        .. math:: p(\lambda) = \langle \sum_j w_j N(\lambda; \theta_j, \sigma_j^2) \rangle, \quad
            \sigma_j = \sigma + \sigma_{rel} |\theta_j|

        Args:
            grid: Eigenvalues at which to evaluate the density, (m,).
            sigma: Absolute width; by default 1 % of the range of the nodes, or 0 if
                ``relative_sigma`` is given. On a logarithmic grid use both: ``relative_sigma=0.1``
                and a ``sigma`` near the smallest grid point, which is the width of the peak at 0.
            relative_sigma: Width in units of the node.

        Returns:
            The density, (m,); it integrates to 1 over the whole line.

        Raises:
            SpecError: if a width is negative.
        """
        for name, value in (("sigma", sigma), ("relative_sigma", relative_sigma)):
            if value is not None and not scalar(name, value) >= 0:
                raise problem(SpecError, name, value, "must not be negative", "pass 0 or more")
        nodes, weights = self.nodes.ravel(), self.weights.ravel() / self.nodes.shape[0]
        spread = jnp.max(nodes) - jnp.min(nodes)
        scale = jnp.where(spread > 0, spread, 1)
        default = 0.0 if relative_sigma else 0.01 * scale
        width = (default if sigma is None else sigma) + relative_sigma * jnp.abs(nodes)
        # a node at exactly 0 keeps a finite height
        width = jnp.maximum(width, jnp.finfo(nodes.dtype).eps * scale)
        grid = jnp.ravel(jnp.asarray(numbers("grid", grid), nodes.dtype))
        within("MEMORY", "grid.shape", grid.shape, 12.0 * grid.size * nodes.size)
        score = (grid[:, None] - nodes[None, :]) / width[None, :]
        heights = weights / (width * math.sqrt(2 * math.pi))
        return precise.matmul(jnp.exp(-(score**2) / 2), heights)

    def raise_if_failed(self) -> "SpectralDensity":
        """Returns itself, or raises if a node is not finite (host only).

        Raises:
            RuntimeError: if a product with the operator was not finite.
        """
        failed = first_failure(self.status)
        if failed is None:
            return self
        raise RuntimeError(
            f"spectral_density: a product in draw {failed.cell[0]} is not finite; "
            "check parameters and inputs for NaN, inf and overflow"
        )


@partial(jax.jit, static_argnames=("num_steps", "num_draws"))
def _density_compiled(op: Operator, key: Array, *, num_steps: int, num_draws: int) -> Quadrature:
    matvec = op.linearize()

    def quadrature(draw_key: Array) -> Quadrature:
        krylov = lax.fori_loop(
            0,
            num_steps,
            lambda step, krylov: expand(matvec, krylov, step),
            begin(op.shape[0], num_steps, op.dtype, draw_key),
        )
        return _nodes_and_weights(krylov)

    # one draw after another: a product costs far more than the loop, and memory is that of one draw
    return lax.map(quadrature, jax.random.split(key, num_draws))


def _density_stepwise(op: Operator, key: Array, *, num_steps: int, num_draws: int) -> Quadrature:
    op, draws = linearized(op), list[Quadrature]()
    for draw_key in jax.random.split(key, num_draws):
        krylov = _begin(draw_key, size=op.size, num_steps=num_steps, dtype=op.dtype)
        for step in range(num_steps):
            krylov = _expand(op, krylov, step)
        draws.append(_nodes_and_weights(krylov))
    nodes, weights = (jnp.stack(parts) for parts in zip(*draws, strict=True))
    return nodes, weights


@partial(jax.jit, static_argnames=("size", "num_steps", "dtype"))
def _begin(key: Array, *, size: int, num_steps: int, dtype: jnp.dtype) -> Krylov:
    return begin(size, num_steps, dtype, key)


@jax.jit
def _expand(op: Operator, krylov: Krylov, step: Int[Array, ""]) -> Krylov:
    return expand(op.linearize(), krylov, step)


@jax.jit
def _nodes_and_weights(krylov: Krylov) -> Quadrature:
    nodes, vectors = jnp.linalg.eigh(krylov.projected)
    return nodes, vectors[0] ** 2


@checked()
def spectral_density(
    op: Operator, *, num_steps: int = 90, num_draws: int = 1, key: Array | None = None
) -> SpectralDensity:
    r"""The distribution of all eigenvalues, by stochastic Lanczos quadrature.

    .. math:: \frac{1}{N} \sum_i f(\lambda_i) \approx
        \Big\langle \sum_j (e_1^T s_j)^2 f(\theta_j) \Big\rangle_{starts}

    Args:
        op: The operator, see ``top_eigenvalues``. For a Fisher matrix the density is that of its
            dual: n C eigenvalues, which include all that are not 0.
        num_steps: Products per draw; a draw resolves about num_steps / 2 outliers and a smooth
            bulk.
        num_draws: Number of random starts, processed one after the other.
        key: Random key of the starts; default ``jax.random.key(0)``.

    Returns:
        ``SpectralDensity`` with ``density(grid)``, ``mean()`` and ``moment(order)``.

    Raises:
        SpecError: if num_steps, num_draws or the operator's dtype cannot be used.

    Accuracy:
        A draw integrates polynomials of degree up to 2 num_steps - 1 exactly for its own start
        vector. What remains is the scatter over starts, which for the mean is
        sqrt(2 tr A^2 / num_draws) / size.

    Example:
        >>> import jax, jax.numpy as jnp, meanfield_jax as mf
        >>> apply = lambda params, x: jnp.tanh(x @ params)
        >>> x = jax.random.normal(jax.random.key(0), (50, 4))
        >>> op = mf.FisherOperator(apply, jnp.ones((4, 3)), x)
        >>> spectrum = mf.spectral_density(op, num_steps=30)
        >>> spectrum.density(jnp.linspace(0, 10, 500), sigma=0.1).shape
        (500,)

    Source:
        Ghorbani, Krishnan and Xiao, arXiv:1901.10159, section 2; Golub and Welsch (1969).
    """
    op = dual_of(op)
    check_dtype(op)
    for name, value in (("num_steps", num_steps), ("num_draws", num_draws)):
        if value < 1:
            raise problem(SpecError, name, value, "must be at least 1", "pass a positive integer")
    within("MEMORY", "num_steps", num_steps, 4.0 * num_steps * (op.shape[0] + num_steps))
    within("MEMORY", "num_draws", num_draws, 8.0 * num_draws * num_steps)
    key = jax.random.key(0) if key is None else key
    run = _density_stepwise if loops_on_host(op, key) else _density_compiled
    return SpectralDensity(*run(op, key, num_steps=num_steps, num_draws=num_draws))
