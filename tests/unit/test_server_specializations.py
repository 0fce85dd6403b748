"""The cloud side and an edge of it: archives over HTTP, kept by the edge, and the same answers as the service's own."""

import io
import json
import os
import zipfile
from collections.abc import Iterator

import httpx
import pytest
import torch
from peft import PeftModel

from loragen_agents import LoRAGenChatModel, ToolRegistry
from loragen_agents.adapter.lora_weights import LoRAWeights
from loragen_agents.adapter.tool_updates import UpdateKind
from loragen_agents.conversation.prompts import Turn
from loragen_agents.errors import CheckpointError, ServiceError
from loragen_agents.generator import GeneratorConfig, LoRAGenerator
from loragen_agents.models.language_models import LanguageModel
from loragen_agents.specialization import cloud
from loragen_agents.specialization.archives import read_archive, write_archive, write_peft_archive
from loragen_agents.specialization.cloud import is_service, specialize_by_service
from loragen_agents.specialization.specialize import Specialization, specialize
from tests.decoded_steps import decoded
from tests.served import served
from tests.tiny_chat import tiny_generator, tiny_language_model
from tests.tiny_models import SIZES, tiny_model

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name} a number.",
            "parameters": {
                "type": "object",
                "properties": {"number": {"enum": [1, 2]}, "loud": {"type": "boolean"}},
                "required": ["number"],
            },
        },
    }
    for name in ("pick", "drop")
]
REGISTRY = ToolRegistry.from_tools(TOOLS, input_format="json")
PATH = "/v1/specializations"


@pytest.fixture(scope="module")
def edge(tmp_path_factory) -> LanguageModel:
    return tiny_language_model(tmp_path_factory.mktemp("tiny") / "edge")


@pytest.fixture(scope="module")
def model(edge) -> LoRAGenChatModel:
    return LoRAGenChatModel(model=edge, generator=tiny_generator(edge), max_tokens=16)


@pytest.fixture(scope="module")
def url(model) -> Iterator[str]:
    with served(lambda: model) as (url, _):
        yield url


@pytest.fixture(autouse=True)
def nothing_in_memory() -> Iterator[None]:
    cloud.forget_fetched()
    yield
    cloud.forget_fetched()


def keyed_generator(edge: LanguageModel) -> LoRAGenerator:
    """A random generator with a tool memory and heads, so that tools have keys and updates of their own."""
    torch.manual_seed(0)
    config = GeneratorConfig(
        n_experts=1,
        expert_scope="per_layer",
        rank=2,
        memory_layers=2,
        memory_common_rank=4,
        head_layers=2,
        head_width=5,
        argument_layers=1,
        argument_width=4,
    )
    generator = LoRAGenerator(config, edge, edge)
    with torch.no_grad():
        for name, tensor in generator.own_tensors().items():
            if name.startswith(("producer", "tool_head", "argument_head")) and tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) / 10)
    return generator.eval()


@pytest.fixture(params=["sum", "keys"])
def made(edge, model, request) -> Specialization:
    generator = model.generator if request.param == "sum" else keyed_generator(edge)
    made = specialize(REGISTRY, "Be brief.", edge=edge, cloud=edge, generator=generator)
    assert (made.parts.keys is not None) == (request.param == "keys")
    return made


def texts(made: Specialization) -> list[tuple[int, ...]]:
    """What it decodes: held by the grammar with scores, and freely by the weights alone."""
    turns = [Turn("Pick one")]
    return [
        decoded(made.model, turns).token_ids,
        decoded(made.model, turns, tool_choice="drop").token_ids,
        decoded(made.model, turns, grammar=False).token_ids,
    ]


def test_an_archive_decodes_as_what_was_packed(made, edge):
    content = write_archive(made, edge)
    read = read_archive(content, edge)
    assert (read.key, read.system_text, read.registry) == (made.key, "Be brief.", REGISTRY)
    assert read.definition_tokens == made.definition_tokens
    assert texts(read) == texts(made)
    if made.parts.keys is not None:
        ours, theirs = made.parts.arguments("drop"), read.parts.arguments("drop")
        assert ours is not None and theirs is not None
        values = torch.randn(5, ours.reader.mean.numel())
        assert theirs.find(values).given == pytest.approx(ours.find(values).given) and set(ours.names) == {
            "number",
            "loud",
        }


def test_the_peft_archive_holds_the_sum(made, edge, tmp_path):
    with zipfile.ZipFile(io.BytesIO(write_peft_archive(made, edge))) as archive:
        archive.extractall(tmp_path)
    assert PeftModel.from_pretrained(tiny_model(), tmp_path).peft_config
    assert str(edge.folder) not in (tmp_path / "adapter_config.json").read_text()
    found, expected = LoRAWeights.load_peft(tmp_path), made.weights
    assert found.entries == expected.entries
    for layer, projection in expected.entries:
        torch.testing.assert_close(found.update(layer, projection), expected.update(layer, projection))


def test_an_archive_with_keys_holds_tools_once_in_two_bytes_a_number(edge):
    """And what comes from a checkpoint in bf16 as it is there: the sum, which holds all of it again, is made anew."""
    names = ["drop", *(f"tool_{n}" for n in range(39))]
    tools = [{"name": name, "description": f"{name} a thing.", "parameters": {}} for name in names]
    generator = keyed_generator(edge)
    with torch.no_grad():
        for tensor in generator.own_tensors().values():
            tensor.copy_(tensor.to(torch.bfloat16))
    made = specialize(ToolRegistry.from_tools(tools), "", edge=edge, cloud=edge, generator=generator)
    content = write_archive(made, edge)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    hidden, intermediate = SIZES["hidden_size"], SIZES["intermediate_size"]
    down = [a.shape[0] for (_, projection), (a, _) in made.weights.tensors.items() if projection == "down_proj"]
    updates = max(down) - generator.config.rank
    maps = (len(UpdateKind) * 2 + 2 * 2 * hidden * generator.config.memory_value_rank) * 2
    expected = updates * (2 * (2 * intermediate + hidden) + 3 * 4 + 1) + maps
    assert expected < sizes["tool_updates.safetensors"] < expected + 2000
    assert sizes["adapter_model.safetensors"] < sum(t.nbytes for t in generator.producer.parameters()) // 2 + 4000
    read = read_archive(content, edge)
    for name in names:
        ours, theirs = made.parts.updates(name), read.parts.updates(name)
        assert ours is not None and theirs is not None and ours.tensors.keys() == theirs.tensors.keys()
        for (a, b), (c, d) in zip(ours.tensors.values(), theirs.tensors.values(), strict=True):
            assert (b @ a - d @ c).norm() < 1e-3 * (b @ a).norm()
    assert texts(read) == texts(made)


@pytest.mark.parametrize("damage", ["cut", "changed", "nothing", "manifest", "format", "tools"])
def test_damaged_archives_are_named(made, edge, damage):
    content = write_archive(made, edge)
    files = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "nothing":
        content = b""
    else:
        name = "adapter_model.safetensors" if damage == "changed" else "specialization.json"
        manifest = json.loads(files["specialization.json"])
        changed = {"format": {**manifest, "format": 9}, "tools": {**manifest, "tools": [{"name": 3}]}}
        files[name] = json.dumps(changed[damage]).encode() if damage in changed else files[name][:-1] + b"?"
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, inner in files.items():
                archive.writestr(name, inner)
        content = out.getvalue()
    with pytest.raises(CheckpointError, match="the archive of a specialisation"):
        read_archive(content, edge)


def test_an_archive_of_another_edge_model(made, edge, tmp_path):
    other = tiny_language_model(tmp_path / "other", seed=5)
    with pytest.raises(CheckpointError, match="another edge LM"):
        read_archive(write_archive(made, edge), other)


def test_the_service(url, model, edge, tmp_path):
    made = specialize(REGISTRY, "Be brief.", edge=edge, cloud=edge, generator=model.generator)
    asked = {"tools": TOOLS, "system": "Be brief."}
    first = httpx.post(url + PATH, json=asked, timeout=60)
    assert (first.status_code, first.headers["content-type"]) == (200, "application/zip")
    key = first.headers["x-specialization"]
    assert key == made.key
    assert httpx.get(f"{url}{PATH}/{key}").content == first.content
    assert texts(read_archive(first.content, edge)) == texts(made)
    assert httpx.get(f"{url}{PATH}/{key}?format=peft").status_code == 404
    peft = httpx.post(url + PATH, json={**asked, "format": "peft"}, timeout=60)
    assert peft.headers["x-specialization"] == key
    assert httpx.get(f"{url}{PATH}/{key}?format=peft").content == peft.content
    with zipfile.ZipFile(io.BytesIO(peft.content)) as archive:
        archive.extractall(tmp_path)
    assert PeftModel.from_pretrained(tiny_model(), tmp_path).peft_config


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"tools": []}, 400, "at least 1 item"),
        ({"tools": TOOLS, "sytem": "x"}, 400, "unknown field"),
        ({"tools": TOOLS, "edge_fingerprint": "0"}, 409, "use that edge LM"),
        ({"tools": [{"type": "function", "function": {"name": "x"}}]}, 400, "description is empty"),
        ([], 400, "no JSON object"),
    ],
    ids=str,
)
def test_the_service_refuses(url, fields, status, said):
    answer = httpx.post(url + PATH, json=fields, timeout=60)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]


def test_formats_that_are_not_there(url):
    answer = httpx.get(f"{url}{PATH}/{'0' * 64}?format=gguf")
    assert answer.status_code == 400
    assert "expected edge or peft" in answer.json()["error"]["message"]


def test_keys_that_are_not_there(url):
    for key in ("0" * 64, "..%2f..%2fsecret", "x"):
        assert httpx.get(f"{url}{PATH}/{key}").status_code == 404


def test_an_edge_asks_once_and_then_works_offline(model, edge, monkeypatch):
    ours = LoRAGenChatModel(model=edge, generator=model.generator, max_tokens=16, tools=TOOLS)
    with served(lambda: model) as (url, _):
        far = LoRAGenChatModel(model=edge, cloud=url, generator="/nothing/here", max_tokens=16, tools=TOOLS)
        first = far.invoke([("system", "Be brief."), ("human", "Pick one")])
        assert first.response_metadata["specialization"] == "generated"
        again = far.invoke([("system", "Be brief."), ("human", "Pick one")])
        assert again.response_metadata["specialization"] == "memory"
        assert first.response_metadata["specialize_ms"] > 0 == again.response_metadata["specialize_ms"]
    cloud.forget_fetched()
    offline = far.invoke([("system", "Be brief."), ("human", "Pick one")])
    assert offline.response_metadata["specialization"] == "disk" and offline.response_metadata["specialize_ms"] == 0
    near = ours.invoke([("system", "Be brief."), ("human", "Pick one")])
    for message in (first, again, offline):
        assert message.content == near.content
        assert [call["args"] for call in message.tool_calls] == [call["args"] for call in near.tool_calls]
    with pytest.raises(ServiceError, match="can't be asked"):
        far.invoke([("system", "Be long."), ("human", "Pick one")])


def test_a_damaged_file_is_fetched_again(url, edge, nothing_is_fetched):
    specialize_by_service(url, REGISTRY, edge=edge)
    (path,) = (nothing_is_fetched / "fetched").glob("*.zip")
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    cloud.forget_fetched()
    assert specialize_by_service(url, REGISTRY, edge=edge).source == "generated"
    assert path.read_bytes() == whole


def test_a_cache_that_can_not_be_used_is_a_warning(url, model, edge, nothing_is_fetched, caplog):
    """Neither the edge nor the service needs it: what can't be kept is made again."""
    for name in ("fetched", "archives"):
        (nothing_is_fetched / name).write_text("in the way")
    for text in ("Be brief.", "Be long."):
        cloud.forget_fetched()
        assert specialize_by_service(url, REGISTRY, text, edge=edge).source == "generated"
    assert caplog.text.count("can't be kept") == 4 and "LORAGEN_AGENTS_CACHE" in caplog.text


def test_files_that_can_not_be_read_are_made_again(url, edge, nothing_is_fetched, caplog):
    specialize_by_service(url, REGISTRY, edge=edge)
    for name in ("fetched", "archives"):
        (path,) = (nothing_is_fetched / name).glob("*.zip")
        path.unlink()
        path.mkdir()
    cloud.forget_fetched()
    assert specialize_by_service(url, REGISTRY, edge=edge).source == "generated"
    assert caplog.text.count("can't be read") == 2


def test_the_disk_is_bounded_in_bytes(url, edge, nothing_is_fetched, monkeypatch):
    folders = [nothing_is_fetched / name for name in ("fetched", "archives")]

    def kept() -> list[set[str]]:
        return [{path.name for path in folder.glob("*.zip")} for folder in folders]

    def ask(text: str) -> None:
        specialize_by_service(url, REGISTRY, text, edge=edge)

    ask("a")
    first = kept()
    (size,) = (path.stat().st_size for path in folders[0].glob("*.zip"))
    monkeypatch.setenv("LORAGEN_AGENTS_CACHE_BYTES", str(2 * size + size // 2))
    for path in (path for folder in folders for path in folder.iterdir()):
        os.utime(path, (0, 0))
    ask("b")
    ask("c")
    assert [len(names) for names in kept()] == [2, 2]
    assert not any(names & before for names, before in zip(kept(), first, strict=True))
    monkeypatch.setenv("LORAGEN_AGENTS_CACHE_BYTES", "1")
    ask("d")  # the newest stays, however large it is
    assert [len(names) for names in kept()] == [1, 1]


def test_the_key_is_sent(model, edge, monkeypatch):
    with served(lambda: model, api_key="secret") as (url, _):
        with pytest.raises(ServiceError, match="API key is missing"):
            specialize_by_service(url, REGISTRY, edge=edge)
        monkeypatch.setenv("LORAGEN_AGENTS_API_KEY", "secret")
        assert specialize_by_service(f"{url}/v1", REGISTRY, edge=edge).registry == REGISTRY


def test_what_is_a_service():
    assert is_service("http://x") and is_service("https://x/v1")
    for other in (None, "smollm2-135m-instruct", "./folder", 5):
        assert not is_service(other)
