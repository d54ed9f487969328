"""The heat map of a sweep in the terminal: what a recorded console shows."""

import io

import numpy as np
import pytest
import xarray as xr
from networks import DIGITS
from rich.console import Console

import meanfield_jax as mf
from meanfield_jax.experiments import progress, watch
from meanfield_jax.experiments.watch import Picture

WHITE, GREY, PURPLE, YELLOW = "\x1b[48;2;255;255;255m", "48;2;108;108;108", "68;1;84", "253;231;37"


def dataset_of(shape: tuple[int, ...], dims: tuple[str, ...]) -> xr.Dataset:
    """Cells that are not computed yet."""
    axes = {
        name: np.geomspace(0.1, 10, size) for name, size in zip(dims, shape, strict=True)
    } | dict(epoch=[1])
    data = dict(
        loss=((*dims, "epoch"), np.full((*shape, 1), np.nan, np.float32)),
        diverged_at=(dims, np.full(shape, -2)),
    )
    return xr.Dataset(data, axes)


def shown(picture: Picture, colors: str | None = None, width: int = 40, height: int = 12) -> str:
    file = io.StringIO()
    options = dict(color_system=colors, force_terminal=True, legacy_windows=False)
    Console(file=file, width=width, height=height, **options).print(picture)
    return file.getvalue()


def add(picture: Picture, region: tuple[slice, ...], losses: np.ndarray) -> None:
    at = np.where(np.isnan(losses), 3, -1)
    picture.add(region, dict(loss=losses[..., None], diverged_at=at))


def test_without_colours_a_cell_is_a_letter():
    picture = Picture(dataset_of((2, 5, 2), ("gamma", "learning_rate", "seed")))
    assert shown(picture).splitlines()[1:4] == [
        " 10 " + 15 * ".",
        "0.1 " + 15 * ".",
        "    0.1          10",
    ]
    row = np.stack([[1.0, 10.0, np.nan, np.inf, 100.0]] * 2, -1)[None]
    row[0, 0, 1] = np.nan  # one of two seeds
    add(picture, (slice(0, 1), slice(0, 5), slice(0, 2)), row)
    lines = shown(picture).splitlines()
    assert lines[0] == "loss after 1 epochs over learning_rate a"
    assert lines[1] == " 10 " + 15 * "."
    assert lines[2] == "0.1 xxx000xxx???999"
    assert lines[4] == "10 0 to 9 98.2 or more   x diverged   . "


@pytest.mark.parametrize("dims", [("gamma", "learning_rate"), ("learning_rate", "gamma")])
def test_with_colours_two_cells_share_a_letter_where_there_is_little_room(dims):
    shape = (8, 4) if dims[0] == "gamma" else (4, 8)
    picture = Picture(dataset_of(shape, dims))
    losses = np.geomspace(1, 1000, 32).reshape(shape)
    losses[(slice(3, 4), slice(0, 1))] = np.nan
    add(picture, (slice(0, shape[0]), slice(0, shape[1])), losses)
    text = shown(picture, "truecolor", height=watch.FREE + 4)
    lines = text.splitlines()
    assert len([line for line in lines[:-1] if "▀" in line]) == 4
    assert PURPLE in lines[4]
    assert YELLOW in lines[1]
    wide = shown(picture, "truecolor", height=40)
    assert "▀" not in wide
    assert f"{WHITE}xxx" in wide.replace("38;2;138;138;138;", "")
    assert "38;5;" in shown(picture, "256", height=watch.FREE + 4)
    # with 16 colours it is letters
    assert "\x1b[" not in shown(picture, "standard")


@pytest.mark.parametrize("shape", [(1, 1), (300, 700), (3, 200)])
@pytest.mark.parametrize("colors", [None, "truecolor"])
def test_it_never_exceeds_the_terminal(shape, colors):
    picture = Picture(dataset_of(shape, ("gamma", "learning_rate")))
    for width, height in ((80, 24), (20, 8), (9, 3)):
        file = io.StringIO()
        console = Console(file=file, width=width, height=height, color_system=colors)
        lines = console.render_lines(picture, pad=False)
        assert len(lines) <= max(height, 6)
        assert all(sum(len(part.text) for part in line) <= width for line in lines[:-1])


@pytest.mark.parametrize("along", ["learning_rate", "gamma", "seed"])
def test_a_single_axis_is_one_line(along):
    picture = Picture(dataset_of((5,), (along,)))
    add(picture, (slice(1, 2),), np.array([2.0]))
    lines = shown(picture).splitlines()
    assert lines[1].strip() == "...000........."


def test_of_further_axes_the_values_of_the_last_chunk_are_shown():
    picture = Picture(dataset_of((2, 2, 3), ("momentum", "gamma", "learning_rate")))
    whole = (slice(0, 2), slice(0, 3))
    add(picture, (slice(1, 2), *whole), np.ones((1, 2, 3)))
    text = shown(picture, width=80)
    assert "over learning_rate and gamma, momentum = 10" in text
    assert "." * 3 not in text
    add(picture, (slice(0, 1), slice(0, 1), slice(0, 3)), np.ones((1, 1, 3)))
    assert "momentum = 0.1" in shown(picture, width=80)


def test_a_sweep_draws_every_chunk(monkeypatch, capsys):
    digits = mf.data.load("digits", num_samples=200, flatten=True)
    grid = dict(gamma=[0.5, 1.0], learning_rate=[0.01, 0.1], seed=[0, 3])
    options = dict(epochs=2, chunk_cells=4)
    plain = mf.sweep(DIGITS, digits, grid, watch=True, **options)
    assert capsys.readouterr().err == (
        "the heat map is not drawn, because stderr is not a terminal\n"
    )
    file, added = io.StringIO(), []

    def console(**_) -> Console:
        return Console(file=file, force_terminal=True, color_system=None, width=60, height=20)

    monkeypatch.setattr(progress, "Console", console)
    monkeypatch.setattr(watch, "Console", console)
    before = Picture.add

    def add_and_note(picture: Picture, region, results) -> None:
        before(picture, region, results)
        added.append(shown(picture))

    monkeypatch.setattr(Picture, "add", add_and_note)
    drawn = mf.sweep(DIGITS, digits, grid, watch=True, progress=True, **options)
    assert drawn.identical(plain)
    assert [text.count("...") for text in added] == [2, 0]
    last = file.getvalue().rpartition("training loss after 2 epochs")[2]
    assert last.splitlines()[1].startswith("  1 ")
    assert "8/8" in file.getvalue()
    assert "Training" not in last
