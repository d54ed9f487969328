"""Products in full precision on every platform, because an accelerator's default is far coarser.

TF32 rounds the factors of a product to 10 bits of mantissa: Lanczos vectors lose their
orthogonality, and theory agrees with itself to only three digits.
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
"""A context with full precision for products that request none, such as those of a user's model."""
