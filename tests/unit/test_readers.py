"""Original downloads become the intermediate format; what is damaged is named."""

import json
from pathlib import Path

import pytest

from loragen_agents.cli import main
from loragen_agents.data.readers import read_metatool, read_seal_tools, read_sgd
from loragen_agents.data.records import Call, load_data
from loragen_agents.errors import DataError


def write(path: Path, *rows: object, lines: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows[0])
    path.write_text(text, encoding="utf-8")


def seal_tool(name: str, **parameters: str) -> dict:
    return {
        "api_name": name,
        "api_description": f"About {name}",
        "field": "Chemistry/Acids",
        "parameters": {key: {"type": kind, "description": f"the {key}"} for key, kind in parameters.items()},
        "required": sorted(parameters)[:1],
        "responses": {},
    }


def seal_row(row_id: str, query: str, **calls: dict) -> dict:
    return {"id": row_id, "query": query, "calling": [{"api": k, "parameters": v} for k, v in calls.items()]}


def seal_folder(folder: Path) -> Path:
    data = folder / "Seal-Tools_Dataset"
    tools = [
        seal_tool("mix", acid="str", grams="float", hot="bool", times="int"),
        seal_tool("heat"),
        seal_tool("hidden"),
    ]
    write(data / "tool.jsonl", *tools, lines=True)
    dev = [seal_row("dev-easy-0", "Mix it", mix={"acid": "HCl"}), seal_row("dev-easy-101", "Heat it", heat={})]
    write(data / "dev.jsonl", *dev, seal_row("dev-easy-1", "Hide", heat={}, hidden={}), lines=True)
    write(data / "test_in_domain.jsonl", seal_row("x", "Heat and mix", heat={}, mix={"acid": "A"}), lines=True)
    write(data / "test_out_domain.jsonl", seal_row("y", "Hide", hidden={}), lines=True)
    return folder


def test_seal_tools(tmp_path):
    data = read_seal_tools(seal_folder(tmp_path))
    assert list(data.tools) == ["seal/mix", "seal/heat"]
    assert data.tools["seal/mix"].parameters == {
        "type": "object",
        "properties": {
            "acid": {"type": "string", "description": "the acid"},
            "grams": {"type": "number", "description": "the grams"},
            "hot": {"type": "boolean", "description": "the hot"},
            "times": {"type": "integer", "description": "the times"},
        },
        "required": ["acid"],
    }
    assert [(record.query, len(record.calls), record.split) for record in data.calls] == [
        ("Mix it", 1, "train"),
        ("Heat it", 1, "dev"),
        ("Heat and mix", 2, "train"),
    ]
    assert data.calls[0].calls == (Call("seal/mix", {"acid": "HCl"}),)
    write(tmp_path / "Seal-Tools_Dataset" / "train.jsonl", seal_row("train-easy-0", "Heat more", heat={}), lines=True)
    assert read_seal_tools(tmp_path).calls[0].query == "Heat more"


def test_the_command_builds_a_source(tmp_path, capsys):
    arguments = ["data", "build", "--source", "seal-tools", "--input", str(seal_folder(tmp_path / "in"))]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert "2 tools       2 requests" in capsys.readouterr().out
    assert len(load_data(tmp_path / "out").calls) == 3
    assert main([*arguments[:-1], str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 1
    assert "is --input a checkout of the source?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("tool.jsonl", "{", "tool.jsonl, row 1: not a JSON object on one line"),
        ("tool.jsonl", "[]", "tool.jsonl, row 1: expected a JSON object, got list"),
        ("tool.jsonl", '{"api_name": "a"}', "tool.jsonl, row 1: not a tool of Seal-Tools (KeyError('parameters'))"),
        ("dev.jsonl", '{"id": "a", "query": "b"}', "dev.jsonl, row 1: not a row of Seal-Tools (KeyError('calling'))"),
    ],
)
def test_damaged_seal_tools_are_named(tmp_path, name, text, complaint):
    (seal_folder(tmp_path) / "Seal-Tools_Dataset" / name).write_text(text)
    with pytest.raises(DataError) as error:
        read_seal_tools(tmp_path)
    assert complaint in str(error.value)


def test_metatool(tmp_path):
    write(tmp_path / "dataset" / "plugin_des.json", {"Chess": "Play.", "mbti": "A test.", "WeatherTool": "Rain?"})
    table = tmp_path / "dataset" / "data" / "all_clean_data.csv"
    table.parent.mkdir()
    table.write_text('Query,Tool\n"Play, please",Chess\nWho am I?,mbti\nWill it rain?,WeatherTool\n')
    data = read_metatool(tmp_path)
    assert {tool.id: tool.split for tool in data.tools.values()} == {"metatool/Chess": "train", "metatool/mbti": "dev"}
    assert [(record.query, record.split) for record in data.calls] == [("Play, please", "train"), ("Who am I?", "dev")]
    assert data.calls[0].calls == (Call("metatool/Chess", {"query": "Play, please"}),)
    table.write_text("Query,Tool\nHello,Unheard\n")
    with pytest.raises(DataError, match=r"row 2: the tool 'Unheard' has no description"):
        read_metatool(tmp_path)
    table.write_text("Question,Tool\nHello,Chess\n")
    with pytest.raises(DataError, match="row 2: expected the columns Query and Tool"):
        read_metatool(tmp_path)


def sgd_service(name: str) -> dict:
    slots = [
        {"name": "city", "description": "which city", "is_categorical": False, "possible_values": []},
        {"name": "date", "description": "which day", "is_categorical": False, "possible_values": []},
        {"name": "pets", "description": "pets?", "is_categorical": True, "possible_values": ["True", "False"]},
    ]
    find = {
        "name": "Find",
        "description": "Find a room",
        "required_slots": ["city", "date"],
        "optional_slots": {"pets": ""},
    }
    return {"service_name": name, "description": "Rooms", "slots": slots, "intents": [find]}


def sgd_dialogue(service: str, *steps: tuple[list[str], dict]) -> dict:
    turns: list[dict] = []
    for said, parameters in steps:
        for text in said:
            turns.append({"speaker": "USER", "utterance": text, "frames": []})
            turns.append({"speaker": "SYSTEM", "utterance": "And?", "frames": [{"service": service}]})
        call = {"method": "Find", "parameters": parameters}
        turns[-1] = {"speaker": "SYSTEM", "utterance": "", "frames": [{"service": service, "service_call": call}]}
    return {"dialogue_id": "1", "turns": turns}


def test_sgd(tmp_path):
    write(tmp_path / "train" / "schema.json", [sgd_service("Rooms_1")])
    write(tmp_path / "dev" / "schema.json", [sgd_service("Rooms_1"), sgd_service("Rooms_2")])
    rome = {"date": "2019-03-01", "city": "Rome", "pets": "True"}
    dialogues = [
        sgd_dialogue(
            "Rooms_1",
            (["One", "two", "three", "a room in Rome", "for 2019-03-01", "thanks"], rome),  # only four are kept
            (["Another in Rome"], rome),  # one of two required arguments
            (["In rome", "on 2019-03-01"], rome),
            (["Rome 2019-03-01 " + "x" * 400], rome),
        )
    ]
    write(tmp_path / "train" / "dialogues_001.json", dialogues)
    write(
        tmp_path / "dev" / "dialogues_001.json",
        [sgd_dialogue("Rooms_2", (["Oslo 1 May"], {"city": "Oslo", "date": "1 May"}))],
    )
    data = read_sgd(tmp_path)
    assert {tool.id: tool.split for tool in data.tools.values()} == {
        "sgd/Rooms_1.Find": "train",
        "sgd/Rooms_2.Find": "dev",
    }
    assert list(data.tools["sgd/Rooms_1.Find"].properties) == ["city", "date", "pets"]
    assert data.tools["sgd/Rooms_1.Find"].properties["pets"]["enum"] == ["True", "False"]
    stated = {"city": "Rome", "date": "2019-03-01"}
    assert [(record.query, record.calls[0].arguments, record.split) for record in data.calls] == [
        ("three a room in Rome for 2019-03-01 thanks", stated, "train"),
        ("In rome on 2019-03-01", stated, "train"),
        ("Oslo 1 May", {"city": "Oslo", "date": "1 May"}, "dev"),
    ]
    (tmp_path / "dev" / "dialogues_001.json").write_text('[{"turns": [{}]}]')
    with pytest.raises(DataError, match=r"dialogues_001\.json: not dialogues of SGD \(KeyError\('speaker'\)\)"):
        read_sgd(tmp_path)
