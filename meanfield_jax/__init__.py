"""Differentiable mean-field theory of neural networks, checked against real networks.

A network is specified as data. One pass over the specification gives the theory, the same
specification builds the Flax network, and measurements show whether the two agree. The names below
are listed in this order::

    spec      Network, mlp, cnn, preact_resnet and the layers
    theory    analyze -> Theory (order_parameters, fisher, eta_max);
              fixed_point, phase_diagram, batch_growth: infinitely many blocks
    network   build, functional, calibrate
    measure   fisher_operator, FisherOperator -> top_eigenvalues, spectral_density, trace,
              layer_table;
              diagnostics: activations, gradients and statistics inside a model
    compare   validate, measured_boundary, plot_validation, plot_spectrum; data.load for inputs;
              compare, plot_comparison: one network with each of the normalization layers
    use       learning_rate: the learning rate of a specification or of any model;
              stability_limit: learning rate times curvature for any linear rule of optax;
              train: many runs at once, over scales, learning rates and seeds;
              sweep, load_sweep, plot_sweep, sweep_page: a grid of runs on any number of devices, in
              a store;
              tune, objectives, plot_tuning: gradient descent on the theory over gamma, beta, ...
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meanfield_jax.api import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Returns a module or a public name; the first public name imports JAX and the whole library.

    So the command line runs, and answers Ctrl-C, before that import and during it.
    """
    whole = f"{__name__}.{name}"
    if importlib.util.find_spec(whole) is not None:
        return importlib.import_module(whole)
    api = importlib.import_module(f"{__name__}.api")
    if not hasattr(api, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(api, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
