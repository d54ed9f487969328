"""The norms side by side: exchanged in their places, measured, trained, drawn, from the command."""

import io
import types

import draws
import jax
import numpy as np
import pytest
import xarray as xr
from flax import nnx
from json_results import parsed
from networks import DIGITS
from rich.console import Console

import meanfield_jax as mf
from meanfield_jax import experiments
from meanfield_jax.cli import main
from meanfield_jax.cli.tables import comparison_table
from meanfield_jax.experiments import progress
from meanfield_jax.experiments.compare import norm_names, norm_of
from meanfield_jax.plot_style import ETA_MAX
from meanfield_jax.variants import with_norm

RESNET = mf.preact_resnet(
    [8, 16], blocks=1, inputs=(4, 4, 3), outputs=3, norm=mf.BatchNorm(), bias_var=0.1
)
BLOCK = mf.preact_resnet([8], blocks=1, inputs=(2, 2, 3), outputs=3, norm=mf.BatchNorm())
RATES = [0.03, 0.1]
LOSSES = ("loss", "test_loss", "test_accuracy")
SMALL = dict(batch_sizes=[50, 100], learning_rates=RATES, epochs=1)
"""Batches of 100, two rates, two seeds: shapes of the command below and of compare's example."""


def digits(count: int, split: str = "train"):
    return mf.data.load("digits", split=split, num_samples=count, flatten=True)


@pytest.mark.parametrize("name", norm_names())
def test_a_norm_is_put_where_the_presets_put_it(name):
    norm = norm_of(name, RESNET)
    expected = mf.preact_resnet(
        [8, 16], blocks=1, inputs=(4, 4, 3), outputs=3, norm=norm, bias_var=0.1
    )
    assert with_norm(RESNET, norm) == expected

    def outputs(x):
        return mf.build(expected, rngs=nnx.Rngs(0))(x)

    assert jax.eval_shape(outputs, np.ones((4, 4, 4, 3), np.float32)).shape == (4, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", norm_names())
def test_every_norm_has_a_theory_in_a_residual_network(name):
    network = with_norm(BLOCK, norm_of(name, BLOCK))
    largest = jax.jit(
        lambda num_samples: mf.analyze(network, num_samples=num_samples).fisher.lambda_max,
        compiler_options=draws.UNFUSED,
    )
    assert np.isfinite(largest(8.0))


def test_where_no_activation_follows_it_takes_the_norms_place():
    network = mf.Network((6,), (mf.Dense(8), mf.BatchNorm(), mf.Dense(2)))
    changed = with_norm(network, mf.LayerNorm(gamma=0.5))
    assert changed.layers == (mf.Dense(8), mf.LayerNorm(gamma=0.5), mf.Dense(2))


def test_groups_divide_the_channels():
    assert norm_of("group", mf.mlp([60, 24], inputs=4, outputs=3)).num_groups == 6
    assert norm_of("group", mf.mlp([60, 12], inputs=4, outputs=3)).num_groups == 3
    assert norm_of("batch_group", mf.mlp([7], inputs=4, outputs=3)).num_groups == 1


@pytest.fixture(scope="module")
def compared():
    norms = dict(own=mf.BatchNorm(gamma=0.5), layer=mf.LayerNorm())
    return mf.compare(DIGITS, digits(200), test=digits(200, "test"), norms=norms, **SMALL)


@pytest.mark.slow
def test_each_number_is_that_of_the_function_it_comes_from(compared):
    network = with_norm(DIGITS, mf.BatchNorm(gamma=0.5))
    (x, y), test = digits(200), digits(200, "test")
    at = compared.sel(norm="own", batch_size=100)
    fisher = mf.analyze(network, data=x[:100]).fisher
    expected = float(fisher.lambda_max)
    assert float(at.predicted) == pytest.approx(expected, rel=1e-5)
    assert bool(at.within_domain) == bool(fisher.within_domain)
    assert float(at.eta_max) == pytest.approx(3.8 / expected, rel=1e-5)
    model = mf.build(network, rngs=nnx.Rngs(1))
    found = mf.top_eigenvalues(mf.fisher_operator(model, x[:100]), 1, tol=1e-5)
    assert float(at.measured.sel(draw=1)) == pytest.approx(float(found.eigenvalues[0]), rel=1e-3)
    rates, seeds = np.meshgrid(RATES, [0, 1], indexing="ij")
    options = dict(learning_rate=rates, seed=seeds, epochs=1, loss="cross_entropy")
    runs = mf.train(network, (x, y), test=test, **options)
    cells = at.transpose("learning_rate", "seed", ...)
    assert cells.loss.values == pytest.approx(np.asarray(runs.loss[..., -1]), rel=1e-4)
    accuracy = np.asarray(runs.test_accuracy[..., -1])
    assert cells.test_accuracy.values == pytest.approx(accuracy)


def test_the_best_rate_is_that_of_the_smallest_training_loss(compared):
    losses = compared.loss.mean("seed")
    for norm in compared.norm.values:
        for size in compared.batch_size.values:
            at = compared.sel(norm=norm, batch_size=size)
            row = losses.sel(norm=norm, batch_size=size)
            assert float(at.best_loss) == float(row.min())
            assert float(at.best_rate) == float(row.idxmin())
            chosen = at.test_loss.sel(learning_rate=at.best_rate).mean()
            assert float(at.best_test_loss) == pytest.approx(float(chosen))


@pytest.mark.slow
def test_a_rate_at_which_a_seed_diverged_is_never_best():
    data = digits(100)
    options = dict(batch_sizes=[100], learning_rates=[1e4], epochs=3, seeds=1, draws=1)
    found = mf.compare(DIGITS, data, test=data, norms=["none"], loss="squared", **options)
    assert np.isnan(found.loss).all()
    assert np.isnan(found.best_rate).all()
    assert np.isnan(found.best_test_accuracy).all()
    assert mf.plot_comparison(found).axes


@pytest.mark.slow
def test_the_bar_moves_with_the_work(monkeypatch):
    """Every estimate is used up, those that compile are the largest, and more steps take longer."""
    used = []

    class Watched(progress.Stages):
        def __init__(self, text, seconds, shown):
            self.estimates = [*seconds]
            super().__init__(text, self.estimates, shown)

        def finished(self):
            super().finished()
            used.append(self.estimates[len(used)])

        def __exit__(self, *problem):
            super().__exit__(*problem)
            assert used == self.estimates

    op = types.SimpleNamespace(dual=types.SimpleNamespace(shape=(100,)))
    found = types.SimpleNamespace(status=0, eigenvalues=np.ones(10))
    runs = types.SimpleNamespace(to_xarray=lambda dims: trained)
    trained = xr.Dataset(
        {name: (("learning_rate", "seed", "epoch"), np.ones((2, 2, 1))) for name in LOSSES}
        | dict(diverged_at=(("learning_rate", "seed"), np.full((2, 2), -1)))
    )
    for module in (experiments.validate, experiments.compare):
        monkeypatch.setattr(module, "Stages", Watched)
        monkeypatch.setattr(module, "fisher_operator", lambda *args, **options: op)
        monkeypatch.setattr(module, "top_eigenvalues", lambda *args, **options: found)
    monkeypatch.setattr(experiments.validate, "_predictions", lambda *args: np.ones((2, 3)))
    monkeypatch.setattr(experiments.validate, "calibrate", lambda *args: None)
    monkeypatch.setattr(experiments.compare, "train", lambda *args, **options: runs)
    monkeypatch.setattr(experiments.compare, "least_samples", lambda body: 10**6)
    x, labels = digits(100)
    mf.validate(DIGITS, x, gammas=[0.5, 1.0], draws=2)
    theory, measured = used[:3], used[3:]
    # without norms, and with them in two modes; the second scale uses the programs of the first
    assert theory[0] == pytest.approx(theory[1], rel=0.1)
    assert theory[2] < theory[1]
    assert len(measured) == 2 * (1 + 2 + 2)
    assert [value > 10 * measured[-1] for value in measured] == [1, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    used.clear()
    options = dict(test=(x, labels), norms=["batch"], learning_rates=RATES, draws=2)
    mf.compare(DIGITS, (x, labels), batch_sizes=[2, 100], **options)
    assert len(used) == 2 * (1 + 1 + 2)
    assert used[0] > used[4]


def test_statistics_of_too_few_samples_have_no_theory():
    data = digits(2)
    options = dict(learning_rates=[0.01], epochs=1, seeds=1, draws=1)
    batch = mf.compare(DIGITS, data, test=data, norms=["batch"], batch_sizes=[1, 2], **options)
    assert np.isnan(batch.predicted).all()
    assert np.isnan(batch.measured.sel(batch_size=1)).all()
    assert np.isfinite(batch.measured.sel(batch_size=2)).all()
    layer = mf.compare(DIGITS, data, test=data, norms=["layer"], batch_sizes=[1], **options)
    assert np.isfinite(layer.predicted).all()


@pytest.mark.parametrize("names", [["loss", "best_loss"], ["measured", "predicted"]])
def test_a_picture_without_points_is_drawn(names, compared):
    empty = compared.assign({name: compared[name] * np.nan for name in names})
    figure = mf.plot_comparison(empty)
    figure.draw_without_rendering()
    scales = {axes.get_yscale() for axes in figure.axes[:3]}
    assert scales == {"linear", "log"}


def test_the_picture_and_the_table_have_every_norm(compared):
    figure = mf.plot_comparison(compared)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["own", "LN"]
    assert len(figure.axes) == 4
    assert comparison_table(compared).row_count == 4
    assert figure.axes[0].child_axes[0].get_ylabel() == ETA_MAX
    figure.draw_without_rendering()
    bottom, top = figure.axes[0].get_ylim()
    right = figure.axes[0].child_axes[0].get_ylim()
    assert right == pytest.approx((3.8 / top, 3.8 / bottom), rel=1e-5)


def test_the_table_fits_eighty_columns(compared):
    wide = compared.assign(measured=123456.7 * compared.measured, predicted=1e5 * compared.ratio)
    console = Console(width=80, file=io.StringIO())
    console.print(comparison_table(wide.assign(within_domain=compared.ratio < 0)))
    text = console.file.getvalue()
    assert "?" in text
    assert "…" not in text


def test_the_table_marks_what_theory_does_not_vouch_for(compared):
    inside = xr.ones_like(compared.within_domain)
    for marks, domain in ((0, inside), (4, ~inside)):
        text = comparison_table(compared.assign(within_domain=domain))
        predicted = next(
            column for column in text.columns if column.header == "lambda_max\npredicted"
        )
        assert sum(cell.endswith("?") for cell in predicted.cells) == marks
        assert ("outside" in str(text.caption)) == bool(marks)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (dict(norms=["batchnorm"]), ("norms='batchnorm'", "use one of none, batch")),
        (dict(norms=[]), ("norms=[]", "empty")),
        (dict(norms=["instance"]), ("InstanceNorm", "(height, width, channels)")),
        (dict(batch_sizes=[8, 65]), ("batch_sizes=[8, 65]", "64 training samples")),
        (dict(batch_sizes=[]), ("batch_sizes=[]", "at least one")),
        (dict(learning_rates=[]), ("learning_rates=[]", "at least one")),
        (dict(draws=0), ("draws=0", "at least 1")),
        (dict(network=mf.mlp([4], inputs=64, outputs=10)), ("no norm", "BatchNorm")),
    ],
)
def test_bad_input_is_one_line(changed, expected):
    arguments = dict(network=DIGITS, data=digits(64), test=digits(8, "test"), **SMALL) | changed
    with pytest.raises(mf.SpecError) as caught:
        mf.compare(**arguments)
    assert "\n" not in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.slow
def test_the_command_compares_all_norms_that_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["compare", "--widths", "64", "--num-samples", "200", "--num-test", "200"]
    command += ["--batch-sizes", "100", "--learning-rates", "0.03", "0.1"]
    command += ["--epochs", "1", "--draws", "1"]
    assert main([*command, "--json"]) == 0
    shown = parsed("compare", capsys.readouterr().out)
    names = shown["variables"]["norm"]["values"]
    assert names == [name for name in norm_names() if name != "instance"]
    assert (tmp_path / "meanfield-jax-compare.png").read_bytes().startswith(b"\x89PNG")
    with xr.open_dataset("meanfield-jax-compare.nc") as dataset:
        assert np.isfinite(dataset.best_loss).all()
    assert main([*command, "--norms", "none", "layer"]) == 0
    assert "LN" in capsys.readouterr().out
