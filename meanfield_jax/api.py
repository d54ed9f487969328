"""All public names; ``meanfield_jax`` imports this when the first of them is used.

None may be the name of a module of the package, unless it is that module.
"""

from meanfield_jax import data, diagnostics, layers, objectives
from meanfield_jax.empirical.density import SpectralDensity, spectral_density
from meanfield_jax.empirical.draws import DrawnEigenvalues, drawn_eigenvalues
from meanfield_jax.empirical.fisher import FisherOperator
from meanfield_jax.empirical.lanczos import TopEigenvalues, top_eigenvalues
from meanfield_jax.empirical.layer_table import layer_table
from meanfield_jax.empirical.model import build, calibrate, functional
from meanfield_jax.empirical.nnx_model import fisher_operator
from meanfield_jax.empirical.trace import Trace, trace
from meanfield_jax.errors import DataError, SpecError
from meanfield_jax.experiments.boundary import measured_boundary
from meanfield_jax.experiments.compare import compare
from meanfield_jax.experiments.learning_rate import learning_rate
from meanfield_jax.experiments.rate_result import LearningRate
from meanfield_jax.experiments.schedule import Schedule, suggest_schedule
from meanfield_jax.experiments.store import load_sweep
from meanfield_jax.experiments.sweep import sweep
from meanfield_jax.experiments.train import Training, train
from meanfield_jax.experiments.validate import validate
from meanfield_jax.layers import *  # noqa: F403
from meanfield_jax.network import Network
from meanfield_jax.page import sweep_page
from meanfield_jax.plots import (
    plot_comparison,
    plot_phase_diagram,
    plot_spectrum,
    plot_tuning,
    plot_validation,
)
from meanfield_jax.presets import cnn, mlp, preact_resnet
from meanfield_jax.status import Status
from meanfield_jax.sweep_plots import plot_sweep
from meanfield_jax.theory.analyze import Theory, analyze
from meanfield_jax.theory.batch_growth import batch_growth
from meanfield_jax.theory.fixed_point import FixedPoint, fixed_point
from meanfield_jax.theory.learning_rate import eta_max
from meanfield_jax.theory.phase_diagram import phase_diagram
from meanfield_jax.theory.stability import stability_limit
from meanfield_jax.tuning import Tuning, tune

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    *layers.__all__,
    "DataError",
    "DrawnEigenvalues",
    "FisherOperator",
    "FixedPoint",
    "LearningRate",
    "Network",
    "Schedule",
    "SpecError",
    "SpectralDensity",
    "Status",
    "Theory",
    "TopEigenvalues",
    "Trace",
    "Training",
    "Tuning",
    "analyze",
    "batch_growth",
    "build",
    "calibrate",
    "cnn",
    "compare",
    "data",
    "diagnostics",
    "drawn_eigenvalues",
    "eta_max",
    "fisher_operator",
    "fixed_point",
    "functional",
    "layer_table",
    "learning_rate",
    "load_sweep",
    "measured_boundary",
    "mlp",
    "objectives",
    "phase_diagram",
    "plot_comparison",
    "plot_phase_diagram",
    "plot_spectrum",
    "plot_sweep",
    "plot_tuning",
    "plot_validation",
    "preact_resnet",
    "spectral_density",
    "stability_limit",
    "suggest_schedule",
    "sweep",
    "sweep_page",
    "top_eigenvalues",
    "trace",
    "train",
    "tune",
    "validate",
]
