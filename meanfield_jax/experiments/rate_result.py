"""Learning rates with their meaning: what ``learning_rate`` returns, and its rules."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from meanfield_jax.empirical.loss import Loss
from meanfield_jax.pytree import pytree, static
from meanfield_jax.theory.rates import (
    CROSS_ENTROPY,
    SIGNS_WITHIN_SAMPLES,
    Rule,
    rates,
)

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

OWN_LOSS = (
    "the rules were tested on the squared loss; with another one they are those of its curvature "
    "at the start: no_spike is a first rate, and no rate is a bound"
)


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


def rates_by_rule(
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


def cautions(rule: Rule | None, loss: Loss) -> tuple[str, ...]:
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


def name_of(loss: Loss) -> str:
    """What a result says of its loss: the name, or the formula of a function."""
    if isinstance(loss, str):
        return loss
    return f"(1/n) sum {getattr(loss, '__name__', type(loss).__name__)}(f, y)"
