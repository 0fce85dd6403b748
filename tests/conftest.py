import os
from pathlib import Path

# Side by side (`pytest -n 2`) every process has its share of the cores; set before torch is imported, and handed on to
# the processes that tests start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import pytest

from loragen_agents.models.language_models import LanguageModel, load_language_model

INTEGRATION = Path(__file__).parent / "integration"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if INTEGRATION in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def embedded_model() -> LanguageModel:
    """The default model; fetched and converted into the user's cache folder the first time."""
    return load_language_model()
