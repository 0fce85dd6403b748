import gc
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

# Side by side (`pytest -n 2`) every process has its share of the cores; set before torch is imported, and handed on to
# the processes that tests start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import pytest
from _pytest.capture import EncodedFile

# Imported where they are used: the process that only hands tests out to others does not need PyTorch.
if TYPE_CHECKING:
    from loragen_agents.models.language_models import LanguageModel

INTEGRATION = Path(__file__).parent / "integration"


def keep_open(stream: TextIO) -> None:
    """Keep the file that pytest captures output with open to the end.

    Closed by a test, or by something that it leaves behind, it fails every later test and says nothing of the one that
    did it. absl's log handler does so, which some libraries import: uvicorn closes all handlers when it sets up
    logging, and absl's then closes the stream that was stderr when it was made, unless that is stderr still. So closing
    does nothing but warn, with the stack of whoever wanted to.
    """

    def close() -> None:
        if sys._getframe(1).f_globals["__name__"] != "_pytest.capture":
            by = "".join(traceback.format_stack(limit=8))
            warnings.warn(f"would close pytest's {stream.name}:\n{by}", stacklevel=2)

    for part in (stream, stream.buffer):
        part.close = close  # type: ignore[method-assign]


for captured in (sys.stdout, sys.stderr):
    if isinstance(captured, EncodedFile):
        keep_open(captured)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if INTEGRATION in item.path.parents:
            item.add_marker(pytest.mark.integration)


def pytest_collection_finish() -> None:
    """Leave what imports have made out of garbage collections: going through it takes a fifth of the tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def embedded_model() -> "LanguageModel":
    """The default model; fetched and converted into the user's cache folder the first time."""
    from loragen_agents.models.language_models import load_language_model

    return load_language_model()
