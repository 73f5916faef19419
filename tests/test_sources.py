"Sources: CSV files in every form that people write them, and the order of the shapes source."
import zipfile

import pytest
import torch
from PIL import Image

from fuselip_edu.core import load_image
from fuselip_edu.sources import CSVSource, ShapesSource, open_source, source_groups, source_images

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


@pytest.fixture
def folder(tmp_path):
    "red.png, green.png, deep/blue.png as files, and the same three in pictures.zip."
    (tmp_path / "deep").mkdir()
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for name, colour in COLOURS.items():
            path = tmp_path / ("deep" if name == "blue" else ".") / f"{name}.png"
            Image.new("RGB", (12, 8), colour).save(path)
            archive.write(path, f"inside/{name}.png")
    return tmp_path


def table(folder, content, encoding="utf-8"):
    path = folder / "table.csv"
    path.write_bytes(content.encode(encoding))
    return CSVSource(path)


def colour_of(item): return tuple(load_image(item.image)[:, 0, 0].tolist())


def test_files_and_zip_members(folder):
    source = table(folder, "image,text\nred.png,one\ndeep/blue.png,two\npictures.zip#inside/green.png,three\n")
    assert [colour_of(source[i][0].left) for i in range(3)] == [COLOURS["red"], COLOURS["blue"], COLOURS["green"]]
    assert [source[i][0].right.text for i in range(3)] == ["one", "two", "three"]
    assert len(source) == 3 and source.groups == [[0], [1], [2]]


def test_absolute_paths_and_hashes_in_file_names(folder):
    Image.new("RGB", (4, 4), COLOURS["red"]).save(folder / "photo #1.png")
    source = table(folder, f"image,text\n{folder / 'red.png'},one\nphoto #1.png,two\n")
    assert [colour_of(source[i][0].left) for i in range(2)] == [COLOURS["red"]] * 2


def test_every_form_of_pair(folder):
    source = table(folder, "image,instruction,target_image,text\nred.png,,,a caption\nred.png,what?,,an answer\n"
                           "red.png,make it blue,deep/blue.png,\nred.png,,green.png,\n,a word,,a translation\nred.png,edit,green.png,and described\n")
    pairs = [source[i][0] for i in range(6)]
    form = lambda item: (item.image is not None, item.text)
    assert [(form(pair.left), form(pair.right)) for pair in pairs] == [
        ((True, None), (False, "a caption")), ((True, "what?"), (False, "an answer")), ((True, "make it blue"), (True, None)),
        ((True, None), (True, None)), ((False, "a word"), (False, "a translation")), ((True, "edit"), (True, "and described"))]
    assert colour_of(pairs[2].right) == COLOURS["blue"]
    assert len({pair.left.image for pair in pairs if pair.left.image}) == 1 and len(source.images) == 3  # the same string for the same image


def test_quotes_commas_and_line_breaks_in_texts(folder):
    source = table(folder, 'image,text\nred.png,"one, two"\nred.png,"she said ""red"""\nred.png,"first\nsecond"\nred.png,  spaced  \n')
    assert [source[i][0].right.text for i in range(4)] == ["one, two", 'she said "red"', "first\nsecond", "spaced"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_byte_order_mark_and_line_ends(folder, encoding, newline):
    source = table(folder, newline.join(["image, text ", "red.png,ein grünes Dreieck", "", "green.png,二", ""]), encoding)
    assert [source[i][0].right.text for i in range(len(source))] == ["ein grünes Dreieck", "二"]


def test_groups(folder):
    source = table(folder, "image,text,group\nred.png,a,x\nred.png,b,\nred.png,c,y\nred.png,d,x\nred.png,e,\nred.png,f,1\n")
    assert source.groups == [[0, 3], [1], [2], [4], [5]]  # a group called 1 does not meet the row of index 1
    assert [[pair.right.text for pair in pairs] for pairs in source_groups(source)] == [["a", "d"], ["b"], ["c"], ["e"], ["f"]]


@pytest.mark.parametrize("content, line", [
    ("image,text\nred.png,a\nmissing.png,b\n", 3),
    ("image,text\nred.png,a\n\n\nmissing.png,b\n", 5),  # empty lines count
    ('image,text\nred.png,"two\nlines"\nmissing.png,b\n', 4),  # lines, not rows
    ("image,text\r\nred.png,a\r\nmissing.png,b\r\n", 3),
    ("image,target_image\nred.png,missing.png\n", 2),
    ("image,text\nred.png,a\nmissing.zip#red.png,b\n", 3)])
def test_a_missing_file_is_named_with_its_line(folder, content, line):
    with pytest.raises(FileNotFoundError, match=rf"table.csv' line {line}: no image file at .*missing"): table(folder, content)


def test_a_missing_member_is_named_with_its_line(folder):
    with pytest.raises(FileNotFoundError, match=r"line 3: .*pictures.zip' has no member 'red.png'"):
        table(folder, "image,text\nred.png,a\npictures.zip#red.png,b\n")


def test_what_is_no_archive_is_named_with_its_line(folder):
    with pytest.raises(ValueError, match=r"line 2: .*red.png' is not a ZIP archive"): table(folder, "image,text\nred.png#x.png,a\n")


@pytest.mark.parametrize("content, message", [
    ("", "has the columns \\(none\\); expected image, text"),
    ("image,captoin\nred.png,a\n", "has the columns image, captoin; expected image, text"),
    ("image,text,captoin\nred.png,a,b\n", "has the columns image, text, captoin"),
    ("image\nred.png\n", "has the columns image; expected"),
    ("text\na\n", "has the columns text; expected"),
    ("image;text\nred.png;a\n", "has the columns image;text; expected"),
    ("image,text\n", "has a header but no rows"),
    ("image,text\n\n\n", "has a header but no rows"),
    ("image,text\nred.png,a\n,\n", "line 3: a row needs an image or instruction on the left"),
    ("image,text\nred.png,a\nred.png,   \n", "line 3: a row needs"),
    ("image,text\nred.png\n", "line 2: a row needs"),
    ("image,text\nred.png,one, two\n", "line 2: more cells than columns; put a text that contains a comma in quotes")])
def test_wrong_tables(folder, content, message):
    with pytest.raises(ValueError, match=message): table(folder, content)


def test_wrong_encoding(folder):
    with pytest.raises(ValueError, match="is not UTF-8 text"): table(folder, "image,text\nred.png,grün\n", "latin-1")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no CSV file at .*none.csv"): CSVSource(tmp_path / "none.csv")


def test_queries_find_the_other_side(folder):
    source = table(folder, "image,text\nred.png,a\ngreen.png,b\ndeep/blue.png,c\n")
    tasks = source.queries()
    for direction, left, right in (("left to right", "left", "right"), ("right to left", "right", "left")):
        for i, query in enumerate(tasks[direction]):
            identity = lambda item: (item.image, item.text)
            assert identity(query.item) == identity(getattr(source[i][0], left))
            assert identity(query.candidates[0]) == identity(getattr(source[i][0], right))
            assert len(query.candidates) == len({identity(candidate) for candidate in query.candidates}) == 3


def test_queries_never_count_a_right_answer_as_wrong(folder):
    source = table(folder, "image,text\nred.png,a\nred.png,b\ngreen.png,a\ngreen.png,c\ndeep/blue.png,d\n")
    for direction, queries in source.queries().items():
        assert len(queries) == 5
        sides = [(pair.left, pair.right) if direction == "left to right" else (pair.right, pair.left) for pair in (source[i][0] for i in range(5))]
        true = {((asked.image, asked.text), (right.image, right.text)) for asked, right in sides}
        for query in queries:
            assert all(((query.item.image, query.item.text), (other.image, other.text)) not in true for other in query.candidates[1:])


def test_queries_of_a_group_stay_in_the_group(folder):
    source = table(folder, "image,instruction,text,group\nred.png,q1,a,x\nred.png,q2,b,x\ngreen.png,,c,\ndeep/blue.png,,d,\n")
    texts = [[candidate.text for candidate in query.candidates] for query in source.queries()["left to right"]]
    assert texts[:2] == [["a", "b"], ["b", "a"]] and sorted(texts[2]) == ["a", "b", "c", "d"] and texts[2][0] == "c"


def test_queries_keep_to_the_number_of_candidates_and_the_seed(folder):
    source = table(folder, "image,text\n" + "".join(f"red.png,text {i}\n" for i in range(30)) + "green.png,other\n")
    texts = lambda seed: [[item.text for item in query.candidates] for query in source.queries(5, seed)["left to right"]]
    assert texts(0) == texts(0) != texts(1)
    assert [row for row in texts(0) if row[0] != "other"] == [[f"text {i}", "other"] for i in range(30)]  # all others are right for the red picture
    assert len(texts(0)[30]) == 5
    assert "left to right" not in table(folder, "image,text\nred.png,same\ngreen.png,same\n").queries()  # nothing to choose from


def content(source, order=None):
    order = range(len(source)) if order is None else order
    return {i: [(side.text, None if side.image is None else side.image.numpy().tobytes()) for pair in source[i] for side in (pair.left, pair.right)] for i in order}


def test_shapes_are_a_function_of_the_seed():
    reference = content(ShapesSource(6, seed=3))
    n = len(reference)
    assert reference == content(ShapesSource(6, seed=3), order=[*range(0, n, 5), *range(n - 1, -1, -1)])  # whatever the order of reading
    assert reference == {i: value for i, value in content(ShapesSource(9, seed=3)).items() if i < n}  # whatever the length
    assert reference != content(ShapesSource(6, seed=4)) and reference != content(ShapesSource(6, seed=3, split="test"))


def test_neighbouring_items_share_the_image_object():
    source = ShapesSource(4)
    for scene in range(4):
        items = [source[scene * len(source.parts) + i] for i in range(len(source.parts))]
        images = {id(pair.left.image) for part, pairs in zip(source.parts, items) if part in ("caption", "vqa", "region") for pair in pairs}
        assert len(images) == 1
        captions = [pairs for part, pairs in zip(source.parts, items) if part == "caption"]
        assert len({pair.right.text for pairs in captions for pair in pairs}) == len(captions) > 1  # one caption an item


@pytest.mark.parametrize("tgit", [0, 1, 3])
def test_parts_of_the_shapes_source(tgit):
    source = ShapesSource(20, tgit=tgit, size=16)
    assert len(source) == 20 * len(source.parts) == len(source.groups) and source.parts.count("tgit") == tgit
    assert set(source.parts) - {"tgit"} == {"caption", "vqa", "edit", "region"}
    for i in range(len(source)):
        part, pairs = source.parts[i % len(source.parts)], source[i]
        assert pairs or part == "edit"
        for pair in pairs:
            assert pair.left.image.shape == (3, 16, 16)
            assert (pair.left.text is None) == (part == "caption") and (pair.right.image is None) == (part in ("caption", "vqa"))
    assert sum(map(len, source_groups(source))) == sum(len(source[i]) for i in range(len(source))) and all(source_groups(source))


def test_shapes_index_errors():
    source = ShapesSource(2)
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match=f"item {index} of a source of {len(source)}"): source[index]


def test_source_images(folder):
    images = source_images(ShapesSource(5, size=32), 12, 16)
    assert images.shape == (12, 3, 16, 16) and images.dtype == torch.uint8
    own = table(folder, "image,text\nred.png,a\nred.png,b\npictures.zip#inside/green.png,c\n")
    assert source_images(own, 12, 8)[:, :, 0, 0].tolist() == [list(COLOURS["red"]), list(COLOURS["green"])]
    with pytest.raises(ValueError, match="no images"): source_images(table(folder, "instruction,text\na,b\n"), 12, 8)


def test_open_source(folder):
    table(folder, "image,text\nred.png,a\n")
    assert isinstance(open_source(f"csv:{folder / 'table.csv'}"), CSVSource)
    source = open_source("shapes", scenes=3, seed=1, size=16, tgit=2)
    assert content(source) == content(ShapesSource(3, 1, "train", 16, 2))
    for name in ("table.csv", "csv:", "shapes:3", ""):
        with pytest.raises(ValueError, match="give shapes or csv:PATH"): open_source(name)
