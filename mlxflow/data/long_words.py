"""Split long words in the training texts of a tokenizer.

Training a BPE takes time quadratic in the length of a word (a pre-token: a run of letters, of digits, of white space
or of other characters), because each merge moves the rest of it. Encoding does not: both engines merge with a heap.
So words are split for training only; the tokenizer itself is unaffected, and texts without long words give the same
tokenizer.
"""

import re
from collections.abc import Iterable, Iterator

from tokenizers import pre_tokenizers

#: Longer words are split into parts of this many characters.
MAX_WORD_LENGTH = 2048

# Characters pre-tokenized at a time: each piece is a Python object
_WINDOW_LENGTH = 1 << 20

# White space in Python, but part of a word in the tokenizer
_SEPARATORS = "\x1c\x1d\x1e\x1f"

# Characters of the parts of a text that the trainer gets; it needs up to 60 bytes per character
_PART_LENGTH = 1 << 15

# White space between two words: splitting a text before it does not change the pre-tokens
_BETWEEN_WORDS = re.compile(r"(?<=\S)[ \n](?=\S)")

_SPACE, _WORD = re.compile(r"\s"), re.compile(r"\S")
_RUN = re.compile(rf"[\S{_SEPARATORS}]{{{MAX_WORD_LENGTH},}}|\s{{{MAX_WORD_LENGTH},}}")


def cut_long_words(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts, split inside long words."""
    for text in texts:
        begin = 0
        for end in _cuts(text):
            yield text[begin:end]
            begin = end
        yield text[begin:]


def split_at_words(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts in parts with the same words for a trainer, split at spaces between words."""
    for text in texts:
        begin = 0
        while match := _BETWEEN_WORDS.search(text, begin + _PART_LENGTH):
            yield text[begin : match.start()]
            begin = match.start()
        yield text[begin:] if begin else text


def has_long_word(text: str) -> bool:
    """Return whether a text has a word that is too long."""
    return next(_cuts(text), None) is not None


def _may_have_long_word(text: str) -> bool:
    """Return whether a text may have a word that is too long.

    A run of that length fills one of these blocks; almost all others are dismissed at their first space.
    """
    size = MAX_WORD_LENGTH // 2
    ends = range(size, len(text) + 1, size)
    return any(_is_one_run(text, end - size, end) for end in ends) or any(one in text for one in _SEPARATORS)


def _is_one_run(text: str, begin: int, end: int) -> bool:
    """Return whether a part of a text is only white space or has none."""
    return not (_SPACE.search(text, begin, end) and _WORD.search(text, begin, end))


def _cuts(text: str) -> Iterator[int]:
    """Yield the positions, inside long words, at which a text is split, in order.

    A word across two windows is split in each of them, so that no part is longer than twice MAX_WORD_LENGTH.
    """
    if not _may_have_long_word(text):
        return
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    for run in _RUN.finditer(text):
        for begin in range(run.start(), run.end(), _WINDOW_LENGTH):
            window = text[begin : min(begin + _WINDOW_LENGTH, run.end())]
            for _, (first, last) in split.pre_tokenize_str(window):
                yield from range(begin + first + MAX_WORD_LENGTH, begin + last, MAX_WORD_LENGTH)
