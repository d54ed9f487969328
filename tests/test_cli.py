"""The command line as a user runs it: results, files, one-line errors, nothing half-written."""

import json
import os
import select
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import xarray as xr
from networks import wide

import meanfield_jax as mf
from meanfield_jax.cli import main

SMALL = ["--widths", "40", "--num-samples", "50"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_analyze_prints_what_the_theory_says(capsys):
    assert main(["analyze", "--gamma", "0.5", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
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
    assert "eta_max" in shown


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
    printed = json.loads(capsys.readouterr().out)
    assert printed["variables"]["standard_error"]["values"][0] == [None, None]
    assert printed["attributes"]["data"] == "gaussian"


@pytest.mark.slow
def test_spectrum_writes_picture_and_lists_eigenvalues(folder, capsys):
    assert main(["spectrum", *SMALL, "--top", "12", "--num-steps", "30", "--output", "s"]) == 0
    assert "predicted" in capsys.readouterr().out
    with xr.open_dataset("s.nc") as dataset:
        assert dataset.eigenvalues.shape == (12,)
        assert float(dataset.weights.sum()) == pytest.approx(1, rel=1e-4)
    assert (folder / "s.png").exists()


def test_a_saved_network_can_be_given(folder, capsys):
    net = mf.mlp([30], inputs=784, outputs=2, activation="erf", norm=mf.BatchNorm())
    (folder / "net.json").write_text(net.to_json())
    assert main(["analyze", "--spec", "net.json", "--gamma", "2", "--json"]) == 0
    spec = json.loads(capsys.readouterr().out)["network"]
    assert spec["layers"][1]["gamma"] == 2.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["analyze", "--weight-var", "-1"], ["layers/0/Dense.weight_var=-1.0", "not negative"]),
        (["analyze", "--gamma", "nan"], ["BatchNorm.gamma=nan", "finite"]),
        (["analyze", "--widths", "0"], ["Dense.width=0", "at least 1"]),
        (["analyze", "--momentum", "1"], ["momentum=1", "[0, 1)"]),
        (["analyze", "--activation", "rellu"], ["'rellu'", "relu"]),
        (["analyze", "--num-samples", "1"], ["num_samples=1", "at least 4"]),
        (["analyze", "--statistics", "bach"], ["bach", "--statistics"]),
        (["analyze", "--spec", "none.json"], ["none.json", "No such file"]),
        (["analyze", "--gama", "1"], ["--gama", "--help"]),
        (["analize"], ["analize"]),
        ([], ["meanfield-jax"]),
        (["validate", "--draws", "0"], ["draws=0", "at least 1"]),
        (["validate", "--data", "mnist", "--data-dir", "nowhere"], ["nowhere", "data"]),
        (["validate", "--output", "no/such/folder"], ["no/such/folder", "folder"]),
        (["spectrum", "--net", "cnn", "--data", "gaussian", "--num-samples", "0"], ["num_samples"]),
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


@pytest.mark.slow
def test_an_interrupted_run_leaves_nothing(folder):
    command = [sys.executable, "-m", "meanfield_jax", "validate", *SMALL, "--gammas", "0.5", "1"]
    # a process started while signals are ignored (nohup, a script's &) would ignore them too
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        [*command, "--draws=100000", "--output=result"],
        env=os.environ
        | dict(FORCE_COLOR="1"),  # shows the progress bar, though no terminal is there
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            shown = ""
            while "Measuring" not in shown:
                assert select.select([process.stderr], [], [], 300)[0], shown
                part = os.read(process.stderr.fileno(), 4096).decode(errors="replace")
                assert part, shown
                shown += part
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
            signal.signal(signal.SIGINT, before)
    assert process.returncode == 130, err
    assert "interrupted" in err.splitlines()[-1]
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
