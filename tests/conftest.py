from pathlib import Path

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
