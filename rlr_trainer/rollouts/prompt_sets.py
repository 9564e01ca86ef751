"""Sets of prompts by name. The animals and their activities are those of DDPO's experiments (arXiv:2305.13301); the others were made here.

A set is a list of rows: `prompt`, and what a reward may want to know of it, which reaches it as metadata.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

# The 45 common animals and the 3 activities of DDPO's experiments: simple_animals.txt and activities.txt of ddpo-pytorch (MIT licence).
ANIMALS = (
    "cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer", "cow", "goat", "lion", "tiger", "bear",
    "raccoon", "fox", "wolf", "lizard", "beetle", "ant", "butterfly", "fish", "shark", "whale", "dolphin", "squirrel", "mouse", "rat",
    "snake", "turtle", "frog", "chicken", "duck", "goose", "bee", "pig", "turkey", "fly", "llama", "camel", "bat", "gorilla", "hedgehog",
    "kangaroo",
)  # fmt: skip
ACTIVITIES = ("washing the dishes", "riding a bike", "playing chess")
# Singular and plural of things that can be told apart and counted in a picture.
THINGS = {
    "apple": "apples", "balloon": "balloons", "book": "books", "bottle": "bottles", "candle": "candles", "car": "cars", "cat": "cats",
    "chair": "chairs", "cup": "cups", "dog": "dogs", "duck": "ducks", "egg": "eggs", "flower": "flowers", "horse": "horses", "key": "keys",
    "lemon": "lemons", "mushroom": "mushrooms", "orange": "oranges", "pencil": "pencils", "penguin": "penguins", "rabbit": "rabbits",
    "shoe": "shoes", "spoon": "spoons", "strawberry": "strawberries", "teapot": "teapots", "tree": "trees", "umbrella": "umbrellas",
    "vase": "vases", "window": "windows", "boat": "boats",
}  # fmt: skip
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}
PLACES = ("on a wooden table", "in front of a white wall", "on a lawn")
WORDS = (
    "OPEN", "STOP", "COFFEE", "BAKERY", "WELCOME", "SALE", "EXIT", "MUSIC", "LIBRARY", "HOTEL", "FRESH BREAD", "NO PARKING", "HAPPY BIRTHDAY",
    "GOOD MORNING", "THANK YOU", "KEEP LEFT", "SLOW DOWN", "MAIN STREET", "FLOWERS", "PIZZA", "TAXI", "SUMMER", "WINTER", "HELLO WORLD", "TEA",
    "BOOKS", "TICKETS", "PLATFORM 9", "ROOM 42", "SINCE 1987",
)  # fmt: skip
CARRIERS = (
    "a street sign that says", "a neon sign that reads", "a poster with the words", "a chalkboard with the words", "a book cover titled",
    "a T-shirt printed with", "a cake with the icing text", "a shop window with the lettering", "a wooden board carved with", "a mug that says",
)  # fmt: skip


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def ddpo_animals() -> list[dict[str, Any]]:
    """45 rows: "a cat", with `animal`."""
    return [{"prompt": _article(animal), "animal": animal} for animal in ANIMALS]


def ddpo_activities() -> list[dict[str, Any]]:
    """135 rows: "an ant playing chess", with `animal` and `activity`."""
    rows = [(animal, activity) for animal in ANIMALS for activity in ACTIVITIES]
    return [{"prompt": f"{_article(animal)} {activity}", "animal": animal, "activity": activity} for animal, activity in rows]


def counting_things() -> list[dict[str, Any]]:
    """240 rows: "three teapots on a wooden table", with `count`, `thing` and a `question` with its `answer`."""
    rows = []
    for number, (thing, plural) in enumerate(THINGS.items()):
        for count, word in NUMBERS.items():
            named = thing if count == 1 else plural
            row = {"prompt": f"{word} {named} {PLACES[(number + count) % len(PLACES)]}", "count": count, "thing": thing}
            rows.append(row | {"question": f"How many {plural} are in the picture?", "answer": str(count)})
    return rows


def ocr_signs() -> list[dict[str, Any]]:
    """300 rows: `a neon sign that reads "OPEN"`, with the `text` that ought to be read."""
    return [{"prompt": f'{carrier} "{text}"', "text": text} for text in WORDS for carrier in CARRIERS]


PROMPT_SETS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "ddpo_animals": ddpo_animals,
    "ddpo_activities": ddpo_activities,
    "counting_things": counting_things,
    "ocr_signs": ocr_signs,
}


def prompt_set(name: str) -> list[dict[str, Any]]:
    """The rows of a set, for `train_dataset`.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in PROMPT_SETS:
        raise ValueError(f"prompt set {name!r}: must be one of {', '.join(PROMPT_SETS)}")
    return PROMPT_SETS[name]()


def prompt_function(name: str) -> Callable[[], tuple[str, dict[str, Any]]]:
    """A prompt function that draws rows of a set with Python's `random`, whose state a run saves and resumes."""
    rows = prompt_set(name)

    def draw() -> tuple[str, dict[str, Any]]:
        row = random.choice(rows)
        return row["prompt"], {key: value for key, value in row.items() if key != "prompt"}

    return draw
