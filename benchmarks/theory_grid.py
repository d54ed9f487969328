"""The largest stable learning rate and its gradient on a grid of 100,000 networks.

FC 784-1000x3-10 with BatchNorm, gamma x weight_var, ``statistics="wei2019"`` (in which both matter;
in train mode the answer does not depend on weight_var). The package makes the specification inside
one jitted, vmapped ``value_and_grad``. NumPy has the published recursion written out by hand, with
central differences: in a loop over the grid, on a part of it, and on whole arrays.

Run: ``python theory_grid.py``. The exit status is 1 when a claim is false.
"""

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from common import Claim, Peer, compare
from summary import finish

ROWS, COLUMNS = 400, 250
STRIDES = (10, 5)
WIDTHS, INPUTS, BIAS_VAR, MOMENTUM = (1000, 1000, 1000), 784, 0.5, 0.9
STEP = 1e-4
DRAW = "meanfield_jax, float64, lambda_max of one draw"
LOOP, ARRAYS = "NumPy, a loop over the grid", "NumPy, on whole arrays"


def grid() -> tuple[np.ndarray, np.ndarray]:
    """The gamma and weight_var of every point, (rows, columns)."""
    gamma, weight_var = np.linspace(0.1, 3.0, ROWS), np.linspace(0.5, 4.0, COLUMNS)
    return tuple(np.meshgrid(gamma, weight_var, indexing="ij"))


def part(array: Any) -> np.ndarray:
    """Every tenth row and fifth column: the points of the loop, where answers are compared."""
    return np.asarray(array).reshape(ROWS, COLUMNS)[:: STRIDES[0], :: STRIDES[1]].ravel()


def meanfield(double: bool, one_draw: bool = False) -> Callable[[], dict[str, Any]]:
    """The package: one compiled call; of the mean over draws, as NumPy's, or of one draw."""
    import jax
    import jax.numpy as jnp

    import meanfield_jax as mf

    jax.config.update("jax_enable_x64", double)
    gamma, weight_var = (jnp.asarray(axis.ravel()) for axis in grid())

    def eta_max(gamma: Any, weight_var: Any) -> Any:
        norm = mf.BatchNorm(gamma=gamma, eps=0.0, trainable=False)
        net = mf.mlp(
            list(WIDTHS),
            inputs=INPUTS,
            outputs=10,
            norm=norm,
            weight_var=weight_var,
            bias_var=BIAS_VAR,
        )
        theory = mf.analyze(net, statistics="wei2019")
        return theory.eta_max(MOMENTUM) if one_draw else mf.eta_max(theory.fisher.outlier, MOMENTUM)

    compiled = jax.jit(jax.vmap(jax.value_and_grad(eta_max, argnums=(0, 1))))

    def solve() -> dict[str, Any]:
        values, slopes = jax.block_until_ready(compiled(gamma, weight_var))
        answer = np.stack([part(array) for array in (values, *slopes)])
        return dict(points=values.size, answer=answer)

    return solve


def eta_max_by_hand(gamma: Any, weight_var: Any) -> Any:
    """The published recursion for FC networks with BatchNorm and ReLU, weights and biases.

    q is the second moment of a unit, t the tangent kernel of two inputs. Works on floats and on
    arrays.
    """
    fan_in, moment, moment_other, tangent = INPUTS, 1.0, 0.0, 0.0
    for width in (*WIDTHS, 10):
        tangent = fan_in * moment_other + 1.0 + weight_var * tangent
        if width == 10:
            break
        q = BIAS_VAR + weight_var * moment
        tangent = gamma * gamma / q * tangent / 4.0
        moment, moment_other = gamma * gamma / 2.0, gamma * gamma / (2.0 * math.pi)
        fan_in = width
    return 2.0 * (1.0 + MOMENTUM) / tangent


def differences(gamma: Any, weight_var: Any) -> tuple[Any, Any, Any]:
    """Value and central differences."""
    value = eta_max_by_hand(gamma, weight_var)
    right, left = (eta_max_by_hand(gamma + sign * STEP, weight_var) for sign in (1, -1))
    up, down = (eta_max_by_hand(gamma, weight_var + sign * STEP) for sign in (1, -1))
    return value, (right - left) / (2 * STEP), (up - down) / (2 * STEP)


def numpy_loop() -> Callable[[], dict[str, Any]]:
    """Point by point, on plain floats, which are faster than NumPy's scalars."""
    points = list(zip(*(part(axis).tolist() for axis in grid()), strict=True))

    def solve() -> dict[str, Any]:
        answer = np.array([differences(*point) for point in points]).T
        return dict(points=len(points), answer=answer)

    return solve


def numpy_arrays() -> Callable[[], dict[str, Any]]:
    """All points at once, float64."""
    gamma, weight_var = grid()

    def solve() -> dict[str, Any]:
        arrays = differences(gamma, weight_var)
        return dict(points=gamma.size, answer=np.stack([part(array) for array in arrays]))

    return solve


def make_records(peers: list[Peer]) -> list[dict[str, Any]]:
    """Speeds, and how far each answer is from NumPy's on whole arrays."""
    truth = peers[-1].result["answer"]
    records = []
    for peer in peers:
        answer = peer.result.pop("answer")
        record = peer.record()
        share = peers[0].result["points"] / record["points"]
        record["points_per_second"] = record["points"] / record["warm_seconds"]
        record["speed_ratio"] = share * (record["warm_ratio"] or 1.0)
        record["compile_ratio"] = record["cold_seconds"] / record["warm_seconds"]
        record["disagreement"] = _disagreement(answer, truth)
        records.append(record)
    return records


def _disagreement(answer: np.ndarray, truth: np.ndarray) -> float:
    """The largest difference, relative to the largest of its row: values, both slopes."""
    scale = np.abs(truth).max(axis=1, keepdims=True)
    return float(np.max(np.abs(answer - truth) / scale))


def main() -> int:
    """Measures, prints, writes results/theory_grid.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    peers = [
        Peer("meanfield_jax, float64", "theory_grid:meanfield", dict(double=True)),
        Peer("meanfield_jax, float32", "theory_grid:meanfield", dict(double=False)),
        Peer(DRAW, "theory_grid:meanfield", dict(double=True, one_draw=True)),
        Peer(LOOP, "theory_grid:numpy_loop"),
        Peer(ARRAYS, "theory_grid:numpy_arrays"),
    ]
    compare(peers, {}, options.rounds)
    records = make_records(peers)
    return finish("theory_grid", dict(peers=records), make_claims(records))


def make_claims(records: list[dict[str, Any]]) -> list[Claim]:
    """What is claimed."""
    named = {record["name"]: record for record in records}
    return [
        Claim("points per second over the NumPy loop's, times", named[LOOP]["speed_ratio"], 10),
        Claim(
            "value and gradient differ from NumPy's differences by",
            records[0]["disagreement"],
            1e-5,
            at_least=False,
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
