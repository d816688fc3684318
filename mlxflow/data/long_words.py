"""Cut the long words of the texts that a tokenizer is trained on.

Training a BPE takes time quadratic in the length of a word (a pre-token: a run of letters, of digits, of white space or
of other characters), because each merge moves all that follows it. Encoding does not: both engines merge with a heap.
So only training is bounded: the tokenizer keeps its rule, and texts without long words train the same tokenizer as
before.
"""

import re
from collections.abc import Iterable, Iterator

from tokenizers import pre_tokenizers

#: A longer word is cut, before training, into parts of this many characters.
MAX_WORD_LENGTH = 2048

# Pre-tokenized at a time: each piece is a Python object
_WINDOW_LENGTH = 1 << 20

# White space to Python, and part of a word to the tokenizer
_SEPARATORS = "\x1c\x1d\x1e\x1f"

# A text is given to the trainer in parts of about this many characters: it takes up to 60 bytes for each of them
_PART_LENGTH = 1 << 15

# White space between two words: pre-tokens are the same when the text is cut before it
_BETWEEN_WORDS = re.compile(r"(?<=\S)[ \n](?=\S)")

_SPACE, _WORD = re.compile(r"\s"), re.compile(r"\S")
_RUN = re.compile(rf"[\S{_SEPARATORS}]{{{MAX_WORD_LENGTH},}}|\s{{{MAX_WORD_LENGTH},}}")


def cut_long_words(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts, those with a long word in several parts."""
    for text in texts:
        begin = 0
        for end in _cuts(text):
            yield text[begin:end]
            begin = end
        yield text[begin:]


def split_at_words(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts in parts with the same words for a trainer: cut where a space divides two words."""
    for text in texts:
        begin = 0
        while match := _BETWEEN_WORDS.search(text, begin + _PART_LENGTH):
            yield text[begin : match.start()]
            begin = match.start()
        yield text[begin:] if begin else text


def has_long_word(text: str) -> bool:
    """Return whether a text has a word that is cut."""
    return next(_cuts(text), None) is not None


def _may_have_long_word(text: str) -> bool:
    """Return whether a text may have a word that is cut.

    A run of that length fills one of these blocks; nearly all others are left at their first space.
    """
    size = MAX_WORD_LENGTH // 2
    ends = range(size, len(text) + 1, size)
    return any(_is_one_run(text, end - size, end) for end in ends) or any(one in text for one in _SEPARATORS)


def _is_one_run(text: str, begin: int, end: int) -> bool:
    """Return whether a part of a text is white space alone or has none."""
    return not (_SPACE.search(text, begin, end) and _WORD.search(text, begin, end))


def _cuts(text: str) -> Iterator[int]:
    """Yield where a text is cut, in order: inside long words only.

    A word across two windows is cut in each of them, so that no part is over twice MAX_WORD_LENGTH long.
    """
    if not _may_have_long_word(text):
        return
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    for run in _RUN.finditer(text):
        for begin in range(run.start(), run.end(), _WINDOW_LENGTH):
            window = text[begin : min(begin + _WINDOW_LENGTH, run.end())]
            for _, (first, last) in split.pre_tokenize_str(window):
                yield from range(begin + first + MAX_WORD_LENGTH, begin + last, MAX_WORD_LENGTH)
