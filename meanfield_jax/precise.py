"""Products in full precision on every platform: an accelerator's default is far coarser.

TF32 rounds the factors of a product to 10 bits of mantissa: orthogonality in Lanczos is lost, and
theory agrees with itself to three digits only.
"""

from functools import partial

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST

matmul = partial(jnp.matmul, precision=HIGHEST)
einsum = partial(jnp.einsum, precision=HIGHEST)
tensordot = partial(jnp.tensordot, precision=HIGHEST)
vdot = partial(jnp.vdot, precision=HIGHEST)

by_default = partial(jax.default_matmul_precision, "highest")
"""A context in which products that do not ask for a precision, as in a user's model, have it."""
