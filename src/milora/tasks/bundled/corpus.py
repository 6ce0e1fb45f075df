"""The pretraining text of the bundled backbone.

It teaches the skills that the bundled tasks need, in a different form: looking up items in a list, judging a claim, the
facts of the small vocabulary, finding an option, and calculating. No text contains "correct:", with which every
completion of the tasks begins. Fine-tuning teaches that form.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from milora.tasks.bundled.arithmetic import Story
from milora.tasks.bundled.choice import draw_question, listing
from milora.tasks.bundled.extraction import draw_record
from milora.tasks.bundled.extraction import listing as record_listing
from milora.tasks.bundled.world import FACTS, FIELDS, ITEMS, LARGEST, NAMES, THINGS
from milora.tasks.bundled.yesno import Lunch


@dataclass(frozen=True)
class Document:
    """A text in two parts: the random part, and the part that follows from it."""

    given: str
    told: str

    @property
    def text(self) -> str:
        """The whole text."""
        return self.given + self.told


Writer = Callable[[random.Random], Document]
_WORDS = tuple(sorted({*THINGS, *ITEMS, *(value for values in FIELDS.values() for value in values)}))


def lunch_judged(rng: random.Random) -> Document:
    """A passage about who eats what, then claims, each judged after the truth is stated."""
    lunch = Lunch.draw(rng, rng.randint(2, 4))
    opening = rng.choice(("Passage: For lunch,", "For supper,", "Story: At noon,"))
    given = f"{opening} {lunch.passage}."
    question = rng.choice(
        ("Question: Does {} eat {}?\nReply:", "Claim: {} eats {}.\nIn truth", "Is it so that {} eats {}?")
    )
    right, wrong = rng.choice((("indeed", "not so"), ("true", "false"), ("right", "wrong")))
    told = ""
    for asked in rng.sample(sorted(lunch.eaten), 2):
        truth = lunch.eaten[asked]
        claimed = truth if rng.random() < 0.5 else rng.choice([v for v in lunch.eaten.values() if v != truth])
        told += f"\n{question.format(asked, claimed)} {asked} {truth}, {right if claimed == truth else wrong}."
    return Document(given, told)


def record_read(rng: random.Random) -> Document:
    """A record, then questions about some of its fields with their answers."""
    record = draw_record(rng, rng.randint(3, 6))
    title = rng.choice(("Record:", "Card:", "File:"))
    asking = rng.choice(("Find: {}\nIt reads", "Look up {}:", "Seek {}. There is", "And {}?"))
    told = "".join(f"\n{asking.format(field)} {field} {record[field]}." for field in rng.sample(sorted(record), 3))
    return Document(f"{title} {record_listing(record)}.", told)


def words_repeated(rng: random.Random) -> Document:
    """Words in random order, repeated once."""
    words = " ".join(rng.sample((*NAMES, *_WORDS), rng.randint(4, 12)))
    return Document(f"Say: {words}. Again:", f" {words}.")


def facts_told(rng: random.Random) -> Document:
    """Facts, as statements and as questions with answers."""
    told = []
    for _ in range(6):
        beginning = rng.choice(list(FACTS))
        subject, value = rng.choice(list(FACTS[beginning].items()))
        told.append(rng.choice((f"Fact: {subject} {value}.", f"{beginning} {subject}? Known: {subject} {value}.")))
    return Document("", " ".join(told))


def options_weighed(rng: random.Random) -> Document:
    """A multiple-choice question, answered with the fact and its label."""
    beginning, subject, value, options = draw_question(rng)
    label = rng.choice(("answer", "option", "line"))
    given = f"{beginning} {subject}? Options: {listing(options, label)}."
    saying = rng.choice(("\nKnown: {}", "\nI take {}", " It is {}"))
    return Document(given, f"{saying.format(subject)} {value} {label}{options.index(value) + 1}.")


def options_found(rng: random.Random) -> Document:
    """Labelled words, then questions about their labels with the answers."""
    words = rng.sample(_WORDS, 4)
    label = rng.choice(("answer", "option", "line"))
    asked = rng.sample(range(4), 3)
    told = "".join(f"\nWhere is {words[i]}? At {words[i]} {label}{i + 1}." for i in asked)
    return Document(f"Options: {listing(words, label)}.", told)


def sums(rng: random.Random) -> Document:
    """Calculations with single-digit numbers."""
    told = []
    for _ in range(8):
        left = rng.randint(1, LARGEST)
        right = rng.randint(1, LARGEST)
        if left > right and rng.random() < 0.5:
            told.append(f"{left} - {right} = {left - right}")
        elif left + right <= LARGEST:
            told.append(f"{left} + {right} = {left + right}")
    return Document("", "Sums: " + ", ".join(told) + ".")


def story_counted(rng: random.Random) -> Document:
    """A story about a count of things, followed by its calculations."""
    story = Story.draw(rng, rng.randint(1, 3))
    opening = rng.choice(("Problem: ", "Story: ", ""))
    question = rng.choice((f" How many {story.item} has {story.name} now?", ""))
    heading = rng.choice(("Work:", "Count:", "Solution: we count"))
    return Document(f"{opening}{story.text}{question}", f"\n{heading} {story.working}.")


WRITERS: dict[Writer, float] = {
    lunch_judged: 4,
    record_read: 2,
    words_repeated: 1,
    facts_told: 1,
    options_weighed: 2.5,
    options_found: 1,
    sums: 2,
    story_counted: 4,
}
"""Relative frequency of each kind of document."""


def documents(seed: int) -> Iterator[Document]:
    """Yields the documents of the corpus endlessly. The same seed gives the same documents."""
    rng = random.Random(seed)
    writers, weights = list(WRITERS), list(WRITERS.values())
    while True:
        yield rng.choices(writers, weights)[0](rng)
