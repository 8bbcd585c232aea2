"""Fetch and import the common model tests of the installed transformers.

python tests/helpers/transformers_tests.py

downloads the source distribution of the installed transformers with pip, since the wheel has no tests, and keeps the
top level of its `tests/` in `${XDG_CACHE_HOME:-~/.cache}/madtp_hf/transformers-<version>`, together with
`parameterized`, which those tests import.
"""

import importlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path
from types import ModuleType

import transformers


PACKAGE = "transformers_tests"  # `tests` is the name of this package's own tests
MODULES = ("test_modeling_common", "test_configuration_common")
# Modules that the fetched files import but the source distribution, with only the files directly in `tests/`, lacks.
ABSENT = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {}
    },  # read for configurations without sub-configurations
}


def cache_folder() -> Path:
    """Return the folder that keeps the tests of the installed transformers."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "madtp_hf" / f"transformers-{transformers.__version__}"


def is_fetched() -> bool:
    return (cache_folder() / "tests" / "test_modeling_common.py").is_file()


def fetch() -> Path:
    """Download the tests into the cache unless they are there; return the folder."""
    folder = cache_folder()
    if is_fetched():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        download = Path(temporary) / "download"
        source = f"transformers=={transformers.__version__}"
        subprocess.run(
            [*pip, "download", "--no-deps", "--no-binary", "transformers", "-d", download, source], check=True
        )
        new = Path(temporary) / "new"
        subprocess.run([*pip, "install", "--no-deps", "--target", new / "packages", "parameterized"], check=True)
        (new / "tests").mkdir()
        (new / "tests" / "__init__.py").touch()  # the configuration tests import transformers through it
        with tarfile.open(next(download.glob("transformers-*.tar.gz"))) as archive:
            for member in archive:
                name = re.fullmatch(r"[^/]+/tests/(\w+\.py)", member.name)
                if name and member.isfile():
                    (new / "tests" / name[1]).write_bytes(archive.extractfile(member).read())
        new.rename(folder)
    return folder


def load() -> tuple[ModuleType, ModuleType]:
    """Import `test_modeling_common` and `test_configuration_common` from the cache.

    Raises:
        FileNotFoundError: if they were not fetched.
    """
    folder = cache_folder()
    if not is_fetched():
        raise FileNotFoundError(f"no folder {folder}: fetch transformers' tests with `make test-mixins`")
    packages = str(folder / "packages")
    if packages not in sys.path:
        sys.path.append(packages)
    if PACKAGE not in sys.modules:
        package = sys.modules[PACKAGE] = ModuleType(PACKAGE)
        package.__path__ = [str(folder / "tests")]
        for name, contents in ABSENT.items():
            parent = f"{PACKAGE}.{name.partition('.')[0]}"
            sys.modules[parent] = ModuleType(parent)
            sys.modules[parent].__path__ = []
            sys.modules[f"{PACKAGE}.{name}"] = ModuleType(f"{PACKAGE}.{name}")
            vars(sys.modules[f"{PACKAGE}.{name}"]).update(contents)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their marks are not registered here
        return tuple(importlib.import_module(f"{PACKAGE}.{name}") for name in MODULES)


if __name__ == "__main__":
    print(fetch())
