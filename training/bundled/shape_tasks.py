"""Pictures of coloured shapes, several pictures in a prompt, and plain talk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from training.bundled import fonts, words
from training.bundled.page import Colour, Page, Picture, Rectangle, Wear, draw_wear
from training.bundled.sample import Sample, Turn, ask, boxes_answer, pick_turns
from training.bundled.text_tasks import DESCRIBE, ORDINALS, draw_lines, fit, plural

SHAPES = (
    "circle",
    "square",
    "triangle",
    "rectangle",
    "star",
    "diamond",
    "pentagon",
    "oval",
    "cross",
)
COLOURS: dict[str, Colour] = {
    "red": (220, 35, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (245, 215, 30),
    "orange": (245, 135, 20),
    "purple": (130, 50, 170),
    "pink": (250, 130, 185),
    "brown": (120, 72, 35),
    "black": (15, 15, 15),
    "white": (252, 252, 252),
    "gray": (130, 130, 130),
}
PAPERS: dict[str, Colour] = {
    "white": (255, 255, 255),
    "black": (12, 12, 12),
    "gray": (185, 185, 185),
    "light blue": (190, 220, 250),
    "light yellow": (253, 246, 195),
    "light green": (200, 240, 200),
    "light pink": (252, 214, 224),
}
_CLASHES = {("white", "white"), ("black", "black"), ("gray", "gray"), ("pink", "light pink")}
_CLASHES |= {("yellow", "light yellow"), ("white", "light yellow"), ("brown", "black")}
_CLASHES |= {("white", "light blue"), ("white", "light green"), ("white", "light pink")}
COUNT = (
    "How many {things} are there?",
    "How many {things} are in the image?",
    "How many {things} do you see?",
    "Count the {things}.",
    "How many {things} can you see in the picture?",
)
LOCATE = (
    "Locate the {thing} in the image.",
    "Locate the {thing}.",
    "Where is the {thing}? Answer with a bounding box in JSON.",
    "Find the {thing} and give its bounding box.",
    "Detect the {thing} and return bbox coordinates in JSON format.",
    "Give the bounding box of the {thing}.",
)
LOCATE_EVERY = (
    "Locate every {thing} in the image.",
    "Locate all the {things}.",
    "Detect all {things} and return their bounding boxes in JSON.",
    "Find all {things}. Output bbox coordinates in JSON format.",
)


@dataclass
class Item:
    """One drawn shape."""

    shape: str
    colour: str
    box: Rectangle

    @property
    def name(self) -> str:
        """Colour and shape."""
        return f"{self.colour} {self.shape}"


def plural_shape(shape: str) -> str:
    """The shape's plural."""
    return "crosses" if shape == "cross" else shape + "s"


def article(name: str) -> str:
    """The name with 'a' or 'an'."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def place(box: Rectangle, width: int, height: int) -> str:
    """The third of the picture in which the box's middle lies."""
    x, y = (box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height
    column = "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
    row = "top" if y < 1 / 3 else "bottom" if y > 2 / 3 else ""
    return " ".join(part for part in (row, column) if part) or "center"


def _points(shape: str, box: Rectangle) -> list[tuple[float, float]]:
    x1, y1, x2, y2 = box
    middle_x, middle_y = (x1 + x2) / 2, (y1 + y2) / 2
    if shape == "triangle":
        return [(middle_x, y1), (x2, y2), (x1, y2)]
    if shape == "diamond":
        return [(middle_x, y1), (x2, middle_y), (middle_x, y2), (x1, middle_y)]
    if shape == "cross":
        u, v = (x2 - x1) / 3, (y2 - y1) / 3
        corners = [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2)]
        return [(x1 + u * i, y1 + v * j) for i, j in [*corners, (0, 1), (1, 1)]]
    count, inner = (10, 0.42) if shape == "star" else (5, 1.0)
    points = []
    for index in range(count):
        radius = inner if shape == "star" and index % 2 else 1.0
        angle = 2 * math.pi * index / count
        points.append((radius * math.sin(angle), -radius * math.cos(angle)))
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    return [
        (x1 + (x - left) / (right - left) * (x2 - x1), y1 + (y - low) / (high - low) * (y2 - y1))
        for x, y in points
    ]


def draw_shape(page: Page, item: Item, fill: Colour, edge: Colour | None) -> None:
    """Draws one shape filling its box."""
    if item.shape in ("circle", "oval"):
        page.draw.ellipse(item.box, fill=fill, outline=edge)
    elif item.shape in ("square", "rectangle"):
        page.draw.rectangle(item.box, fill=fill, outline=edge)
    else:
        page.draw.polygon(_points(item.shape, item.box), fill=fill, outline=edge)


def _extent(rng: Random, shape: str, size: float) -> tuple[float, float]:
    if shape in ("rectangle", "oval"):
        short = size * rng.uniform(0.4, 0.62)
        return (size, short) if rng.random() < 0.6 else (short, size)
    if shape in ("triangle", "diamond"):
        return size, size * rng.uniform(0.85, 1.15)
    return size, size


def _jitter(rng: Random, colour: Colour) -> Colour:
    return tuple(min(255, max(0, level + rng.randint(-12, 12))) for level in colour)  # type: ignore[return-value]


def scene(rng: Random, most: int = 8, small: bool = False) -> tuple[Page, list[Item], str]:
    """A page with 1 to most shapes that do not touch; items in reading order of thirds."""
    paper = "white" if rng.random() < 0.6 else rng.choice(list(PAPERS))
    low, high = (120, 300) if small else (180, 640)
    if not small and rng.random() < 0.05:
        low, high = 600, 1280
    page = Page(
        rng.randint(low, high), rng.randint(low, int(high * 0.85)), PAPERS[paper], colour=True
    )
    palette = [name for name in COLOURS if (name, paper) not in _CLASHES]
    if rng.random() < 0.5:
        palette = rng.sample(palette, 3)
    kinds = list(SHAPES) if rng.random() < 0.5 else rng.sample(SHAPES, 3)
    if rng.random() < 0.35:  # several alike, so that counting a colour and a shape means something
        palette, kinds = rng.sample(palette, 2), rng.sample(SHAPES, 2)
    items: list[Item] = []
    edge = (0, 0, 0) if rng.random() < 0.2 else None
    wanted = rng.randint(1, most)
    shortest = min(page.width, page.height)
    for _ in range(wanted * 12):
        if len(items) == wanted:
            break
        shape = rng.choice(kinds)
        size = rng.uniform(0.12, 0.4 if wanted < 5 else 0.26) * shortest
        wide, tall = _extent(rng, shape, max(18.0, size))
        x, y = rng.uniform(4, page.width - wide - 4), rng.uniform(4, page.height - tall - 4)
        box = (round(x), round(y), round(x + wide), round(y + tall))
        if x < 4 or y < 4 or any(_near(box, item.box) for item in items):
            continue
        item = Item(shape, rng.choice(palette), box)
        draw_shape(page, item, _jitter(rng, COLOURS[item.colour]), edge)
        items.append(item)
    if not items:
        items.append(Item("circle", "red", (10, 10, 70, 70)))
        draw_shape(page, items[0], COLOURS["red"], edge)
    items.sort(key=lambda item: (3 * (item.box[1] + item.box[3]) // (2 * page.height), item.box[0]))
    return page, items, paper


def _near(one: Rectangle, other: Rectangle) -> bool:
    gap = 5
    return (
        one[0] < other[2] + gap
        and other[0] < one[2] + gap
        and one[1] < other[3] + gap
        and other[1] < one[3] + gap
    )


def describe(items: list[Item], paper: str, width: int, height: int) -> str:
    """The sentence about a scene: how many, then each with its place."""
    parts = [f"{article(item.name)} at the {place(item.box, width, height)}" for item in items]
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    count = plural(len(items), "shape")
    return f"The image shows {count} on a {paper} background: {listed}."


def shapes_sample(rng: Random, split: str) -> Sample:
    """A scene with questions about it; held-out samples ask one question of a fixed mix."""
    page, items, paper = scene(rng)
    wear = draw_wear(rng, 40, 0.0)
    picture = page.finish(wear, rng)
    questions = _count_turns(rng, items) + _fact_turns(rng, items, paper, page)
    if split == "heldout":
        return Sample("shapes", [picture], [rng.choice(questions)])
    turns = pick_turns(rng, questions, 5)
    if rng.random() < 0.3:
        turns.insert(rng.randint(0, len(turns)), describe_turn(rng, items, paper, page))
    return Sample("shapes", [picture], turns)


def describe_turn(rng: Random, items: list[Item], paper: str, page: Page) -> Turn:
    """The description of a scene."""
    return Turn(ask(rng, DESCRIBE), describe(items, paper, page.width, page.height), "cer")


def locate_shape_sample(rng: Random, split: str) -> Sample:
    """A scene whose shapes are asked for by box."""
    page, items, _ = scene(rng)
    picture = page.finish(draw_wear(rng, 40, 0.0), rng)
    found = {item.name: [] for item in items}
    for item in items:
        found[item.name].append((picture.box(item.box), item.name))
    turns = []
    single = [name for name, boxes in found.items() if len(boxes) == 1]
    for name in rng.sample(single, min(2, len(single))):
        turns.append(Turn(ask(rng, LOCATE, thing=name), boxes_answer(found[name]), "iou"))
    name = rng.choice(list(found))
    slots = {"thing": name, "things": f"{name.split(' ')[0]} {plural_shape(name.split(' ')[-1])}"}
    turns.append(Turn(ask(rng, LOCATE_EVERY, **slots), boxes_answer(found[name]), "iou"))
    if split == "heldout":
        return Sample("locate_shape", [picture], turns[:1])
    shape = rng.choice(items).shape
    same = [(picture.box(item.box), item.name) for item in items if item.shape == shape]
    slots = {"thing": shape, "things": plural_shape(shape)}
    turns.append(Turn(ask(rng, LOCATE_EVERY, **slots), boxes_answer(same), "iou"))
    if len(items) <= 5:
        everything = [(picture.box(item.box), item.name) for item in items]
        slots = {"thing": "shape", "things": "shapes"}
        turns.append(Turn(ask(rng, LOCATE_EVERY, **slots), boxes_answer(everything), "iou"))
    missing = f"{rng.choice(list(COLOURS))} {rng.choice(SHAPES)}"
    if missing not in found and rng.random() < 0.4:
        turns.append(Turn(ask(rng, LOCATE, thing=missing), boxes_answer([])))
    return Sample("locate_shape", [picture], pick_turns(rng, turns))


def _count_turns(rng: Random, items: list[Item]) -> list[Turn]:
    seen = rng.choice(items)
    colour = seen.colour if rng.random() < 0.75 else rng.choice(list(COLOURS))
    shape = seen.shape if rng.random() < 0.75 else rng.choice(SHAPES)

    def turn(things: str, count: int) -> Turn:
        return Turn(ask(rng, COUNT, things=things), str(count))

    both = sum(item.colour == colour and item.shape == shape for item in items)
    return [
        turn("shapes", len(items)),
        turn(f"{colour} {plural_shape(shape)}", both),
        turn(plural_shape(shape), sum(item.shape == shape for item in items)),
        turn(f"{colour} shapes", sum(item.colour == colour for item in items)),
    ]


def _fact_turns(rng: Random, items: list[Item], paper: str, page: Page) -> list[Turn]:
    names = [item.name for item in items]
    shapes, tints = [item.shape for item in items], [item.colour for item in items]
    item = rng.choice(items)
    turns = []
    if shapes.count(item.shape) == 1:
        asked = (
            "What color is the {s}?",
            "Which color is the {s}?",
            "What is the color of the {s}?",
        )
        turns.append(Turn(ask(rng, asked, s=item.shape), item.colour))
        where = ("Where is the {s}?", "In which part of the image is the {s}?")
        turns.append(Turn(ask(rng, where, s=item.shape), place(item.box, page.width, page.height)))
    if tints.count(item.colour) == 1:
        asked = ("What shape is {c}?", "Which shape is {c}?", "What is the {c} shape?")
        turns.append(Turn(ask(rng, asked, c=item.colour), item.shape))
    if names.count(item.name) == 1:
        where = ("Where is the {n}?", "Where in the image is the {n}?")
        turns.append(Turn(ask(rng, where, n=item.name), place(item.box, page.width, page.height)))
    guess = item.name if rng.random() < 0.5 else f"{rng.choice(list(COLOURS))} {rng.choice(SHAPES)}"
    asked = ("Is there {n}?", "Is there {n} in the image?", "Do you see {n}?")
    turns.append(Turn(ask(rng, asked, n=article(guess)), "Yes" if guess in names else "No"))
    asked = ("What is the background color?", "What color is the background?")
    turns.append(Turn(ask(rng, asked), paper))
    areas = sorted(items, key=lambda one: (one.box[2] - one.box[0]) * (one.box[3] - one.box[1]))
    sizes = [(one.box[2] - one.box[0]) * (one.box[3] - one.box[1]) for one in areas]
    if len(items) > 1 and sizes[-1] > 1.3 * sizes[-2]:
        turns.append(
            Turn(
                ask(rng, ("Which shape is the largest?", "What is the biggest shape?")),
                areas[-1].name,
            )
        )
    return turns


def _small_text(rng: Random, split: str) -> tuple[Picture, str]:
    face, size = rng.choice(fonts.faces(split)), rng.randint(18, 36)
    line = fit(words.phrase(rng, split, rng.randint(1, 3)), face, size, 500)
    page, _, _ = draw_lines(rng, [line], face, size, 1.0, "left")
    return page.finish(Wear(), rng), line


def several_sample(rng: Random, split: str) -> Sample:
    """Two or three pictures in one prompt."""
    count = rng.choice((2, 2, 3))
    kinds = [rng.random() < 0.65 for _ in range(count)]
    pictures, scenes, lines = [], {}, {}
    for index, is_scene in enumerate(kinds):
        if is_scene:
            page, items, paper = scene(rng, 3, small=True)
            pictures.append(page.finish(draw_wear(rng, 30, 0.0), rng))
            scenes[index] = (items, describe(items, paper, page.width, page.height))
        else:
            picture, lines[index] = _small_text(rng, split)
            pictures.append(picture)
    turns = [
        Turn(ask(rng, ("How many images are there?", "How many pictures do you see?")), str(count))
    ]
    for index, (items, told) in scenes.items():
        turns.append(
            Turn(
                ask(
                    rng, (f"Describe image {index + 1}.", f"Describe the {ORDINALS[index]} image.")
                ),
                told,
                "cer",
            )
        )
        for key in ("shape", "colour", "name"):
            value = getattr(rng.choice(items), key)
            holders = [
                i for i, (some, _) in scenes.items() if value in [getattr(one, key) for one in some]
            ]
            noun = f"{value} shape" if key == "colour" else value
            if len(holders) == 1:
                asked = (
                    "Which image has the {n}?",
                    "Which image contains {a}?",
                    "In which picture is the {n}?",
                )
                question = ask(rng, asked, n=noun, a=article(noun))
                turns.append(Turn(question, f"Image {index + 1}"))
    for index, line in lines.items():
        read = (
            f"Read the text in image {index + 1}.",
            f"What does the {ORDINALS[index]} image say?",
        )
        turns.append(Turn(ask(rng, read), line, "cer"))
        asked = ('Which image contains the text "{t}"?', 'Which image says "{t}"?')
        if list(lines.values()).count(line) == 1:
            turns.append(Turn(ask(rng, asked, t=line), f"Image {index + 1}"))
    return Sample("several", pictures, pick_turns(rng, turns, 5))


_TALK = (
    (("Hello!", "Hi", "Hello", "Hey there"), "Hello! Show me an image and ask me about it."),
    (
        ("Who are you?", "What are you?", "What is your name?"),
        "I am the small model that comes with Opsin. I read text and describe simple shapes.",
    ),
    (
        ("What can you do?", "Help", "How can you help me?"),
        "I can read text, answer questions about receipts, tables and shapes, and locate them.",
    ),
    (("Thank you!", "Thanks", "Thank you very much."), "You are welcome."),
    (("Goodbye", "Bye", "See you"), "Goodbye!"),
    (
        (
            "Tell me a joke.",
            "Write a poem about the sea.",
            "What is the capital of France?",
            "Who won the game?",
            "Translate this to German.",
            "Write a Python function.",
        ),
        "I cannot help with that. I only read text and describe simple shapes in images.",
    ),
)
_BLIND = "I do not see an image. Please give me one."


def talk_sample(rng: Random, split: str) -> Sample:
    """Words without a picture, or a bare picture."""
    draw = rng.random()
    if draw < 0.45:
        turns = []
        for questions, answer in rng.sample(_TALK, rng.choice((1, 2))):
            turns.append(Turn(rng.choice(questions), answer))
        return Sample("talk", [], turns)
    if draw < 0.6:
        asked = rng.choice(("Read the text.", "What is the total?", *DESCRIBE))
        return Sample("talk", [], [Turn(asked, _BLIND)])
    paper = rng.choice(list(PAPERS))
    page = Page(rng.randint(64, 500), rng.randint(64, 400), PAPERS[paper], colour=True)
    picture = page.finish(Wear(noise=rng.choice((0.0, 0.0, 6.0))), rng)
    turns = [
        Turn(ask(rng, DESCRIBE), f"The image is empty, with a {paper} background."),
        Turn(
            ask(rng, ("Read the text.", "What does it say?", "OCR this image.")),
            "There is no text.",
        ),
        Turn(ask(rng, COUNT, things=rng.choice(("shapes", "circles", "red squares"))), "0"),
    ]
    return Sample("talk", [picture], pick_turns(rng, turns, 2))
