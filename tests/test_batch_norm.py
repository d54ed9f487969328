"""BatchNorm's module beyond Flax's: half precision, and batches split over a mesh."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerance import assert_close

import meanfield_jax as mf

SHAPES = {"vector": (6,), "map": (4, 3, 6)}


def module(shape, **changes):
    return mf.BatchNorm(1.3, 0.2, **changes).build(shape, nnx.Rngs(0))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_statistics_of_half_precision_are_float32(shape):
    # a mean that bfloat16 cannot hold beside the deviation
    x = (jax.random.normal(jax.random.key(0), (64, *shape)) + 100).astype(jnp.bfloat16)
    half, single = module(shape), module(shape)
    y = half(x)
    assert y.dtype == jnp.bfloat16
    assert half.mean[...].dtype == half.var[...].dtype == jnp.float32
    np.testing.assert_array_equal(y, single(x.astype(jnp.float32)).astype(jnp.bfloat16))
    for name in ("mean", "var"):
        np.testing.assert_array_equal(getattr(half, name)[...], getattr(single, name)[...])


@pytest.mark.parametrize("axes", ["channel", "position"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_mesh_axis_joins_the_batches_of_its_devices(shape, axes, x64):
    x = jax.random.normal(jax.random.key(0), (24, *shape))
    weights = jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)
    whole, split = module(shape, axes=axes), module(shape, axes=axes)
    split.set_attributes(axis_name="data")

    def applied(model, x):
        return nnx.merge(*nnx.split(model), copy=True)(x)

    def total(x):
        return jnp.sum(weights * applied(whole, x))

    def parts(x):
        pieces, factors = (array.reshape(4, 6, *shape) for array in (x, weights))

        def one(piece, factor):
            return jnp.sum(factor * applied(split, piece))

        return jax.vmap(one, axis_name="data")(pieces, factors).sum()

    # float32 constants in the module's specification
    size = dict(dtype=np.float32)
    assert_close(parts(x), total(x), "rounding", 20.0, **size)
    assert_close(jax.grad(parts)(x), jax.grad(total)(x), "rounding", 5.0, **size)


ON_FOUR_DEVICES = """
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
import meanfield_jax as mf

mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
spec = mf.mlp([16], inputs=5, outputs=3, norm=mf.BatchNorm(1.3, 0.2))
x = jax.random.normal(jax.random.key(0), (24, 5))

def run(model, x):
    y = model(x)
    return y, model.layers[1].mean[...], model.layers[1].var[...]

expected = run(mf.build(spec, rngs=nnx.Rngs(0)), x)
graph, state = nnx.split(mf.build(spec, rngs=nnx.Rngs(0)))
split = jax.device_put(x, NamedSharding(mesh, P("data")))
by_jit = jax.jit(lambda x: run(nnx.merge(graph, state, copy=True), x))(split)

model = mf.build(spec, rngs=nnx.Rngs(0))
model.set_attributes(axis_name="data", raise_if_not_found=False)
graph, state = nnx.split(model)
body = lambda x: run(nnx.merge(graph, state, copy=True), x)
mapped = jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P(), P()))
for found in (by_jit, jax.jit(mapped)(split)):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
print("the same on", jax.device_count())
"""


@pytest.mark.slow
def test_sharded_batches_give_the_statistics_of_the_whole_batch():
    environment = os.environ | dict(XLA_FLAGS="--xla_force_host_platform_device_count=4")
    ran = subprocess.run(
        [sys.executable, "-c", ON_FOUR_DEVICES],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.stdout.strip() == "the same on 4", ran.stderr
