"""The text that the bundled backbone is pretrained on.

It teaches the skills that the bundled tasks need (copying from a passage, comparing a claim with it, reading a record,
calculating, sorting, knowing the facts of the closed world, finding an option in a list), each in several verbal
forms, but never the form that the tasks ask for: no text says "the correct answer is" or "the answer is". That form is
what fine-tuning is for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from milora.tasks.bundled.world import (
    COLOURS,
    FOODS,
    LARGEST_FACTOR,
    NAMES,
    THINGS,
    TOPICS,
    Statement,
    calculate,
    calculation,
    invented_names,
    invented_passage,
    invented_record,
    invented_step,
    invented_word_problem,
    passage_text,
)


@dataclass(frozen=True)
class Document:
    """A text in two parts: what is made up, which no reader can foresee, and what can be told from it."""

    given: str
    told: str

    @property
    def text(self) -> str:
        """The whole text."""
        return self.given + self.told


Writer = Callable[[random.Random], Document]
_WORDS = tuple(sorted({*COLOURS, *FOODS, *THINGS, *(value for topic in TOPICS for value in topic.facts.values())}))


def passage_with_remarks(rng: random.Random) -> Document:
    """A passage about some people, then remarks that look things up in it or judge what was said of it."""
    statements = invented_passage(rng, people=rng.randint(2, 4))
    opening = rng.choice(("", "Passage: ", "Story: "))
    remarks = [rng.choice((_question_of_value, _question_of_person, _claim, _claim, _doubt, _doubt)) for _ in range(4)]
    told = rng.choice((" ", "\n")).join(remark(rng, statements) for remark in remarks)
    return Document(f"{opening}{passage_text(statements)}", f"\n{told}")


def _question_of_value(rng: random.Random, statements: list[Statement]) -> str:
    asked = rng.choice(statements)
    return f"{asked.say(asked.relation.which_value)} {asked.say(asked.relation.statement)}."


def _question_of_person(rng: random.Random, statements: list[Statement]) -> str:
    asked = rng.choice(statements)
    return f"{asked.say(asked.relation.which_person)} {asked.say(asked.relation.statement)}."


def _claimed(rng: random.Random, statements: list[Statement]) -> tuple[Statement, str]:
    """A statement of the passage, and the value that someone claims it has: half of the time a wrong one."""
    asked, other = rng.sample(statements, 2)
    return asked, rng.choice((asked.value, other.value))


def _claim(rng: random.Random, statements: list[Statement]) -> str:
    asked, value = _claimed(rng, statements)
    truth = asked.say(asked.relation.statement)
    claim = asked.say(asked.relation.statement, value)
    verdicts = rng.choice((("true", "false"), ("right", "wrong"), ("correct", "not correct")))
    verdict = verdicts[value != asked.value]
    return rng.choice((f"Claim: {claim}. This is {verdict}: {truth}.", f"It is said: {claim}. That is {verdict}."))


def _doubt(rng: random.Random, statements: list[Statement]) -> str:
    asked, value = _claimed(rng, statements)
    question = asked.say(asked.relation.is_it_so, value)
    truth = asked.say(asked.relation.statement)
    if rng.random() < 0.3:
        question = f"Question: {question}\nAnswer:"
    if value == asked.value:
        return f"{question} Indeed, {truth}."
    return f"{question} Not so, {asked.say(asked.relation.denial, value)}, for {truth}."


def record_with_remarks(rng: random.Random) -> Document:
    """A record in one of several layouts, then some of its fields read out."""
    record = invented_record(rng, rng.randint(3, 7))
    entry, separator = rng.choice((("{}: {}", "\n"), ("{}: {}", "; "), ("{} = {}", ", "), ("{} {}", ", ")))
    listing = separator.join(entry.format(field, value) for field, value in record.items())
    form = rng.choice(("The {} is {}.", "For {} it says {}.", "Look up {}? It reads {}.", "Find {}: found {}."))
    asked = rng.sample(sorted(record), min(4, len(record)))
    title = rng.choice(("Card", "Record", "File"))
    return Document(f"{title}:\n{listing}", "\n" + " ".join(form.format(field, record[field]) for field in asked))


def list_copied(rng: random.Random) -> Document:
    """Words in random order, said twice: names, or made-up words spelled from a few letters."""
    if rng.random() < 0.7:
        words = rng.sample((*NAMES, *_WORDS), rng.randint(3, 9))
    else:
        words = ["".join(rng.choices("abcdefghiklmnoprstuvz", k=rng.randint(2, 5))) for _ in range(rng.randint(2, 6))]
    return Document(f"Say: {' '.join(words)}. Again:", f" {' '.join(words)}.")


def facts_told(rng: random.Random) -> Document:
    """Some facts of the closed world, stated or asked and answered by a statement."""
    told = []
    for _ in range(6):
        topic = rng.choice(TOPICS)
        subject, value = rng.choice(list(topic.facts.items()))
        statement = topic.statement.format(subject=subject, value=value)
        told.append(rng.choice((f"{statement}.", f"{topic.question.format(subject=subject)} {statement}.")))
    return Document("", " ".join(told))


def options_weighed(rng: random.Random) -> Document:
    """A question of knowledge with numbered or lettered options, answered by a statement and the option's label."""
    topic = rng.choice(TOPICS)
    subject, value = rng.choice(list(topic.facts.items()))
    options = [value, *rng.sample(sorted(set(topic.facts.values()) - {value}), rng.randint(1, 4))]
    rng.shuffle(options)
    label = _label(rng)
    chosen = label(options.index(value))
    statement = topic.statement.format(subject=subject, value=value)
    verdict = rng.choice(
        (f"{statement}, so choose {chosen}.", f"Choose {chosen}: {statement}.", f"Choose {chosen}, for it is {value}.")
    )
    question = topic.question.format(subject=subject)
    return Document(f"{question}\n{_listing(rng, options, label)}", f"\n{verdict}")


def options_found(rng: random.Random) -> Document:
    """A list of words with labels, and which label belongs to which word."""
    options = rng.sample(_WORDS, rng.randint(3, 5))
    label = _label(rng)
    asked = rng.sample(range(len(options)), 3)
    form = rng.choice(("{word} is {label}.", "{label} is {word}.", "Where is {word}? At {label}."))
    told = " ".join(form.format(word=options[index], label=label(index)) for index in asked)
    return Document(_listing(rng, options, label), f"\n{told}")


def _label(rng: random.Random) -> Callable[[int], str]:
    word = rng.choice(("option", "number", "line", "answer", ""))
    if word:
        return lambda index: f"{word}{index + 1}"
    return lambda index: "ABCDE"[index]


def _listing(rng: random.Random, options: list[str], label: Callable[[int], str]) -> str:
    return rng.choice(("\n", " ")).join(f"{label(index)}: {option}" for index, option in enumerate(options))


def calculations(rng: random.Random) -> Document:
    """Unconnected calculations, or a chain in which each goes on from the one before."""
    if rng.random() < 0.2:
        pairs = [(rng.randint(2, LARGEST_FACTOR), rng.randint(2, LARGEST_FACTOR)) for _ in range(6)]
        return Document("", "Times: " + " ".join(f"{calculation(left, '*', right)}." for left, right in pairs))
    chained = rng.random() < 0.5
    number = rng.randint(3, 60)
    steps = []
    for _ in range(6):
        step = invented_step(rng, number)
        steps.append(f"{calculation(*step)}.")
        number = calculate(*step) if chained else rng.randint(3, 60)
    return Document("", f"{'Chain' if chained else 'Sums'}: " + " ".join(steps))


def story_counted(rng: random.Random) -> Document:
    """A story about a number of things, with the calculations that follow it and a closing statement."""
    problem = invented_word_problem(rng, rng.randint(1, 3))
    story = " ".join(problem.sentences)
    count = " ".join(f"{calculation(*step)}." for step in problem.steps)
    if rng.random() < 0.3:
        # Counting along, sentence by sentence, ties each sentence to its calculation.
        without = len(problem.sentences) - len(problem.steps)
        told = list(problem.sentences)
        for index, step in enumerate(problem.steps, start=without):
            told[index] += f" {calculation(*step)}."
        return Document("", " ".join(told))
    closing = rng.choice(
        ("In the end {name} has {result} {item}.", "So {result} {item} are left.", "That makes {result}.")
    )
    closing = closing.format(name=problem.name, result=problem.result, item=problem.item)
    how_many = f" How many {problem.item} does {problem.name} have now?"
    question = rng.choice(("", f" Count the {problem.item} of {problem.name}.", how_many))
    opening, heading = rng.choice(("", "Story: ", "Problem: ")), rng.choice(("Count", "Work", "Solution"))
    return Document(f"{opening}{story}{question}", f"\n{heading}: {count} {closing}")


def numbers_ordered(rng: random.Random) -> Document:
    """Numbers of two digits, compared or put in order."""
    if rng.random() < 0.25:
        pairs = [sorted(rng.sample(range(10, 100), 2)) for _ in range(5)]
        told = [f"{low}<{high}." if rng.random() < 0.5 else f"{high}>{low}." for low, high in pairs]
        return Document("", "Compare: " + " ".join(told))
    numbers = rng.sample(range(10, 100), rng.randint(2, 4))
    rising = sorted(numbers)
    if rng.random() < 0.3:
        falling = rng.random() < 0.5
        direction = "from large to small" if falling else "from small to large"
        in_order = _joined(rising[::-1] if falling else rising)
        return Document(f"Sort {direction}: {_joined(numbers)}", f"\nSorted: {in_order}.")
    remarks = [
        f"Rising, from small to large: {_joined(rising)}.",
        f"Falling, from large to small: {_joined(rising[::-1])}.",
        f"The smallest is {rising[0]}.",
        f"The largest is {rising[-1]}.",
    ]
    return Document(f"Numbers: {_joined(numbers)}", "\n" + " ".join(rng.sample(remarks, 3)))


def _joined(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def meeting(rng: random.Random) -> Document:
    """A short talk between two people, with quotes, so that the text is not all lists and sums."""
    first, second, third = invented_names(rng, 3)
    thing, colour = rng.choice(THINGS), rng.choice(COLOURS)
    question = f'{first} met {second}. "Do you have my {colour} {thing}?" said {first}.'
    if rng.random() < 0.5:
        thanks = f"So {first} got the {colour} {thing} from {second}, for {second} said yes."
        return Document(question, f' "Yes, here is your {thing}," said {second}. {thanks}')
    reply = f'"No, {third} has your {colour} {thing}," said {second}.'
    return Document(question, f" {reply} So {first} asked {third} for the {colour} {thing}, but {third} said no.")


WRITERS: dict[Writer, float] = {
    passage_with_remarks: 4,
    record_with_remarks: 2.5,
    list_copied: 1,
    facts_told: 0.7,
    options_weighed: 2.5,
    options_found: 1.2,
    calculations: 3,
    story_counted: 3,
    numbers_ordered: 2,
    meeting: 0.5,
}
"""How often each kind of document is written, relative to the others."""


def documents(seed: int) -> Iterator[Document]:
    """The documents of the corpus, without end; the same for the same seed."""
    rng = random.Random(seed)
    writers, weights = list(WRITERS), list(WRITERS.values())
    while True:
        yield rng.choices(writers, weights)[0](rng)
