"""JSON lines files: what ends a line, and how damage is named."""

from pathlib import Path

import pytest

from loragen_agents.errors import DataError
from loragen_agents.support.json_lines import json_lines


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"text": "one\u2028two\u0085three"}\r\n\n[1]'.encode())
    assert list(json_lines(path)) == [(1, {"text": "one\u2028two\u0085three"}), (3, [1])]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1}\n{"a"', r"rows\.jsonl, row 2: not a JSON object on one line"),
        (b"\xff", r"rows\.jsonl: not UTF-8 text"),
        (None, r"rows\.jsonl: can't be read \(No such file or directory\); fetch it"),
    ],
)
def test_damage_is_named(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        list(json_lines(path, "; fetch it"))
