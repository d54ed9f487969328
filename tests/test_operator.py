"""The Fisher operator against the dense Jacobian, and everything it refuses."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial
from tolerance import assert_close

import meanfield_jax as mf
from meanfield_jax.empirical.lanczos import top_eigenvalues
from meanfield_jax.layers.conv import convolve

RELU = mf.Activation("relu")


@pytest.fixture(autouse=True)
def _exact(x64):
    """Dense oracles are float64."""


def data(shape, num_samples: int = 7) -> jax.Array:
    return jnp.asarray(np.random.default_rng(5).normal(size=(num_samples, *shape)))


def in_double(model: nnx.Module) -> nnx.Module:
    """The model with every variable in float64."""
    state = nnx.state(model)
    cast = jax.tree.map(
        lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, state
    )
    nnx.update(model, cast)
    return model


@functools.cache
def drawn(source) -> tuple:
    """Graph and state of a model, from one program."""
    create = functools.partial(mf.build, source) if isinstance(source, mf.Network) else source
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles fast
    return nnx.split(nnx.jit(lambda: in_double(create(rngs=nnx.Rngs(key))))())


def built(source) -> nnx.Module:
    """A model of a specification or of a class, the same each time."""
    return nnx.merge(*drawn(source), copy=True)


@jax.jit
def jacobian_of(apply, params, x):
    return jax.jacrev(apply)(params, x)


@jax.jit
def outputs_of(apply, params, x):
    return apply(params, x)


def flat_jacobian(apply, params, x, keep=lambda path: True) -> np.ndarray:
    """(n C, P) by brute force; ``apply`` is what an operator holds, or a ``Partial``."""
    jacobian = jacobian_of(apply, params, x)
    rows = math.prod(jax.eval_shape(apply, params, x).shape)
    parts = [
        np.asarray(leaf).reshape(rows, -1)
        for path, leaf in jax.tree_util.tree_leaves_with_path(jacobian)
        if keep(path)
    ]
    return np.concatenate(parts, axis=1)


def dense_of(op: mf.FisherOperator) -> np.ndarray:
    """The dual as a matrix."""
    return np.asarray(op.dual.to_dense())


def check_dense(op: mf.FisherOperator, apply=None, params=None) -> np.ndarray:
    jacobian = flat_jacobian(apply or op.apply, op.params if params is None else params, op.x)
    expected = jacobian @ jacobian.T / op.x.shape[0]
    actual = dense_of(op)
    assert_close(actual, expected, "rounding", np.abs(expected).max())
    return expected


# ---- any function, Linen, NNX


def plain(params, x):
    hidden = jnp.tanh(x @ params["in"]["w"] + params["in"]["b"][None])
    return hidden @ params["out"]


def plain_params():
    rng = np.random.default_rng(0)
    weights = {"in": {"w": rng.normal(size=(4, 5)), "b": rng.normal(size=5)}}
    return jax.tree.map(jnp.asarray, weights | {"out": rng.normal(size=(5, 3))})


def test_a_plain_function():
    op = mf.FisherOperator(plain, plain_params(), data((4,)))
    assert (op.shape, op.dual.shape, op.output_shape) == ((40, 40), (21, 21), (7, 3))
    assert op.dtype == jnp.float64
    check_dense(op)


def test_a_linen_module():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.silu(nn.Dense(6, param_dtype=jnp.float64)(x))
            return nn.Dense(2, param_dtype=jnp.float64)(x)

    x = data((4,))
    module = Net()
    variables = jax.jit(module.init)(jax.random.key(0), x)
    check_dense(mf.FisherOperator(module.apply, variables, x))


class Shared(nnx.Module):
    """One linear layer used twice: it has two inputs, so no single Gram matrix describes it."""

    def __init__(self, rngs):
        self.inner = nnx.Linear(9, 9, rngs=rngs)
        self.out = nnx.Linear(9, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.inner(jnp.tanh(self.inner(x)))))


class UserNet(nnx.Module):
    """A user's own network, with flax's BatchNorm and dropout."""

    def __init__(self, rngs):
        self.first = nnx.Linear(6, 12, rngs=rngs)
        self.norm = nnx.BatchNorm(12, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(12, 3, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(jax.nn.relu(self.norm(self.first(x)))))


MODELS = {
    "wide_mlp": (lambda: built(mf.mlp([12, 12], inputs=20, outputs=2)), (20,)),
    "narrow_mlp": (lambda: built(mf.mlp([3], inputs=2, outputs=2)), (2,)),
    "batch_norm": (lambda: built(mf.mlp([12], inputs=6, outputs=2, norm=mf.BatchNorm(1.3))), (6,)),
    "cnn": (
        lambda: built(mf.cnn([3], inputs=(6, 6, 2), outputs=2, norm=mf.BatchNorm())),
        (6, 6, 2),
    ),
    "positions": (
        lambda: built(
            mf.cnn(
                [3], inputs=(4, 4, 2), outputs=2, head="mean", norm=mf.BatchNorm(axes="position")
            )
        ),
        (4, 4, 2),
    ),
    "residual": (
        lambda: built(
            mf.Network(
                (6,),
                (mf.Dense(9), mf.Residual(mf.Sequential((RELU, mf.Dense(9)))), mf.Dense(2)),
            )
        ),
        (6,),
    ),
    "repeat": (
        lambda: built(
            mf.Network(
                (6,),
                (
                    mf.Dense(9),
                    mf.Repeat(mf.Sequential((mf.BatchNorm(), RELU, mf.Dense(9))), times=3),
                    mf.Dense(2),
                ),
            )
        ),
        (6,),
    ),
    "shared_layer": (lambda: built(Shared), (9,)),
    "user_net": (lambda: built(UserNet), (6,)),
}
WITH_STATISTICS = ("batch_norm", "cnn", "positions", "repeat", "user_net")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_nnx_models_in_training_mode(name):
    create, shape = MODELS[name]
    op = mf.fisher_operator(create(), data(shape))
    expected = check_dense(op)
    assert np.abs(expected).max() > 0.01


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_nnx_models_in_evaluation_mode(name):
    create, shape = MODELS[name]
    model, x = create(), data(shape)
    mf.calibrate(model, x)
    op = mf.fisher_operator(model, x, statistics="frozen")
    frozen = check_dense(op)
    batch = dense_of(mf.fisher_operator(model, x))
    assert np.abs(frozen - batch).max() > 0.01 * np.abs(frozen).max()


@pytest.mark.parametrize("name", ["batch_norm", "user_net"])
def test_the_jacobian_of_the_model_itself_is_the_one_measured(name):
    # not the package's own functional form, but nnx's split and merge by hand
    create, shape = MODELS[name]
    model, x = create(), data(shape)
    model.train()
    if name == "user_net":
        model.dropout.deterministic = True
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @Partial
    def apply(params, x):
        return nnx.merge(graphdef, params, rest, copy=True)(x)

    check_dense(mf.fisher_operator(model, x), apply, params)


@pytest.mark.parametrize("statistics", ["batch", "frozen"])
def test_the_mode_of_the_model_does_not_matter_and_is_left_alone(statistics):
    create, shape = MODELS["user_net"]
    model, x = create(), data(shape)
    mf.calibrate(model, x)
    results = []
    for switch in (model.train, model.eval):
        switch()
        before = (model.norm.use_running_average, model.dropout.deterministic)
        state = jax.tree.map(np.array, nnx.state(model, nnx.BatchStat))
        results.append(dense_of(mf.fisher_operator(model, x, statistics=statistics)))
        assert (model.norm.use_running_average, model.dropout.deterministic) == before
        jax.tree.map(np.testing.assert_array_equal, state, nnx.state(model, nnx.BatchStat))
    np.testing.assert_array_equal(*results)


# ---- likelihood, blocks, batches, parameter space


def test_categorical_likelihood_against_the_explicit_root():
    x = data((4,))
    op = mf.FisherOperator(plain, plain_params(), x, likelihood="categorical")
    jacobian = flat_jacobian(op.apply, op.params, x)
    root = np.zeros((21, 21))
    for index, p in enumerate(np.asarray(jax.nn.softmax(outputs_of(op.apply, op.params, x)))):
        own = slice(3 * index, 3 * index + 3)
        factor = np.diag(np.sqrt(p)) - np.outer(p, np.sqrt(p))
        covariance = np.diag(p) - np.outer(p, p)
        assert_close(factor @ factor.T, covariance, "rounding", 1.0)
        root[own, own] = factor
    matrix = root.T @ jacobian @ jacobian.T @ root / 7
    assert_close(dense_of(op), matrix, "rounding", np.abs(matrix).max())
    covariance = root @ root.T
    in_parameters = np.linalg.eigvalsh(jacobian.T @ covariance @ jacobian / 7)
    top = np.linalg.eigvalsh(dense_of(op))[-14:]
    assert_close(top, in_parameters[-14:], "rounding", in_parameters[-1])


@pytest.mark.parametrize(
    ("name", "depth"),
    [("wide_mlp", "arrays"), ("user_net", "arrays"), ("cnn", "layers"), ("repeat", "layers")],
)
def test_blocks_add_up_to_the_whole(name, depth):
    create, shape = MODELS[name]
    op = mf.fisher_operator(create(), data(shape))
    paths = op.paths
    assert len(set(paths)) == len(paths)
    if depth == "layers":
        paths = sorted({path.rpartition("/")[0] for path in paths})
    whole = dense_of(op)
    assert_close(sum(dense_of(op.block(p)) for p in paths), whole, "rounding", whole.max())


@pytest.mark.parametrize("path", ["in", "in/w", "in/b", "out"])
def test_a_block_is_the_jacobian_of_its_parameters(path):
    op = mf.FisherOperator(plain, plain_params(), data((4,)))

    def below(keys):
        name = "/".join(key.key for key in keys)
        return name == path or name.startswith(f"{path}/")

    part = flat_jacobian(op.apply, op.params, op.x, below)
    expected = part @ part.T / 7
    assert_close(dense_of(op.block(path)), expected, "rounding", expected.max())
    batched = mf.FisherOperator(plain, op.params, op.x, batch_size=3).block(path)
    assert_close(dense_of(batched), expected, "rounding", expected.max())


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 10])
def test_batches_give_the_same_as_the_whole(batch_size, likelihood):
    create, shape = MODELS["wide_mlp"]
    model, x = create(), data(shape)
    whole = dense_of(mf.fisher_operator(model, x, likelihood=likelihood))
    op = mf.fisher_operator(model, x, likelihood=likelihood, batch_size=batch_size)
    assert_close(dense_of(op), whole, "rounding", whole.max())


def test_batches_of_a_model_with_frozen_statistics():
    create, shape = MODELS["user_net"]
    model, x = create(), data(shape)
    mf.calibrate(model, x)
    whole = dense_of(mf.fisher_operator(model, x, statistics="frozen"))
    op = mf.fisher_operator(model, x, statistics="frozen", batch_size=2)
    assert_close(dense_of(op), whole, "rounding", whole.max())


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical", "bernoulli"])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_the_operator_and_its_dual_share_the_spectrum(likelihood, batch_size):
    x = data((4,))
    op = mf.FisherOperator(plain, plain_params(), x, likelihood, batch_size)
    matrix = np.asarray(op.to_dense())
    assert_close(matrix, matrix.T, "rounding", matrix.max())
    outputs, parameters = (np.linalg.eigvalsh(m)[::-1][:21] for m in (dense_of(op), matrix))
    assert_close(parameters, outputs, "rounding", outputs[0])


def test_the_operator_passes_through_jit_and_other_parameters_need_no_new_one():
    op = mf.FisherOperator(plain, plain_params(), data((4,)))

    @jax.jit
    def trace_count(op, vector):
        return op @ vector

    vector = jax.random.normal(jax.random.key(1), op.shape[:1])
    matrix = np.asarray(op.to_dense())
    size = 4 * np.abs(matrix).sum(1).max()
    assert_close(trace_count(op, vector), matrix @ vector, "rounding", size)
    other = mf.FisherOperator(plain, jax.tree.map(lambda a: 2 * a, op.params), op.x)
    trace_count(other, vector)
    assert trace_count._cache_size() == 1


def test_top_eigenvalues_are_those_of_the_dense_matrix():
    create, shape = MODELS["wide_mlp"]
    op = mf.fisher_operator(create(), data(shape, 40))
    expected = np.linalg.eigvalsh(dense_of(op))[::-1][:4]
    found = top_eigenvalues(op, k=4, tol=1e-6).raise_if_failed()
    assert np.all(np.abs(found.eigenvalues - expected) <= found.error_bounds)
    assert np.all(found.error_bounds <= 1e-6 * expected)


# ---- refusals


class Stubborn(nnx.Module):
    """A BatchNorm whose mode is fixed in the call."""

    def __init__(self, use_running_average: bool, rngs):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)
        self.fixed = use_running_average

    def __call__(self, x):
        return self.head(jax.nn.relu(self.norm(self.first(x), use_running_average=self.fixed)))


def test_a_model_that_stays_in_its_own_mode_is_refused():
    x = data((4,))
    model = built(functools.partial(Stubborn, True))
    with pytest.raises(mf.SpecError, match="statistics='batch': the model uses running statistics"):
        mf.fisher_operator(model, x)
    model = built(functools.partial(Stubborn, False))
    model.norm.mean[...] = jnp.full(8, 0.5)
    with pytest.raises(
        mf.SpecError,
        match=r"statistics='frozen': the model uses batch statistics.*; do not pass use_running",
    ):
        mf.fisher_operator(model, x, statistics="frozen")


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_frozen_statistics_that_were_never_set_are_refused(name):
    create, shape = MODELS[name]
    with pytest.raises(
        mf.SpecError, match="statistics='frozen': the running statistics were never set; call"
    ):
        mf.fisher_operator(create(), data(shape), statistics="frozen")


def test_a_model_without_batch_norm_has_no_mode():
    create, shape = MODELS["wide_mlp"]
    model, x = create(), data(shape)
    batch, frozen = (
        dense_of(mf.fisher_operator(model, x, statistics=mode)) for mode in ("batch", "frozen")
    )
    np.testing.assert_array_equal(batch, frozen)


def test_batches_of_a_model_that_normalizes_by_the_batch_are_refused():
    create, shape = MODELS["batch_norm"]
    with pytest.raises(mf.SpecError, match=r"batch_size=3: .*whole batch.*; leave batch_size out"):
        mf.fisher_operator(create(), data(shape), batch_size=3)


X = np.random.default_rng(0).normal(size=(5, 20))
NAN = np.where(np.arange(20) == 3, np.nan, X)
INPUTS = {
    "nan": (NAN, r"x='5 values': NaN or infinite; remove or replace"),
    "infinite": (np.where(np.arange(20) == 3, np.inf, X), r"x='5 values': NaN or infinite"),
    "a vector": (X[0], r"x.shape=\(20,\): not a batch; pass \(samples, features\)"),
    "nothing": (X[:0], r"x.shape=\(0, 20\): not a batch"),
    "wrong shape": (X[:, :19], r"x.shape=\(5, 19\): does not fit the network; pass an array"),
    "no array": (
        "x",
        r"x='str': not an array; pass arrays whose leading axis runs over the samples",
    ),
    "none": ({}, r"x={}: contains no arrays; pass inputs"),
    "unequal": ((X, X[:4]), r"x='2 arrays': x\[0\] has 5 samples and x\[1\] has 4; pass arrays"),
    "nested": ({"a": NAN}, r"x\[a\]='5 values': NaN or infinite"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs_that_cannot_be_used_are_refused(case):
    x, message = INPUTS[case]
    model = MODELS["wide_mlp"][0]()
    with pytest.raises(mf.DataError, match=message) as caught:
        _ = mf.fisher_operator(model, x).shape
    assert "\n" not in str(caught.value)


OPTIONS = {
    "statistics": (dict(statistics="wei2019"), "statistics='wei2019': a Flax model.*; use 'batch'"),
    "likelihood": (
        dict(likelihood="poisson"),
        "likelihood='poisson': unknown; use one of gaussian",
    ),
    "batch_size": (dict(batch_size=0), "batch_size=0: must be at least 1; pass"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_unknown_options_are_refused(case):
    options, message = OPTIONS[case]
    with pytest.raises(mf.SpecError, match=message):
        mf.fisher_operator(MODELS["wide_mlp"][0](), X, **options)


@pytest.mark.parametrize(
    "model", [plain, {"w": 1.0}, nn.Dense(3)], ids=["function", "dict", "linen"]
)
def test_what_is_no_nnx_model_is_refused(model):
    with pytest.raises(mf.SpecError, match=r"model='\w+': not a Flax NNX model; .*FisherOperator"):
        mf.fisher_operator(model, X)


@pytest.mark.parametrize("path", ["layers", "in/", "in/w/x", "w", ""])
def test_a_path_without_parameters_is_refused(path):
    op = mf.FisherOperator(plain, plain_params(), data((4,)))
    with pytest.raises(mf.SpecError, match="there are no parameters under it; use one of in/b"):
        op.block(path)


# ---- running statistics


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_after_calibration_evaluation_gives_what_training_gives(name):
    create, shape = MODELS[name]
    model, x = create(), data(shape, 12)
    mf.calibrate(model, x)
    evaluating, training = nnx.clone(model), nnx.clone(model)
    evaluating.eval()
    training.train()
    for _, module in nnx.iter_modules(training):
        if isinstance(module, nnx.Dropout):
            module.deterministic = True
    found, expected = (
        np.asarray(outputs_of(*mf.functional(model), x)) for model in (evaluating, training)
    )
    assert_close(found, expected, "rounding", np.abs(expected).max())


def norms(axes: str, shape):
    def create():
        own = mf.BatchNorm(1.3, 0.2, axes=axes).build(shape, nnx.Rngs(0))
        theirs = nnx.BatchNorm(shape[-1], momentum=0.99, epsilon=1e-5, rngs=nnx.Rngs(0))
        theirs.scale[...] = jnp.full(shape[-1], 1.3)
        theirs.bias[...] = jnp.full(shape[-1], 0.2)
        return in_double(own), in_double(theirs)

    return nnx.jit(create)()


@pytest.mark.parametrize("shape", [(5,), (4, 3, 5)], ids=["vector", "map"])
def test_the_batch_norm_module_is_that_of_flax(shape):
    own, theirs = norms("channel", shape)
    weights = np.cos(np.arange(9 * math.prod(shape))).reshape(9, *shape)

    def loss(model, x):
        return jnp.sum(weights * model(x))

    @nnx.jit
    def both(own, theirs, x):
        gradients = [nnx.grad(loss, argnums=(0, 1))(model, x) for model in (own, theirs)]
        return gradients, [model(x) for model in (own, theirs)]

    # float32 constants in the module's specification
    size = dict(dtype=np.float32)
    for step in range(3):
        x = 2 * data(shape, 9) + step
        gradients, outputs = both(own, theirs, x)
        assert_close(outputs[0], outputs[1], "rounding", 5.0, **size)
        assert_close(gradients[0][1], gradients[1][1], "rounding", 5.0, **size)
        for name in ("scale", "bias"):
            a, b = (gradient[0][name][...] for gradient in gradients)
            assert_close(a, b, "rounding", 20.0, **size)
        for name in ("mean", "var"):
            a, b = (getattr(model, name)[...] for model in (own, theirs))
            assert_close(a, b, "rounding", 5.0, **size)
    own.eval()
    theirs.eval()
    a, b = (outputs_of(*mf.functional(model), x) for model in (own, theirs))
    assert_close(a, b, "rounding", 5.0, **size)


def test_statistics_by_position_are_those_of_the_flattened_map():
    shape = (4, 3, 5)
    own, _ = norms("position", shape)
    flat, _ = norms("channel", (60,))
    x = data(shape, 9)
    found, expected = nnx.jit(lambda own, flat, x: (own(x), flat(x.reshape(9, -1))))(own, flat, x)
    assert_close(found, expected.reshape(x.shape), "rounding", 5.0)
    assert own.mean[...].shape == shape


# ---- convolution


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_convolution_equals_that_of_jax(side, stride, padding):
    x = data((7, 6, 3), 2)
    weights = np.random.default_rng(0).normal(size=(side, side, 3, 4))
    numbers = ("NHWC", "HWIO", "NHWC")
    options = dict(dimension_numbers=numbers, precision=jax.lax.Precision.HIGHEST)

    @jax.jit
    def both(x, w):
        return [
            conv(x, w, (stride, stride), padding, **options)
            for conv in (convolve, jax.lax.conv_general_dilated)
        ]

    own, theirs = both(x, weights)
    assert_close(own, theirs, "rounding", float(np.abs(theirs).max()))


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CIRCULAR"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [2, 3])
def test_convolution_layers_equal_those_of_flax(side, stride, padding):
    network = mf.Network((6, 5, 3), (mf.Conv(4, side, stride, padding),))

    @jax.jit
    def both(x):
        own = built(network).layers[0]
        rngs = nnx.Rngs(jax.random.key(0, impl="unsafe_rbg"))
        theirs = nnx.Conv(3, 4, (side, side), strides=stride, padding=padding, rngs=rngs)
        theirs = in_double(theirs)
        theirs.kernel[...], theirs.bias[...] = own.kernel[...], own.bias[...]
        return own(x), theirs(x)

    found, expected = (np.asarray(outputs) for outputs in both(data((6, 5, 3), 2)))
    assert found.shape[1:] == network.output_shape
    assert_close(found, expected, "rounding", np.abs(expected).max())
