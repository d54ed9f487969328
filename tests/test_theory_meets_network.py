"""Theory against networks: one table of norms, heads and kinds of inputs; real Fisher matrices.

tests/test_contract.py does the same for every layer, at two widths; here stands what a layer's
example does not reach: evaluation, convolutions, offsets, other activations, residual networks.
"""

import draws
import pytest
from networks import conv, correlated, dense

import meanfield_jax as mf

N = 16
RELU = mf.Activation("relu")


def strided_once(norm: mf.Layer, head: str) -> mf.Network:
    """Maps of sixteen positions, for statistics over them."""
    return mf.cnn([32] * 2, inputs=(4, 4, 2), outputs=4, stride=1, head=head, norm=norm)


BRANCH = mf.Sequential((mf.BatchNorm(), RELU, mf.Dense(256)))
RESIDUAL = (mf.Dense(256), mf.Residual(BRANCH), mf.BatchNorm(), RELU, mf.Dense(4))
FIXED = mf.BatchNorm(trainable=False)
BY_POSITION = mf.BatchNorm(axes="position")

# network, whether on a batch of data (else Gaussian inputs), statistics
CASES = {
    "tanh": (dense(None, "tanh"), True, "batch"),
    "batch, evaluation": (dense(mf.BatchNorm(1.3)), True, "frozen"),
    "batch, fixed scale, leaky": (dense(FIXED, "leaky_relu"), True, "batch"),
    "batch, identity": (dense(mf.BatchNorm(), "identity"), True, "batch"),
    "batch, residual": (mf.Network((20,), RESIDUAL), True, "batch"),
    "batch, conv": (conv(mf.BatchNorm(), width=64), True, "batch"),
    "batch, conv, evaluation": (conv(mf.BatchNorm(), width=64), True, "frozen"),
    "batch, conv, mean": (conv(mf.BatchNorm(), "mean", width=64), True, "batch"),
    "batch, conv, by position": (conv(BY_POSITION, width=64), True, "batch"),
    "layer, tanh, offset": (dense(mf.LayerNorm(0.8, 0.4), "tanh", 64), True, "batch"),
    "layer, conv": (conv(mf.LayerNorm(1.3, 0.2)), True, "batch"),
    "layer, conv, mean": (conv(mf.LayerNorm(1.3, 0.2), "mean"), False, "batch"),
    # without the derivative of the deviation the mean head's T_same is 40 % off
    "group, mean": (strided_once(mf.GroupNorm(1.3, num_groups=2), "mean"), True, "batch"),
    "group, flatten": (strided_once(mf.GroupNorm(1.3, num_groups=2), "flatten"), False, "batch"),
    "instance, mean": (strided_once(mf.InstanceNorm(1.3), "mean"), False, "batch"),
    "instance, flatten": (strided_once(mf.InstanceNorm(1.3), "flatten"), True, "batch"),
    # groups of 8 values: left out are terms of order 1/8^2
    "group, dense": (dense(mf.GroupNorm(1.3, num_groups=8), width=64), False, "batch"),
    "one batch group": (dense(mf.BatchGroupNorm(num_groups=1)), True, "batch"),
    "batch groups of 8": (dense(mf.BatchGroupNorm(num_groups=32)), True, "batch"),
    "batch groups, conv": (conv(mf.BatchGroupNorm(num_groups=8)), True, "batch"),
    "enhanced, conv": (conv(mf.InstanceEnhancementBatchNorm(1.3, 0.2)), True, "batch"),
    "cross-iteration, conv": (conv(mf.CrossIterationBatchNorm()), True, "batch"),
    "proxy, conv": (conv(mf.ProxyNorm(mf.GroupNorm(num_groups=4))), False, "batch"),
    "group, residual conv": (
        mf.preact_resnet(
            [24], blocks=1, inputs=(4, 4, 3), outputs=4, norm=mf.GroupNorm(1.3, num_groups=2)
        ),
        False,
        "batch",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_tangent_kernel_is_the_mean_over_networks(name):
    network, on_data, statistics = CASES[name]
    widths = [inner.width for inner in network.layers if isinstance(inner, (mf.Dense, mf.Conv))]
    x = correlated(N, *network.input_shape) if on_data else N
    draws.assert_meets_theory(network, x, max(widths), statistics=statistics)


# ---- eigenvalues of real Fisher matrices, by Lanczos

OUTPUTS, NUM_SAMPLES, DRAWS = 10, 200, 4
FC = mf.mlp([500] * 2, inputs=400, outputs=OUTPUTS, norm=mf.BatchNorm(1.0))
VANILLA = mf.mlp([500] * 2, inputs=400, outputs=OUTPUTS)
CONV = mf.cnn([30, 60], inputs=(16, 16, 3), norm=mf.BatchNorm(1.0, axes="position"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "statistics", "width"),
    [(FC, "batch", 500), (VANILLA, "batch", 400), (CONV, "batch", 60)],
    ids=["fully connected", "without norms", "convolutional"],
)
def test_outliers_are_those_of_theory(network, statistics, width):
    found = draws.outliers(network, NUM_SAMPLES, DRAWS, statistics)
    theory = mf.analyze(network, statistics=statistics, num_samples=NUM_SAMPLES)
    draws.assert_mean(found, float(theory.fisher.outlier), width)


@pytest.mark.slow
def test_the_published_theory_lies_between_training_and_evaluation():
    batch, frozen = (draws.outliers(FC, NUM_SAMPLES, DRAWS, mode) for mode in ("batch", "frozen"))
    evaluation = mf.analyze(FC, statistics="frozen", num_samples=NUM_SAMPLES)
    draws.assert_mean(frozen, float(evaluation.fisher.outlier), width=400)
    theory = mf.analyze(FC, statistics="wei2019", num_samples=NUM_SAMPLES)
    published = float(theory.fisher.outlier)
    assert batch.mean() + 4 * draws.standard_error(batch) < published
    assert published < frozen.mean() - 4 * draws.standard_error(frozen)
