"""Text -> ids as the tokenizer gives them, without encoding any piece twice.

A tokenizer first looks for its added tokens in a text and encodes the text between two of them by itself, so a text may
be cut in front of such a token: the ids of the pieces in a row are the ids of the text. A character card, which is in
every prompt, is then encoded once.
"""

import re
import string
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

# The latest pieces whose ids are kept: the character card, the template's own text, the turns of a conversation
KEPT = 4096
# A token with these at its ends is not touched by options of its neighbours (lstrip, rstrip, single_word)
_EDGES = frozenset(string.punctuation) - {"_"}


class Encoder:
    """A tokenizer that remembers the ids of pieces of text; `written` shows which tokens its chat template writes."""

    def __init__(self, tokenizer: Any, written: str) -> None:
        self.tokenizer = tokenizer
        self._cuts = re.compile("|".join(map(re.escape, cut_tokens(tokenizer, written))) or "(?!)")
        if tokenizer.is_fast:  # its file may ask for both, and transformers turns them off too
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        self._ids_of = lru_cache(KEPT)(self._encode_piece)
        self._text_of = lru_cache(KEPT)(lambda context: self._decode(self.encode(context)))

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, as the tokenizer alone would give them."""
        places = [0, *(match.start() for match in self._cuts.finditer(text)), len(text)]
        ids: list[int] = []
        for begin, end in pairwise(places):
            if begin < end:
                ids += self._ids_of(text[begin:end])
        return ids

    def encode_behind(self, context: str, text: str) -> list[int]:
        """The ids of `text` as they are behind `context`, where SentencePiece adds no space of its own.

        If the two would merge into one token: behind a line break instead, and if that merges too, alone.
        """
        for before in (context, "\n"):
            head, whole = self.encode(before), self.encode(before + text)
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self.encode(text)

    def decode_behind(self, context: str, ids: Sequence[int]) -> str:
        """The text of `ids` as it is behind `context`, where SentencePiece's decoder drops no space."""
        return self._decode([*self.encode(context), *ids]).removeprefix(self._text_of(context))

    # The layers of transformers around the tokenizer proper take as long as a short text
    def _encode_piece(self, piece: str) -> list[int]:
        if self.tokenizer.is_fast:
            return self.tokenizer.backend_tokenizer.encode(piece, add_special_tokens=False).ids
        return self.tokenizer.encode(piece, add_special_tokens=False)

    def _decode(self, ids: list[int]) -> str:
        if self.tokenizer.is_fast:
            return self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
        return decode(ids, self.tokenizer)


def cut_tokens(tokenizer: Any, written: str) -> list[str]:
    """The added tokens in `written` in front of which any text may be cut without changing its ids."""
    if not tokenizer.is_fast or tokenizer.split_special_tokens:
        return []
    added = list(tokenizer.added_tokens_decoder.values())
    return [token.content for token in added if token.content in written and _always_found(token, added)]


def _always_found(token: Any, added: Sequence[Any]) -> bool:
    """Whether `token` is found wherever its text is, and neither side of it changes the other."""
    text = token.content
    # tokenizers takes the leftmost token, and of those that begin at one place the longest; one that is `normalized` is
    # looked for only after the others, in the text between them
    hidden = any(text[0] in other.content[1:] or (other != token and other.content.startswith(text)) for other in added)
    return not (hidden or token.normalized or token.lstrip or token.single_word) and {text[0], text[-1]} <= _EDGES


def decode(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of `ids` as it is, special tokens included and no spaces cleaned up."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
