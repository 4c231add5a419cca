"""What Florence-2 was trained to do (arXiv:2311.06242), and the tokens that its answers hold."""

from __future__ import annotations

from opsin.types import Grounding, Task

BOXES = (Grounding("loc_bins_boxes", 1000),)
QUADS = (Grounding("loc_bins_quads", 1000),)
OUTLINES = (Grounding("loc_bins_polygons", 1000),)

# The token that asks for a task in a prompt, its name here, the words that the model was trained
# on, what it gives, and how it writes regions.
TASKS: tuple[tuple[str, str, str, str, tuple[Grounding, ...]], ...] = (
    ("<CAPTION>", "describe", "What does the image describe?", "a caption", ()),
    (
        "<DETAILED_CAPTION>",
        "detailed_caption",
        "Describe in detail what is shown in the image.",
        "a longer caption",
        (),
    ),
    (
        "<MORE_DETAILED_CAPTION>",
        "more_detailed_caption",
        "Describe with a paragraph what is shown in the image.",
        "a paragraph",
        (),
    ),
    (
        "<OD>",
        "detect",
        "Locate the objects with category name in the image.",
        "boxes around objects, with their names",
        BOXES,
    ),
    (
        "<DENSE_REGION_CAPTION>",
        "dense_region_caption",
        "Locate the objects in the image, with their descriptions.",
        "boxes around objects, with captions",
        BOXES,
    ),
    (
        "<REGION_PROPOSAL>",
        "region_proposal",
        "Locate the region proposals in the image.",
        "boxes around whatever stands out",
        BOXES,
    ),
    ("<OCR>", "ocr", "What is the text in the image?", "the text of a picture", ()),
    (
        "<OCR_WITH_REGION>",
        "ocr_with_region",
        "What is the text in the image, with regions?",
        "quadrangles around lines of text, with what they say",
        QUADS,
    ),
    (
        "<CAPTION_TO_PHRASE_GROUNDING>",
        "caption_to_phrase_grounding",
        "Locate the phrases in the caption: {text}",
        "boxes around what the phrases of your caption name",
        BOXES,
    ),
    (
        "<OPEN_VOCABULARY_DETECTION>",
        "locate",
        "Locate {text} in the image.",
        "boxes or outlines of what you name",
        (),
    ),
    (
        "<REFERRING_EXPRESSION_SEGMENTATION>",
        "segment",
        "Locate {text} in the image with mask",
        "outlines of what you name",
        OUTLINES,
    ),
    (
        "<REGION_TO_SEGMENTATION>",
        "region_to_segmentation",
        "What is the polygon mask of region {text}",
        "outlines of what is in a box, given as <loc_x1><loc_y1><loc_x2><loc_y2> of 1000",
        OUTLINES,
    ),
    (
        "<REGION_TO_CATEGORY>",
        "region_to_category",
        "What is the region {text}?",
        "the name of what is in such a box",
        (),
    ),
    (
        "<REGION_TO_DESCRIPTION>",
        "region_to_description",
        "What does the region {text} describe?",
        "a caption of what is in such a box",
        (),
    ),
    (
        "<REGION_TO_OCR>",
        "region_to_ocr",
        "What text is in the region {text}?",
        "the text in such a box",
        (),
    ),
)

NAMED = {name: Task(words, f"{about} ({token})", ways) for token, name, words, about, ways in TASKS}
WORDS = {token: words for token, _, words, _, _ in TASKS}

# In the order in which the authors' code adds them to the tokenizer; one is misspelt there.
TOKENS = (
    *("<od>", "</od>", "<ocr>", "</ocr>"),
    *(f"<loc_{place}>" for place in range(1000)),
    *("<cap>", "</cap>", "<ncap>", "</ncap>", "<dcap>", "</dcap>"),
    *("<grounding>", "</grounding>", "<seg>", "</seg>", "<sep>", "<region_cap>", "</region_cap>"),
    *("<region_to_desciption>", "</region_to_desciption>", "<proposal>", "</proposal>"),
    *("<poly>", "</poly>", "<and>"),
)
