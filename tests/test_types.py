"""Type hints of the public API, as a program of a user's has them checked."""

from pathlib import Path

import pytest


@pytest.mark.slow  # `make lint` checks this program with all else
def test_a_strictly_typed_program_can_use_the_package():
    mypy = pytest.importorskip("mypy.api")
    root = Path(__file__).parent.parent
    options = [f"--config-file={root / 'pyproject.toml'}", f"--cache-dir={root / '.mypy_cache'}"]  # of `make lint`
    report, errors, code = mypy.run([*options, str(root / "tests" / "typed_usage.py")])
    assert code == 0, report + errors
