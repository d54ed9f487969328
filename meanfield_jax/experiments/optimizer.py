"""Learning rates from a spectrum: predicted for a specification, or measured for a model."""

from collections.abc import Callable
from typing import Any

import optax
from flax import nnx
from jax import Array
from jax.core import Tracer

from meanfield_jax.arguments import checked, model_or_function
from meanfield_jax.empirical.fisher import FisherOperator
from meanfield_jax.empirical.generic import couples_samples
from meanfield_jax.empirical.lanczos import top_eigenvalues
from meanfield_jax.empirical.nnx_model import fisher_operator
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.network import Network
from meanfield_jax.theory.analyze import analyze
from meanfield_jax.theory.learning_rate import eta_max


@checked()
def optimizer(
    network: Network,
    momentum: float = 0.9,
    fraction: float = 0.5,
    *,
    data: Array | None = None,
    statistics: str = "batch",
    num_samples: int | None = None,
) -> optax.GradientTransformation:
    r"""Heavy-ball gradient descent at a fraction of a network's largest stable learning rate.

    .. math:: \eta = \mathrm{fraction} \cdot 2 (1 + \mu) / \lambda_{max}

    Args:
        network: The specification; the optimizer is for the parameters of the model that
            :func:`meanfield_jax.build` makes from it.
        momentum: mu of the heavy ball.
        fraction: Fraction of the largest stable learning rate.
        data: A batch of training data, as in :func:`meanfield_jax.analyze`.
        statistics: As in :func:`meanfield_jax.analyze`.
        num_samples: The batch size for i.i.d. inputs, as in :func:`meanfield_jax.analyze`; None:
            the limit of large batches.

    Returns:
        An optax transformation, for ``mf.train(optimizer=...)``, ``nnx.Optimizer``, or
        ``apply`` and ``params`` of :func:`meanfield_jax.functional`.

    Raises:
        SpecError, DataError: if an option or the data are not valid.

    Accuracy:
        That of ``theory.eta_max()`` within its domain (``theory.fisher.within_domain``), and only
        for the squared loss.

    Example:
        >>> import meanfield_jax as mf
        >>> x, labels = mf.data.load("digits", num_samples=200, flatten=True)
        >>> net = mf.mlp([64], inputs=64, outputs=10, norm=mf.BatchNorm())
        >>> rule = mf.optimizer(net, data=x[:100])
        >>> run = mf.train(net, (x, labels), optimizer=rule, epochs=5)
        >>> bool(run.loss[-1] < 0.2 * run.loss[0])
        True

    Source:
        Polyak 1964; Wei, Stokes & Schwab 2019 (arXiv:1903.02606), equation 6.
    """
    theory = analyze(network, data=data, statistics=statistics, num_samples=num_samples)
    if not isinstance(theory.status, Tracer):
        theory.raise_if_failed()
    return optax.sgd(fraction * theory.eta_max(momentum), momentum)


@checked(model=model_or_function)
def learning_rate_for(
    model: nnx.Module | Callable[..., Array],
    x: Array,
    *,
    params: Any = None,
    momentum: float = 0.9,
    fraction: float = 0.5,
    statistics: str = "batch",
) -> Array:
    r"""A fraction of the largest stable learning rate of any model, from its measured spectrum.

    .. math:: \eta = \mathrm{fraction} \cdot 2 (1 + \mu) / \lambda_{max}(F)

    F is the Fisher matrix of the present parameters on one batch. Its largest eigenvalue is found
    by Lanczos, at the cost of about a dozen gradients. The rate is for the squared loss
    (1/2n) sum ||f(x) - y||^2, summed over outputs. With cross-entropy it is not a bound, because
    the curvature is smaller and changes during training.

    Args:
        model: A Flax NNX model, or a pure function ``apply(params, x)``.
        x: A training batch, (n, ...), of the size used in training: small batches have larger
            eigenvalues.
        params: Parameters of ``apply``, any pytree; None for an NNX model, which has its own.
        momentum: mu of the heavy ball; 0 for plain gradient descent.
        fraction: Fraction of the largest stable learning rate.
        statistics: Statistics of a model's BatchNorms, as in
            :func:`meanfield_jax.fisher_operator`. The mode of a pure function is fixed; with
            "frozen", a function that normalizes over the batch is an error.

    Returns:
        The learning rate, (), in the dtype of the outputs.

    Raises:
        SpecError, DataError: if an option or the data are not valid.
        RuntimeError: if the eigenvalue was not found, for example because parameters are NaN.

    Accuracy:
        1e-4 of lambda_max, see :func:`meanfield_jax.top_eigenvalues`.

    Example:
        >>> import jax, meanfield_jax as mf
        >>> from flax import nnx
        >>> net = mf.mlp([64], inputs=8, outputs=3, norm=mf.BatchNorm())
        >>> model = mf.build(net, rngs=nnx.Rngs(0))  # or any other Flax model
        >>> x = jax.random.normal(jax.random.key(0), (100, 8))
        >>> bool(0.1 < mf.learning_rate_for(model, x) < 10)
        True

    Source:
        Polyak 1964; Karakida, Akaho & Amari 2019 (arXiv:1806.01316), section 4.
    """
    if params is None:
        operator = fisher_operator(model, x, statistics=statistics)  # pyright: ignore[reportArgumentType]
    else:
        operator = FisherOperator(model, params, x)
        if statistics == "frozen" and couples_samples(operator):
            cause = "the function normalizes over the batch"
            remedy = "pass the function in evaluation mode, or statistics='batch'"
            raise problem(SpecError, "statistics", statistics, cause, remedy)
    found = top_eigenvalues(operator).raise_if_failed()
    return fraction * eta_max(found.eigenvalues[0], momentum)
