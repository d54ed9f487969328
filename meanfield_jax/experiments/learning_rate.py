"""The learning rate of a network or a model: one function, and its result.

One file, because prediction, measurement and what is printed share the result's fields.
"""

from __future__ import annotations

import dataclasses
import html
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.core import Tracer

from meanfield_jax.arguments import as_given, checked, momenta
from meanfield_jax.checks import check_choice, check_data
from meanfield_jax.empirical.draws import drawn_eigenvalues
from meanfield_jax.empirical.fisher import FisherOperator
from meanfield_jax.empirical.generic import couples_samples, layers_after_norms
from meanfield_jax.empirical.lanczos import top_eigenvalues
from meanfield_jax.empirical.loss import (
    LOSSES,
    Loss,
    check_loss,
    checked_targets,
    curvature,
    mean_loss,
)
from meanfield_jax.empirical.model import path_name
from meanfield_jax.empirical.nnx_model import fisher_operator
from meanfield_jax.empirical.trace import trace
from meanfield_jax.errors import DataError, SpecError, problem
from meanfield_jax.network import Network, normalizes_over_batch
from meanfield_jax.pytree import pytree, static
from meanfield_jax.theory.after_norms import AfterNorms, after_norms
from meanfield_jax.theory.analyze import Theory, analyze
from meanfield_jax.theory.learning_rate import eta_max
from meanfield_jax.theory.rates import (
    ALIGNED,
    CAREFUL,
    CROSS_ENTROPY,
    LITTLE_IN_COMMON,
    NO_NORM,
    SIGNS_WITHIN_SAMPLES,
    Rule,
    decisive_eigenvalue,
    first_rate,
    heavy_ball,
    linear,
    rates,
    reasons,
    sign_descent,
)
from meanfield_jax.theory.stability import of_rate_1

MEANINGS = dict(
    quadratic="stable where the loss is quadratic, near a minimum",
    no_spike="from a random start, the loss stays below twice its first value",
    bounded="from a random start, training diverges above it",
)

FORMULAS = dict(
    squared="(1/2n) sum ||f - y||^2",
    cross_entropy="-(1/n) sum log softmax(f)[y]",
    bernoulli="(1/n) sum of binary cross-entropies",
)

INFORMATION = dict(
    squared=lambda num_outputs: 1.0,
    cross_entropy=lambda num_outputs: 1 / num_outputs,
    bernoulli=lambda num_outputs: 0.25,
)
"""Curvature of each loss in units of the squared one's, where all outputs are equal."""

OWN_LOSS = (
    "the rules were tested on the squared loss; with another one they are those of its curvature "
    "at the start: no_spike is a first rate, and no rate is a bound"
)

PROBES = 6
"""Number of probes of a trace, good to some 20 %."""

TOLERANCE = 1e-2
"""Relative accuracy of measured eigenvalues; the rule itself is less accurate."""


class Number:
    """Arithmetic with the recommended rate, so that a result goes where a number does."""

    recommended: Array

    def __float__(self) -> float:
        return float(self.recommended)

    def __jax_array__(self) -> Array:
        return jnp.asarray(self.recommended)

    def __mul__(self, other: Any) -> Any:
        return self.recommended * other

    def __rmul__(self, other: Any) -> Any:
        return other * self.recommended

    def __truediv__(self, other: Any) -> Any:
        return self.recommended / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / self.recommended

    def __add__(self, other: Any) -> Any:
        return self.recommended + other

    def __radd__(self, other: Any) -> Any:
        return other + self.recommended

    def __sub__(self, other: Any) -> Any:
        return self.recommended - other

    def __rsub__(self, other: Any) -> Any:
        return other - self.recommended

    def __neg__(self) -> Any:
        return -self.recommended


@pytree(eq=False, repr=False)
class LearningRate(Number):
    """Learning rates of a network, with their meaning; :func:`learning_rate` returns it.

    It can be used in place of a number, which is then ``recommended``: ``float(rate)``,
    ``optax.sgd(rate, 0.9)``, ``optax.cosine_decay_schedule(rate, 1000)``, ``0.5 * rate``.

    Attributes:
        recommended: The rate to start from: ``no_spike``, times the fraction that was asked for.
            Where samples have little in common it is half of that; where gamma is small, half of
            the smaller one of ``no_spike`` and ``quadratic``.
        quadratic: z / lambda_max: stable where the loss is quadratic, near a minimum.
        no_spike: The largest rate at which, from a random start, the loss does not exceed twice its
            first value.
        bounded: The rate above which training from a random start diverges.
        lambda_max: The largest eigenvalue of the Fisher matrix.
        lambda_after_norms: That of its part for the parameters that no normalization follows.
        loss: ``"squared"``, ``"cross_entropy"`` or ``"bernoulli"``, or the formula of another.
        source: ``"theory"``, ``"measured"`` or, for example, ``"8 drawn networks"``.
        num_outputs: C.
        decisive: Paths of the layers that no normalization follows.
        products: The number of products with the Fisher matrix, 0 for theory.
        seconds: How long it took.
        reasons: Why the rates from a random start may be wrong; () if nothing is known.
        quadratic_reason: Why ``lambda_max`` and ``quadratic`` may be wrong; "" if nothing is known.
    """

    recommended: Array
    quadratic: Array
    no_spike: Array
    bounded: Array
    lambda_max: Array
    lambda_after_norms: Array
    loss: str = static()
    source: str = static()
    num_outputs: int = static()
    decisive: tuple[str, ...] = static(default=())
    products: int = static(default=0)
    seconds: float = static(default=0.0)
    reasons: tuple[str, ...] = static(default=())
    quadratic_reason: str = static(default="")

    @property
    def domain(self) -> str:
        """The reasons in one sentence; "" if the rates can be trusted."""
        return "; ".join(self.reasons)

    def for_mean_over_outputs(self) -> Array:
        """The recommended rate for a squared loss that is also divided by the number of outputs.

        For ``optax.l2_loss(outputs, targets).mean()``. For ``((outputs - targets) ** 2).mean()``,
        which lacks the factor 1/2, take half of it.

        Returns:
            C times the recommended rate, ().
        """
        return self.recommended * self.num_outputs

    @property
    def _formula(self) -> str:
        return FORMULAS.get(self.loss, self.loss)

    def _rows(self) -> list[tuple[str, str, str]]:
        """Name, number and meaning of each rate."""
        named = dict(recommended="the rate to start from") | MEANINGS
        values = {name: float(getattr(self, name)) for name in named}
        return [
            (name, f"{value:.3g}", named[name])
            for name, value in values.items()
            if not np.isnan(value)
        ]

    def _about(self) -> str:
        """What decides, and how it is known."""
        effort = f" with {self.products} products" if self.products else ""
        layers = ", ".join(self.decisive[:4]) + ", ..." * (len(self.decisive) > 4)
        whole, after = float(self.lambda_max), float(self.lambda_after_norms)
        eigenvalues = f"lambda_max {whole:.4g}, after the norms {after:.4g} ({layers})"
        return f"{self.source}{effort} in {self.seconds:.2g} s; {eigenvalues}"

    def _cautions(self) -> tuple[str, ...]:
        if not self.quadratic_reason:
            return self.reasons
        return (*self.reasons, f"quadratic is that of a wide network; {self.quadratic_reason}")

    def __repr__(self) -> str:
        if isinstance(self.recommended, Tracer) or jnp.ndim(self.recommended):
            return f"LearningRate({self.recommended})"
        lines = [f"LearningRate {float(self):.4g} for the loss {self._formula}"]
        lines += [f"  {name:<12} {number:>9}  {text}" for name, number, text in self._rows()[1:]]
        lines.append(f"  {self._about()}")
        lines += [f"  caution: {reason}" for reason in self._cautions()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td>{name}</td><td>{number}</td><td style='text-align:left'>{text}</td></tr>"
            for name, number, text in self._rows()
        )
        notes = [self._about(), *(f"caution: {reason}" for reason in self._cautions())]
        head = f"Learning rate for the loss {self._formula}"
        below = "<br>".join(html.escape(note) for note in notes)
        return f"<b>{html.escape(head)}</b><table>{cells}</table><small>{below}</small>"


Optimizer = optax.GradientTransformation | Callable[[float], optax.GradientTransformation]


@checked(model=as_given, optimizer=as_given, x=as_given, y=as_given, momentum=momenta)
def learning_rate(
    model: Network | nnx.Module | Callable[..., Array],
    x: Any = None,
    *,
    params: Any = None,
    y: Array | None = None,
    optimizer: str | Optimizer = "heavy_ball",
    momentum: float | Array = 0.9,
    loss: Loss = "squared",
    statistics: str = "batch",
    num_samples: int | None = None,
    draws: int | None = None,
    fraction: float = 1.0,
) -> LearningRate:
    r"""The learning rate with which to train a network, or any model, from a random start.

    Three rates have a meaning. Near a minimum of the squared loss the largest stable rate is
    z / lambda_max(F), where z is the optimizer's :func:`stability_limit`, 2 (1 + mu) for the heavy
    ball. From a random start that is often far too careful: a step that is too large throws up the
    weights of a layer before a normalization, its curvature falls like the inverse square of their
    norm, and training goes on. What decides is F restricted to the parameters that no normalization
    follows (the last layer, and the scale and offset of the last norm):

    .. math:: \eta_{no\,spike} = (1 + \sqrt 2) / \lambda_{after}, \quad
        \eta_{bounded} = (6.45 - 2.1 \mu) / \lambda_{after}

    The first is where the first step doubles the loss of the steepest direction; it is not above
    z / lambda_after. The numbers in the second were fitted. Norms within each sample make both
    smaller, see :func:`meanfield_jax.theory.rates.rates`.

    Args:
        model: A :class:`Network`, for which the rates are predicted in milliseconds, without a
            draw; a Flax NNX model, or a pure function ``apply(params, x)``, for which they are
            measured with some twenty products with the Fisher matrix.
        x: A batch of the size used in training, (n, ...). A network may do without: then inputs are
            i.i.d. with unit variance.
        params: Parameters of ``apply``, any pytree.
        y: Targets, (n, C), or labels (n,), for a measurement with Adam; whatever the loss takes, if
            that is a function.
        optimizer: ``"heavy_ball"``, ``"adam"``, or any linear transformation of optax (or a
            function from a rate to one), made with a learning rate of 1.
        momentum: mu of the heavy ball; 0 for plain gradient descent.
        loss: ``"squared"``, (1/2n) sum ||f - y||^2, summed over outputs; ``"cross_entropy"``, the
            mean over samples of -log softmax(f)[y]; ``"bernoulli"``, summed over outputs; or any
            twice differentiable, convex function ``loss(outputs, y)``, which returns a loss for
            each sample or their mean. For a network its curvature is that where all outputs are 0.
        statistics: As in :func:`analyze` for a network, :func:`fisher_operator` for a model.
        num_samples: The batch size where ``x`` is left out; None for large batches.
        draws: For a network, the number of networks to draw: eigenvalues are then those of the
            median draw, see :func:`drawn_eigenvalues`. None: those of the wide limit.
        fraction: ``recommended`` is this fraction of the rate to start from.

    Returns:
        The rates, which can be used in place of a number. For a network they can be vmapped over
        its numbers and differentiated in them.

    Raises:
        SpecError, DataError: if an option, the model or the data are not valid, or if there is no
            rule for the optimizer.
        RuntimeError: if the theory, or a search for an eigenvalue, failed.

    Accuracy:
        See benchmarks/rates.py. Eigenvalues are measured to 1 %.

    Example:
        >>> import jax, optax, meanfield_jax as mf
        >>> net = mf.mlp([200] * 10, inputs=64, outputs=10, norm=mf.BatchNorm())
        >>> rate = mf.learning_rate(net)
        >>> round(float(rate), 2), round(float(rate.quadratic), 2), rate.decisive
        (0.07, 0.11, ('layers/28', 'layers/30'))
        >>> rule = optax.sgd(rate, momentum=0.9)

    Source:
        Near a minimum: Polyak 1964. Scale invariance: Arora, Li & Lyu 2018 (arXiv:1812.03981). The
        rule from a random start is this package's own.
    """
    check_loss(loss)
    start = time.perf_counter()
    rule = rule_of(optimizer, momentum)
    if isinstance(model, Network):
        found = _predicted(model, x, y, rule, loss, statistics, num_samples, draws)
    else:
        found = _measured(model, params, x, y, rule, loss, statistics)
    seconds = time.perf_counter() - start
    # an integer may be too large for JAX
    fraction = fraction if isinstance(fraction, Tracer) else float(fraction)
    recommended = found.recommended * fraction
    return dataclasses.replace(found, recommended=recommended, seconds=seconds)


def rule_of(optimizer: Any, momentum: float | Array) -> Rule | None:
    """The rule of a linear optimizer; None for Adam."""
    if isinstance(optimizer, str):
        check_choice("optimizer", optimizer, ("heavy_ball", "adam"))
        return heavy_ball(momentum) if optimizer == "heavy_ball" else None
    try:
        made = of_rate_1(optimizer)
        state = made.init(jnp.zeros(()))
    except (TypeError, ValueError, AttributeError):
        state = None
    adam = jax.tree.leaves(state, is_leaf=_is_adam)
    return None if any(map(_is_adam, adam)) else linear(optimizer)


def _is_adam(state: Any) -> bool:
    return isinstance(state, optax.ScaleByAdamState)


def _predicted(
    network: Network,
    x: Any,
    y: Any,
    rule: Rule | None,
    loss: Loss,
    statistics: str,
    num_samples: Any,
    draws: int | None,
) -> LearningRate:
    """The rates of a specification, by theory or from drawn networks."""
    given: dict[str, Any] = dict(data=x, statistics=statistics, num_samples=num_samples)
    theory = analyze(network, **given, draws=draws)
    if not isinstance(theory.status, Tracer):
        theory.raise_if_failed()
    dtype = theory.kernel.dtype
    batch = None if x is None else check_data(x).astype(dtype)
    after = after_norms(network, batch, statistics, num_samples)
    information = _information(loss, network.num_outputs, batch, y)
    lambda_max = information * theory.fisher.lambda_max
    drawn = None if draws is None else _drawn_after(network, after, draws, given)
    lambda_after = information * decisive_eigenvalue(theory, after, drawn)
    over_batch = statistics == "batch" and normalizes_over_batch(network.body)
    found = (lambda_max, lambda_after, over_batch)
    rates = _rates(rule, loss, *found, lambda: sign_descent(theory))
    traced = isinstance(lambda_after, Tracer)
    return LearningRate(
        recommended=first_rate(theory, rates),
        **rates,
        lambda_max=lambda_max,
        lambda_after_norms=lambda_after,
        loss=_name(loss),
        source="theory" if draws is None else f"{draws} drawn networks",
        num_outputs=network.num_outputs,
        decisive=() if traced else after.paths,
        reasons=() if traced else (*reasons(theory, after), *_cautions(rule, loss)),
        quadratic_reason="" if traced else _outside(theory),
    )


def _information(loss: Loss, num_outputs: int, x: Array | None, y: Any) -> Any:
    """The largest eigenvalue of the loss's mean curvature where all outputs are 0."""
    if isinstance(loss, str):
        return INFORMATION[loss](num_outputs)
    for name, value in dict(x=x, y=y).items():
        if value is None:
            cause = "the curvature of a loss that is a function depends on the targets"
            remedy = "pass a batch x and its targets y, or the name of a loss"
            raise problem(SpecError, name, value, cause, remedy)
    assert x is not None
    mean = curvature(loss, jnp.zeros((len(x), num_outputs), x.dtype), y).mean(0)
    return jnp.linalg.eigvalsh(mean)[-1]


def _outside(theory: Theory) -> str:
    """Why lambda_max of a network, or of several, cannot be trusted; "" if it can."""
    if jnp.ndim(theory.status) == 0:
        return theory.fisher.domain_reason()
    inside = np.all(np.asarray(theory.fisher.within_domain))
    return "" if inside else "some of the networks are outside of its domain"


def _drawn_after(network: Network, after: AfterNorms, draws: int, given: dict[str, Any]) -> Array:
    """The largest eigenvalue of the median draw for the parameters after the norms."""
    if isinstance(after.followed, Tracer):
        cause, remedy = "which layers count is not known while tracing", "leave it out under jit"
        raise problem(SpecError, "draws", draws, cause, remedy)
    found = drawn_eigenvalues(network, **given, draws=draws, layers=after.paths)
    return found.raise_if_failed().lambda_max.astype(after.lambda_max.dtype)


def _measured(
    model: Any, params: Any, x: Any, y: Any, rule: Rule | None, loss: Loss, statistics: str
) -> LearningRate:
    """The rates of a model, by Lanczos."""
    if x is None:
        raise problem(DataError, "x", x, "a model is measured on data", "pass a training batch")
    operator = operator_of(model, params, x, y, loss, statistics)
    layers = layers_after_norms(operator)
    whole = top_eigenvalues(operator, tol=TOLERANCE).raise_if_failed()
    lambda_max = whole.eigenvalues[0]
    eta_max(lambda_max)  # refuses 0

    def by_signs() -> Array:
        scaled = _preconditioned(operator, layers, y, loss)
        return 2 / top_eigenvalues(scaled, tol=TOLERANCE).raise_if_failed().eigenvalues[0]

    after = _after_norms(operator, layers, lambda_max)
    return LearningRate(
        **_rates_of(operator, rule, loss, lambda_max, after, by_signs),
        lambda_max=lambda_max,
        loss=_name(loss),
        source="measured",
        num_outputs=int(np.prod(operator.output_shape[1:])),
        decisive=layers,
        products=int(whole.num_matvecs) + after.products,
    )


def _name(loss: Loss) -> str:
    """What a result says of its loss: the name, or the formula of a function."""
    if isinstance(loss, str):
        return loss
    return f"(1/n) sum {getattr(loss, '__name__', type(loss).__name__)}(f, y)"


class _After(NamedTuple):
    """What is measured of the parameters that no normalization follows.

    Attributes:
        lambda_max: The eigenvalue that decides from a random start, ().
        products: How many products that took.
        notes: Why the rates may be wrong.
    """

    lambda_max: Array
    products: int
    notes: tuple[str, ...]


def _after_norms(
    operator: FisherOperator, layers: tuple[str, ...], lambda_max: Array | None
) -> _After:
    """Measures the eigenvalue that decides; without a norm it is ``lambda_max``, if known."""
    everything = all(any(_inside(path, layer) for layer in layers) for path in operator.paths)
    if everything and lambda_max is not None:
        return _After(lambda_max, 0, (NO_NORM,))
    block = operator.block(*layers)
    part = top_eigenvalues(block, tol=TOLERANCE, vectors=True).raise_if_failed()
    found = _After(part.eigenvalues[0], int(part.num_matvecs), (NO_NORM,) * everything)
    assert part.eigenvectors is not None
    if not everything and _common(block, part.eigenvectors[0]) < 0.5:
        aligned = trace(block, num_probes=PROBES).raise_if_failed()
        outputs = np.prod(operator.output_shape[1:])
        largest = jnp.maximum(found.lambda_max, ALIGNED * aligned.value / outputs)
        products = found.products + int(aligned.num_matvecs)
        found = _After(largest, products, (LITTLE_IN_COMMON,))
    if float(found.lambda_max) <= 0:
        cause = "no curvature: the outputs do not depend on the last layers' parameters"
        value = float(found.lambda_max)
        raise problem(SpecError, "lambda_after_norms", value, cause, "check for weights of 0")
    return found


def _rates_of(
    operator: FisherOperator,
    rule: Rule | None,
    loss: Loss,
    lambda_max: Array,
    after: _After,
    by_signs: Callable[[], Array] | None = None,
) -> dict[str, Any]:
    """The fields of a result that follow from what was measured of a model."""
    over_batch = bool(couples_samples(operator))
    found = _rates(rule, loss, lambda_max, after.lambda_max, over_batch, by_signs)
    return dict(
        **found,
        recommended=(CAREFUL if LITTLE_IN_COMMON in after.notes else 1.0) * found["no_spike"],
        lambda_after_norms=after.lambda_max,
        reasons=(*after.notes, *_cautions(rule, loss)),
    )


def measured_again(
    rate: LearningRate, operator: FisherOperator, rule: Rule, loss: Loss, steps: int
) -> LearningRate:
    """The rates of a model whose parameters have changed.

    Only the parameters after the norms are measured: ``lambda_max`` and ``quadratic`` stay as they
    were, unless there is no norm.

    Args:
        rate: What :func:`learning_rate` returned before.
        operator: The operator of the model as it is now.
        rule: That of the optimizer.
        loss: The loss.
        steps: The number of steps since then.

    Returns:
        The rates of the model as it is now, with a fraction of 1.
    """
    start = time.perf_counter()
    after = _after_norms(operator, rate.decisive, None)
    lambda_max = after.lambda_max if NO_NORM in after.notes else rate.lambda_max
    return dataclasses.replace(
        rate,
        **_rates_of(operator, rule, loss, lambda_max, after),
        lambda_max=lambda_max,
        source=f"measured after {steps} steps",
        products=rate.products + after.products,
        seconds=rate.seconds + time.perf_counter() - start,
    )


def _rates(
    rule: Rule | None,
    loss: Loss,
    lambda_max: Array,
    lambda_after: Array,
    over_batch: bool,
    by_signs: Callable[[], Array] | None,
) -> dict[str, Any]:
    """The three rates; NaN where there is no rule."""
    unknown = jnp.full_like(lambda_after, jnp.nan)
    if rule is None:
        assert by_signs is not None
        factor = 1.0 if over_batch else SIGNS_WITHIN_SAMPLES
        return dict(quadratic=unknown, no_spike=factor * by_signs(), bounded=unknown)
    found = rates(rule, lambda_max, lambda_after, over_batch)
    if loss == "squared":
        return found
    if not isinstance(loss, str):
        return found | dict(bounded=unknown)
    largest = CROSS_ENTROPY / rule.gain
    return found | dict(no_spike=jnp.minimum(largest, found["no_spike"]), bounded=unknown)


def _cautions(rule: Rule | None, loss: Loss) -> tuple[str, ...]:
    """What is known of rules that are less certain."""
    found = []
    if rule is None:
        found.append(
            "Adam: only no_spike has a rule, mostly good to 35 % with BatchNorm, else to 2 times"
        )
        if loss != "squared":
            found.append("Adam's rule was tested on the squared loss only")
    elif not isinstance(loss, str):
        found.append(OWN_LOSS)
    elif loss != "squared":
        found.append(
            "with cross-entropy the growth of the last layer, scale and offset limits training, "
            "not curvature: no_spike is a safe first rate, and no rate is a bound"
        )
    return tuple(found)


def operator_of(
    model: Any, params: Any, x: Any, y: Any, loss: Loss, statistics: str
) -> FisherOperator:
    """The curvature of the loss of a model."""
    if isinstance(loss, str):
        return _fisher(model, params, x, LOSSES[loss], statistics)
    if y is None:
        cause = "the curvature of a loss that is a function depends on the targets"
        raise problem(SpecError, "y", y, cause, "pass those of the batch x")
    return _fisher(model, params, x, "gaussian", statistics).with_loss(loss, y)


def _fisher(model: Any, params: Any, x: Any, likelihood: str, statistics: str) -> FisherOperator:
    """The Fisher matrix of a model."""
    if params is None:
        if not isinstance(model, nnx.Module):
            cause = "neither a Network nor a Flax NNX module, and there are no params"
            remedy = "pass one of these, or apply with params="
            raise problem(SpecError, "model", type(model).__name__, cause, remedy)
        return fisher_operator(model, x, statistics=statistics, likelihood=likelihood)
    operator = FisherOperator(model, params, x, likelihood)
    if statistics == "frozen" and couples_samples(operator):
        cause = "the function normalizes over the batch"
        remedy = "pass the function in evaluation mode, or statistics='batch'"
        raise problem(SpecError, "statistics", statistics, cause, remedy)
    return operator


_change = jax.jit(FisherOperator.change)


def _common(block: FisherOperator, vector: Array) -> float:
    """How much of the outputs' change along an eigenvector all samples have in common, 0 to 1."""
    found = _change(block, vector)
    change = np.asarray(found, float).reshape(block.num_samples, -1)
    return float(len(change) * np.sum(change.mean(0) ** 2) / np.sum(change**2))


def _inside(path: str, layer: str) -> bool:
    """Whether an array of parameters belongs to a layer."""
    return path == layer or path.startswith(layer + "/")


def _preconditioned(
    operator: FisherOperator, layers: tuple[str, ...], y: Any, loss: Loss
) -> FisherOperator:
    """P^(-1/2) F P^(-1/2) for these layers, where P is the gradient's rms in each array."""
    if y is None:
        remedy = "pass the batch's targets"
        raise problem(SpecError, "y", y, "Adam's first steps depend on the gradient", remedy)
    y = checked_targets(loss, y, operator.output_shape, operator.dtype)

    def value(params: Any) -> Array:
        return mean_loss(loss, operator.evaluate(params, operator.x), y)

    slopes = jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(value))(operator.params))
    sizes = {path_name(path): jnp.sqrt(jnp.mean(slope**2)) for path, slope in slopes}
    kept = {path: size for path, size in sizes.items() if any(_inside(path, la) for la in layers)}
    return operator.rescaled({path: 1 / jnp.sqrt(size) for path, size in kept.items()})
