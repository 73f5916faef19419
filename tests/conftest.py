"Where tests find what is not in the repository; they are skipped, visibly, where it is missing."
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def outside(variable, default):
    path = Path(os.environ.get(variable, ROOT.parent / "shared" / default))
    if not path.is_dir(): pytest.skip(f"no folder {path}; set {variable}")
    return path


@pytest.fixture(scope="session")
def golden():
    "Inputs and outputs of the original implementation."
    return outside("FUSELIP_GOLDEN", "golden")


@pytest.fixture(scope="session")
def data():
    "Small real data sets."
    return outside("FUSELIP_DATA", "data")


@pytest.fixture(scope="session")
def root():
    "The repository."
    return ROOT
