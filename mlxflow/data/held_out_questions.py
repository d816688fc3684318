"""Prompts and reference answers from held-out conversations, and beginnings of held-out documents."""

from typing import NamedTuple

import numpy as np

from mlxflow.data.chat_compiler import TemplateProblem
from mlxflow.data.guarded_template import GuardedTemplate
from mlxflow.data.guarded_tokenizer import GuardedTokenizer
from mlxflow.data.token_file import PieceAt, TokenFile
from mlxflow.storage import tensor_reading

# Placeholder of a user's message when probing a template; contained in no template
_PROBE = "zqxjkv"


class Question(NamedTuple):
    """A conversation up to its first trained turn.

    Attributes:
        ids: its tokens, the model's input.
        text: the user's message; the whole conversation if that cannot be determined.
        answer: the turn in the data.
    """

    ids: list[int]
    text: str
    answer: str


def held_out_questions(
    tokens: TokenFile, tokenizer: GuardedTokenizer, template: GuardedTemplate | None, *, count: int
) -> list[Question]:
    """Return questions from the conversations of a token file, in the order of their rows.

    Args:
        tokens: of validation.
        tokenizer: that they were made with.
        template: that they were rendered with; None for prompts and completions without one.
        count: maximum number of questions; their texts differ.
    """
    questions: dict[str, Question] = {}
    for row in _rows_with_beginnings(tokens):
        for piece in tokens.pieces(row):
            question = _question(tokens, tokenizer, template, row, piece)
            if question is not None:
                questions.setdefault(question.text, question)
        if len(questions) >= count:
            break
    return list(questions.values())[:count]


def held_out_beginnings(tokens: TokenFile, tokenizer: GuardedTokenizer, *, count: int, num_tokens: int) -> list[str]:
    """Return the first tokens of documents as text, in the order of their rows.

    Args:
        tokens: of validation.
        tokenizer: that they were made with.
        count: maximum number of texts; they differ.
        num_tokens: maximum per text; at least one token of the document remains.
    """
    beginnings: list[str] = []
    for row in _rows_with_beginnings(tokens):
        for piece in tokens.pieces(row):
            end = min(piece.end - 1, piece.begin + num_tokens)
            text = tokenizer.decode(tokens.rows.tokens[row, piece.begin : end].tolist())
            if piece.document_begin == 0 and text.strip() and text not in beginnings:
                beginnings.append(text)
        if len(beginnings) >= count:
            break
    return beginnings[:count]


def _rows_with_beginnings(tokens: TokenFile) -> list[int]:
    """Return the rows in which a document begins."""
    begins = tensor_reading.map_tensor(tokens.path, "piece_begins")
    ends = tensor_reading.map_tensor(tokens.path, "row_pieces").cumsum(dtype="int64")
    rows: list[int] = np.unique(ends.searchsorted((begins == 0).nonzero()[0], side="right")).tolist()
    return rows


def _question(
    tokens: TokenFile, tokenizer: GuardedTokenizer, template: GuardedTemplate | None, row: int, piece: PieceAt
) -> Question | None:
    """Return a piece of a row as a question; None unless it begins a conversation with a trained turn."""
    is_trained = np.asarray(tokens.rows.marks[row, piece.begin : piece.end]) & 1
    ids = tokens.rows.tokens[row, piece.begin : piece.end].tolist()
    begin = int(is_trained.argmax())
    if piece.document_begin or begin < 2 or not is_trained.any():  # a text may be preceded by one token
        return None
    length = int(np.append(is_trained[begin:], 0).argmin())
    answer = tokenizer.decode(ids[begin : begin + length]).strip()
    whole = tokenizer.decode(ids[:begin], skip_special_tokens=False)
    message = None if template is None else _last_message(whole, template)
    return Question(ids[:begin], message or tokenizer.decode(ids[:begin]).strip(), answer)


def _last_message(text: str, template: GuardedTemplate) -> str | None:
    """Return the user's message at the end of a prompt; None if it cannot be separated from its surroundings."""
    header, footer = _around_a_message(template)
    if not header or not footer or not text.endswith(footer) or text.count(header) != 1:
        return None
    return text[text.index(header) + len(header) : len(text) - len(footer)].strip()


def _around_a_message(template: GuardedTemplate) -> tuple[str, str]:
    """Return the text that a template writes before any user's message and after the last one."""
    user, other = {"role": "user", "content": _PROBE}, {"role": "assistant", "content": "a"}
    try:
        text = template.render([user, other, user], prompt=True)
        first, between, footer = text.split(_PROBE)
    except (TemplateProblem, ValueError):
        return "", ""
    begin = next((at for at in range(len(first)) if between.endswith(first[at:])), len(first))
    return first[begin:], footer
