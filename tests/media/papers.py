"""PDF files made on the spot: pages of drawn shapes and text, and pages that are pictures."""

import io

from PIL import Image


def pdf(contents, boxes=None, rotate=0):
    """Bytes of a PDF: one page for each content stream; boxes are (width, height) in points."""
    boxes = boxes or [(200, 100)] * len(contents)
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(contents)))
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Count {len(contents)}/Kids[{kids}]>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    for i, (content, (width, height)) in enumerate(zip(contents, boxes, strict=True)):
        objects.append(
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 {width} {height}]/Rotate {rotate}"
            f"/Resources<</Font<</F 3 0 R>>>>/Contents {5 + 2 * i} 0 R>>"
        )
        objects.append(f"<</Length {len(content)}>>stream\n{content}\nendstream")
    return _file(objects)


def locked():
    """Bytes of a PDF of one empty page that opens with a password only."""
    owner = "e5a8d2687bd9d0cff946b7ac55f51081dcf0d116554c4bfcb0a5e446f69ea48a"
    user = "683ea29a373521cf4710969cbe31e8c5e516199a5130285a60e256fa0fdf33a0"
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Count 1/Kids[3 0 R]>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]>>",
        f"<</Filter/Standard/V 1/R 2/O<{owner}>/U<{user}>/P -4>>",
    ]
    name = b"0123456789abcdef".hex()
    return _file(objects, f"/Encrypt 4 0 R/ID[<{name}><{name}>]")


def _file(objects, trailer=""):
    out = b"%PDF-1.4\n"
    places = []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj{body}endobj\n".encode("latin-1")
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    head = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    tail = f"trailer<</Size {len(objects) + 1}/Root 1 0 R{trailer}>>\nstartxref\n{len(out)}\n%%EOF"
    return out + (head + tail).encode()


def filled(red, green, blue):
    """A content stream that paints the lower left quarter of a 200x100 page."""
    return f"{red} {green} {blue} rg 0 0 100 50 re f"


def written(*lines, size=20):
    """A content stream of lines of text from the top of a 100-point page."""
    moves = "".join(f"({line}) Tj 0 -{size * 1.4:g} Td " for line in lines)
    return f"BT /F {size} Tf 10 {100 - size * 1.3:g} Td {moves} ET"


def scanned(*pictures, dpi=150):
    """Bytes of a PDF whose pages are these pictures, at so many dots per inch."""
    buffer = io.BytesIO()
    first, *rest = [picture.convert("RGB") for picture in pictures]
    first.save(
        buffer, "PDF", save_all=True, append_images=rest, resolution=dpi, quality=100, subsampling=0
    )
    return buffer.getvalue()


def plain(colour=(255, 255, 255), size=(40, 30)):
    return Image.new("RGB", size, colour)
