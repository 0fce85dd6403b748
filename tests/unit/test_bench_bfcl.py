"""BFCL rows of our own through a model that answers by rule, and its package with a checker of our own."""

import hashlib
import json
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult

from loragen_agents.bench import bfcl_package
from loragen_agents.bench.bfcl import answer_entry, openai_tool, run_bfcl, score_entry
from loragen_agents.bench.bfcl_package import Entry, load_checker, read_entries, unpack
from loragen_agents.bench.results import read_results
from loragen_agents.chat.chat_models import LoRAGenChatModel
from loragen_agents.cli import main
from loragen_agents.errors import DataError, RegistryError
from loragen_agents.generator import GeneratorConfig, LoRAGenerator
from loragen_agents.models.language_models import load_language_model
from tests.tiny_models import save_tiny_model

PAINT = {
    "name": "wall.paint",
    "description": "Paint a wall.",
    "parameters": {
        "type": "dict",
        "properties": {
            "colour": {"type": "string", "description": "The colour.", "enum": ["red", "blue"]},
            "size": {"type": "tuple", "items": {"type": "float"}, "description": "Width and height."},
            "layers": {"type": "array", "items": {"type": "dict", "properties": {"of": {"type": "any"}}}},
            "tags": {"type": "array", "items": {"type": "string"}, "enum": ["wet", "dry"]},
        },
        "required": ["colour", "gone"],
    },
}


def entry(category: str, answer: Any = None, request: str = "Red, then blue") -> Entry:
    return Entry(f"{category}_0", category, (("system", "Be brief."), ("user", request)), (PAINT,), answer)


def due(*colours: str) -> tuple[dict[str, Any], ...]:
    return tuple({"wall.paint": {"colour": [colour]}} for colour in colours)


class Scripted(BaseChatModel):
    """Paints in the colours given, one a step, then answers; notes what it was shown."""

    colours: list[str]
    seen: list[list[BaseMessage]]
    tools: list[Any]
    error: bool = False

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(self, tools: Sequence[Any], **_: Any) -> Any:
        if self.error:
            raise RegistryError("the tool can't be used")
        self.tools[:] = tools
        return self

    def _generate(self, messages: list[BaseMessage], *_: Any, **__: Any) -> ChatResult:
        self.seen.append(messages)
        step = sum(isinstance(message, ToolMessage) for message in messages)
        message = AIMessage("Painted.")
        if step < len(self.colours):
            call = {"name": "wall.paint", "args": {"colour": self.colours[step]}, "id": f"call_{step}"}
            message = AIMessage("", tool_calls=[call])
        message.usage_metadata = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}
        return ChatResult(generations=[ChatGeneration(message=message)])


def scripted(*colours: str, **settings: Any) -> Scripted:
    return Scripted(colours=list(colours), seen=[], tools=[], **settings)


def check(functions: Any, calls: Any, answer: Any, category: str) -> dict[str, Any]:
    """As the AST checker, for these rows: colours in any order."""
    asked = sorted(colour for call in answer for colour in call["wall.paint"]["colour"])
    made = sorted(call["wall.paint"].get("colour", "") for call in calls)
    return {"valid": asked == made} if asked == made else {"valid": False, "error": ["wrong"], "error_type": "colour"}


def test_functions_become_openai_tools_that_the_chat_model_takes() -> None:
    tool = openai_tool(PAINT)
    parameters = tool["function"]["parameters"]
    assert parameters["type"] == "object" and parameters["required"] == ["colour"]
    assert parameters["properties"]["size"]["type"] == "array"
    assert parameters["properties"]["size"]["items"] == {"type": "number"}
    assert parameters["properties"]["layers"]["items"]["properties"]["of"] == {"type": "string"}
    assert parameters["properties"]["tags"]["items"] == {"type": "string", "enum": ["wet", "dry"]}
    assert LoRAGenChatModel(tools=[tool]).tools[0]["function"]["name"] == "wall.paint"


def test_one_response_serves_a_simple_row_and_several_a_parallel_one() -> None:
    simple = answer_entry(scripted("red", "blue"), entry("simple_python"))
    assert simple["calls"] == [{"wall.paint": {"colour": "red"}}]
    assert simple["result"] == [{"wall.paint": '{"colour": "red"}'}]
    model = scripted("red", "blue")
    parallel = answer_entry(model, entry("parallel"))
    assert [call["wall.paint"]["colour"] for call in parallel["calls"]] == ["red", "blue"]
    assert (parallel["input_token_count"], parallel["output_token_count"]) == (30, 15)
    assert [message.type for message in model.seen[-1]] == ["system", "human", "ai", "tool", "ai", "tool"]
    # A model that makes a call again has made all that it has.
    assert len(answer_entry(scripted("red", "red", "blue"), entry("parallel"))["calls"]) == 1


def test_answers_errors_and_unreadable_calls_are_results_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer_entry(scripted(), entry("irrelevance"))["result"] == "Painted."
    failed = answer_entry(scripted(error=True), entry("multiple"))
    assert failed["result"] == "Error during inference: the tool can't be used" and failed["calls"] == []
    cut_off = AIMessage("", invalid_tool_calls=[{"name": "wall.paint", "args": "{", "id": "1", "error": "cut off"}])
    model = scripted()
    generation = ChatResult(generations=[ChatGeneration(message=cut_off)])
    monkeypatch.setattr(Scripted, "_generate", lambda *_, **__: generation)
    calls = answer_entry(model, entry("parallel"))["calls"]
    assert calls == [{"wall.paint": {}}]
    assert score_entry(entry("irrelevance"), calls, check)[0] == {"valid": 0.0}


def test_rows_are_scored_by_the_checker_and_by_their_tools() -> None:
    red, blue = ({"wall.paint": {"colour": colour}} for colour in ("red", "blue"))
    roof: dict[str, Any] = {"roof": {}}
    assert score_entry(entry("multiple", due("red")), [red], check) == ({"valid": 1.0, "tool": 1.0}, None)
    scores, error = score_entry(entry("multiple", due("red")), [blue], check)
    assert scores == {"valid": 0.0, "tool": 1.0} and error["error_type"] == "colour"
    assert score_entry(entry("multiple", due("red")), [], check)[0] == {"valid": 0.0, "tool": 0.0}
    several = entry("parallel", due("red", "blue"))
    assert score_entry(several, [blue, red], check)[0] == {"valid": 1.0, "tool": 1.0}
    assert score_entry(several, [red], check)[0]["tool"] == 0.0
    assert score_entry(entry("irrelevance"), [], check) == ({"valid": 1.0}, None)
    assert score_entry(entry("live_irrelevance"), [roof], check)[0] == {"valid": 0.0}
    assert score_entry(entry("live_relevance"), [roof], check)[0] == {"valid": 1.0}


def test_a_run_writes_bfcl_s_files_and_goes_on(tmp_path: Path) -> None:
    entries = {
        "multiple": [entry("multiple", due("red")), replace(entry("multiple", due("blue")), id="multiple_1")],
        "live_irrelevance": [entry("live_irrelevance")],
    }
    settings = {"models": {"edge": {"name": "scripted", "fingerprint": "0" * 64}}}

    def run(model: Scripted, resume: bool) -> dict[str, Any]:
        return run_bfcl(entries, model, check, settings, out=tmp_path, resume=resume, command="bench bfcl")

    class Stopped(Scripted):
        def _generate(self, *arguments: Any, **settings: Any) -> ChatResult:
            if len(self.seen) == 2:
                raise KeyboardInterrupt
            return super()._generate(*arguments, **settings)

    first = run(Stopped(colours=["red"], seen=[], tools=[]), False)
    assert not first["complete"] and first["variants"]["multiple"]["scored"] == 1
    second = run(scripted("red"), True)
    assert second["complete"] and second["variants"]["multiple"]["metrics"]["valid"]["value"] == 0.5
    assert read_results(tmp_path)["variants"]["live_irrelevance"]["metrics"]["valid"]["value"] == 0.0
    result = tmp_path / "result/loragen-agents/non_live/BFCL_v4_multiple_result.json"
    rows = [json.loads(line) for line in result.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["multiple_0", "multiple_1"]
    assert rows[0]["result"] == [{"wall.paint": '{"colour": "red"}'}] and rows[0]["output_token_count"] == 5
    score = tmp_path / "score/loragen-agents/non_live/BFCL_v4_multiple_score.json"
    header, wrong = (json.loads(line) for line in score.read_text().splitlines())
    assert header == {"accuracy": 0.5, "correct_count": 1, "total_count": 2}
    assert wrong["id"] == "multiple_1" and wrong["error"] == ["wrong"] and wrong["possible_answer"] == list(due("blue"))
    assert (tmp_path / "score/loragen-agents/live/BFCL_v4_live_irrelevance_score.json").is_file()
    assert "| multiple (multiple) | 50.0" in (tmp_path / "report.md").read_text()


CHECKER = """
from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING
def ast_checker(functions, calls, answer, language, category, model):
    dots = MODEL_CONFIG_MAPPING[model.replace("_", "/")].underscore_to_dot
    return {"valid": calls == answer, "error": [language.value, category, dots]}
"""


def wheel(folder: Path) -> Path:
    """A wheel laid out as bfcl-eval's, with a row of our own."""
    row = {"id": "multiple_0", "question": [[{"role": "user", "content": "Paint"}]], "function": [PAINT]}
    rows = "".join(json.dumps({**row, "id": f"multiple_{place}"}) + "\n" for place in range(4))
    answers = 4 * (json.dumps({"id": "other", "ground_truth": due("red")}) + "\n")
    files = {
        "bfcl_eval/__init__.py": "",
        "bfcl_eval/constants/__init__.py": "",
        "bfcl_eval/constants/enums.py": "import enum\nclass Language(enum.Enum):\n    PYTHON = 'python'\n",
        "bfcl_eval/constants/model_config.py": "import a_client_that_is_not_installed",
        "bfcl_eval/eval_checker/__init__.py": "import pandas_that_is_not_installed",
        "bfcl_eval/eval_checker/ast_eval/__init__.py": "",
        "bfcl_eval/eval_checker/ast_eval/ast_checker.py": CHECKER,
        "bfcl_eval/data/BFCL_v4_multiple.json": rows,
        "bfcl_eval/data/possible_answer/BFCL_v4_multiple.json": answers,
        "bfcl_eval/data/BFCL_v4_irrelevance.json": json.dumps(row) + "\n",
        "bfcl_eval/model_handler/claude.py": "unused",
        "bfcl_eval-2026.3.23.dist-info/licenses/LICENSE": "Apache 2.0",
    }
    path = folder / "bfcl_eval-2026.3.23-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_the_package_gives_rows_and_a_checker_without_being_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAGEN_AGENTS_CACHE", str(tmp_path / "cache"))
    made = wheel(tmp_path)
    fetched: list[list[str]] = []

    def download(packages: list[str], folder: Path, progress: Any) -> None:
        fetched.append(packages)
        (folder / made.name).write_bytes(made.read_bytes())

    monkeypatch.setattr(bfcl_package, "download_wheels", download)
    with pytest.raises(DataError, match="not the file that was published"):
        bfcl_package.obtain()
    monkeypatch.setattr(bfcl_package, "SHA256", hashlib.sha256(made.read_bytes()).hexdigest())
    folder = bfcl_package.obtain()
    assert bfcl_package.obtain() == folder and fetched == [["bfcl-eval==2026.3.23"]] * 2
    assert list((tmp_path / "cache" / "bfcl").iterdir()) == [folder]
    assert not (folder / "bfcl_eval/model_handler").exists() and list(folder.rglob("LICENSE"))
    entries = read_entries(folder, "multiple", 2)
    assert [one.id for one in entries] == ["multiple_0", "multiple_2"]
    assert entries[0].answer == due("red") and entries[0].messages == (("user", "Paint"),)
    assert read_entries(folder, "irrelevance")[0].answer is None
    with pytest.raises(DataError, match="no category 'exec'"):
        read_entries(folder, "exec")

    installed = ModuleType("bfcl_eval")
    monkeypatch.setitem(sys.modules, "bfcl_eval", installed)
    verdict = load_checker(folder)([PAINT], [{"wall.paint": {}}], [{"wall.paint": {}}], "multiple")
    assert verdict == {"valid": True, "error": ["python", "multiple", False]}
    assert sys.modules["bfcl_eval"] is installed and str(folder) not in sys.path
    assert not [name for name in sys.modules if name.startswith("bfcl_eval.")]


def test_damaged_rows_are_named(tmp_path: Path) -> None:
    unpack(made := wheel(tmp_path), tmp_path / "package", hashlib.sha256(made.read_bytes()).hexdigest())
    path = tmp_path / "package/bfcl_eval/data/possible_answer/BFCL_v4_multiple.json"
    path.write_text("{}\n{}\n")
    with pytest.raises(DataError, match="4 rows and 2 answers"):
        read_entries(tmp_path / "package", "multiple")
    path.write_text("{")
    with pytest.raises(DataError, match=r"BFCL_v4_multiple\.json, row 1: not a JSON"):
        read_entries(tmp_path / "package", "multiple")


def test_the_command_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unpack(made := wheel(tmp_path), tmp_path / "package", hashlib.sha256(made.read_bytes()).hexdigest())
    monkeypatch.setattr(bfcl_package, "obtain", lambda progress: tmp_path / "package")
    edge = load_language_model(save_tiny_model(tmp_path / "edge"), device="cpu", dtype="float32")
    generator = LoRAGenerator(GeneratorConfig(n_experts=2, top_k=1, rank=2), edge, edge).eval()
    generator.save(tmp_path / "generator")
    command = ["bench", "bfcl", "--json", "--limit", "2", "--max-tokens", "16", "--out", str(tmp_path / "run")]
    command += ["--edge", str(tmp_path / "edge"), "--generator", str(tmp_path / "generator"), "--dtype", "float32"]
    assert main([*command, "--categories", "multiple,irrelevance"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {name: row["scored"] for name, row in document["variants"].items()} == {"irrelevance": 1, "multiple": 2}
    assert document["models"]["edge"]["fingerprint"] == edge.fingerprint and document["generator"]
    assert main([*command, "--categories", "multiple,exec"]) == 1
    assert "no category 'exec'" in capsys.readouterr().out
