"""GPT4Tools-mini: the project's own stand-in for GPT4Tools' evaluation files, for those who don't have them.

It has GPT4Tools' format and tool names and nothing of its text. Phrasings, scenes and answers were written for this
project (mini_sources/*.yaml). Samples are built from them by counting and hashing alone, so that every machine and
Python version builds the same ones. Its figures are not the paper's.

Three parts: `unseen` (the 8 tools of GPT4Tools' test set), `seen` (the other tools, phrasings and scenes held out) and
`train` (the same tools, other phrasings, scenes and answers; for the training recipes). Four kinds of samples:

    positive  one tool call is due
    context   one step was taken and its observation is there; the second call is due
    finished  one step was taken and did it; an answer is due
    negative  no tool is needed, or none could help

Knows nothing of models and of scoring.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

import yaml

from loragen_agents.conversation.react import THOUGHT_QUESTION, answer_text, tool_step_text
from loragen_agents.errors import DataError

MiniPart = Literal["train", "seen", "unseen"]
MiniKind = Literal["positive", "context", "finished", "negative"]
MINI_PARTS: tuple[MiniPart, ...] = ("train", "seen", "unseen")

_SLOT = re.compile(r"\{([a-z])\}")


@dataclass(frozen=True)
class MiniStep:
    """A step that was taken: the tool's name, its input and what came back."""

    action: str
    action_input: str
    observation: str


@dataclass(frozen=True)
class MiniSample:
    """One sample.

    `opening` is the picture's description that the user gave first (None: the conversation starts with the request);
    `tool` is the tool that is due or, in a finished sample, was used; `output` is the gold continuation, from
    `Thought:` on, as in GPT4Tools' files.
    """

    id: str
    kind: MiniKind
    tool: str | None
    opening: str | None
    request: str
    steps: tuple[MiniStep, ...]
    output: str


@dataclass(frozen=True)
class _Shares:
    """How often phrasings are used in one part, per tool."""

    scenes_per_phrasing: int
    contexts: int
    finished: int


_SHARES: dict[MiniPart, _Shares] = {
    "train": _Shares(scenes_per_phrasing=4, contexts=8, finished=2),
    "seen": _Shares(scenes_per_phrasing=3, contexts=4, finished=1),
    "unseen": _Shares(scenes_per_phrasing=3, contexts=8, finished=3),
}


@lru_cache
def mini_samples(part: MiniPart) -> tuple[MiniSample, ...]:
    """All samples of one part, ordered so that every stretch of them has all tools and kinds.

    Raises:
        DataError: there is no such part.
    """
    if part not in MINI_PARTS:
        raise DataError(f"GPT4Tools-mini has no part {part!r}: expected one of {', '.join(MINI_PARTS)}.")
    builder = _Builder(part)
    queues = [list(builder.tool_samples(index)) for index in range(len(builder.tools))]
    queues.append(list(builder.talk_samples()))
    # Dealt out evenly: a run that stops early, or a limit, still sees every tool and kind.
    places = [((n + 0.5) / len(queue), which, n) for which, queue in enumerate(queues) for n in range(len(queue))]
    return tuple(queues[which][n] for _, which, n in sorted(places))


def mini_tool_names(part: MiniPart) -> tuple[str, ...]:
    """The tools that the part's samples call, in the order of the sources."""
    return tuple(_source("unseen" if part == "unseen" else "seen"))


def mini_fingerprint(part: MiniPart) -> str:
    """SHA-256 over all samples of a part: what a result names as its data."""
    return hashlib.sha256("\n".join(map(repr, mini_samples(part))).encode()).hexdigest()


class _Builder:
    """Puts the samples of one part together; every choice is a count or a hash of the sample's own name."""

    def __init__(self, part: MiniPart) -> None:
        self.part = part
        self.shares = _SHARES[part]
        self.tools: dict[str, dict[str, Any]] = _source("unseen" if part == "unseen" else "seen")
        self.words: dict[str, Any] = _source("scenes")[part]
        self.talk: list[list[str]] = _source("talk")[part]

    def tool_samples(self, index: int) -> Iterator[MiniSample]:
        name = list(self.tools)[index]
        kinds: list[list[MiniSample]] = [
            list(self._positives(index, name)),
            list(self._contexts(index, name)),
            list(self._finished(index, name)),
        ]
        places = [((n + 0.5) / len(kind), which, n) for which, kind in enumerate(kinds) for n in range(len(kind))]
        yield from (kinds[which][n] for _, which, n in sorted(places))

    def talk_samples(self) -> Iterator[MiniSample]:
        """Every exchange once behind a picture and once on its own."""
        for round_ in range(2):
            for number, (request, answer) in enumerate(self.talk):
                sample_id = f"{self.part}/none/{round_}/{number}"
                opening = None
                if (number + round_) % 2:
                    scene = self._scene(None, number + 3 * round_)
                    opening = _opening(_path(sample_id), scene["c"])
                yield MiniSample(sample_id, "negative", None, opening, request, (), _answer_output(answer))

    def _positives(self, index: int, name: str) -> Iterator[MiniSample]:
        tool = self.tools[name]
        # Scene by scene, so that the first samples of a tool differ in their phrasing.
        for round_ in range(self.shares.scenes_per_phrasing):
            for number, phrasing in enumerate(self._held(tool["ask"])):
                sample_id = f"{self.part}/{index}/{round_}/{number}"
                count = index * 5 + number * 3 + round_ * 11
                values = self._values(sample_id, tool, count)
                # A phrasing that names the file can stand without the picture's description before it.
                alone = "{p}" in phrasing and not tool.get("shows") and (number + round_) % 3 == 0
                pictured = not alone and ("{p}" in tool["input"] or (number + round_) % 2 == 0)
                yield MiniSample(
                    sample_id,
                    "positive",
                    name,
                    _opening(values["p"], tool.get("shows", "{c}").replace("{c}", values["c"])) if pictured else None,
                    _fill(phrasing, values),
                    (),
                    _step_output(name, _fill(tool["input"], values)),
                )

    def _contexts(self, index: int, name: str) -> Iterator[MiniSample]:
        tool = self.tools[name]
        for number in range(self.shares.contexts):
            sample_id = f"{self.part}/{index}/then/{number}"
            first_name = self._first_tool(name, tool, index + number)
            first = self.tools[first_name]
            count = index * 3 + number * 5
            values = self._values(sample_id, first, count, also=tool)
            result = _path(sample_id + "/result") if first["gives"] != "model" else _model_path(sample_id)
            # The second clause speaks of the outcome, and of another object than the first.
            later = {**values, "p": result, "o": values["o2"]}
            begin = self._held(first["begin"])[(number // 2) % len(self._held(first["begin"]))]
            then = self._held(tool["then"])[number % len(self._held(tool["then"]))]
            joint = " " if then.startswith("and ") else ", "
            step = MiniStep(first_name, _fill(first["input"], values), result)
            yield MiniSample(
                sample_id,
                "context",
                name,
                _opening(values["p"], values["c"]) if number % 2 else None,
                f"{_fill(begin, values)}{joint}{_fill(then, later)}.",
                (step,),
                _step_output(name, _fill(tool["input"], later)),
            )

    def _finished(self, index: int, name: str) -> Iterator[MiniSample]:
        tool = self.tools[name]
        for number in range(self.shares.finished):
            sample_id = f"{self.part}/{index}/done/{number}"
            values = self._values(sample_id, tool, index * 7 + number * 11)
            asks = self._held(tool["ask"])
            values["r"] = self._observation(sample_id, tool, values)
            yield MiniSample(
                sample_id,
                "finished",
                name,
                _opening(values["p"], tool.get("shows", "{c}").replace("{c}", values["c"])),
                _fill(asks[(number * 5 + index) % len(asks)], values),
                (MiniStep(name, _fill(tool["input"], values), values["r"]),),
                _answer_output(_fill(tool["done"][number % len(tool["done"])], values)),
            )

    def _first_tool(self, name: str, tool: dict[str, Any], count: int) -> str:
        """A tool whose outcome the second one can work on: another photo of the scene, or the map that it needs."""
        if "after" in tool:
            return str(tool["after"])
        if "{p}" in tool["input"]:
            fitting = [n for n, t in self.tools.items() if n != name and t["gives"] == "photo"]
            if (
                "needs" in tool or "{q}" in tool["input"]
            ):  # a photo cut down to one object may have lost what is asked for
                fitting = [n for n in fitting if "{o}" not in self.tools[n]["input"]]
        else:
            fitting = [n for n, t in self.tools.items() if n != name and "begin" in t and "{p}" in t["input"]]
        return fitting[count % len(fitting)]

    def _held(self, phrasings: Sequence[str]) -> Sequence[str]:
        """The phrasings of this part: the seen tools' last third is kept from training."""
        if self.part == "unseen":
            return phrasings
        cut = len(phrasings) * 2 // 3
        return phrasings[:cut] if self.part == "train" else phrasings[cut:]

    def _scene(self, needs: str | None, count: int, also: str | None = None) -> dict[str, Any]:
        key = {"people": "who", "letters": "letters"}
        wanted = [key[need] for need in (needs, also) if need]
        fitting = [scene for scene in self.words["scenes"] if all(key in scene for key in wanted)]
        return fitting[count % len(fitting)]

    def _values(
        self, sample_id: str, tool: dict[str, Any], count: int, also: dict[str, Any] | None = None
    ) -> dict[str, str]:
        """What fills the slots, for `tool` and, in a request for two things, for the other one `also`."""
        scene = self._scene(tool.get("needs"), count, also.get("needs") if also else None)
        objects = scene["o"]
        values = {
            "p": _path(sample_id),
            "c": scene["c"],
            "o": objects[count % len(objects)],
            "o2": objects[(count + 1) % len(objects)],
            "q": scene["q"][count % len(scene["q"])],
            "who": scene.get("who", ""),
            "letters": scene.get("letters", ""),
        }
        for slot in "dhsnt":
            if slot in self.words:
                values[slot] = self.words[slot][count % len(self.words[slot])]
        return values

    def _observation(self, sample_id: str, tool: dict[str, Any], values: dict[str, str]) -> str:
        if tool["gives"] == "model":
            return _model_path(sample_id)
        if tool["gives"] in ("image", "photo"):
            return _path(sample_id + "/result")
        if tool.get("needs") == "people":
            return values["who"]
        if tool.get("needs") == "letters":
            return values["letters"]
        if "{q}" in tool["input"]:
            return "unknown"
        return values["c"] if self.part != "unseen" else f"{3 + _hash(sample_id) % 65 / 10:.1f} out of 10"


@lru_cache
def _source(name: str) -> dict[str, Any]:
    text = files("loragen_agents.data").joinpath("mini_sources", f"{name}.yaml").read_text(encoding="utf-8")
    loaded = yaml.safe_load(text)
    assert isinstance(loaded, dict)
    return loaded


def _fill(phrasing: str, values: dict[str, str]) -> str:
    text = _SLOT.sub(lambda match: values[match.group(1)], phrasing)
    return text[:1].upper() + text[1:] if phrasing.startswith("{q}") or phrasing[:1].isupper() else text


def _opening(path: str, caption: str) -> str:
    return f"Provide an image named {path}. Description: {caption}. Understand the image using tools."


def _step_output(name: str, action_input: str) -> str:
    return THOUGHT_QUESTION + tool_step_text(name, action_input)


def _answer_output(answer: str) -> str:
    return THOUGHT_QUESTION + answer_text(answer)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _path(sample_id: str) -> str:
    digest = hashlib.sha256(sample_id.encode()).digest()
    return "image/" + "".join(chr(ord("a") + byte % 26) for byte in digest[:8]) + ".png"


def _model_path(sample_id: str) -> str:
    return _path(sample_id + "/model").replace("image/", "asset/").replace(".png", ".obj")
