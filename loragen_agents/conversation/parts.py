"""Stretches of a request that may be requests of their own: "dim the lights and play jazz" has two.

Told by words alone: a part opens like a request, with a verb or a question word, and does not refer back to what was
said before it ("and delete it"). Whether each part asks for a tool is for whoever scores tools to say. English only.
"""

import re
from dataclasses import dataclass

_MOST_CHARACTERS, _MOST_PARTS = 400, 6

_JOINT = re.compile(
    r"""(?P<sentence>(?<=[.;!?])\s+(?:(?:and\s+then|then|also|next|after\s+that|once\s+that\s+is\s+done)[,:]?\s+)?)
    |\s*[,;]?\s+(?:and\s+then|and\s+also|and\s+please|and|then|also|plus|after\s+that)\s+
    |\s*,\s+""",
    re.VERBOSE | re.IGNORECASE,
)
_POLITE = re.compile(
    r"""(?:(?:hey|hi|hello|ok|okay|please|kindly|now|then|also|first|next|just|and)[,!.]?\s+
    |(?:can|could|would|will)\s+you\s+(?:(?:please|kindly|also)\s+)?
    |(?:can|could|may)\s+i\s+(?:please\s+)?
    |i(?:\s+(?:want|need|would\s+like)|'d\s+like)\s+(?:you\s+)?to\s+
    |let's\s+|let\s+us\s+|help\s+me\s+(?:to\s+)?)+""",
    re.VERBOSE | re.IGNORECASE,
)
_REFERS_BACK = re.compile(
    r"\b(?:it|its|it's|them|they|their|that|that's|this|these|those|ones?|there|same|instead|too|each|both|either"
    r"|he|him|his|she|her|results?|afterwards)\b",
    re.IGNORECASE,
)
# What follows these is told to somebody or written down, whatever it asks for: "remind me to buy milk and call Ann".
_TAKES_TEXT = re.compile(
    r"\b(?:remind|remember|reminder|note|tell(?!\s+(?:me|us)\b)|text|message|write|say|saying|says|translate|dictate"
    r"|type|tweet|post|summari[sz]e|reply|ask)\b|[:“”\"]|(?<!\w)'|\bto-?do\b",
    re.IGNORECASE,
)
# Words that requests open with: what people ask machines to do, and question words.
_OPENING_WORDS = """
activate add adjust alert arm arrange ask begin block book bookmark brighten bring brew browse build buy calculate
call cancel change charge check clean clear close compose compute connect convert copy count create cut deactivate
decrease delete dim disable disarm disconnect display download draft draw drop email empty enable end erase
extract feed fetch file fill find finish flip forward get give go halt heat hide hold import increase install
insert invite join kill launch lift list listen locate lock log look lower mail make mark message mix move mute
name notify open order organize park pause pay pick play plot post preheat press print pull purchase put query
raise read recommend record reduce refresh refund remind remove rename repeat replace reply report request
reschedule reserve reset resize restart resume retrieve return rotate run save scan schedule search select
sell send set share show shuffle shut sign skip slow snooze solve sort speed spin start stop store submit suggest
summarize swap switch sync take tell test text toggle track transfer translate trim turn unlock unmute unpause
unplug update upgrade upload use vacuum volume wake warm wash watch water write zip
are did do does how is what what's whats which who who's will
"""
_OPENERS = frozenset(_OPENING_WORDS.split())
_WORD = re.compile(r"[A-Za-z']+")


@dataclass(frozen=True)
class Part:
    """A stretch of a request that may be a request of its own.

    Attributes:
        text: the words of it, without those that join it to the part before.
        sentence: whether a new sentence begins with it.
    """

    text: str
    sentence: bool


def parts_of(request: str) -> tuple[Part, ...]:
    """The stretches that may be requests, in order; what belongs to none of its own stays with the one before.

    Returns:
        At least two; nothing where the request is one.
    """
    if len(request) > _MOST_CHARACTERS or not _opens(request):
        return ()
    takes_text = _TAKES_TEXT.search(request)
    parts: list[Part] = []
    begin, sentence = 0, False
    for joint in _JOINT.finditer(request):
        if takes_text and takes_text.end() <= joint.start():
            break
        if _opens(request[joint.end() :]) and not _refers_back(request, joint.end()):
            parts.append(Part(request[begin : joint.start()].strip(), sentence))
            begin, sentence = joint.end(), joint["sentence"] is not None
    parts.append(Part(request[begin:].strip(), sentence))
    return tuple(parts) if 2 <= len(parts) <= _MOST_PARTS else ()


def _opens(text: str) -> bool:
    """Whether text begins like a request."""
    text = text.lstrip()
    polite = _POLITE.match(text)
    word = _WORD.match(text, polite.end() if polite else 0)
    return word is not None and word.group().lower() in _OPENERS


def _refers_back(request: str, begin: int) -> bool:
    """Whether what begins here, up to the next joint, refers to something before it."""
    joint = _JOINT.search(request, begin)
    return _REFERS_BACK.search(request, begin, joint.start() if joint else len(request)) is not None
