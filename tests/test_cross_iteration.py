"""CrossIterationBatchNorm: its window against NumPy, its slopes, its place among the layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerance import assert_close

import meanfield_jax as mf
from meanfield_jax.layers.cross_iteration import CrossIterationBatchNormModule
from meanfield_jax.layers.norm import of_rank

WEIGHTS = {
    "vector": (mf.Dense(6, 1.7, 0.3), (5,)),
    "map": (mf.Conv(6, stride=2, weight_var=1.7, bias_var=0.3), (5, 4, 3)),
}
EPS = 1e-5


def module(kind: str, rngs: int = 0, **options) -> CrossIterationBatchNormModule:
    weights, shape = WEIGHTS[kind]
    spec = mf.CrossIterationBatchNorm((weights, mf.BatchNorm(1.3, 0.2)), **options)
    return spec.build(shape, nnx.Rngs(rngs))


def batch(kind: str, seed: int, samples: int = 8):
    return jax.random.normal(jax.random.key(seed), (samples, *WEIGHTS[kind][1]))


def moved(model, seed: int) -> None:
    """Adds noise to the weights, as an optimizer's step would."""
    kernel = model.layers[0].kernel
    noise = jax.random.normal(jax.random.key(seed), kernel[...].shape, kernel[...].dtype)
    kernel[...] += 0.05 * noise


def moments(model, kernel, x):
    """First and second moment of every channel at these weights, without the bias."""
    weights = nnx.clone(model.layers[0])
    weights.kernel[...] = kernel
    z = weights(x)
    z = z - of_rank(weights.bias[...], z.ndim)
    axes = tuple(range(z.ndim - 1))
    return z.mean(axes), (z**2).mean(axes)


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_window_is_that_of_the_definition(kind, compensate, x64):
    model = module(kind, window=3, compensate=compensate)
    past = []
    for step in range(5):
        x = batch(kind, step)
        kernel = model.layers[0].kernel[...]
        now = moments(model, kernel, x)
        rows = [now]
        for old_x, old_kernel in past[-2:]:

            def at(kernel, x=old_x):
                return moments(model, kernel, x)

            change = kernel - old_kernel if compensate else jnp.zeros_like(kernel)
            value, slope = jax.jvp(at, (old_kernel,), (change,))
            rows.append([a + b for a, b in zip(value, slope, strict=True)])
        mean = np.mean([row[0] for row in rows], 0)
        second = np.mean([rows[0][1], *(np.maximum(b, a**2) for a, b in rows[1:])], 0)
        z = np.asarray(model.layers[0](x)) - np.asarray(model.layers[0].bias[...])
        expected = 1.3 * (z - mean) / np.sqrt(second - mean**2 + EPS) + 0.2
        # float32 constants and history in the module
        assert_close(model(x), expected, "rounding", 10.0, dtype=np.float32)
        past.append((x, kernel))
        moved(model, step)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_window_of_one_and_the_burn_in_are_batch_norm(kind):
    plain = mf.Sequential(module_layers(kind)).build(WEIGHTS[kind][1], nnx.Rngs(0))
    one, burning = module(kind, window=1), module(kind, burn_in=3)
    for step in range(4):
        x = batch(kind, step)
        expected = np.asarray(plain(x))
        assert_close(one(x), expected, "rounding", 10.0, dtype=np.float32)
        difference = np.abs(np.asarray(burning(x)) - expected).max()
        assert difference < 1e-4 if step < 3 else difference > 1e-2
        for name in ("mean", "var"):
            running = getattr(plain.layers[1], name)[...]
            for model in (one, burning):
                found = getattr(model.layers[1], name)[...]
                assert_close(found, running, "rounding", 5.0, dtype=np.float32)


def module_layers(kind: str):
    return (WEIGHTS[kind][0], mf.BatchNorm(1.3, 0.2))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_gradient_takes_the_past_for_constant(kind, x64):
    model = module(kind)
    for step in range(3):
        model(batch(kind, step))
        moved(model, step)
    x = batch(kind, 9)
    graph, kernel, rest = nnx.split(model, nnx.PathContains("kernel"), ...)
    weights = jnp.cos(jnp.arange(6.0))

    def value(kernel):
        y = nnx.merge(graph, kernel, rest, copy=True)(x)
        return jnp.sum(of_rank(weights, y.ndim) * y**2)

    # by hand: the same window with the past's moments as numbers
    used = nnx.merge(graph, kernel, rest, copy=True)
    here = used.layers[0].kernel[...]
    old = [
        np.asarray(value[...])
        + np.sum(np.asarray(slope[...]) * np.asarray(here), tuple(range(1, here.ndim)))
        for value, slope in ((used.mean, used.mean_slope), (used.second, used.second_slope))
    ]

    def by_hand(kernel):
        weights_module = nnx.clone(model.layers[0])
        weights_module.kernel[...] = kernel
        z = weights_module(x)
        z = z - of_rank(weights_module.bias[...], z.ndim)
        mean, second = moments(model, kernel, x)
        total_mean = (mean + old[0].sum(0)) / 4
        total = (second + np.maximum(old[1], old[0] ** 2).sum(0)) / 4 - total_mean**2
        total_mean, total = (of_rank(value, z.ndim) for value in (total_mean, total))
        y = 1.3 * (z - total_mean) / jnp.sqrt(total + EPS) + 0.2
        return jnp.sum(of_rank(weights, z.ndim) * y**2)

    (found,) = jax.tree.leaves(jax.grad(value)(kernel))
    expected = np.asarray(jax.grad(by_hand)(here))
    assert_close(found, expected, "rounding", 10 * np.abs(expected).max(), dtype=np.float32)


def test_a_bias_takes_no_part_in_training_and_counts_in_evaluation():
    first, second = module("vector"), module("vector")
    second.layers[0].bias[...] += 3.0
    for step in range(3):
        x = batch("vector", step)
        assert_close(second(x), np.asarray(first(x)), "rounding", 20.0, dtype=np.float32)
        for model in (first, second):
            moved(model, step)
    before, after = first.layers[1].mean[...], second.layers[1].mean[...]
    # three of the steps of momentum .99
    assert_close(after - before, 3 * (1 - 0.99**3), "rounding", 20.0, dtype=np.float32)


def test_statistics_are_nearer_to_those_of_all_data_and_compensation_helps():
    """Weights in motion, batches of 4: batch > uncompensated > compensated."""
    errors = {}
    for name, options in (
        ("batch", dict(window=1)),
        ("window", dict(compensate=False)),
        ("compensated", dict()),
    ):
        model = module("vector", **options)
        found = []
        for step in range(40):
            x = batch("vector", step, 4)
            everything = batch("vector", 999, 4000)
            y = np.asarray((model(x) - 0.2) / 1.3)
            z = np.asarray(model.layers[0](x)) - np.asarray(model.layers[0].bias[...])
            mean, second = moments(model, model.layers[0].kernel[...], everything)
            # y = (z - mean) / deviation on four samples gives both
            slope = (z - z.mean(0)).std(0) / y.std(0)
            used = z.mean(0) - slope * y.mean(0)
            deviation = np.sqrt(second - mean**2)
            found.append(np.concatenate([(used - mean) / deviation, slope / deviation - 1]))
            kernel = model.layers[0].kernel
            kernel[...] += 0.1 * np.sin(step) + 0.1
        errors[name] = np.sqrt(np.mean(np.square(found[8:])))
    assert errors["compensated"] < errors["window"]
    assert errors["compensated"] < 0.75 * errors["batch"]


@pytest.mark.parametrize("kind", WEIGHTS)
def test_statistics_of_half_precision_are_float32(kind):
    model = module(kind)
    x = batch(kind, 0).astype(jnp.bfloat16)
    model.layers[0].dtype = jnp.bfloat16
    assert model(x).dtype == jnp.bfloat16
    assert model.layers[1].var[...].dtype == jnp.float32
    assert model.second[...].dtype == model.second_slope[...].dtype == jnp.float32
    assert np.isfinite(np.asarray(model(x), np.float32)).all()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_mesh_axis_joins_the_batches_of_its_devices(kind):
    whole, split = module(kind), module(kind)
    split.layers[1].axis_name = "data"
    for step in range(3):
        x = batch(kind, step, 12)
        graph, state = nnx.split(split)

        def one(x, state=state, graph=graph):
            model = nnx.merge(graph, state, copy=True)
            return model(x), nnx.split(model)[1]

        pieces = x.reshape(3, 4, *x.shape[1:])
        y, states = jax.vmap(one, axis_name="data")(pieces)
        nnx.update(split, jax.tree.map(lambda leaf: leaf[0], states))
        expected = np.asarray(whole(x))
        assert_close(y.reshape(expected.shape), expected, "rounding", 20.0, dtype=np.float32)
        for model in (whole, split):
            moved(model, step)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_old_mean_is_known_exactly_at_other_weights(groups):
    rngs, x = nnx.Rngs(0), jax.random.normal(jax.random.key(0), (6, 5, 5, 4))
    conv = nnx.Conv(4, 6, (3, 3), feature_group_count=groups, rngs=rngs)
    model = CrossIterationBatchNormModule(conv, mf.BatchNorm().build((6,), rngs), window=2)
    model(x)
    moved(model, 1)
    kernel = conv.kernel[...]
    found = model.mean[...][0] + jnp.sum(model.mean_slope[...][0] * kernel, (0, 1, 2))
    expected = moments(model, kernel, x)[0]
    assert_close(found, np.asarray(expected), "rounding", 10.0, dtype=np.float32)
    assert model.mean_slope[...].shape[-1] == (1 if groups == 1 else 6)


@pytest.mark.slow
def test_it_stands_behind_any_weights_of_a_users_own_model():
    class Own(nnx.Module):
        def __init__(self, rngs):
            conv = nnx.Conv(3, 8, (3, 3), rngs=rngs, use_bias=False)
            norm = mf.BatchNorm().build((8,), rngs)
            self.block = CrossIterationBatchNormModule(conv, norm, window=2)

        def __call__(self, x):
            return nnx.relu(self.block(x)).mean((1, 2))

    model = Own(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (6, 5, 5, 3))
    reference = nnx.clone(model.block.layers[1])(model.block.layers[0](x))
    expected = nnx.relu(reference).mean((1, 2))
    assert_close(model(x), np.asarray(expected), "rounding", 10.0, dtype=np.float32)
    model.eval()
    assert_close(model(x[:2]), np.asarray(model(x))[:2], "rounding", 10.0, dtype=np.float32)
    model.train()
    assert np.isfinite(mf.top_eigenvalues(mf.fisher_operator(model, x), 1).eigenvalues).all()


# ---- as a specification


@pytest.mark.slow
def test_theory_is_that_of_weights_and_batch_norm(x64):
    norms = mf.CrossIterationBatchNorm(), mf.BatchNorm()
    first, second = (mf.cnn([4], inputs=(6, 6, 3), norm=norm) for norm in norms)
    for statistics in ("batch", "frozen"):
        a, b = (
            mf.analyze(network, statistics=statistics, num_samples=16).fisher
            for network in (first, second)
        )
        for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(one, other)
    assert first.num_parameters == second.num_parameters
    assert a.contributions.layers[:2] == ("layers/0/layers/0", "layers/0/layers/1")


@pytest.mark.slow
def test_presets_put_their_weights_in():
    norm = mf.CrossIterationBatchNorm(window=3)
    network = mf.preact_resnet([4], blocks=1, inputs=(6, 6, 3), norm=norm)
    branch = network.layers[1].branch.layers
    assert branch[0] == mf.BatchNorm()
    assert branch[2].window == 3
    assert [type(inner).__name__ for inner in branch[2].layers] == ["Conv", "BatchNorm"]
    model = mf.build(network, rngs=nnx.Rngs(0))
    assert model(jnp.ones((2, 6, 6, 3))).shape == (2, 10)


def test_scales_change_and_norms_go():
    from meanfield_jax.variants import with_gamma, without_norms

    network = mf.mlp([8], inputs=4, outputs=2, norm=mf.CrossIterationBatchNorm(window=2))
    scaled = with_gamma(network, 0.5)
    assert scaled.layers[0].layers[1].gamma == 0.5
    assert scaled.layers[0].window == 2
    plain = mf.mlp([8], inputs=4, outputs=2)
    assert without_norms(network) == plain


@pytest.mark.slow
def test_runs_train_side_by_side_and_move_their_windows():
    x = jax.random.normal(jax.random.key(0), (32, 6))
    y = x[:, :3].argmax(1)
    rates = jnp.array([0.01, 0.1])
    options = dict(test=(x, y), batch_size=4, epochs=3)
    norms = (mf.CrossIterationBatchNorm(), mf.CrossIterationBatchNorm(burn_in=1000))
    first, second = (mf.mlp([16], inputs=6, outputs=3, norm=norm) for norm in norms)
    found = mf.train(first, (x, y), learning_rate=rates, **options)
    burning = mf.train(second, (x, y), learning_rate=rates, **options)
    alone = mf.train(first, (x, y), learning_rate=0.1, **options)
    assert_close(found.loss[1], np.asarray(alone.loss), "rounding", 50.0, dtype=np.float32)
    assert np.isfinite(found.test_loss).all()
    assert np.abs(np.asarray(found.loss - burning.loss)).min() > 1e-5


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: mf.CrossIterationBatchNorm(window=0), ("window=0", "must be an integer")),
        (lambda: mf.CrossIterationBatchNorm(burn_in=-1), ("burn_in=-1", "iterations")),
        (
            lambda: mf.Network((4,), (mf.CrossIterationBatchNorm(), mf.Dense(2))),
            ("layers/0/CrossIterationBatchNorm.layers", "weights and BatchNorm", "norm="),
        ),
        (
            lambda: mf.cnn([4], norm=mf.CrossIterationBatchNorm((mf.BatchNorm(axes="position"),))),
            ("CrossIterationBatchNorm.layers", "over channels"),
        ),
    ],
)
def test_bad_input_is_one_line(build, expected):
    with pytest.raises(mf.SpecError) as caught:
        build()
    assert "\n" not in str(caught.value)
    for part in expected:
        assert part in str(caught.value)
