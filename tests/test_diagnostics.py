"""Diagnostics: identities, known distributions, automatic Jacobians, and models of one's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import SMALL
from tolerance import assert_close, assert_printed, standard_error

import meanfield_jax as mf

LOSS = optax.softmax_cross_entropy_with_integer_labels
CONV = mf.Network(
    (6, 6, 2),
    (
        mf.Conv(8),
        mf.BatchNorm(gamma=1.5, beta=0.3),
        mf.Activation("relu"),
        mf.Residual(mf.Conv(8)),
        mf.Flatten(),
        mf.Dense(3),
    ),
)
BLOCK = mf.Sequential((mf.Dense(20), mf.BatchNorm(), mf.Activation("relu")))
REPEATED = mf.Network((8,), (mf.Dense(20), mf.Repeat(BLOCK, 3), mf.Dense(3)))


class Own(nnx.Module):
    """A user's own model: flax's BatchNorm, a function by name, dropout, a shared module."""

    def __init__(self, rngs: nnx.Rngs):
        self.entry = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.shared = nnx.Linear(16, 16, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Sequential(nnx.relu, nnx.Linear(16, 3, rngs=rngs))

    def __call__(self, x):
        h = nnx.tanh(self.norm(self.entry(x)))
        h = self.drop(self.shared(self.shared(h)))
        return 2 * self.head(h)


@functools.cache
def drawn(source) -> tuple:
    """Graph and state of a model, from one program."""
    create = functools.partial(mf.build, source) if isinstance(source, mf.Network) else source
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles fast
    return nnx.split(nnx.jit(lambda: create(rngs=nnx.Rngs(key)))())


def built(source):
    """A model of a specification or of a class, the same each time."""
    return nnx.merge(*drawn(source), copy=True)


def normal(*shape: int, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def labels(n: int):
    return jnp.asarray(np.arange(n) % 3)


def activations(model, x) -> dict[str, jax.Array]:
    """Those of a model, in their order, from one program."""
    graphdef, state = nnx.split(model)
    names = []

    @jax.jit
    def run(state, x):
        found = mf.diagnostics.activations(nnx.merge(graphdef, state, copy=True), x)
        names.extend(found)
        return list(found.values())

    return dict(zip(names, run(state, x), strict=True))


def outputs(model, x):
    """Of a copy, in one program."""
    return nnx.jit(lambda model, x: model(x))(nnx.clone(model), x)


@jax.jit
def sample_gradients(apply, params, x, y):
    """Of the loss of each sample, by automatic Jacobians."""
    return jax.jacrev(lambda params: LOSS(apply(params, x), y))(params)


@pytest.mark.slow
def test_activations_are_those_of_a_call_layer_by_layer():
    model, x = built(CONV), normal(5, 6, 6, 2)
    before = nnx.state(nnx.clone(model))
    found = mf.diagnostics.activations(model, x)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
    assert list(found) == [
        "layers/0",
        "layers/1",
        "layers/2",
        "layers/3/branch",
        "layers/3",
        "layers/4",
        "layers/5",
    ]
    value = x
    for index, inner in enumerate(nnx.clone(model).layers):
        value = inner(value)
        assert_close(found[f"layers/{index}"], value, "rounding", dtype=np.float32)
    assert type(model.layers[0]) is nnx.Conv


def test_repetitions_are_numbered_as_in_theory():
    model, x = built(REPEATED), normal(5, 8)
    found = activations(model, x)
    theory = jax.eval_shape(lambda: mf.analyze(REPEATED, num_samples=5))
    assert set(theory.order_parameters.layers) <= set(found)
    inside = [f"layers/1/block[{i}]/layers/{j}" for i in range(3) for j in range(3)]
    assert list(found) == ["layers/0", *inside, "layers/2"]
    assert_close(found["layers/2"], outputs(model, x), "rounding", 1.0, dtype=np.float32)
    last = outputs(model.layers[2], found[inside[-1]])
    assert_close(found["layers/2"], last, "rounding", 1.0, dtype=np.float32)


def test_activations_of_a_users_own_model():
    model, x = built(Own), normal(6, 8)
    state = jax.tree.map(jnp.asarray, nnx.state(nnx.clone(model), nnx.BatchStat))
    names = ["entry", "norm", "shared", "shared#1", "drop", "head/layers/0", "head/layers/1", "/"]
    training = mf.diagnostics.activations(model, x)
    assert list(training) == names
    assert_close(training["norm"].mean(0), 0.0, "rounding", 1.0, dtype=np.float32)
    assert (training["drop"] == 0).any()
    jax.tree.map(np.testing.assert_array_equal, state, nnx.state(model, nnx.BatchStat))
    model.eval()
    evaluation = activations(model, x)
    assert list(evaluation) == [name for name in names if name != "drop"]  # passes on its input
    assert_close(evaluation["/"], outputs(model, x), "rounding", 1.0, dtype=np.float32)
    twice = 2 * np.asarray(evaluation["head/layers/1"])
    assert_close(evaluation["/"], twice, "rounding", dtype=np.float32)


@pytest.mark.slow
def test_repetitions_inside_repetitions_and_scans_of_ones_own():
    inner = mf.Repeat(mf.Sequential((mf.Dense(8), mf.Activation("tanh"))), 2)
    nested = mf.Network((8,), (mf.Repeat(mf.Sequential((inner, mf.Dense(8))), 3),))
    model, value = built(nested), normal(5, 8)
    found = activations(model, value)
    state = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    state, value = state["layers"][0]["block"]["layers"], np.asarray(value)
    for i in range(3):
        block = f"layers/0/block[{i}]/layers"
        for j in range(2):
            dense = jax.tree.map(lambda leaf, i=i, j=j: leaf[i, j], state[0]["block"]["layers"][0])
            value = np.tanh(value @ dense["kernel"] + dense["bias"])
            name = f"{block}/0/block[{j}]/layers/1"
            assert_close(found[name], value, "rounding", 1.0, dtype=np.float32)
        value = value @ state[1]["kernel"][i] + state[1]["bias"][i]
        assert_close(found[f"{block}/1"], value, "rounding", 1.0, dtype=np.float32)
    assert len(found) == 3 * (2 * 2 + 1)

    class Scanned(nnx.Module):
        def __init__(self, rngs):
            create = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs), axis_size=3)
            self.linear = create(rngs.split(3))

        def __call__(self, x):
            scan = nnx.scan(lambda x, la: la(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return scan(x, self.linear)

    found = activations(built(Scanned), normal(5, 8))
    assert list(found) == ["linear[0]", "linear[1]", "linear[2]", "/"]
    assert_close(found["/"], found["linear[2]"], "rounding", dtype=np.float32)


def test_activations_under_jit_and_what_cannot_be_captured():
    graphdef, state = nnx.split(built(CONV))
    x = normal(5, 6, 6, 2)

    @jax.jit
    def capture(state, x):
        return mf.diagnostics.activations(nnx.merge(graphdef, state, copy=True), x)

    assert capture(state, x)["layers/0"].shape == (5, 6, 6, 8)

    class Silent(nnx.Module):
        pass

    class Pair(nnx.Module):
        def __call__(self, x):
            return x, x

    for model, words in (
        (lambda x: x, "not a Flax NNX module"),
        (Silent(), "no __call__"),
        (Pair(), "returns an array"),
    ):
        with pytest.raises(mf.SpecError, match=words):
            mf.diagnostics.activations(model, x)


def test_moments_add_up():
    values = activations(built(CONV), normal(50, 6, 6, 2))
    found = mf.diagnostics.moments(values)
    assert found.layer.values.tolist() == list(values)
    for layer, value in values.items():
        value = np.asarray(value, np.float64)
        at = found.sel(layer=layer)
        assert_close(at["mean"], value.mean(), "rounding", value.std(), dtype=np.float32)
        assert_close(at.variance, value.var(), "rounding", dtype=np.float32)
        axes = tuple(range(value.ndim - 1))
        between = value.mean(axes).var()
        assert_close(at.channel_variance + between, value.var(), "rounding", dtype=np.float32)
    centred = found.sel(layer="layers/1").channel_variance
    assert_close(centred, 1.5**2, "edge", dtype=np.float32)  # eps of the variance


@pytest.mark.parametrize("shape", [(40, 7), (40, 5, 4, 7)])
def test_power_sums_to_one(shape):
    rng = np.random.default_rng(0)
    signal = rng.normal(size=shape) * np.arange(1, 8) + rng.normal(size=7)
    y = jnp.asarray(np.maximum(signal, 0), jnp.float32)
    shares = jax.jit(mf.diagnostics.power)(y)
    assert_close(np.sum(shares), 1.0, "rounding", dtype=np.float32)
    if y.ndim == 2:
        assert shares.P3 == shares.P4 == 0
    slope = jax.jit(jax.grad(lambda y: mf.diagnostics.power(y).P1))(y)
    assert np.isfinite(slope).all()


def test_power_of_signals_made_of_one_kind():
    constant = np.broadcast_to(np.arange(1, 5, dtype=np.float32), (6, 3, 2, 4))
    sign = np.array([1, -1] * 3, np.float32)[:, None, None, None]
    checks = np.array([1, -1], np.float32)[None, None, :, None]
    parts = {
        0: constant,
        1: constant * sign,
        2: constant * checks,
        3: constant * checks * (1 + sign),
    }
    power = jax.jit(mf.diagnostics.power)
    for index, y in parts.items():
        expected = [0.0] * 4
        # deviations of 0 and 2 have mean and deviation 1
        for at in (2, 3) if index == 3 else (index,):
            expected[at] = 0.5 if index == 3 else 1.0
        assert_close(power(y), expected, "rounding", 1.0, dtype=np.float32)
    with pytest.raises(mf.DataError, match="not a batch of channels"):
        mf.diagnostics.power(jnp.ones(3))


def test_kurtosis_of_known_distributions():
    n = 400_000
    key = jax.random.key(0)
    draws = {
        "gaussian": (jax.random.normal(key, (n,)), 3.0, np.sqrt(24 / n)),
        "uniform": (jax.random.uniform(key, (n,)), 1.8, np.sqrt(24 / n)),
        "laplace": (jax.random.laplace(key, (n,)), 6.0, None),
    }
    found = mf.diagnostics.gradient_tails({name: draw[0] for name, draw in draws.items()})
    for name, (values, expected, error) in draws.items():
        if error is None:
            split = np.asarray(values, np.float64).reshape(100, -1)
            error = standard_error((split**4).mean(1) / (split**2).mean(1) ** 2)
        at = found.sel(weight=name)
        assert_close(at.kurtosis, expected, "monte_carlo", standard_error=error)
    gaussian = found.sel(weight="gaussian")
    assert gaussian.num_tail == n // 100
    # the documented value; independent entries, so Hill's own error is right
    expected = _hill_of_a_gaussian()
    assert_printed(expected, "9.0")
    error = float(gaussian.tail_index_error)
    assert_close(gaussian.tail_index, expected, "monte_carlo", standard_error=error)


def _hill_of_a_gaussian() -> float:
    """1 / E[log |z| / t given |z| > t], t the hundredth quantile, by quadrature."""
    from scipy import integrate, stats

    t = stats.norm.isf(0.005)
    value, _ = integrate.quad(lambda z: np.log(z / t) * 2 * stats.norm.pdf(z), t, 40)
    return 0.01 / value


@pytest.mark.parametrize("alpha", [1.5, 3.0])
def test_hill_finds_the_exponent_of_a_power_law(alpha):
    values = jax.random.pareto(jax.random.key(1), alpha, (1000, 1000))
    found = mf.diagnostics.gradient_tails([values]).isel(weight=0)
    error = float(found.tail_index_error)
    assert error == pytest.approx(float(found.tail_index) / 100)
    assert_close(found.tail_index, alpha, "monte_carlo", standard_error=error)


def test_tails_of_what_has_none():
    found = mf.diagnostics.gradient_tails(dict(a=jnp.ones(500), b=jnp.zeros(3)))
    assert np.isnan(found.kurtosis).all()
    assert np.isnan(found.tail_index).all()
    with pytest.raises(mf.SpecError, match=r"tail_share=2: must be in"):
        mf.diagnostics.gradient_tails(dict(a=jnp.ones(3)), tail_share=2)


def test_gradients_are_those_of_flax():
    model, x = built(REPEATED), normal(30, 8)
    mean = nnx.grad(lambda model, x, y: LOSS(model(x), y).mean())
    expected = nnx.jit(mean)(nnx.clone(model), x, labels(30))
    found = mf.diagnostics.gradients(model, LOSS, x, labels(30))
    kernels = nnx.to_pure_dict(expected)["layers"]
    for index in range(3):
        name = f"layers/1/block[{index}]/layers/0/kernel"
        value = kernels[1]["block"]["layers"][0]["kernel"][index]
        assert_close(found[name], value, "rounding", 1.0, dtype=np.float32)
    value = kernels[0]["kernel"]
    assert_close(found["layers/0/kernel"], value, "rounding", 1.0, dtype=np.float32)
    assert mf.diagnostics.gradient_tails(found).weight.values.tolist() == list(found)
    # any other pytree of arrays
    assert "layers/0/kernel" in mf.diagnostics.gradient_tails(expected).weight


@pytest.mark.slow
@pytest.mark.parametrize("network", [CONV, REPEATED])
def test_input_dependence_against_the_jacobian(network):
    model, n = built(network), 12
    x, y = normal(n, *network.input_shape), labels(n)
    found = mf.diagnostics.input_dependence(model, LOSS, x, y)
    gradients = sample_gradients(*mf.functional(model), x, y)
    # of the largest, as the biases in front of a BatchNorm have no gradient but rounding errors
    scale = dict(scale=float(found.of_absolutes.max()), dtype=np.float32)
    block = "layers/1/block"
    for name, each in gradients.items():
        each = np.asarray(each, np.float64)
        repeated = name.startswith(block) and network is REPEATED
        parts = {name: each}
        if repeated:
            parts = {name.replace(block, f"{block}[{i}]"): each[:, i] for i in range(3)}
        for path, part in parts.items():
            at, below = found.sel(weight=path), np.abs(part).sum()
            assert_close(at.of_absolutes, below, "rounding", **scale)
            assert_close(at.of_sum, np.abs(part.sum(0)).sum(), "rounding", **scale)
            assert_close(at.ratio, at.of_sum / at.of_absolutes, "rounding")


def test_input_dependence_of_equal_and_of_unrelated_gradients():
    model = built(SMALL)
    same = jnp.asarray(np.broadcast_to(normal(8), (10, 8)))
    found = mf.diagnostics.input_dependence(model, LOSS, same, np.ones(10, int))
    assert_close(found.ratio, 1.0, "rounding", dtype=np.float32)

    class Weights(nnx.Module):
        """Its gradient is the input itself."""

        def __init__(self):
            self.weight = nnx.Param(jnp.zeros(2000))

        def __call__(self, x):
            return x @ self.weight[...]

    x = normal(100, 2000)
    ratio = mf.diagnostics.input_dependence(Weights(), lambda out, _: out, x, np.zeros(100)).ratio
    # |sum of n Gaussians| / sum of |Gaussian|: sqrt(n) / n
    error = standard_error(np.abs(np.asarray(x).sum(0)) / np.abs(np.asarray(x)).sum(0))
    assert_close(ratio, [0.1], "monte_carlo", standard_error=error)


def test_inputs_may_be_whole_numbers():
    class Words(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(7, 5, rngs=rngs)
            self.head = nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, words):
            return self.head(self.embed(words).mean(1))

    model, words = built(Words), jnp.asarray(np.arange(24).reshape(6, 4) % 7)
    assert list(activations(model, words)) == ["embed", "head"]
    found = mf.diagnostics.input_dependence(model, LOSS, words, labels(6))
    assert (found.ratio <= 1 + 1e-6).all()


@pytest.mark.slow
def test_noise_falls_as_theory_says_where_samples_do_not_interact():
    model, x = built(SMALL), normal(60, 8)
    rates, sizes = [0.1, 0.3], [2, 8, 32]
    found = mf.diagnostics.gradient_noise(
        model, LOSS, x, labels(60), learning_rate=rates, batch_size=sizes, num_batches=200
    )
    assert found.measured.dims == ("learning_rate", "batch_size")
    error = found.standard_error.values
    assert_close(found.measured, found.bound, "monte_carlo", standard_error=error, scale=0.0)
    gradients = sample_gradients(*mf.functional(model), x, labels(60))
    flat = np.concatenate([np.reshape(leaf, (60, -1)) for leaf in gradients.values()], 1)
    variance = np.sum((flat - flat.mean(0)) ** 2, 1, dtype=np.float64).mean()
    assert_close(found.sample_variance, variance, "rounding", dtype=np.float32)
    expected = np.square(rates)[:, None] * variance / np.array(sizes)
    assert_close(found.bound, expected, "rounding", dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(y=np.zeros(4, int)), "pass one target for each"),
        (dict(loss=lambda out, y: LOSS(out, y).mean()), "not their mean"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(learning_rate=-1.0), "must be finite"),
        (dict(model=lambda x: x), "not a Flax NNX module"),
    ],
)
def test_what_does_not_fit_is_named(changes, words):
    given = dict(
        model=built(REPEATED),
        loss=LOSS,
        x=normal(6, 8),
        y=labels(6),
        learning_rate=0.1,
        batch_size=2,
    )
    with pytest.raises((mf.SpecError, mf.DataError), match=words):
        mf.diagnostics.gradient_noise(**(given | changes))


@pytest.mark.slow
@pytest.mark.parametrize("source", [REPEATED, Own], ids=["repeated", "own"])
def test_batch_statistics_against_those_of_the_layers_inputs(source):
    """What is read from running statistics is mean and variance of the captured activations."""
    model, x, size = built(source), normal(400, 8), 16
    found = mf.diagnostics.batch_statistics_error(model, x, batch_size=size, num_batches=3, seed=3)
    keys = jax.random.split(jax.random.key(3), 3)
    choose = jax.jit(jax.vmap(lambda key: jax.random.choice(key, 400, (size,), replace=False)))
    every = [activations(model, part) for part in (x, *(x[rows] for rows in choose(keys)))]
    before = {
        name: "entry" if name == "norm" else f"{name[: -len('layers/1')]}layers/0"
        for name in found.layer.values
    }
    assert len(before) == (1 if isinstance(model, Own) else 3)
    for name, origin in before.items():
        values = [np.asarray(found_there[origin]) for found_there in every]
        mean, var = (
            jnp.asarray([getattr(value, stat)(0) for value in values]) for stat in ("mean", "var")
        )
        expected = mf.diagnostics.statistics_error((mean[1:], var[1:]), (mean[0], var[0]))
        for field, value in expected._asdict().items():
            at = found[field].sel(layer=name)
            assert_close(at, value, "rounding", 1.0, dtype=np.float32)


def test_errors_of_statistics_fall_with_the_batch():
    """Gaussian inputs: 1/sqrt(B) and sqrt(2/B), less the share of the data that is in a batch."""
    n, width = 4000, 2000
    model = built(mf.Network((50,), (mf.Dense(width), mf.BatchNorm(), mf.Dense(1))))
    x = normal(n, 50)
    for size in (16, 64):
        found = mf.diagnostics.batch_statistics_error(model, x, batch_size=size, num_batches=40)
        left = np.sqrt(1 - size / n)
        errors = (found.mean_standard_error, found.var_standard_error)
        expected = (left / np.sqrt(size), left * np.sqrt(2 / size))
        for value, error, goal in zip((found["mean"], found["var"]), errors, expected, strict=True):
            # the root of a mean over 50 directions lies 1/(4 * 50) below; kept by the width's term
            assert_close(value, [goal], "monte_carlo", standard_error=error.values, width=100)


def test_statistics_of_all_data_have_no_error():
    model, x = built(REPEATED), normal(40, 8)
    found = mf.diagnostics.batch_statistics_error(model, x, batch_size=40, num_batches=2)
    for field in ("mean", "var"):
        assert_close(found[field], 0.0, "rounding", 1.0, dtype=np.float32)
    named = mf.diagnostics.batch_statistics_error(
        model, x, batch_size=8, layers=["layers/1/block[1]/layers/1"]
    )
    assert named.layer.size == 1
    for options, words in (
        (dict(batch_size=41), "batch_size=41"),
        (dict(batch_size=8, layers=["layers/0"]), "layers with running mean and variance are lay"),
    ):
        with pytest.raises(mf.SpecError, match=words):
            mf.diagnostics.batch_statistics_error(model, x, **options)
    with pytest.raises(mf.DataError, match="do not fit"):
        mf.diagnostics.statistics_error((jnp.ones((2, 3)), jnp.ones((2, 3))), (1.0, 1.0))


def test_public_names_are_documented():
    for name in mf.diagnostics.__all__:
        assert getattr(mf.diagnostics, name).__doc__, name
