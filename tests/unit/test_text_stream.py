"""Text from tokens as they come: whole characters, stop strings, blanks at the beginning."""

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from loragen_agents.edge.text_stream import TextStream
from tests.tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def test_holds_back_what_is_not_settled() -> None:
    ids = TOKENIZER.encode("é€😀 ok\nObservation: x", add_special_tokens=False)
    text = TextStream(TOKENIZER, TOKENIZER.encode("a tool?"), stop=("\nObservation:",))
    seen = []
    for token in ids:
        text.push(token)
        seen.append(text.ready())
        assert "\ufffd" not in seen[-1]
    assert text.stopped
    assert "".join(seen) == text.text == "é€😀 ok"
    # A beginning that comes to nothing is released; a closing text goes only at the very end.
    text = TextStream(TOKENIZER, [], stop=("abc",), held=("\nend",))
    pieces = []
    for token in TOKENIZER.encode("ab\nend\nab x\nend", add_special_tokens=False):
        text.push(token)
        pieces.append(text.ready())
    assert "".join(pieces) == "ab\nend\nab x"
    text.finish(closing="\nend")
    assert (text.ready(), text.text) == ("", "ab\nend\nab x")
    # Bytes that never become a character come out at the end.
    broken = TOKENIZER.encode("€", add_special_tokens=False)[:1]
    text = TextStream(TOKENIZER, [], stop=())
    text.push(broken[0])
    assert text.ready() == ""
    text.finish()
    assert text.ready() == "\ufffd"


def test_keeps_the_blank_that_some_tokenizers_drop() -> None:
    """A Metaspace decoder strips the blank at the beginning of a text, which a completion is not."""
    vocabulary = {"▁tool": 0, "?": 1, "▁Yes": 2, "▁No": 3, "x": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="x"))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer.decode([2, 3]) == "Yes No"
    text = TextStream(tokenizer, [0, 1])
    pieces = []
    for token in (2, 4, 3, 3):
        text.push(token)
        pieces.append(text.ready())
    assert pieces == [" Yes", "x", " No", " No"]
