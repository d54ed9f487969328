"""The published order parameters: second moments and gradients, layer by layer."""

import dataclasses

import jax
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OrderParameters:
    """The published order parameters, one entry for each Dense or Conv layer, (layers,) each.

    Second moments per unit: ``q`` of one input and ``q_xy`` of two, averaged over positions. Plain:
    of the pre-activations leaving the layer. Hat: of the values entering it. Tilde: of the
    gradients df/dz, summed over units and positions (as a tangent: dT_out/dT(z)).

    Attributes:
        layers: The layers' paths.

    Source:
        Wei, Stokes & Schwab 2019 (arXiv:1903.02606), sections 3 and 4. Departure: tildes of maps
        are summed over positions (a strided layer's factor |K_{l+1}|/|K_l| drops out), and they
        come from differentiating the forward pass, not from a recursion of their own.
    """

    q: Array
    q_xy: Array
    q_hat: Array
    q_hat_xy: Array
    q_tilde: Array
    q_tilde_xy: Array
    layers: tuple[str, ...] = dataclasses.field(metadata=dict(static=True))
