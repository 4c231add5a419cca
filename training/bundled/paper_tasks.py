"""Receipts, small tables and bar charts, with the questions they answer."""

from __future__ import annotations

from random import Random

from training.bundled import fonts, words
from training.bundled.page import INK_LEVEL, PAPER_LEVEL, Page, colours, draw_wear, safe_angle
from training.bundled.sample import Sample, Turn, ask, boxes_answer, pick_turns
from training.bundled.text_tasks import DESCRIBE, READ, plural

TOTAL = (
    "What is the total?",
    "What is the total amount?",
    "How much is the total?",
    "How much was paid in total?",
    "What is the total on this receipt?",
    "Total?",
    "What is the grand total?",
    "How much does it cost in total?",
)
ITEM_PRICE = (
    "How much is the {item}?",
    "What is the price of {item}?",
    "How much does the {item} cost?",
    "What did the {item} cost?",
)
TO_MARKDOWN = (
    "Convert the table to Markdown.",
    "Turn this table into Markdown.",
    "Write this table as Markdown.",
    "Extract the table as Markdown.",
    "Table to Markdown.",
    "Read the table and output Markdown.",
    "Transcribe the table in Markdown format.",
)
_GOODS = [
    "Coffee",
    "Tea",
    "Latte",
    "Bagel",
    "Muffin",
    "Milk",
    "Bread",
    "Butter",
    "Eggs",
    "Cheese",
    "Apples",
    "Bananas",
    "Rice",
    "Pasta",
    "Soup",
    "Salad",
    "Burger",
    "Fries",
    "Juice",
    "Water",
    "Soda",
    "Cookie",
    "Cake",
    "Pizza",
    "Sandwich",
    "Yogurt",
    "Honey",
    "Sugar",
    "Salt",
    "Flour",
    "Oil",
    "Soap",
    "Candle",
    "Notebook",
    "Pencil",
    "Battery",
    "Lamp",
    "Towel",
    "Brush",
    "Glue",
    "Tape",
    "Socks",
    "Scarf",
    "Umbrella",
    "Mug",
    "Plate",
    "Spoon",
]
_SHOPS = [
    "Market",
    "Cafe",
    "Store",
    "Bakery",
    "Grocery",
    "Diner",
    "Deli",
    "Books",
    "Hardware",
    "Pharmacy",
    "Kitchen",
    "Garden",
]


def _receipt_rows(rng: Random, split: str) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Rows of left and right text, and the facts."""
    sign = rng.choice(("$", "$", "$", "", "", "EUR "))
    room = rng.randint(7, 12)
    store = f"{words.title(rng, split, rng.randint(1, 2))} {rng.choice(_SHOPS)}"
    store = store.upper() if rng.random() < 0.4 else store
    rows: list[tuple[str, str]] = [(store, "")]
    facts = {"store": store}
    if rng.random() < 0.35:
        street = words.title(rng, split, 1)
        rows.append((f"{rng.randint(1, 999)} {street} {rng.choice(('St', 'Ave', 'Road'))}", ""))
    if rng.random() < 0.6:
        facts["date"] = rng.choice(
            (
                f"{rng.randint(2019, 2031)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
                f"{rng.randint(1, 12):02d}/{rng.randint(1, 28):02d}/{rng.randint(2019, 2031)}",
                f"{rng.randint(1, 28)} {rng.choice(words.MONTHS)} {rng.randint(2019, 2031)}",
            )
        )
        time = f"{rng.randint(7, 22):02d}:{rng.randint(0, 59):02d}"
        rows.append((facts["date"], time) if rng.random() < 0.5 else (f"Date: {facts['date']}", ""))
    tail = _receipt_tail(rng)
    count = max(1, min(rng.randint(1, 6), room - len(rows) - len(tail)))
    amounts = []
    for name in _item_names(rng, split, count):
        amount = round(rng.choice((rng.uniform(0.5, 15), rng.uniform(2, 120))), 2)
        quantity = rng.choice((0, 0, 0, 1, 2, 3))
        amounts.append(amount)
        rows.append((f"{quantity} x {name}" if quantity else name, f"{sign}{amount:.2f}"))
        facts[f"item:{name}"] = f"{sign}{amount:.2f}"
    facts["count"] = str(count)
    _add_totals(rng, rows, facts, sum(amounts), sign, tail)
    return rows, facts


def _item_names(rng: Random, split: str, count: int) -> list[str]:
    names: list[str] = []
    while len(names) < count:
        name = (
            rng.choice(_GOODS) if rng.random() < 0.5 else words.title(rng, split, rng.randint(1, 2))
        )
        if name not in names:
            names.append(name)
    return names


def _receipt_tail(rng: Random) -> list[str]:
    tail = []
    if rng.random() < 0.5:
        tail += ["subtotal", "tax"]
    tail.append("total")
    if rng.random() < 0.35:
        tail += rng.choice((["cash", "change"], ["card"]))
    if rng.random() < 0.35:
        tail.append("thanks")
    return tail


def _add_totals(
    rng: Random,
    rows: list[tuple[str, str]],
    facts: dict[str, str],
    subtotal: float,
    sign: str,
    tail: list[str],
) -> None:
    tax = (
        round(subtotal * rng.choice((0.05, 0.07, 0.08, 0.1, 0.19, 0.2)), 2) if "tax" in tail else 0
    )
    total = round(subtotal + tax, 2)
    cash = float(-(-int(total + 1) // 5) * 5) if rng.random() < 0.7 else total
    style = rng.choice((str.upper, str.title, str.title))
    mark = rng.choice(("", "", ":"))
    values = {
        "subtotal": subtotal,
        "tax": tax,
        "total": total,
        "cash": cash,
        "change": cash - total,
    }
    values["card"] = total
    label = {"total": rng.choice(("total", "total", "total", "grand total", "amount due"))}
    for key in tail:
        if key == "thanks":
            rows.append(
                (rng.choice(("Thank you!", "THANK YOU", "Thank you for visiting", "Bye")), "")
            )
            continue
        amount = f"{sign}{abs(values[key]):.2f}"
        facts[key] = amount
        rows.append((style(label.get(key, key)) + mark, amount))


def _draw_receipt(
    rng: Random, split: str, rows: list[tuple[str, str]]
) -> tuple[Page, list[str], int, float, dict[str, tuple[float, float, float, float]]]:
    face = rng.choice(fonts.faces(split))
    size = rng.randint(16, 22) if rng.random() < 0.75 else rng.randint(16, 30)
    widths = fonts.advances(face, size)
    ascent, descent = fonts.load(face, size).getmetrics()
    gap = widths[" "] * rng.uniform(2, 9)
    margin = rng.uniform(0.6, 2.2) * size

    def length(text: str) -> float:
        return sum(widths[char] for char in text)

    content = max(length(left) + (gap + length(right) if right else 0) for left, right in rows)
    step = (ascent + descent) * rng.uniform(1.0, 1.45)
    paper, ink = colours(rng)
    rules = rng.random() < 0.4
    page = Page(int(content + 2 * margin), int(step * len(rows) + 2 * margin), paper, ink)
    centre = rng.random() < 0.6
    lines, boxes = [], {}
    for index, (left, right) in enumerate(rows):
        top = margin + index * step
        start = margin + ((content - length(left)) / 2 if centre and not right else 0)
        box = page.text(start, top, left, face, size)
        if right:
            end = page.text(margin + content - length(right), top, right, face, size)
            box = (box[0], box[1], end[2], box[3])
        lines.append(f"{left} {right}" if right else left)
        boxes.setdefault(left.split(" ")[0].strip(":").lower(), box)
        if rules and right and index and not rows[index - 1][1]:
            page.draw.line((margin, top - 1, margin + content, top - 1), fill=INK_LEVEL)
    return page, lines, size, margin, boxes


def receipt_sample(rng: Random, split: str) -> Sample:
    """A receipt of up to 12 lines."""
    rows, facts = _receipt_rows(rng, split)
    page, lines, size, margin, boxes = _draw_receipt(rng, split, rows)
    angle = safe_angle(page.width, page.height, margin, 2.0)
    picture = page.finish(draw_wear(rng, size, angle), rng)
    read = Turn(ask(rng, READ), "\n".join(lines), "cer")
    turns = _receipt_turns(rng, facts)
    total_key = next((key for key in ("total", "grand", "amount") if key in boxes), None)
    if total_key:
        answer = boxes_answer([(picture.box(boxes[total_key]), "total")])
        question = ask(
            rng, ("Locate the total in the image.", "Where is the total? Give a box in JSON.")
        )
        turns.append(Turn(question, answer, "iou"))
    total = Turn(ask(rng, TOTAL), facts["total"])
    if split == "heldout":
        return Sample("receipt", [picture], [total, read])
    draw = rng.random()
    if draw < 0.45:
        return Sample("receipt", [picture], [total, *rng.sample(turns, min(2, len(turns)))])
    if draw < 0.75:
        return Sample("receipt", [picture], [read, *rng.sample([total, *turns], 2)])
    return Sample("receipt", [picture], pick_turns(rng, [total, *turns], 5))


def _receipt_turns(rng: Random, facts: dict[str, str]) -> list[Turn]:
    turns = []
    for key, answer in facts.items():
        if key.startswith("item:"):
            turns.append(Turn(ask(rng, ITEM_PRICE, item=key[5:]), answer))
    asked = {
        "date": ("What is the date?", "When was it?", "What is the date on the receipt?"),
        "tax": ("How much is the tax?", "What is the tax?", "How much tax was paid?"),
        "subtotal": ("What is the subtotal?", "How much is the subtotal?"),
        "store": (
            "What is the name of the store?",
            "Which store is it?",
            "What is the store name?",
        ),
        "cash": ("How much cash was given?", "How much cash was paid?"),
        "change": ("How much change was given?", "What is the change?"),
        "count": ("How many items were bought?", "How many items are on the receipt?"),
    }
    for key, phrasings in asked.items():
        if key in facts:
            turns.append(
                Turn(ask(rng, phrasings), facts[key], "cer" if key == "store" else "exact")
            )
    bought = plural(int(facts["count"]), "item")
    summary = f"The image shows a receipt from {facts['store']} with {bought}."
    turns.append(Turn(ask(rng, DESCRIBE), f"{summary} The total is {facts['total']}.", "cer"))
    return turns


def _table_cells(rng: Random, split: str) -> list[list[str]]:
    columns, rows = rng.randint(2, 4), rng.randint(2, 5)
    makers = []
    for _ in range(columns):
        kind = rng.randrange(4)
        if kind < 2:
            makers.append(lambda: words.title(rng, split, rng.choice((1, 1, 2))))
        elif kind == 2:
            makers.append(lambda: str(rng.randrange(10 ** rng.randint(1, 4))))
        else:
            makers.append(lambda: rng.choice((words.price(rng, "$"), f"{rng.randrange(100)}%")))
    header = [words.title(rng, split, 1) for _ in range(columns)]
    return [header] + [[maker() for maker in makers] for _ in range(rows - 1)]


def markdown(cells: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in cells]
    lines.insert(1, f"|{' --- |' * len(cells[0])}")
    return "\n".join(lines)


def table_sample(rng: Random, split: str) -> Sample:
    """A table of 2 to 4 columns and 2 to 5 rows, ruled or plain."""
    cells = _table_cells(rng, split)
    face = rng.choice(fonts.faces(split))
    size = rng.randint(16, 24) if rng.random() < 0.8 else rng.randint(16, 30)
    page, margin = _draw_table(rng, cells, face, size)
    angle = safe_angle(page.width, page.height, margin, 1.5)
    picture = page.finish(draw_wear(rng, size, angle), rng)
    whole = Turn(ask(rng, TO_MARKDOWN), markdown(cells), "table")
    if split == "heldout":
        return Sample("table", [picture], [whole])
    turns = _table_turns(rng, cells)
    if rng.random() < 0.7:
        return Sample("table", [picture], [whole, *rng.sample(turns, rng.choice((0, 1, 2)))])
    return Sample("table", [picture], pick_turns(rng, turns, 3))


def _table_turns(rng: Random, cells: list[list[str]]) -> list[Turn]:
    row, column = rng.randrange(1, len(cells)), rng.randrange(1, len(cells[0]))
    asked = (
        f"What is the {cells[0][column]} of {cells[row][0]}?",
        f'What is in the column "{cells[0][column]}" for "{cells[row][0]}"?',
    )
    across, down = plural(len(cells[0]), "column"), plural(len(cells), "row")
    size = f"The image shows a table with {across} and {down}. "
    turns = [
        Turn(ask(rng, DESCRIBE), size + "The columns are " + ", ".join(cells[0]) + ".", "cer"),
        Turn(ask(rng, ("How many columns does the table have?",)), str(len(cells[0]))),
        Turn(ask(rng, ("How many rows does the table have?",)), str(len(cells))),
        Turn(ask(rng, READ), "\n".join(" ".join(line) for line in cells), "cer"),
    ]
    if len({line[0] for line in cells}) == len(cells) and len(set(cells[0])) == len(cells[0]):
        turns.append(Turn(ask(rng, asked), cells[row][column]))
    return turns


def _draw_table(rng: Random, cells: list[list[str]], face: str, size: int) -> tuple[Page, float]:
    widths = fonts.advances(face, size)
    ascent, descent = fonts.load(face, size).getmetrics()
    pad_x, pad_y = rng.uniform(0.4, 1.2) * size, rng.uniform(0.15, 0.6) * size
    margin = rng.uniform(0.4, 1.6) * size

    def length(text: str) -> float:
        return sum(widths[char] for char in text)

    spans = [max(length(row[i]) for row in cells) + 2 * pad_x for i in range(len(cells[0]))]
    step = ascent + descent + 2 * pad_y
    paper, ink = colours(rng)
    page = Page(int(sum(spans) + 2 * margin), int(step * len(cells) + 2 * margin), paper, ink)
    rules = rng.choice(("all", "all", "rows", "head", "none"))
    if rng.random() < 0.3:
        shade = PAPER_LEVEL + rng.randint(15, 45)
        page.draw.rectangle((margin, margin, margin + sum(spans), margin + step), fill=shade)
    aligned = [rng.choice((0.0, 0.0, 0.5, 1.0)) for _ in spans]
    for row_index, row in enumerate(cells):
        x = margin
        for span, text, share in zip(spans, row, aligned, strict=True):
            slack = span - 2 * pad_x - length(text)
            y = margin + row_index * step + pad_y
            page.text(x + pad_x + slack * share, y, text, face, size)
            x += span
    _rule_table(rng, page, rules, margin, spans, step, len(cells))
    return page, margin


def _rule_table(
    rng: Random, page: Page, rules: str, margin: float, spans: list[float], step: float, rows: int
) -> None:
    level, thick = rng.randint(110, INK_LEVEL), rng.choice((1, 1, 2))
    right = margin + sum(spans)
    counted = {"all": range(rows + 1), "rows": range(rows + 1), "head": [1], "none": []}[rules]
    for index in counted:
        y = margin + index * step
        page.draw.line((margin, y, right, y), fill=level, width=thick)
    if rules == "all":
        x = margin
        for span in [0.0, *spans]:
            x += span
            page.draw.line((x, margin, x, margin + rows * step), fill=level, width=thick)


def chart_sample(rng: Random, split: str) -> Sample:
    """A bar chart of 2 to 5 named bars, the value above each bar."""
    count = rng.randint(2, 5)
    names: list[str] = []
    while len(names) < count:
        name = words.title(rng, split, 1)[:9]
        if name not in names:
            names.append(name)
    values = rng.sample(range(5, 100), count)
    face, size = rng.choice(fonts.faces(split)), rng.randint(16, 22)
    widths = fonts.advances(face, size)
    slot = max(sum(widths[char] for char in name) for name in names) + size
    tall = rng.randint(140, 320)
    paper, ink = colours(rng)
    page = Page(int(slot * count + 40), tall + 4 * size + 20, paper, ink)
    base = tall + 2 * size + 8
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        middle = 20 + slot * (index + 0.5)
        top = base - tall * value / 100
        page.draw.rectangle(
            (middle - slot * 0.3, top, middle + slot * 0.3, base), fill=rng.randint(100, 190)
        )
        page.text(
            middle - sum(widths[c] for c in str(value)) / 2,
            top - size * 1.4,
            str(value),
            face,
            size,
        )
        page.text(middle - sum(widths[c] for c in name) / 2, base + 4, name, face, size)
    page.draw.line((10, base, page.width - 10, base), fill=INK_LEVEL)
    picture = page.finish(draw_wear(rng, size, 0.0), rng)
    pick = rng.randrange(count)
    pairs = [f"{name} {value}" for name, value in zip(names, values, strict=True)]
    high, low = names[values.index(max(values))], names[values.index(min(values))]
    turns = [
        Turn(
            ask(rng, ("What is the value of {n}?", "How high is {n}?"), n=names[pick]),
            str(values[pick]),
        ),
        Turn(ask(rng, ("Which bar is the highest?", "What has the highest value?")), high),
        Turn(ask(rng, ("Which bar is the lowest?", "What has the lowest value?")), low),
        Turn(ask(rng, ("How many bars are there?",)), str(count)),
        Turn(
            ask(rng, DESCRIBE),
            f"The image shows a bar chart with {count} bars: {', '.join(pairs)}.",
            "cer",
        ),
    ]
    return Sample("chart", [picture], pick_turns(rng, turns))
