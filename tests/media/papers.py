"""PDF files made on the spot: pages of drawn shapes and text, and pages that are pictures."""

import zlib

from PIL import Image


def pdf(contents, boxes=None, rotate=0):
    """Bytes of a PDF: one page for each content stream; boxes are (width, height) in points."""
    boxes = boxes or [(200, 100)] * len(contents)
    return _file([_page(*both, rotate=rotate) for both in zip(contents, boxes, strict=True)])


def filled(red, green, blue):
    """A content stream that paints the lower left quarter of a 200x100 page."""
    return f"{red} {green} {blue} rg 0 0 100 50 re f"


def scanned(*pictures, dpi=150):
    """Bytes of a PDF whose pages are these pictures, without loss, at so many dots per inch."""
    pages = []
    for picture in pictures:
        width, height = (side * 72 / dpi for side in picture.size)
        data = zlib.compress(picture.convert("RGB").tobytes()).decode("latin-1")
        image = (
            f"<</Type/XObject/Subtype/Image/Width {picture.width}/Height {picture.height}"
            "/ColorSpace/DeviceRGB/BitsPerComponent 8/Filter/FlateDecode"
            f"/Length {len(data)}>>stream\n{data}\nendstream"
        )
        content = f"q {width:.4f} 0 0 {height:.4f} 0 0 cm /I Do Q"
        pages.append(_page(content, (f"{width:.4f}", f"{height:.4f}"), image))
    return _file(pages)


def locked():
    """Bytes of a PDF of one empty page that opens with a password only."""
    owner = "e5a8d2687bd9d0cff946b7ac55f51081dcf0d116554c4bfcb0a5e446f69ea48a"
    user = "683ea29a373521cf4710969cbe31e8c5e516199a5130285a60e256fa0fdf33a0"
    lock = f"<</Filter/Standard/V 1/R 2/O<{owner}>/U<{user}>/P -4>>"
    name = b"0123456789abcdef".hex()
    return _file([_page("", (9, 9))], lock, f"/Encrypt 3 0 R/ID[<{name}><{name}>]")


def plain(colour=(255, 255, 255), size=(40, 30)):
    return Image.new("RGB", size, colour)


def _page(content, box, image="null", rotate=0):
    """The three objects of a page; `%d` are the numbers of its image and content."""
    page = (
        f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 {box[0]} {box[1]}]/Rotate {rotate}"
        "/Resources<</XObject<</I %d 0 R>>>>/Contents %d 0 R>>"
    )
    return page, f"<</Length {len(content)}>>stream\n{content}\nendstream", image


def _file(pages, third="null", trailer=""):
    numbers = [4 + 3 * i for i in range(len(pages))]
    kids = " ".join(f"{number} 0 R" for number in numbers)
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Count {len(pages)}/Kids[{kids}]>>",
        third,
    ]
    for number, (page, content, image) in zip(numbers, pages, strict=True):
        objects += [page % (number + 2, number + 1), content, image]
    out = bytearray(b"%PDF-1.4\n")
    places = []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj{body}\nendobj\n".encode("latin-1")
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    head = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    root = f"trailer<</Size {len(objects) + 1}/Root 1 0 R{trailer}>>"
    return bytes(out) + f"{head}{root}\nstartxref\n{len(out)}\n%%EOF".encode()
