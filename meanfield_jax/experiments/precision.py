"""The precision of the products in training; theory and Lanczos always have all of float32."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import Array

PRECISIONS = {"float32": "highest", "tf32": "high", "bf16": "BF16_BF16_F32"}
"""What JAX calls each of them."""

BF16 = dict(exponent_bits=8, mantissa_bits=7)


def products_in(precision: str) -> contextlib.AbstractContextManager[Any]:
    """A context for products that request no precision themselves."""
    return jax.default_matmul_precision(PRECISIONS[precision])


def lower_products(model: nnx.Module, precision: str) -> None:
    """Lets every layer that multiplies by weights take its precision from :func:`products_in`.

    The platforms differ: CPU ignores what is requested, and a convolution on a GPU has no bfloat16
    request. So the factors are rounded here, in forward and backward passes; a product of rounded
    factors is then the same in any precision from bfloat16 up.

    Args:
        model: The model, whose modules are changed; with "float32" it stays as it is.
        precision: One of ``PRECISIONS``.
    """
    if precision == "float32":
        return
    for _, module in nnx.iter_modules(model):
        if hasattr(module, "precision"):
            setattr(module, "precision", None)  # noqa: B010
        for name in ("dot_general", "conv_general_dilated"):
            if precision == "bf16" and hasattr(module, name):
                setattr(module, name, _of_rounded_factors(getattr(module, name)))


def _of_rounded_factors(product: Callable[..., Array]) -> Callable[..., Array]:
    """The product of two arrays that are rounded to bfloat16, and so is its cotangent."""

    def call(x: Array, weights: Array, *args: Any, **options: Any) -> Array:
        def of_both(x: Array, weights: Array) -> Array:
            return product(x, weights, *args, **options)

        @jax.custom_vjp
        def rounded(x: Array, weights: Array) -> Array:
            return of_both(_rounded(x), _rounded(weights))

        def forward(x: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
            factors = _rounded(x), _rounded(weights)
            return of_both(*factors), factors

        def backward(factors: tuple[Array, Array], slope: Array) -> tuple[Array, ...]:
            with products_in("bf16"):
                return jax.vjp(of_both, *factors)[1](_rounded(slope))

        rounded.defvjp(forward, backward)
        return rounded(x, weights)

    return call


_rounded = partial(jax.lax.reduce_precision, **BF16)
