"""GPT4Tools-mini: counts, balance, no leak between its parts, and words of its own."""

import re
from collections import Counter

import pytest
import yaml

from loragen_agents.bench.gpt4tools_score import score
from loragen_agents.data.gpt4tools_mini import (
    MINI_PARTS,
    MiniPart,
    MiniSample,
    mini_fingerprint,
    mini_samples,
    mini_tool_names,
)
from loragen_agents.errors import DataError
from loragen_agents.support.content import content_folder


def registry_rows(part: MiniPart) -> list[dict[str, object]]:
    name = "unseen" if part == "unseen" else "seen"
    loaded = yaml.safe_load((content_folder("tools") / f"gpt4tools_{name}.yaml").read_text(encoding="utf-8"))
    return list(loaded["tools"])


def due_tool(sample: MiniSample) -> str | None:
    found = re.search(r"Action: (.*)", sample.output)
    return found.group(1) if found else None


@pytest.mark.parametrize("part", MINI_PARTS)
def test_counts_kinds_and_balance(part: MiniPart) -> None:
    samples = mini_samples(part)
    assert len(samples) >= (900 if part == "train" else 300)
    kinds = Counter(sample.kind for sample in samples)
    assert kinds["positive"] >= len(samples) / 2
    assert min(kinds["context"], kinds["negative"], kinds["finished"]) >= 20
    due = Counter(tool for sample in samples if (tool := due_tool(sample)))
    assert set(due) == {row["name"] for row in registry_rows(part)} == set(mini_tool_names(part))
    assert len(due) == (8 if part == "unseen" else 21)
    assert len(set(due.values())) == 1  # every tool is due equally often
    assert sum(due.values()) >= 300


@pytest.mark.parametrize("part", MINI_PARTS)
def test_every_stretch_has_many_tools(part: MiniPart) -> None:
    assert len({due_tool(sample) for sample in mini_samples(part)[:40]}) >= len(mini_tool_names(part))


@pytest.mark.parametrize("part", MINI_PARTS)
def test_samples_hang_together(part: MiniPart) -> None:
    names = set(mini_tool_names(part))
    ids = [sample.id for sample in mini_samples(part)]
    assert len(set(ids)) == len(ids)
    for sample in mini_samples(part):
        assert "{" not in sample.request + sample.output + str(sample.opening)
        assert score(sample.output, sample.output).success == 1
        assert (sample.kind in ("positive", "context")) == (due_tool(sample) is not None)
        assert bool(sample.steps) == (sample.kind in ("context", "finished"))
        assert all(taken.action in names for taken in sample.steps)
        if sample.kind == "context" and ".png" in sample.output:
            # What the second tool works on is what the first one gave back.
            assert sample.steps[0].observation in sample.output
        elif sample.kind == "positive" and (path := re.search(r"image/[a-z]{8}\.png", sample.output)):
            # The path is there to be copied: in the request or in the picture's description.
            assert path.group() in f"{sample.opening} {sample.request}"


@pytest.mark.parametrize("part", MINI_PARTS)
def test_parts_have_distinct_samples(part: MiniPart) -> None:
    seen = {(sample.opening, sample.request, sample.steps) for sample in mini_samples(part)}
    assert len(seen) == len(mini_samples(part))


def test_nothing_of_the_evaluation_stands_in_the_training_part() -> None:
    train = mini_samples("train")
    train_requests = {sample.request.casefold() for sample in train}
    train_text = "\n".join(f"{s.opening}\n{s.request}\n{s.steps}\n{s.output}" for s in train)
    for part in ("seen", "unseen"):
        for sample in mini_samples(part):
            assert sample.request.casefold() not in train_requests
    for name in mini_tool_names("unseen"):
        assert not re.search(rf"Action: {re.escape(name)}\n|action='{re.escape(name)}'", train_text)
    assert not set(mini_tool_names("unseen")) & set(mini_tool_names("train"))


@pytest.mark.parametrize("part", MINI_PARTS)
def test_requests_use_other_words_than_the_tools(part: MiniPart) -> None:
    def words(text: object) -> list[str]:
        return re.findall(r"[a-z0-9']+", str(text).lower())

    rows = registry_rows(part)
    runs = {
        tuple(found[start : start + 4])
        for row in rows
        for found in [words(row["description"])]
        for start in range(len(found) - 3)
    }
    for sample in mini_samples(part):
        said = words(sample.request)
        assert not any(tuple(said[start : start + 4]) in runs for start in range(len(said) - 3)), sample.request
        assert not any(str(row["name"]).lower() in sample.request.lower() for row in rows)


def test_the_build_is_the_same_everywhere() -> None:
    # A change of the data is a change of the benchmark: update these with it, and say so in the change's message.
    assert {part: mini_fingerprint(part)[:16] for part in MINI_PARTS} == FINGERPRINTS


def test_unknown_part() -> None:
    with pytest.raises(DataError, match="expected one of train, seen, unseen"):
        mini_samples("test")  # type: ignore[arg-type]


FINGERPRINTS = {"train": "41d3549722c8501c", "seen": "63156ce14259c820", "unseen": "0bd6c977d379040f"}
