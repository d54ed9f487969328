"""The Fisher operator in its users' hands: products, other libraries, inputs and outputs, Linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
import scipy.sparse.linalg
from flax import nnx
from tolerance import assert_close

import meanfield_jax as mf

RNG = np.random.default_rng(0)
X = RNG.normal(size=(7, 4))
SINGLE = X.astype(np.float32)
PARAMS = {"a": RNG.normal(size=(4, 5)), "b": RNG.normal(size=(5, 3))}


@pytest.fixture(autouse=True)
def _exact(x64):
    """Dense oracles are float64."""


def apply(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def operator(**options) -> mf.FisherOperator:
    return mf.FisherOperator(apply, PARAMS, X, **options)


def jacobian(function, params) -> np.ndarray:
    """(all outputs, P)."""
    found = jax.jacrev(lambda p: function(p).reshape(-1))(params)
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(found)], 1)


@pytest.fixture(scope="module")
def dense():
    with jax.enable_x64():
        j = jacobian(lambda p: apply(p, X), PARAMS)
    return j.T @ j / 7


# ---- products


def test_products_of_vectors_of_several_and_of_trees(dense):
    op, size = operator(), np.abs(dense).sum()
    vectors = RNG.normal(size=(35, 3))
    assert_close(op @ vectors[:, 0], dense @ vectors[:, 0], "rounding", size)
    assert_close(op @ vectors, dense @ vectors, "rounding", size)
    tree = jax.tree.map(np.ones_like, PARAMS)
    found = op @ tree
    flat = np.concatenate([found["a"].ravel(), found["b"].ravel()])
    assert_close(flat, dense.sum(1), "rounding", size)
    assert_close(op.to_dense(), dense, "rounding", size)


def test_a_block_is_the_matrix_with_other_rows_and_columns_0(dense):
    expected = np.where(np.arange(35) < 20, 1, 0)
    expected = dense * expected * expected[:, None]
    for batch_size in (None, 2):
        block = operator(batch_size=batch_size).block("a")
        assert_close(block.to_dense(), expected, "rounding", np.abs(dense).sum())
        found = block.parameter_product(jax.tree.map(np.ones_like, PARAMS))
        assert_close(found["a"].ravel(), expected.sum(1)[:20], "rounding", np.abs(dense).sum())
        assert not found["b"].any()


def test_a_single_array_of_parameters_may_be_a_matrix():
    op = mf.FisherOperator(lambda w, x: jnp.tanh(x @ w), PARAMS["a"], X)
    product = op @ PARAMS["a"]
    assert product.shape == (4, 5)
    assert_close(product.ravel(), op @ PARAMS["a"].ravel(), "rounding", 10.0)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (np.ones(34), r"vector.shape=\(34,\): does not fit; pass an array \(35,\) or \(35, k\)"),
        (np.ones((3, 35)), r"vector.shape=\(3, 35\): does not fit"),
        ({"a": np.ones((4, 5))}, "vector='dict': its structure differs from that of params"),
    ],
)
def test_what_is_no_vector_is_refused(vector, message):
    with pytest.raises(mf.SpecError, match=message):
        operator() @ vector


def test_it_works_inside_the_callers_transformations(dense):
    size = np.abs(dense).sum()

    def curvature(scale, vector):
        params = jax.tree.map(lambda leaf: scale * leaf, PARAMS)
        return vector @ (mf.FisherOperator(apply, params, X) @ vector)

    vector = RNG.normal(size=35)
    assert_close(jax.jit(curvature)(1.0, vector), vector @ dense @ vector, "rounding", size)
    both = jax.vmap(curvature, (None, 0))(1.0, np.stack([vector, 2 * vector]))
    assert_close(both[1], 4 * both[0], "rounding", 4 * size)
    slope = (curvature(1 + 1e-5, vector) - curvature(1 - 1e-5, vector)) / 2e-5
    found = jax.jit(jax.grad(curvature))(1.0, vector)
    assert abs(found / slope - 1) < 1e-6
    top = jax.jit(lambda op: mf.top_eigenvalues(op, 2, tol=1e-8).eigenvalues)(operator())
    assert_close(top, np.linalg.eigvalsh(dense)[:-3:-1], "edge", size)


def test_other_libraries_take_it(dense):
    op = operator()
    theirs = op.to_scipy()
    assert isinstance(theirs, scipy.sparse.linalg.LinearOperator)
    top = scipy.sparse.linalg.eigsh(theirs, 2, return_eigenvectors=False)
    assert_close(top[::-1], np.linalg.eigvalsh(dense)[:-3:-1], "edge", top[1])
    assert_close(theirs @ np.ones((35, 2)), dense @ np.ones((35, 2)), "rounding", 1e3)
    damped = op.to_lineax() + 0.1 * lineax.IdentityLinearOperator(op.to_lineax().in_structure())
    damped = lineax.TaggedLinearOperator(damped, lineax.positive_semidefinite_tag)
    right = jnp.asarray(RNG.normal(size=35))
    found = lineax.linear_solve(damped, right, lineax.CG(rtol=1e-10, atol=1e-10)).value
    expected = np.linalg.solve(dense + 0.1 * np.eye(35), right)
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()


def test_eigenvectors_are_in_parameter_space(dense):
    found = mf.top_eigenvalues(operator(), 2, tol=1e-10, vectors=True)
    assert found.eigenvectors.shape == (2, 35)
    product = found.eigenvectors @ dense
    expected = found.eigenvalues[:, None] * found.eigenvectors
    assert_close(product, expected, "edge", float(found.eigenvalues[0]))
    assert_close(found.eigenvectors @ found.eigenvectors.T, np.eye(2), "edge", 1.0)


def test_it_prints_in_one_line():
    assert repr(operator()) == "FisherOperator(P=35, n=7, outputs=3, likelihood='gaussian')"
    assert repr(operator(batch_size=2).dual) == (
        "FisherOperator(P=35, n=7, outputs=3, likelihood='gaussian', batch_size=2).dual"
    )
    assert "block" in repr(operator().block("a"))


def test_too_large_a_matrix_is_refused():
    op = mf.FisherOperator(lambda w, x: x @ w, np.zeros((300, 100)), RNG.normal(size=(2, 300)))
    with pytest.raises(mf.SpecError, match=r"shape=\(30000, 30000\): the matrix is too large"):
        op.to_dense()


# ---- inputs, parameters, outputs


def test_one_logit_is_bernoulli():
    w = RNG.normal(size=4)
    s = 1 / (1 + np.exp(-X @ w))
    rows = np.sqrt(s * (1 - s))[:, None] * X
    for function in (lambda w, x: x @ w, lambda w, x: (x @ w)[:, None]):
        op = mf.FisherOperator(function, w, X, "bernoulli")
        assert_close(op.to_dense(), rows.T @ rows / 7, "rounding", 1.0)
        with pytest.raises(mf.SpecError, match="use likelihood='bernoulli' for a single logit"):
            mf.FisherOperator(function, w, X, "categorical")
    large = mf.FisherOperator(lambda w, x: 1e4 * x @ w, w, X, "bernoulli")
    assert np.isfinite(large.to_dense()).all()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": np.ones(4, complex)}, r"params\[a\].dtype='complex128': .* real parameters"),
        ({"a": np.ones(4, int)}, r"params\[a\].dtype='int64': not differentiable; hold it"),
        ({"a": "x"}, r"params\[a\]='str': not an array"),
        ({}, r"params={}: contains no arrays"),
        (
            {"params": PARAMS, "batch_stats": {"mean": np.ones(3)}},
            r"params=\['params', 'batch_stats'\]: .*\(batch_stats\); .*from_linen",
        ),
    ],
)
def test_what_is_no_parameter_is_refused(params, message):
    with pytest.raises(mf.SpecError, match=message) as caught:
        mf.FisherOperator(apply, params, X)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (lambda p, x: apply(p, x).sum(), {}, r"shape=\(\): .* over the 7 samples; return"),
        (lambda p, x: apply(p, x)[:3], {}, r"shape=\(3, 3\): .* over the 7 samples"),
        (lambda p, x: {"y": apply(p, x)}, {}, "output=None: apply returns a dict; .* one of 'y'"),
        (lambda p, x: (apply(p, x), x), dict(output=2), "output=2: .*tuple; set output .* 0, 1"),
        (apply, dict(output=0), "output=0: apply returns an array; leave it out"),
        (lambda p, x: apply(p, x) + 0j, {}, "dtype='complex128': must be a real float"),
        (lambda p, x: x @ p["b"], {}, r"x.shape=\(7, 4\): the model cannot be applied to x"),
    ],
)
def test_outputs_that_cannot_be_used_are_refused(function, options, message):
    with pytest.raises((mf.SpecError, mf.DataError), match=message) as caught:
        mf.FisherOperator(function, PARAMS, X, **options)
    assert "\n" not in str(caught.value)


def test_half_precision_is_measured_in_float32():
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), PARAMS)
    x = jnp.asarray(X, jnp.bfloat16)
    op = mf.FisherOperator(apply, params, x)
    assert op.dtype == jnp.float32
    up = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, x))
    exact = np.linalg.eigvalsh(mf.FisherOperator(apply, *up).to_dense())[-1]
    found = mf.top_eigenvalues(op).raise_if_failed().eigenvalues[0]
    assert abs(found / exact - 1) < 3 * float(jnp.finfo(jnp.bfloat16).eps)


def test_padding_is_neutral_where_the_model_is_not_defined_at_zeros():
    def direction(params, x):
        return (
            apply(params, x / jnp.linalg.norm(x, axis=-1, keepdims=True)) / jnp.log(1 + x**2)[:, :1]
        )

    whole = mf.FisherOperator(direction, PARAMS, X).to_dense()
    for batch_size in (3, 5, 20):
        parts = mf.FisherOperator(direction, PARAMS, X, batch_size=batch_size)
        assert_close(parts.to_dense(), whole, "rounding", np.abs(whole).sum())
        assert_close(np.trace(parts.dual.to_dense()), np.trace(whole), "rounding", 1e3)


# ---- modes


class ByHand(nnx.Module):
    """A BatchNorm without running statistics."""

    def __init__(self, rngs):
        self.first, self.head = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        z = self.first(x)
        return self.head(jnp.tanh((z - z.mean(0, keepdims=True)) / z.std(0, keepdims=True)))


def test_a_batch_norm_by_hand_is_never_frozen():
    model = ByHand(nnx.Rngs(0))
    mf.fisher_operator(model, X)
    message = "statistics='frozen': the model uses batch statistics whatever its mode"
    with pytest.raises(mf.SpecError, match=message):
        mf.fisher_operator(model, X, statistics="frozen")
    graphdef, state = nnx.split(model)
    function = lambda p, x: nnx.merge(graphdef, p)(x)  # noqa: E731
    mf.learning_rate(function, X, params=state)
    with pytest.raises(mf.SpecError, match="statistics='frozen': the function normalizes over"):
        mf.learning_rate(function, X, params=state, statistics="frozen")


class Normed(nnx.Module):
    """A BatchNorm that can be used, or be there for nothing."""

    def __init__(self, rngs, used=True, **options):
        self.first, self.head = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.norm, self.used = nnx.BatchNorm(6, rngs=rngs, **options), used

    def __call__(self, x):
        z = self.first(x)
        return self.head(jnp.tanh(self.norm(z) if self.used else z))


def test_a_model_with_a_mode_is_measured_inside_the_callers_jit():
    model = Normed(nnx.Rngs(0))

    def top(model, x):
        return mf.top_eigenvalues(mf.fisher_operator(model, x), 2).eigenvalues

    assert_close(nnx.jit(top)(model, SINGLE), top(model, SINGLE), "edge", 10.0, dtype=np.float32)


SPECIAL = {
    "equal samples": (Normed, SINGLE[[0, 0, 1, 2, 3, 4, 5]]),
    "all samples but one equal": (Normed, SINGLE[[0, 0, 0, 0, 0, 0, 1]]),
    "scale 0": (lambda r: Normed(r, scale_init=nnx.initializers.zeros), SINGLE),
    "scale 1e-3": (lambda r: Normed(r, scale_init=nnx.initializers.constant(1e-3)), SINGLE),
    "unused": (lambda r: Normed(r, used=False), SINGLE),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_values_that_are_special_do_not_hide_the_mode(name):
    create, x = SPECIAL[name]
    model = create(nnx.Rngs(0))
    op = mf.fisher_operator(model, x)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    j = jacobian(lambda p: nnx.merge(graphdef, p, rest, copy=True)(x), params)
    expected = np.linalg.eigvalsh(j @ j.T)[::-1][:3] / 7
    found = mf.top_eigenvalues(op, 3, tol=1e-6).raise_if_failed().eigenvalues
    assert np.abs(found - expected).max() < 1e-4 * expected[0]
    if name != "unused":
        with pytest.raises(mf.SpecError, match="batch_size=4: the outputs depend on the whole"):
            mf.FisherOperator(op.apply, op.params, x, batch_size=4)


@pytest.mark.parametrize("part", ["first", "head"])
def test_weights_of_0_do_not_hide_the_mode(part):
    model = Normed(nnx.Rngs(0))
    getattr(model, part).kernel[...] *= 0
    mf.fisher_operator(model, SINGLE)
    with pytest.raises(mf.SpecError, match="batch_size=4: the outputs depend on the whole"):
        mf.fisher_operator(model, SINGLE, batch_size=4)


def test_what_has_no_curvature_has_no_rate():
    with pytest.raises(mf.SpecError, match=r"lambda_max=0.0: no curvature: the outputs do not"):
        mf.learning_rate(lambda p, x: 0 * x @ p, X, params=np.ones((4, 3)))
    with pytest.raises(mf.SpecError, match=r"lambda_max=0.0: no curvature"):
        mf.eta_max(0.0)


# ---- Linen


class Net(nn.Module):
    """With a mode in its call, dropout, and a BatchNorm."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(jnp.tanh(x)))


@pytest.mark.parametrize("statistics", ["batch", "frozen"])
def test_linen_variables_are_split_and_the_mode_is_set(statistics):
    x = jnp.asarray(SINGLE)
    variables = Net().init(jax.random.key(0), x, train=False)
    variables["batch_stats"] = jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])
    op = mf.FisherOperator.from_linen(Net(), variables, x, statistics=statistics)

    def outputs(params):
        z = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None]
        stats = variables["batch_stats"]["BatchNorm_0"]
        mean, var = stats["mean"], stats["var"]
        if statistics == "batch":
            mean, var = z.mean(0), z.var(0)
        z = (z - mean[None]) / jnp.sqrt(var[None] + 1e-5)
        norm, head = params["BatchNorm_0"], params["Dense_1"]
        h = jnp.tanh(norm["scale"][None] * z + norm["bias"][None])
        return h @ head["kernel"] + head["bias"][None]

    j = jacobian(outputs, variables["params"])
    found = np.linalg.eigvalsh(op.dual.to_dense())
    expected = np.linalg.eigvalsh(j @ j.T / 7)
    assert_close(found, expected, "rounding", 10 * expected[-1], dtype=np.float32)
    assert op.num_parameters == j.shape[1]


def test_linen_in_another_mode_than_asked_for_is_refused():
    x = jnp.asarray(SINGLE)
    variables = Net().init(jax.random.key(0), x, train=False)
    moved = variables | {"batch_stats": jax.tree.map(lambda a: a + 0.5, variables["batch_stats"])}
    create = mf.FisherOperator.from_linen
    with pytest.raises(mf.SpecError, match="statistics='batch': the model uses running"):
        create(Net(), moved, x, train=False)
    with pytest.raises(mf.SpecError, match="statistics='frozen': the model uses batch"):
        create(Net(), moved, x, statistics="frozen", train=True)
    with pytest.raises(mf.SpecError, match="the running statistics were never set"):
        create(Net(), variables, x, statistics="frozen")
    with pytest.raises(mf.SpecError, match="batch_size=2: the outputs depend"):
        create(Net(), variables, x, batch_size=2)
    with pytest.raises(mf.SpecError, match=r"variables=.*: 'params' is missing"):
        create(Net(), {"batch_stats": {}}, x)
    with pytest.raises(mf.SpecError, match="module='Normed': not a Flax Linen module"):
        create(Normed(nnx.Rngs(0)), variables, x)


# ---- trace and layers


@pytest.mark.parametrize("seed", range(3))
def test_a_trace_is_within_its_error(seed):
    op = mf.FisherOperator(apply, PARAMS, RNG.normal(size=(60, 4)))
    exact = float(jnp.trace(op.to_dense()))
    found = mf.trace(op, num_probes=12, key=jax.random.key(seed)).raise_if_failed()
    assert found.num_matvecs == 36
    assert abs(found.value - exact) < 4 * found.standard_error + 1e-9 * exact
    assert 0 < found.standard_error < 0.1 * exact


def test_the_error_of_a_trace_is_the_scatter_over_seeds():
    op = mf.FisherOperator(apply, PARAMS, RNG.normal(size=(60, 4)))
    exact = float(jnp.trace(op.to_dense()))
    runs = [mf.trace(op, num_probes=8, key=jax.random.key(seed)) for seed in range(100)]
    errors = np.array([float(run.value) - exact for run in runs])
    claimed = np.array([float(run.standard_error) for run in runs])
    assert abs(errors.mean()) < 4 * errors.std(ddof=1) / 10
    # a binomial of 100 with p = .95 is above 86 with probability .9999
    assert np.mean(np.abs(errors) < 2.36 * claimed) > 0.86


def test_small_operators_have_an_exact_trace(dense):
    found = mf.trace(operator())
    assert found.standard_error == 0
    assert_close(found.value, np.trace(dense), "rounding")
    with pytest.raises(mf.SpecError, match="num_probes=1: must be at least 2; pass 2 or more"):
        mf.trace(operator(), num_probes=1)
    bad = mf.FisherOperator(apply, jax.tree.map(lambda a: a * np.inf, PARAMS), X)
    with pytest.raises(RuntimeError, match="trace: a product with the operator is not finite"):
        mf.trace(bad).raise_if_failed()


def test_the_table_of_layers_is_that_of_the_blocks(dense):
    table = mf.layer_table(operator(), tol=1e-8)
    assert list(table.layer.values) == ["a", "b"]
    assert table.parameters.values.tolist() == [20, 15]
    parts = dense[:20, :20], dense[20:, 20:]
    tops = [np.linalg.eigvalsh(part)[-1] for part in parts]
    assert_close(table.lambda_max.values, tops, "edge", tops[0])
    traces = np.array([np.trace(part) for part in parts])
    assert_close(table.trace.values, traces, "rounding", traces.sum())
    assert_close(table.fraction.values, traces / traces.sum(), "rounding", 1.0)
    with pytest.raises(mf.SpecError, match="op='ndarray': must be a FisherOperator"):
        mf.layer_table(dense)
