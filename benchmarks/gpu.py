"""How fast a GPU trains many networks: sweeps, measured boundaries, the paper's figure 2, PyTorch.

Sweeps are timed whole, with their theory and their store in memory, as in sweep_speed.py. The first
call of each is kept apart, with the seconds in it that JAX spent on compiling. Every
row has a process of its own, one after the other. Figure 2 is that of reproduce.py at the paper's
scale; without the images its rows say what is missing.

Run: ``python gpu.py [--tiny] [--output FILE] [--data-dir FOLDER]``. It claims nothing, and needs a
GPU, but with ``--tiny`` it runs a little of everything on any machine.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, PeerError, console, environment, median, worker
from sweep_speed import (
    MOMENTUM,
    Case,
    answer,
    network,
    torch_network,
    torch_one_by_one,
    torch_samples,
)

CHUNK = 1024
"""Cells of a chunk; the package's default on a GPU, and what PyTorch's vmap is given at once."""
HOURS = 4 * 3600.0
"""Seconds after which a row is given up."""
COMPILING = tuple(
    f"/jax/core/compile/{part}_duration" for part in ("jaxpr_to_mlir_module", "backend_compile")
)
"""What JAX reports of compiling; tracing is left out, because nested functions count twice."""
FIGURE2 = 3
"""Cases of figure 2."""

SWEEPS = {
    "a chunk, width 100": Case((100,) * 3, cells=CHUNK),
    "sweep, width 100": Case((100,) * 3, cells=4096),
    "sweep, width 1000": Case((1000,) * 3, cells=128),
}
TORCH_ONE_BY_ONE = Case((100,) * 3, cells=8)
BOUNDARY = dict(gammas=16, draws=16, num_steps=200)
TINY = dict(cells=4, num_samples=8, batch_size=2)
"""Batches of two are too small for the theory, most of whose time is compiling."""
TINY_BOUNDARY = dict(gammas=1, draws=2, num_steps=5)
TINY_FIGURE2 = dict(learning_rate=[0.01, 0.1], batch_size=2, width=4)


def counting(call: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Adds to what a call returns the seconds in it of lowering and compiling, without tracing."""
    from jax import monitoring

    spent = []

    def note(name: str, seconds: float, **_: Any) -> None:
        if name in COMPILING:
            spent.append(seconds)

    monitoring.register_event_duration_secs_listener(note)

    def counted() -> dict[str, Any]:
        spent.clear()
        return dict(call(), compile_seconds=sum(spent))

    return counted


def card() -> Callable[[], dict[str, Any]]:
    """Where JAX computes, and the name of the card."""
    import jax

    first = jax.devices()[0]
    facts = dict(backend=first.platform, card=first.device_kind, devices=jax.device_count())
    return lambda: facts


def sweep(case: Case) -> Callable[[], dict[str, Any]]:
    """The package's sweep, its theory included."""
    import meanfield_jax as mf

    net, data = network(case), case.samples()
    grid = dict(gamma=[1.0], learning_rate=case.rates, seed=case.seeds, batch_size=case.batch_size)

    def solve() -> dict[str, Any]:
        result = mf.sweep(net, data, grid, epochs=case.epochs)
        return answer(result.loss.isel(epoch=-1), case.cells)

    return counting(solve)


def boundary(case: Case, gammas: int, draws: int, num_steps: int) -> Callable[[], dict[str, Any]]:
    """The measured boundaries of draws of a network with several scales, and without its norms."""
    import jax

    import meanfield_jax as mf

    net, (x, labels) = network(case), case.samples()
    y = jax.nn.one_hot(labels, net.num_outputs)
    options = dict(gammas=np.geomspace(0.25, 4, gammas).tolist(), draws=draws, num_steps=num_steps)

    def solve() -> dict[str, Any]:
        found = mf.measured_boundary(net, x, y, **options)
        return dict(cells=found.boundary.size, answer=float(found.ratio.median()))

    return counting(solve)


def figure2(index: int, tiny: bool, data_dir: str | None) -> Callable[[], dict[str, Any]]:
    """A case of figure 2 at the paper's scale."""
    from reproduce import cases2

    import meanfield_jax as mf

    case = cases2("small" if tiny else "full")[index]
    if tiny:
        case = dataclasses.replace(case, num_train=8, num_test=8, grid=TINY_FIGURE2)
    data, test = (case.load(split, data_dir) for split in ("train", "test"))

    def solve() -> dict[str, Any]:
        found = mf.sweep(case.network, data, case.grid, test=test, loss=case.loss)
        diverged = int((found.diverged_at >= 0).sum())
        title = case.title(len(data[0]))
        return dict(cells=found.diverged_at.size, diverged=diverged, case=title)

    return counting(solve)


def torch_device() -> str:
    """Where PyTorch computes; in TF32 where it can, as JAX does unless told otherwise."""
    import torch

    torch.set_float32_matmul_precision("high")
    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_alone(case: Case) -> Callable[[], dict[str, Any]]:
    """PyTorch, one run after another."""
    device = torch_device()
    solve = torch_one_by_one(case, device)
    return lambda: dict(solve(), device=device)


def torch_vmapped(case: Case) -> Callable[[], dict[str, Any]]:
    """PyTorch's vmap over runs, whose draws and orders are those of the runs one after another."""
    import torch
    from torch.func import (
        functional_call,
        grad_and_value,
        replace_all_batch_norm_modules_,
        stack_module_state,
        vmap,
    )

    device = torch_device()
    x, y = torch_samples(case, device)
    cells = [(float(rate), seed) for rate in case.rates for seed in case.seeds]
    orders = np.stack([case.orders(seed) for seed in case.seeds])
    orders = torch.from_numpy(orders).to(device)

    def model_of(seed: int) -> torch.nn.Module:
        return replace_all_batch_norm_modules_(torch_network(case, seed)).to(device)

    skeleton = model_of(0)

    def loss(params: dict, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        outputs = functional_call(skeleton, params, (x,))
        return ((outputs - y) ** 2).sum() / (2 * len(x))

    step = vmap(grad_and_value(loss))

    def run(rates: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        drawn, _ = stack_module_state([model_of(seed) for seed in case.seeds])
        params = {name: value.detach()[seeds] for name, value in drawn.items()}
        momenta = {name: torch.zeros_like(value) for name, value in params.items()}
        losses = []
        for t in range(case.steps):
            rows = orders[seeds, t]
            slopes, values = step(params, x[rows], y[rows])
            for name, slope in slopes.items():
                momenta[name] = MOMENTUM * momenta[name] + slope
                scaled = rates.view(-1, *[1] * (slope.ndim - 1)) * momenta[name]
                params[name] = params[name] - scaled
            losses.append(values)
        return torch.stack(losses[-(case.steps // case.epochs) :]).mean(0)

    def solve() -> dict[str, Any]:
        rates, seeds = (torch.tensor(column, device=device) for column in zip(*cells, strict=True))
        rates = rates.to(x.dtype)
        parts = zip(rates.split(CHUNK), seeds.split(CHUNK), strict=True)
        final = torch.cat([run(*part) for part in parts]).cpu().numpy()
        return dict(answer(final, case.cells), device=device)

    return solve


def measured(name: str, setup: str, arguments: dict[str, Any], rounds: int) -> dict[str, Any]:
    """A row: the first call of a fresh process, later calls, and runs per second of those.

    Without later calls it is the first call less compilation that counts.
    """
    console.print(name, highlight=False)
    start = time.monotonic()
    try:
        with worker(f"gpu:{setup}", arguments) as process:
            first = process.run(HOURS)
            warm = [process.run(HOURS)["seconds"] for _ in range(rounds)]
            megabytes = process.peak_megabytes()
    except PeerError as error:
        console.print(f"  {error}", highlight=False, markup=False)
        return dict(name=name, failure=str(error))
    first_seconds, compiling = first.pop("seconds"), first.get("compile_seconds", 0.0)
    seconds = median(warm) or first_seconds - compiling
    speed = first["cells"] / seconds
    spent = time.monotonic() - start
    console.print(f"  {speed:.3g} runs/s, first call {first_seconds:.1f} s, {spent:.0f} s in all")
    return dict(
        name=name,
        runs_per_second=speed,
        first_seconds=first_seconds,
        warm_seconds=warm,
        host_megabytes=megabytes,
        **first,
    )


def measure(tiny: bool, data_dir: str | None) -> list[dict[str, Any]]:
    """All rows, one after the other."""

    def small(case: Case, width: int = 20) -> Case:
        return dataclasses.replace(case, widths=(width,), **TINY) if tiny else case

    rounds = 1 if tiny else 3
    rows = [
        measured(f"mf.sweep: {name}", "sweep", dict(case=small(case)), rounds)
        for name, case in list(SWEEPS.items())[: 1 if tiny else None]
    ]
    case = small(SWEEPS["a chunk, width 100"])
    options = TINY_BOUNDARY if tiny else BOUNDARY
    arguments = dict(case=case, **options)
    rows.append(measured("mf.measured_boundary, width 100", "boundary", arguments, rounds))
    if importlib.util.find_spec("torch"):
        wide = small(SWEEPS["sweep, width 100"])
        vmapped, alone = dict(case=wide), dict(case=small(TORCH_ONE_BY_ONE))
        rows.append(measured("torch.func.vmap, width 100", "torch_vmapped", vmapped, rounds))
        rows.append(measured("PyTorch one by one, width 100", "torch_alone", alone, rounds))
    for index in range(FIGURE2):
        arguments = dict(index=index, tiny=tiny, data_dir=data_dir)
        rows.append(measured(f"figure 2, case {index + 1}", "figure2", arguments, 0))
    return rows


def main() -> int:
    """Measures and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a little of everything, on any device")
    parser.add_argument("--output", type=Path, help="the record [results/gpu.json; tiny: none]")
    parser.add_argument("--data-dir", help="folder with the images [$MEANFIELD_JAX_DATA]")
    options = parser.parse_args()
    if options.tiny:
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    with worker("gpu:card", {}) as process:
        facts = process.run()
    facts.pop("seconds")
    if facts["backend"] != "gpu" and not options.tiny:
        print(f"JAX computes on {facts['card']} here, not on a GPU; use --tiny", file=sys.stderr)
        return 2
    record = dict(environment=environment(), tiny=options.tiny, **facts)
    record["rows"] = measure(options.tiny, options.data_dir)
    text = json.dumps(record, indent=1) + "\n"
    output = options.output or (None if options.tiny else RESULTS / "gpu.json")
    if output is not None:
        output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
