"""Conversations and registries to prompts: text for the cloud side, token ids for the edge side.

The edge prompt is the user's turn and nothing else; it always ends in `THOUGHT_QUESTION`, and the model writes on from
there. A prompt for the next step begins with the very tokens of the one before (unless the model itself wrote a line
that is quoted now), so a KV cache can be kept. What comes from outside (requests, observations, tool definitions) is
tokenised with control tokens switched off, and its lines that begin like a step get a quote mark: it can't open a role,
close a turn or pass for a step, whatever it says.

Knows the tokenizer's chat template, but no model, no weights and no LangChain. How the model's own text is read is
`react`'s part.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from loragen_agents.conversation.chat_template import TurnMarkers, turn_markers
from loragen_agents.conversation.outside_text import quote_steps
from loragen_agents.conversation.plain_tokens import PlainTokenizer, live_backend
from loragen_agents.conversation.react import THOUGHT_QUESTION, answer_text, observation_text, tool_step_text
from loragen_agents.conversation.templates import Templates, shown_tool
from loragen_agents.conversation.turns import TakenStep, Turn
from loragen_agents.errors import PromptError
from loragen_agents.registry import ToolRegistry
from loragen_agents.support.content import content_folder

__all__ = ["THOUGHT_QUESTION", "PromptRenderer", "TakenStep", "Turn", "TurnMarkers"]


class _Piece(NamedTuple):
    """A stretch of prompt that is tokenised on its own; only in markers are control tokens live."""

    text: str
    marker: bool = False


# Compiling them takes longer than all else that a renderer needs, and they are the same for every tokenizer.
_own_templates = lru_cache(Templates)


class PromptRenderer:
    """Renders prompts for one tokenizer. Safe to use from several threads.

    Attributes:
        markers: the control text around turns.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        prompts_folder: folder with definitions.jinja, user_turn.jinja and react.jinja; by default the package's own.

    Raises:
        PromptError: the tokenizer has no fast backend, its chat template doesn't show where turns begin and end, or a
            prompt template is missing or damaged.
    """

    def __init__(self, tokenizer: Any, prompts_folder: Path | None = None) -> None:
        live = live_backend(tokenizer)
        self.markers = turn_markers(tokenizer, live)
        self._marker_ids = {
            text: list(live.encode(text, add_special_tokens=False).ids) for text in vars(self.markers).values()
        }
        marker_ids = [token for ids in self._marker_ids.values() for token in ids]
        self._plain = PlainTokenizer(tokenizer, live, marker_ids)
        self._eos: int | None = tokenizer.eos_token_id
        self._templates = Templates(prompts_folder) if prompts_folder else _own_templates(content_folder("prompts"))

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Control tokens that end the assistant's turn: the first of `assistant_close`, and eos where it is another."""
        first = self._marker_ids[self.markers.assistant_close][:1]
        ends = [token for token in first if token in self._plain.control]
        return tuple(dict.fromkeys(ends + ([self._eos] if self._eos is not None else [])))

    def definitions(self, registry: ToolRegistry, system_text: str = "") -> str:
        """The text that the cloud side reads: role, tool definitions and step format (GPT4Tools' parts 1 and 2).

        Tool definitions come from outside too: tokenise the result with `encode_text`.
        """
        return self._templates.render("definitions.jinja", **self._definition_fields(registry, system_text))

    def user_turn(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids of the edge prompt: the user's turns alone, ending in `THOUGHT_QUESTION`.

        Raises:
            PromptError: no turn, an earlier turn without an answer, or a last one with an answer.
        """
        return self._encode(self._user_turn_pieces(turns))

    def user_turn_with_starts(self, turns: Sequence[Turn]) -> tuple[list[int], str, list[int]]:
        """As `user_turn`, with the prompt as text and the place in it of the first character of every token."""
        return self._encode_with_starts(self._user_turn_pieces(turns))

    def user_turn_text(self, turns: Sequence[Turn]) -> str:
        """The same prompt as text, for people. Tokenising it again is not safe: control tokens in it would be live."""
        return "".join(piece.text for piece in self._user_turn_pieces(turns))

    def request_place(self, turns: Sequence[Turn]) -> tuple[int, int]:
        """Where the last turn's request begins and ends in `user_turn_text`; the same place twice if it stands nowhere.

        A template may change a request, and lines of it that begin like a step are quoted.
        """
        # Steps behind the request may hold its words again.
        request = _quoted(turns[-1]).request
        begin = self.user_turn_text([*turns[:-1], Turn(turns[-1].request)]).rfind(request)
        return (0, 0) if begin < 0 else (begin, begin + len(request))

    def full_react(self, registry: ToolRegistry, turns: Sequence[Turn], system_text: str = "") -> list[int]:
        """Token ids of the baselines' prompt: definitions and conversation in one user turn, ending in the same place.

        Of earlier turns only request and answer are shown, as in GPT4Tools.

        Raises:
            PromptError: as `user_turn`.
        """
        return self._encode(self._react_pieces(registry, turns, system_text))

    def full_react_text(self, registry: ToolRegistry, turns: Sequence[Turn], system_text: str = "") -> str:
        """The baselines' prompt as text, for people."""
        return "".join(piece.text for piece in self._react_pieces(registry, turns, system_text))

    def encode_text(self, text: str) -> list[int]:
        """Token ids of text from outside: control tokens in it come out as the characters they are written with.

        Lone surrogates, which no tokenizer takes, become U+FFFD.
        """
        return self.encode_with_starts(text)[0]

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """As `encode_text`, and the place in `text` of the first character of every token."""
        return self._plain.encode_with_starts(text)

    def _user_turn_pieces(self, turns: Sequence[Turn]) -> Iterator[_Piece]:
        _check(turns)
        yield _Piece(self.markers.bos, marker=True)
        for turn in map(_quoted, turns):
            yield _Piece(self.markers.user_open, marker=True)
            yield _Piece(self._templates.render("user_turn.jinja", request=turn.request))
            yield _Piece(self.markers.user_close, marker=True)
            yield from self._assistant_pieces(turn)

    def _react_pieces(self, registry: ToolRegistry, turns: Sequence[Turn], system_text: str) -> Iterator[_Piece]:
        _check(turns)
        turns = [*map(_quoted, turns)]
        fields = self._definition_fields(registry, system_text)
        yield _Piece(self.markers.bos, marker=True)
        yield _Piece(self.markers.user_open, marker=True)
        yield _Piece(self._templates.render("react.jinja", earlier=turns[:-1], request=turns[-1].request, **fields))
        yield _Piece(self.markers.user_close, marker=True)
        yield from self._assistant_pieces(turns[-1])

    def _assistant_pieces(self, turn: Turn) -> Iterator[_Piece]:
        # Pieces end exactly where a prompt ends and where generation stops. So the next prompt's tokens begin with this
        # prompt's, and what the model wrote in between is tokenised as a unit, the way it was generated.
        lead = THOUGHT_QUESTION
        for step in turn.steps:
            yield _Piece(lead)
            yield _Piece(tool_step_text(step.action, step.action_input))
            lead = observation_text(step.observation)
        yield _Piece(lead)
        if turn.answer is not None:
            yield _Piece(answer_text(turn.answer))
            yield _Piece(self.markers.assistant_close, marker=True)

    def _encode(self, pieces: Iterator[_Piece]) -> list[int]:
        return self._encode_with_starts(pieces)[0]

    def _encode_with_starts(self, pieces: Iterator[_Piece]) -> tuple[list[int], str, list[int]]:
        ids: list[int] = []
        text, starts = "", list[int]()
        for piece in pieces:
            if piece.marker:
                own = self._marker_ids[piece.text]
                places = [0] * len(own)
            else:
                own, places = self.encode_with_starts(piece.text)
            ids += own
            starts += [len(text) + place for place in places]
            text += piece.text
        return ids, text, starts

    def _definition_fields(self, registry: ToolRegistry, system_text: str) -> dict[str, Any]:
        return {
            "system_text": system_text.strip(),
            "tools": [shown_tool(tool, registry.input_format == "csv") for tool in registry],
            "csv": registry.input_format == "csv",
            "question": THOUGHT_QUESTION,
        }


def _check(turns: Sequence[Turn]) -> None:
    if not turns:
        raise PromptError("the conversation is empty; expected at least one request")
    for number, turn in enumerate(turns[:-1], start=1):
        if turn.answer is None:
            raise PromptError(
                f"turn {number} has no answer although another request follows; answer it or join the two"
            )
    if turns[-1].answer is not None:
        raise PromptError("the last turn is answered already; expected an open request")


def _quoted(turn: Turn) -> Turn:
    """The turn with a quote mark before all lines of outside text that begin like a step."""
    steps = tuple(
        TakenStep(quote_steps(step.action), quote_steps(step.action_input), quote_steps(step.observation))
        for step in turn.steps
    )
    answer = None if turn.answer is None else quote_steps(turn.answer)
    return Turn(quote_steps(turn.request, at_line_start=True), steps, answer)
