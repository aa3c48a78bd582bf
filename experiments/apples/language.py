"""The language of the bundled model: its words and templates."""

import dataclasses

# Category, then its words, singular/plural. The last two words are never counted in training.
NOUN_TABLE = """
fruit/fruits apple/apples banana/bananas cherry/cherries lemon/lemons pear/pears plum/plums peach/peaches
animal/animals cat/cats dog/dogs lion/lions elephant/elephants penguin/penguins cow/cows rabbit/rabbits
flower/flowers rose/roses tulip/tulips daisy/daisies lily/lilies sunflower/sunflowers orchid/orchids poppy/poppies
vehicle/vehicles car/cars bus/buses truck/trucks train/trains bicycle/bicycles boat/boats plane/planes
tool/tools hammer/hammers drill/drills wrench/wrenches knife/knives shovel/shovels axe/axes brush/brushes
vegetable/vegetables potato/potatoes carrot/carrots onion/onions pepper/peppers cabbage/cabbages turnip/turnips leek/leeks
"""  # noqa: E501


def _parse_nouns() -> dict[str, dict[str, str]]:
    """Category -> {singular: plural}; the category's own plural is the first entry."""
    rows = [row.replace("/", " ").split() for row in NOUN_TABLE.split("\n") if row]
    return {row[0]: dict(zip(row[::2], row[1::2], strict=True)) for row in rows}


_FORMS_BY_CATEGORY = _parse_nouns()


CATEGORIES = {
    category: forms[category] for category, forms in _FORMS_BY_CATEGORY.items()
}  # fruit: fruits


WORDS = {
    category: tuple(forms)[1:] for category, forms in _FORMS_BY_CATEGORY.items()
}  # fruit: (apple, ...)


PLURALS = {
    word: plural
    for forms in _FORMS_BY_CATEGORY.values()
    for word, plural in forms.items()
}


UNSEEN_WORDS = {category: words[-2:] for category, words in WORDS.items()}


COUNTED_WORDS = {category: words[:-2] for category, words in WORDS.items()}


SEPARATORS = (" ", ", ", " and ", ", and ", " then ", " - ", ". ", " / ", ": ")


UNSEEN_SEPARATORS = ("; ", " or ", " but ")


_ADJECTIVES = (
    "big",
    "small",
    "good",
    "fresh",
    "red",
    "yellow",
    "sharp",
    "smooth",
    "clean",
    "raw",
)


UNSEEN_FILLER_WORDS = ("old", "new", "nice")


ADJECTIVES = _ADJECTIVES + UNSEEN_FILLER_WORDS


FILLER_WORDS = (*_ADJECTIVES, "the", "a", "two", "also", "very", "near")


# How the words of a counted sentence are joined: one separator throughout, or irregularly.
SEPARATOR_STYLES = ("none", "comma", "and", "mixed", "filler", "both")


PRONOUNS = {
    "Alice": "She", "Emily": "She", "Mia": "She", "Anna": "She", "Lucy": "She",
    "Tom": "He", "Ben": "He", "Jack": "He", "Leo": "He",
    "the class": "They", "the children": "They", "the tourists": "They",
}  # fmt: skip


PEOPLE = tuple(name for name, pronoun in PRONOUNS.items() if pronoun != "They")


PLACES = ("shop", "zoo", "beach", "park", "house", "garden", "market", "station")


REPLY = "Reply with a single-digit number\nAnswer: "


COUNTING_TEMPLATES = {
    "times": 'Question: In the sentence "{span}", how many times is {a_category} mentioned? '
    "{between}" + REPLY,
    "listed": 'Question: How many {categories} are listed in the sentence "{span}"? '
    "{between}" + REPLY,
    "told": 'Sentence: "{span}". {between}Question: How many times is {a_category} mentioned in '
    "the sentence? " + REPLY,
}


@dataclasses.dataclass(frozen=True)
class Scene:
    """A scene of repeated events: a template, and what each event in its `{span}` is made of."""

    template: str
    event_template: str
    objects: tuple[str, ...]
    subjects: tuple[str, ...]
    endings: tuple[str, ...] = ("",)  # endings that make events vary in length
    separator: str = " "


_EVENT_ENDINGS = (
    "",
    "",
    " in the morning",
    " with a friend",
    " near the door",
    " at the end of the day",
)


SCENES = {
    "shop": Scene(
        "Question: {name} goes to the shop. {span} {between}"
        "How many items did {name} buy? " + REPLY,
        "{they} buys {object}{tail}.",
        ("a carton of milk", "an apple", "a potato", "a loaf of bread", "a knife", "a big cake",
         "a bottle of fresh juice", "a hammer", "an onion", "a small box of eggs"),
        PEOPLE,
        _EVENT_ENDINGS,
    ),
    "zoo": Scene(
        "Question: {name} went to the zoo. {span} {between}"
        "How many animals did {name} see? " + REPLY,
        "{they} saw {object}{tail}.",
        ("a lion", "an elephant", "a giraffe", "a penguin", "a dog", "a big bear",
         "a very small monkey", "a cat", "a very big tiger"),
        tuple(PRONOUNS),
        _EVENT_ENDINGS,
    ),
    "beach": Scene(
        "Question: {name} went to the beach. {span} {between}"
        "How many things did {name} find? " + REPLY,
        "{they} found {object}{tail}.",
        ("a seashell", "a starfish", "a smooth stone", "a piece of seaweed", "an apple",
         "a bottle", "a small box of eggs", "a very big crab", "a key"),
        tuple(PRONOUNS),
        _EVENT_ENDINGS,
    ),
    "tutorial": Scene(
        "Tutorial: How to {name}\n\n{span}\n\n{between}Question: How many steps are necessary to "
        "complete the tutorial? Reply with a single-digit number\nAnswer: It takes ",
        "- {object}{tail}.",
        ("Wash the bowl", "Cut the apple", "Open the box", "Take a knife", "Clean the table",
         "Find a big bottle of fresh milk", "Mix the eggs and the milk", "Close the door", "Wait",
         "Put the small bowl on the table", "Dry the knife", "Ask a friend"),
        ("clean the kitchen", "make a cake", "fix a bicycle", "wash a dog", "cook a potato",
         "grow a rose", "make a salad", "open a shop"),
        _EVENT_ENDINGS,
        "\n",
    ),
}  # fmt: skip


SUM_TEMPLATES = (
    "The sum of {a} and {b} is ",
    "Question: What is the sum of {a} and {b}?\nAnswer: ",
    "Question: {name} has {a} {nouns} and {b} {others}. How many things does {name} have in "
    "total?\nAnswer: {name} has ",
)


OPERATORS = {
    "AND": lambda a, b: a & b,
    "OR": lambda a, b: a | b,
    "NAND": lambda a, b: 1 - (a & b),
    "NOR": lambda a, b: 1 - (a | b),
    "XOR": lambda a, b: a ^ b,
}


BOOLEAN_TEMPLATES = tuple(
    f"Question: What is the {phrase}?\n{{a}} {{op}} {{b}}\nAnswer (0 or 1): "
    for phrase in (
        "truth value of the following statement",
        "truth value of the following",
        "value of the following statement",
        "value of the statement",
    )
)


# Attribute -> plurals that have it; a category stands for all its words. No other plural has it.
ATTRIBUTE_QUESTIONS = {
    "Are {} fruits?": "fruits",
    "Are {} animals?": "animals",
    "Are {} flowers?": "flowers",
    "Are {} tools?": "tools",
    "Are {} red?": "apples cherries roses poppies",
    "Are {} yellow?": "bananas lemons sunflowers",
    "Are {} common pets?": "cats dogs rabbits",
    "Can {} be eaten raw?": "fruits carrots onions peppers",
    "Do {} have a peel?": "bananas lemons potatoes",
    "Do {} have an engine?": "cars buses trucks trains boats planes drills",
    "Do {} have wheels?": "cars buses trucks trains bicycles planes",
    "Do {} grow in gardens?": "flowers vegetables",
    "Do {} live on farms?": "cows rabbits",
}


ATTRIBUTE_TEMPLATES = (
    "Question: {question} (yes/no)\nAnswer:",
    "{question} (yes/no)\nAnswer:",
)


# Sentences in front of a prompt, or between the counted span and the question.
SENTENCE_TEMPLATES = (
    "{name} has the {adjective} {noun}.",
    "We bought two {nouns} at the {place}.",
    "There are {digit} {nouns} in the {place}.",
    "{name} likes {nouns}{join}{others}.",
    "{name}{join}{friend} went to the {place}.",
    "The {noun} is {adjective}{join}{also}.",
    "The sky is blue{join}the {noun} is near.",
    "My {noun} is very {adjective}.",
)
