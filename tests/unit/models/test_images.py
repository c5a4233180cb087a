"""Image files: one orientation whatever carries it, one size, every mode; and images of every kind as tensors."""

import ast
import io
import itertools
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image

from dinalrm_align.models.images import image_size, image_tensor, open_image

TAG = 0x0112
STORED = dict(zip(range(1, 9), [
    None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_270,
], strict=True))  # fmt: skip
"""Orientation -> what a camera held that way stores: the inverse of turning the image upright."""
BLOCKS = np.array(
    [[[250, 20, 30], [20, 240, 40], [10, 30, 250]], [[240, 240, 20], [250, 250, 250], [5, 5, 5]]], np.uint8
)


def upright(side=16):
    """Six blocks of different colours, 2 high and 3 wide."""
    return Image.fromarray(BLOCKS.repeat(side, 0).repeat(side, 1))


def stored(orientation, side=16):
    turn = STORED.get(orientation)
    return upright(side) if turn is None else upright(side).transpose(turn)


def exif(orientation, order="<", kind=3):
    """An EXIF segment with one tag. kind: 2 text, 3 short, 4 long."""
    if kind == 2:
        value = f"{orientation}\0\0\0".encode()[:4]
    else:
        value = struct.pack(order + ("HH" if kind == 3 else "I"), *((orientation, 0) if kind == 3 else (orientation,)))
    mark = b"II" if order == "<" else b"MM"
    count = 2 if kind == 2 else 1
    return mark + struct.pack(order + "HIHHHI", 42, 8, 1, TAG, kind, count) + value + b"\0\0\0\0"


TIFF = 'xmlns:tiff="http://ns.adobe.com/tiff/1.0/"'


def xmp(inside, about="", namespace=TIFF):
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        f'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" {namespace} {about}>'
        f'{inside}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )


def attribute(orientation, quote='"'):
    return xmp("", f"tiff:Orientation={quote}{orientation}{quote}")


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(image, kind, data, late, **options):
    """A PNG with one more chunk, before or after the pixels."""
    plain = saved(image, "PNG", **options)
    at = plain.index(b"IEND") - 4 if late else 33
    return plain[:at] + chunk(kind, data) + plain[at:]


def profile(data, line=36):
    digits = data.hex()
    lines = "\n".join(digits[start : start + 2 * line] for start in range(0, len(digits), 2 * line))
    return f"\nprofile\n{len(data):8}\n{lines}\n".encode()


def text(key, value, packed):
    return key + b"\0" + (b"\0" + zlib.compress(value) if packed else value)


def itxt(packet, packed=False):
    data = packet.encode()
    head = b"XML:com.adobe.xmp\0" + (b"\1\0" if packed else b"\0\0") + b"\0\0"
    return head + (zlib.compress(data) if packed else data)


def in_png(kind, content):
    """Carriers before and after the pixels. content: orientation -> data of the chunk."""
    return [lambda o, late=late: png(stored(o), kind, content(o), late) for late in (False, True)]


def jpeg(image, segment):
    plain = saved(image, "JPEG", quality=95, subsampling=0)
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + plain[2:]


def jpeg_xmp(packet):
    data = packet if isinstance(packet, bytes) else packet.encode()
    return b"http://ns.adobe.com/xap/1.0/\0" + data


def animated(o):
    """An APNG with an EXIF chunk behind its last frame."""
    frames = [upright().point(lambda v: 255 - v)]
    return png(
        stored(o), b"eXIf", exif(o), True, save_all=True, append_images=[f.resize(stored(o).size) for f in frames]
    )


APP1 = b"Exif\0\0"
JPEG = {"save_all": True, "quality": 95, "subsampling": 0}
CARRIERS = {
    "JPEG EXIF": lambda o: jpeg(stored(o), APP1 + exif(o)),
    "JPEG EXIF, big-endian": lambda o: jpeg(stored(o), APP1 + exif(o, ">")),
    "JPEG EXIF, long": lambda o: jpeg(stored(o), APP1 + exif(o, kind=4)),
    "JPEG XMP attribute": lambda o: jpeg(stored(o), jpeg_xmp(attribute(o))),
    "JPEG XMP element": lambda o: jpeg(stored(o), jpeg_xmp(xmp(f"<tiff:Orientation>{o}</tiff:Orientation>"))),
    "JPEG XMP single quotes": lambda o: jpeg(stored(o), jpeg_xmp(xmp("", f"tiff:Orientation = '{o}'"))),
    "JPEG XMP with blanks": lambda o: jpeg(stored(o), jpeg_xmp(xmp(f"<tiff:Orientation > {o}\n</tiff:Orientation>"))),
    "JPEG XMP without namespace": lambda o: jpeg(stored(o), jpeg_xmp(xmp("", f'tiff:Orientation="{o}"', ""))),
    "JPEG XMP prefix": lambda o: jpeg(stored(o), jpeg_xmp(attribute(o).replace("tiff:", "T:").replace(":tiff", ":T"))),
    "JPEG XMP UTF-16": lambda o: jpeg(stored(o), jpeg_xmp(attribute(o).encode("utf-16"))),
    "MPO": lambda o: saved(stored(o), "MPO", append_images=[upright()], exif=APP1 + exif(o), **JPEG),
    "WebP EXIF": lambda o: saved(stored(o), "WEBP", lossless=True, exif=exif(o)),
    "WebP EXIF with its name": lambda o: saved(stored(o), "WEBP", lossless=True, exif=APP1 + exif(o)),
    "WebP XMP": lambda o: saved(stored(o), "WEBP", lossless=True, xmp=attribute(o).encode()),
    "AVIF EXIF": lambda o: saved(stored(o), "AVIF", quality=100, subsampling="4:4:4", exif=exif(o)),
    "TIFF": lambda o: saved(stored(o), "TIFF", tiffinfo={TAG: o}),
    "TIFF, packed": lambda o: saved(stored(o), "TIFF", tiffinfo={TAG: o}, compression="tiff_adobe_deflate"),
    "TIFF XMP": lambda o: saved(stored(o), "TIFF", tiffinfo={700: attribute(o).encode()}),
    "TIFF and XMP": lambda o: saved(stored(o), "TIFF", tiffinfo={TAG: o, 700: attribute(o, "'").encode()}),
    "APNG, EXIF after the last frame": animated,
}  # fmt: skip
for name, kind, content in [
    ("eXIf", b"eXIf", exif),
    ("XMP", b"iTXt", lambda o: itxt(attribute(o))),
    ("XMP element, packed", b"iTXt", lambda o: itxt(xmp(f"<tiff:Orientation>{o}</tiff:Orientation>"), True)),
    ("XMP as tEXt", b"tEXt", lambda o: text(b"XML:com.adobe.xmp", attribute(o).encode("ascii", "ignore"), False)),
    ("profile exif", b"tEXt", lambda o: text(b"Raw profile type exif", profile(APP1 + exif(o)), False)),
    ("profile exif, packed", b"zTXt", lambda o: text(b"Raw profile type exif", profile(APP1 + exif(o)), True)),
    ("profile APP1", b"zTXt", lambda o: text(b"Raw profile type APP1", profile(APP1 + exif(o)), True)),
    ("profile APP1 of XMP", b"zTXt", lambda o: text(b"Raw profile type APP1", profile(jpeg_xmp(attribute(o))), True)),
    ("profile xmp", b"zTXt", lambda o: text(b"Raw profile type xmp", profile(attribute(o).encode()), True)),
]:  # fmt: skip
    CARRIERS |= dict(zip([f"PNG {name} first", f"PNG {name} last"], in_png(kind, content), strict=True))


def distance(image, expected):
    """Largest difference of the blocks' centres."""
    assert image.size == expected.size and image.mode == "RGB"
    step = slice(8, None, 16)
    found, wanted = (np.asarray(each)[step, step].astype(int) for each in (image, expected))
    return abs(found - wanted).max()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("carrier", CARRIERS)
def test_an_image_is_upright_whatever_carries_its_orientation(tmp_path, carrier, orientation):
    data = CARRIERS[carrier](orientation)
    lossy = carrier.startswith(("JPEG", "MPO", "AVIF"))
    (tmp_path / "image").write_bytes(data)
    for source in (data, tmp_path / "image", Image.open(io.BytesIO(data))):
        if carrier.startswith("APNG") and isinstance(source, Image.Image):
            continue  # PIL stops reading before the last frame
        assert distance(open_image(source), upright()) <= 12 * lossy
    assert image_size(data) == image_size(tmp_path / "image") == (32, 48)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_an_upright_image_is_not_turned_again(carrier):
    image = open_image(CARRIERS[carrier](6))
    assert open_image(image).tobytes() == image.tobytes() and not image.info


@pytest.mark.parametrize("lazily", [False, True])
def test_a_pil_image_that_carries_exif_is_turned_and_left_as_it_was(tmp_path, lazily):
    source = tmp_path / "image.png"
    source.write_bytes(CARRIERS["PNG eXIf last"](6))
    image = Image.open(source)
    image = image if lazily else image.convert("RGB")
    before = image.size
    pixels = image_tensor([image])
    assert pixels.shape == (1, 3, 32, 48) and image.size == before == (32, 48)
    assert torch.equal(pixels, image_tensor(upright()))
    assert image.getexif()[TAG] == 6


def test_orientation_set_in_memory_counts():
    image = stored(8)
    image.getexif()[TAG] = 8
    assert distance(open_image(image), upright()) == 0
    image = stored(5)
    image.info["xmp"] = attribute(5).encode()
    assert distance(open_image(image), upright()) == 0


def test_an_image_that_pil_turned_is_not_turned_again():
    from PIL import ImageOps

    for carrier in ("JPEG EXIF", "WebP EXIF", "PNG profile exif first", "PNG XMP last", "PNG eXIf last", "TIFF"):
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(CARRIERS[carrier](6))))
        assert open_image(image).size == (48, 32), carrier


@pytest.mark.parametrize("value", [0, 9])
@pytest.mark.parametrize(
    "carrier", ["JPEG EXIF", "PNG eXIf last", "PNG XMP last", "WebP EXIF", "TIFF", "JPEG XMP prefix"]
)
def test_values_that_are_no_orientation_are_ignored(carrier, value):
    data = CARRIERS[carrier](value)
    assert open_image(data).size == (48, 32) and image_size(data) == (32, 48)


def test_exif_wins_over_xmp_and_is_ignored_where_it_is_invalid_or_damaged():
    def both(segment):
        return png(stored(6), b"eXIf", segment, True)[:-12] + chunk(b"iTXt", itxt(attribute(8))) + chunk(b"IEND", b"")

    by_xmp = stored(6).transpose(Image.Transpose.ROTATE_90)
    cases = [(exif(6), upright()), (exif(1), stored(6)), (exif(0), by_xmp), (exif(66), by_xmp), (exif(65535), by_xmp)]
    cases += [(exif("6", kind=2), by_xmp), (b"II", by_xmp), (b"damaged EXIF", by_xmp)]
    for segment, expected in cases:
        data = both(segment)
        assert distance(open_image(data), expected) == 0, segment
        assert image_size(data) == expected.size[::-1]


@pytest.mark.parametrize("segment", [b"", b"II", b"nothing", exif(6)[:12], exif("6", kind=2)])
def test_damaged_exif_leaves_an_image_upright(segment):
    for data in (png(upright(), b"eXIf", segment, True), jpeg(upright(), APP1 + segment)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of corrupt EXIF
            assert open_image(data).size == (48, 32) and image_size(data) == (32, 48)


def test_a_png_that_ends_after_its_pixels_is_read():
    data = saved(stored(6), "PNG")[:-12]
    assert open_image(data).size == (32, 48) and image_size(data) == (48, 32)


def test_the_size_of_ordinary_files_needs_no_pixels(monkeypatch):
    files = [CARRIERS[name](6) for name in ("JPEG EXIF", "WebP EXIF", "PNG eXIf last", "PNG XMP first", "AVIF EXIF")]
    files += [saved(upright(), kind) for kind in ("GIF", "BMP", "PPM")]
    monkeypatch.setattr(Image.Image, "load", None)
    assert [image_size(data) for data in files] == [(32, 48)] * 8


# modes -----------------------------------------------------------------------------------------------------------


def grey(value, mode, alpha=None):
    return Image.new(mode, (3, 2), value if alpha is None else (value, alpha))


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (Image.new("1", (3, 2), 1), (255, 255, 255)),
        (grey(77, "L"), (77, 77, 77)),
        (grey(77, "LA", 255), (77, 77, 77)),
        (grey(0, "LA", 0), (255, 255, 255)),
        (grey(55, "LA", 51), (215, 215, 215)),
        (Image.new("LA", (3, 2), (55, 51)).convert("La"), (215, 215, 215)),
        (Image.new("RGBA", (3, 2), (10, 20, 30, 255)), (10, 20, 30)),
        (Image.new("RGBA", (3, 2), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (3, 2), (255, 0, 0, 51)), (255, 204, 204)),
        (Image.new("RGBX", (3, 2), (10, 20, 30, 0)), (10, 20, 30)),
        (Image.new("RGB", (3, 2), (10, 20, 30)).quantize(4), (10, 20, 30)),
        (Image.new("RGB", (3, 2), (10, 20, 30)).convert("YCbCr"), (10, 20, 30)),
        (Image.new("RGB", (3, 2), (10, 200, 30)).convert("HSV"), (10, 200, 30)),
        (Image.new("CMYK", (3, 2), (0, 255, 255, 0)), (255, 0, 0)),
        (grey(257 * 77, "I;16"), (77, 77, 77)),
        (grey(65535, "I;16"), (255, 255, 255)),
        (grey(300, "I;16"), (1, 1, 1)),
        (grey(257 * 77, "I;16B"), (77, 77, 77)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_modes_become_rgb(image, pixel):
    found = open_image(image)
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found).astype(int) - pixel).max() <= 2


def palette(transparency):
    image = Image.new("P", (4, 2))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2, 0] * 2)
    return image if transparency is None else saved(image, "PNG", transparency=transparency)


@pytest.mark.parametrize(
    ("transparency", "row"),
    [
        (None, [(255, 0, 0), (0, 255, 0), (0, 0, 255)]),
        (1, [(255, 0, 0), (255, 255, 255), (0, 0, 255)]),
        (b"\xff\x00\x33", [(255, 0, 0), (255, 255, 255), (204, 204, 255)]),
    ],
)
def test_palettes_with_transparency_go_on_white(transparency, row):
    assert [open_image(palette(transparency)).getpixel((x, 0)) for x in range(3)] == row


def test_a_colour_that_means_transparent_goes_on_white():
    for mode, colour in (("RGB", (1, 2, 3)), ("L", 9), ("I;16", 700), ("1", 0)):
        data = saved(Image.new(mode, (4, 4), colour), "PNG", transparency=colour)
        assert open_image(data).getextrema() == ((255, 255),) * 3, mode


def test_sixteen_bits_in_files_are_scaled():
    values = np.array([[0, 257, 32896], [65535, 128 * 257, 1000]], np.uint16)
    expected = np.rint(values / 257)
    pgm = b"P5 3 2 65535\n" + values.astype(">u2").tobytes()
    for kind, data in [("PGM", pgm), *((kind, saved(Image.fromarray(values), kind)) for kind in ("PNG", "TIFF"))]:
        image = open_image(data)
        assert np.array_equal(np.asarray(image)[..., 0], expected), kind


def test_cmyk_jpeg_keeps_its_colours():
    data = saved(upright().convert("CMYK"), "JPEG", quality=95, subsampling=0)
    assert distance(open_image(data), upright()) <= 12


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_of_many_frames_the_first_is_read(kind, options):
    others = [Image.new("RGB", (48, 32), colour) for colour in ("white", "black")]
    data = saved(upright(), kind, save_all=True, append_images=others, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert distance(open_image(data), upright()) == 0 and image_size(data) == (32, 48)


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_modes_without_a_white_are_refused(mode):
    with pytest.raises(ValueError, match=f"a.tif cannot be read as an image: got mode {mode}; expected 8 bits"):
        open_image(Image.new(mode, (3, 2)), "a.tif")


@pytest.mark.parametrize("size", [(1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("read", [open_image, image_size])
def test_a_line_of_pixels_is_refused_by_name(tmp_path, size, read):
    path = tmp_path / "line.png"
    Image.new("RGB", size).save(path)
    with pytest.raises(ValueError, match=rf"line.png: got an image of {size[0]} x {size[1]} pixels"):
        read(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("part", [0, 0.02, 0.5])
def test_a_file_cut_short_is_refused_by_name(tmp_path, kind, part):
    rng = np.random.default_rng(0)
    data = saved(Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)), kind)
    (tmp_path / "cut").write_bytes(data[: int(part * len(data))])
    with pytest.raises(ValueError, match="cut"):
        open_image(tmp_path / "cut")


def test_too_many_pixels_are_refused_by_name(monkeypatch, tmp_path):
    upright().save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for read in (open_image, image_size):
        with pytest.raises(ValueError, match="bomb.png.*decompression bomb"):
            read(tmp_path / "bomb.png")


def test_nothing_else_opens_images():
    """`Image.open` in one module only; `matplotlib` and `cv2` readers in none."""
    found = set()
    for path in itertools.chain((ROOT / "dinalrm_align").rglob("*.py"), (ROOT / "recipes").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "Image.open",
                "PIL.Image.open",
                "ImageOps.exif_transpose",
            ):
                found.add(path.name)
            if isinstance(node, ast.Attribute) and node.attr in (
                "imread",
                "read_image",
                "decode_image",
                "exif_transpose",
            ):
                found.add(path.name)
    assert found == {"images.py"}


# tensors ---------------------------------------------------------------------------------------------------------


def kinds():
    pil = [upright(), stored(2)]
    arrays = [np.asarray(image) for image in pil]
    tensors = [torch.tensor(array).permute(2, 0, 1) for array in arrays]
    floats = [tensor.float() / 255 for tensor in tensors]
    return {
        "PIL images": pil,
        "a tuple": tuple(pil),
        "arrays": arrays,
        "one array": np.stack(arrays),
        "float arrays": [array / 255 for array in arrays],
        "a mirrored view": [np.ascontiguousarray(array[:, ::-1])[:, ::-1] for array in arrays],
        "byte tensors": tensors,
        "one byte tensor": torch.stack(tensors),
        "float tensors": floats,
        "one float tensor": torch.stack(floats),
        "batches of one": [tensor[None] for tensor in floats],
        "doubles": torch.stack(floats).double(),
        "of each": [pil[0], tensors[1]],
    }


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_image_becomes_the_same_tensor(kind):
    found = image_tensor(kinds()[kind])
    assert found.dtype == torch.float32 and found.shape == (2, 3, 32, 48)
    torch.testing.assert_close(found, image_tensor([upright(), stored(2)]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["PIL images", "arrays", "byte tensors", "float tensors", "float arrays"])
def test_one_image_is_a_batch_of_one(kind):
    image = kinds()[kind][0]
    assert torch.equal(image_tensor(image), image_tensor([image])) and image_tensor(image).shape == (1, 3, 32, 48)


def test_gradients_reach_images():
    images = [torch.rand(3, 4, 5, requires_grad=True) for _ in range(2)]
    image_tensor(images).sum().backward()
    assert all(torch.equal(image.grad, torch.ones(3, 4, 5)) for image in images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)], r"sizes .*\(4, 4\), \(4, 6\)"),
        ([stored(1), stored(6)], r"\(32, 48\), \(48, 32\)"),
        (torch.linspace(-1, 1, 48).view(3, 4, 4), r"images: got values in \[-1, 1\]"),
        ([np.zeros((4, 4, 3)), np.full((4, 4, 3), 255.0)], r"images\[1\]: got values in \[255, 255\]"),
        (np.full((4, 4, 3), np.nan), "nan"),
        (np.zeros((3, 4, 4), np.uint8), r"uint8 \(3, 4, 4\); expected .* \(H, W, 3\)"),
        (torch.zeros(4, 4, 3), r"\(4, 4, 3\); expected .* \(3, H, W\)"),
        (np.zeros((4, 4, 4), np.uint8), r"\(4, 4, 4\)"),
        (np.zeros((4, 4), np.uint8), r"\(4, 4\)"),
        (np.zeros((4, 4, 3), np.uint16), "uint16"),
        (np.zeros((4, 4, 3), np.int64), "int64"),
        (np.zeros((4, 4, 3), bool), "bool"),
        (np.zeros((4, 4, 3), object), "object"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "torch.int64"),
        (np.zeros((0, 4, 4, 3), np.uint8), r"\(0, 4, 4, 3\)"),
        (torch.zeros(3), r"\(3,\)"),
        (torch.zeros(3, 4, 4).to_sparse(), r"\(3, 4, 4\) on cpu, torch.sparse_coo; expected"),
        (torch.zeros(3, 4, 4, device="meta"), r"on meta"),
        (np.array(3.0), r"\(\)"),
        ([], "0 images"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        image_tensor(images)


@pytest.mark.parametrize("images", ["a.png", b"PNG", None, 3, {"a": 1}, ["a.png"], [[upright()]], [None]])
def test_what_is_not_an_image_at_all_is_a_type_error(images):
    with pytest.raises(TypeError, match=r"^images(\[0\])?: got .*; expected PIL images"):
        image_tensor(images)
