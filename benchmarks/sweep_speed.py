"""Runs per second of a sweep, and its memory, beside the same runs one after another.

A grid of learning rates and seeds, Gaussian inputs and random labels, squared loss, heavy ball, no
evaluation. ``mf.sweep`` is timed whole: its theory, its store in memory and its results are in it;
the row of the theory says what share that is. Beside it ``mf.train`` called cell by cell, a step
written by hand with Flax NNX and optax and jitted once, and PyTorch. The first call, compilation
included, is kept apart. Then the memory of a cell and virtual CPU devices. All is measured on the
CPU; gpu.py measures a GPU.

Run: ``python sweep_speed.py [--cases "FC 784-100x3-10"] [--parts peers memory devices]
[--rounds 3] [--quick]``. The exit status is 1 when a claim is false; with ``--quick`` that says
nothing about speed. About 8 minutes on 2 quiet cores.
"""

import argparse
import dataclasses
import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from common import Claim, Peer, compare, console, environment, worker, write_rows
from summary import Rows, claims_table, number

PARTS = ("peers", "memory", "devices")
SWEEP, THEORY = "mf.sweep", "its theory alone"
TRAIN, FLAX = "mf.train, one by one", "Flax NNX and optax by hand, one by one"
TORCH = "PyTorch, one by one"
SAME, ROUGH = 1e-3, 0.5
"""How far mean final losses may differ; the peers by hand draw other networks from two seeds."""

INPUTS, OUTPUTS = 784, 10
WEIGHT_VAR, BIAS_VAR, MOMENTUM, SEEDS = 2.0, 0.5, 0.9, 2
CHUNKS, QUICK_CHUNKS = (8, 40), (2, 6)
DEVICES, QUICK_DEVICES = (1, 2, 4, 8), (1, 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """A network with BatchNorm, and the runs it is trained in.

    Attributes:
        widths: Of the hidden layers.
        cells: Runs of the sweep.
        num_samples: n.
        batch_size: Samples of a step.
        epochs: Passes over the data.
    """

    widths: tuple[int, ...]
    cells: int = 32
    num_samples: int = 1000
    batch_size: int = 100
    epochs: int = 2

    @property
    def steps(self) -> int:
        """Of one run."""
        return self.epochs * (self.num_samples // self.batch_size)

    @property
    def rates(self) -> np.ndarray:
        """Learning rates; together with the seeds they are the cells."""
        return np.geomspace(1e-4, 1e-2, max(1, self.cells // SEEDS))

    @property
    def seeds(self) -> range:
        """Seeds of the draw and of the order of the samples."""
        return range(min(SEEDS, self.cells))

    def samples(self) -> tuple[np.ndarray, np.ndarray]:
        """Standard normal inputs and random labels."""
        rng = np.random.default_rng(0)
        shape = (self.num_samples, INPUTS)
        return rng.standard_normal(shape, np.float32), rng.integers(0, OUTPUTS, self.num_samples)

    def orders(self, seed: int) -> list[np.ndarray]:
        """The samples of each step of a run, for the peers by hand."""
        rng = np.random.default_rng(seed)
        per_epoch = self.num_samples // self.batch_size
        orders = [rng.permutation(self.num_samples) for _ in range(self.epochs)]
        rows = [order[: per_epoch * self.batch_size] for order in orders]
        return list(np.concatenate(rows).reshape(self.steps, self.batch_size))


NARROW, WIDE = "FC 784-100x3-10", "FC 784-300x3-10"
CASES = {NARROW: Case((100,) * 3), WIDE: Case((300,) * 3)}


def case_of(name: str, quick: bool, **changes: Any) -> Case:
    """The case, or as little of it as runs."""
    case = CASES[name]
    if quick:
        case = dataclasses.replace(case, cells=4, num_samples=60, batch_size=20)
    return dataclasses.replace(case, **changes)


def use_cpu(devices: int = 1) -> None:
    """For a worker that has not imported JAX yet."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"


def network(case: Case) -> Any:
    """The specification."""
    import meanfield_jax as mf

    variances = dict(weight_var=WEIGHT_VAR, bias_var=BIAS_VAR)
    return mf.mlp(case.widths, inputs=INPUTS, outputs=OUTPUTS, norm=mf.BatchNorm(), **variances)


def answer(final: Any, cells: int) -> dict[str, Any]:
    """What every peer returns: the mean over cells of the last epoch's loss."""
    final = np.asarray(final)
    assert final.size == cells, (final.shape, cells)
    return dict(cells=cells, answer=float(np.mean(final, dtype=np.float64)))


def sweep(
    case: str,
    quick: bool,
    devices: int = 1,
    chunk_cells: int | None = None,
    **changes: Any,
) -> Callable[[], dict[str, Any]]:
    """The package's sweep, its theory included."""
    use_cpu(devices)
    import meanfield_jax as mf

    at = case_of(case, quick, **changes)
    net, data = network(at), at.samples()
    grid = dict(gamma=[1.0], learning_rate=at.rates, seed=at.seeds, batch_size=at.batch_size)

    def solve() -> dict[str, Any]:
        result = mf.sweep(net, data, grid, epochs=at.epochs, chunk_cells=chunk_cells)
        return dict(
            answer(result.loss.isel(epoch=-1), at.cells),
            diverged=int((result.diverged_at >= 0).sum()),
            eta_max_batch=result.eta_max_batch.item(),
        )

    return solve


def theory(case: str, quick: bool) -> Callable[[], dict[str, Any]]:
    """What a sweep of this grid predicts: three statistics of one batch."""
    use_cpu()
    import jax.numpy as jnp

    import meanfield_jax as mf

    at = case_of(case, quick)
    net, x = network(at), jnp.asarray(at.samples()[0][: at.batch_size])

    def solve() -> dict[str, Any]:
        for kind in ("batch", "frozen", "wei2019"):
            float(mf.analyze(net, data=x, statistics=kind).eta_max(MOMENTUM))
        return {}

    return solve


def train(case: str, quick: bool) -> Callable[[], dict[str, Any]]:
    """The package's function of one run; only its first call compiles."""
    use_cpu()
    import meanfield_jax as mf

    at = case_of(case, quick)
    net, data = network(at), at.samples()
    options = dict(gamma=1.0, epochs=at.epochs, batch_size=at.batch_size)

    def run(rate: float, seed: int) -> float:
        result = mf.train(net, data, learning_rate=rate, seed=seed, **options)
        return float(result.loss[-1])

    return partial(one_by_one, at, run)


def one_by_one(case: Case, run: Callable[[float, int], float]) -> dict[str, Any]:
    """All cells, each after the one before it."""
    return answer(
        [run(float(rate), seed) for rate in case.rates for seed in case.seeds], case.cells
    )


def flax_network(case: Case, seed: Any) -> Any:
    """The network from Flax's own layers, drawn as the package draws it."""
    import jax
    from flax import nnx

    rngs = nnx.Rngs(jax.random.key(seed))
    draws = dict(
        kernel_init=nnx.initializers.variance_scaling(WEIGHT_VAR, "fan_in", "normal"),
        bias_init=nnx.initializers.normal(math.sqrt(BIAS_VAR)),
        rngs=rngs,
    )
    layers = []
    for fan_in, width in itertools.pairwise((INPUTS, *case.widths)):
        layers += [nnx.Linear(fan_in, width, **draws), nnx.BatchNorm(width, rngs=rngs), nnx.relu]
    return nnx.Sequential(*layers, nnx.Linear(case.widths[-1], OUTPUTS, **draws))


def flax_by_hand(case: str, quick: bool) -> Callable[[], dict[str, Any]]:
    """Draw and step jitted once for all cells, the loop over steps in Python."""
    use_cpu()
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    at = case_of(case, quick)
    x, labels = map(jnp.asarray, at.samples())
    y = jax.nn.one_hot(labels, OUTPUTS)
    graphdef, _, _ = nnx.split(nnx.eval_shape(lambda: flax_network(at, 0)), nnx.Param, nnx.Variable)

    @jax.jit
    def draw(seed):
        _, params, rest = nnx.split(flax_network(at, seed), nnx.Param, nnx.Variable)
        return params, rest, optax.sgd(0.0, MOMENTUM).init(params)

    @jax.jit
    def step(params, rest, memory, rate, x, y, rows):
        def objective(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            loss = jnp.sum((model(x[rows]) - y[rows]) ** 2) / (2 * len(rows))
            return loss, nnx.split(model, nnx.Param, nnx.Variable)[2]

        (loss, rest), slope = jax.value_and_grad(objective, has_aux=True)(params)
        updates, memory = optax.sgd(rate, MOMENTUM).update(slope, memory)
        return optax.apply_updates(params, updates), rest, memory, loss

    def run(rate: float, seed: int) -> float:
        params, rest, memory = draw(seed)
        losses = []
        for rows in at.orders(seed):
            params, rest, memory, loss = step(params, rest, memory, rate, x, y, rows)
            losses.append(loss)
        return mean_of_last_epoch(at, losses)

    return partial(one_by_one, at, run)


def mean_of_last_epoch(case: Case, losses: Sequence[Any]) -> float:
    """Read at the end of a run, so that no step waits for its loss."""
    return float(np.mean([float(loss) for loss in losses[-(case.steps // case.epochs) :]]))


def torch_network(case: Case, seed: int) -> Any:
    """The same network in PyTorch, drawn alike."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    layers = []
    for fan_in, width in itertools.pairwise((INPUTS, *case.widths)):
        layers += [nn.Linear(fan_in, width), nn.BatchNorm1d(width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(case.widths[-1], OUTPUTS))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=math.sqrt(WEIGHT_VAR / layer.in_features))
            nn.init.normal_(layer.bias, std=math.sqrt(BIAS_VAR))
    return model


def torch_by_hand(case: str, quick: bool) -> Callable[[], dict[str, Any]]:
    """PyTorch, one step after another."""
    return torch_one_by_one(case_of(case, quick), "cpu")


def torch_samples(at: Case, device: str) -> tuple[Any, Any]:
    """Inputs and targets."""
    import torch

    x, labels = map(torch.from_numpy, at.samples())
    return x.to(device), torch.nn.functional.one_hot(labels, OUTPUTS).to(device, x.dtype)


def torch_one_by_one(at: Case, device: str) -> Callable[[], dict[str, Any]]:
    """All runs of a case in PyTorch, one step after another."""
    import torch

    x, y = torch_samples(at, device)

    def run(rate: float, seed: int) -> float:
        model = torch_network(at, seed).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM)
        losses = []
        for rows in map(torch.from_numpy, at.orders(seed)):
            optimizer.zero_grad()
            loss = ((model(x[rows]) - y[rows]) ** 2).sum() / (2 * len(rows))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return mean_of_last_epoch(at, losses)

    return partial(one_by_one, at, run)


def memory(case: str, quick: bool, cells: int) -> Callable[[], dict[str, Any]]:
    """A sweep whose cells are one chunk, and what the package reckons with for each."""
    changes = dict(cells=cells, epochs=1)
    solve = sweep(case, quick, chunk_cells=cells, **changes)
    from meanfield_jax.experiments.grid import bytes_of_cell
    from meanfield_jax.experiments.train import recipe_of

    at = case_of(case, quick, **changes)
    recipe = recipe_of(network(at), at.epochs, at.batch_size, "squared", None, True, "float32")
    return lambda: dict(solve(), reckoned=bytes_of_cell(recipe) / 2**20)


def peer_rows(cases: Sequence[str], quick: bool, rounds: int) -> list[dict[str, Any]]:
    """Every network asked for, every way to train it."""
    setups = {
        SWEEP: "sweep",
        TRAIN: "train",
        FLAX: "flax_by_hand",
        TORCH: "torch_by_hand",
        THEORY: "theory",
    }
    rows = []
    for case in cases:
        at = case_of(case, quick)
        console.print(f"{case}, {at.cells} runs of {at.steps} steps")
        peers = [Peer(name, f"sweep_speed:{setup}", timeout=600) for name, setup in setups.items()]
        compare(peers, dict(case=case, quick=quick), rounds)
        truth = peers[0].result.get("answer", math.nan)
        rows += [peer_row(case, peer, truth) for peer in peers]
    return rows


def peer_row(case: str, peer: Peer, truth: float) -> dict[str, Any]:
    """What was measured, with the speed and how far the answer is from the sweep's."""
    row = dict(case=case, **peer.record())
    if "answer" in row:
        row["disagreement"] = abs(row["answer"] / truth - 1)
        if row["warm_seconds"]:
            row["runs_per_second"] = row["cells"] / row["warm_seconds"]
    return row


def memory_rows(cases: Sequence[str], quick: bool) -> list[dict[str, Any]]:
    """Peak of a process with few and with many cells in a chunk; megabytes.

    Memory that compilation leaves free is used by the first cells: what is measured may be a little
    low.
    """
    few, many = QUICK_CHUNKS if quick else CHUNKS
    rows = []
    for case in cases:
        peaks = {}
        for cells in (few, many):
            with worker("sweep_speed:memory", dict(case=case, quick=quick, cells=cells)) as process:
                reckoned = process.run(600)["reckoned"]
                peaks[cells] = process.peak_megabytes()
        measured = (peaks[many] - peaks[few]) / (many - few)
        facts = dict(measured=measured, reckoned=reckoned, ratio=measured / reckoned)
        rows.append(dict(case=case, cells=(few, many), peaks=tuple(peaks.values()), **facts))
    return rows


def device_rows(quick: bool, rounds: int) -> list[dict[str, Any]]:
    """The narrow network over virtual CPU devices."""
    counts = QUICK_DEVICES if quick else DEVICES
    peers = [
        Peer(f"mf.sweep, devices: {count}", "sweep_speed:sweep", dict(devices=count), timeout=600)
        for count in counts
    ]
    compare(peers, dict(case=NARROW, quick=quick), rounds)
    rows = [
        dict(devices=count, **peer_row(NARROW, peer, peers[0].result.get("answer", math.nan)))
        for count, peer in zip(counts, peers, strict=True)
    ]
    return [dict(row, cores=os.cpu_count()) for row in rows]


def measure(
    cases: Sequence[str], parts: Sequence[str], quick: bool, rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """The rows of every part asked for."""
    ways = dict(
        peers=partial(peer_rows, cases, quick, rounds),
        memory=partial(memory_rows, cases, quick),
        devices=partial(device_rows, quick, rounds),
    )
    return {part: ways[part]() for part in parts}


def make_claims(parts: dict[str, list[dict[str, Any]]]) -> list[Claim]:
    """What is claimed of the parts that were measured."""
    claims = []
    for row in parts.get("peers", ()):
        case, name = row["case"], row["name"]
        if case == NARROW and name in (TRAIN, FLAX):
            claims.append(Claim(f"{case}: runs per second over {name}", row["warm_ratio"], 1.0))
        if name in (TRAIN, FLAX, TORCH):
            bound = SAME if name == TRAIN else ROUGH
            text = f"{case}: mean final loss differs from {name} by"
            claims.append(Claim(text, row.get("disagreement"), bound, at_least=False))
    for row in parts.get("memory", ()):
        text = f"{row['case']}: memory of a cell over bytes_of_cell"
        claims.append(Claim(text, row["ratio"], 1.0, at_least=False))
    return claims


def make_tables(parts: dict[str, list[dict[str, Any]]]) -> list[Rows]:
    """One table for each network and for each other part that has rows."""
    peers = parts.get("peers", [])
    tables = [peers_table(case, [row for row in peers if row["case"] == case]) for case in CASES]
    tables += [
        memory_table(parts.get("memory", [])),
        devices_table(parts.get("devices", [])),
    ]
    return [table for table in tables if table.rows]


def peers_table(case: str, rows: list[dict[str, Any]]) -> Rows:
    """Speeds of one network."""
    columns = (
        *("", "runs per second", "seconds over the sweep's", "first call, s", "a warm one, s"),
        *("mean final loss", "differs by"),
    )
    lines = [
        [
            row["name"],
            number(row.get("runs_per_second"), ".3g"),
            number(1.0 if row["name"] == SWEEP else row["warm_ratio"], ".2f"),
            number(row["cold_seconds"], ".1f"),
            number(row["warm_seconds"], ".2f"),
            row["failure"] or number(row.get("answer"), ".4f"),
            number(row.get("disagreement"), ".1e"),
        ]
        for row in rows
    ]
    cells = next((row["cells"] for row in rows if "cells" in row), 0)
    return Rows(f"{case}, {cells} runs", columns, lines)


def memory_table(rows: list[dict[str, Any]]) -> Rows:
    """Megabytes of a cell."""
    few, many = rows[0]["cells"] if rows else CHUNKS
    columns = (
        *("", f"peak MB, {few} cells", f"peak MB, {many} cells"),
        *("MB of a cell", "bytes_of_cell, MB", "ratio"),
    )
    lines = [
        [
            row["case"],
            *(f"{peak:.0f}" for peak in row["peaks"]),
            *(f"{row[name]:.2f}" for name in ("measured", "reckoned", "ratio")),
        ]
        for row in rows
    ]
    return Rows("Memory of a cell", columns, lines)


def devices_table(rows: list[dict[str, Any]]) -> Rows:
    """Speeds over virtual devices."""
    lines = [
        [
            str(row["devices"]),
            number(row.get("runs_per_second"), ".3g"),
            number(1.0 if row is rows[0] else row["warm_ratio"], ".2f"),
            row["failure"] or number(row["cold_seconds"], ".1f"),
        ]
        for row in rows
    ]
    columns = ("devices", "runs per second", "seconds over one device's", "first call, s")
    title = f"{NARROW}: virtual CPU devices on {os.cpu_count()} cores"
    return Rows(title, columns, lines)


def machine() -> str:
    """Where the numbers come from, in a line."""
    facts = environment()
    loads = "/".join(map(str, facts["load_average"]))
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("jax", "flax", "torch"))
    return f"{facts['cpu']}, {facts['cores']} cores, load {loads}; {versions}."


def main() -> int:
    """Measures, writes results/sweep_speed.json, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=[NARROW, WIDE])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=3, help="warm calls of each peer")
    parser.add_argument("--quick", action="store_true", help="tiny, in a record of its own")
    options = parser.parse_args()
    parts = measure(options.cases, options.parts, options.quick, options.rounds)
    claims = make_claims(parts)
    verdicts = dict(claims=[claim.record() for claim in claims])
    others = {name: rows for name, rows in parts.items() if name != "peers"}
    name = "sweep_speed_quick" if options.quick else "sweep_speed"
    write_rows(name, parts.get("peers", []), **verdicts, **others)
    print(machine(), "\n")
    for table in (*make_tables(parts), claims_table(verdicts)):
        print(table.markdown())
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
