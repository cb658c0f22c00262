"""The closed vocabularies of the pictures: colours, shapes, emoji concepts, countries, fonts.

Read by `assets` (what to render), `pictures` (what to draw) and `questions` (what may be answered).
Nothing here but constants; which vendors, styles and fonts are kept for the test is said here too.
"""

from __future__ import annotations

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 35),
    "green": (35, 150, 50),
    "blue": (40, 80, 220),
    "yellow": (245, 220, 40),
    "orange": (245, 140, 25),
    "purple": (135, 50, 170),
    "pink": (250, 150, 195),
    "brown": (125, 75, 35),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
    "gray": (135, 135, 135),
    "cyan": (60, 215, 225),
}

SHAPES = ("circle", "square", "triangle", "star", "diamond", "heart", "cross", "ring")

HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("green", "heart"),
        ("blue", "cross"),
        ("yellow", "square"),
        ("orange", "ring"),
        ("purple", "triangle"),
        ("pink", "circle"),
        ("cyan", "diamond"),
    }
)
"""Colour and shape pairs that no training picture shows."""

ANIMALS = (
    "bear",
    "bird",
    "cat",
    "cow",
    "dog",
    "elephant",
    "giraffe",
    "horse",
    "sheep",
    "zebra",
)
"""Animal-MNIST's classes in label order."""

EMOJI_GROUPS: dict[str, str] = {
    "animal": (
        "dog-face:dog cat-face:cat horse-face:horse cow-face:cow pig-face:pig rabbit-face:rabbit "
        "bear panda koala lion tiger-face:tiger monkey-face:monkey mouse-face:mouse frog chicken "
        "penguin owl elephant turtle snake octopus whale crab snail honeybee:bee "
        "lady-beetle:beetle butterfly unicorn"
    ),
    "food": (
        "red-apple:apple banana grapes strawberry watermelon lemon pineapple cherries carrot "
        "mushroom bread cheese-wedge:cheese hamburger pizza hot-dog:hotdog taco doughnut:donut "
        "birthday-cake:cake ice-cream lollipop french-fries:fries avocado"
    ),
    "vehicle": (
        "automobile:car bus taxi tractor bicycle helicopter rocket sailboat airplane ambulance"
    ),
    "nature": (
        "snowman rainbow cloud crescent-moon:moon evergreen-tree:tree palm-tree cactus sunflower "
        "tulip rose four-leaf-clover:clover fire"
    ),
    "object": (
        "soccer-ball:football basketball trophy guitar trumpet violin key locked:lock hammer "
        "scissors light-bulb:lamp pencil television camera telephone hourglass bell balloon "
        "wrapped-gift:gift crown glasses top-hat:hat umbrella"
    ),
    "face": "ghost robot alien skull jack-o-lantern:pumpkin",
}
"""Emoji names (Unicode CLDR, hyphened), with our shorter word after a colon."""

TRAIN_VENDORS = ("noto", "noto-v1", "openmoji", "emojione", "fluent-emoji-flat", "fxemoji")
TEST_VENDORS = ("twemoji",)

COUNTRIES: dict[str, str] = dict(
    pair.split(":")
    for pair in (
        "fr:France de:Germany it:Italy es:Spain pt:Portugal gb:Britain ie:Ireland nl:Netherlands "
        "be:Belgium ch:Switzerland at:Austria pl:Poland cz:Czechia hu:Hungary ro:Romania "
        "bg:Bulgaria gr:Greece tr:Turkey ua:Ukraine ru:Russia fi:Finland se:Sweden no:Norway "
        "dk:Denmark is:Iceland ee:Estonia lt:Lithuania us:USA ca:Canada mx:Mexico br:Brazil "
        "ar:Argentina cl:Chile co:Colombia pe:Peru jm:Jamaica cu:Cuba jp:Japan cn:China kr:Korea "
        "in:India pk:Pakistan th:Thailand vn:Vietnam id:Indonesia il:Israel sa:Arabia eg:Egypt "
        "ma:Morocco ng:Nigeria ke:Kenya za:Africa et:Ethiopia gh:Ghana sn:Senegal au:Australia "
        "nz:Zealand qa:Qatar kw:Kuwait dz:Algeria"
    ).split()
)
COUNTRIES |= {"za": "South Africa", "nz": "New Zealand", "sa": "Saudi Arabia"}

TWEMOJI_FLAGS = {
    "gb": "united-kingdom",
    "us": "united-states",
    "kr": "south-korea",
    "cz": "czechia",
    "tr": "turkey",
}
"""Where twemoji's flag name is not `flag-` and the country in lower case."""

TRAIN_FLAG_STYLES = ("flag-icons", "circle-flags", "iso-flags", "openmoji", "emojione")
TEST_FLAG_STYLES = ("twemoji",)

TRAIN_FONT_PACKAGES = (
    "fonts-dejavu-core",
    "fonts-liberation2",
    "fonts-open-sans",
    "fonts-lato",
    "fonts-roboto-unhinted",
    "fonts-urw-base35",
    "fonts-inconsolata",
    "fonts-ebgaramond",
)
TEST_FONT_PACKAGES = (
    "fonts-cantarell",
    "fonts-comic-neue",
    "fonts-crosextra-caladea",
    "fonts-courier-prime",
)
UNREADABLE_FONTS = (
    "D050000L",
    "StandardSymbols",
    "Z003",
    "Hairline",
    "Thin",
    "Italic",
    "Oblique",
    "Light",
    "It.",
    "BdIt",
    "EBGaramond08",
)
"""Parts of file names we leave out: symbol fonts, hair-thin cuts, and slanted ones."""


def dense_classes() -> list[str]:
    """What a patch can show, for the labels the picture tower is also trained on; 0 is nothing."""
    words = [f"emoji {word}" for _, word, _ in emoji_concepts()]
    animals = [f"animal {name}" for name in ANIMALS]
    flags = [f"flag {code}" for code in COUNTRIES]
    bars = [f"bar {value}" for value in (10, 20, 30, 40, 50)]
    symbols = list("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    return ["nothing", *SHAPES, *words, *animals, *flags, *bars, *symbols]


def emoji_concepts() -> list[tuple[str, str, str]]:
    """All emoji concepts as (Unicode name, our word, group), in a fixed order."""
    rows = []
    for group, names in EMOJI_GROUPS.items():
        for entry in names.split():
            name, _, word = entry.partition(":")
            rows.append((name, word or name.replace("-", " "), group))
    return rows
