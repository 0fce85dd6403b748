"""What is in the wheel, and that it works where there is nothing but the wheel."""

import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
CONTENT = ("tools", "prompts", "training")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(CHECKOUT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def interpreter(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with this wheel; its dependencies are those of the environment of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    packages = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    # A .pth file inside a folder that a .pth file adds is not read, so the editable installation stays out.
    (Path(packages.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def files_of(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def test_every_file_of_the_package_and_of_the_content_folders_is_in_it(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"loragen_agents/{name}" for name in files_of(CHECKOUT / "loragen_agents")}
    for content in CONTENT:
        files = files_of(CHECKOUT / content)
        assert files or content == "training", f"{content}/ is empty"
        expected |= {f"loragen_agents/_content/{content}/{name}" for name in files}
    assert expected <= names, f"not in the wheel: {sorted(expected - names)}"
    assert not [name for name in names if name.startswith(("tests/", "tools/", "examples/"))]


def test_it_carries_its_licence_and_its_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        assert "Apache License" in archive.read(f"{info}/licenses/LICENSE").decode()
        assert "loragen-agents = loragen_agents.cli:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_it_runs_from_another_folder(interpreter: Path, tmp_path: Path) -> None:
    command = [str(interpreter.parent / "loragen-agents"), "doctor", "--no-speed", "--json"]
    report = json.loads(subprocess.check_output(command, cwd=tmp_path))
    for content in CONTENT:
        folder = Path(report["content"][content])
        assert folder.is_relative_to(interpreter.parents[1]) and files_of(folder) == files_of(CHECKOUT / content)
    code = """
from loragen_agents import ToolRegistry
from loragen_agents.support.content import content_folder
print(len(ToolRegistry.from_yaml(content_folder("tools") / "gpt4tools_seen.yaml")))
"""
    assert subprocess.check_output([interpreter, "-c", code], cwd=tmp_path, text=True) == "21\n"
