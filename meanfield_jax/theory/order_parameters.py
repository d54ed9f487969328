"""The published order parameters: second moments and gradients of each layer."""

from jax import Array
from jaxtyping import Float

from meanfield_jax.pytree import pytree, static


@pytree
class OrderParameters:
    """The published order parameters, one entry for each Dense or Conv layer.

    They are second moments per unit: ``q`` for one input and ``q_xy`` for two, averaged over
    positions. Names without suffix refer to the pre-activations leaving the layer, ``hat`` to the
    values entering it, and ``tilde`` to the gradients df/dz, summed over units and positions (as a
    tangent: dT_out/dT(z)).

    Attributes:
        layers: The layers' paths.

    Source:
        Wei, Stokes & Schwab 2019 (arXiv:1903.02606), sections 3 and 4. Departure: for maps, the
        tilde quantities are summed over positions (a strided layer's factor |K_{l+1}|/|K_l| drops
        out), and they come from differentiating the forward pass, not from a separate recursion.
    """

    q: Float[Array, "*batch layers"]
    q_xy: Float[Array, "*batch layers"]
    q_hat: Float[Array, "*batch layers"]
    q_hat_xy: Float[Array, "*batch layers"]
    q_tilde: Float[Array, "*batch layers"]
    q_tilde_xy: Float[Array, "*batch layers"]
    layers: tuple[str, ...] = static()
