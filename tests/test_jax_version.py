"""The ground the other tests stand on: a jax that computes right, a tolerance that can fail."""

import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from tolerance import KINDS, assert_close, assert_printed, standard_error, tolerance

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
BROKEN = ("0.10.2", "0.11.0", "0.11.1")


def advice() -> str:
    return (
        f"jax {jax.__version__} with jaxlib {jaxlib.__version__} computes wrong numbers here; "
        'install "jax>=0.10.1,!=0.10.2,!=0.11.0,!=0.11.1" and jaxlib of the same version'
    )


# the smallest sizes at which a broken release goes wrong, and one below
@pytest.mark.parametrize(
    ("dtype", "size"), [(np.float64, 16_385), (np.float32, 32_769), (np.float32, 1000)]
)
def test_jitted_vmapped_matvec_with_a_reduction_equals_numpy(x64, dtype, size):
    vectors = np.stack([np.arange(size), np.zeros(size), np.ones(size)], axis=1).astype(dtype)
    matrix = jnp.eye(3, dtype=dtype)

    @jax.jit
    def norms(vectors):
        return jax.vmap(lambda vector: jnp.sum((matrix @ vector) ** 2))(vectors)

    try:
        assert_close(norms(vectors), (vectors**2).sum(1), "rounding", dtype=dtype)
    except AssertionError as error:
        raise AssertionError(f"{advice()} ({error})") from None


def test_this_jax_is_none_of_the_broken_ones():
    assert jax.__version__ not in BROKEN, advice()
    assert jaxlib.__version__ not in BROKEN, advice()


@pytest.mark.parametrize("package", ["jax", "jaxlib"])
def test_the_broken_versions_are_excluded_from_installation(package):
    dependencies = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    (requirement,) = [d for d in dependencies if d.split(">")[0] == package]
    assert requirement == f"{package}>=0.10.1," + ",".join(f"!={v}" for v in BROKEN)


def test_the_package_does_not_change_the_configuration_of_jax():
    # in a process of its own, since the tests set the configuration
    command = "import jax, meanfield_jax; assert not jax.config.jax_enable_x64; "
    command += "assert jax.config.jax_numpy_rank_promotion == 'allow'; "
    command += "assert jax.config.jax_default_matmul_precision is None"
    subprocess.run([sys.executable, "-c", command], check=True)


def test_every_kind_of_tolerance_scales_with_the_numbers():
    for kind in KINDS:
        options = dict(printed="1.00", standard_error=0.0, width=10.0)
        small, large = (tolerance(kind, scale, **options) for scale in (1.0, 100.0))
        assert large == (small if kind == "printed" else pytest.approx(100 * small))
        assert small > 0


def test_tolerance_is_wider_in_single_precision():
    for kind in ("rounding", "difference", "second_difference", "quadrature"):
        assert tolerance(kind, dtype=np.float32) > 100 * tolerance(kind, dtype=np.float64)


def test_tolerance_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="kind='guess': unknown; use one of rounding"):
        tolerance("guess")


@pytest.mark.parametrize(
    ("actual", "kind", "options"),
    [
        (1 + 1e-12, "rounding", {}),
        (1 + 1e-8, "difference", {}),
        (1 + 1e-5, "second_difference", {}),
        (1 + 1e-9, "quadrature", {}),
        (1.5, "monte_carlo", dict(standard_error=0.1, width=100)),
        (np.nan, "rounding", {}),
        (np.inf, "monte_carlo", dict(standard_error=0.1)),
        ([1.0, 2.0], "rounding", {}),
    ],
)
def test_assert_close_fails_when_the_difference_is_too_large(actual, kind, options):
    with pytest.raises(AssertionError, match="allows"):
        assert_close(actual, 1.0, kind, **options)


def test_assert_close_names_the_worst_entry():
    with pytest.raises(AssertionError, match=r"2 of 3 differ.*at \(2,\): 5 against 3"):
        assert_close([1.0, 2.1, 5.0], [1.0, 2.0, 3.0], "rounding")


def test_assert_close_does_not_broadcast_the_computed_side():
    with pytest.raises(AssertionError):
        assert_close(1.0, [1.0, 1.0], "rounding")


def test_printed_numbers_agree_to_one_unit_of_their_last_digit():
    assert_printed([1.2346, 1.7008527e-3], "1.235 1.701e-3")
    with pytest.raises(AssertionError, match="printed"):
        assert_printed([1.2375], "1.235")
    with pytest.raises(AssertionError, match="2 numbers for 1 values"):
        assert_printed([1.0], "1.0 2.0")


def test_monte_carlo_allows_four_standard_errors_and_a_share_of_the_width():
    draws = np.random.default_rng(0).normal(5.0, 1.0, size=(400,))
    error = standard_error(draws)
    assert 0.04 < error < 0.06
    assert_close(draws.mean(), 5.0, "monte_carlo", standard_error=error)
    assert tolerance("monte_carlo", 5.0, standard_error=error, width=1000) == pytest.approx(
        4 * error + 0.015
    )
