"""Dialogue as plain text, `NAME: line`, `名：「台词」`, or plays with the name alone above the speech, into speeches.

The hard part is to tell a name from other words before a colon, for a line of a speech may begin like that too.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import lru_cache

from persona.console import display_width
from persona.convert.formats.format import Text, TextFormat
from persona.convert.formats.scenes import MAX_SILENCE, NARRATOR, Script, Speech, fold_name
from persona.convert.inputs import Foreign
from persona.convert.options import Options

MAX_NAME_WIDTH = 30  # columns, so 15 Chinese characters: longer ones are sentences that end in a colon
MAX_NAME_WORDS = 5  # "Ghost of King Henry VI"
REGULAR_SHARE = 0.75  # of the lines begin with a name if each speech has a line of its own, with a few longer ones
_STOP = r":：。！？；!?;…“”\"「」『』<>|{}\[\]【】()（）\n"
_COMMA = re.compile("[,，、]")  # "Senators, &C" above a speech; before words on the same line it is a sentence
_HEAD = re.compile(
    rf"(?P<name>[^\s{_STOP}][^{_STOP}]{{0,60}}?)\s*+(?:[（(](?P<action>[^（）()\n]{{1,60}})[)）]\s*+)?[:：]"
    r"\s*(?P<text>(?!//).*)"
)
_BOLD = re.compile(r"^(?:\*\*|__)([^*_\n]{1,60}?)(?:([:：])\s*(?:\*\*|__)|(?:\*\*|__)\s*([:：]))\s*")  # Markdown
_SPACED = re.compile(
    r"^([^\s:：，。！？、,.!?…“”\"「」『』（）()]{1,8})\u3000+(?=\S)", re.MULTILINE
)  # printed Chinese plays
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Prof|Capt|Lt|Sgt|Jr|Sr|No|[A-Z])\.")
_NUMBER = r"(?:\d+|[IVXLC]+|one|two|three|four|five|six|seven|eight|nine|ten)"
_SCENE = re.compile(
    r"#{1,6}\s+\S.*|[=\-*_~—]{3,}|\*\s\*\s\*"
    r"|第[0-9０-９一二三四五六七八九十百千零〇两]+[集幕章场場回话話节節部卷](?:[\s:：、·.，—-].*)?"
    rf"|(?:act|scene|chapter|episode)\s+{_NUMBER}(?:\s*[.:：,—–-].*|\s+(?:act|scene)\b.*)?",
    re.IGNORECASE,
)
_BRACKETED = re.compile(r"（[^（）]*）|\([^()]*\)|\[[^\[\]]*\]|【[^【】]*】")
_QUOTES = {"「": "」", "『": "』", "“": "”", '"': '"'}
_BLANK, _BORDER, _DIRECTION, _LINE = range(4)


@dataclass(frozen=True, slots=True)
class _Line:
    kind: int
    text: str
    number: int
    head: re.Match[str] | None
    opens_block: bool  # follows an empty line, a scene head or a stage direction


def parse(text: str, characters: Collection[str] = (), narrated: bool = False, quotes: bool = False) -> Script:
    """The speeches of `text`; a name in `characters` before a colon is always a speaker.

    With `narrated`, lines without a speaker are speeches of NARRATOR; `quotes` keeps the quotes around speeches.
    """
    spaced = _SPACED.sub(r"\1：", text) if _is_spaced(text) else text
    lines = _classify(spaced)
    heads = [line for line in lines if line.head]
    alone = Counter(_name(line) for line in heads if line.opens_block and not _words(line))
    inline = Counter(_name(line) for line in heads if _words(line) or not line.opens_block)
    named = {fold_name(character) for character in characters}
    recurring = {name for name, count in (alone + inline).items() if count > 1} | named
    speakers = recurring | _guests(lines, recurring)
    opening = {_name(line) for line in heads if line.opens_block}
    is_play = alone.total() > sum(count for name, count in inline.items() if name in recurring | opening)

    def begins_speech(line: _Line) -> bool:
        if line.head is None:
            return False
        if is_play:  # verse is full of colons: only what opens a block can be a name
            return line.opens_block and (not _words(line) or _name(line) in alone)
        if _COMMA.search(line.head["name"]):
            return fold_name(line.head["name"]) in named
        return line.opens_block or _name(line) in speakers

    once = [] if is_play else [line.head["name"] for line in heads if line.head and not begins_speech(line)]
    script = _collect(lines, begins_speech, is_play, once, narrated, quotes)
    if spaced is not text:
        script.notes.append("a wide space after a name was read as a colon")
    return script


def _is_spaced(text: str) -> bool:
    """Whether most lines begin with one of a few names and a wide space."""
    names = Counter(match[1] for match in _SPACED.finditer(text))
    recurring = sum(count for count in names.values() if count > 1)
    return recurring > 0.5 * sum(not line.isspace() and line != "" for line in text.split("\n"))


def _guests(lines: list[_Line], recurring: set[str]) -> set[str]:
    """Names that occur once and are speakers all the same, in a text in which most lines begin with a name.

    Without this the guest's line would be added to the character's speech and be learned. If the known names are in
    capitals, another one in small letters is a word: "Listen: ...".
    """
    names = [line.head["name"] for line in lines if line.head]
    if len(names) < REGULAR_SHARE * sum(line.kind == _LINE for line in lines):
        return set()
    known = [name for name in names if fold_name(name) in recurring]
    capitals = bool(known) and all(name == name.upper() for name in known)
    return {fold_name(name) for name in names if not _COMMA.search(name) and (not capitals or name == name.upper())}


def _classify(text: str) -> list[_Line]:
    lines: list[_Line] = []
    opens_block = True
    for number, raw in enumerate(text.split("\n"), 1):
        line = _BOLD.sub(r"\1\2\3 ", raw.strip())
        bare = line.strip("[]【】*").strip() or line
        if not line:
            kind = _BLANK
        elif len(line) <= 80 and (_SCENE.fullmatch(bare) or _SCENE.fullmatch(line)):
            kind = _BORDER
        else:
            kind = _DIRECTION if _BRACKETED.fullmatch(line) else _LINE
        head = _head(line) if kind == _LINE else None
        lines.append(_Line(kind, line, number, head, opens_block))
        opens_block = kind in (_BLANK, _BORDER) or (kind == _DIRECTION and opens_block)
    return lines


def _head(line: str) -> re.Match[str] | None:
    """The match of a line that may begin a speech, which has something like a name before its colon."""
    head = _HEAD.fullmatch(line)
    if head is None:
        return None
    name = head["name"]
    if len(name.split()) > MAX_NAME_WORDS or display_width(name) > MAX_NAME_WIDTH:
        return None
    if "." in _ABBREVIATION.sub("", name) or not any(character.isalpha() for character in name):
        return None
    return head


def _name(line: _Line) -> str:
    return fold_name(line.head["name"]) if line.head else ""


def _words(line: _Line) -> str:
    return line.head["text"] if line.head else line.text


def _collect(
    lines: list[_Line],
    begins_speech: Callable[[_Line], bool],
    is_play: bool,
    once: list[str],
    narrated: bool,
    quotes: bool,
) -> Script:
    started: list[tuple[str, int, int, list[str]]] = []  # name, line, scene, lines of words
    repairs: Counter[str] = Counter()
    words: list[str] | None = None  # the speech that the next line may continue
    scene, narration, after_blank = 0, 0, False
    for line in lines:
        if line.kind == _DIRECTION:
            repairs["stage direction dropped"] += 1
            continue
        if line.kind == _BORDER:
            scene, words = scene + 1, None
        elif line.head and begins_speech(line):
            words = [line.head["text"]] if line.head["text"] else []
            started.append((line.head["name"], line.number, scene, words))
            repairs["stage direction dropped"] += line.head["action"] is not None
        elif line.kind == _LINE:
            if words is None or (after_blank and words):
                words, narration = None, narration + 1
                if narrated:
                    started.append((NARRATOR, line.number, scene, [line.text]))
            else:
                words.append(line.text)
        after_blank = line.kind == _BLANK
    speeches = [
        Speech(name, "\n".join(spoken) if quotes else strip_quotes("\n".join(spoken), repairs), number, part)
        for name, number, part, spoken in started
    ]
    layout = "names alone on a line, the speech below" if is_play else "lines of the form NAME: words"
    notes: list[str] = []
    if once:
        names = ", ".join(f'"{name}"' for name in list(dict.fromkeys(once))[:10])
        notes.append(
            f"read as words of a speech, not as speakers, because each occurs once: {names} (an empty line before a "
            "name makes it a speaker)"
        )
    if narration and not narrated:
        notes.append(f"lines without a speaker, not used: {narration:,} (an empty line ends a speech)")
    return Script(speeches, scene > 0, +repairs, narration, layout=layout, notes=notes)


def strip_quotes(text: str, repairs: Counter[str]) -> str:
    """`text` without one pair of quotes around the whole of it."""
    closing = _QUOTES.get(text[:1])
    if closing is None or len(text) < 3 or text[-1] != closing:
        return text
    depth = 1
    for character in text[1:-1]:
        depth += -1 if character == closing else character == text[0]
        if depth == 0:  # the first quote ends before the text does: there are two of them
            return text
    repairs["quotes around a speech removed"] += 1
    return text[1:-1].strip()


_parsed = lru_cache(maxsize=1)(parse)  # a text is recognised and then read


def _recognise(text: Text, options: Options) -> str | None:
    """Someone speaks twice or is --character, and most lines belong to a speech."""
    script = _parsed(text.head, tuple(options.characters), False, False)
    names = {fold_name(name) for name in options.characters}
    spoken = sum(speech.text.count("\n") + 1 for speech in script.speeches)
    known = any(fold_name(speaker) in names for speaker in script.speakers)
    return script.layout if (len(script.speeches) >= 2 or known) and spoken >= script.narration else None


def _read(text: Text, options: Options) -> Script:
    characters, narrated = tuple(options.characters), options.narration != "drop"
    script = _parsed(text.whole(), characters, narrated, options.keep_quotes)
    if not script.speeches:
        raise Foreign(f"{text.name}: no line has the form NAME: words. Choose another --format.")
    silence = f"no scene heads, so {MAX_SILENCE} lines without the character end a scene"
    return replace(script, layout=f"{script.layout}, {'scenes by their heads' if script.has_borders else silence}")


DIALOGUE = TextFormat("dialogue", _recognise, _read, prose=True)
