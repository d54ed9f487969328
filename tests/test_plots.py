"""How pictures look: what notebooks show, colours, curves, places of legends and of networks."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from tolerance import assert_close

import meanfield_jax as mf
from meanfield_jax.layers.base import norm_layers
from meanfield_jax.plot_style import NORM_COLORS, letters, picture, smooth, styles_of_norms


def validated() -> xr.Dataset:
    """As of ``validate``: two networks with BatchNorm and one without, made up."""
    gammas, networks = [np.nan, 0.5, 2.0], ["vanilla", "gamma=0.5", "gamma=2"]
    modes, statistics = ["batch", "frozen"], ["batch", "frozen", "wei2019"]
    by_mode = ("network", "mode")
    level = np.array([30.0, 5.0, 50.0])[:, None]
    curve = np.geomspace(0.4, 2.5, 20)
    curves = ("curve_gamma", "statistics"), 20 * curve[:, None] ** 2 * np.ones(3)
    data = dict(
        measured=((*by_mode, "draw", "outlier"), level[:, :, None, None] * np.ones((3, 2, 2, 4))),
        measured_mean=(by_mode, level * np.ones(2)),
        standard_error=(by_mode, 0.1 * level * np.ones(2)),
        eta_max_measured=(by_mode, 3.8 / (level * np.ones(2))),
        predicted=(("network", "statistics"), level * np.ones(3)),
        eta_max=(("network", "statistics"), 3.8 / (level * np.ones(3))),
        curve=curves,
        curve_lambda_max=curves,
    )
    coordinates = dict(network=networks, gamma=("network", gammas), mode=modes)
    coordinates |= dict(statistics=statistics, curve_gamma=curve)
    return xr.Dataset(data, coordinates, dict(momentum=0.9))


def points_under(legend, axes) -> int:
    """The number of points of lines that a legend covers."""
    axes.figure.draw_without_rendering()
    box = legend.get_window_extent()
    where = [axes.transData.transform(line.get_xydata()) for line in axes.lines]
    return sum(box.count_contains(points[np.isfinite(points).all(-1)]) for points in where)


def test_a_notebook_shows_a_figure_without_pyplot():
    figure = mf.plot_validation(validated())
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_networks_without_norms_stand_beside_the_gammas():
    axes = mf.plot_validation(validated()).axes[0]
    labels = [text.get_text() for text in axes.get_xticklabels()]
    assert labels == ["0.5", "2", "none"]
    (point,) = (line for line in axes.lines if line.get_marker() == "D")
    assert point.get_xdata()[0] == axes.get_xticks()[-1] > 2.5
    without = validated().isel(network=[1, 2])
    labels = mf.plot_validation(without).axes[0].get_xticklabels()
    assert [text.get_text() for text in labels] == ["0.5", "2"]


def test_a_legend_covers_no_point():
    axes = mf.plot_validation(validated()).axes[0]
    assert points_under(axes.get_legend(), axes) == 0


def test_panels_have_letters_and_a_single_one_has_none():
    figure = mf.plot_validation(validated())
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["a", "b"]
    alone = picture(2, 2)
    letters([alone.subplots()])
    assert not alone.axes[0].texts


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_pictures_of_every_kind_are_written(kind):
    file = io.BytesIO()
    mf.plot_validation(validated()).savefig(file, format=kind)
    start = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    assert file.getvalue().startswith(start[kind])


def test_a_norm_looks_the_same_in_every_picture():
    own = [
        name for name, cls in norm_layers().items() if cls.__module__.startswith("meanfield_jax")
    ]
    names = ["none", *own]
    styles = styles_of_norms(names)
    assert len({style["color"] for style in styles}) == len(names) == len(NORM_COLORS)
    assert len({style["marker"] for style in styles}) == len(names)
    assert styles_of_norms(["layer"]) == [styles[names.index("layer")]]
    # what is no norm of the package gets a look of its own
    other, layer = styles_of_norms(["own", "layer"])
    assert layer == styles[names.index("layer")]
    assert other["color"] != layer["color"]


def test_a_smooth_curve_goes_through_its_points_and_never_beyond():
    x, y = np.array([0.1, 0.25, 1.0, 4.0]), np.array([1.4, 0.7, np.nan, 0.01])
    at, curve = smooth(x, y)
    known = np.isfinite(y)
    assert_close(np.interp(x[known], at, curve), y[known], "rounding")
    assert np.all(np.diff(curve) < 0)
    assert (at.min(), at.max()) == pytest.approx((0.1, 4.0))
    # a power law stays one, whatever the distances of the points
    powers = smooth(x, x**-1.5)
    assert_close(powers[1], powers[0] ** -1.5, "rounding", powers[1].max())
    for few in ((x[:2], y[:2]), (x - 0.1, x)):
        np.testing.assert_array_equal(smooth(*few), few)


def test_the_critical_line_is_smooth_where_its_slope_is_infinite():
    bias = np.linspace(0, 1, 11)
    line = 1 + 2 * np.sqrt(bias)
    grid = np.full((2, 11), 2.0)
    dims = ("weight_var", "bias_var")
    data = dict(xi_c=(dims, grid), chi_1=(dims, grid), critical_weight_var=("bias_var", line))
    dataset = xr.Dataset(data, dict(weight_var=[1.0, 3.0], bias_var=bias))
    (drawn,) = mf.plot_phase_diagram(dataset).axes[0].lines
    assert_close(drawn.get_ydata(), 1 + 2 * np.sqrt(drawn.get_xdata()), "rounding")


def test_a_spectrum_has_no_holes_and_keeps_its_area():
    nodes = np.geomspace(1.0, 1e3, 5)[None]
    weights = np.full((1, 5), 0.2)
    density = mf.SpectralDensity(jnp.asarray(nodes), jnp.asarray(weights))
    figure = mf.plot_spectrum(density, num_eigenvalues=100)
    (outline,) = (area.get_paths()[0].vertices for area in figure.axes[0].collections)
    top = outline[np.argsort(outline[:, 0])]
    top = top[top[:, 1] > 0]
    bins = 45
    width = np.log(top[-1, 0] / top[0, 0]) / bins
    area = np.trapezoid(top[:, 1], np.log(top[:, 0])) / width
    # a little of the ends' nodes lies outside
    assert area == pytest.approx(100, rel=0.05)
