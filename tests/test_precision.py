"""Products in full precision: nothing that theory or Lanczos rests on is left to a default.

On an accelerator the default rounds the factors to 10 bits of mantissa (TF32). So all products in
the traced programs are looked at, and a Lanczos search runs with those rounded that do not ask.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core

import meanfield_jax as mf
from meanfield_jax.memory import memory_of

PRODUCTS = ("dot_general", "conv_general_dilated")
N = 12


def products(jaxpr):
    """Every product of floating-point numbers in a program, those inside its calls too."""
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda value: isinstance(value, (core.Jaxpr, core.ClosedJaxpr)),
        ):
            if isinstance(inner, core.ClosedJaxpr):
                yield from products(inner.jaxpr)
            elif isinstance(inner, core.Jaxpr):
                yield from products(inner)
        floating = jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating)
        if equation.primitive.name in PRODUCTS and floating:
            yield equation


def is_full(equation) -> bool:
    precision = equation.params["precision"]
    both = precision if isinstance(precision, tuple) else (precision,)
    return all(each == jax.lax.Precision.HIGHEST for each in both)


def batch(*shape: int):
    return jnp.asarray(np.random.default_rng(0).normal(size=(N, *shape)), jnp.float32)


def mlp(norm: mf.Layer | None = None, activation: str = "relu") -> mf.Network:
    return mf.mlp([8] * 2, inputs=6, outputs=3, norm=norm, activation=activation)


def cnn(norm: mf.Layer | None, head: str = "mean") -> mf.Network:
    return mf.cnn([4, 8], inputs=(4, 4, 3), outputs=3, stride=1, head=head, norm=norm)


def on_data(network: mf.Network, **options):
    """The derivative of all that theory says of a batch, in gamma and the variances."""

    def total(network, x):
        theory = mf.analyze(network, data=x, **options)
        fisher = theory.fisher
        rates = [fisher.outlier_low, fisher.outlier_high, fisher.bulk_high, fisher.lambda_max]
        return sum(leaf.sum() for leaf in jax.tree.leaves((fisher, rates)))

    return jax.value_and_grad(total), (jax.tree.map(float, network), batch(*network.input_shape))


def of_gaussian_inputs(network: mf.Network, **options):
    def total(network):
        fisher = mf.analyze(network, num_samples=N, **options).fisher
        return fisher.lambda_max + fisher.outlier_low + fisher.bulk_high

    return jax.value_and_grad(total), (jax.tree.map(float, network),)


class Plain(nnx.Module):
    """A user's model, which asks for no precision."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.head = nnx.Linear(64, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.conv(x)).reshape(len(x), -1))


def measured(batch_size: int | None, likelihood: str):
    operator = mf.fisher_operator(
        Plain(nnx.Rngs(0)), batch(4, 4, 3), batch_size=batch_size, likelihood=likelihood
    )
    return functools.partial(mf.top_eigenvalues, k=2, vectors=True), (operator,)


def parameter_product():
    operator = mf.fisher_operator(Plain(nnx.Rngs(0)), batch(4, 4, 3))
    return operator.parameter_product, (operator.params,)


def density():
    operator = mf.fisher_operator(Plain(nnx.Rngs(0)), batch(4, 4, 3))
    return lambda op: mf.spectral_density(op, num_steps=4).density(jnp.linspace(0, 1, 9)), (
        operator,
    )


def outputs(network: mf.Network):
    model = mf.build(network, rngs=nnx.Rngs(0))
    return mf.functional(model)[0], (mf.functional(model)[1], batch(*network.input_shape))


PROGRAMS = {
    "data": lambda: on_data(mlp(mf.BatchNorm(), "tanh")),
    "data, pooled": lambda: on_data(cnn(mf.BatchNorm())),
    "data, groups": lambda: on_data(cnn(mf.GroupNorm(num_groups=2))),
    "data, frozen": lambda: on_data(mlp(mf.BatchNorm()), statistics="frozen"),
    "data, proxy": lambda: on_data(mlp(mf.ProxyNorm())),
    "data, categorical": lambda: on_data(mlp(mf.BatchNorm()), likelihood="categorical"),
    "iid": lambda: of_gaussian_inputs(mlp(mf.BatchNorm(), "tanh")),
    "iid, groups": lambda: of_gaussian_inputs(cnn(mf.GroupNorm(num_groups=2))),
    "iid, pooled": lambda: of_gaussian_inputs(cnn(mf.BatchNorm())),
    "eigenvalues": lambda: measured(None, "gaussian"),
    "eigenvalues in chunks": lambda: measured(5, "categorical"),
    "parameter product": parameter_product,
    "density": density,
    "dense outputs": lambda: outputs(mlp(mf.CrossIterationBatchNorm())),
    "conv outputs": lambda: outputs(cnn(mf.ProxyNorm(mf.GroupNorm(num_groups=2)), "flatten")),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_product_asks_for_full_precision(name):
    function, arguments = PROGRAMS[name]()
    for equation in products(jax.make_jaxpr(function)(*arguments).jaxpr):
        assert is_full(equation), equation


@pytest.mark.parametrize(
    ("precision", "asked"),
    [
        ("float32", {(jax.lax.Precision.HIGHEST,) * 2}),
        ("tf32", {(jax.lax.Precision.HIGH,) * 2}),
        ("bf16", {jax.lax.DotAlgorithmPreset.BF16_BF16_F32}),
    ],
)
def test_products_of_training_ask_for_the_precision_given(precision, asked):
    layers = mf.Conv(4, 3), mf.BatchNorm(), mf.SelfAttention(2), mf.MixPositions((2, 2))
    network = mf.Network((4, 4, 3), (*layers, mf.Flatten(), mf.Dense(3)))
    data = batch(4, 4, 3), np.arange(N) % 3

    def run(learning_rate):
        options = dict(test=data, batch_size=4, precision=precision)
        return mf.train(network, data, learning_rate=learning_rate, **options)

    found = list(products(jax.make_jaxpr(run)(0.1).jaxpr))
    assert {equation.params["precision"] for equation in found} == asked


@pytest.fixture
def coarse_products(monkeypatch):
    """Products that do not ask for more are computed as an accelerator's default does."""
    place = "jax._src.lax.lax.dot_general"  # where all of JAX looks it up
    exact = jax.lax.dot_general

    def rounded(a, b, dimensions, precision=None, **options):
        asked = precision or jax.config.jax_default_matmul_precision
        if asked not in ("highest", jax.lax.Precision.HIGHEST):
            a, b = (jax.lax.reduce_precision(factor, 8, 10) for factor in (a, b))
        return exact(a, b, dimensions, precision=precision, **options)

    monkeypatch.setattr(place, rounded)
    jax.clear_caches()
    yield
    monkeypatch.undo()
    jax.clear_caches()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Symmetric:
    """A matrix as an operator, its products in the precision given."""

    matrix: jax.Array
    precision: str = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self):
        return self.matrix.shape

    @property
    def dtype(self):
        return self.matrix.dtype

    def linearize(self):
        product = functools.partial(jnp.matmul, precision=self.precision)
        return lambda u: product(self.matrix, u)


def kept_bounds(precision: str, seeds: int = 40) -> float:
    """In which fraction of searches all three error bounds hold, on spectra without gaps."""
    kept = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        frame = np.linalg.qr(rng.normal(size=(60, 60)))[0]
        matrix = (frame * rng.beta(0.5, 2, size=60)) @ frame.T
        matrix = ((matrix + matrix.T) / 2).astype(np.float32)
        exact = np.linalg.eigvalsh(matrix.astype(np.float64))[::-1][:3]
        operator = Symmetric(jnp.asarray(matrix), precision)
        found = mf.top_eigenvalues(operator, 3, tol=1e-3, key=jax.random.key(seed))
        kept.append((np.abs(exact - np.asarray(found.eigenvalues)) <= found.error_bounds).all())
    return np.mean(kept)


def test_bounds_of_lanczos_hold_where_products_are_coarse_by_default(coarse_products):
    assert kept_bounds("highest") >= 0.99
    # the fixture does round: it spoils an operator that asks for nothing
    assert kept_bounds("default") < 0.9


def test_bounds_of_lanczos_hold_with_an_eigensolver_less_exact_than_lapack(monkeypatch):
    exact = jnp.linalg.eigh

    def eigh(matrix):
        noise = jax.random.normal(jax.random.key(0), matrix.shape, matrix.dtype)
        noise = (noise + noise.T) / jnp.sqrt(2 * len(matrix))
        # of norm 2 or less
        size = 5 * jnp.finfo(matrix.dtype).eps * jnp.linalg.norm(matrix, 2)
        return exact(matrix + size * noise)

    monkeypatch.setattr(jnp.linalg, "eigh", eigh)
    jax.clear_caches()
    assert kept_bounds("highest") >= 0.99
    jax.clear_caches()


class Device:
    """A device that says how much memory it has, or does not."""

    def __init__(self, platform: str, limit: int | None):
        self.platform, self.limit = platform, limit

    def memory_stats(self):
        return None if self.limit is None else dict(bytes_limit=self.limit)


def test_memory_is_that_of_the_devices():
    gpus = [Device("gpu", 10), Device("gpu", 30)]
    assert memory_of(gpus) == 40
    assert memory_of([Device("gpu", None)]) == np.inf
    one, four = (memory_of([Device("cpu", None)] * count) for count in (1, 4))
    assert one == four > 2**28


def test_more_than_the_device_has_is_refused(monkeypatch):
    small = [Device("gpu", 75 * 4 * 10**2)]
    monkeypatch.setattr(
        "meanfield_jax.theory.memory_plan.memory_of", lambda devices: memory_of(small)
    )
    with pytest.raises(mf.DataError, match="at most 10 samples"):
        mf.analyze(mlp(mf.BatchNorm()), data=batch(6))
