"""Fetches and imports the common model tests of the installed transformers.

python tests/helpers/transformers_tests.py

downloads the source distribution of the installed transformers with pip, as the wheel has no tests, and keeps the top
level of its `tests/` in `${XDG_CACHE_HOME:-~/.cache}/madtp_hf/transformers-<version>`, with `parameterized`, which
those tests import.
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


PACKAGE = "transformers_tests"  # `tests` is this package's own
MODULES = ("test_modeling_common", "test_configuration_common")
# What the fetched files import and the source distribution leaves out: only files directly in `tests/` are in it.
ABSENT = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {}
    },  # read for configurations without sub-configurations
}


def cache_folder() -> Path:
    """Where the tests of the installed transformers are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "madtp_hf" / f"transformers-{transformers.__version__}"


def is_fetched() -> bool:
    return (cache_folder() / "tests" / "test_modeling_common.py").is_file()


def fetch() -> Path:
    """Download the tests into the cache, unless they are there; returns the folder."""
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
        warnings.simplefilter("ignore")  # its marks are unknown here
        return tuple(importlib.import_module(f"{PACKAGE}.{name}") for name in MODULES)


if __name__ == "__main__":
    print(fetch())
