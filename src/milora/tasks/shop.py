"""Generated tasks about an online shop's customer support, in everyday English, for a pretrained backbone.

They need a real language model but no data files. (The bundled tasks use the small vocabulary of the bundled backbone.)
"""

from __future__ import annotations

import abc
import random
import re
from dataclasses import dataclass

from milora.tasks.bundled.base import GeneratedTask
from milora.tasks.task import Example, Task

FIRST_NAMES = (
    *("Amara", "Anna", "Carlos", "Chen", "Dmitri", "Elena", "Emily", "Fatima", "George", "Hana", "Ibrahim", "Ines"),
    *("James", "Karin", "Kofi", "Lena", "Liam", "Maria", "Mia", "Nadia", "Oliver", "Paul", "Priya", "Sofia"),
)
LAST_NAMES = (
    *("Andersson", "Baker", "Costa", "Diallo", "Evans", "Fischer", "Garcia", "Haddad", "Ivanova", "Jansen", "Kim"),
    *("Lopez", "Martin", "Novak", "Okafor", "Patel", "Rossi", "Sato", "Taylor", "Weber"),
)
ITEMS = (
    *("desk lamps", "notebooks", "coffee mugs", "office chairs", "garden tools", "running shoes", "rain jackets"),
    *("picture frames", "water bottles", "headphones", "backpacks", "kitchen knives", "bath towels", "wall clocks"),
)
CITIES = (
    *("Accra", "Berlin", "Boston", "Cairo", "Chicago", "Dublin", "Geneva", "Lagos", "Lisbon", "London", "Madrid"),
    *("Milan", "Mumbai", "Oslo", "Paris", "Prague", "Seattle", "Sydney", "Tokyo", "Toronto", "Vienna", "Warsaw"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")

SENTENCES: dict[str, tuple[str, ...]] = {
    "delivery": (
        "My {item} have still not arrived in {city}.",
        "The parcel with the {item} was due on {day} and is nowhere to be seen.",
        "Can you tell me where my {item} are? The tracking page has not changed since {day}.",
        "The courier left my {item} at the wrong house.",
    ),
    "refund": (
        "The {item} are broken and I want my money back.",
        "I sent the {item} back on {day}. When will I be paid for them?",
        "Please cancel my {item} and return what I paid.",
        "The {item} do not look like the picture, so I would like to return them.",
    ),
    "payment": (
        "My card was charged twice for the {item}.",
        "The checkout refuses my card when I try to buy {item}.",
        "The bill for the {item} shows a price that is too high.",
        "I paid for the {item} on {day} and still got a payment reminder.",
    ),
    "account": (
        "I cannot log in to look at my order of {item}.",
        "Please change the email address of my account before you send the {item}.",
        "I forgot my password and the reset link that came on {day} does not work.",
        "How do I delete my account now that the {item} are here?",
    ),
}
"""Customers' messages by department."""


@dataclass(frozen=True)
class Order:
    """An order: the customer, the goods and their count, the city and the day of shipping."""

    number: int
    name: str
    count: int
    item: str
    city: str
    day: str

    @classmethod
    def draw(cls, rng: random.Random) -> Order:
        """A random order of 2 to 9 items."""
        name = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
        things = rng.randint(2, 9), rng.choice(ITEMS)
        return cls(rng.randint(1000, 9999), name, *things, rng.choice(CITIES), rng.choice(DAYS))

    @property
    def text(self) -> str:
        """The order in two sentences."""
        return (
            f"Order {self.number}: {self.name} bought {self.count} {self.item}. "
            f"They were sent to {self.city} on {self.day}."
        )


class ShopTask(GeneratedTask):
    """A task whose completion is a space and the answer."""

    max_new_tokens = 24

    @abc.abstractmethod
    def row(self, rng: random.Random) -> tuple[str, str, str]:
        """A prompt, its answer, and the content that determines the row's split."""

    def draw(self, rng: random.Random) -> tuple[Example, str]:
        """See [`GeneratedTask.draw`]."""
        prompt, answer, content = self.row(rng)
        return Example(prompt, f" {answer}", answer), content

    def parse(self, output: str) -> str | None:
        """The first line of the output."""
        lines = output.strip().splitlines()
        return lines[0].strip() if lines else None


class OrderQuestions(GeneratedTask):
    """Yes/no questions about an order. In half of the rows one detail in the question is wrong.

    The completion states the detail first, as a chain of thought. Small models are more accurate this way.
    """

    name = "shop-yesno"
    max_new_tokens = 12

    def draw(self, rng: random.Random) -> tuple[Example, str]:
        """See [`milora.tasks.bundled.base.GeneratedTask.draw`]."""
        order = Order.draw(rng)
        field = rng.choice(("item", "city", "day"))
        is_true = rng.random() < 0.5
        values = {"item": ITEMS, "city": CITIES, "day": DAYS}[field]
        truth: str = getattr(order, field)
        asked = truth if is_true else rng.choice([value for value in values if value != truth])
        question = {
            "item": f"Did {order.name} buy {asked}?",
            "city": f"Was the order sent to {asked}?",
            "day": f"Was the order sent on {asked}?",
        }[field]
        answer = "yes" if is_true else "no"
        prompt = f"{order.text}\nQuestion: {question}\nThe detail, then yes or no:"
        return Example(prompt, f" {truth}: {answer}", answer), order.text

    def parse(self, output: str) -> str | None:
        """The yes or no after the detail."""
        found = re.match(r"[^:\n]+: (yes|no)\b", output.strip(), re.IGNORECASE)
        return found[1].lower() if found else None


class Departments(ShopTask):
    """Classifies a customer's message by department."""

    name = "shop-department"
    max_new_tokens = 6

    def row(self, rng: random.Random) -> tuple[str, str, str]:
        """See [`ShopTask.row`]."""
        department = rng.choice(list(SENTENCES))
        order = Order.draw(rng)
        said = rng.choice(SENTENCES[department]).format(item=order.item, city=order.city, day=order.day)
        message = f"{said} {rng.choice(('Regards', 'Thanks', 'Best wishes'))}, {order.name}"
        names = ", ".join(SENTENCES)
        return f"Message: {message}\nDepartments: {names}\nThe message is for:", department, message


class OrderRecords(ShopTask):
    """Extracts an order's details in a fixed format."""

    name = "shop-record"

    def row(self, rng: random.Random) -> tuple[str, str, str]:
        """See [`ShopTask.row`]."""
        order = Order.draw(rng)
        record = f"{order.name}; {order.count} {order.item}; {order.city}"
        return f"{order.text}\nRecord (customer; goods; city):", record, order.text


SHOP_TASKS: dict[str, Task] = {task.name: task for task in (OrderQuestions(), Departments(), OrderRecords())}
"""The shop's tasks by name."""
