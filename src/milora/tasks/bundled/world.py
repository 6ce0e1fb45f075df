"""The vocabulary of the bundled tasks and its facts."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Ada Amy Ann Ben Bob Cleo Dan Dora Edgar Ella Emma Esme Finn Fred Gina Gus Hana Hugo Ida Iris Ivan Jack Jane Jim "
    "Kate Kim Lena Leo Lily Lucy Luke Mark Mary Max Mia Mila Nadia Ned Nina Noah Nora Olga Oscar Otto Paul Pia Rita "
    "Rosa Ruby Sam Sara Stella Tess Tim Tom Uma Vera Will Yara Zoe"
)
THINGS = _words(
    "apples beans bread cake cheese corn eggs figs fish grapes honey jam lemons mangoes milk noodles nuts olives "
    "onions pears peas pies plums rice salad soup tea toast"
)
FIELDS: dict[str, tuple[str, ...]] = {
    "boss": NAMES,
    "friend": NAMES,
    "food": THINGS,
    "coat": _words("black blue brown green grey orange pink purple red white yellow"),
    "pet": _words("cat cow dog duck frog goat hen horse mouse pig pony rabbit"),
    "day": _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "town": _words("Ashby Bedford Corby Dover Epsom Fleet Hove Luton Oakham Ripon Selby Yeovil"),
    "tool": _words("axe brush drill fork hammer knife ladder lamp rake rope saw spade"),
    "room": _words("attic cellar garage garden hall kitchen library office porch shed"),
}
"""The fields of a record and their possible values."""

FACTS: dict[str, dict[str, str]] = {
    "Colour of": dict(
        zip(
            _words("coal snow grass blood cream sand tar ivy rust chalk"),
            _words("black white green red yellow brown black green orange white"),
            strict=True,
        )
    ),
    "Home of": dict(
        zip(
            _words("seals camels tigers crabs bears moles owls sharks lions whales"),
            _words("ice desert jungle beach forest earth tree sea savanna ocean"),
            strict=True,
        )
    ),
    "Food of": dict(
        zip(
            _words("monkeys pandas squirrels cows robins spiders foxes bees sheep ducks"),
            _words("bananas bamboo acorns hay worms flies rabbits nectar clover weeds"),
            strict=True,
        )
    ),
}
"""The facts: each question's beginning, with the answers by subject."""

ITEMS = _words("balls books boxes cards coins cups hats keys maps pens shells stamps stones toys")
LOSSES = ("lost", "sold", "broke", "spent")
GAINS = ("found", "won", "bought", "got")
LARGEST = 9
"""The largest number. Every number is one digit, which is one token."""
