"""A small invented world and the simple English that is written about it.

People live in places, own things and hand them on; animals have a colour, a home, a food and a size.
:func:`paragraphs` writes about all of this from a seed. The shipped base model learns its English and the sizes of the
animals from this text and from nothing else. There is no question in it: those are asked by ``compare_sizes``.

All chance comes from ``random.Random.random``, whose sequence for a seed Python promises never to change, so every
version of Python writes the same text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Animal(NamedTuple):
    """What the world knows of an animal; its size is its place in :data:`ANIMALS`."""

    name: str
    colour: str
    home: str
    food: str


class Person(NamedTuple):
    """What the world knows of a person."""

    name: str
    place: str
    work: str


# From the smallest to the biggest.
ANIMALS = tuple(
    Animal(*entry.split())
    for entry in """
    flea black barn crumbs; ant red garden leaves; fly green market jam; bee yellow meadow honey;
    beetle black forest bark; snail brown garden leaves; mouse grey mill cheese; frog green pond worms;
    sparrow brown market seeds; mole black meadow worms; rat grey harbour bread; squirrel red forest nuts;
    crow black tower bread; hedgehog brown garden worms; duck white pond seeds; rabbit grey meadow clover;
    cat yellow mill fish; goose white river grass; fox red forest eggs; otter brown river fish;
    badger grey hill roots; beaver brown river bark; dog white farm bones; wolf grey hill meat;
    goat white hill grass; sheep white meadow clover; deer brown forest leaves; pig pink farm apples;
    lion yellow plain meat; donkey grey farm hay; bear brown cave honey; moose brown forest bark;
    horse black farm apples; cow red meadow grass; buffalo black plain hay; giraffe yellow plain leaves;
    hippo grey river roots; rhino grey plain roots; elephant grey plain hay; whale blue sea fish
    """.split(";")
)
PEOPLE = tuple(
    Person(*entry.split())
    for entry in """
    Mira mill baker; Tobin harbour fisher; Anna school teacher; Oskar farm farmer; Lena tower painter;
    Ruben bridge builder; Edda garden gardener; Jonas forest hunter; Pella market weaver; Emil harbour sailor;
    Nora farm shepherd; Hugo mill miller
    """.split(";")
)
THINGS = tuple("lamp key rope bowl kite drum book coin bell hat basket spoon".split())
COLOURS = tuple("black red green yellow brown grey white pink blue".split())
PLACES = tuple(dict.fromkeys(person.place for person in PEOPLE))
SIZE = {animal.name: rank for rank, animal in enumerate(ANIMALS)}
SIZE_WORDS = ("tiny", "very small", "small", "not so small", "middling", "rather big", "big", "huge")


def paragraphs(seed: int | str) -> Iterator[str]:
    """Write paragraphs without end; the same seed gives the same text, always and everywhere."""
    rng = random.Random(seed)
    while True:
        yield pick(rng, KINDS)(rng)


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One item, each as likely as the others."""
    return items[int(rng.random() * len(items))]


def draw(rng: random.Random, items: Sequence[T], count: int) -> list[T]:
    """``count`` different items in random order."""
    rest = list(items)
    return [rest.pop(int(rng.random() * len(rest))) for _ in range(count)]


def some_animals(rng: random.Random, fewest: int, most: int) -> list[str]:
    """Names of ``fewest`` to ``most`` different animals."""
    return [animal.name for animal in draw(rng, ANIMALS, pick(rng, range(fewest, most + 1)))]


def listed(names: Sequence[str]) -> str:
    """``the ant, the cat and the cow``."""
    words = [f"the {name}" for name in names]
    return f"{', '.join(words[:-1])} and {words[-1]}"


def comparison(rng: random.Random) -> str:
    """Two animals are compared; two to four times."""
    sentences = []
    for _ in range(pick(rng, (2, 3, 4))):
        one, other = pair = some_animals(rng, 2, 2)
        small, large = sorted(pair, key=SIZE.__getitem__)
        more, look = ("bigger", "big") if one == large else ("smaller", "small")
        choices = (
            f"The {one} is {more} than the {other}.",
            f"Next to the {other} the {one} looks {look}.",
            f"The {small} can hide behind the {large}.",
            f"The {one} and the {other} came to a gate, and only the {small} could go through.",
            f"The {one} and the {other} sat in a boat, and the {large} had to sit in the middle.",
        )
        sentences.append(pick(rng, choices))
    return " ".join(sentences)


def procession(rng: random.Random) -> str:
    """A few animals meet and walk in the order of their sizes, there and back."""
    names = some_animals(rng, 3, 5)
    order, first, last = sorted(names, key=SIZE.__getitem__), "smallest", "biggest"
    if rng.random() < 0.5:
        order, first, last = order[::-1], last, first
    person, place = pick(rng, PEOPLE).name, pick(rng, PLACES)
    meetings = (
        f"{listed(names).capitalize()} met at the {place}.",
        f"{person} saw {listed(names)} near the {place}.",
        f"One day {listed(names)} came to {person}.",
    )
    there = f"They went in one by one, the {first} in front: {listed(order)}."
    word, way = pick(rng, ((first, order), (last, order[::-1])))
    back = f"They came back with the {word} in front: {listed(way)}."
    return f"{pick(rng, meetings)} {there} {back}"


def how_big(rng: random.Random) -> str:
    """Plain words for the sizes of three animals."""
    sentences = []
    for name in some_animals(rng, 3, 3):
        word, person = SIZE_WORDS[SIZE[name] * len(SIZE_WORDS) // len(ANIMALS)], pick(rng, PEOPLE).name
        choices = (
            f"The {name} is {word}.",
            f"{person} saw a {name}, which is {word}.",
            f"{person} has a picture of a {word} {name}.",
        )
        sentences.append(pick(rng, choices))
    return " ".join(sentences)


def animal_life(rng: random.Random) -> str:
    """Colour, home and food of two animals."""
    sentences = []
    for animal in draw(rng, ANIMALS, 2):
        facts = (
            f"The {animal.name} is {animal.colour}.",
            f"The {animal.name} lives near the {animal.home}.",
            f"The {animal.name} likes {animal.food} most.",
        )
        sentences += draw(rng, facts, 2)
    return " ".join(sentences)


def daily_life(rng: random.Random) -> str:
    """Where a person lives and works, and what is there today."""
    person, guest = draw(rng, PEOPLE, 2)
    animal, thing, colour = pick(rng, ANIMALS), pick(rng, THINGS), pick(rng, COLOURS)
    sentences = (
        f"{person.name} is a {person.work} and lives near the {person.place}.",
        f"{person.name} bought a {colour} {thing} from {guest.name}, the {guest.work}.",
        f"{person.name} gave some {animal.food} to the {animal.name}.",
        f"In the evening {guest.name} went back to the {guest.place}.",
    )
    return " ".join((sentences[0], *draw(rng, sentences[1:], 2)))


def handing_over(rng: random.Random) -> str:
    """A thing goes from hand to hand; the last sentence says who has it."""
    thing, colour, place = pick(rng, THINGS), pick(rng, COLOURS), pick(rng, PLACES)
    people = [person.name for person in draw(rng, PEOPLE, pick(rng, (2, 3, 4)))]
    sentences = [f"{people[0]} found a {colour} {thing} near the {place}."]
    for giver, taker in zip(people, people[1:], strict=False):
        choices = (f"{giver} gave the {thing} to {taker}.", f"{taker} took the {thing} from {giver}.")
        sentences.append(pick(rng, choices))
    return " ".join((*sentences, f"Now {people[-1]} has the {colour} {thing}."))


# Two paragraphs in three are about sizes.
KINDS: tuple[Callable[[random.Random], str], ...] = (
    comparison,
    comparison,
    procession,
    procession,
    procession,
    how_big,
    animal_life,
    daily_life,
    handing_over,
)
