"""The trace of an operator, with its standard error."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from meanfield_jax.arguments import checked
from meanfield_jax.empirical.krylov import check_dtype
from meanfield_jax.empirical.linearized import (
    Operator,
    dual_of,
    linearized,
    loops_on_host,
    multiply_rows,
)
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.limits import within
from meanfield_jax.precise import einsum, matmul
from meanfield_jax.pytree import pytree
from meanfield_jax.status import Status, first_failure


@pytree
class Trace:
    """An estimate of a trace.

    Attributes:
        value: (), the sum of all eigenvalues.
        standard_error: (), the standard error of ``value``; 0 where it is exact.
        num_matvecs: (), the number of products with the operator.
        status: (), a :class:`Status` as an integer: CONVERGED or NOT_FINITE.
    """

    value: Float[Array, "*runs"]
    standard_error: Float[Array, "*runs"]
    num_matvecs: Int[Array, "*runs"]
    status: Int[Array, "*runs"]

    def raise_if_failed(self) -> "Trace":
        """Returns itself, or raises if a product was not finite (host only).

        Raises:
            RuntimeError: if the status is not CONVERGED.
        """
        failed = first_failure(self.status)
        if failed is None:
            return self
        raise RuntimeError(
            f"trace: a product with the operator{failed.where} is not finite; "
            "check parameters and inputs for NaN, inf and overflow"
        )


@partial(jax.jit, static_argnames=("num_probes", "size", "dtype"))
def _signs(
    key: Array, *, num_probes: int, size: int, dtype: jnp.dtype
) -> tuple[Float[Array, "probes size"], Float[Array, "probes size"]]:
    """Two sets of random signs, (num_probes, size) each."""
    sketch, probes = jax.random.rademacher(key, (2, num_probes, size), dtype)
    return sketch, probes


@jax.jit
def _without_sketched(
    images: Float[Array, "probes size"], probes: Float[Array, "probes size"]
) -> Float[Array, "2*probes size"]:
    """An orthonormal basis of the images, and the probes projected out of its span, as rows."""
    frame = jnp.linalg.qr(images.T)[0].T
    return jnp.concatenate([frame, probes - matmul(matmul(probes, frame.T), frame)])


@jax.jit
def _estimate(
    vectors: Float[Array, "rows size"], images: Float[Array, "rows size"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The trace, and its standard error."""
    own, rest = jnp.split(einsum("si,si->s", vectors, images), 2)
    return own.sum() + rest.mean(), rest.std(ddof=1) / len(rest) ** 0.5


def check_probes(num_probes: int) -> None:
    """Raises SpecError for fewer than two probes."""
    if num_probes < 2:
        remedy = "pass 2 or more, which the standard error needs"
        raise problem(SpecError, "num_probes", num_probes, "must be at least 2", remedy)


def _hutch(op: Operator, key: Array, num_probes: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
    sketch, probes = _signs(key, num_probes=num_probes, size=op.shape[0], dtype=op.dtype)
    if loops_on_host(op):
        op = linearized(op)
    vectors = _without_sketched(multiply_rows(op, sketch), probes)
    return _estimate(vectors, multiply_rows(op, vectors))


@checked()
def trace(op: Operator, *, num_probes: int = 20, key: Array | None = None) -> Trace:
    r"""The trace of a positive semi-definite operator, by Hutch++.

    .. math:: \mathrm{tr} A = \mathrm{tr} Q^T A Q + E[g^T A g], \quad g = (1 - Q Q^T) z

    Q is an orthonormal basis of A times vectors of random signs. It captures the large eigenvalues,
    whose contribution is exact. The rest is a mean over ``num_probes`` further vectors z of random
    signs; their scatter gives the standard error.

    Args:
        op: The operator, see :func:`top_eigenvalues`; for a Fisher matrix the trace is computed in
            its dual.
        num_probes: Number of random vectors in each of the two sets, at three products each. For up
            to 3 ``num_probes`` rows the trace is exact.
        key: Random key of the signs; default ``jax.random.key(0)``.

    Returns:
        Value, standard error and status.

    Raises:
        SpecError: for fewer than two probes, or if the operator's dtype is not float32 or float64.

    Accuracy:
        Unbiased; the standard error agrees with the scatter over seeds (100 of them, in
        tests/test_fisher_use.py).

    Example:
        >>> import jax, jax.numpy as jnp, meanfield_jax as mf
        >>> apply = lambda params, x: jnp.tanh(x @ params)
        >>> x = jax.random.normal(jax.random.key(0), (50, 4))
        >>> op = mf.FisherOperator(apply, jnp.ones((4, 3)), x)
        >>> found = mf.trace(op)
        >>> bool(abs(found.value - jnp.trace(op.to_dense())) <= 4 * found.standard_error + 1e-4)
        True

    Source:
        Meyer, Musco, Musco & Woodruff 2021 (arXiv:2010.09649), algorithm 1.
    """
    op = dual_of(op)
    check_dtype(op)
    check_probes(num_probes)
    within("MEMORY", "num_probes", num_probes, 24.0 * num_probes * op.shape[0])
    key, size = jax.random.key(0) if key is None else key, op.shape[0]
    if size <= 3 * num_probes:
        matrix = multiply_rows(op, jnp.eye(size, dtype=op.dtype))
        value, error, num_matvecs = jnp.trace(matrix), jnp.zeros((), op.dtype), size
    else:
        (value, error), num_matvecs = _hutch(op, key, num_probes), 3 * num_probes
    status = jnp.where(jnp.isfinite(value), Status.CONVERGED, Status.NOT_FINITE)
    return Trace(value, error, jnp.asarray(num_matvecs), status)
