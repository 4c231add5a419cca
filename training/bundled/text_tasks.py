"""Pictures of text: single lines and paragraphs, with the questions they answer."""

from __future__ import annotations

from random import Random

from training.bundled import fonts, words
from training.bundled.page import Page, Picture, Rectangle, colours, draw_wear, safe_angle
from training.bundled.sample import Sample, Turn, ask, boxes_answer, pick_turns

READ = (
    "Read the text.",
    "Read the text in the image.",
    "OCR this image.",
    "What does it say?",
    "What does the image say?",
    "What is written here?",
    "What text is in this picture?",
    "Transcribe the text.",
    "Extract all the text from this image.",
    "What is the text in the image?",
    "Read this.",
    "OCR",
    "Please transcribe everything you can read.",
    "Convert the image to text.",
    "Type out the text shown in the picture.",
)
LOCATE_TEXT = (
    'Locate the text "{text}" in the image.',
    'Locate "{text}" in the image.',
    'Where is the text "{text}"? Answer with a bounding box in JSON.',
    'Find "{text}" and give its bounding box.',
    'Detect the text "{text}" and return bbox coordinates in JSON format.',
    'Give the bounding box of "{text}".',
    'Locate the words "{text}" in this picture.',
)
LOCATE_LINES = (
    "Locate all text lines in the image.",
    "Locate the text in the image.",
    "Detect all the text and return bounding boxes in JSON.",
    "Find every line of text. Output bbox coordinates in JSON format.",
    "Locate the text.",
)
DESCRIBE = (
    "Describe this image.",
    "Describe the image.",
    "What is in this image?",
    "What do you see?",
    "What is shown in the picture?",
    "Describe the picture in one sentence.",
    "Describe what you see in this image.",
    "Tell me about this image.",
)
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


def text_size(rng: Random) -> int:
    """Pixels of the em, 16 to 48, small sizes more often."""
    return rng.randint(16, 26) if rng.random() < 0.6 else rng.randint(16, 48)


def plural(count: int, noun: str) -> str:
    """The count with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _line_height(face: str, size: int) -> int:
    ascent, descent = fonts.load(face, size).getmetrics()
    return ascent + descent


def fit(text: str, face: str, size: int, width: float) -> str:
    """Drops words from the end until the line is at most width pixels wide."""
    parts = text.split(" ")
    widths = fonts.advances(face, size)
    while len(parts) > 1 and sum(widths[char] for char in " ".join(parts)) > width:
        parts.pop()
    return " ".join(parts)


def draw_lines(
    rng: Random, lines: list[str], face: str, size: int, leading: float, align: str
) -> tuple[Page, list[Rectangle], float]:
    """Lines on a page of their own or on a larger one; the page, the boxes, the margin."""
    widths = fonts.advances(face, size)
    lengths = [sum(widths[char] for char in line) for line in lines]
    step = _line_height(face, size) * leading
    block_width, block_height = max(lengths), step * len(lines)
    margin = rng.uniform(0.25, 1.6) * size
    width, height = block_width + 2 * margin, block_height + 2 * margin
    if rng.random() < 0.3:
        width += rng.uniform(0, max(40.0, 720 - width)) * rng.random()
        height += rng.uniform(0, max(40.0, 560 - height)) * rng.random()
    elif rng.random() < 0.06:
        width, height = max(width, rng.uniform(600, 1280)), max(height, rng.uniform(400, 960))
    paper, ink = colours(rng)
    page = Page(max(32, int(width)), max(28, int(height)), paper, ink)
    left = rng.uniform(margin, max(margin, page.width - margin - block_width))
    top = rng.uniform(margin, max(margin, page.height - margin - block_height))
    boxes = []
    for index, line in enumerate(lines):
        shift = {"left": 0.0, "center": 0.5, "right": 1.0}[align] * (block_width - lengths[index])
        boxes.append(page.text(left + shift, top + index * step, line, face, size))
    return page, boxes, margin


def line_sample(rng: Random, split: str) -> Sample:
    """One line of 1 to 6 words at 16 to 48 pixels."""
    face = rng.choice(fonts.faces(split))
    size = text_size(rng)
    line = fit(words.phrase(rng, split, rng.randint(1, 6)), face, size, 1100)
    page, boxes, margin = draw_lines(rng, [line], face, size, 1.0, "left")
    angle = safe_angle(page.width, page.height, margin)
    picture = page.finish(draw_wear(rng, size, angle), rng)
    turns = [Turn(ask(rng, READ), line, "cer")]
    extra = _line_turns(rng, picture, [line], boxes)
    return Sample("line", [picture], turns + rng.sample(extra, rng.choice((0, 0, 1, 2))))


def paragraph_sample(rng: Random, split: str) -> Sample:
    """2 to 12 lines of running text."""
    face = rng.choice(fonts.faces(split))
    size = rng.randint(16, 24) if rng.random() < 0.75 else rng.randint(16, 34)
    count = rng.randint(2, 12)
    width = rng.uniform(180, 620)
    lines = [
        fit(words.phrase(rng, split, rng.randint(1, 9)), face, size, width) for _ in range(count)
    ]
    align = rng.choice(("left", "left", "left", "center", "right"))
    page, boxes, margin = draw_lines(rng, lines, face, size, rng.uniform(1.0, 1.5), align)
    angle = safe_angle(page.width, page.height, margin, 2.0)
    picture = page.finish(draw_wear(rng, size, angle), rng)
    read = Turn(ask(rng, READ), "\n".join(lines), "cer")
    extra = _line_turns(rng, picture, lines, boxes)
    if split == "train" and rng.random() < 0.25:
        return Sample("paragraph", [picture], pick_turns(rng, extra, 3))
    return Sample("paragraph", [picture], [read, *rng.sample(extra, rng.choice((0, 1, 2)))])


def locate_text_sample(rng: Random, split: str) -> Sample:
    """A few short texts strewn over a page, asked for by box."""
    page, placed, size = _strew(rng, split)
    angle = safe_angle(page.width, page.height, 12, 1.5)
    picture = page.finish(draw_wear(rng, size, angle), rng)
    found = [(picture.box(box), text) for text, box in placed]
    turns = []
    for box, text in rng.sample(found, min(2, len(found))):
        turns.append(Turn(ask(rng, LOCATE_TEXT, text=text), boxes_answer([(box, text)]), "iou"))
    turns.append(Turn(ask(rng, LOCATE_LINES), boxes_answer(found), "iou"))
    turns.append(Turn(ask(rng, READ), "\n".join(text for text, _ in placed), "cer"))
    missing = words.phrase(rng, split, 2)
    if rng.random() < 0.3:
        turns.append(Turn(ask(rng, LOCATE_TEXT, text=missing), boxes_answer([])))
    if split == "heldout":
        return Sample("locate_text", [picture], turns[:1])
    return Sample("locate_text", [picture], pick_turns(rng, turns))


def _strew(rng: Random, split: str) -> tuple[Page, list[tuple[str, Rectangle]], int]:
    paper, ink = colours(rng)
    page = Page(rng.randint(260, 720), rng.randint(180, 620), paper, ink)
    placed: list[tuple[str, Rectangle]] = []
    top = rng.uniform(6, 40)
    smallest = 48
    while len(placed) < 6:
        face = rng.choice(fonts.faces(split))
        size = text_size(rng)
        text = fit(words.phrase(rng, split, rng.randint(1, 3)), face, size, page.width * 0.9)
        widths = fonts.advances(face, size)
        length = sum(widths[char] for char in text)
        height = _line_height(face, size)
        if top + height > page.height - 4 or length > page.width - 12:
            break
        left = rng.uniform(6, page.width - 6 - length)
        placed.append((text, page.text(left, top, text, face, size)))
        smallest = min(smallest, size)
        top += height + rng.uniform(0, 90)
    if not placed:
        box = page.text(8, 6, "ok", rng.choice(fonts.faces(split)), 20)
        placed.append(("ok", box))
    return page, placed, smallest


def _line_turns(
    rng: Random, picture: Picture, lines: list[str], boxes: list[Rectangle]
) -> list[Turn]:
    turns = []
    index = rng.randrange(len(lines))
    count = len(lines)
    if count > 1:
        asked = (
            f"What does line {index + 1} say?",
            f"Read line {index + 1}.",
            f"Read only line {index + 1} of the text.",
        )
        turns.append(Turn(ask(rng, asked), lines[index], "cer"))
        last = ("Read the last line.", "What does the last line say?")
        turns.append(Turn(ask(rng, last), lines[-1], "cer"))
        turns.append(Turn(ask(rng, ("How many lines of text are there?",)), str(count)))
        if index < len(ORDINALS):
            ordinal = (f"Read the {ORDINALS[index]} line.", f"What is the {ORDINALS[index]} line?")
            turns.append(Turn(ask(rng, ordinal), lines[index], "cer"))
    turns.append(Turn(ask(rng, ("What is the first word?",)), lines[0].split(" ")[0], "cer"))
    turns.append(Turn(ask(rng, ("What is the last word?",)), lines[-1].split(" ")[-1], "cer"))
    answer = boxes_answer([(picture.box(boxes[index]), lines[index])])
    turns.append(Turn(ask(rng, LOCATE_TEXT, text=lines[index]), answer, "iou"))
    if count <= 4:
        found = [(picture.box(box), line) for box, line in zip(boxes, lines, strict=True)]
        turns.append(Turn(ask(rng, LOCATE_LINES), boxes_answer(found), "iou"))
    summary = f"The image shows {plural(count, 'line')} of text. "
    summary += f"It says: {lines[0]}" if count == 1 else f"The first line says: {lines[0]}"
    turns.append(Turn(ask(rng, DESCRIBE), summary, "cer"))
    return turns
