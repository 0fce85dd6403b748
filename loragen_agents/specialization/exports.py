"""A specialisation as files for other runtimes: a PEFT folder, a GGUF adapter, a merged model, or its OpenVINO graph.

Beside the weights lies what a runtime without this package needs: the prompt, a grammar, a Modelfile. None of these
runtimes scores tools; they decode with the weights, and the grammar where they take one.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel

from loragen_agents.adapter.gguf_files import save_gguf
from loragen_agents.conversation.gbnf import tool_gbnf
from loragen_agents.conversation.prompts import PromptRenderer, Turn
from loragen_agents.conversation.react import OBSERVATION_STOP
from loragen_agents.conversation.renderers import shared_renderer
from loragen_agents.errors import CheckpointError
from loragen_agents.models.clone import clone_sharing_tensors
from loragen_agents.models.language_models import LanguageModel, gated_ffn_layers
from loragen_agents.specialization.specialize import Specialization
from loragen_agents.support.files import replacing

ExportFormat = Literal["peft", "gguf", "merged", "openvino"]
FORMATS: tuple[ExportFormat, ...] = ("peft", "gguf", "merged", "openvino")
USAGE_FILE, ADAPTER_FILE, GRAMMAR_FILE, MODELFILE = "loragen-agents.json", "adapter.gguf", "grammar.gbnf", "Modelfile"
GRAPH_FILE = "openvino_model.xml"

_REQUEST = "loragenrequest"


def export(made: Specialization, edge: LanguageModel, folder: str | Path, form: ExportFormat = "peft") -> list[Path]:
    """Write a specialisation for other runtimes.

    Args:
        made: what to write.
        edge: the edge LM that it was made for.
        folder: where the files go; it is made when it is missing.
        form: "peft" (adapter_config.json and adapter_model.safetensors, for peft, vLLM and transformers), "gguf"
            (adapter.gguf with a Modelfile, for llama.cpp and Ollama), "merged" (a model folder that any runtime for
            the edge LM's family loads) or "openvino" (openvino_model.xml and .bin, which OpenVINO runs by itself).

    Returns:
        The files that were written.

    Raises:
        CheckpointError: llama.cpp has no such architecture ("gguf"), or no graph can be written of it ("openvino").
        ValueError: the weights have no entry, and the form has no way to say so.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    write: dict[str, Callable[[Specialization, LanguageModel, Path], list[Path]]] = {
        "peft": _peft,
        "gguf": _gguf,
        "merged": _merged,
        "openvino": _openvino,
    }
    files = write[form](made, edge, target)
    renderer = shared_renderer(edge.tokenizer)
    files.append(_write(target / GRAMMAR_FILE, tool_gbnf(made.registry)))
    files.append(
        _write(target / USAGE_FILE, json.dumps(_usage(made, edge, renderer), indent=2, ensure_ascii=False) + "\n")
    )
    return files


def prompt_template(renderer: PromptRenderer, request: str) -> str:
    """The prompt of a first request, as text in which control tokens are live; `request` is a placeholder in it."""
    return renderer.user_turn_text([Turn(_REQUEST)]).replace(_REQUEST, request)


def _peft(made: Specialization, edge: LanguageModel, folder: Path) -> list[Path]:
    made.weights.save_peft(folder, edge.name, [path for path, _ in gated_ffn_layers(edge.model)])
    return [folder / "adapter_config.json", folder / "adapter_model.safetensors"]


def _gguf(made: Specialization, edge: LanguageModel, folder: Path) -> list[Path]:
    paths = [path for path, _ in gated_ffn_layers(edge.model)]
    model_type = edge.model.config.get_text_config().model_type
    name = f"{Path(edge.name).name} specialised on {len(made.registry)} tools"
    adapter = save_gguf(made.weights, folder / ADAPTER_FILE, model_type=model_type, module_paths=paths, name=name)
    return [adapter, _write(folder / MODELFILE, _modelfile(edge))]


def _merged(made: Specialization, edge: LanguageModel, folder: Path) -> list[Path]:
    before = set(folder.iterdir())
    _merged_model(made, edge).save_pretrained(folder)
    edge.tokenizer.save_pretrained(folder)
    return sorted(set(folder.iterdir()) - before)


def _openvino(made: Specialization, edge: LanguageModel, folder: Path) -> list[Path]:
    try:
        from loragen_agents.edge.openvino.graph import why_not
        from loragen_agents.edge.openvino.standalone import save_standalone
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{error.name} is missing; install it with: pip install 'loragen-agents[openvino]'"
        ) from error
    model = _merged_model(made, edge)
    reason = why_not(model)
    if reason is not None:
        raise CheckpointError(f"no OpenVINO graph can be written: {reason}; choose another format")
    before = set(folder.iterdir())
    graph = save_standalone(model, folder / GRAPH_FILE)
    # What OpenVINO's other tools look for beside the graph.
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    edge.tokenizer.save_pretrained(folder)
    return [*graph, *sorted(set(folder.iterdir()) - before - set(graph))]


def _merged_model(made: Specialization, edge: LanguageModel) -> PreTrainedModel:
    model = clone_sharing_tensors(edge.model)
    made.weights.merge_into(model)
    return model


def _modelfile(edge: LanguageModel) -> str:
    """What `ollama create` reads. Ollama takes no GBNF, so a call there is held by the weights alone."""
    base = edge.name if edge.name.endswith(".gguf") else str(edge.folder)
    prompt = prompt_template(shared_renderer(edge.tokenizer), "{{ .Prompt }}")
    return (
        f"# FROM: the model that the adapter was written for, as a GGUF file or a folder of safetensors.\n"
        f"FROM {base}\n"
        f"ADAPTER ./{ADAPTER_FILE}\n"
        f'TEMPLATE """{prompt}"""\n'
        f'PARAMETER stop "{OBSERVATION_STOP.strip()}"\n'
        "PARAMETER temperature 0\n"
    )


def _usage(made: Specialization, edge: LanguageModel, renderer: PromptRenderer) -> dict[str, object]:
    return {
        "prompt": prompt_template(renderer, "{request}"),
        "stop": [OBSERVATION_STOP],
        "input_format": made.registry.input_format,
        "tools": made.registry.to_openai(),
        "system_text": made.system_text,
        "edge": edge.name,
        "edge_fingerprint": edge.fingerprint,
        "key": made.key,
    }


def _write(path: Path, text: str) -> Path:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
