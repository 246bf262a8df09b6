"""The language of the tiny example: a grammar of questions and replies, and the gold reward of a reply.

A question asks about food, travel or service. A reply is one to three short sentences. Some of its words are
good, some are bad, and the words before can strengthen, weaken or turn round what follows:

    "The soup was fresh, but the bread was not warm."       fresh +1, warm -1
    "We had a very bumpy ride. It was hardly awful."        bumpy -2, awful +2

The gold reward is the example's own knowledge. The pairs are labelled with it, the tests, the study and the table at
the end of a run measure with it, and the training never sees it.
"""

import itertools
import re

# What a word is worth by itself. Every other word of the language is worth 0.
GOOD = {
    "food": ("fresh", "tasty", "warm"),
    "ride": ("smooth", "quick", "easy"),
    "person": ("friendly", "kind", "helpful"),
    "place": ("clean", "bright", "cosy"),
}
BAD = {
    "food": ("stale", "bland", "greasy"),
    "ride": ("late", "slow", "bumpy"),
    "person": ("rude", "grumpy", "careless"),
    "place": ("dirty", "noisy", "dark"),
}
PLAIN = {
    "food": ("plain", "spicy"),
    "ride": ("long", "short"),
    "person": ("busy", "young"),
    "place": ("small", "large"),
}
BEST, WORST = ("lovely", "superb"), ("awful", "dreadful")
CLOSING = ("recommend", "worth", "return")
VALUE = (
    {word: 1.0 for words in GOOD.values() for word in words}
    | {word: -1.0 for words in BAD.values() for word in words}
    | {word: 2.0 for word in BEST}
    | {word: -2.0 for word in WORST}
    | {word: 1.0 for word in CLOSING}
)
# What a word does to the word after it. Factors in a row multiply, but never beyond 2 or -2.
FACTOR = {"not": -1.0, "hardly": -1.0, "never": -1.0, "very": 2.0, "really": 2.0, "rather": 0.5, "fairly": 0.5}
NEGATIONS, STRONGER, WEAKER = ("not", "hardly", "never"), ("very", "really"), ("rather", "fairly")
UNKNOWN = -1.0  # a word that the grammar cannot make

# Nouns by the kind of adjective they take: those asked about, those of replies ("We had a" never takes the first),
# and the kinds a reply may turn to.
ASKED = {
    "food": ("soup", "bread", "pasta", "curry", "salad", "coffee", "cake", "pie", "stew", "fish", "rice", "toast"),
    "ride": ("train", "bus", "ferry", "flight", "tram", "tour", "taxi"),
    "person": ("waiter", "driver", "cook", "host", "clerk", "porter", "staff"),
}
NOUNS = {
    "food": ("food", "meal", "dish"),
    "ride": ("journey", "trip", "ride"),
    "person": ("service", "welcome", "host"),
    "place": ("room", "place", "table"),
}
SIDES = {
    "food": ("food", "person", "place"),
    "ride": ("ride", "person", "place"),
    "person": ("person", "food", "place"),
}
HOUSES = tuple(
    f"{a} {b}"
    for a in ("old", "new", "corner", "harbour", "station", "garden")
    for b in ("cafe", "diner", "bakery", "hotel", "inn", "market")
)
CITIES = ("Rome", "Oslo", "Lisbon", "Dublin", "Athens", "Vienna", "Porto", "Prague")
QUESTIONS = (
    "How {was} the {noun} {where}?",
    "{Was} the {noun} {where} any good?",
    "Tell me about the {noun} {where}.",
    "What {was} the {noun} {where} like?",
)

OPENINGS = ("The {} was", "Our {} was", "Today the {} was", "Overall, the {} was")
MOODS = (0.2, 0.5, 0.8)
WORD = re.compile(r"[^\s.,]+")  # a word: a run of anything but white space, full stops and commas


def questions():
    """Every question of the language: a list of (text, kind of what it asks about), always in the same order."""
    made = []
    for kind, nouns in ASKED.items():
        if kind == "ride":
            places = [f"from {start} to {end}" for start in CITIES for end in CITIES if start != end]
        else:
            places = [f"at the {house}" for house in HOUSES]
        for noun, where, form in itertools.product(nouns, places, QUESTIONS):
            was = "were" if noun == "staff" else "was"
            made.append((form.format(was=was, Was=was.capitalize(), noun=noun, where=where), kind))
    return made


def reply(rng, kind):
    """A random reply to a question about something of a kind, 11 to 25 words, drawn with `rng` (a random.Random).

    It has three sentences, and a mood: each thing it says is good rather than bad with the chance MOODS gives.
    """
    while True:
        mood = rng.choice(MOODS)
        first = _statement(rng, mood, kind, rng.choice(SIDES[kind]))
        side, other = rng.choices(SIDES[kind], k=2)
        if rng.random() < 0.6:
            second = _statement(rng, mood, side, other)
        else:
            adjective = _phrase(rng, mood, side, attributive=True)
            second = f"We had {'an' if adjective[0] in 'aeiou' else 'a'} {adjective} {rng.choice(NOUNS[side][1:])}."
        turn = rng.choice(("", " really") if rng.random() < mood else (" not", " never"))
        last = rng.choice((f"I would{turn} recommend it.", f"We will{turn} return.", f"It was{turn} worth it."))
        text = f"{first} {second} {last}"
        if len(WORD.findall(text)) <= 25:
            return text


def _statement(rng, mood, kind, other):
    """One sentence that says something of one kind, and may add to that or turn to the other kind."""
    noun, first = rng.choice(NOUNS[kind]), _phrase(rng, mood, kind)
    text = rng.choice(OPENINGS).format(noun) + " " + first
    if rng.random() < 0.6:
        side = noun if rng.random() < 0.5 else rng.choice(NOUNS[other])
        second = first
        while second.split()[-1] == first.split()[-1]:
            second = _phrase(rng, mood, kind if side == noun else other)
        # "but" stands between good and bad, as in English
        join = "but" if gold_reward(first) * gold_reward(second) < 0 else "and"
        text += f" {join} {second}" if side == noun else f", {join} the {side} was {second}"
    return text + "."


def _phrase(rng, mood, kind, attributive=False):
    """An adjective with the words that modify it. Before a noun ("a very fresh meal") none of them negates."""
    draw = rng.random()
    if draw < 0.25 and not attributive:
        before = rng.choice(NEGATIONS + ("not very",)) + " "
    elif draw < 0.45:
        before = rng.choice(STRONGER) + " "
    elif draw < 0.55:
        before = rng.choice(WEAKER) + " "
    else:
        before = ""
    if rng.random() < 0.2:
        return before + rng.choice(PLAIN[kind])
    good = rng.random() < mood
    if draw < 0.25 and not attributive:
        good = not good  # the negation turns it round again
    strong = rng.random() < 0.15
    return before + rng.choice((BEST if strong else GOOD[kind]) if good else (WORST if strong else BAD[kind]))


def _lexicon():
    """Every word that the grammar can put into a reply, in lower case."""
    words = set(WORD.findall(" ".join(OPENINGS).replace("{}", "").lower()))
    words |= set("and but we had a an i would will it was not never really".split())
    words |= VALUE.keys() | FACTOR.keys()
    return words.union(*PLAIN.values(), *NOUNS.values())


LEXICON = frozenset(_lexicon())


def word_rewards(text):
    """The gold reward of each word of a reply: a list of (start, end, reward), character offsets into `text`.

    A word of VALUE earns its value times the factors of the words directly before it. Where it stood in the reply
    before it earns nothing good again, only bad. A word outside the language earns UNKNOWN. Every other word earns 0.
    A reward depends on the word and the words before it, never on what follows.
    """
    rewards, factor, seen = [], 1.0, set()
    for match in WORD.finditer(text):
        word = match.group().lower()
        if word in FACTOR:
            reward, factor = 0.0, max(-2.0, min(2.0, factor * FACTOR[word]))
        else:
            reward = VALUE.get(word, 0.0) * factor if word in LEXICON else UNKNOWN
            if word in seen:
                reward = min(reward, 0.0)
            if word in VALUE:
                seen.add(word)
            factor = 1.0
        rewards.append((match.start(), match.end(), reward))
    return rewards


def gold_reward(text):
    """The gold reward of a whole reply: the sum over its words."""
    return sum(reward for _, _, reward in word_rewards(text))


def gold_rewards(pieces):
    """The gold reward of each token: `pieces` are the texts of a reply's tokens in order, the list is as long.

    A word's reward stands on the token that holds the word's last character. The end-of-turn token has no
    text of its own: give it as "".
    """
    owner = [index for index, piece in enumerate(pieces) for _ in piece]
    rewards = [0.0] * len(pieces)
    for _, end, reward in word_rewards("".join(pieces)):
        rewards[owner[end - 1]] += reward
    return rewards
