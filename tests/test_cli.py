"""The command line as a user runs it: results, files, one-line errors, nothing half-written."""

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jsonschema
import numpy as np
import pytest
import xarray as xr
from json_results import parsed
from networks import wide

import meanfield_jax as mf
from meanfield_jax.cli import main
from meanfield_jax.cli.analyze import Analyze
from meanfield_jax.cli.options import DataOptions
from meanfield_jax.cli.output import outputs
from meanfield_jax.cli.program import COMMANDS
from meanfield_jax.cli.result import RESULTS
from meanfield_jax.cli.start import TRACEBACK
from meanfield_jax.plots import plot_validation

SMALL = ["--widths", "40", "--num-samples", "50"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_analyze_prints_what_the_theory_says(capsys):
    assert main(["analyze", "--gamma", "0.5", "--json"]) == 0
    printed = parsed("analyze", capsys.readouterr().out)
    net = wide(norm=mf.BatchNorm(gamma=0.5))
    with jax.enable_x64():
        expected = float(mf.analyze(net).eta_max(momentum=0.9))
    assert printed["variables"]["eta_max"]["values"] == pytest.approx(expected, rel=1e-5)
    assert printed["attributes"]["statistics"] == "batch"


def test_analyze_shows_network_and_tables(capsys):
    assert (
        main(["analyze", "--net", "cnn", "--widths", "30", "--vanilla", "--num-samples", "100"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "Conv(width=30" in shown
    assert "BatchNorm" not in shown
    assert shown.startswith("eta_max = ")
    assert "trust it" in shown.partition("Network:")[0]


def test_analyze_draws_networks(capsys):
    options = ["analyze", "--widths", "16", "--num-samples", "20", "--draws", "3"]
    assert main([*options, "--json"]) == 0
    values = parsed("analyze", capsys.readouterr().out)["variables"]
    net = mf.mlp([16], inputs=784, outputs=10, norm=mf.BatchNorm())
    found = mf.drawn_eigenvalues(net, num_samples=20, draws=3)
    drawn = np.asarray(found.eigenvalues[:, 0])
    np.testing.assert_allclose(values["lambda_max_drawn"]["values"], drawn, rtol=1e-4)
    assert main(options) == 0
    shown = " ".join(capsys.readouterr().out.split())
    low, high = found.interval
    assert "median of 3 drawn networks" in shown
    assert f"between {low:.4g} and {high:.4g}" in shown


@pytest.mark.slow
def test_validate_writes_picture_and_numbers_and_prints_a_table(folder, capsys):
    command = ["validate", *SMALL, "--gammas", "0.5", "1", "--draws", "2", "--output", "result"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "vanilla" in shown.out
    assert "\n0.5" in shown.out
    assert "wrote result.nc result.png" in shown.err
    assert (folder / "result.png").read_bytes().startswith(b"\x89PNG")
    with xr.open_dataset("result.nc") as dataset:
        assert dict(dataset.sizes)["network"] == 3
        assert np.isfinite(dataset.measured).all()
    assert sorted(os.listdir()) == ["result.nc", "result.png"]


def test_validate_prints_json_only(capsys):
    command = ["validate", *SMALL, "--gammas", "1", "--draws", "1", "--json"]
    assert main(command) == 0
    printed = parsed("validate", capsys.readouterr().out)
    assert printed["variables"]["standard_error"]["values"][0] == [None, None]
    assert printed["attributes"]["data"] == "gaussian"


@pytest.mark.slow
def test_validate_holds_rates_against_training(folder, capsys):
    command = ["validate", "--data", "digits", "--widths", "40", "--num-samples", "50"]
    command += ["--gammas", "0.5", "1", "--draws", "1", "--train", "--num-steps", "40"]
    assert main([*command, "--output", "t"]) == 0
    shown = capsys.readouterr().out
    assert "Largest learning rates from a random start, 40 steps" in shown
    assert shown.count("divergence") == 3
    assert "?: there is no normalization" in " ".join(shown.split())
    with xr.open_dataset("t.nc") as dataset:
        assert dataset.event.values.tolist() == ["no_spike", "bounded"]
        for gamma in (0.5, 1.0):
            net = mf.mlp([40], inputs=64, outputs=10, norm=mf.BatchNorm(gamma))
            at = dataset.sel(network=f"gamma={gamma:g}")
            expected = mf.learning_rate(net, num_samples=50)
            for event in ("no_spike", "bounded"):
                predicted = float(at.rate_predicted.sel(event=event))
                assert predicted == pytest.approx(float(getattr(expected, event)), rel=1e-5)
        assert np.all(dataset.rate_measured.sel(event="bounded") > 0)
        assert len(plot_validation(dataset).axes) == 3
    assert main([*command, "--json"]) == 0
    printed = parsed("validate", capsys.readouterr().out)["variables"]
    assert printed["num_steps"]["values"] == 40
    assert printed["rate_measured"]["dims"] == ["network", "event", "draw"]


@pytest.mark.slow
def test_spectrum_writes_picture_and_lists_eigenvalues(folder, capsys):
    command = ["spectrum", *SMALL, "--top", "12", "--num-steps", "30", "--output", "s"]
    assert main(command) == 0
    assert "predicted" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    parsed("spectrum", capsys.readouterr().out)
    with xr.open_dataset("s.nc") as dataset:
        assert dataset.eigenvalues.shape == (12,)
        assert float(dataset.weights.sum()) == pytest.approx(1, rel=1e-4)
    assert (folder / "s.png").exists()


def test_a_saved_network_can_be_given(folder, capsys):
    net = mf.mlp([30], inputs=784, outputs=2, activation="erf", norm=mf.BatchNorm())
    (folder / "net.json").write_text(net.to_json())
    assert main(["analyze", "--spec", "net.json", "--gamma", "2", "--json"]) == 0
    spec = parsed("analyze", capsys.readouterr().out)["network"]
    assert spec["layers"][1]["gamma"] == 2.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["analyze", "--weight-var", "-1"], ["layers/0/Dense.weight_var=-1.0", "not negative"]),
        (["analyze", "--gamma", "nan"], ["BatchNorm.gamma=nan", "finite"]),
        (["analyze", "--widths", "0"], ["widths=0", "at least 1"]),
        (["analyze", "--momentum", "1"], ["momentum=1", "[0, 1)"]),
        (["validate", "--momentum", "-1"], ["momentum=-1", "[0, 1)"]),
        (["compare", "--momentum", "5"], ["momentum=5", "[0, 1)"]),
        (["analyze", "--activation", "rellu"], ["'rellu'", "relu"]),
        (["analyze", "--num-samples", "1"], ["num_samples=1", "at least 4"]),
        (["analyze", "--statistics", "bach"], ["bach", "--statistics"]),
        (["analyze", "--spec", "none.json"], ["none.json", "No such file"]),
        (["analyze", "--gama", "1"], ["--gama", "--help"]),
        (["analize"], ["analize"]),
        ([], ["meanfield-jax"]),
        (["validate", "--draws", "0"], ["draws=0", "at least 1"]),
        (["validate", "--train", "--num-steps", "0"], ["num_steps=0", "at least 1"]),
        (["validate", "--data", "mnist", "--data-dir", "nowhere"], ["nowhere", "data"]),
        (["validate", "--output", "no/such/folder"], ["no/such/folder", "folder"]),
        (["spectrum", "--net", "cnn", "--data", "gaussian", "--num-samples", "0"], ["num_samples"]),
        (["analyze", "--spec", "/"], ["--spec='/'", "regular file"]),
        (["analyze", "--spec", "/dev/zero"], ["/dev/zero", "regular file"]),
        (["validate", "--output", ""], ["--output='.'", "does not name a file"]),
        (["spectrum", "--output", "a.txt"], ["'a.txt'", "ends in .nc or .png or .pdf or .svg"]),
        (["compare", "--output", f"{'a' * 252}.png"], ["too long"]),
        (["phase", "--output", "no/a.png"], ["no/a.png", "folder"]),
        (["tune", "--save", "a.png"], ["--save='a.png'", ".json"]),
        (["tune", "--rate", "bounded"], ["--rate='bounded'", "no rate to choose"]),
        (["phase", "--weight-var", f"1:2:{'9' * 30}"], ["2 to 1,000,000"]),
        (["sweep", ""], ["store=''", "empty"]),
        (["sweep", "s3://bucket/run"], ["s3://bucket/run", "local folder"]),
        (["plot", "s3://bucket/run"], ["s3://bucket/run", "local folder"]),
        (["plot", "s", "--html", "a.pdf"], ["--html='a.pdf'", "ends in .html"]),
        (["sweep", "s", "--grid", "learning_rate=1:10:9999999999"], ["--grid", "COUNT up to"]),
        (["sweep", "s", "--grid", "seed=nan"], ["seed", "must be integers"]),
        (["sweep", "s", "--grid", "learning_rate=-1,1"], ["learning_rate", "not be negative"]),
        (["schema"], ["required"]),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(arguments, words, capsys, folder, monkeypatch):
    monkeypatch.setenv("MEANFIELD_JAX_DATA", str(folder))
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1, shown.err
    for word in words:
        assert word in shown.err
    assert os.listdir() == []


def test_help_is_on_stdout(capsys):
    assert main(["validate", "--help"]) == 0
    assert "--gammas" in capsys.readouterr().out


@contextlib.contextmanager
def default_signals():
    """As in a shell; after nohup, or in a script's &, a process would go on ignoring signals."""
    before = [signal.signal(signal.SIGINT, signal.default_int_handler)]
    before.append(signal.signal(signal.SIGTERM, signal.SIG_DFL))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_an_interrupted_run_leaves_nothing(number, status, word, folder):
    command = [sys.executable, "-m", "meanfield_jax", "validate", *SMALL, "--gammas", "0.5", "1"]
    with (
        default_signals(),
        subprocess.Popen(
            [*command, "--draws=100000", "--output=result"],
            env=os.environ
            | dict(FORCE_COLOR="1"),  # shows the progress bar, though no terminal is there
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        try:
            shown = ""
            while "Measuring" not in shown:
                assert select.select([process.stderr], [], [], 300)[0], shown
                part = os.read(process.stderr.fileno(), 4096).decode(errors="replace")
                assert part, shown
                shown += part
            process.send_signal(number)
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == status, err
    assert word in err.splitlines()[-1]
    assert "Traceback" not in err
    assert out == ""
    assert os.listdir(folder) == []


def test_a_failed_write_leaves_nothing(folder, monkeypatch, capsys):
    def full(self, path, **options):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(xr.Dataset, "to_netcdf", full)
    assert main(["validate", *SMALL, "--gammas", "1", "--draws", "1"]) == 1
    assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert os.listdir(folder) == []


# ---- how the program starts and ends


def program(*arguments, before=(), **options) -> subprocess.Popen:
    """The program in a process of its own."""
    command = [*before, sys.executable, "-m", "meanfield_jax", *arguments]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options
    with default_signals():
        return subprocess.Popen(command, **options)


def test_the_version_is_shown(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"meanfield-jax {mf.__version__}\n"


@pytest.mark.parametrize("seconds", [0.15, 0.4, 0.8])
def test_an_interrupt_during_the_imports_ends_the_program_silently(seconds):
    with program("analyze") as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.count("\n") <= 1


def test_a_full_stdout_is_an_error():
    with open("/dev/full", "w") as full, program("--version", stdout=full) as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("meanfield-jax: stdout: No space left")
    assert err.count("\n") == 1


def test_a_reader_that_has_stopped_ends_the_program_silently():
    read, write = os.pipe()
    os.close(read)
    with program("--version", stdout=write) as process:
        os.close(write)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "")


@pytest.mark.parametrize(
    ("closed", "status", "err"),
    [(1, 1, "meanfield-jax: stdout: it is closed"), (2, 0, "")],
)
def test_closed_streams_have_a_status_and_no_traceback(closed, status, err):
    shell = ["sh", "-c", f'exec "$@" {closed}>&-', "sh"]
    with program("--version", before=shell) as process:
        out, shown = process.communicate(timeout=60)
    assert process.returncode == status
    assert shown.startswith(err)
    assert shown.count("\n") <= 1
    assert bool(out) == (status == 0)


def test_a_missing_device_gets_one_line():
    with program("analyze", env=os.environ | dict(JAX_PLATFORMS="cuda")) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.startswith("meanfield-jax: JAX_PLATFORMS='cuda': ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("error", [KeyError("spec"), RecursionError("deep"), ValueError("a\nb")])
def test_a_fault_of_the_program_gets_one_line_and_a_traceback_on_request(
    error, monkeypatch, capsys
):
    def fail(self):
        raise error

    monkeypatch.setattr(Analyze, "run", fail)
    assert main(["analyze"]) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    for word in ("a fault of the program", type(error).__name__, "test_cli.py", TRACEBACK):
        assert word in shown
    monkeypatch.setenv(TRACEBACK, "1")
    assert main(["analyze"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_fifo_as_specification_is_refused_at_once(folder, capsys):
    os.mkfifo("fifo")
    assert main(["analyze", "--spec", "fifo"]) == 2
    assert "--spec='fifo': it is not a regular file" in capsys.readouterr().err


def test_a_name_with_a_number_in_it_keeps_the_number():
    numbers, picture = outputs("--output", Path("run-0.5"), ".nc", ".png")
    assert (numbers.name, picture.name) == ("run-0.5.nc", "run-0.5.png")
    assert [path.name for path in outputs("--output", Path("a.png"), ".png")] == ["a.png"]
    both = outputs("--output", Path("a.svg"), ".nc", ".png")
    assert [path.name for path in both] == ["a.nc", "a.svg"]


# ---- results as JSON


def test_every_command_with_json_has_a_schema(capsys):
    with_json = [
        name
        for name, command in COMMANDS.items()
        if "json" in (field.name for field in dataclasses.fields(command))
    ]
    assert sorted(with_json) == sorted(RESULTS)
    for name in with_json:
        assert main(["schema", name]) == 0
        schema = json.loads(capsys.readouterr().out)
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["properties"]["command"]["const"] == name


@pytest.mark.parametrize("net", ["mlp", "cnn", "resnet"])
def test_every_network_has_a_default(net, capsys):
    assert main(["analyze", "--net", net, "--widths", "8", "--vanilla", "--json"]) == 0
    parsed("analyze", capsys.readouterr().out)


def test_the_default_number_of_test_samples_fits_every_data_set():
    inputs = DataOptions(data="digits")
    network = mf.mlp([8], inputs=64, outputs=10)
    assert len(inputs.load_test(network, None, 1000)[0]) == 359
    assert len(inputs.load_test(network, None, 300)[0]) == 300
    assert len(inputs.load_test(network, 7, 300)[1]) == 7
    with pytest.raises(mf.DataError, match="holds 359 samples"):
        inputs.load_test(network, 1000, 300)
