"""The Fisher operator of a Flax NNX model."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from meanfield_jax.arguments import as_given, checked
from meanfield_jax.empirical.fisher import FisherOperator
from meanfield_jax.empirical.generic import dense_layers
from meanfield_jax.empirical.mode import MODES, check_mode
from meanfield_jax.empirical.model import Functional, functional, in_mode
from meanfield_jax.errors import SpecError, problem


@checked(model=as_given)
def fisher_operator(
    model: nnx.Module,
    x: Any,
    *,
    statistics: str = "batch",
    likelihood: str = "gaussian",
    batch_size: int | None = None,
    output: Any = None,
    call: Callable[[Any, Any], Any] | None = None,
) -> FisherOperator:
    """The Fisher information matrix of a Flax NNX model on a batch, as an operator.

    Args:
        model: Any NNX model, from this package or not; its own mode does not matter. Dropout is
            off.
        x: Inputs, (n, *input_shape), or any pytree of arrays whose leading axes run over the
            samples. If the model takes several arguments, a tuple is unpacked into positional
            arguments and a dictionary into keyword arguments.
        statistics: ``"batch"``: BatchNorm normalizes by the statistics of the batch, and their
            derivatives count, as in training. ``"frozen"``: BatchNorm uses its running statistics
            as constants; set them by training or with :func:`calibrate`.
        likelihood: ``"gaussian"`` (squared loss), ``"categorical"`` (cross-entropy) or
            ``"bernoulli"`` (binary cross-entropy), see :class:`FisherOperator`.
        batch_size: Number of samples linearized at a time; only where samples are independent.
        output: Index or key of the output to use, where the model returns several.
        call: How to call the model, ``lambda model, x: ...``, where these rules do not fit it.

    Returns:
        The operator, for use with :func:`top_eigenvalues`, :func:`spectral_density`, :func:`trace`
        or :func:`layer_table`.

    Raises:
        SpecError: if the model would silently be measured in a mode other than the one requested,
            or if an option cannot be used.
        DataError: if the inputs cannot be used.

    Accuracy:
        Products are in full precision; they are compared with dense Jacobians in
        tests/test_any_model.py. A dense layer's part of the product is computed from the Gram
        matrix of its inputs only after the result was found equal to plain differentiation at
        random parameters and inputs.

    Example:
        >>> import jax, meanfield_jax as mf
        >>> from flax import nnx
        >>> net = mf.mlp([64], inputs=8, outputs=3, norm=mf.BatchNorm())
        >>> x = jax.random.normal(jax.random.key(0), (100, 8))
        >>> op = mf.fisher_operator(mf.build(net, rngs=nnx.Rngs(0)), x)
        >>> mf.top_eigenvalues(op, k=3).eigenvalues.shape
        (3,)
    """
    if not isinstance(model, nnx.Module):
        remedy = "pass an nnx.Module, or use FisherOperator(apply, params, x)"
        raise problem(SpecError, "model", type(model).__name__, "not a Flax NNX model", remedy)
    if not isinstance(statistics, str) or statistics not in MODES:
        cause, remedy = "a Flax model has no such mode", "use 'batch' or 'frozen'"
        raise problem(SpecError, "statistics", statistics, cause, remedy)
    model = in_mode(model, statistics)
    apply, params = functional(model, call)
    op = FisherOperator(apply, params, x, likelihood, batch_size, output)
    running = nnx.state(model, nnx.BatchStat)

    def moved() -> Functional:
        other = nnx.clone(model)
        nnx.update(other, jax.tree.map(lambda leaf: 2 * leaf + 1, running))
        return functional(other, call)[0]

    remedy = "do not pass use_running_average in the call, but use model.train() or model.eval()"
    check_mode(op, statistics, running, moved, remedy)
    return op.replace(dense=dense_layers(op))
