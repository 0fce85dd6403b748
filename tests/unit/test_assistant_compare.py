"""The last turn decoded both ways, on a tiny random model: what is asked of the layers below, not what it says."""

from loragen_agents import LoRAGenChatModel
from loragen_agents.assistant.compare import compare
from loragen_agents.assistant.loading import warm_up
from loragen_agents.assistant.tools.catalog import chosen_tools
from loragen_agents.assistant.turns import Turn
from tests.scripted_chat import tool_context
from tests.tiny_chat import tiny_generator, tiny_language_model


def test_the_step_is_decoded_in_both_ways(tmp_path):
    edge = tiny_language_model(tmp_path / "model")
    model = LoRAGenChatModel(
        model=edge, cloud=edge, generator=tiny_generator(edge), max_tokens=24, specialization_cache=False
    )
    tools = chosen_tools(tool_context(tmp_path), ["today", "battery"])
    warm_up(model, tools, "Be brief.")
    ours, theirs = compare(model, tools, "Be brief.", [Turn("One", answer="Two"), Turn("What day is it?")], 1)
    assert theirs.prompt_tokens > 2 * ours.prompt_tokens > 0
    assert min(ours.first_token_ms, theirs.first_token_ms) > 0 and ours.step and theirs.step
