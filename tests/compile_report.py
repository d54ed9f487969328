"""A pytest plugin: how many programs XLA compiled for each test, and how long that took.

``pytest --compile-report`` prints one table at the end; ``--compile-report-file FILE`` writes the
numbers of every test as JSON, too.
"""

import json
from collections import defaultdict
from pathlib import Path

import jax

COMPILING = {
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
}
PROGRAM = "/jax/core/compile/backend_compile_duration"
LOADED = "/jax/compilation_cache/cache_hits"
SLOWEST = 25

counts = {"programs": 0, "loaded": 0, "compile_seconds": 0.0}


def count_duration(event, seconds, **_):
    """Adds what JAX reports about one trace, one lowering or one compilation."""
    if event in COMPILING:
        counts["compile_seconds"] += seconds
        counts["programs"] += event == PROGRAM


def count_event(event, **_):
    """Counts the programs that the persistent cache had."""
    counts["loaded"] += event == LOADED


def pytest_addoption(parser):
    """The two options."""
    group = parser.getgroup("compile report")
    group.addoption("--compile-report", action="store_true", help="print what XLA compiled")
    group.addoption("--compile-report-file", metavar="FILE", help="write it as JSON, by test")


def pytest_configure(config):
    """Listens in the process that runs the tests; collects in the one that prints."""
    if config.option.compile_report or config.option.compile_report_file:
        config.pluginmanager.register(Report(config), "compile-report-collector")


class Report:
    """Counts while tests run, and prints."""

    def __init__(self, config):
        self.config = config
        self.before = dict(counts)
        self.tests = defaultdict(lambda: {"seconds": 0.0, **dict.fromkeys(counts, 0)})
        jax.monitoring.register_event_duration_secs_listener(count_duration)
        jax.monitoring.register_event_listener(count_event)

    def pytest_runtest_logreport(self, report):
        """Adds one phase (set-up, call, teardown) of one test.

        The counts travel from the workers of pytest-xdist to the printing process as a property of
        the report.
        """
        row = self.tests[report.nodeid]
        row["seconds"] += report.duration
        for name, value in dict(report.user_properties).get("compile", {}).items():
            row[name] += value

    def pytest_runtest_makereport(self, item, call):
        """Attaches what this phase compiled to the report that is about to be made."""
        now = dict(counts)
        phase = {name: now[name] - self.before[name] for name in now}
        self.before = now
        others = [pair for pair in item.user_properties if pair[0] != "compile"]
        item.user_properties = [*others, ("compile", phase)]

    def pytest_terminal_summary(self, terminalreporter):
        """One table: the whole run, the files, the tests that took longest."""
        options = self.config.option
        if options.compile_report_file:
            Path(options.compile_report_file).write_text(json.dumps(self.tests, indent=1))
        if not options.compile_report:
            return
        files = defaultdict(lambda: {"seconds": 0.0, **dict.fromkeys(counts, 0)})
        for node, row in self.tests.items():
            for key in (node.partition("::")[0], "all"):
                for name, value in row.items():
                    files[key][name] += value
        write = terminalreporter.write_line
        terminalreporter.section("compiled programs")
        write(f"{'seconds':>9} {'compiling':>9} {'programs':>8} {'of a cache':>10}")
        for rows, most in ((files, len(files)), (self.tests, SLOWEST)):
            ordered = sorted(rows.items(), key=lambda item: -item[1]["seconds"])
            for key, row in ordered[:most]:
                write(
                    f"{row['seconds']:9.1f} {row['compile_seconds']:9.1f} "
                    f"{row['programs']:8d} {row['loaded']:10d}  {key}"
                )
