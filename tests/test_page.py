"""The page of a sweep: it needs nothing else, holds the numbers of the store, and stays small."""

import json
import re

import numpy as np
import pytest
import xarray as xr

import meanfield_jax as mf
from meanfield_jax.experiments.diagram import averaged
from meanfield_jax.page import MOST_NUMBERS


def sweep_of(sizes: dict[str, int], num_epochs: int = 3) -> xr.Dataset:
    """A sweep that nobody trained: losses of all sizes, and runs that diverged."""
    rng = np.random.default_rng(0)
    axes = {
        name: np.arange(size) if name == "seed" else np.geomspace(0.01, 7, size)
        for name, size in sizes.items()
    }
    shape = tuple(sizes.values())
    at = np.where(rng.uniform(size=shape) < 0.2, 5, -1)
    losses = rng.lognormal(size=(*shape, num_epochs)).astype(np.float32)
    losses[at >= 0] = np.nan
    dims = (*sizes, "epoch")
    data = dict(loss=(dims, losses), test_loss=(dims, 2 * losses), diverged_at=(tuple(sizes), at))
    rates = [name for name in sizes if name not in ("learning_rate", "seed")]
    boundary = rng.lognormal(size=tuple(sizes[name] for name in rates))
    data |= {f"eta_max_{name}": (rates, boundary) for name in ("batch", "frozen", "wei2019")}
    given = dict(spec='{"epochs": 3}', versions='{"jax": "0.10.1"}', devices="1 x cpu")
    coordinates = {**axes, "epoch": np.arange(1, num_epochs + 1)}
    return xr.Dataset(data, coordinates, given)


def data_of(page: str) -> dict:
    """The data that a page holds, with NaN and the infinities as numbers."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)

    def refused(constant: str) -> None:
        raise AssertionError(constant)  # JavaScript cannot read it

    return json.loads(text, parse_constant=refused)


def numbers(lists: list) -> np.ndarray:
    return np.array(lists, dtype=object).astype(float)


def same(lists: list, expected: np.ndarray) -> None:
    """Equal to four digits; the shapes agree exactly."""
    found = numbers(lists)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=5.1e-4)


@pytest.mark.parametrize(
    "order",
    [
        ("gamma", "learning_rate", "momentum", "seed"),
        ("seed", "momentum", "learning_rate", "gamma"),
    ],
)
def test_its_numbers_are_those_of_the_store(order):
    sizes = dict(gamma=3, learning_rate=4, momentum=2, seed=2)
    dataset = sweep_of(sizes)
    # neither the order of the axes nor that of their values matters
    found = data_of(
        mf.sweep_page(dataset.transpose(*order, "epoch").isel(learning_rate=[2, 0, 3, 1]))
    )
    assert list(found["results"]) == ["test_loss", "loss"]
    assert found["slices"] == ["momentum = 0.01", "momentum = 7"]
    assert [found[axis]["name"] for axis in "xy"] == ["learning_rate", "gamma"]
    same(found["x"]["values"], dataset.learning_rate.values)
    ordered = dataset.transpose("momentum", "gamma", "learning_rate", "seed", "epoch")
    for name, result in found["results"].items():
        same(result["curves"], ordered[name].values)
        same(result["last"], averaged(ordered, name).values)
    assert found["diverged_at"] == ordered.diverged_at.values.tolist()
    for name in ("batch", "frozen", "wei2019"):
        same(
            found["predicted"][name]["rates"],
            dataset[f"eta_max_{name}"].transpose("momentum", "gamma").values[..., None],
        )
    assert found["facts"]["spec"] == {"epochs": 3}
    assert found["facts"]["versions"] == {"jax": "0.10.1"}
    first = data_of(mf.sweep_page(dataset, value="loss"))["results"]
    assert next(iter(first)) == "loss"


@pytest.mark.parametrize("along", ["learning_rate", "gamma", "seed"])
def test_a_single_axis_has_one_row(along):
    dataset = sweep_of({along: 5})
    found = data_of(mf.sweep_page(dataset))
    assert found["y"] is None
    assert found["x"]["name"] == along
    same(found["results"]["loss"]["curves"], dataset.loss.values[None, None, :, None])
    expected = dataset.eta_max_batch.broadcast_like(dataset[along]).values
    if along == "learning_rate":
        expected = expected[:1]
    same(found["predicted"]["batch"]["rates"], expected[None, None])


def test_what_is_missing_or_not_finite_can_be_read():
    dataset = sweep_of(dict(gamma=2, learning_rate=3))
    dataset.diverged_at[:] = [[-2, -1, -1], [-1, 4, -1]]
    dataset.test_loss[:, :, -1] = [[np.nan, np.inf, 2.0], [-np.inf, np.nan, 0.0]]
    found = data_of(mf.sweep_page(dataset))
    last = found["results"]["test_loss"]["last"]
    assert last == [[[None, "Infinity", 2], ["-Infinity", None, 0]]]
    assert found["results"]["test_loss"]["range"] == [2, 2]
    dataset.test_loss[:] = np.nan
    assert data_of(mf.sweep_page(dataset))["results"]["test_loss"]["range"] == [0, 1]


def test_it_asks_for_nothing_else():
    page = mf.sweep_page(sweep_of(dict(gamma=2, learning_rate=3)))
    assert "default-src 'none'" in page
    found = re.findall(r"(?:src|href)\s*=|\bfetch\(|\bimport\b|XMLHttp|@import|url\(", page)
    assert found == ["href="]
    assert 'href="data:,"' in page
    assert set(re.findall(r"https?://[^\"'\s]+", page)) == {"http://www.w3.org/2000/svg"}


def test_what_it_embeds_is_never_markup():
    dataset = sweep_of(dict(gamma=2, learning_rate=3))
    hostile = "</script><script>alert(1)</script><!-- & \u2028 \\ {{data}}"
    dataset.attrs["devices"] = hostile
    dataset.attrs["spec"] = f'{{"a": NaN, "b": {json.dumps(hostile)}}}'
    dataset.loss.attrs["long_name"] = hostile
    plain, page = mf.sweep_page(sweep_of(dict(gamma=2, learning_rate=3))), mf.sweep_page(dataset)
    assert page.count("<") == plain.count("<")
    assert page.count("&") == plain.count("&")
    assert "\u2028" not in page
    found = data_of(page)
    assert found["facts"]["devices"] == found["facts"]["spec"]["b"] == hostile
    # in the script, texts become text, never markup
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page)


@pytest.mark.parametrize("num_epochs", [5, 100])
def test_five_thousand_cells_are_small(num_epochs):
    dataset = sweep_of(dict(gamma=50, learning_rate=100, seed=3), num_epochs)
    page = mf.sweep_page(dataset)
    assert len(page.encode()) < 3e6
    found = data_of(page)
    epochs = found["epochs"]
    assert epochs[-1] == num_epochs
    curves = np.array(found["results"]["loss"]["curves"], dtype=object)
    assert curves.shape == (1, 50, 100, 3, len(epochs))
    assert 2 * curves.size <= MOST_NUMBERS


def test_an_unknown_result_is_refused():
    with pytest.raises(mf.SpecError, match="value='test_accuracy'"):
        mf.sweep_page(sweep_of(dict(learning_rate=3)), value="test_accuracy")
