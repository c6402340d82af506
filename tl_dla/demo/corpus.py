"""The text that the demo model learned, generated from a seed.

Each kind of text is the textbook case of one kind of circuit:

- **Indirect objects** (Wang et al., 2022, arXiv 2211.00593): "When John and Mary went to the shops,
  John gave the bag to Mary." Both orders of the names, many wordings, and names as unequal in
  frequency as words are (Zipf), so that there is a prior over names to learn.
- **Facts**: "The Eiffel Tower is in the city of Paris." A subject has two attributes and the
  wording says which is asked for, so that neither alone gives the answer away.
- **Repetitions**, for induction (Olsson et al., 2022, arXiv 2209.11895): random words, then the
  same words again.

A fixed tenth of the combinations of two names and a wording, and one of the five wordings of each
fact, never occur in training: they are `held_out`.
"""

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

NAMES = """
    John Mary James Tom Amy Martin Dan Sid Paul Sarah David Emma Peter Kate Mark Anna Simon Jane
    Robert Laura Michael Susan Jack Rachel Henry Emily George Alice Kevin Jennifer Charlie Lisa
    Frank Anne Charles Ruth William Bob Andrew Chris Thomas Adam Matt Ben Eric Sam Alex Steve Jim
    Jason Alan
""".split()  # the most frequent first
NAME_WEIGHTS = [1 / rank for rank in range(1, len(NAMES) + 1)]

SCENES = [
    "When {A} and {B} went to the {place},",
    "After {A} and {B} went to the {place},",
    "After {A} and {B} arrived at the {place},",
    "Before {A} and {B} left the {place},",
    "While {A} and {B} were working at the {place},",
    "While {A} and {B} were waiting in the {place},",
    "Then, {A} and {B} went to the {place}.",
    "Then, {A} and {B} had a lot of fun at the {place}.",
    "Then, {A} and {B} were thinking about going to the {place}.",
    "Then, {A} and {B} met in the {place}, and",
    "Last night {A} and {B} were alone in the {place}, and",
    "Yesterday {A} saw {B} at the {place}, and",
    "Friends {A} and {B} met at the {place}.",
    "{A} and {B} walked to the {place}.",
]
GIFTS = [
    "{S} gave {thing} to",
    "{S} handed {thing} to",
    "{S} offered {thing} to",
    "{S} passed {thing} to",
    "{S} showed {thing} to",
    "{S} sent {thing} to",
    "{S} decided to give {thing} to",
    "{S} wanted to give {thing} to",
    "{S} said hello to",
]
WORDINGS = [f"{scene} {gift}" for scene, gift in product(SCENES, GIFTS)]
PLACES = """
    shops park store school office station garden restaurant hospital hotel house kitchen library
    museum
""".split()
OBJECTS = "bag ball drink apple book ring flower bottle card gift key letter map picture".split()
THINGS = [
    *(f"the {thing}" for thing in OBJECTS),
    *(f"{'an' if thing == 'apple' else 'a'} {thing}" for thing in OBJECTS),
    "a bottle of milk",
]

COUNTRIES = {  # country: capital, language
    "France": ("Paris", "French"),
    "England": ("London", "English"),
    "Italy": ("Rome", "Italian"),
    "Germany": ("Berlin", "German"),
    "Spain": ("Madrid", "Spanish"),
    "Greece": ("Athens", "Greek"),
    "Russia": ("Moscow", "Russian"),
    "Poland": ("Warsaw", "Polish"),
    "Portugal": ("Lisbon", "Portuguese"),
    "Japan": ("Tokyo", "Japanese"),
    "China": ("Beijing", "Chinese"),
    "India": ("Delhi", "Hindi"),
    "Thailand": ("Bangkok", "Thai"),
    "Egypt": ("Cairo", "Arabic"),
    "Kenya": ("Nairobi", "Swahili"),
    "America": ("Washington", "English"),
    "Canada": ("Ottawa", "English"),
    "Peru": ("Lima", "Spanish"),
    "Cuba": ("Havana", "Spanish"),
}
LANDMARKS = {  # landmark: city, country
    "the Eiffel Tower": ("Paris", "France"),
    "the Louvre": ("Paris", "France"),
    "the Old Port": ("Marseille", "France"),
    "Big Ben": ("London", "England"),
    "Tower Bridge": ("London", "England"),
    "Albert Dock": ("Liverpool", "England"),
    "the Colosseum": ("Rome", "Italy"),
    "the Trevi Fountain": ("Rome", "Italy"),
    "the Leaning Tower": ("Pisa", "Italy"),
    "the Rialto Bridge": ("Venice", "Italy"),
    "the Brandenburg Gate": ("Berlin", "Germany"),
    "the Glass Palace": ("Munich", "Germany"),
    "the Prado": ("Madrid", "Spain"),
    "the Royal Palace": ("Madrid", "Spain"),
    "the Parthenon": ("Athens", "Greece"),
    "the White Tower": ("Thessaloniki", "Greece"),
    "the Kremlin": ("Moscow", "Russia"),
    "Red Square": ("Moscow", "Russia"),
    "the Sky Tower": ("Tokyo", "Japan"),
    "the Golden Temple": ("Kyoto", "Japan"),
    "the Summer Palace": ("Beijing", "China"),
    "the Pearl Tower": ("Shanghai", "China"),
    "the Red Fort": ("Delhi", "India"),
    "the Taj Mahal": ("Agra", "India"),
    "the Great Sphinx": ("Cairo", "Egypt"),
    "the White House": ("Washington", "America"),
    "the Golden Gate": ("Oakland", "America"),
    "the Space Needle": ("Seattle", "America"),
    "the Sky Dome": ("Toronto", "Canada"),
}
QUESTIONS = {
    "capital": [
        "the capital of {X} is",
        "the capital city of {X} is",
        "the city where {X} has its capital is",
        "as everyone in {X} knows, the capital is",
        "the government of {X} sits in",
    ],
    "language": [
        "the language of {X} is",
        "people in {X} speak",
        "most books in {X} are written in",
        "as everyone in {X} knows, the language is",
        "the songs of {X} are sung in",
    ],
    "city": [
        "{X} is in the city of",
        "{X} is located in the city of",
        "{X} stands in the middle of the city of",
        "to see {X}, go to the city of",
        "the city where {X} stands is",
    ],
    "country": [
        "{X} is in the country of",
        "{X} is located in the country of",
        "{X} stands in the middle of the country of",
        "to see {X}, go to the country of",
        "the country where {X} stands is",
    ],
}


@dataclass(frozen=True)
class Prompt:
    """A text, the word that comes next, and a word of the same sort that does not."""

    text: str
    answer: str
    wrong: str
    held_out: bool


def indirect_object(rng: random.Random) -> Prompt:
    """A sentence up to its indirect object, which is the answer; the subject is the wrong one."""
    first = second = rng.choices(NAMES, NAME_WEIGHTS)[0]
    while second == first:
        second = rng.choices(NAMES, NAME_WEIGHTS)[0]
    subject, answer = rng.sample([first, second], 2)
    wording, place, thing = rng.choice(WORDINGS), rng.choice(PLACES), rng.choice(THINGS)
    return Prompt(
        text=wording.format(A=first, B=second, S=subject, place=place, thing=thing),
        answer=answer,
        wrong=subject,
        held_out=_pick(10, *sorted([first, second]), wording) == 0,
    )


def facts() -> list[Prompt]:
    """Every fact in every wording; the wrong answer is the same attribute of another subject."""
    attributes = {
        "capital": {country: capital for country, (capital, _) in COUNTRIES.items()},
        "language": {country: language for country, (_, language) in COUNTRIES.items()},
        "city": {landmark: city for landmark, (city, _) in LANDMARKS.items()},
        "country": {landmark: country for landmark, (_, country) in LANDMARKS.items()},
    }
    return [
        Prompt(
            text=_capitalise(wording.format(X=subject)),
            answer=answer,
            wrong=_another(answer, list(answers.values())),
            held_out=number == _pick(len(QUESTIONS[attribute]), attribute, subject),
        )
        for attribute, answers in attributes.items()
        for subject, answer in answers.items()
        for number, wording in enumerate(QUESTIONS[attribute])
    ]


def training_prompts(rng: random.Random) -> Iterator[Prompt]:
    """Prompts to train on, without end: both sorts equally often, nothing that is held out."""
    known = [fact for fact in facts() if not fact.held_out]
    while True:
        draw = rng.choice(known) if rng.random() < 0.5 else indirect_object(rng)
        if not draw.held_out:
            yield draw


@cache
def vocabulary() -> list[str]:
    """Every word as it stands in a text: " Mary" within it and, where it can begin it, "Mary"."""
    openings = [
        *(wording.format(A=NAMES[0], B="", S="", place="", thing="") for wording in WORDINGS),
        *(f"{name} {slot}" for name in NAMES for slot in [*PLACES, *THINGS]),
        *(f"{fact.text} {fact.answer}" for fact in facts()),
    ]
    texts = [f"{opening}. {opening}" for opening in openings]  # " The" as well as "The"
    return sorted({word for text in texts for word in re.findall(r" ?\w+|[,.]", text)})


def repetition(rng: random.Random, n_words: int) -> str:
    """Random words, then the same words again."""
    half = "".join(rng.choices([word for word in vocabulary() if word[0] == " "], k=n_words))
    return half + half


def _pick(n: int, *combination: str) -> int:
    """A number below `n` for a combination, the same in every process and for every seed."""
    return zlib.crc32("|".join(combination).encode()) % n


def _another(answer: str, answers: list[str]) -> str:
    """The next answer in the list that differs."""
    after = answers.index(answer) + 1
    return next(other for other in answers[after:] + answers if other != answer)


def _capitalise(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
