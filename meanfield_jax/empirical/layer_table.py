"""The Fisher matrix layer by layer: parameters, largest eigenvalue and trace of each block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array
from rich.console import Console
from rich.progress import track

from meanfield_jax.arguments import as_given, checked
from meanfield_jax.empirical.fisher import FisherOperator
from meanfield_jax.empirical.lanczos import top_eigenvalues
from meanfield_jax.empirical.trace import check_probes, trace
from meanfield_jax.errors import SpecError, problem

if TYPE_CHECKING:
    import xarray as xr


@checked(op=as_given)
def layer_table(
    op: FisherOperator,
    *,
    tol: float = 1e-3,
    num_probes: int = 10,
    key: Array | None = None,
    progress: bool = False,
) -> xr.Dataset:
    """Size, largest eigenvalue and trace of every layer's block of the Fisher matrix.

    Args:
        op: The operator; for a block, only the layers in it are listed.
        tol: Tolerance of every largest eigenvalue, see :func:`top_eigenvalues`.
        num_probes: Number of probes for every trace, see :func:`trace`.
        key: Random key; default ``jax.random.key(0)``.
        progress: Whether to show on stderr how many layers are done.

    Returns:
        A dataset over ``layer`` (the parameters' paths without their last name): ``parameters``
        (their number), ``lambda_max`` and ``lambda_max_error`` (its error bound), ``trace`` and
        ``trace_error`` (its standard error), and ``fraction``, the trace as a fraction of the sum
        of all traces, which is the trace of F.

    Raises:
        SpecError: see :func:`top_eigenvalues` and :func:`trace`.
        RuntimeError: if a search failed, for example because parameters are NaN.

    Accuracy:
        That of the two functions. lambda_max of F is at least that of the largest block and at most
        the sum over all blocks.

    Example:
        >>> import jax, meanfield_jax as mf
        >>> from flax import nnx
        >>> net = mf.mlp([64], inputs=8, outputs=3, norm=mf.BatchNorm())
        >>> x = jax.random.normal(jax.random.key(0), (100, 8))
        >>> table = mf.layer_table(mf.fisher_operator(mf.build(net, rngs=nnx.Rngs(0)), x))
        >>> table.layer.values.tolist(), table.parameters.values.tolist()
        (['layers/0', 'layers/1', 'layers/3'], [576, 128, 195])
    """
    import xarray as xr

    if not isinstance(op, FisherOperator):
        remedy = "pass mf.fisher_operator(model, x) or mf.FisherOperator(apply, params, x)"
        raise problem(SpecError, "op", type(op).__name__, "must be a FisherOperator", remedy)
    check_probes(num_probes)
    sizes: dict[str, int] = {}
    for path, leaf in zip(op.paths, jax.tree.leaves(op.params), strict=True):
        if op.mask is not None and not op.mask[path]:
            continue
        layer = path.rpartition("/")[0] or path
        sizes[layer] = sizes.get(layer, 0) + leaf.size
    console = Console(stderr=True)
    rows = [
        _row(op.block(layer), tol, num_probes, key)
        for layer in track(sizes, "Layers", console=console, disable=not progress, transient=True)
    ]
    data: dict[str, Any] = {
        name: ("layer", np.array([row[name] for row in rows])) for name in rows[0]
    }
    data["parameters"] = ("layer", np.array(list(sizes.values())))
    dataset = xr.Dataset(data, dict(layer=list(sizes)))
    dataset["fraction"] = dataset.trace / dataset.trace.sum()
    return dataset


def _row(block: FisherOperator, tol: float, num_probes: int, key: Array | None) -> dict[str, float]:
    top = top_eigenvalues(block, tol=tol, key=key).raise_if_failed()
    total = trace(block, num_probes=num_probes, key=key).raise_if_failed()
    return dict(
        lambda_max=float(top.eigenvalues[0]),
        lambda_max_error=float(top.error_bounds[0]),
        trace=float(total.value),
        trace_error=float(total.standard_error),
    )
