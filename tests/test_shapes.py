"""The shapes that annotations declare are checked while tests run."""

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from meanfield_jax.kernel.pair_matrix import PairMatrix
from meanfield_jax.kernel.sphere import on_sphere
from meanfield_jax.theory.fisher import Contributions


@pytest.mark.parametrize("traced", [False, True])
def test_a_wrong_shape_is_caught(traced):
    function = jax.jit(on_sphere) if traced else on_sphere
    with pytest.raises(TypeCheckError, match="covariance"):
        function(jnp.ones((4, 3)))


def test_a_wrong_dtype_is_caught():
    with pytest.raises(TypeCheckError, match="covariance"):
        on_sphere(jnp.eye(4, dtype=int))


def test_fields_that_do_not_fit_each_other_are_caught():
    two, three = jnp.ones(2), jnp.ones(3)
    with pytest.raises(TypeCheckError, match="biases"):
        Contributions(weights=two, biases=three, norm=two, layers=("a", "b"))


def test_a_pytree_may_be_rebuilt_with_anything():
    matrix = PairMatrix(jnp.ones(()), jnp.zeros(()), jnp.zeros(()), all_positions=False)
    assert jax.tree.map(lambda leaf: "a leaf", matrix).same == "a leaf"
