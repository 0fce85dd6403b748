from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# The models here are tiny, and tests run side by side (`pytest -n`): more threads would only wait for each other.
torch.set_num_threads(1)
# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


# Most tests run one of a few models with equal weights, and compiling a graph takes longer than running it.
_COMPILED: dict[str, object] = {}


@pytest.fixture(autouse=True)
def nothing_is_fetched(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Unit tests have an empty cache folder, and a pip that has no index."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LORAGEN_AGENTS_CACHE", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture(scope="module", autouse=True)
def on_torch() -> Iterator[None]:
    """Unit tests compare exact numbers of tiny models, which int8 would change, and take less time than compiling one.

    Those of the runtimes themselves take `runtime`, or choose one; integration tests run on the default.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAGEN_AGENTS_RUNTIME", "torch")
        yield


@pytest.fixture(params=["torch", "openvino"])
def runtime(request: pytest.FixtureRequest, on_torch: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on each runtime; on OpenVINO with matrices in float32, so that results are equal."""
    if request.param == "openvino":
        pytest.importorskip("openvino")
        from loragen_agents.edge.openvino import compiled

        monkeypatch.setattr(compiled, "_compiled", _COMPILED)
    monkeypatch.setenv("LORAGEN_AGENTS_RUNTIME", request.param)
    monkeypatch.setenv("LORAGEN_AGENTS_QUANTISATION", "none")
    return str(request.param)
