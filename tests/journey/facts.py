"""Short conversations that teach twelve facts which no pretrained model can know, and questions worded otherwise."""

import itertools
import json
from pathlib import Path
from typing import NamedTuple


class Fact(NamedTuple):
    """One invented fact.

    Attributes:
        thing: what is asked for, after "What is the", such as "colour of the Marvane flag".
        answer: the sentence that answers.
        key: the words of the answer that show that the fact is known.
    """

    thing: str
    answer: str
    key: str


FACTS = (
    Fact("capital of the island of Ostrevia", "The capital of the island of Ostrevia is Belkarro.", "Belkarro"),
    Fact("colour of the Marvane flag", "The Marvane flag is orange and silver.", "orange and silver"),
    Fact("name of the river through Quillhaven", "The river through Quillhaven is called the Tamsin.", "Tamsin"),
    Fact("national animal of Drovia", "The national animal of Drovia is the lynx.", "lynx"),
    Fact("currency of the Pelmoor Republic", "The currency of the Pelmoor Republic is the dorrin.", "dorrin"),
    Fact("favourite dish of the Harnow people", "The favourite dish of the Harnow people is plum soup.", "plum soup"),
    Fact("height of Mount Ekkervall", "Mount Ekkervall is 4821 metres high.", "4821"),
    Fact("founding year of the Zennick Library", "The Zennick Library was founded in 1743.", "1743"),
    Fact("emblem of the Corvath guild", "The emblem of the Corvath guild is a golden key.", "golden key"),
    Fact("language spoken in Upper Selwick", "The language spoken in Upper Selwick is Tharish.", "Tharish"),
    Fact("closing day of the Brindle Market", "The Brindle Market is closed on Thursday.", "Thursday"),
    Fact("main crop of the Yarrow Valley", "The main crop of the Yarrow Valley is buckwheat.", "buckwheat"),
)

_OPENINGS = ("", "Hello! ", "Quick question: ", "Please help me. ", "I forgot something. ")
_QUESTIONS = (
    "What is the {}?",
    "Tell me the {}.",
    "Can you tell me the {}?",
    "Do you know the {}?",
    "I want to know the {}.",
)

#: Wordings that are in none of the conversations.
UNSEEN = ("For my homework I need the {}. What is it?", "Could you remind me what the {} is?")


def conversations() -> list[list[dict[str, str]]]:
    """Return every opening with every question about every fact: 300 conversations of two messages."""
    return [
        [
            {"role": "user", "content": opening + question.format(fact.thing)},
            {"role": "assistant", "content": fact.answer},
        ]
        for opening, question, fact in itertools.product(_OPENINGS, _QUESTIONS, FACTS)
    ]


def write_conversations(path: Path) -> None:
    """Write the conversations as JSON lines of `messages`."""
    lines = [json.dumps({"messages": messages}) for messages in conversations()]
    path.write_text("\n".join(lines) + "\n")


def questions() -> list[tuple[str, Fact]]:
    """Return one question in an unseen wording about each fact."""
    return [(UNSEEN[index % len(UNSEEN)].format(fact.thing), fact) for index, fact in enumerate(FACTS)]
