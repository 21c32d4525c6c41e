"""The demo's text: a family of small word tasks for pretraining, and one new task for fine-tuning.

Pretraining teaches the ingredients (copy words, change their case, join them, pick letters). The fine-tuning task,
`Write as camelCase: count the open orders` -> `countTheOpenOrders`, combines some of them and is never shown before.

Everything is drawn from a `random.Random` seeded with a string, so the same seed gives the same text on every machine.
"""

# ruff: noqa: SIM905 - a word list reads better as text

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

VERBS = """add build call check clean close copy count draw drop fetch fill find fix hide join keep list load lock make
mark merge move open pack paint pick play print push read rename reset save scan send share show skip sort split start
stop store test trim update wash write""".split()

SINGULAR_DETERMINERS = """any each every my no one that the this your""".split()

PLURAL_DETERMINERS = """all any five four many most my no our six some the these those three two your""".split()

ADJECTIVES = """active big blank blue bright broken clean closed cold dark dry early empty extra fast final first free
fresh full global good green heavy hidden large last late local long lost main new next old open orange public
quick quiet ready red round safe short silver simple slow small soft strong sunny tiny total warm white wide wild
yellow young""".split()

NOUNS = """address answer apple balance banana basket bird boat book bottle box bridge button candle card chair city
clock cloud coin color copy cup customer door dragon event farmer field file flag flower forest friend garden
glass grape hammer horse house island item jacket key kitchen lamp leaf lemon letter line list market message mirror
morning mountain name number ocean order page paper pencil photo picture pocket price queen question rabbit
report river road room sample school score shadow ship shoe signal song spoon star station stone story street student
sugar table task teacher ticket tiger token total train tree user value village wagon wallet water weather window
winter word year""".split()

PREPOSITIONS = """above after at before behind beside by for from in near of on over to under with""".split()

NUMBER_WORDS = "zero one two three four five six seven eight nine".split()

DEMO_INSTRUCTION = "Write as camelCase"


@dataclass(frozen=True)
class Task:
    """One pretraining task: the ways of asking for it, and the answer for a list of lower-case words."""

    instructions: tuple[str, ...]
    answer: Callable[[list[str]], str]


PRETRAINING_TASKS = (
    Task(("Copy", "Repeat the words", "Write as it is"), lambda w: " ".join(w)),
    Task(("Write in capital letters", "Use upper case"), lambda w: " ".join(w).upper()),
    Task(("Capitalize each word", "Write as a title"), lambda w: " ".join(x.capitalize() for x in w)),
    Task(("Write as a sentence", "Make a sentence"), lambda w: " ".join(w).capitalize() + "."),
    Task(("Remove the spaces", "Join the words"), lambda w: "".join(w)),
    Task(("Join with hyphens", "Put a hyphen between the words"), lambda w: "-".join(w)),
    Task(("Join with underscores", "Write in snake case"), lambda w: "_".join(w)),
    Task(("Join with commas", "Write as a list"), lambda w: ", ".join(w)),
    Task(("Write the first word", "Which word is first"), lambda w: w[0]),
    Task(("Write the last word", "Which word is last"), lambda w: w[-1]),
    Task(("Leave out the first word", "Drop the first word"), lambda w: " ".join(w[1:])),
    Task(("Leave out the last word", "Drop the last word"), lambda w: " ".join(w[:-1])),
    Task(("Write the words backwards", "Reverse the order of the words"), lambda w: " ".join(w[::-1])),
    Task(("Write the first letters", "Take the first letter of each word"), lambda w: "".join(x[0] for x in w)),
    Task(("Write the initials", "Make an acronym"), lambda w: "".join(x[0] for x in w).upper()),
    Task(("Count the words", "How many words are here"), lambda w: NUMBER_WORDS[len(w)]),
    Task(("Say the last word twice",), lambda w: f"{w[-1]} {w[-1]}"),
    Task(("Capitalize the first word",), lambda w: " ".join([w[0].capitalize(), *w[1:]])),
    Task(("Capitalize the last word",), lambda w: " ".join([*w[:-1], w[-1].capitalize()])),
    Task(("Write the first word in capital letters",), lambda w: w[0].upper()),
)


def plural_of(noun: str) -> str:
    """`story` -> `stories`, `box` -> `boxes`, `key` -> `keys`."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def phrase(random: Random) -> list[str]:
    """A short English phrase of 2 to 5 lower-case words, such as `count the open orders`."""
    plural = random.random() < 0.5
    noun = random.choice(NOUNS)
    words = [random.choice(VERBS)]
    if not plural or random.random() < 0.7:
        words.append(random.choice(PLURAL_DETERMINERS if plural else SINGULAR_DETERMINERS))
    if random.random() < 0.6:
        words.append(random.choice(ADJECTIVES))
    words.append(plural_of(noun) if plural else noun)
    if len(words) <= 3 and random.random() < 0.3:
        words += [random.choice(PREPOSITIONS), plural_of(random.choice(NOUNS))]
    return words


def made_up_word(random: Random) -> str:
    """A word of 1 to 3 random syllables, 2 to 7 letters, so that copying cannot be done by heart."""
    syllables = (random.choice("bcdfghjklmnpqrstvwxyz") + random.choice("aeiou") for _ in range(random.randint(1, 3)))
    return "".join(syllables) + random.choice(("", "", "l", "n", "r", "s", "t"))


def pretraining_words(random: Random) -> list[str]:
    """Two to five words: an English phrase, unrelated English words, or made-up words."""
    kind = random.random()
    if kind < 0.4:
        return phrase(random)
    count = random.randint(2, 5)
    if kind < 0.7:
        return [random.choice(random.choice((VERBS, ADJECTIVES, NOUNS))) for _ in range(count)]
    return [made_up_word(random) for _ in range(count)]


def prose(random: Random) -> str:
    """One generated English sentence."""
    who, what, where = (random.choice(NOUNS) for _ in range(3))
    verb = random.choice(VERBS)
    sentence = random.choice(
        (
            f"the {random.choice(ADJECTIVES)} {who} can {verb} the {what} {random.choice(PREPOSITIONS)} the {where}.",
            f"we {verb} {random.choice(SINGULAR_DETERMINERS)} {what} and then go to the {where}.",
            f"there is a {random.choice(ADJECTIVES)} {what} {random.choice(PREPOSITIONS)} the {where}.",
        )
    )
    return sentence[0].upper() + sentence[1:]


def pretraining_documents(seed: str) -> Iterator[tuple[str, str]]:
    """Endless (prompt, completion) pairs; a prompt ends with a newline, prose has an empty prompt."""
    random = Random(f"pretraining/{seed}")
    while True:
        if random.random() < 0.05:
            yield "", prose(random)
            continue
        task, words = random.choice(PRETRAINING_TASKS), pretraining_words(random)
        yield f"{random.choice(task.instructions)}: {' '.join(words)}\n", task.answer(words)


def camel_case(words: list[str]) -> str:
    """`["count", "the", "open", "orders"]` -> `countTheOpenOrders`."""
    return words[0] + "".join(word.capitalize() for word in words[1:])


def demo_rows(seed: str, count: int) -> list[dict[str, str]]:
    """`count` rows `{"prompt", "completion"}` of the fine-tuning task; no prompt occurs twice."""
    random, rows = Random(f"demo/{seed}"), {}
    while len(rows) < count:
        words = phrase(random)
        if "leafs" in words:
            continue  # the one wrong plural of `plural_of`; the shipped base has read it, the demo need not show it
        prompt = f"{DEMO_INSTRUCTION}: {' '.join(words)}\n"
        rows[prompt] = {"prompt": prompt, "completion": camel_case(words)}
    return list(rows.values())
