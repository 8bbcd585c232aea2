"""A pytest plugin that ends a run of `test_transformers_mixins.py` with a table of outcomes per class."""

from collections import Counter


MODULE = "test_transformers_mixins.py::"
OUTCOMES = ("passed", "failed", "xfailed", "skipped")


def pytest_terminal_summary(terminalreporter):
    tests = {}
    for outcome in OUTCOMES:
        for report in terminalreporter.stats.get(outcome, ()):
            if MODULE in report.nodeid:
                tests[report.nodeid] = outcome
    counts = {}
    for nodeid, outcome in tests.items():
        counts.setdefault(nodeid.split("::")[1], Counter())[outcome] += 1
    if counts:
        terminalreporter.section("transformers' own tests")
        terminalreporter.write_line(f"{'':24}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES))
        for name, counter in counts.items():
            terminalreporter.write_line(f"{name:24}" + "".join(f"{counter[outcome]:9}" for outcome in OUTCOMES))
