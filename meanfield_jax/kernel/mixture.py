"""Kernels of several groups of channels, as they are after a concatenation."""

import functools
import operator
from collections.abc import Callable
from typing import Any, Generic, Self

import jax.numpy as jnp

from meanfield_jax.kernel.kernel import Kernel, M, first_failure_of
from meanfield_jax.kernel.matrix import Matrix
from meanfield_jax.pytree import pytree


@pytree
class Mixture(Generic[M]):
    """The kernels of groups of channels ("parts") that are not draws of one distribution.

    Layers that act on every channel by itself act on each part. Random weights on all channels see
    only the mean over channels.

    Attributes:
        parts: The kernel of each part; ``channels`` of each says how many there are.
    """

    parts: tuple[Kernel[M], ...]

    def with_numbers(self) -> Self:
        """See :meth:`Kernel.with_numbers`."""
        return type(self)(tuple(part.with_numbers() for part in self.parts))

    def mean(self) -> Kernel[M]:
        """The kernel of a channel drawn from all of them."""
        total = sum(part.channels for part in self.parts)

        def averaged(read: Callable[[Kernel[M]], Matrix | None]) -> Any:
            found = [(read(part), part.channels / total) for part in self.parts]
            terms = [matrix * weight for matrix, weight in found if matrix is not None]
            return functools.reduce(operator.add, terms) if terms else None

        return self.parts[0].after(
            covariance=averaged(lambda part: part.moment),
            tangent=averaged(lambda part: part.effective_tangent),
            deviation=averaged(lambda part: part.deviations[0]),
            tangent_deviation=averaged(lambda part: part.deviations[1]),
            shared=averaged(lambda part: part.shared),
            shared_tangent=averaged(lambda part: part.shared_tangent),
            channels=total,
            status=functools.reduce(first_failure_of, (part.status for part in self.parts)),
            fluctuation=functools.reduce(jnp.maximum, (part.fluctuation for part in self.parts)),
        )


def parts_of(kernel: Kernel[M] | Mixture[M]) -> tuple[Kernel[M], ...]:
    """The kernels of the parts; the kernel itself if all channels are alike."""
    return kernel.parts if isinstance(kernel, Mixture) else (kernel,)


def by_part(
    function: Callable[[Kernel[M], Kernel[M]], Kernel[M]],
    first: Kernel[M] | Mixture[M],
    second: Kernel[M] | Mixture[M],
) -> Any:
    """The function of every part of both; channels that are all alike go with every part.

    Args:
        function: From a kernel of the first and one of the second to a kernel.
        first: A kernel or a mixture.
        second: Another; if both are mixtures, of the same numbers of channels.

    Returns:
        A kernel, or a mixture if one of the two is.
    """
    a, b = parts_of(first), parts_of(second)
    count = max(len(a), len(b))
    if count == 1:
        return function(a[0], b[0])
    channels = [part.channels for part in (a if len(a) == count else b)]
    pairs = zip(a * (count // len(a)), b * (count // len(b)), channels, strict=True)
    return Mixture(tuple(function(one, other).replace(channels=size) for one, other, size in pairs))
