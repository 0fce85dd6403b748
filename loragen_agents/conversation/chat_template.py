"""Where turns begin and end, found out from a tokenizer's chat template.

The template is rendered with stand-in messages, and the text around these is split into markers. Knows chat templates
and token boundaries, but nothing of steps.
"""

from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from loragen_agents.conversation.plain_tokens import tokenizer_name
from loragen_agents.errors import PromptError

_SENTINELS = ("loragenfirstrequest", "loragenanswer", "loragensecondrequest")


@dataclass(frozen=True)
class TurnMarkers:
    """The control text around turns.

    Attributes:
        bos: before the first turn.
        user_open: before a request.
        user_close: behind a request; includes the opening of the assistant's turn.
        assistant_close: behind an answer.
    """

    bos: str
    user_open: str
    user_close: str
    assistant_close: str


def turn_markers(tokenizer: Any, live: Tokenizer) -> TurnMarkers:
    """The markers of a tokenizer's chat template; plain lines (`Human: ...`) where it has none.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        live: its backend with control tokens live.

    Raises:
        PromptError: the template refuses a conversation, or doesn't show where turns begin and end.
    """
    return _template_markers(tokenizer, live) if tokenizer.chat_template else _plain_markers(tokenizer)


def _plain_markers(tokenizer: Any) -> TurnMarkers:
    """Lines in place of a chat template; only the end-of-text token, if there is one, closes an answer for certain."""
    ids = tokenizer("a").input_ids
    has_bos = tokenizer.bos_token is not None and ids[0] == tokenizer.bos_token_id
    return TurnMarkers(str(tokenizer.bos_token) if has_bos else "", "Human: ", "\n", f"{tokenizer.eos_token or ''}\n")


def _template_markers(tokenizer: Any, live: Tokenizer) -> TurnMarkers:
    first, answer, second = _SENTINELS
    name = tokenizer_name(tokenizer)
    turns = [{"role": "user", "content": first}, {"role": "assistant", "content": answer}]
    dialogue = _render(tokenizer, [*turns, {"role": "user", "content": second}], opening=True)
    closed = _render(tokenizer, turns, opening=False)
    for sentinel in _SENTINELS:
        if dialogue.count(sentinel) != 1 or (sentinel != second and closed.count(sentinel) != 1):
            raise PromptError(f"{name}: its chat template doesn't show each message once and as it stands")
    head, rest = dialogue.split(first)
    between, user_close = rest.split(answer)[1].split(second)
    tail = closed.split(answer)[1]
    bos = tokenizer.bos_token or ""
    # Between an answer and the next request stand the answer's end and the request's opening; where one stops and
    # the other begins, the end of a closed conversation tells, or else the beginning of the first request.
    candidates = [tail, _common_start(live, tail, between), between[: max(0, len(between) - len(head))]]
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
        f"{name}: can't tell where turns begin and end in its chat template (before the first request: "
        f"{head!r}, between turns: {between!r}); give the tokenizer a template that treats all turns alike"
    )


def _render(tokenizer: Any, messages: list[dict[str, str]], opening: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opening))
    except Exception as error:
        raise PromptError(
            f"{tokenizer_name(tokenizer)}: its chat template refuses a conversation of two turns: {error}"
        ) from error


def _common_start(live: Tokenizer, one: str, other: str) -> str:
    """The longest text that both begin with and that ends at a token boundary of both."""
    ends = [{0, *(end for _, end in live.encode(text, add_special_tokens=False).offsets)} for text in (one, other)]
    return max((one[:end] for end in ends[0] & ends[1] if one[:end] == other[:end]), key=len)
