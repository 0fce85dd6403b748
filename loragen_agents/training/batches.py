"""Episodes to token ids: every target token knows which part of a step it belongs to.

Knows tokenizers and episodes, no model and no loss.
"""

from dataclasses import dataclass

from loragen_agents.conversation.prompts import PromptRenderer
from loragen_agents.data.episodes import Episode, Part, Sample, target_parts

PARTS: tuple[Part, ...] = ("decision", "format", "name", "arguments", "answer")


@dataclass(frozen=True)
class TokenizedSample:
    """A sample as token ids.

    Attributes:
        input_ids: prompt and target.
        parts: index into `PARTS` of each target token.
        choice: index of the gold tool in the registry, None where the gold is an answer.
        action_place: index in `input_ids` of the last token of `Action:`, None where the gold is an answer.
        opening: whether no step has been taken in the open turn, so that the request alone decides.
    """

    input_ids: list[int]
    parts: list[int]
    choice: int | None
    action_place: int | None
    opening: bool = True

    @property
    def prompt_length(self) -> int:
        """Tokens before the target."""
        return len(self.input_ids) - len(self.parts)


def tokenize_sample(
    renderer: PromptRenderer, episode: Episode, sample: Sample, definitions_in_prompt: bool = False
) -> TokenizedSample:
    """Tokenise prompt and target; the target as one text, the way the model is to generate it."""
    pieces = target_parts(sample, episode.registry)
    ids, starts = renderer.encode_with_starts("".join(piece.text for piece in pieces))
    ends, end = [], 0
    for piece in pieces:
        end += len(piece.text)
        ends.append(end)
    parts: list[int] = []
    first: dict[str, int] = {}
    for index, start in enumerate(starts):
        piece_index = next(n for n, end in enumerate(ends) if start < end)
        part = pieces[piece_index].part
        parts.append(PARTS.index(part))
        first.setdefault(part, index)
    if definitions_in_prompt:
        prompt = renderer.full_react(episode.registry, sample.turns)
    else:
        prompt = renderer.user_turn(sample.turns)
    opening = not sample.turns[-1].steps
    if isinstance(sample.gold, str):
        ids.append(renderer.end_token_ids[0])
        parts.append(PARTS.index("answer"))
        return TokenizedSample(prompt + ids, parts, None, None, opening)
    choice = episode.registry.names.index(sample.gold.name)
    return TokenizedSample(prompt + ids, parts, choice, len(prompt) + first["name"] - 1, opening)
