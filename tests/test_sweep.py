"""Sweeps: cell by cell what train gives, and a store that survives whatever happens to it."""

import contextlib
import fcntl
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from json_results import parsed
from networks import DIGITS
from tolerance import assert_close

import meanfield_jax as mf
from meanfield_jax.cli.sweep import parse_grid
from meanfield_jax.experiments import diagram, files
from meanfield_jax.experiments.birth import create
from meanfield_jax.experiments.files import Memory
from meanfield_jax.experiments.grid import chunk_shape
from meanfield_jax.experiments.store import Layout, Variable
from meanfield_jax.experiments.sweep import _Share
from meanfield_jax.experiments.train import bytes_of_cell, recipe_of
from meanfield_jax.variants import with_gamma

GRID = dict(gamma=[0.5, 1.0], learning_rate=[100.0, 0.01, 0.1], seed=[0, 3])
FOUR = dict(gamma=[0.5, 1.0], learning_rate=[100.0, 0.01, 0.1, 1.0])
OPTIONS = dict(epochs=2, chunk_cells=4)
"""Chunks of 2 x 2 cells, and of 1 x 2 at the edge; nearly all sweeps here share their program."""
COMMAND = (
    *("--data", "digits", "--widths", "64", "--num-samples", "200", "--num-test", "200"),
    *("--epochs", "2", "--chunk-cells", "4", "--grid", "gamma=0.5,1"),
    *("learning_rate=1e-2:100:12", "seed=0,1"),
)
"""A sweep of 12 chunks from the command line."""
PROCESSES = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
"""The environment of processes: they read programs that were compiled before, as all tests do.

Of each of them jaxlib says more on stderr than a pipe holds that nobody reads meanwhile.
"""


@pytest.fixture(scope="module")
def digits():
    return mf.data.load("digits", num_samples=200, flatten=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The store of the command, written without a break."""
    store = tmp_path_factory.mktemp("whole") / "run.zarr"
    assert finish(start(store)) == (0, "48 runs")
    return store


def start(
    store: Path, *options: str, before: str = ":", environment: dict[str, str] = PROCESSES
) -> subprocess.Popen:
    """The command, as a process of its own, behind a command of the shell."""
    command = [sys.executable, "-m", "meanfield_jax", "sweep", str(store), *COMMAND, *options]
    command = ["sh", "-c", f'{before} && exec "$@"', "sh", *command]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Exit status, and how the last line on stderr begins."""
    _, said = process.communicate(timeout=300)
    return process.returncode, said.splitlines()[-1].split(",")[0]


def same_numbers(a: Path, b: Path) -> bool:
    """Bit by bit, apart from who made it."""
    return mf.load_sweep(a).drop_attrs().identical(mf.load_sweep(b).drop_attrs())


def content(store: Path) -> dict[str, bytes]:
    """All files of a store."""
    found = (path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): path.read_bytes() for path in found}


def wait_for_chunks(store: Path, count: int, process: subprocess.Popen) -> None:
    chunks = store / "digest" / "c"
    deadline = time.monotonic() + 120
    while not chunks.exists() or len(list(chunks.iterdir())) < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_each_cell_is_what_train_gives(digits):
    found = mf.sweep(DIGITS, digits, GRID | dict(momentum=0.5), test=digits, **OPTIONS)
    assert found.sizes == dict(gamma=2, learning_rate=3, seed=2, epoch=2)
    for gamma in GRID["gamma"]:
        for seed in GRID["seed"]:
            cell = found.sel(gamma=gamma, seed=seed, learning_rate=0.1)
            options = dict(gamma=gamma, seed=seed, learning_rate=0.1, momentum=0.5, epochs=2)
            alone = mf.train(DIGITS, digits, test=digits, **options)
            assert_close(cell.loss.values, alone.loss, "edge", dtype=np.float32)
            assert_close(cell.test_loss.values, alone.test_loss, "edge", dtype=np.float32)
    assert (found.diverged_at.sel(learning_rate=100.0) >= 0).all()
    assert float(found.momentum) == 0.5


def test_one_scale_may_be_given_for_all(digits):
    grid = dict(gamma=0.5, learning_rate=[0.01, 0.03, 0.1, 0.3])
    found = mf.sweep(DIGITS, digits, grid, test=digits, **OPTIONS)
    assert found.loss.shape == (4, 2)
    assert found.eta_max_batch.shape == ()
    theory = mf.analyze(with_gamma(DIGITS, 0.5), data=digits[0][:100])
    assert_close(float(found.eta_max_batch), theory.eta_max(0.9), "rounding", dtype=np.float32)


@pytest.mark.slow
def test_structure_and_variances_are_axes(digits):
    grid = dict(depth=[1, 2], width=[64], batch_size=[100], weight_var=[1.0, 2.0])
    found = mf.sweep(DIGITS, digits, grid, epochs=1)
    at = dict(depth=2, width=64, batch_size=100)
    for weight_var in grid["weight_var"]:
        options = dict(norm=mf.BatchNorm(), weight_var=weight_var)
        network = mf.mlp([64, 64], inputs=64, outputs=10, **options)
        alone = mf.train(network, digits, epochs=1, batch_size=100)
        cell = found.sel(**at, weight_var=weight_var)
        assert_close(cell.loss.values, alone.loss, "edge", dtype=np.float32)
        theory = mf.analyze(network, data=digits[0][:100], statistics="frozen")
        predicted = float(cell.eta_max_frozen)
        assert_close(predicted, theory.eta_max(0.9), "rounding", dtype=np.float32)


@pytest.mark.parametrize("cells", [1, 2, 5, 7, 30, 1000])
@pytest.mark.parametrize("sizes", [dict(gamma=3, learning_rate=7, seed=2), dict(width=2, gamma=5)])
def test_chunks_cover_the_grid_once(sizes, cells):
    """So no two processes ever write the same region."""
    variable = Variable((), np.float32, np.nan, {})
    layout = Layout(sizes, chunk_shape(sizes, cells), dict(loss=variable), {}, dict(grid=sizes), {})
    store = create(Memory(), layout, resume=False)
    covered = np.zeros(tuple(sizes.values()), int)
    for region in store.regions:
        covered[region] += 1
        assert covered[region].size <= cells
    assert np.all(covered == 1)
    if "width" in sizes:
        assert layout.chunk[0] == 1


@pytest.mark.slow
def test_memory_of_a_cell_is_not_underestimated(digits):
    """XLA's own account of the vmapped program is below ours, by less than a factor of four.

    Cells that are trained one after the other, as on CPU, need the memory of one.
    """
    import jax
    import jax.numpy as jnp

    from meanfield_jax.experiments.train import Cell, check_samples, run_cells

    network = mf.mlp([200] * 3, inputs=64, outputs=10, norm=mf.BatchNorm())
    recipe = recipe_of(network, 1, 50, "squared", None, True, "float32")
    samples, _ = check_samples(recipe, digits, None)

    def in_turn(cells):
        return run_cells(recipe, cells, samples, None)

    def together(cells):
        return jax.vmap(lambda cell: in_turn(jax.tree.map(lambda value: value[None], cell)))(cells)

    def needed(run, count: int) -> int:
        cells = Cell(jnp.ones(count), jnp.ones(count), jnp.arange(count))
        compiled = jax.jit(run).lower(cells).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    each = (needed(together, 9) - needed(together, 1)) / 8
    assert each < bytes_of_cell(recipe) < 4 * each
    assert jax.default_backend() == "cpu"
    assert (needed(in_turn, 33) - needed(in_turn, 9)) / 24 < 0.01 * each


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 255]) + path.read_bytes()[1:]),
    ],
    ids=["truncated", "empty", "gone", "altered"],
)
@pytest.mark.parametrize("variable", ["loss", "digest"])
def test_a_damaged_chunk_is_found_and_computed_again(digits, tmp_path, damage, variable):
    store = tmp_path / "run.zarr"
    # the second file is a chunk at the edge
    options = OPTIONS | dict(store=store, test=digits)
    before = mf.sweep(DIGITS, digits, GRID, **options)
    files = sorted(path for path in (store / variable / "c").rglob("*") if path.is_file())
    damage(files[1])
    seen = mf.load_sweep(store)
    assert int((seen.diverged_at == -2).sum()) == 2
    untouched = {path: path.stat().st_mtime_ns for path in files[2:]}
    assert mf.sweep(DIGITS, digits, GRID, resume=True, **options).identical(before)
    assert {path: path.stat().st_mtime_ns for path in files[2:]} == untouched


def test_a_finished_sweep_computes_nothing(digits, tmp_path, monkeypatch):
    options = OPTIONS | dict(store=tmp_path / "run.zarr", test=digits)
    before = mf.sweep(DIGITS, digits, GRID, **options)
    monkeypatch.setattr("meanfield_jax.experiments.sweep.run_cells", None)
    monkeypatch.setattr("meanfield_jax.experiments.sweep.analyze", None)
    assert mf.sweep(DIGITS, digits, GRID, resume=True, **options).identical(before)
    # any reader of Zarr can open it
    opened = xr.open_zarr(options["store"], consolidated=False)
    assert np.array_equal(opened.loss.values, before.loss.values, equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(epochs=1), ("epochs 2 in the store, 1 now",)),
        (dict(grid=GRID | dict(gamma=[0.5, 2.0])), ("grid/gamma [0.5, 1.0] in the store",)),
        (dict(network=mf.mlp([64], inputs=64, outputs=10, norm=mf.BatchNorm(beta=1.0))), ("beta",)),
        (dict(loss="cross_entropy"), ('loss "squared" in the store, "cross_entropy" now',)),
        (dict(precision="bf16"), ('precision "float32" in the store, "bf16" now',)),
        (dict(resume=False), ("exists already", "--resume")),
    ],
)
def test_a_store_of_another_sweep_is_refused(digits, tmp_path, changes, words):
    options = OPTIONS | dict(network=DIGITS, grid=GRID, store=tmp_path / "run.zarr", test=digits)
    mf.sweep(data=digits, **options)
    before = {path: path.read_bytes() for path in options["store"].rglob("*") if path.is_file()}
    with pytest.raises(mf.SpecError) as error:
        mf.sweep(data=digits, **(options | dict(resume=True) | changes))
    assert all(word in str(error.value) for word in words)
    assert before == {path: path.read_bytes() for path in before}


def test_a_store_in_use_is_refused(digits, tmp_path):
    options = OPTIONS | dict(store=tmp_path / "run.zarr", test=digits)
    mf.sweep(DIGITS, digits, GRID, **options)
    with (tmp_path / ".run.zarr.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(mf.SpecError, match="another sweep is writing to it"):
            mf.sweep(DIGITS, digits, GRID, resume=True, **options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(grid=dict(gama=[1.0])), ("grid='gama'", "gamma, weight_var")),
        (dict(grid=dict(gamma=1.0)), ("no axis", "sequence")),
        (dict(grid=dict(seed=[0.5])), ("grid['seed']=[0.5]", "integers")),
        (dict(grid=dict(gamma=["a"])), ("grid['gamma'][0]='a'", "must be a number")),
        (dict(grid=dict(gamma=[1.0, 1.0])), ("values repeat",)),
        (dict(grid=dict(learning_rate=[-1.0])), ("learning_rate=[-1.0]", "negative")),
        (dict(grid=dict(batch_size=[50, 201])), ("batch_size=201", "200 samples")),
        (dict(grid=dict(depth=[0])), ("depth=0", "an integer of at least 1")),
        (dict(chunk_cells=0), ("chunk_cells=0", "at least 1")),
        (dict(network=mf.mlp([4], inputs=64, outputs=10)), ("gamma=", "no norm")),
    ],
)
def test_what_makes_no_sense_is_refused(digits, tmp_path, changes, words):
    options = dict(network=DIGITS, grid=GRID, store=tmp_path / "run.zarr") | changes
    with pytest.raises(mf.SpecError) as error:
        mf.sweep(data=digits, **options)
    assert all(word in str(error.value) for word in words)
    assert not options["store"].exists()


def test_batches_too_small_for_the_theory_are_trained_without_a_prediction(digits):
    found = mf.sweep(DIGITS, digits, dict(batch_size=[2, 50]), epochs=1)
    assert np.isnan(found.eta_max_batch.values).tolist() == [True, False]
    assert np.isfinite(found.loss).all()


def test_predictions_are_computed_once_for_equal_batches_and_statistics(monkeypatch):
    calls = []
    analyze = mf.analyze
    monkeypatch.setattr(
        "meanfield_jax.experiments.sweep.analyze",
        lambda *args, **options: calls.append(options) or analyze(*args, **options),
    )
    rng = np.random.default_rng(0)
    data = rng.normal(size=(260, 8)).astype(np.float32), rng.integers(0, 3, 260)
    grid = dict(batch_size=[100, 128, 256], weight_var=[1.0, 2.0])
    network = mf.mlp([5], inputs=8, outputs=3)
    found = mf.sweep(network, data, grid, epochs=1)
    assert len(calls) == 4
    for statistics in ("batch", "frozen", "wei2019"):
        theory = analyze(network, data=data[0][:128], statistics=statistics)
        predicted = found[f"eta_max_{statistics}"].sel(weight_var=2.0, batch_size=[128, 256])
        assert_close(predicted.values, theory.eta_max(0.9), "rounding", dtype=np.float32)


def test_no_store_is_no_sweep(tmp_path):
    with pytest.raises(mf.DataError, match="does not exist"):
        mf.load_sweep(tmp_path / "nothing.zarr")
    (tmp_path / "empty").mkdir()
    with pytest.raises((mf.DataError, OSError), match="store="):
        mf.load_sweep(tmp_path / "empty")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (GRID, GRID | dict(seed=[0, 1, 2, 3])),
        (GRID, GRID | dict(learning_rate=[0.03, 100.0, 0.01, 1.0, 0.1])),
        (FOUR | dict(seed=3), FOUR | dict(seed=[0, 3], gamma=[0.5, 1.0, 2.0])),
        (FOUR | dict(seed=0), dict(seed=[3, 0], momentum=[0.9, 0.5], **FOUR)),
        (GRID, GRID | dict(epochs=3)),
    ],
    ids=["seed", "between", "fixed to axis", "other order", "epochs"],
)
def test_a_sweep_grows_to_the_bits_of_the_larger_one(digits, tmp_path, monkeypatch, before, after):
    """No run that is known is trained again, apart from those that further epochs change."""
    small, large = tmp_path / "small.zarr", tmp_path / "large.zarr"
    options = OPTIONS | dict(test=digits)

    def sweep(store: Path, grid: dict, **more) -> xr.Dataset:
        grid = dict(grid)
        epochs = grid.pop("epochs", 2)
        return mf.sweep(DIGITS, digits, grid, store=store, **options | dict(epochs=epochs) | more)

    old = sweep(small, before)
    whole = sweep(large, after)
    trained = []
    results = _Share._cells
    monkeypatch.setattr(
        _Share, "_cells", lambda self, *at: trained.append(at[1].sum()) or results(self, *at)
    )
    grown = sweep(small, after, extend=True)
    assert grown.identical(whole)
    assert content(small) == content(large)
    known = int((old.diverged_at >= 0).sum()) if "epochs" in after else old.diverged_at.size
    assert sum(trained) == whole.diverged_at.size - known
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.zarr", "small.zarr"]
    # what is complete is not touched
    sweep(small, after, extend=True)
    assert sum(trained) == whole.diverged_at.size - known


@pytest.mark.parametrize("step", ["write_file", "rename"])
def test_an_interrupted_extension_loses_neither_store(digits, tmp_path, monkeypatch, step):
    """Interrupted at every twelfth file, and at every exchange of the stores."""
    first, after = tmp_path / "first.zarr", GRID | dict(seed=[0, 1, 2, 3])
    options = OPTIONS | dict(test=digits)
    before = mf.sweep(DIGITS, digits, GRID, store=first, **options)
    whole = mf.sweep(DIGITS, digits, after, store=tmp_path / "whole.zarr", **options)
    owner = Path if step == "rename" else files
    do = getattr(owner, step)
    for crash_at in itertools.count(1, 1 if step == "rename" else 12):
        store, calls = tmp_path / f"{crash_at}.zarr", itertools.count(1)

        def fail(path, argument, calls=calls, crash_at=crash_at):
            if next(calls) == crash_at:
                raise KeyboardInterrupt
            return do(path, argument)

        shutil.copytree(first, store)
        with monkeypatch.context() as patched:
            patched.setattr(owner, step, fail)
            with contextlib.suppress(KeyboardInterrupt):
                mf.sweep(DIGITS, digits, after, store=store, extend=True, **options)
                break
        assert mf.load_sweep(store).identical(before)
        found = mf.sweep(DIGITS, digits, after, store=store, extend=True, **options)
        assert found.identical(whole)
        assert content(store) == content(tmp_path / "whole.zarr")
    assert crash_at > 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(grid=GRID | dict(gamma=[0.5, 2.0])), "gamma 1.0 of the store is not in the grid"),
        (dict(grid=GRID | dict(depth=[1])), "depth is as the network specifies in the store"),
        (dict(grid=GRID | dict(momentum=0.5)), "momentum 0.9 of the store is not in the grid"),
        (dict(epochs=1), "epochs 2 in the store, 1 now"),
        (dict(loss="cross_entropy"), 'loss "squared" in the store, "cross_entropy" now'),
    ],
)
def test_what_is_not_larger_is_no_extension(digits, tmp_path, changes, words):
    options = OPTIONS | dict(network=DIGITS, grid=GRID, store=tmp_path / "run.zarr", test=digits)
    mf.sweep(data=digits, **options)
    before = content(options["store"])
    with pytest.raises(mf.SpecError, match=words):
        mf.sweep(data=digits, **(options | dict(extend=True) | changes))
    assert content(options["store"]) == before


def test_axes_in_another_order_are_another_store(digits, tmp_path):
    options = OPTIONS | dict(store=tmp_path / "run.zarr", test=digits)
    mf.sweep(DIGITS, digits, GRID, **options)
    with pytest.raises(mf.SpecError, match="axes in the order gamma, learning_rate, seed"):
        mf.sweep(DIGITS, digits, dict(reversed(GRID.items())), resume=True, **options)


def test_every_cell_has_a_status(digits, tmp_path):
    options = OPTIONS | dict(store=tmp_path / "run.zarr", test=digits)
    mf.sweep(DIGITS, digits, GRID, **options)
    (options["store"] / "digest" / "c" / "1").unlink()
    found = mf.load_sweep(options["store"])
    expected = np.select(
        [found.diverged_at >= 0, found.diverged_at == -2],
        [mf.Status.DIVERGED, mf.Status.NOT_RUN],
        mf.Status.CONVERGED,
    )
    assert np.array_equal(found.status, expected)
    assert {mf.Status.DIVERGED, mf.Status.NOT_RUN, mf.Status.CONVERGED} == set(expected.ravel())


@pytest.mark.parametrize(
    ("file", "status", "words"),
    [
        (None, 0, ["4 whole, 0 damaged, 0 to be run"]),
        (
            "loss/c/0/0/0/0",
            1,
            ["3 whole, 1 damaged", "one of diverged_at/c/0/0/0, loss/c/0/0/0/0, "],
        ),
        ("learning_rate/c/0", 1, ["repairable: learning_rate/c/0", "4 whole"]),
        ("eta_max_batch/c/0", 1, ["repairable: eta_max_batch/c/0", "4 whole"]),
        ("loss/zarr.json", 1, ["repairable: loss/zarr.json", "4 whole"]),
        ("zarr.json", 1, ["lost: zarr.json", "4 there, but not checked"]),
    ],
)
def test_check_says_what_is_damaged_and_resume_mends_it(
    digits, tmp_path, capsys, file, status, words
):
    from meanfield_jax.cli import main

    options = OPTIONS | dict(store=tmp_path / "run.zarr", test=digits)
    before = mf.sweep(DIGITS, digits, GRID, **options)
    whole = content(options["store"])
    if file is not None:
        data = bytearray((options["store"] / file).read_bytes())
        # the first byte of the root's metadata: what a later one means depends on their length
        data[0 if file == "zarr.json" else len(data) // 2] ^= 1
        (options["store"] / file).write_bytes(data)
    assert main(["check", str(options["store"])]) == status
    said = capsys.readouterr()
    assert all(word in said.out for word in words), said.out
    assert said.err.count("\n") == status
    assert main(["check", str(options["store"]), "--json"]) == status
    found = parsed("check", capsys.readouterr().out)["attributes"]
    assert found["damaged"] == (file == "loss/c/0/0/0/0")
    assert mf.sweep(DIGITS, digits, GRID, resume=True, **options).identical(before)
    assert content(options["store"]) == whole


def test_what_is_no_sweep_is_left_alone(digits, tmp_path, capsys):
    from meanfield_jax.cli import main

    store = tmp_path / "run.zarr"
    store.mkdir()
    (store / "letter.txt").write_text("dear")
    for resume in (False, True):
        with pytest.raises(mf.DataError, match=r"not a sweep's store, but has letter\.txt"):
            mf.sweep(DIGITS, digits, GRID, store=store, resume=resume, **OPTIONS)
    assert [path.name for path in store.iterdir()] == ["letter.txt"]
    assert main(["check", str(store)]) == 2
    for location, words in {"s3://bucket/run": "it is a URL", "": "names no folder"}.items():
        with pytest.raises(mf.SpecError, match=words):
            mf.sweep(DIGITS, digits, GRID, store=location, **OPTIONS)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("begun", ["", '{"attributes": {"format": "meanfield_jax.sweep/1"}}', "{"])
def test_what_was_only_begun_is_begun_again(digits, tmp_path, begun):
    store = tmp_path / "run.zarr"
    store.mkdir()
    (store / "zarr.json").write_text(begun)
    mf.sweep(DIGITS, digits, GRID, store=store, test=digits, resume=True, **OPTIONS)
    assert int((mf.load_sweep(store).diverged_at == -2).sum()) == 0


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_to_the_same_bits(whole, tmp_path):
    """Four times kill -9, from before the store exists until the last chunks."""
    store, moments = tmp_path / "run.zarr", random.Random(0)
    for chunks in (0, 1, 5, 10):
        process = start(store, *(["--resume"] if store.exists() else []))
        if chunks > 0:
            wait_for_chunks(store, chunks, process)
        time.sleep(moments.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert finish(start(store, "--resume")) == (0, "48 runs")
    assert same_numbers(store, whole)


def pair(store: Path) -> list[subprocess.Popen]:
    """Two processes that share the command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = ("--coordinator", address, "--num-processes", "2", "--patience", "5")
    return [start(store, *together, "--process-id", str(number)) for number in range(2)]


@pytest.mark.slow
def test_a_suspended_machine_loses_nothing_and_a_stopped_process_is_told(whole, tmp_path):
    """Both are stopped for longer than patience lasts, then continued; then only one is stopped."""
    store = tmp_path / "both.zarr"
    processes = pair(store)
    wait_for_chunks(store, 2, processes[0])
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(8)
    for process in processes:
        process.send_signal(signal.SIGCONT)
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    # the first speaks for both
    assert "48 runs" in outputs[0][1]
    assert outputs[1][0] == ""
    assert same_numbers(store, whole)

    store = tmp_path / "one.zarr"
    first, second = pair(store)
    wait_for_chunks(store, 2, second)
    second.send_signal(signal.SIGSTOP)
    _, said = first.communicate(timeout=300)
    second.kill()
    second.communicate()
    assert first.returncode == 1
    assert "seems to have died or to be stopped" in said.splitlines()[-1]
    assert finish(start(store, "--resume")) == (0, "48 runs")
    assert same_numbers(store, whole)


@pytest.mark.slow
def test_of_two_processes_either_outlives_the_other(whole, tmp_path):
    """One is killed: the other does its share, says what is missing, and the rest is resumed."""
    for killed in (0, 1):
        store = tmp_path / f"killed-{killed}.zarr"
        processes = pair(store)
        wait_for_chunks(store, 2, processes[killed])
        processes[killed].send_signal(signal.SIGKILL)
        processes[killed].communicate()
        _, said = processes[1 - killed].communicate(timeout=300)
        assert processes[1 - killed].returncode == 1
        assert "seems to have died" in said
        assert "Traceback" not in said
        assert finish(start(store, "--resume")) == (0, "48 runs")
        assert same_numbers(store, whole)


@pytest.mark.slow
def test_devices_share_the_cells(whole, tmp_path):
    """Eight virtual devices give the same bits as one."""
    store = tmp_path / "eight.zarr"
    flags = dict(XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert finish(start(store, environment=PROCESSES | flags)) == (0, "48 runs")
    assert mf.load_sweep(store).devices.startswith("8 x cpu")
    assert same_numbers(store, whole)


@pytest.mark.slow
def test_where_nothing_more_can_be_written_the_store_stays_readable(whole, tmp_path):
    """The system refuses to write files."""
    store = tmp_path / "run.zarr"
    shutil.copytree(whole, store)
    chunks = sorted((store / "digest" / "c").iterdir(), key=lambda path: int(path.name))
    for path in chunks[5:]:
        path.unlink()
    process = start(store, "--resume", before="ulimit -f 0")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1
    (line,) = [line for line in said.splitlines() if line.startswith("meanfield-jax:")]
    assert "store=" in line
    assert "Traceback" not in said
    readable = mf.load_sweep(store)
    assert int((readable.diverged_at != -2).sum()) == 20
    assert finish(start(store, "--resume")) == (0, "48 runs")
    assert same_numbers(store, whole)


def synthetic() -> xr.Dataset:
    """Two scales, four learning rates, two seeds: the boundary is known."""
    at = np.full((2, 4, 2), -1)
    at[0, 3] = 5  # both seeds at the last rate
    at[1, 1, 1] = 7  # one seed at the second
    at[1, 2:] = 0
    loss = np.arange(16.0).reshape(2, 4, 2, 1)
    coords = dict(gamma=[0.5, 1.0], learning_rate=[0.01, 0.1, 1.0, 10.0], seed=[0, 1])
    dims = ("gamma", "learning_rate", "seed")
    eta = {f"eta_max_{name}": ("gamma", [2.0, 0.5]) for name in ("batch", "frozen", "wei2019")}
    data = dict(diverged_at=(dims, at), loss=((*dims, "epoch"), loss), **eta)
    dataset = xr.Dataset(data, coords)
    for name in ("loss", "gamma", "learning_rate"):
        dataset[name].attrs["long_name"] = name
    return dataset


def test_the_boundary_is_where_the_first_seed_diverges():
    found = synthetic()
    assert_close(diagram.boundary(found).values, np.sqrt([10.0, 0.001]), "rounding")
    assert diagram.averaged(found).isnull().values.tolist() == [
        [False] * 3 + [True],
        [False] + [True] * 3,
    ]
    assert diagram.best_rate(found).values.tolist() == [0.01, 0.01]
    # a cell that is not there yet is no boundary
    found.diverged_at[1, 1] = -2
    assert np.isnan(diagram.boundary(found).values[1])
    with pytest.raises(mf.DataError, match="value='test_loss'"):
        diagram.averaged(found, "test_loss")
    with pytest.raises(mf.DataError, match="no learning rates"):
        diagram.boundary(found.isel(learning_rate=0))


def test_the_picture_has_what_it_says():
    figure = mf.plot_sweep(synthetic())
    panel = figure.axes[0]
    (mesh,) = panel.collections
    assert np.ma.getmaskarray(mesh.get_array()).sum() == 4
    labels = [line.get_label() for line in panel.lines]
    assert labels[0] == "theory, training mode"
    assert_close(panel.lines[0].get_xdata(), [2.0, 0.5], "rounding")
    assert_close(panel.lines[1].get_xdata(), [1.0, 0.25], "rounding")


@pytest.mark.parametrize(
    ("along", "at"),
    [
        ("learning_rate", dict(gamma=1)),
        ("gamma", dict(learning_rate=0, seed=0)),
        ("seed", dict(gamma=1, learning_rate=0)),
    ],
)
def test_a_single_axis_is_drawn_as_a_line(along, at):
    dataset = synthetic().isel(at)
    figure = mf.plot_sweep(dataset)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    boundaries = {line.get_label(): line for line in figure.axes[-1].lines}
    (mean,) = (line for label, line in lines.items() if line.get_marker() == "o")
    assert mean.get_xdata().tolist() == dataset[along].values.tolist()
    if along == "learning_rate":
        assert lines["diverged"].get_xdata().tolist() == [0.1, 1.0, 10.0]
        assert boundaries["theory, training mode"].get_xdata() == [0.5, 0.5]
        assert_close(mean.get_ydata()[:1], [8.5], "rounding")
    else:
        rates = dataset.eta_max_batch.broadcast_like(dataset[along])
        assert_close(boundaries["theory, training mode"].get_ydata(), rates, "rounding")
        assert boundaries["rate in use"].get_ydata() == [0.01, 0.01]
    assert figure.axes[-1].get_xlabel() == along


def test_axes_without_learning_rates_are_lines_of_one_of_them():
    figure = mf.plot_sweep(synthetic().isel(learning_rate=0).expand_dims(momentum=[0.5, 0.9]))
    labels = figure.axes[1].get_legend_handles_labels()[1]
    assert labels == ["gamma = 0.5", "gamma = 1", "rate in use"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("gamma=0.5,1", [0.5, 1.0]),
        ("learning_rate=1e-2:1:3", [0.01, 0.1, 1.0]),
        ("seed=0,1,2", [0, 1, 2]),
        ("momentum=.5", 0.5),
    ],
)
def test_grids_are_read(text, values):
    ((name, found),) = parse_grid((text,)).items()
    assert name == text.split("=")[0]
    assert_close(found, values, "rounding")


@pytest.mark.parametrize(
    "texts", [("gamma",), ("x=1",), ("gamma=a",), ("gamma=0:1:3",), ("seed=1",) * 2]
)
def test_grids_that_make_no_sense_are_refused(texts):
    with pytest.raises(mf.SpecError, match="--grid="):
        parse_grid(texts)


def test_plot_reads_what_sweep_wrote(digits, tmp_path, capsys):
    from meanfield_jax.cli import main

    grid = GRID | dict(learning_rate=sorted(GRID["learning_rate"]))
    mf.sweep(DIGITS, digits, grid, store=tmp_path / "run.zarr", test=digits, **OPTIONS)
    picture = tmp_path / "run.png"
    assert main(["plot", str(tmp_path / "run.zarr"), "--output", str(picture), "--json"]) == 0
    assert parsed("plot", capsys.readouterr().out)["variables"]["loss"]["dims"][0] == "gamma"
    assert picture.read_bytes().startswith(b"\x89PNG")
    page = tmp_path / "run.html"
    assert main(["plot", str(tmp_path / "run.zarr"), "--html", str(page)]) == 0
    assert f"wrote {page}\n" in capsys.readouterr().err
    assert page.read_text() == mf.sweep_page(mf.load_sweep(tmp_path / "run.zarr"))
    assert main(["plot", str(tmp_path / "no.zarr"), "--output", str(picture)]) == 2
    assert "does not exist" in capsys.readouterr().err
