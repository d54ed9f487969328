"""Random specifications and arguments: each is an error of one line, or means what it says.

Each test goes through seeds for MEANFIELD_JAX_FUZZ_SECONDS (3 by default). Long computations are
cut off where they would start, because what is tested is what comes before them.
"""

import dataclasses
import datetime
import decimal
import fractions
import inspect
import itertools
import json
import pathlib
import random
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr
from borders import Reached, answer, draws
from flax import nnx

import meanfield_jax as mf
from meanfield_jax import arguments
from meanfield_jax.errors import shown
from meanfield_jax.layers.base import LAYERS

SMALL = mf.mlp([4], inputs=3, outputs=2, norm=mf.BatchNorm())
BLOCK = mf.Sequential((mf.Dense(4), mf.BatchNorm(), mf.Activation("tanh")))
MAPS = mf.cnn([4], inputs=(6, 6, 2), outputs=3, norm=mf.GroupNorm(num_groups=2))
X = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
Y = np.arange(8) % 2


class Hostile:
    """An object that cannot be shown, compared or used as a truth value."""

    __hash__ = None  # pyright: ignore

    def __repr__(self):
        raise RuntimeError("no repr")

    def __eq__(self, other):
        raise RuntimeError("no comparison")

    def __bool__(self):
        raise RuntimeError("no truth")


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def tower(depth: int, wrap: Callable[[Any], Any]) -> mf.layers.Layer:
    layer: Any = mf.Dense(3)
    for _ in range(depth):
        layer = wrap(layer)
    return layer


def one(layer):
    return mf.Sequential((layer,))


def two(layer):
    return mf.Sequential((layer, layer))


def many(layer):
    return mf.Repeat(layer, times=10**6)


ODD: list[Any] = [
    *(None, True, False, 0, 1, 2, -1, 3.0, 0.5, -0.5, 1e-320, 1e300, float("nan"), float("inf")),
    *(10**6, 10**9, 10**12, -(10**12), 10**30, 10**400, -(10**5000), 1j, 2 + 0j),
    *("", "no", "relu", "batch", "none", "SAME", "a\nb", "\0", "\ud800", "x" * 10**5, b"relu"),
    *([], (), {}, set(), [1], (2, 3), [0.5, 0.1], ["batch"], [[1], [2, 3]], {"a": 1}, {1: 2}),
    *(range(3), range(10**9), range(10**12), nested(5000), frozenset([1]), iter([1, 2]), ...),
    *(object(), Hostile(), len, int, lambda: 0, lambda x: x[:1], jnp.tanh, jnp.sum, np.tanh),
    *(np.float32(2), np.float64("nan"), np.int64(3), np.uint8(200), np.bool_(True), np.float16(2)),
    *(np.longdouble(2), np.array(2.0), np.array(3), np.array([1.0, 2.0]), np.array([1, 2, 3])),
    *(np.array(["a", "b"]), np.array([None, 1]), np.array([]), np.zeros((0, 3)), np.zeros((3, 0))),
    *(np.array([1 + 1j]), np.datetime64("2020-01-01"), np.ma.masked, np.zeros((8, 4), np.float32)),
    *(np.full((8, 3), np.nan, np.float32), np.full((8, 3), 1e300), np.zeros((8, 3), int)),
    *(jnp.array(2.0), jnp.array(3), jnp.array([1.0, 2.0]), jnp.array(2, jnp.bfloat16)),
    *(jnp.zeros((8, 3)), jax.random.key(0), jax.random.split(jax.random.key(0)), jnp.float32),
    *(jax.ShapeDtypeStruct((8, 3), jnp.float32), fractions.Fraction(1, 2), decimal.Decimal(1)),
    *(datetime.datetime(2020, 1, 1), pathlib.Path("x"), xr.Dataset(), xr.DataArray([1.0])),
    *(mf.Dense(3), mf.Dense, mf.BatchNorm, mf.BatchNorm(), mf.GroupNorm, mf.ProxyNorm, mf.Repeat),
    *(SMALL, MAPS, BLOCK, mf.Network, mf.Flatten(), mf.Activation, mf.Activation("tanh")),
    *(nnx.Rngs(0), nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Linear, optax.adam, optax.sgd(0.1)),
    *(tower(2000, one), tower(60, two), tower(9, many), tower(20, one), tower(20, mf.Residual)),
    *(X, Y, Y + 1, Y - 1, Y + 255, Y + 0.5, Y.astype(bool), Y[:5], Y.astype(str), (X, Y), [X, Y]),
    *((X, Y + 1), (X[:4], Y), (X, None), (X,), (X, Y, Y), (Y, X), (None, None), ("x", "y")),
    *(np.ones((8, 3), dtype) for dtype in ("g", "G", ">f4", ">i8", "O", "S1", "U1", "M8[s]")),
    *(np.ones((8, 3), dtype) for dtype in ("m8[s]", "V4", [("a", float)], jnp.bfloat16)),
    *(np.timedelta64(3), np.ones((8, 3), np.dtypes.StringDType())),
    *((X, np.where(Y, np.nan, 0)), (X, np.eye(2)[Y]), (X, np.full((8, 2), np.nan)), (X[:0], Y[:0])),
]
"""Values of every kind, most of them nonsense wherever they are put."""


# ---- specifications


def some_field(rng: random.Random, field: dataclasses.Field) -> Any:
    """A value for a field: an odd one, or one that is right for most fields of this type."""
    if rng.random() < 0.15:
        return rng.choice(ODD)
    if "function" in field.name:
        return rng.choice(["relu", "tanh", "erf", jnp.sin])
    right: dict[Any, list[Any]] = {
        int: [1, 2, 3, 4, np.int64(2), np.array(3), jnp.array(2)],
        bool: [True, False, np.bool_(False)],
        str: ["SAME", "VALID", "CIRCULAR", "channel", "position"],
        tuple[mf.layers.Layer, ...]: [(mf.Dense(3),), [mf.Dense(4)], ()],
    }
    if field.type in right:
        return rng.choice(right[field.type])
    if isinstance(field.type, type) and issubclass(field.type, mf.layers.Layer):
        return rng.choice([mf.Dense(3), mf.LayerNorm, mf.Activation("tanh"), BLOCK])
    return rng.choice([0.5, 1, 2.0, 0, np.float32(0.5), np.float64(2), np.array(0.1), jnp.ones(())])


def some_layer(rng: random.Random) -> mf.layers.Layer:
    cls = LAYERS[rng.choice(sorted(LAYERS))]
    fields = dataclasses.fields(cls)  # pyright: ignore
    needed = [f.name for f in fields if f.default is dataclasses.MISSING]
    given = {f.name: some_field(rng, f) for f in fields if f.name in needed or rng.random() < 0.3}
    return cls(**given)


def some_network(rng: random.Random) -> mf.Network:
    shape = rng.choice([(3,), (6, 6, 2), (1, 1, 1), 3, np.array([5])])
    first = rng.choice([mf.Dense(4), mf.Conv(4), mf.Conv(4, kernel_size=1)])
    layers: list[Any] = [first] * (rng.random() < 0.8)
    layers += [some_layer(rng) for _ in range(rng.randint(0, 3))]
    layers += [mf.Flatten()] * (rng.random() < 0.4) + [mf.Dense(2)] * (rng.random() < 0.7)
    if rng.random() < 0.05:
        layers.insert(rng.randint(0, len(layers)), rng.choice(ODD))
    return mf.Network(shape, layers if rng.random() < 0.95 else rng.choice(ODD))


def checked(network: mf.Network, whole: bool) -> mf.Network:
    """Uses a network in every way that takes no compilation; what it says has to be true."""
    network.validate()
    assert repr(network).startswith("Network")
    assert all(type(size) is int for size in (*network.input_shape, network.num_parameters))
    try:
        text = network.to_json()
    except mf.SpecError as error:
        assert "function" in str(error)  # noqa: PT017, functions have no JSON
    else:
        again = mf.Network.from_json(text)
        assert again.to_json() == text
        assert again.output_shape == network.output_shape
    if whole:
        used(network)
    return network


def used(network: mf.Network) -> None:
    """Theory and Flax model, as shapes."""
    model = jax.eval_shape(lambda: nnx.state(mf.build(network, rngs=0), nnx.Param))
    assert network.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(model))
    theory = jax.eval_shape(lambda: mf.analyze(network, num_samples=8))
    assert theory.kernel.tangent.same.shape == ()


def test_specifications():
    answers = []
    for seed, rng in draws("specifications"):
        what = f"seed {seed}"
        whole = seed % 20 == 0
        answers.append(answer(lambda rng=rng, n=whole: checked(some_network(rng), n), what))
    assert any(found is not None for found in answers)
    assert any(found is None for found in answers)


@pytest.mark.parametrize("layer", [tower(60, two), tower(2000, one), tower(9, many)])
def test_layers_that_stand_for_too_many_are_refused(layer):
    for use in (lambda: mf.Network((3,), (layer,)), lambda: mf.fixed_point(layer)):
        assert answer(use, "tower") is None


def test_nesting_up_to_the_limit_works():
    for layer in (tower(20, one), tower(5, lambda inner: mf.Repeat(inner, times=2))):
        used(mf.Network((3,), (layer, mf.Dense(2))))


# ---- JSON


def mutated(rng: random.Random, value: Any) -> Any:
    """A copy of parsed JSON, with something changed somewhere."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        kind = rng.random()
        if kind < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if kind < 0.2:
            name = rng.choice(["x", "", "type", "times", "\ud800"])
            return value | {name: rng.choice([1, "Conv"])}
        return value | {key: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.9:
        index = rng.randrange(len(value))
        return [*value[:index], mutated(rng, value[index]), *value[index + rng.randint(0, 1) :]]
    odd = [None, True, "no", "", -1, 0, 2.5, 1e308, 10**30, [], {}, [[]], {"type": "Dense"}]
    return rng.choice([*odd, float("nan"), float("inf"), {"type": ["Dense"]}, nested(40), [value]])


def some_text(rng: random.Random) -> Any:
    deep = mf.Network((3,), (BLOCK, mf.Repeat(mf.Dense(4)), mf.Dense(2)))
    network = rng.choice([SMALL, MAPS, deep])
    spec = json.loads(network.to_json())
    for _ in range(rng.randint(1, 3)):
        spec = mutated(rng, spec)
    text, kind = json.dumps(spec), rng.random()
    if kind < 0.1:
        return text[: rng.randrange(len(text))]
    if kind < 0.2:
        at = rng.randrange(len(text))
        return (
            text[:at] + rng.choice(["\0", "{", "]", ",", "9" * 5000, "\u2028", "NaN"]) + text[at:]
        )
    if kind < 0.25:
        return text.replace('"width": ', '"width": 5, "width": ')
    if kind < 0.3:
        return rng.choice(['{"a":' * 10**5, "[" * 10**5, b"\xff\xfe", text.encode("utf-16"), *ODD])
    return text


def test_json():
    for seed, rng in draws("json"):
        text = some_text(rng)
        what = f"seed {seed}: {_text(text)}"
        answer(lambda text=text: checked(mf.Network.from_json(text), False), what)


# ---- arguments

DOORS = {
    "theory.analyze": ("iid", "on_data"),
    "theory.fixed_point": ("_found",),
    "theory.phase_diagram": ("_solved",),
    "theory.batch_growth": ("_component",),
    "empirical.model": ("Model", "batch_statistics"),
    "empirical.nnx_model": ("check_mode",),
    "empirical.lanczos": ("_begin_search",),
    "empirical.density": ("_begin", "_density_compiled"),
    "empirical.trace": ("_signs",),
    "experiments.train": ("run_cells",),
    "experiments.sweep": ("create",),
    "diagnostics.capture": ("_Log",),
    "diagnostics.gradients": ("_gradient", "_sums", "_sample_variance"),
    "diagnostics.statistics": ("_by_layer",),
}
"""Where a long computation begins."""


@pytest.fixture
def cut_off(monkeypatch):
    """Long computations raise Reached."""

    def reached(*args, **options):
        raise Reached

    for module, names in DOORS.items():
        for name in names:
            monkeypatch.setattr(sys.modules[f"meanfield_jax.{module}"], name, reached)
    monkeypatch.setenv("MEANFIELD_JAX_MAX_MEMORY", "1e9")


def functions() -> dict[str, Callable]:
    """All public functions, by name."""
    found = {name: getattr(mf, name) for name in mf.__all__ if name not in mf.layers.__all__}
    for module in (mf.diagnostics, mf.objectives, mf.data):
        names = getattr(module, "__all__", ["load", "shape_of"])
        if module is mf.objectives:
            names = ["target_rate", "max_rate", "target_eta_max", "max_eta_max", "sharpness"]
        found |= {name: getattr(module, name) for name in names}
    return {name: value for name, value in found.items() if inspect.isfunction(value)}


LOSS = optax.softmax_cross_entropy_with_integer_labels


@pytest.fixture(scope="module")
def given():
    """Right arguments by name, and for single functions."""
    model = mf.build(SMALL, rngs=0)
    operator = mf.fisher_operator(model, X)
    spectrum = mf.SpectralDensity(jnp.ones((1, 4)), jnp.full((1, 4), 0.25))
    named = dict(
        network=SMALL, model=model, x=X, y=Y, data=(X, Y), test=(X, Y), block=BLOCK, op=operator,
        rngs=0, key=1, activation="relu", num_samples=8, gamma=1.0, beta=0.0, widths=[4], inputs=3,
        outputs=2, channels=[4], lambda_max=1.0, momentum=0.9, epochs=1, batch_size=4, norm=None,
        weight_var=[1.0, 2.0], bias_var=[0.1], grid=dict(learning_rate=[0.1, 0.2]), loss="squared",
        learning_rate=0.1, seed=0, objective=mf.objectives.unit_growth(), name="gaussian",
        value=0.1, dataset=xr.Dataset(), density=spectrum, num_eigenvalues=2, tuning=None,
        grads={"a": X}, activations={"a": X}, used=(X, X**2), full=(X[0], X[0] ** 2),
        batch_sizes=[4], num_steps=20,
    )  # fmt: skip
    own: dict[str, dict[str, Any]] = dict(
        analyze=dict(data=X),
        learning_rate=dict(model=SMALL),
        suggest_schedule=dict(model=SMALL),
        tune=dict(data=X),
        power=dict(activation=X),
        mlp=dict(weight_var=1.0, bias_var=0.1),
        cnn=dict(inputs=(6, 6, 2), weight_var=1.0, bias_var=0.1),
        preact_resnet=dict(inputs=(6, 6, 2), weight_var=1.0, bias_var=0.1),
        gradients=dict(loss=LOSS),
        input_dependence=dict(loss=LOSS),
        gradient_noise=dict(loss=LOSS),
        plot_sweep=dict(value=None),
        stability_limit=dict(optimizer=optax.sgd(1.0, 0.9)),
    )
    own["analyze"]["num_samples"] = own["tune"]["num_samples"] = None
    return named, own


def some_call(rng: random.Random, given) -> tuple[str, dict[str, Any]]:
    """A function, and arguments of which one or two are odd."""
    named, own = given
    name = rng.choice(sorted(set(functions()) - {"load_sweep"}))
    parameters = inspect.signature(functions()[name]).parameters.values()
    right = named | own.get(name, {})
    call = {p.name: right[p.name] for p in parameters if p.default is p.empty}
    for parameter in rng.choices([*parameters], k=rng.randint(1, 2)) if parameters else ():
        value: Any = rng.choice(ODD)
        if rng.random() < 0.15:
            value = rng.choice([[value], (value,), {"gamma": value}, (X, value), [value, 1]])
        call[parameter.name] = value
    return name, call


@pytest.mark.filterwarnings("ignore")
def test_arguments(cut_off, given):
    """Calls with odd arguments; RuntimeErrors are those of results that say that they failed."""
    for seed, rng in draws("arguments"):
        name, call = some_call(rng, given)
        listed = ", ".join(f"{key}={_text(value)}" for key, value in call.items())
        what = f"seed {seed}: {name}({listed})"
        answer(lambda name=name, call=call: functions()[name](**call), what)


def _text(value: Any) -> str:
    return f"{type(value).__name__} {shown(value):.200}"


KNOWN = ("g", ">f4", ">f8", ">i2", "G", ">c8", jnp.bfloat16, jnp.int4)
"""Dtypes of numbers that NumPy and JAX do not have in common."""

FOREIGN = ("O", "S1", "U1", "M8[s]", "m8[s]", "V4", [("a", float)], np.dtypes.StringDType())
"""Dtypes without numbers."""

PLACES: list[Callable[[Any], Any]] = [
    lambda value: value,
    lambda value: [value],
    lambda value: {"a": value},
    lambda value: (value, value),
    lambda value: (X, value),
    lambda value: value[0, 0],
    lambda value: value[:, 0],
]
"""Where an array may stand in an argument."""


@pytest.mark.filterwarnings("ignore")
def test_arrays_of_every_dtype(cut_off, given):
    """In every argument, in places that take turns, they are refused in one line, or accepted."""
    named, own = given
    arrays = [np.ones((8, 3), dtype) for dtype in (*KNOWN, *FOREIGN)]
    places = itertools.cycle(PLACES)
    for name, function in functions().items():
        if name == "load_sweep":
            continue
        parameters = inspect.signature(function).parameters.values()
        right = named | own.get(name, {})
        right = {p.name: right[p.name] for p in parameters if p.default is p.empty}
        for parameter, values in itertools.product(parameters, arrays):
            value = next(places)(values)
            call = right | {parameter.name: value}
            what = f"{name}({parameter.name}={_text(value)})"
            answer(lambda function=function, call=call: function(**call), what)


@pytest.mark.parametrize("dtype", ["g", ">f4", ">f8"])
def test_other_orders_of_bytes_and_long_doubles_are_numbers(given, dtype):
    def apply(params, x):
        return jnp.tanh(x @ params["w"])

    other = X.astype(dtype)
    weights = np.linspace(0, 1, 6).reshape(3, 2)
    operator = mf.FisherOperator(apply, {"w": weights.astype(np.float32)}, X)
    found = mf.FisherOperator(apply, {"w": weights.astype(dtype)}, other)
    assert np.array_equal(found.x, operator.x)
    assert np.array_equal(found.params["w"], operator.params["w"])
    vector = np.arange(6.0, dtype=dtype)
    assert np.array_equal(found @ vector, operator @ vector.astype(np.float32))
    one, other_one = (op @ {"w": vector.reshape(3, 2)} for op in (found, operator))
    assert np.array_equal(one["w"], other_one["w"])
    assert mf.diagnostics.power(other).P1 == mf.diagnostics.power(X).P1
    assert mf.eta_max(np.ones(2, dtype), np.zeros(2, dtype)).tolist() == [2, 2]
    kept = mf.Dense(3, weight_var=np.ones(2, dtype)).weight_var.dtype
    assert kept == (np.float32 if dtype == ">f4" else np.float64)


@pytest.mark.parametrize("dtype", FOREIGN)
def test_arrays_without_numbers_are_refused(given, dtype):
    values = np.ones((8, 3), dtype)
    operator = mf.fisher_operator(given[0]["model"], X)
    attempts = [
        lambda: mf.FisherOperator(lambda p, x: x @ p, values, X),
        lambda: mf.FisherOperator(lambda p, x: x @ p, {"w": X[:3]}, {"x": values}),
        lambda: operator @ np.ones(operator.shape[0], dtype),
        lambda: operator @ jax.tree.map(lambda leaf: np.ones(leaf.shape, dtype), operator.params),
        lambda: operator.to_scipy() @ np.ones(operator.shape[0], dtype),
        lambda: mf.Network(3, [mf.Dense(2, weight_var=values)]).validate(),
    ]
    for attempt in attempts:
        assert answer(attempt, str(dtype)) is None


NAN, INF = float("nan"), float("inf")
COUNTS = (
    *("batch_size", "chunk_cells", "draws", "epochs", "k", "max_steps", "num_batches", "num_draws"),
    *("num_eigenvalues", "num_probes", "num_steps", "seeds"),
)
NONSENSE: dict[str, tuple[float, ...]] = dict(
    **dict.fromkeys(COUNTS, (0, -1)),
    **dict.fromkeys(("fraction", "patience", "residual", "tol", "tolerance"), (0, -1.0, NAN, INF)),
    momentum=(-0.1, 1, 1.5, NAN),
    learning_rate=(-1.0, NAN),
    lambda_max=(0.0, -1.0),
)
"""Numbers that no function can use, by the name of the argument."""


def test_nonsense_numbers_are_refused_by_every_function(cut_off, given):
    """Also by a sweep, where they are on an axis; and before any long computation."""
    named, own = given
    seen = set()
    for name, function in functions().items():
        parameters = inspect.signature(function).parameters.values()
        right = named | own.get(name, {})
        right = {
            p.name: right[p.name] for p in parameters if p.default is p.empty and p.name in right
        }
        for argument in {p.name for p in parameters} & NONSENSE.keys():
            seen.add(argument)
            for value in NONSENSE[argument]:
                call = right | {argument: value}
                what = f"{name}({argument}={value})"
                assert (
                    answer(lambda function=function, call=call: function(**call), what) is None
                ), what
    assert seen == NONSENSE.keys()
    for argument in ("momentum", "learning_rate"):
        for value in NONSENSE[argument]:
            grid = {"seed": [0, 1], argument: [0.5, value]}
            what = f"sweep: {argument}={value}"
            assert answer(lambda grid=grid: mf.sweep(SMALL, (X, Y), grid), what) is None, what


TREES: dict[str, Any] = {
    "deep": nested(500),
    "deeper": nested(50_000),
    "wide": tower(60, lambda inner: (inner, inner)),
    "unsorted": {"a": X, 1: X},
}
TREES["itself"] = []
TREES["itself"].append(TREES["itself"])


@pytest.mark.parametrize("case", TREES)
def test_pytrees_that_cannot_be_taken_apart_are_refused(given, monkeypatch, case):
    monkeypatch.setenv("MEANFIELD_JAX_MAX_MEMORY", "1e8")
    tree = TREES[case]
    operator = mf.fisher_operator(given[0]["model"], X)
    for attempt in (
        lambda: mf.learning_rate(lambda p, x: x, X, params=tree),
        lambda: mf.fisher_operator(given[0]["model"], tree),
        lambda: mf.diagnostics.gradient_tails(tree),
        lambda: operator @ tree,
    ):
        assert answer(attempt, case) is None


def test_every_argument_is_checked():
    """A public function has the checks of the table, and every name of an argument is in it."""
    without = {"equal_shares", "unit_growth", "load_sweep"}
    for name, function in functions().items():
        if name not in without:
            assert hasattr(function, "__wrapped__"), name
            assert set(inspect.signature(function).parameters) <= arguments.CHECKS.keys(), name


# ---- what can only mean one thing


def test_what_can_only_mean_one_thing_is_accepted():
    net = mf.mlp([np.int64(4)], inputs=np.int32(3), outputs=np.array(2), weight_var=np.float64(1.5))
    assert net == mf.mlp([4], inputs=3, outputs=2, weight_var=1.5)
    assert mf.Network.from_json(net.to_json()) == net
    assert mf.Network(3, [mf.Dense(2)]) == mf.Network((3,), (mf.Dense(2),))
    for norm in ("batch", mf.BatchNorm, mf.BatchNorm()):
        assert mf.mlp([4], inputs=3, outputs=2, norm=norm) == SMALL
    assert mf.mlp([6], inputs=3, outputs=2, norm="group") == mf.mlp(
        [6], inputs=3, outputs=2, norm=mf.GroupNorm(num_groups=1)
    )
    seeds = 0, np.int64(0), jax.random.key(0), nnx.Rngs(0)
    kernels = [mf.build(SMALL, rngs=seed).layers[0].kernel[...] for seed in seeds]
    assert all(np.array_equal(kernel, kernels[0]) for kernel in kernels)


BATCH = np.ones((8, 3), np.float32)
LABELS = {
    "too large": (Y + 5, "labels 5, 6 are outside 0 to 1, the range of 2 outputs; correct them"),
    "negative": (Y - 1, "labels -1 are outside"),
    "from one": (Y + 1, "subtract 1"),
    "bytes": (np.full(8, 255, np.uint8), "labels 255 are outside"),
    "fractions": (Y + 0.5, "labels must be integers"),
    "text": (Y.astype(str), "not an array of numbers"),
    "too few": (Y[:5], "fits neither labels nor targets"),
    "not a number": (np.where(Y, np.nan, 0), "NaN or infinite"),
    "bad targets": (np.full((8, 2), np.inf), "NaN or infinite"),
    "other targets": (np.eye(3)[Y], "fits neither labels nor targets"),
}
USES = {
    "train": lambda y: mf.train(SMALL, (X, y), batch_size=4),
    "test": lambda y: mf.train(SMALL, (X, Y), test=(X, y), batch_size=4),
    "sweep": lambda y: mf.sweep(SMALL, (X, y), dict(gamma=[1.0], batch_size=4)),
    "compare": lambda y: mf.compare(SMALL, (X, y), test=(X, Y), batch_sizes=[4], norms=["batch"]),
    "boundary": lambda y: mf.measured_boundary(SMALL, X, y),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("case", LABELS)
def test_labels_outside_the_outputs_are_refused(use, case):
    y, cause = LABELS[case]
    with pytest.raises(mf.DataError) as caught:
        USES[use](y)
    assert cause in str(caught.value)


def test_diagnostics_refuse_labels_outside_the_outputs(given):
    for measure in (mf.diagnostics.gradients, mf.diagnostics.input_dependence):
        with pytest.raises(mf.DataError, match="labels 7 are outside 0 to 1"):
            measure(given[0]["model"], LOSS, X, np.full(8, 7))


# ---- work without bounds

TOO_MUCH = {
    "layers": lambda: mf.variants.with_depth(SMALL, 10**9),
    "blocks": lambda: mf.preact_resnet([4], blocks=10**9),
    "widths": lambda: mf.mlp(range(1, 10**9), inputs=3, outputs=2),
    "kernel": lambda: mf.cnn([4], inputs=(6, 6, 2), kernel_size=10**12),
    "repeats": lambda: mf.Network((3,), (tower(2, many), mf.Dense(2))),
    "weights": lambda: mf.build(mf.mlp([10**9], inputs=10**9, outputs=2), rngs=0),
    "a wide training": lambda: mf.train(mf.mlp([10**9], inputs=3, outputs=2), (X, Y), batch_size=4),
    "epochs": lambda: mf.train(SMALL, (X, Y), batch_size=4, epochs=10**9),
    "a grid": lambda: mf.sweep(SMALL, (X, Y), dict(gamma=range(10**9), seed=range(10**9))),
    "seeds": lambda: mf.compare(SMALL, (X, Y), test=(X, Y), seeds=10**9, batch_sizes=[4]),
    "draws": lambda: mf.validate(SMALL, X, draws=10**9),
    "a map": lambda: mf.analyze(mf.cnn([4], inputs=(10**6, 10**6, 1))),
    "outputs": lambda: mf.analyze(mf.mlp([4], inputs=3, outputs=10**12)),
    "samples": lambda: mf.data.load("gaussian", num_samples=10**9),
}


REFUSED = r"above the limit of .* MEANFIELD_JAX_MAX"


@pytest.mark.parametrize("case", TOO_MUCH)
def test_work_without_bounds_is_refused_before_it_begins(case):
    with pytest.raises((mf.SpecError, mf.DataError), match=REFUSED):
        TOO_MUCH[case]()


def test_a_limit_can_be_raised_and_lowered(monkeypatch):
    monkeypatch.setenv("MEANFIELD_JAX_MAX_OPERATIONS", "3")
    with pytest.raises(mf.SpecError, match=r"takes 4 layers written out .*above the limit of 3"):
        mf.mlp([4], inputs=3, outputs=2, norm="batch")
    monkeypatch.setenv("MEANFIELD_JAX_MAX_OPERATIONS", "4")
    mf.mlp([4], inputs=3, outputs=2, norm="batch")
    monkeypatch.setenv("MEANFIELD_JAX_MAX_OPERATIONS", "many")
    with pytest.raises(mf.SpecError, match="MEANFIELD_JAX_MAX_OPERATIONS='many': not a number"):
        mf.mlp([4], inputs=3, outputs=2)


def test_what_is_large_and_cheap_stays_legal():
    wide = mf.mlp([10**12], inputs=10**12, outputs=2)
    assert wide.num_parameters > 10**24
    deep = mf.Network((3,), (mf.Dense(4), mf.Repeat(mf.Dense(4), times=10_000), mf.Dense(2)))
    used(deep)
