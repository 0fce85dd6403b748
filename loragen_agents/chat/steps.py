"""One step of the specialised model while it is decoded: its events as they become certain, then the outcome.

Between the settings of a call and LangChain's messages. Knows neither LangChain's model class nor where models come
from.
"""

import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from langchain_core.messages.ai import InputTokenDetails, UsageMetadata

from loragen_agents.chat.messages import AnswerText, Conversation
from loragen_agents.chat.settings import CallSettings
from loragen_agents.conversation.react import Answer, AnswerDelta, InvalidStep, Step, StepEvent, StepStream
from loragen_agents.edge.decoding import Completion
from loragen_agents.specialization.specialize import Specialization


@dataclass(frozen=True)
class StepOutcome:
    """How a step ended.

    Attributes:
        step: what the model said.
        metadata: figures of the way there, for `response_metadata`.
        usage: its tokens.
    """

    step: Step
    metadata: dict[str, Any]
    usage: UsageMetadata


def decode_step(
    call: CallSettings,
    conversation: Conversation,
    specialization: Specialization,
    names: Mapping[str, Any],
    cancel: threading.Event | None = None,
    started: float | None = None,
) -> Generator[StepEvent | StepOutcome, None, None]:
    """Decode the next step of a conversation. Closing the generator stops the decoding.

    Args:
        call: its settings.
        conversation: what the messages said.
        specialization: the model, specialised on the call's tools.
        names: first entries of the metadata: what the models are called.
        cancel: set it, from any thread, to stop before the next token; the outcome then has what was written.
        started: when the call began, by `time.perf_counter`; by default now.

    Yields:
        What has become certain, then the outcome. A call of which parts were given may still be invalid in the outcome.

    Raises:
        PromptError: the conversation is too long for the model.
        GrammarError: the tools or the tool choice can't be turned into a grammar.
    """
    begun = time.perf_counter()
    started = begun if started is None else started
    reader, answer = StepStream(call.registry), AnswerText(call.stop)
    decoding = specialization.model.stream(
        conversation.turns,
        call.sampling,
        grammar=call.grammar,
        tool_choice=call.tool_choice,
        score_tools=call.score_tools,
        cancel=cancel,
    )
    try:
        for delta in decoding:
            yield from _before_stop(reader.feed(delta), answer)
            if reader.finished or answer.stopped:
                break
    finally:
        decoding.close()
    yield from _before_stop(reader.flush(), answer)
    if piece := answer.flush():
        yield AnswerDelta(piece)
    completion = decoding.completion
    complete = completion.finish_reason == "stop" or reader.finished or answer.stopped
    step = reader.close(cut_off=not complete)
    if isinstance(step, Answer):
        step = Answer(answer.text)
    metadata: dict[str, Any] = {
        **names,
        "finish_reason": "stop" if complete else completion.finish_reason,
        **_figures(specialization, completion),
        "step_ms": round((time.perf_counter() - begun) * 1000, 1),
        "total_ms": round((time.perf_counter() - started) * 1000, 1),
    }
    if specialization.weights_are_zero:
        metadata["untrained"] = True
    if isinstance(step, InvalidStep):
        metadata["invalid_step"] = step.error
    if conversation.left_out:
        metadata["left_out"] = list(conversation.left_out)
    if decoding.tools is not None:
        metadata["tool_call_probability"] = decoding.tools.calls_tool
        metadata["tool_probabilities"] = decoding.tools.tools
    yield StepOutcome(step, metadata, _usage(completion))


def _before_stop(events: Iterable[StepEvent], answer: AnswerText) -> Iterator[StepEvent]:
    """The events, those of an answer cut at the caller's stop texts."""
    for event in events:
        if not isinstance(event, AnswerDelta):
            yield event
        elif piece := answer.feed(event.text):
            yield AnswerDelta(piece)


def _figures(specialization: Specialization, completion: Completion) -> dict[str, Any]:
    prompt = completion.prompt_tokens
    return {
        "prompt_tokens": prompt,
        "definition_tokens": specialization.definition_tokens,
        "compression_ratio": round((prompt + specialization.definition_tokens) / prompt, 2),
        "specialization": specialization.source,
        "specialize_ms": round(specialization.seconds * 1000, 1),
        "first_token_ms": round((completion.first_token_seconds or 0.0) * 1000, 1),
    }


def _usage(completion: Completion) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=completion.prompt_tokens,
        output_tokens=len(completion.token_ids),
        total_tokens=completion.prompt_tokens + len(completion.token_ids),
        input_token_details=InputTokenDetails(cache_read=completion.cached_tokens),
    )
