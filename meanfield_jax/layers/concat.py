"""Concat: the outputs of several branches side by side, as channels of one map or vector."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel.mixture import Mixture, parts_of
from meanfield_jax.layers.base import (
    Kernel,
    Layer,
    M,
    Record,
    Rows,
    Shape,
    Signal,
    joined,
    layer,
)
from meanfield_jax.layers.combine import exchanged, located


@layer
class Concat(Layer):
    """The channels of all branches, one branch after the other, as in DenseNet and Inception.

    Rule: the channels of every branch keep their own kernel K_i, T_i, which activations, BatchNorm
    and pooling change one by one. The weights of a Dense or Conv after them are independent, so
    that it sees the means, K = sum_i N_i K_i / N and T likewise, N_i of N channels being those of
    branch i.

    Attributes:
        branches: The layers of each branch; ``Sequential()`` for the inputs themselves.

    Example:
        >>> import meanfield_jax as mf
        >>> norm, relu = mf.BatchNorm(), mf.Activation("relu")
        >>> grown = mf.Sequential((norm, relu, mf.Conv(12)))
        >>> block = mf.Concat((mf.Sequential(), grown))
        >>> head = norm, relu, mf.GlobalMeanPool(), mf.Dense(10)
        >>> network = mf.Network((8, 8, 3), (mf.Conv(24), block, block, *head))
        >>> network.num_parameters  # 24, then 36, then 48 channels
        7882

    Source:
        Huang, Liu, van der Maaten & Weinberger 2017 (arXiv:1608.06993) for the block; the rule is
        linearity of the mean over independent weights.

    Accuracy:
        That of the wide limit: the tangent kernel of the network in tests/test_contract.py is off
        by 4 % at width 8, 1.8 % at 32 and 1.0 % at 128, within twice the error of the draws. With
        the DenseNet of tests/flax_models.py on 16 images of CIFAR-10, in training, its largest
        eigenvalue is measured 19 +- 7 % above the prediction at width 12 and 8 +- 3 % at 32; in one
        draw of so narrow a network lambda_max is outside of its domain.

        LayerNorm and RMSNorm after a concatenation use the mean variance of all channels, of which
        each has mean zero; other norms over several channels are refused. How much one draw
        scatters (``Fisher.draw_width``) counts branches as equally large.
    """

    on_parts: ClassVar[str | None] = "inside"

    branches: tuple[Layer, ...] = ()

    @property
    def total_stride(self) -> int:
        return max((branch.total_stride for branch in self.branches), default=1)

    @property
    def ends_in_weights(self) -> bool:
        return bool(self.branches) and all(branch.ends_in_weights for branch in self.branches)

    def output(self, signal: Signal) -> Signal:
        if not self.branches:
            cause, remedy = "it has no branches", "pass a tuple of layers"
            raise problem(SpecError, "Concat.branches", self.branches, cause, remedy)
        ends = [located(name, branch, signal) for name, branch in self.children().items()]
        positions = [end.shape[:-1] for end in ends]
        if len(set(positions)) > 1:
            cause = f"its branches return maps of the shapes {positions}"
            remedy = "give all branches the same strides and padding"
            raise problem(SpecError, "Concat input shape", signal.shape, cause, remedy)
        return Signal(
            (*positions[0], sum(end.shape[-1] for end in ends)),
            gaussian=all(end.gaussian for end in ends),
            random=all(end.random for end in ends),
            parts=tuple(n for end in ends for n in end.parts or end.shape[-1:]),
        )

    def num_parameters(self, shape: Shape) -> int:
        return sum(branch.num_parameters(shape) for branch in self.branches)

    def check_theory(self, shape: Shape) -> None:
        for branch in self.branches:
            branch.check_theory(shape)

    def propagate(self, kernel: Kernel[M], perturbations: Any = None) -> tuple[Any, Any]:
        added = perturbations or (None,) * len(self.branches)
        found = [
            branch.propagate(kernel, own) for branch, own in zip(self.branches, added, strict=True)
        ]
        parts = tuple(part for end, _ in found for part in parts_of(end))
        return Mixture(parts), tuple(records for _, records in found)

    def normalized(self, records: Any, after: bool, statistics: str) -> tuple[Any, bool]:
        # the norms of one branch are not passed by the others
        found = [
            branch.normalized(own, after, statistics)
            for branch, own in zip(self.branches, records, strict=True)
        ]
        return tuple(own for own, _ in found), all(before for _, before in found)

    def widths_after(self, records: Any, after: Array) -> tuple[Any, Array]:
        return beside_each_other(self.branches, records, after)

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        return ConcatModule([branch.build(shape, rngs) for branch in self.branches])

    def rows(self, records: Any, read: Callable[[Record], Rows]) -> Rows:
        both = zip(self.branches, records, strict=True)
        return joined([branch.rows(own, read) for branch, own in both])

    def labels(self, records: Any, path: str) -> list[tuple[str, Layer]]:
        both = zip(self.children().items(), records, strict=True)
        return [
            label for (name, branch), own in both for label in branch.labels(own, f"{path}/{name}")
        ]

    def children(self) -> Mapping[str, Layer]:
        return {f"branches/{index}": branch for index, branch in enumerate(self.branches)}

    def changed(self, change: Callable[[Layer], Layer]) -> Layer:
        return Concat(tuple(branch.changed(change) for branch in self.branches))

    def opened(self, norm: Layer | None) -> tuple[Layer | None, ...]:
        return (Concat(tuple(exchanged(branch, norm) for branch in self.branches)),)


def beside_each_other(branches: Sequence[Layer], records: Any, after: Array) -> tuple[Any, Array]:
    """``Layer.widths_after`` of branches: each scatters by itself, with an equal share."""
    found = [la.widths_after(own, after) for la, own in zip(branches, records, strict=True)]
    inside = sum((before - after for _, before in found), jnp.zeros_like(after))
    return tuple(own for own, _ in found), after + inside / len(found) ** 2


class ConcatModule(nnx.Module):
    """The outputs of the branches, concatenated along the last axis."""

    def __init__(self, branches: list[Callable[[Array], Array]]):
        self.branches = nnx.List(branches)

    def __call__(self, x: Array) -> Array:
        """The concatenation, (samples, *positions, channels of all branches)."""
        return jnp.concatenate([branch(x) for branch in self.branches], axis=-1)
