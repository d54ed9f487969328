"""The recursions of Wei, Stokes & Schwab 2019 (arXiv:1903.02606), written down once more.

Plain floats and loops, on purpose without a line of the package: the oracle of
``statistics="wei2019"``. Base case q_hat^0 = 1, q_hat_xy^0 = 0; tildes of maps are summed over
positions, so that the stride drops out; the head is a flatten. Weights only.
"""

import math
from typing import NamedTuple


class Recursion(NamedTuple):
    """Order parameters by layer 1 ... L; hats are those entering the layer, at layer - 1.

    Attributes:
        q, q_xy: Pre-activations.
        q_hat, q_hat_xy: Values entering.
        q_tilde, q_tilde_xy: Gradients, summed over units (and positions).
        f: Each layer's share of the eigenvalue.
    """

    q: list[float]
    q_xy: list[float]
    q_hat: list[float]
    q_hat_xy: list[float]
    q_tilde: list[float]
    q_tilde_xy: list[float]
    f: list[float]

    @property
    def lambda_max(self) -> float:
        """The bound's value, the sum of the shares."""
        return sum(self.f)


def relu_product(c: float) -> float:
    """E[phi(u) phi(v)] for unit variances and correlation c."""
    return (math.sqrt(1 - c * c) + c * (math.pi / 2 + math.asin(c))) / (2 * math.pi)


def relu_derivative(c: float) -> float:
    """E[phi'(u) phi'(v)] for correlation c."""
    return (math.pi / 2 + math.asin(c)) / (2 * math.pi)


def recursion(
    fan_ins: list[int], weight_var: float, bias_var: float, gamma: float | None
) -> Recursion:
    """ReLU network with linear layers of these fan-ins, the last one the output.

    Args:
        fan_ins: N_{l-1} of each layer; |F| C_in for a convolution.
        weight_var: sigma_w^2.
        bias_var: sigma_b^2.
        gamma: The scale of the BatchNorm after every layer but the last; None: no BatchNorm.
    """
    depth = len(fan_ins)
    q, q_xy, q_hat, q_hat_xy = [], [], [1.0], [0.0]
    for layer in range(depth):
        q.append(bias_var + weight_var * q_hat[layer])
        q_xy.append(bias_var + weight_var * q_hat_xy[layer])
        if layer == depth - 1:
            break
        if gamma is None:
            c = q_xy[layer] / q[layer]
            q_hat.append(q[layer] / 2)
            q_hat_xy.append(q[layer] * relu_product(c))
        else:
            q_hat.append(gamma**2 / 2)
            q_hat_xy.append(gamma**2 / (2 * math.pi))

    q_tilde, q_tilde_xy = [0.0] * depth, [0.0] * depth
    q_tilde[-1] = q_tilde_xy[-1] = 1.0
    for layer in reversed(range(depth - 1)):
        if gamma is None:
            slope, slope_xy = 1 / 2, relu_derivative(q_xy[layer] / q[layer])
        else:
            slope, slope_xy = gamma**2 / q[layer] / 2, gamma**2 / q[layer] / 4
        q_tilde[layer] = weight_var * slope * q_tilde[layer + 1]
        q_tilde_xy[layer] = weight_var * slope_xy * q_tilde_xy[layer + 1]

    f = [fan_ins[layer] * q_hat_xy[layer] * q_tilde_xy[layer] for layer in range(depth)]
    return Recursion(q, q_xy, q_hat, q_hat_xy, q_tilde, q_tilde_xy, f)


def fully_connected(
    widths: list[int], weight_var: float, bias_var: float, gamma: float | None
) -> Recursion:
    """A network of these widths, inputs first and outputs last."""
    return recursion(widths[:-1], weight_var, bias_var, gamma)


def convolutional(
    size: int,
    channels: list[int],
    kernel: int,
    stride: int,
    outputs: int,
    weight_var: float,
    bias_var: float,
    gamma: float | None,
) -> Recursion:
    """Square maps of this size, channels of the input first, then flatten and a dense layer."""
    fan_ins = [kernel**2 * number for number in channels[:-1]]
    for _ in channels[1:]:
        size = math.ceil(size / stride)
    return recursion([*fan_ins, size**2 * channels[-1]], weight_var, bias_var, gamma)
