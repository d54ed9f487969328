"""ProxyNorm: a norm of each sample, an activation, and the other effects of BatchNorm."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel import safe
from meanfield_jax.kernel.gaussian import clipped, hermite_coefficients, mehler
from meanfield_jax.layers.activation import Activation
from meanfield_jax.layers.base import (
    Injection,
    Kernel,
    Layer,
    M,
    Problem,
    Record,
    Rows,
    Shape,
    Signal,
    joined,
    layer,
    variance_problems,
)
from meanfield_jax.layers.combine import located
from meanfield_jax.layers.layer_norm import LayerNorm
from meanfield_jax.layers.norm import Norm, constant, normalize, of_rank, statistics_dtype
from meanfield_jax.pytree import static

NUM_QUANTILES = 256

_LEVELS = (np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES
QUANTILES = np.array([statistics.NormalDist().inv_cdf(level) for level in _LEVELS])
"""Points of N(0, 1) that represent equal fractions of its mass."""


@layer
class ProxyNorm(Layer):
    r"""Norm, activation, and a normalization of the output by the moments of a Gaussian proxy.

    .. math:: \frac{\phi(\gamma y + \beta) - \mathrm{E} \phi(\gamma Y + \beta)}
        {\sqrt{\mathrm{Var} \phi(\gamma Y + \beta) + \epsilon}}, \quad
        Y \sim N(\tilde\beta, (1 + \tilde\gamma)^2)

    Here y is the normalized value, and gamma and beta are the norm's scale and offset. Like
    BatchNorm, it fixes the mean and variance of every channel after the activation, whatever gamma
    and beta are; unlike BatchNorm, it uses no other sample, so that training and evaluation are the
    same. It cannot know the mean that biases (``bias_var``) give a channel before the norm. There
    is one beta tilde and one gamma tilde per channel; they start at 0 and are meant to be decayed
    to 0, see :class:`ProxyNormModule`. Use it in place of a norm: ``mf.mlp(..., norm=ProxyNorm())``
    puts the network's activation inside.

    Rule, with m_a = E[phi(u_a)] at the variance of u_a, mu the mean of the proxy and s^2 its
    variance plus eps: K <- (E[phi phi] - mu (m_a + m_b) + mu^2) / s^2; T <- T E[phi' phi'] / s^2.
    beta tilde, gamma tilde and the dependence of mu and s on gamma and beta add O(1) to T. This
    contribution has a row of its own beside the norm's, and it may be negative, because mu and s
    counteract gamma and beta.

    Attributes:
        norm: A norm of each sample by itself, LayerNorm or GroupNorm.
        activation: The activation after the norm.
        eps: Added to the variance of the proxy.
        trainable: Whether beta tilde and gamma tilde are parameters.

    Source:
        Labatie, Masters, Eaton-Rosen & Luschi 2021 (arXiv:2106.03743), section 5.

    Accuracy:
        Network and theory use the same 256 quantiles: for ReLU and beta = 0 the mean is 0.09 % and
        the variance 0.65 % low (tests/test_proxy_norm.py). The contribution of the layer's own
        parameters is computed by Mehler's series.

    Example:
        >>> import meanfield_jax as mf
        >>> for norm in (mf.LayerNorm(), mf.ProxyNorm(mf.LayerNorm())):
        ...     net = mf.mlp([1000] * 3, inputs=784, outputs=10, norm=norm, bias_var=0.0)
        ...     order = mf.analyze(net, num_samples=200).order_parameters
        ...     print(f"{order.q_hat_xy[-1] / order.q_hat[-1]:.3f}")  # of two inputs' power
        0.605
        0.000
    """

    norm_name: ClassVar[str | None] = "proxy"
    abbreviation: ClassVar[str] = "LN+PN"

    norm: Norm = LayerNorm()
    activation: Activation = Activation("relu")
    eps: float | Array = 0.03
    trainable: bool = static(default=True)

    def __post_init__(self):
        if not isinstance(self.activation, (Activation, type)):
            object.__setattr__(self, "activation", Activation(self.activation))
        super().__post_init__()

    def output(self, signal: Signal) -> Signal:
        if not isinstance(self.norm, Norm) or self.norm.over_batch:
            cause, remedy = "must normalize each sample by itself", "use LayerNorm or GroupNorm"
            raise problem(SpecError, "ProxyNorm.norm", type(self.norm).__name__, cause, remedy)
        return located("activation", self.activation, located("norm", self.norm, signal))

    def num_parameters(self, shape: Shape) -> int:
        own = 2 * math.prod(self.norm.parameter_shape(shape)) if self.trainable else 0
        return self.norm.num_parameters(shape) + own

    def propagate(self, kernel: Kernel[M], perturbations: Any = None) -> tuple[Kernel[M], Any]:
        of_norm, of_proxy = perturbations or (None, None)
        normalized, record = self.norm.propagate(kernel, of_norm)
        after, own = super().propagate(normalized, of_proxy)
        return after, (record, own)

    def rule(self, kernel: Kernel) -> tuple[Kernel, Injection | None]:
        """The rule of activation and proxy, on the kernel after the norm."""
        phi, dtype = self.activation.nonlinearity, kernel.dtype
        gamma = jnp.asarray(self.norm.gamma, dtype)
        beta = jnp.zeros((), dtype) if kernel.mean is None else kernel.mean

        def proxy(gamma: Array, beta: Array) -> tuple[Array, Array]:
            mean, var = proxy_statistics(phi.function, gamma, beta)
            return mean, jnp.sqrt(var + self.eps)

        mean, std = proxy(gamma, beta)
        mean_changes, std_changes = jax.jacfwd(proxy, argnums=(0, 1))(gamma, beta)

        covariance = kernel.covariance
        deviation = safe.sqrt(covariance.diagonal())
        value, slope, moved, _ = hermite_coefficients(phi, deviation, beta)
        mean_a, mean_b = covariance.of_members(value[0])
        plain = kernel.activated(phi)
        after = plain.replace(
            covariance=(plain.covariance - mean * (mean_a + mean_b - mean)) / std**2,
            tangent=plain.tangent / std**2,
        )
        if not (self.trainable or self.norm.trainable):
            return after, None

        # functions of a value, by their Hermite coefficients: derivatives of the output with
        # respect to gamma and beta, times std. The norm has injected the direct part already;
        # beta tilde and gamma tilde change mean and std gamma times as much as beta and gamma do
        output = value.at[0].add(-mean) / std
        functions, weights = [], []
        for direct, dmean, dstd in zip(
            (safe.divide(deviation, gamma)[None] * moved, slope),
            mean_changes,
            std_changes,
            strict=True,
        ):
            by_proxy = (dstd * output).at[0].add(dmean)
            functions += [direct - by_proxy, direct, by_proxy]
            norm, own = float(self.norm.trainable), float(self.trainable)
            weights += [norm, -norm, own * gamma**2]

        def injected(cov: Array) -> Array:
            correlation = clipped(safe.divide(cov, deviation_a * deviation_b))
            return mehler(first, second, correlation) / std**2

        deviation_a, deviation_b = covariance.of_members(deviation)
        ends = [jax.vmap(covariance.of_members)(function) for function in functions]
        first = [weight * a for weight, (a, _) in zip(weights, ends, strict=True)]
        second = [b for _, b in ends]
        return after, Injection(offset=covariance.map(injected))

    def normalized(self, records: Any, after: bool, statistics: str) -> tuple[Any, bool]:
        return super().normalized(records, after, statistics)[0], True

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        return ProxyNormModule(self, shape, rngs)

    def rows(self, records: Any, read: Callable[[Record], Rows]) -> Rows:
        norm, own = records
        return joined([self.norm.rows(norm, read), super().rows(own, read)])

    def labels(self, records: Any, path: str) -> list[tuple[str, Layer]]:
        norm, own = records
        return [*self.norm.labels(norm, f"{path}/norm"), *super().labels(own, path)]

    def children(self) -> Mapping[str, Layer]:
        return {"norm": self.norm, "activation": self.activation}

    def changed(self, change: Callable[[Layer], Layer]) -> Layer:
        norm, activation = self.norm.changed(change), self.activation.changed(change)
        return self.replace(norm=norm, activation=activation)

    def around(self, weights: Layer | None, activation: Layer | None) -> tuple[Layer, ...]:
        own = self if activation is None else self.replace(activation=activation)
        return (own,) if weights is None else (weights, own)

    def opened(self, norm: Layer | None) -> tuple[Layer | None, ...]:
        return None, self.activation

    def value_problems(self) -> Iterator[Problem]:
        yield from variance_problems(self, "eps")


class ProxyNormModule(nnx.Module):
    """The Flax module of :class:`ProxyNorm`; the same in training and evaluation.

    Attributes:
        norm: The norm's module; its scale and offset are read there.
        beta_tilde, gamma_tilde: Offset and scale of the proxy, (channels,). They can be decayed to
            0, as published, by the rule in the example.

    Example:
        >>> import jax, meanfield_jax as mf, optax
        >>> def tildes(params):
        ...     names = jax.tree_util.keystr
        ...     return jax.tree.map_with_path(lambda path, _: "tilde" in names(path), params)
        >>> rule = optax.chain(optax.add_decayed_weights(1e-3, mask=tildes), optax.sgd(0.1, 0.9))
    """

    def __init__(self, spec: ProxyNorm, shape: Shape, rngs: nnx.Rngs):
        self.norm: Any = spec.norm.build(shape, rngs)
        for name in ("scale", "bias"):
            if not isinstance(getattr(self.norm, name, None), nnx.Variable):
                given, cause = type(self.norm).__name__, f"its module has no {name}"
                remedy = "use LayerNorm or GroupNorm"
                raise problem(SpecError, "ProxyNorm.norm", given, cause, remedy)
        self.activation = spec.activation.nonlinearity.function
        variable = nnx.Param if spec.trainable else nnx.Variable
        size = spec.norm.parameter_shape(shape)
        self.beta_tilde, self.gamma_tilde = variable(jnp.zeros(size)), variable(jnp.zeros(size))
        self.eps = constant(spec.eps)

    def __call__(self, x: Array) -> Array:
        """Maps x of shape (samples, *positions, channels) to the same shape and dtype."""
        return proxy_normalize(
            self.norm(x),
            self.activation,
            self.norm.scale[...],
            self.norm.bias[...],
            self.beta_tilde[...],
            self.gamma_tilde[...],
            self.eps,
        )


def proxy_normalize(
    y: Array,
    function: Callable[[Array], Array],
    scale: Array,
    bias: Array,
    beta_tilde: Array,
    gamma_tilde: Array,
    eps: Array | float,
) -> Array:
    """(phi(y) - mean) / sqrt(variance + eps), with those of phi(scale Y + bias), in y's dtype."""
    mean, var = proxy_statistics(function, scale, bias, beta_tilde, gamma_tilde)
    value = function(y.astype(statistics_dtype(y)))
    return normalize(value, mean, var, 1.0, 0.0, eps).astype(y.dtype)


def proxy_statistics(
    function: Callable[[Array], Array],
    scale: Array,
    bias: Array,
    beta_tilde: Array | float = 0.0,
    gamma_tilde: Array | float = 0.0,
) -> tuple[Array, Array]:
    """Mean and variance of phi(scale Y + bias), Y ~ N(beta_tilde, (1 + gamma_tilde)^2).

    Args:
        function: phi, elementwise.
        scale: (channels,) or a scalar, in float32 or float64.
        bias: Likewise.
        beta_tilde: Likewise.
        gamma_tilde: Likewise.

    Returns:
        Mean and variance over the 256 quantiles of Y, each of the shape of ``scale``.
    """
    points = jnp.asarray(QUANTILES, scale.dtype).reshape(-1, *[1] * scale.ndim)
    scale, bias, beta_tilde, gamma_tilde = (
        of_rank(value, points.ndim) for value in (scale, bias, beta_tilde, gamma_tilde)
    )
    values = function(scale * (beta_tilde + (1 + gamma_tilde) * points) + bias)
    return values.mean(0), values.var(0)
