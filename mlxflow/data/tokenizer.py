"""A byte-level BPE tokenizer, trained here and saved in Hugging Face's form."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Ends every document; the only special token.
END_OF_TEXT = "<|endoftext|>"

#: The 256 bytes and END_OF_TEXT: no byte-level vocabulary is smaller.
SMALLEST_VOCAB_SIZE = 257

# Enough documents for every thread, few enough that their Encoding objects stay small.
_DOCUMENTS_PER_CALL = 256


def train_tokenizer(documents: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (GPT-2's pre-tokenizer) on documents.

    Any valid UTF-8 text comes back unchanged after decoding. Ids run from 0 to the vocabulary's size less one;
    END_OF_TEXT is 0.

    Args:
        documents: the texts; the same texts in the same order give the same tokenizer.
        vocab_size: ids wanted, END_OF_TEXT included; a small corpus may yield fewer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, *, tokenizer_file: Path, config_file: Path, context_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` as transformers and mlx-lm read them."""
    tokenizer.save(str(tokenizer_file))
    config = {
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_max_length": context_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def smallest_dtype(vocab_size: int) -> "np.dtype[Any]":
    """Return the smallest unsigned type that holds every id of a vocabulary."""
    return np.min_scalar_type(vocab_size - 1)


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> "tuple[NDArray[Any], NDArray[np.int64]]":
    """Tokenize documents one after another, each followed by END_OF_TEXT.

    The text END_OF_TEXT inside a document is text, not the special token. The library's own threads do the work.

    Returns:
        tokens: (T,) in the smallest unsigned type that holds the vocabulary.
        offsets: (D + 1,) document d is tokens[offsets[d]:offsets[d + 1]].
    """
    dtype = smallest_dtype(tokenizer.get_vocab_size())
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces = [np.array([*ids, end], dtype) for ids in _encode_all(tokenizer, documents)]
    offsets = np.zeros(len(pieces) + 1, np.int64)
    np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype), offsets


def _encode_all(tokenizer: Tokenizer, documents: Sequence[str]) -> Iterator[list[int]]:
    tokenizer.encode_special_tokens = True
    remaining = iter(documents)
    while batch := list(islice(remaining, _DOCUMENTS_PER_CALL)):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield encoding.ids
