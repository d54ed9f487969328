"""Random and hostile command lines: each is refused in one line, or its result is a result.

Line number i of every run is the same. A longer run than that of the suite, by hand:
MEANFIELD_JAX_FUZZ_SECONDS=1200 pytest -n0 tests/fuzz/test_command_lines.py
"""

import itertools
import json
import os
import random
import re
import resource
import time
from pathlib import Path

import jsonschema
import pytest
from json_results import parsed

import meanfield_jax as mf
from meanfield_jax.cli import main
from meanfield_jax.cli.program import COMMANDS

SECONDS = float(os.environ.get("MEANFIELD_JAX_FUZZ_SECONDS", "15"))

NET = ["--widths", "8"]
DATA = ["--num-samples", "16"]
SMALL = {
    "analyze": [*NET, "--num-samples", "16"],
    "phase": ["--weight-var", "1:2:3", "--bias-var", "0:1:2"],
    "validate": [*NET, *DATA, "--gammas", "1", "--draws", "1"],
    "spectrum": [*NET, *DATA, "--top", "3", "--num-steps", "5"],
    "compare": [
        *(*NET, *DATA, "--norms", "none", "--batch-sizes", "8", "--learning-rates", "0.1"),
        *("--epochs", "1", "--seeds", "1", "--draws", "1"),
    ],
    "sweep": [
        *("new", *NET, *DATA, "--epochs", "1", "--num-test", "8"),
        *("--grid", "learning_rate=0.1,1", "gamma=1,2", "batch_size=8"),
    ],
    "plot": ["store"],
    "tune": [*NET, "--max-steps", "2"],
    "schema": ["analyze"],
}
"""Short work for every command, which the random lines change."""

NUMBERS = [
    *("", " ", "-", "--", "-1", "0", "1", "3", "0.5", "-0.0", "nan", "inf", "-inf", "1e999"),
    *("1e-320", "1e300", "0x10", "1_0", "٣", "true", "None", "[1]", "1,2", "9" * 20, "9" * 5000),
    *("1000000000000", "-1000000000000", "-99999999999999999999"),
]
TEXTS = [
    *("", " ", ".", "..", "/", "-", "--", "-h", "é", "\udcff", "\x00", "\x1b[31m", "a" * 300),
    *("%s%n", "$(x)", "a\nb", "s3://bucket/x", "file:///x", "relu", "none", "batch", "gamma"),
]
PATHS = [
    *TEXTS,
    *("folder", "file", "fifo", "binary", "net.json", "store", "no/such", "/dev/zero"),
    *("/dev/full", "/proc/self/mem", "x.pdf", "x.png", "x.nc", "x.json", "run-0.5", "folder.png"),
]
GRIDS = [
    f"{name}{equals}{value}"
    for name in ("learning_rate", "gamma", "seed", "batch_size", "depth", "width", "momentum", "x")
    for equals in ("=", "")
    for value in (*NUMBERS, "1:2:3", "1:2", "0:1:3", "-1:1:3", "1:inf:2", "1:2:0", "2:1:2", "1,1")
]
RANGES = ["1:2:3", "2:1:3", "1:1:3", "1:2:-3", "1:2:1e3", ":::", "nan:1:3", "0:inf:3", "-1:1:3"]
RANGES += [f"1:2:{'9' * 12}", f"1:2:{'9' * 30}", "0:1e-320:3", "1:2:3:4"]
HOSTILE = {
    "grid": GRIDS,
    "spec": PATHS,
    "output": PATHS,
    "save": PATHS,
    "data-dir": PATHS,
    "activation": TEXTS,
    "norms": TEXTS,
    "over": [*TEXTS, "beta", "weight_var", "bias_var"],
    "data": ["digits", "mnist", "cifar10", *TEXTS],
    "net": ["cnn", "resnet", *TEXTS],
    "coordinator": ["", "nowhere", "localhost", "localhost:x", "localhost:-1"],
}
"""Values by option; those of all others are numbers, and ranges for phase."""

TOO_LONG = ("distributed", "coordinator")
"""Options that wait for other processes."""

COMMAND_HELP: dict[str, str] = {}
LOG = os.environ.get("MEANFIELD_JAX_FUZZ_LOG")
"""A file to which every line is written with its status and seconds."""


def options_of(command: str) -> list[str]:
    """The long options that --help of a command names."""
    return sorted(set(re.findall(r"--([a-z][a-z-]+)", COMMAND_HELP[command])))


def line_of(number: int) -> list[str]:
    """The command line with this number."""
    draw = random.Random(number)
    command = draw.choice(list(SMALL))
    line = [command, *SMALL[command]]
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        kind = draw.random()
        if kind < 0.75:
            option = draw.choice(options_of(command))
            if option in TOO_LONG:
                continue
            values = HOSTILE.get(option, NUMBERS)
            if command == "phase" and option.endswith("var"):
                values = RANGES
            line += [f"--{option}", *draw.choices(values, k=draw.choice([1, 1, 1, 1, 0, 2]))]
        elif kind < 0.85:
            line[draw.randrange(len(line))] = draw.choice([*PATHS, *NUMBERS])
        elif kind < 0.92:
            del line[draw.randrange(len(line))]
        else:
            line.insert(draw.randrange(len(line) + 1), draw.choice([*PATHS, *NUMBERS, *GRIDS]))
    return line + ["--json"] * (draw.random() < 0.5)


@pytest.fixture
def folder(tmp_path, monkeypatch, capfd):
    """A working directory with files of all kinds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEANFIELD_JAX_DATA", str(tmp_path / "folder"))
    # a download would need the network, and its failure takes minutes
    monkeypatch.setattr("pooch.retrieve", unreachable)
    for name in ("folder", "folder.png"):
        Path(name).mkdir()
    Path("file").write_text("{}")
    Path("binary").write_bytes(bytes(range(256)))
    Path("net.json").write_text(mf.mlp([8], inputs=784, outputs=10, norm=mf.BatchNorm()).to_json())
    os.mkfifo("fifo")
    sweep = [argument.replace("new", "store") for argument in SMALL["sweep"]]
    assert main(["sweep", *sweep, "--json"]) == 0
    parsed("sweep", capfd.readouterr().out)
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        COMMAND_HELP[command] = capfd.readouterr().out
    return tmp_path


def unreachable(*_args, **_options):
    raise OSError("the network is unreachable")


def tree(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


FEWEST = 40
"""Command lines that are tried on a machine of any speed."""


def check(line: list[str], status: int, out: str, err: str, made: set[str]) -> None:
    """What holds of every command line."""
    shown = f"{line}\nstatus {status}\n{err}"
    assert status in (0, 1, 2), shown
    assert "Traceback" not in err, shown
    assert "a fault of the program" not in err, shown
    if status == 0:
        if "--json" in line and not {"-h", "--help"} & set(line):
            json.loads(out) if line[0] == "schema" else parsed(line[0], out)
        return
    *before, last = err.splitlines()
    assert last.startswith("meanfield-jax: "), shown
    if status == 2:
        assert not "".join(before).strip(), shown
        assert out == "", shown
        assert not made, f"{shown}\nleft {made}"


# Python's own warnings are off in the program, see meanfield_jax.cli.start
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_command_line_is_refused_in_one_line_or_right(folder, capfd):
    deadline = time.monotonic() + SECONDS
    counts = dict.fromkeys((0, 1, 2), 0)
    there, faults = tree(folder), []
    for number in itertools.count():
        if number >= FEWEST and time.monotonic() > deadline:
            break
        line = line_of(number)
        start = time.monotonic()
        status = main(line)
        out, err = capfd.readouterr()
        try:
            check(line, status, out, err, tree(folder) - there)
        except (AssertionError, jsonschema.ValidationError) as error:
            faults.append(f"line {number}: {error}")
        counts[status] += 1
        if LOG:
            with open(LOG, "a") as log:
                seconds = time.monotonic() - start
                log.write(f"{number} {seconds:.1f} s, {status}: {line!r:.300} {err[-200:]!r}\n")
        for path in sorted(tree(folder) - there, reverse=True):
            Path(path).rmdir() if Path(path).is_dir() else Path(path).unlink()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{sum(counts.values())} command lines by status: {counts}, peak {peak:.2f} GiB")
    assert not faults, "\n\n".join(faults[:20])
    assert counts[2] > FEWEST / 2
