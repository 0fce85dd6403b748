"""Which tools do nearly the same, so that in a registry with both either could be right.

A tool is a bag of weighted words: of its name, its description and the requests that call it, if there are any. The
measure is rough: it only has to keep ambiguous pairs out of a registry.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from loragen_agents.data.augmentation import content_words, split_words
from loragen_agents.data.records import CallRecord, ToolRecord

Vector = dict[str, float]

# Families of services that do the same under different names: "Hotels_1" and "Hotels_3", films online and in a cinema.
_FAMILIES = {"Media": "Films", "Movies": "Films"}
_REQUESTS_A_TOOL = 40


def family(tool: ToolRecord) -> str | None:
    """Family of a numbered service ("Hotels_2" gives "Hotels"), None for other tools."""
    match = re.fullmatch(r"([A-Za-z]+)_\d+", tool.domain)
    return _FAMILIES.get(match[1], match[1]) if match else None


def _stem(word: str) -> str:
    for suffix in ("ings", "ing", "ies", "es", "ed", "s"):
        if word.endswith(suffix) and len(word) - len(suffix) >= 4:
            return word[: -len(suffix)]
    return word


def _bag(text: str) -> Counter[str]:
    return Counter(_stem(word) for word in content_words(text))


class Overlap:
    """Word likeness of tools with each other, from 0 (no word shared) to 1."""

    def __init__(
        self, tools: Mapping[str, ToolRecord], calls: Iterable[CallRecord], alike: Iterable[frozenset[str]] = ()
    ) -> None:
        self._tools = tools
        self._groups: dict[str, set[int]] = defaultdict(set)
        for number, group in enumerate(alike):
            for tool_id in group:
                self._groups[tool_id].add(number)
        self._grouped = {tools[tool_id].source for tool_id in self._groups if tool_id in tools}
        requests: dict[str, list[str]] = defaultdict(list)
        for record in calls:
            if len(record.calls) == 1 and len(requests[record.calls[0].tool]) < _REQUESTS_A_TOOL:
                requests[record.calls[0].tool].append(record.query)
        texts = {
            tool.id: _bag(" ".join([*split_words(tool.name), tool.description, tool.domain])) for tool in tools.values()
        }
        asked: dict[str, Counter[str]] = {}
        for tool_id, queries in requests.items():
            bag: Counter[str] = Counter()
            for query in queries:
                bag.update(_bag(query))
            asked[tool_id] = Counter({word: count for word, count in bag.items() if count > 1 or len(queries) < 5})
        documents = Counter(word for bag in texts.values() for word in bag)
        documents.update(word for bag in asked.values() for word in bag)
        total = len(texts) + len(asked)
        self._weights = {word: math.log(total / count) for word, count in documents.items()}
        self._texts = {tool_id: self._vector(bag) for tool_id, bag in texts.items()}
        self._asked = {tool_id: self._vector(bag) for tool_id, bag in asked.items()}

    def _vector(self, bag: Mapping[str, float]) -> Vector:
        weighted = {
            word: math.sqrt(count) * self._weights[word] for word, count in bag.items() if word in self._weights
        }
        norm = math.sqrt(sum(value * value for value in weighted.values())) or 1.0
        return {word: value / norm for word, value in weighted.items()}

    def likeness(self, first: str, second: str) -> float:
        """Cosine of the two tools' words: the largest over their descriptions and their requests."""
        sides = [
            (left, right)
            for left in (self._texts.get(first), self._asked.get(first))
            for right in (self._texts.get(second), self._asked.get(second))
            if left and right
        ]
        return max((_dot(left, right) for left, right in sides), default=0.0)

    def conflict(self, first: str, second: str, threshold: float = 0.36) -> bool:
        """Whether a registry with both tools would be ambiguous: sister services, or words too much alike.

        Tools of one service, and of two different families of services, are told apart by their makers: no conflict.
        Nor do tools of one source for which the data names those that are alike.
        """
        one, two = self._tools[first], self._tools[second]
        if self._groups.get(first, set()) & self._groups.get(second, set()):
            return True
        if one.source == two.source and one.source in self._grouped:
            return False
        if family(one) and family(two):
            return family(one) == family(two) != "Services" and one.domain != two.domain
        if one.source == two.source == "computer":
            return False
        return self.likeness(first, second) >= threshold

    def serves(self, tool: str, wanted: str, threshold: float = 0.27) -> bool:
        """Whether `tool` might serve requests for `wanted`, which is missing: the same family, or similar words."""
        one, two = self._tools[tool], self._tools[wanted]
        if self._groups.get(tool, set()) & self._groups.get(wanted, set()):
            return True
        if family(one) and family(two):
            return family(one) == family(two)
        return self.likeness(tool, wanted) >= threshold


def _dot(left: Vector, right: Vector) -> float:
    if len(left) > len(right):
        left, right = right, left
    return sum(value * right[word] for word, value in left.items() if word in right)
