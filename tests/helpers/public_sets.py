"""Small files in the layout of each public test set. Images are of one grey, whose byte is the score to expect."""

import io
import json

from PIL import Image

SIZE = (24, 16)
"""width, height"""


def grey(value, size=SIZE, kind="PNG"):
    """The bytes of an image file of one grey."""
    file = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())


LISTS = [("a red cube", [30, 10, 10], [1, 3, 2]), ("a blue ball", [0, 5, 50], [1, 1, 2])]
"""prompt, greys, ranks. The pairs, preferred first: 30 10 right, 30 10 right, 10 10 equal (the preferred is published
last); 0 5 tied by raters, 0 50 wrong, 5 50 wrong."""
OF_LISTS = {
    "pooled": 2 / 5, "strict": 2 / 5, "diff": 2 / 5,
    "grouped": (2 / 3 + 0) / 2,
    "half-ties": 2.5 / 5,
    "hpsv2": (2 / 3 + 1 / 3) / 2,
    "mps": (3 / 3 + 1 / 3) / 2,
    "three-way": 2 / 6,
    "tau": 3 / 6,  # at eps 5: 10 10 and 0 5 are ties, the other gaps are 20, 20, 50 and 45
}  # fmt: skip


def write_imagereward(folder):
    entries = []
    for number, (prompt, greys, ranks) in enumerate(LISTS):
        names = [f"part-{number}/images/{index}.webp" for index in range(3)]
        for name, value in zip(names, greys):
            put(folder / "test_images" / name, grey(value, kind="WEBP"))
        entries.append({"id": f"{number}", "prompt": prompt, "generations": names, "ranking": ranks})
    put(folder / "test.json", entries)
    return folder


def write_hpdv2(folder):
    entries = []
    for number, (prompt, greys, ranks) in enumerate(LISTS):
        names = [f"{number}{index}.png" for index in range(3)]
        for name, value in zip(names, greys):
            put(folder / "test" / name, grey(value))
        entries.append({"prompt": prompt, "image_path": names, "rank": ranks, "raw_annotations": []})
    put(folder / "test.json", entries)
    return folder


PAIRS = [("a cat", 50, 20), ("a cat", 20, 21), ("a dog", 10, 40), ("a tree", 90, 80), ("a tree", 80, 80)]
"""prompt, greys, the first preferred: right, wrong, wrong, right, equal."""
OF_PAIRS = {"strict": 2 / 5, "half-ties": 2.5 / 5, "grouped": 2 / 5, "three-way": 2 / 5, "tau": 2 / 5}


def write_hpdv3(folder, swapped=False):
    """path1 is preferred; swapped: the same images with the names exchanged."""
    entries = []
    for number, (prompt, better, worse) in enumerate(PAIRS):
        names = [f"images/{prompt[2:]}{better}.png", f"images/{prompt[2:]}{worse}{'b' * (better == worse)}.png"]
        for name, value in zip(names, (better, worse)):
            put(folder / name, grey(value))
        first, second = names[::-1] if swapped else names
        entries.append({"prompt": prompt, "path1": first, "path2": second, "confidence": 0.9, "choice_dist": [9, 1],
                        "model1": "x", "model2": f"y{number}"})  # fmt: skip
    put(folder / "test.json", entries)
    return folder


def write_hpdv3pp(folder, axis="aes"):
    """The test set of HPDv3++: the pairs of `PAIRS`, images below the folder, and the list in test/."""
    write_hpdv3(folder)
    entries = json.loads((folder / "test.json").read_text())
    (folder / "test.json").unlink()
    names = ("path1", "path2", "prompt")
    put(folder / "test" / f"test_{axis}.json", [{name: entry[name] for name in names} for entry in entries])
    return folder


VOTES = [("a hat", 50, 20, "leftvote"), ("a hat", 20, 60, "leftvote"), ("a car", 20, 60, "rightvote"),
         ("a pen", 30, 31, "tievote"), ("a bus", 70, 70, "bothbad_vote")]  # fmt: skip
"""prompt, left, right, vote: right, wrong, right; and two ties, of which scores see one."""
OF_VOTES = {"diff": 2 / 3, "half-ties": 2 / 3, "three-way": 3 / 5, "tau": 4 / 5}


def write_genai(folder, exported=False):
    """parquet as the hub has it, two rows a row group, and another task's beside it; or an exported test.json."""
    rows = []
    for number, (prompt, left, right, vote) in enumerate(VOTES):
        row = {"prompt": prompt, "left_model": "x", "right_model": "y", "vote_type": vote}
        for side, value in (("left_image", left), ("right_image", right)):
            row[side] = {"bytes": grey(value), "path": None}
            if exported:
                row[side] = f"images/{number}_{side}.png"
                put(folder / row[side], grey(value))
        rows.append(row)
    if exported:
        put(folder / "test.json", rows)
        return folder
    write_parquet(folder / "image_generation" / "test-00000-of-00002.parquet", rows[:3])
    write_parquet(folder / "image_generation" / "test-00001-of-00002.parquet", rows[3:])
    write_parquet(folder / "image_generation" / "test_v1-00000-of-00001.parquet", rows[:1])
    write_parquet(folder / "video_generation" / "test-00000-of-00001.parquet", [{"left_video": "x"}])
    return folder


CHOICES = [("a fox", 50, 20, 1.0, True), ("an owl", 50, 20, 0.0, True), ("an owl", 9, 9, 0.5, True),
           ("an elk", 50, 20, 1.0, False)]  # fmt: skip
OF_CHOICES = {"pooled": 1 / 2, "half-ties": 1 / 2, "three-way": 2 / 3, "tau": 2 / 3}


def write_pickapic(folder):
    rows = [
        {"caption": prompt, "jpg_0": grey(first), "jpg_1": grey(second), "label_0": label, "label_1": 1 - label,
         "has_label": known, "are_different": True}
        for prompt, first, second, label, known in CHOICES
    ]  # fmt: skip
    write_parquet(folder / "data" / "test_unique-00000-of-00001-abc.parquet", rows)
    return folder


def write_parquet(path, rows):
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


WRITERS = {
    "imagereward": (write_imagereward, OF_LISTS),
    "hpdv2": (write_hpdv2, OF_LISTS),
    "hpdv3": (write_hpdv3, OF_PAIRS),
    "genai_bench": (write_genai, OF_VOTES),
    "pickapic": (write_pickapic, OF_CHOICES),
    "hpdv3pp_aes": (write_hpdv3pp, OF_PAIRS),
}
