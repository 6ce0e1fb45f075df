"""The little world that the bundled tasks and the pretraining corpus talk about: words, relations and facts."""

from __future__ import annotations

import random
from dataclasses import dataclass

COLOURS = ("red", "blue", "green", "black", "white", "yellow", "pink", "brown")
THINGS = ("drum", "kite", "lamp", "boat", "coat", "bell", "clock", "ladder", "mirror", "basket", "ring", "hat")
PLACES = (
    "market",
    "barn",
    "mill",
    "harbour",
    "library",
    "garden",
    "tower",
    "bridge",
    "school",
    "lake",
    "temple",
    "inn",
)
FOODS = ("bread", "soup", "rice", "cheese", "honey", "plums", "beans", "fish", "cake", "noodles", "pears", "nuts")
JOBS = (
    "baker",
    "farmer",
    "pilot",
    "nurse",
    "painter",
    "miner",
    "tailor",
    "singer",
    "teacher",
    "guard",
    "cook",
    "judge",
)
PETS = ("cat", "dog", "parrot", "rabbit", "turtle", "hamster", "goat", "pony", "lizard", "duck")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ITEMS = ("apples", "coins", "books", "shells", "stamps", "eggs", "cards", "pens", "stones", "flowers")

TOWNS = ("Arden", "Brill", "Corby", "Dover", "Elgin", "Frome", "Goole", "Hythe", "Leith", "Marlow", "Nairn", "Oakham")
_NAME_TABLE = """
Ada Adam Alba Alex Alice Amir Amy Anna Anton Arlo Asha Ava Basil Bea Ben Bella Bilal Boris Bruno Carl Carla Cato
Celia Chen Chloe Clara Colin Cora Cyrus Dana David Dean Delia Diego Dina Dora Drew Dylan Eden Edgar Elena Eli Ella
Elsa Emil Emma Eric Esme Ethan Eva Faye Felix Finn Flora Frank Freya Gary Gina Grace Greg Gwen Hanna Hans Harry
Hazel Heidi Helen Henry Hugo Ian Ida Igor Ines Iris Isla Ivan Ivy Jack Jade James Jane Jean Jill Joan Joe John
Jonas Jude Julia Kai Karen Karl Kate Keith Kira Kurt Kyle Lara Laura Lena Leo Liam Lily Lina Linda Lisa Logan Lola
Lucas Lucy Luis Luna Maria Mark Marta Mary Max Maya Mia Mila Milo Mona Moses Nadia Nash Neil Nina Noah Nora Olga
Olive Omar Oscar Otto Owen Paula Pedro Peter Petra Piotr Quinn Rafa Ralph Rhea Rita Rob Rosa Ruby Rufus Ruth Ryan
Sam Sara Scott Sean Silas Simon Sofia Stan Stella Sven Tara Ted Tess Theo Tim Tina Toby Tom Uma Vera Vic Vince
Wade Walt Wendy Will Xena Yara Yusuf Zack Zara Zoe
"""
NAMES = tuple(_NAME_TABLE.split())


def invented_names(rng: random.Random, count: int) -> list[str]:
    """`count` different names: there are so many that a reader has to copy them, it cannot guess."""
    return rng.sample(NAMES, count)


@dataclass(frozen=True)
class Relation:
    """Something that a passage can say of a person, in the verbal forms it is stated, denied and asked in."""

    statement: str
    denial: str
    is_it_so: str
    which_value: str
    which_person: str
    values: tuple[str, ...]


RELATIONS = (
    Relation(
        statement="{name} went to the {value}",
        denial="{name} did not go to the {value}",
        is_it_so="Did {name} go to the {value}?",
        which_value="Where did {name} go?",
        which_person="Who went to the {value}?",
        values=PLACES,
    ),
    Relation(
        statement="{name} has a {value}",
        denial="{name} does not have a {value}",
        is_it_so="Does {name} have a {value}?",
        which_value="What does {name} have?",
        which_person="Who has a {value}?",
        values=tuple(f"{colour} {thing}" for colour in COLOURS for thing in THINGS),
    ),
    Relation(
        statement="{name} likes {value}",
        denial="{name} does not like {value}",
        is_it_so="Does {name} like {value}?",
        which_value="What does {name} like?",
        which_person="Who likes {value}?",
        values=FOODS,
    ),
    Relation(
        statement="{name} works as a {value}",
        denial="{name} does not work as a {value}",
        is_it_so="Does {name} work as a {value}?",
        which_value="What does {name} work as?",
        which_person="Who works as a {value}?",
        values=JOBS,
    ),
)


@dataclass(frozen=True)
class Statement:
    """One sentence of a passage: `relation` holds between the person `name` and `value`."""

    relation: Relation
    name: str
    value: str

    def say(self, form: str, value: str | None = None) -> str:
        """A form of the relation filled in for this person, with this statement's value unless another is given."""
        return form.format(name=self.name, value=self.value if value is None else value)


def invented_passage(rng: random.Random, people: int) -> list[Statement]:
    """Statements of one relation about different people with different values."""
    relation = rng.choice(RELATIONS)
    values = rng.sample(relation.values, people)
    return [Statement(relation, name, value) for name, value in zip(invented_names(rng, people), values, strict=True)]


def passage_text(statements: list[Statement]) -> str:
    """The passage that makes these statements."""
    return " ".join(f"{statement.say(statement.relation.statement)}." for statement in statements)


def invented_record(rng: random.Random, size: int) -> dict[str, str]:
    """`size` fields of a made-up person, in random order."""
    record = {
        "job": rng.choice(JOBS),
        "town": rng.choice(TOWNS),
        "boss": rng.choice(NAMES),
        "friend": rng.choice(NAMES),
        "age": str(rng.randint(10, 99)),
        "room": str(rng.randint(100, 999)),
        "pet": rng.choice(PETS),
        "coat": rng.choice(COLOURS),
        "food": rng.choice(FOODS),
        "day": rng.choice(DAYS),
        "place": rng.choice(PLACES),
        "tool": rng.choice(THINGS),
    }
    return {field: record[field] for field in rng.sample(sorted(record), size)}


@dataclass(frozen=True)
class Topic:
    """Facts of the closed world: one value for each subject, and the forms they are stated and asked in."""

    statement: str
    question: str
    facts: dict[str, str]


def _facts(table: str) -> dict[str, str]:
    """Reads `subject value, subject value, ...`."""
    return dict(pair.split() for pair in table.split(","))


TOPICS = (
    Topic(
        statement="A {subject} lives in the {value}",
        question="Where does a {subject} live?",
        facts=_facts(
            "camel desert, scorpion desert, shark sea, whale sea, crab sea, cow farm, hen farm, pig farm, frog pond, "
            "newt pond, monkey jungle, tiger jungle, deer forest, badger forest, bat cave, seal arctic, walrus arctic"
        ),
    ),
    Topic(
        statement="A {subject} eats {value}",
        question="What does a {subject} eat?",
        facts=_facts(
            "cow grass, horse grass, sheep grass, shark fish, penguin fish, walrus clams, frog flies, bat moths, "
            "monkey bananas, bear honey, squirrel nuts, hen seeds, mouse cheese, panda bamboo, tiger meat, wolf meat"
        ),
    ),
    Topic(
        statement="A {subject} works with a {value}",
        question="What does a {subject} work with?",
        facts=_facts(
            "baker whisk, carpenter hammer, tailor needle, barber razor, painter brush, farmer plough, pilot plane, "
            "writer pen, fisher net, miner pick, doctor syringe, cook pan, gardener spade, sailor ship, singer voice"
        ),
    ),
    Topic(
        statement="A {subject} is made of {value}",
        question="What is a {subject} made of?",
        facts=_facts(
            "window glass, bottle glass, table wood, door wood, nail iron, anchor iron, shirt cotton, towel cotton, "
            "candle wax, tyre rubber, shoe leather, belt leather, brick clay, pot clay, scarf wool, book paper"
        ),
    ),
    Topic(
        statement="A {subject} is {value}",
        question="What colour is a {subject}?",
        facts=_facts(
            "banana yellow, lemon yellow, cherry red, tomato red, crow black, coal black, swan white, pearl white, "
            "leaf green, cucumber green, sapphire blue, flamingo pink, pumpkin orange, chestnut brown"
        ),
    ),
)


@dataclass(frozen=True)
class WordProblem:
    """A story about a changing number of things, and the calculations `(left, operator, right)` that follow it."""

    name: str
    item: str
    sentences: tuple[str, ...]
    steps: tuple[tuple[int, str, int], ...]

    @property
    def result(self) -> int:
        """The number of things after the last step."""
        return calculate(*self.steps[-1])


LARGEST_STEP, LARGEST_FACTOR = 9, 6
_GAINS = ("bought {n} more", "found {n} more", "won {n} more", "picked up {n} more")
_LOSSES = ("gave away {n}", "lost {n}", "sold {n}", "threw away {n}")


def calculate(left: int, operator: str, right: int) -> int:
    """The value of `left operator right` for one of `+`, `-` and `*`."""
    if operator == "+":
        return left + right
    return left - right if operator == "-" else left * right


def calculation(left: int, operator: str, right: int) -> str:
    """The calculation as it is written down, with its result."""
    return f"{left}{operator}{right}={calculate(left, operator, right)}"


def invented_step(rng: random.Random, left: int) -> tuple[int, str, int]:
    """A gain or a loss of one digit that leaves between 1 and 60."""
    if left > LARGEST_STEP and (left > 50 or rng.random() < 0.5):
        return left, "-", rng.randint(2, LARGEST_STEP)
    return left, "+", rng.randint(2, LARGEST_STEP)


def invented_word_problem(rng: random.Random, changes: int) -> WordProblem:
    """A story of `changes` calculations: it may start with boxes of equal content, then things come and go."""
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    steps: list[tuple[int, str, int]] = []
    if rng.random() < 0.3:
        boxes, content = rng.randint(2, LARGEST_FACTOR), rng.randint(2, LARGEST_FACTOR)
        sentences = [f"{name} had {boxes} boxes of {content} {item}."]
        steps.append((boxes, "*", content))
        number = boxes * content
    else:
        number = rng.randint(5, 50)
        sentences = [f"{name} had {number} {item}."]
    while len(steps) < changes:
        step = invented_step(rng, number)
        sentences.append(f"{name} {rng.choice(_GAINS if step[1] == '+' else _LOSSES).format(n=step[2])}.")
        steps.append(step)
        number = calculate(*step)
    return WordProblem(name, item, tuple(sentences), tuple(steps))
