"""For all tests."""

from pathlib import Path

import hypothesis
import pytest

from minidl.backend import random

# The same examples in every run: a red test stays red, a green one green.
hypothesis.settings.register_profile("minidl", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("minidl")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """tests/oracle needs PyTorch, so it runs only when it is asked for: pytest tests/oracle."""
    if collection_path.name == "oracle" and collection_path.is_dir():
        here = config.invocation_params.dir
        asked = [Path(here, arg.split("::")[0]).resolve() for arg in config.args]
        return not any(path.is_relative_to(collection_path) for path in asked)
    return None


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts with the same random numbers."""
    random.manual_seed(0)
