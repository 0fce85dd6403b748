"""Which runtime is to run models: what was asked for, and what is the default on this machine.

Whether a runtime can run a certain model is the business of `edge.forward`.
"""

import os
import platform
from importlib.util import find_spec
from typing import Literal, cast, get_args

from loragen_agents.errors import ModelLoadError

RuntimeName = Literal["auto", "openvino", "torch"]

RUNTIME_VARIABLE = "LORAGEN_AGENTS_RUNTIME"


def openvino_is_default() -> bool:
    """Whether OpenVINO runs what it can on this machine's CPU, where nothing else is said.

    Other kinds of CPUs were not measured.
    """
    return platform.machine().lower() in ("x86_64", "amd64") and find_spec("openvino") is not None


def chosen_runtime(chosen: RuntimeName = "auto") -> RuntimeName:
    """The runtime that a choice and LORAGEN_AGENTS_RUNTIME ask for; see `edge.forward.Runtime`.

    Raises:
        ModelLoadError: the runtime is not known, or OpenVINO is asked for by name and not installed.
    """
    name = (os.environ.get(RUNTIME_VARIABLE, "").strip() or "auto") if chosen == "auto" else chosen
    if name not in get_args(RuntimeName):
        raise ModelLoadError(f"there is no runtime {name!r}; expected {', '.join(get_args(RuntimeName))}")
    if name == "openvino" and find_spec("openvino") is None:
        raise ModelLoadError("the runtime is to be openvino, which is not installed; run: pip install openvino")
    return cast(RuntimeName, name)


def torch_runs(device_type: str) -> bool:
    """Whether PyTorch runs models on this kind of device, also those that OpenVINO has a graph for."""
    chosen = chosen_runtime()
    return device_type != "cpu" or chosen == "torch" or (chosen == "auto" and not openvino_is_default())
