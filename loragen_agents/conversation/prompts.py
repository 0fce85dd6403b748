"""Conversations and registries to prompts: text for the cloud side, token ids for the edge side.

The edge prompt is the user's turn and nothing else; it always ends in `THOUGHT_QUESTION`, and the model writes on from
there. A prompt for the next step begins with the very tokens of the one before (unless the model itself wrote a line
that is quoted now), so a KV cache can be kept. What comes from outside (requests, observations, tool definitions) is
tokenised with control tokens switched off, and its lines that begin like a step get a quote mark: it can't open a role,
close a turn or pass for a step, whatever it says.

Knows the tokenizer's chat template, but no model, no weights and no LangChain. How the model's own text is read is
`react`'s part.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from loragen_agents.conversation.outside_text import one_line, quote_steps
from loragen_agents.conversation.react import THOUGHT_QUESTION, answer_text, tool_step_text
from loragen_agents.errors import PromptError
from loragen_agents.registry import Tool, ToolRegistry, json_schema
from loragen_agents.support.content import content_folder

__all__ = ["THOUGHT_QUESTION", "PromptRenderer", "TakenStep", "Turn", "TurnMarkers"]

_SENTINELS = ("loragenfirstrequest", "loragenanswer", "loragensecondrequest")
_TYPE_WORDS = {"string": "text", "boolean": "true or false", "array": "list", "null": "nothing"}


@dataclass(frozen=True)
class TakenStep:
    """A tool call that was made, and what the tool reported."""

    action: str
    action_input: str
    observation: str


@dataclass(frozen=True)
class Turn:
    """A request, the steps taken for it, and the answer; the last turn of a conversation has no answer yet."""

    request: str
    steps: tuple[TakenStep, ...] = ()
    answer: str | None = None


@dataclass(frozen=True)
class TurnMarkers:
    """The control text around turns. user_close includes the opening of the assistant's turn."""

    bos: str
    user_open: str
    user_close: str
    assistant_close: str


class _Piece(NamedTuple):
    """A stretch of prompt that is tokenised on its own; only in markers are control tokens live."""

    text: str
    marker: bool = False


class _Argument(NamedTuple):
    name: str
    note: str


class _ToolView(NamedTuple):
    name: str
    description: str
    arguments: list[_Argument]


class PromptRenderer:
    """Renders prompts for one tokenizer. Safe to use from several threads.

    tokenizer: a fast Hugging Face tokenizer. The renderer works on copies of its backend, whose settings nobody else
        can change.
    prompts_folder: folder with definitions.jinja, user_turn.jinja and react.jinja; default: the package's own.

    Raises:
        PromptError: the tokenizer has no fast backend, its chat template doesn't show where turns begin and end, or a
            prompt template is missing or damaged.
    """

    def __init__(self, tokenizer: Any, prompts_folder: Path | None = None) -> None:
        self.prompts_folder = prompts_folder or content_folder("prompts")
        self.name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise PromptError(f"{self.name}: the tokenizer has no fast backend; use a model with a tokenizer.json")
        self._live = Tokenizer.from_str(backend.to_str())
        self._live.no_padding()
        self._live.no_truncation()
        self._live.encode_special_tokens = False
        self.markers = _plain_markers(tokenizer) if not tokenizer.chat_template else self._template_markers(tokenizer)
        self._marker_ids = {text: self._encode_live(text) for text in vars(self.markers).values()}
        self._outside, self._control = self._outside_tokenizer(tokenizer)
        self._templates = ImmutableSandboxedEnvironment(
            loader=jinja2.FileSystemLoader(self.prompts_folder),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,
        )
        for template in ("definitions.jinja", "user_turn.jinja", "react.jinja"):
            self._template(template)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Control tokens that end the assistant's turn: the first of `assistant_close`, and eos where it is another."""
        first = self._marker_ids[self.markers.assistant_close][:1]
        ends = [token for token in first if token in self._control]
        return tuple(dict.fromkeys(ends + ([self._eos] if self._eos is not None else [])))

    def definitions(self, registry: ToolRegistry, system_text: str = "") -> str:
        """The text that the cloud side reads: role, tool definitions and step format (GPT4Tools' parts 1 and 2).

        Tool definitions come from outside too: tokenise the result with `encode_text`.
        """
        return self._render("definitions.jinja", **self._definition_fields(registry, system_text))

    def user_turn(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids of the edge prompt: the user's turns alone, ending in `THOUGHT_QUESTION`.

        Raises:
            PromptError: no turn, an earlier turn without an answer, or a last one with an answer.
        """
        return self._encode(self._user_turn_pieces(turns))

    def user_turn_text(self, turns: Sequence[Turn]) -> str:
        """The same prompt as text, for people. Tokenising it again is not safe: control tokens in it would be live."""
        return "".join(piece.text for piece in self._user_turn_pieces(turns))

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
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids: list[int] = []
        starts: list[int] = []
        done = 0
        while text:
            encoding = self._outside.encode(text, add_special_tokens=False)
            cut = None
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if token in self._control and text[start:end].strip() == self._control[token]:
                    cut = start + 1
                    break
            if cut is None:
                return ids + encoding.ids, starts + [done + start for start, _ in encoding.offsets]
            # Some vocabularies (Unigram) hold control tokens as ordinary pieces; split inside, none is left.
            if cut >= len(text) and cut == start + len(self._control[token]):
                raise PromptError(f"{self.name}: the control token {text!r} is a single character and can't be quoted")
            encoding = self._outside.encode(text[:cut], add_special_tokens=False)
            ids += encoding.ids
            starts += [done + start for start, _ in encoding.offsets]
            text, done = text[cut:], done + cut
        return ids, starts

    def _user_turn_pieces(self, turns: Sequence[Turn]) -> Iterator[_Piece]:
        _check(turns)
        yield _Piece(self.markers.bos, marker=True)
        for turn in map(_quoted, turns):
            yield _Piece(self.markers.user_open, marker=True)
            yield _Piece(self._render("user_turn.jinja", request=turn.request))
            yield _Piece(self.markers.user_close, marker=True)
            yield from self._assistant_pieces(turn)

    def _react_pieces(self, registry: ToolRegistry, turns: Sequence[Turn], system_text: str) -> Iterator[_Piece]:
        _check(turns)
        turns = [*map(_quoted, turns)]
        fields = self._definition_fields(registry, system_text)
        yield _Piece(self.markers.bos, marker=True)
        yield _Piece(self.markers.user_open, marker=True)
        yield _Piece(self._render("react.jinja", earlier=turns[:-1], request=turns[-1].request, **fields))
        yield _Piece(self.markers.user_close, marker=True)
        yield from self._assistant_pieces(turns[-1])

    def _assistant_pieces(self, turn: Turn) -> Iterator[_Piece]:
        # Pieces end exactly where a prompt ends and where generation stops. So the next prompt's tokens begin with this
        # prompt's, and what the model wrote in between is tokenised as a unit, the way it was generated.
        lead = THOUGHT_QUESTION
        for step in turn.steps:
            yield _Piece(lead)
            yield _Piece(tool_step_text(step.action, step.action_input))
            lead = f" {step.observation}\n{THOUGHT_QUESTION}"
        yield _Piece(lead)
        if turn.answer is not None:
            yield _Piece(answer_text(turn.answer))
            yield _Piece(self.markers.assistant_close, marker=True)

    def _encode(self, pieces: Iterator[_Piece]) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            ids += self._marker_ids[piece.text] if piece.marker else self.encode_text(piece.text)
        return ids

    def _encode_live(self, text: str) -> list[int]:
        return list(self._live.encode(text, add_special_tokens=False).ids)

    def _outside_tokenizer(self, tokenizer: Any) -> tuple[Tokenizer, dict[int, str]]:
        """A tokenizer for which control tokens are plain text, and the control tokens: id to spelling."""
        in_markers = {token for ids in self._marker_ids.values() for token in ids}
        settings = json.loads(self._live.to_str())
        control: dict[int, str] = {}
        for token in settings.get("added_tokens", ()):
            content = token["content"]
            # A turn marker may be an added token without the special flag; the "\n" of a marker is no control token.
            if token["id"] in in_markers and content.strip() and not content.strip().isalnum():
                token["special"] = True
            if token["special"]:
                control[token["id"]] = content
        for content in tokenizer.all_special_tokens:
            control.setdefault(tokenizer.convert_tokens_to_ids(content), content)
        self._eos: int | None = tokenizer.eos_token_id
        outside = Tokenizer.from_str(json.dumps(settings))
        outside.encode_special_tokens = True
        return outside, control

    def _template_markers(self, tokenizer: Any) -> TurnMarkers:
        first, answer, second = _SENTINELS
        turns = [{"role": "user", "content": first}, {"role": "assistant", "content": answer}]

        def render(messages: list[dict[str, str]], opening: bool) -> str:
            try:
                return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening))
            except Exception as error:
                raise PromptError(
                    f"{self.name}: its chat template refuses a conversation of two turns: {error}"
                ) from error

        dialogue = render([*turns, {"role": "user", "content": second}], opening=True)
        closed = render(turns, opening=False)
        for sentinel in _SENTINELS:
            if dialogue.count(sentinel) != 1 or (sentinel != second and closed.count(sentinel) != 1):
                raise PromptError(f"{self.name}: its chat template doesn't show each message once and as it stands")
        head, rest = dialogue.split(first)
        between, user_close = rest.split(answer)[1].split(second)
        tail = closed.split(answer)[1]
        bos = tokenizer.bos_token or ""
        # Between an answer and the next request stand the answer's end and the request's opening; where one stops and
        # the other begins, the end of a closed conversation tells, or else the beginning of the first request.
        candidates = [tail, self._common_start(tail, between), between[: max(0, len(between) - len(head))]]
        if bos and head.startswith(bos):
            candidates.append(between[: max(0, len(between) - len(head.removeprefix(bos)))])
        for assistant_close in candidates:
            user_open = between[len(assistant_close) :]
            if not between.startswith(assistant_close) or not head.endswith(user_open):
                continue
            before = head[: len(head) - len(user_open)]
            if not user_open and before not in ("", bos):
                continue
            # A bos that opens every turn (ChatML tokenizers name <|im_start|> so) is part of the turn's opening.
            has_bos = bool(bos) and before.startswith(bos) and not user_open.startswith(bos)
            return TurnMarkers(bos if has_bos else "", user_open, user_close, assistant_close)
        raise PromptError(
            f"{self.name}: can't tell where turns begin and end in its chat template (before the first request: "
            f"{head!r}, between turns: {between!r}); give the tokenizer a template that treats all turns alike"
        )

    def _common_start(self, one: str, other: str) -> str:
        """The longest text that both begin with and that ends at a token boundary of both."""
        ends = [
            {0, *(end for _, end in self._live.encode(text, add_special_tokens=False).offsets)} for text in (one, other)
        ]
        return max((one[:end] for end in ends[0] & ends[1] if one[:end] == other[:end]), key=len)

    def _definition_fields(self, registry: ToolRegistry, system_text: str) -> dict[str, Any]:
        return {
            "system_text": system_text.strip(),
            "tools": [_view(tool, registry.input_format == "csv") for tool in registry],
            "csv": registry.input_format == "csv",
            "question": THOUGHT_QUESTION,
        }

    def _template(self, name: str) -> jinja2.Template:
        try:
            return self._templates.get_template(name)
        except jinja2.TemplateNotFound as error:
            raise PromptError(f"{self.prompts_folder / name} is missing; put the template back") from error
        except jinja2.TemplateSyntaxError as error:
            where = f"{self.prompts_folder / (error.name or name)}, line {error.lineno}"
            raise PromptError(f"{where}: not a valid Jinja template: {error.message}") from error

    def _render(self, name: str, **fields: Any) -> str:
        try:
            return self._template(name).render(**fields)
        except jinja2.TemplateError as error:
            raise PromptError(f"{self.prompts_folder / name} can't be rendered: {error}") from error


def _plain_markers(tokenizer: Any) -> TurnMarkers:
    """Lines in place of a chat template; only the end-of-text token, if there is one, closes an answer for certain."""
    ids = tokenizer("a").input_ids
    has_bos = tokenizer.bos_token is not None and ids[0] == tokenizer.bos_token_id
    return TurnMarkers(str(tokenizer.bos_token) if has_bos else "", "Human: ", "\n", f"{tokenizer.eos_token or ''}\n")


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


def _view(tool: Tool, csv: bool) -> _ToolView:
    """What the templates show of a tool, each part on one line."""
    arguments = []
    for name, schema in tool.parameters["properties"].items():
        description = schema.get("description", "") if isinstance(schema, dict) else ""
        label = _type_label(schema, name in tool.required)
        parts = [] if csv and label == "text" and description else [label]
        if name not in tool.required:
            parts.append("optional")
        note = ", ".join(parts)
        if description:
            note = f"{note}: {description}" if note else description
        arguments.append(_Argument(one_line(name), _one_line(note).rstrip(".")))
    return _ToolView(tool.name, _one_line(tool.description), arguments)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _type_label(schema: Any, required: bool = True) -> str:
    """A few words for a schema: `text`, `one of "a", "b"`, `list of integer`, `object with "x" (number)`."""
    if not isinstance(schema, dict):
        return "anything"
    values = json_schema.constants(schema)
    if values is not None:
        shown = [json.dumps(value, ensure_ascii=False) for value in values if value is not None or required]
        return ("one of " if len(shown) > 1 else "") + ", ".join(shown)
    if isinstance(schema.get("$ref"), str):
        return str(schema["$ref"].rsplit("/", 1)[-1])
    for keyword in ("anyOf", "oneOf"):
        if isinstance(schema.get(keyword), list):
            options = [option for option in schema[keyword] if required or option != {"type": "null"}]
            return " or ".join(dict.fromkeys(_type_label(option) for option in options))
    named = schema.get("type", "anything")
    if isinstance(named, list):
        return " or ".join(_type_label({**schema, "type": kind}) for kind in named if required or kind != "null")
    if named == "array" and isinstance(schema.get("items"), dict) and schema["items"]:
        return f"list of {_type_label(schema['items'])}"
    if named == "object" and schema.get("properties"):
        inner = (f'"{name}" ({_type_label(value)})' for name, value in schema["properties"].items())
        return f"object with {', '.join(inner)}"
    return str(_TYPE_WORDS.get(named, named))
