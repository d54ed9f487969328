"""Predicted learning rates against the boundaries of real training, from random starts.

The cases are in rate_cases.py: MLPs of 2 to 30 layers, convolutions and residual networks with
BatchNorm, LayerNorm, GroupNorm, InstanceNorm, ProxyNorm, instance enhancement and none; ReLU, GELU
and tanh; gamma .1 to 4; batches of MNIST and CIFAR-10 images (Fashion-MNIST is not among the data
that come with this repository). Full batch, squared loss on one-hot targets, 200 steps.

``python rates.py --measure`` trains every draw at many rates (hours; what is known is kept, so it
can be stopped) and writes results/rate_boundaries.json: for each case, seed and momentum the
largest rate without a spike (loss above twice the first) and with a bounded loss (1000 times).
``python rates.py`` predicts the rates of each case by ``mf.learning_rate(network, x)``, trains two
more draws at ``no_spike``, and writes results/rates.json. The number in ``theory/rates.py`` was
fitted on the cases with an even number; the claims are about those with an odd one that the result
itself calls within its domain.
"""

import argparse
import json
import sys
import time
from typing import Any

import numpy as np
from common import RESULTS, Claim, console
from flax import nnx
from rate_cases import SPIKE, Case, boundaries, cases, images, runner
from summary import finish

import meanfield_jax as mf

BOUNDARIES = RESULTS / "rate_boundaries.json"
FRESH = 10, 11
"""Seeds of draws that are trained at the predicted rate, other than those of the boundaries."""


def measured(seeds: list[int], momenta: list[float], part: int, parts: int, path: Any) -> None:
    """Appends a line for every case, seed and momentum that is not known yet."""
    lines = path.read_text().splitlines() if path.exists() else []
    known = {(row["case"], row["seed"], row["momentum"]) for row in map(json.loads, lines)}
    for seed in seeds:
        for case in cases()[part::parts]:
            todo = [mu for mu in momenta if (case.name, seed, mu) not in known]
            if not todo:
                continue
            start = time.perf_counter()
            x, y = images(case.data, case.num_samples)
            model = mf.build(case.network, rngs=nnx.Rngs(seed))
            rate = mf.learning_rate(model, x)
            apply, params = mf.functional(model)
            for momentum in todo:
                found = boundaries(
                    runner(apply, x, y, momentum), params, 3.8 / float(rate.lambda_after_norms)
                )
                row = dict(
                    case=case.name,
                    seed=seed,
                    momentum=momentum,
                    lambda_max=float(rate.lambda_max),
                    lambda_after_norms=float(rate.lambda_after_norms),
                    **found,
                )
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            console.print(f"{case.name}, seed {seed}: {time.perf_counter() - start:.0f} s")


def judged(case: Case, number: int, rows: list[dict], verify: bool) -> list[dict]:
    """The predictions for a case beside what was measured, one row for each momentum."""
    x, y = images(case.data, case.num_samples)
    found = []
    for momentum in sorted({row["momentum"] for row in rows}):
        rate = mf.learning_rate(case.network, x, momentum=momentum)
        mine = [row for row in rows if row["momentum"] == momentum]
        spikes = []
        if verify:
            for seed in FRESH:
                apply, params = mf.functional(mf.build(case.network, rngs=nnx.Rngs(seed)))
                spikes.append(runner(apply, x, y, momentum)(params, float(rate.no_spike)))
        found.append(
            dict(
                case=case.name,
                number=number,
                momentum=momentum,
                domain=rate.domain,
                bounded=median_ratio(mine, "bounded", rate.bounded),
                no_spike=[row["no_spike"] / float(rate.no_spike) for row in mine],
                quadratic=median_ratio(mine, "bounded", rate.quadratic),
                after=median_ratio(mine, "lambda_after_norms", rate.lambda_after_norms),
                largest_at_no_spike=spikes,
            )
        )
    return found


def median_ratio(rows: list[dict], name: str, predicted: Any) -> float:
    """Measured over predicted, the median over draws."""
    return float(np.median([row[name] for row in rows]) / float(predicted))


def within(values: np.ndarray, factor: float) -> float:
    """The fraction of values within a factor of 1."""
    return float(np.mean((values < factor) & (values > 1 / factor)))


def claims_of(rows: list[dict]) -> list[Claim]:
    """What the rule promises, judged on the odd cases within the domain."""
    odd = [row for row in rows if row["number"] % 2 and not row["domain"]]
    bounded = np.array([row["bounded"] for row in odd])
    ratios = np.array([ratio for row in odd for ratio in row["no_spike"]])
    fresh = np.array([loss for row in odd for loss in row["largest_at_no_spike"]])
    claims = [
        Claim("bounded, measured / predicted, median", float(np.median(bounded)), 0.9),
        Claim("the same", float(np.median(bounded)), 1.1, at_least=False),
        Claim("bounded within 25 %, fraction of cases", within(bounded, 1.25), 0.9),
        Claim("no_spike at least half of the largest, fraction", float(np.mean(ratios <= 2)), 0.95),
    ]
    if fresh.size:
        spikes = float(np.mean(fresh < SPIKE))
        claims.append(Claim("fresh draws without a spike at no_spike", spikes, 0.95))
    return claims


def main() -> int:
    """Measures or judges."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--momenta", type=float, nargs="+", default=[0.9, 0.0])
    parser.add_argument("--part", type=int, nargs=2, default=[0, 1], metavar=("I", "OF"))
    parser.add_argument("--no-verify", action="store_true", help="train no further draws")
    options = parser.parse_args()
    if options.measure:
        measured(options.seeds, options.momenta, *options.part, BOUNDARIES)
        return 0
    known: dict[str, list[dict]] = {}
    for row in map(json.loads, BOUNDARIES.read_text().splitlines()):
        known.setdefault(row["case"], []).append(row)
    rows = []
    for number, case in enumerate(cases()):
        if case.name in known:
            try:
                rows += judged(case, number, known[case.name], not options.no_verify)
            except (mf.DataError, RuntimeError) as error:
                console.print(f"{case.name}: no prediction: {error}")
            console.print(case.name, end="\r")
    return finish("rates", dict(rows=rows), claims_of(rows))


if __name__ == "__main__":
    sys.exit(main())
