"""Product: two branches multiplied entry by entry, as in gated linear units."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from flax import nnx
from jax import Array

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel.kernel import first_failure_of
from meanfield_jax.layers.activation import Activation
from meanfield_jax.layers.base import Kernel, Layer, M, Record, Rows, Shape, Signal, joined, layer
from meanfield_jax.layers.combine import Sequential, exchanged, located
from meanfield_jax.layers.concat import beside_each_other


@layer
class Product(Layer):
    """first(x) second(x), entry by entry: GLU, SwiGLU and other gates.

    Rule: one of the two ends in weights of its own, apart from elementwise functions, so that given
    the layers before, a unit of one is independent of the same unit of the other:
    E[z_a z_b] = K^1_ab K^2_ab and T = T^1 K^2 + K^1 T^2, with second moments K^1, K^2. A product is
    not Gaussian, so that a Dense or Conv has to follow before the next activation.

    Attributes:
        first: A layer; a :class:`Sequential` for several layers.
        second: Another, which returns the same shape.

    Example:
        >>> import meanfield_jax as mf
        >>> gate = mf.Sequential((mf.Dense(64), mf.Activation("silu")))
        >>> network = mf.Network((8,), (mf.Product(mf.Dense(64), gate), mf.Dense(3)))
        >>> network.num_parameters
        1347

    Source:
        Dauphin, Fan, Auli & Grangier 2017 (arXiv:1612.08083); Shazeer 2020 (arXiv:2002.05202), for
        the layers; the rule is the product rule for independent factors.

    Accuracy:
        That of the wide limit: what both factors share of the layers before them adds O(1/width).
        The tangent kernel of the network in tests/test_contract.py is off by 14 % at width 8, 5 %
        at 32 and 2 % at 128.
    """

    on_parts: ClassVar[str | None] = "inside"

    first: Layer = Sequential()
    second: Layer = Sequential()

    @property
    def total_stride(self) -> int:
        return self.first.total_stride

    def output(self, signal: Signal) -> Signal:
        first, second = (located(name, la, signal) for name, la in self.children().items())
        if first.shape != second.shape:
            cause = f"its branches return the shapes {first.shape} and {second.shape}"
            remedy = "make them equal"
            raise problem(SpecError, "Product input shape", signal.shape, cause, remedy)
        if not any(map(_has_weights_of_its_own, (self.first, self.second))):
            cause = "neither of its branches ends in random weights and elementwise functions"
            remedy = "put a Dense or Conv into one of them"
            raise problem(SpecError, "Product.first", type(self.first).__name__, cause, remedy)
        if first.parts or second.parts:
            cause = "a branch returns channels of several variances"
            remedy = "end both branches with Dense or Conv"
            raise problem(SpecError, "Product input parts", signal.parts, cause, remedy)
        return Signal(first.shape, random=first.random and second.random)

    def num_parameters(self, shape: Shape) -> int:
        return self.first.num_parameters(shape) + self.second.num_parameters(shape)

    def check_theory(self, shape: Shape) -> None:
        self.first.check_theory(shape)
        self.second.check_theory(shape)

    def propagate(self, kernel: Kernel[M], perturbations: Any = None) -> tuple[Kernel[M], Any]:
        added = perturbations or (None, None)
        first, of_first = self.first.propagate(kernel, added[0])
        second, of_second = self.second.propagate(kernel, added[1])
        return _product(first.with_one_mean(), second.with_one_mean()), (of_first, of_second)

    def normalized(self, records: Any, after: bool, statistics: str) -> tuple[Any, bool]:
        # the norms of one are not passed by the other
        first, before_first = self.first.normalized(records[0], after, statistics)
        second, before_second = self.second.normalized(records[1], after, statistics)
        return (first, second), before_first and before_second

    def widths_after(self, records: Any, after: Array) -> tuple[Any, Array]:
        return beside_each_other((self.first, self.second), records, after)

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        return ProductModule(self.first.build(shape, rngs), self.second.build(shape, rngs))

    def rows(self, records: Any, read: Callable[[Record], Rows]) -> Rows:
        return joined([self.first.rows(records[0], read), self.second.rows(records[1], read)])

    def labels(self, records: Any, path: str) -> list[tuple[str, Layer]]:
        both = zip(self.children().items(), records, strict=True)
        return [label for (name, la), own in both for label in la.labels(own, f"{path}/{name}")]

    def children(self) -> Mapping[str, Layer]:
        return {"first": self.first, "second": self.second}

    def changed(self, change: Callable[[Layer], Layer]) -> Layer:
        return Product(self.first.changed(change), self.second.changed(change))

    def opened(self, norm: Layer | None) -> tuple[Layer | None, ...]:
        return (Product(exchanged(self.first, norm), exchanged(self.second, norm)),)


class ProductModule(nnx.Module):
    """The product of two modules' outputs."""

    def __init__(self, first, second):
        self.first, self.second = first, second

    def __call__(self, x: Array) -> Array:
        """The product, of the branches' shape."""
        return self.first(x) * self.second(x)


def _product(first: Kernel[M], second: Kernel[M]) -> Kernel[M]:
    """The kernel of the product of two independent values."""
    means = _whole_mean(first), _whole_mean(second)
    status = first_failure_of(first.status, second.status)
    return first.replace(status=status).after(
        covariance=first.moment * second.moment,
        tangent=first.effective_tangent * second.moment + second.effective_tangent * first.moment,
        unit_mean=None if means[0] is None or means[1] is None else means[0] * means[1],
    )


def _whole_mean(kernel: Kernel) -> Array | None:
    """E[z], the average over values; None where it is 0."""
    return kernel.around_means().mean


def _has_weights_of_its_own(layer: Layer) -> bool:
    """Whether only elementwise functions and norms follow its last random weights."""
    if not isinstance(layer, Sequential):
        return layer.ends_in_weights
    for last in reversed(layer.layers):
        if not (last.is_norm or last.linear or isinstance(last, Activation)):
            return _has_weights_of_its_own(last)
    return False
