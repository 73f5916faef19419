"Sources: CSV files in every form that people write them, the order of the shapes source, and the paper's training sets in their real formats."
import csv
import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fuselip_edu import sources
from fuselip_edu.core import load_image
from fuselip_edu.sources import (MMEB_SETS, PROMPTS, AugmentedSource, CSVSource, HQEditSource, MMEBSource, QuestionSource, RegionSource, ShapesSource, ShardSource, TableSource,
                                 Texts, inside, missing_numbers, mmeb_text, open_captions, open_source, plain_chance, read_rows, shard_index, source_groups, source_images, stream_groups)
from fuselip_edu.transforms import TRAIN_COUNT, transform_pairs

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


def test_hashes_in_file_names(folder):
    Image.new("RGB", (4, 4), COLOURS["red"]).save(folder / "photo #1.png")
    source = table(folder, "image,text\nred.png,one\nphoto #1.png,two\n")
    assert [colour_of(source[i][0].left) for i in range(2)] == [COLOURS["red"]] * 2


def test_pictures_elsewhere_are_reached_through_a_link(folder):
    (folder / "set").mkdir()
    (folder / "set" / "pictures").symlink_to(folder, target_is_directory=True)
    assert colour_of(table(folder / "set", "image,text\npictures/red.png,one\n")[0][0].left) == COLOURS["red"]
    with pytest.raises(ValueError, match="line 2: the path .* does not stay inside"): table(folder / "set", f"image,text\n{folder / 'red.png'},one\n")
    assert colour_of(CSVSource(folder / "set" / "table.csv", root=folder)[0][0].left) == COLOURS["red"]


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
    ("image,text\nred.png,one, two\n", "line 2: more cells than columns; put a text that contains a comma in quotes"),
    ('image,text\nred.png,one\ngreen.png,"a 3 inch nail\nred.png,two\n', "line 3: .* every quote is closed"),
    ('image,text\nred.png,"a 3 inch" nail\n', "line 2: .* every quote is closed")])
def test_wrong_tables(folder, content, message):
    with pytest.raises(ValueError, match=message): table(folder, content)


def test_wrong_encoding(folder):
    with pytest.raises(ValueError, match="line 3 is not UTF-8 text"): table(folder, "image,text\nred.png,a\nred.png,grün\n", "latin-1")
    with pytest.raises(ValueError, match="line 1 is not UTF-8 text"): table(folder, "image,größe\nred.png,a\n", "latin-1")
    with pytest.raises(ValueError, match="is not UTF-8 text"): table(folder, "image,text\nred.png,a\n", "utf-16")


def test_a_column_that_is_there_twice(folder):
    with pytest.raises(ValueError, match="has the column text twice"): table(folder, "image,text,text\nred.png,a,b\n")
    (folder / "wide.csv").write_text("path,caption,,\nred.png,a,,\n")  # as a spreadsheet may write it
    assert TableSource(folder / "wide.csv")[0][0].right.text == "a"


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_one_spoiled_record_of_a_large_table_is_one_bad_item(folder, suffix):
    rows = ["red.png,a", "red.png,gr\xfcn", "red.png,", "red.png,d"] if suffix == "csv" else ['{"path": "red.png", "caption": "%s"}' % text for text in ("a", "gr\xfcn", "", "d")]
    (folder / f"large.{suffix}").write_bytes("\n".join(["path,caption"] * (suffix == "csv") + rows).encode("latin-1"))
    source, first = TableSource(folder / f"large.{suffix}"), 2 if suffix == "csv" else 1
    assert [source[i][0].right.text for i in (0, 3)] == ["a", "d"]
    with pytest.raises(ValueError, match=rf"large.{suffix}' line {first + 1} is not UTF-8 text"): source[1]
    with pytest.raises(ValueError, match=rf"large.{suffix}' line {first + 2} has no text"): source[2]


def test_tokenizers_train_on_what_can_be_read(folder, capsys):
    (folder / "large.csv").write_text("path,caption\n" + "red.png,a\n" * 998 + "red.png,\n" + "green.png,b\n")
    assert len(source_images(TableSource(folder / "large.csv"), 1000, 8)) == 2 and "passed over: " in capsys.readouterr().err
    (folder / "small.csv").write_text("path,caption\nred.png,a\nred.png,\n")
    with pytest.raises(ValueError, match="line 3 has no text"): source_images(TableSource(folder / "small.csv"), 5, 8)
    with pytest.raises(ValueError, match="must be at least 1, not 0"): source_images(ShapesSource(5), 0, 8)


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
    assert reference == content(pickle.loads(pickle.dumps(ShapesSource(6, seed=3))))  # in a process that is started anew, as on a Mac
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
        with pytest.raises(ValueError, match="unknown data .*; give shapes, csv:PATH, table:FILE, shards:DIR, cc3m:DIR"): open_source(name)


# The paper's training sets, each in the format in which it is published

def picture(index, size=(40, 30)): # a picture of one colour that tells its number
    return Image.new("RGB", size, (index * 20, 100, 250 - index * 20))


def jpeg(index, kind="JPEG", size=(40, 30)):
    buffer = io.BytesIO()
    picture(index, size).save(buffer, kind, quality=95)
    return buffer.getvalue()


def number(item): return round(load_image(item.image)[0].float().mean().item() / 20)


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def sample(index, key="{:09}", extension="jpg"):
    key = key.format(index)
    return [(f"{key}.{extension}", jpeg(index)), (f"{key}.txt", f"caption {index}, é".encode()), (f"{key}.json", json.dumps({"key": key, "status": "success"}).encode())]


@pytest.fixture
def shards(tmp_path):
    for shard, indices in enumerate(((0, 1, 2), (3, 4), (5,))):
        write_tar(tmp_path / "cc3m" / f"cc3m-train-{shard:04}.tar", [member for i in indices for member in sample(i)])
    write_tar(tmp_path / "cc3m" / "cc3m-validation-0000.tar", sample(9))
    return tmp_path / "cc3m"


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file: csv.writer(file).writerows([header, *rows])
    return path


def texts(source): return [(pair.left.text, pair.right.text) for pairs in source_groups(source) for pair in pairs]


def test_texts():
    values = ["", "a", "größer 二 🙂", "", "x\ny"]
    held = Texts(values)
    assert [held[i] for i in range(len(held))] == values and [pickle.loads(pickle.dumps(held))[2]] == values[2:3]


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x.jpg", "a/../../x.jpg", "a\\..\\..\\x.jpg", "\\x.jpg", "a\0b", "C:/x.jpg", "C:x.jpg"])
def test_paths_stay_inside(name):
    with pytest.raises(ValueError, match="some.csv line 4: the path .* does not stay inside 'root'"): inside("root", name, "some.csv line 4")
    assert inside("root", "a/..b/c.jpg", "") == os.path.join("root", "a/..b/c.jpg")


# Shards

def test_shards_are_a_list(shards):
    source = ShardSource(shards)
    assert len(source) == 6 and source.groups == [[i] for i in range(6)]
    for i in (5, 0, 3, 2, 4, 1):
        pair, = source[i]
        assert number(pair.left) == i and pair.left.text is None and pair.right.text == f"caption {i}, é" and pair.right.image is None
        assert torch.equal(load_image(pair.left.image), load_image(Image.open(io.BytesIO(jpeg(i)))))
    for index in (-1, 6):
        with pytest.raises(IndexError, match=f"item {index} of a source of 6"): source[index]
    assert texts(pickle.loads(pickle.dumps(source))) == texts(source)
    assert source_images(source, 4, 8).shape == (4, 3, 8, 8)


def test_other_names_and_extensions(tmp_path):
    members = sample(1, "part/a.b{:03}", "JPG")[:1] + [("part/a.txt", b"odd: the key ends at the first dot")]
    members += sample(2, "./{:03}", "png") + [("loose.jpg", jpeg(3)), ("alone.txt", b"no picture"), ("empty.jpg", jpeg(4)), ("empty.txt", b"  \n")]
    members += [("d/000.webp", jpeg(5)), ("e/000.txt", b"of another folder"), ("d/000.txt", b"of the folder d")]
    path = write_tar(tmp_path / "cc12m-train-0000.tar", members)
    with tarfile.open(path, "a") as tar: tar.addfile(link("alone.jpg", "/etc/passwd"))  # only whole members count
    source = ShardSource(tmp_path)
    with pytest.raises(ValueError, match="the caption of 'empty.jpg' is empty"): source[1]
    assert [[(number(pair.left), pair.right.text) for pair in source[i]] for i in (0, 2)] == [[(2, "caption 2, é")], [(5, "of the folder d")]]


def link(name, target):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


def test_the_index_is_kept_and_made_anew_when_the_shard_changes(shards, monkeypatch):
    ShardSource(shards)
    walked = []
    monkeypatch.setattr(sources, "_shard_samples", lambda shard, walk=sources._shard_samples: walked.append(shard.name) or walk(shard))
    assert len(ShardSource(shards)) == 6 and not walked
    write_tar(shards / "cc3m-train-0001.tar", [member for i in (7, 8, 9) for member in sample(i)])
    assert [number(ShardSource(shards)[i][0].left) for i in range(7)] == [0, 1, 2, 7, 8, 9, 5] and walked == ["cc3m-train-0001.tar"]
    walked.clear()
    shard = shards / "cc3m-train-0002.tar"
    os.utime(shard, ns=(1, 1))  # the same size at another time
    assert len(ShardSource(shards)) == 7 and walked == [shard.name]
    names = [f"cc3m-train-{shard:04}.tar" for shard in range(3)]
    assert {path.name for path in shards.iterdir()} == {*names, *(f"{name}.index.npz" for name in names), "cc3m-validation-0000.tar"}


@pytest.mark.parametrize("content", [b"", b"nonsense", "pickle", "fields", "folder"])
def test_a_broken_index_is_made_again(shards, content):
    kept = shards / "cc3m-train-0000.tar.index.npz"
    stat = (shards / "cc3m-train-0000.tar").stat()
    stamp = np.array([stat.st_size, stat.st_mtime_ns])
    if content == "pickle": np.savez(kept, stamp=stamp, samples=np.array([Danger()], dtype=object))
    elif content == "fields": np.savez(kept, stamp=stamp, samples=np.arange(3))
    elif content == "folder": kept.mkdir()  # neither to be read nor to be replaced
    else: kept.write_bytes(content)
    assert [number(ShardSource(shards)[i][0].left) for i in range(6)] == list(range(6)) and not Danger.called


class Danger:
    called = False
    def __reduce__(self): return setattr, (Danger, "called", True)


def test_a_folder_that_cannot_be_written(shards, monkeypatch):
    def refuse(*arguments, **named): raise OSError(30, "Read-only file system")
    monkeypatch.setattr(np, "savez", refuse)
    assert len(ShardSource(shards)) == 6 and not list(shards.glob("*.npz")) and not list(shards.glob(".*"))


def test_a_shard_cut_anywhere_is_an_error_that_names_it(shards, tmp_path):
    data = (shards / "cc3m-train-0000.tar").read_bytes()
    with tarfile.open(shards / "cc3m-train-0000.tar") as tar: end = tar.getmembers()[-1].offset_data + 512
    place = tmp_path / "cut" / "cc3m-train-0000.tar"
    place.parent.mkdir()
    for length in sorted({*range(0, end, 300), *range(0, end + 1, 512)}):
        place.write_bytes(data[:length])
        with pytest.raises(ValueError, match="cut/cc3m-train-0000.tar'.* is a broken shard .*; download it again"): shard_index(place)
    place.write_bytes(data[:1024] + b"x" * 512 + data[1536:])
    place.write_bytes(data[:end] + bytes(512))
    assert len(shard_index(place)) == 3  # one block of zeros is enough


def test_broken_members_are_named(shards, tmp_path):
    with pytest.raises(ValueError, match=r"member '\.\./\.\./x.jpg': the path .* does not stay inside"): ShardSource(write_tar(tmp_path / "a" / "x-train-0.tar", [("../../x.jpg", b"")]).parent)
    with pytest.raises(ValueError, match="x-train-0.tar' has no KEY.jpg with a KEY.txt"): ShardSource(write_tar(tmp_path / "b" / "x-train-0.tar", [("a.json", b"{}")]).parent)
    folder = write_tar(tmp_path / "c" / "x-train-0.tar", [("a.jpg", jpeg(1)[:200]), ("a.txt", b"cut"), ("b.jpg", jpeg(1)), ("b.txt", b"\xff\xfe")]).parent
    source = ShardSource(folder)
    with pytest.raises(ValueError, match=r"x-train-0.tar#a.jpg@512\+200' is not a readable image"): load_image(source[0][0].left.image)
    with pytest.raises(ValueError, match="x-train-0.tar': the caption of 'b.jpg' is not UTF-8"): source[1]
    with pytest.raises(FileNotFoundError, match=r"no shards \*-train-\*.tar in '.*cc3m-none'"): ShardSource(tmp_path / "cc3m-none")
    with pytest.raises(ValueError, match="not a readable image"): load_image(f"{folder}/x-train-0.tar#a.jpg")
    with pytest.raises(FileNotFoundError, match="gone.tar"): load_image(f"{folder}/gone.tar#a.jpg@512+200")


# Tables

@pytest.fixture
def captions(tmp_path):
    for i in range(3):
        (tmp_path / "cc3m" / "train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "cc3m" / "train" / f"{i:09}.jpg").write_bytes(jpeg(i))
    rows = [[f"train/{i:09}.jpg", text] for i, text in enumerate(("one, two", "null", 'two\nlines "quoted"'))]
    return write_csv(tmp_path / "cc3m" / "train.csv", ["path", "caption"], rows)


def test_caption_table(captions):
    source = TableSource(captions)
    assert [(number(source[i][0].left), source[i][0].right.text) for i in range(3)] == [(0, "one, two"), (1, "null"), (2, 'two\nlines "quoted"')]
    assert source.groups == [[0], [1], [2]] and texts(pickle.loads(pickle.dumps(source))) == texts(source)


def test_question_table(captions):
    path = write_csv(captions.parent / "cc3m_vqa_train_v2.csv", ["path", "question", "answer"], [["train/000000001.jpg", "What is it?", "A one."], ["train/000000002.jpg", "And?", ""]])
    source = open_source(f"cc3m-vqa:{path}")
    assert [(pair.left.text, pair.right.text) for pair in source[0]] == [("What is it?", "A one.")] and number(source[0][0].left) == 1 and len(source) == 2
    with pytest.raises(ValueError, match="line 3 has no text"): source[1]


@pytest.mark.parametrize("header, rows, message", [
    (["path", "title"], [["train/000000000.jpg", "a"]], "train.csv' line 1 has the columns path, title; expected path, caption"),
    (["path", "caption"], [], "train.csv' has no rows"),
    (["path", "caption"], [["../secret.jpg", "a"]], r"train.csv' line 2: the path '\.\./secret.jpg' does not stay inside"),
    (["path", "caption"], [["/etc/passwd", "a"]], "train.csv' line 2: the path '/etc/passwd' does not stay inside"),
    (["path", "caption"], [["", "a"]], "train.csv' line 2: the path '' does not stay inside"),
    (["path", "caption"], [["train/000000000.jpg", "a", "b"]], "train.csv' line 2: more cells than columns")])
def test_wrong_caption_tables(captions, header, rows, message):
    with pytest.raises(ValueError, match=message): TableSource(write_csv(captions, header, rows))


def test_a_missing_image_of_a_caption_is_named_with_its_line(captions):
    rows = [["train/000000000.jpg", "two\nlines"], ["train/000000007.jpg", "gone"], ["../x.jpg", "away"]]
    source = TableSource(write_csv(captions, ["path", "caption"], rows))
    with pytest.raises(FileNotFoundError, match="train.csv' line 4: no image file at '.*train/000000007.jpg'"): source[1]
    with pytest.raises(ValueError, match="train.csv' line 5: the path"): source[2]
    with pytest.raises(FileNotFoundError, match="line 2: no image file"): TableSource(write_csv(captions, ["path", "caption"], rows[1:2] * 3))  # a wrong folder is noticed at once
    source = TableSource(write_csv(captions, ["path", "caption"], [rows[1], rows[0]]))  # and a first picture that is missing is one bad item
    with pytest.raises(FileNotFoundError, match="line 2: no image file"): source[0]
    assert source[1][0].right.text == "two\nlines"


def test_rows_of_three_formats(tmp_path):
    import datasets
    rows = [{"a": "one", "b": "two, three"}, {"a": "1", "b": None}]
    write_csv(tmp_path / "t.csv", ["a", "b"], [list(row.values()) for row in rows])
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "t.parquet")
    for path, first in (("t.csv", 2), ("t.jsonl", 1), ("t.parquet", 1)):
        assert list(read_rows(tmp_path / path, ("b", "a"))) == [(first, {"b": "two, three", "a": "one"}), (first + 1, {"b": "", "a": "1"})]
        with pytest.raises(ValueError, match=f"{path}'.* has the columns a, b; expected a, c"): list(read_rows(tmp_path / path, ("a", "c")))
    for name, content, message in (("u.jsonl", '{"a": 1}\n{"a": ', "u.jsonl' line 2 is not JSON"), ("u.jsonl", "[1]\n", "u.jsonl' line 1 is not a JSON object"),
                                   ("u.parquet", "PAR1", "u.parquet' is not a whole Parquet file"), ("u.txt", "a", "u.txt' is not a table")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message): list(read_rows(tmp_path / name, ("a",)))
    with pytest.raises(FileNotFoundError, match="no file at .*none.csv"): list(read_rows(tmp_path / "none.csv", ("a",)))


def test_captions_come_in_either_form(shards, captions, tmp_path):
    assert isinstance(open_captions(shards), ShardSource)  # `captions` put a table beside the shards
    for shard in shards.glob("*.tar*"): shard.unlink()
    assert len(open_captions(shards)) == len(open_captions(captions)) == 3
    write_csv(captions.parent / "val.csv", ["path", "caption"], [["train/000000000.jpg", "val"]])
    assert len(open_captions(shards)) == 3  # train.csv comes first
    captions.rename(captions.parent / "other.csv")
    with pytest.raises(ValueError, match=r"holds 2 tables \(other.csv, val.csv\); name the one to read"): open_captions(shards)
    with pytest.raises(FileNotFoundError, match="no shards and no table in"): open_captions(tmp_path / "none")


# Transformed pictures among the captions

def test_chance_of_a_plain_item():
    assert round(plain_chance(0.9), 3) == 0.971 and round(plain_chance(0.971), 3) == 0.992
    assert plain_chance(0) == 0 and plain_chance(1) == pytest.approx(1)
    for share in (0.3, 0.9):
        p, m = plain_chance(share), sources.PAIRS_AN_IMAGE
        assert p / (p + (1 - p) * m) == pytest.approx(share)


def test_augmented_source_is_a_function_of_seed_epoch_and_index(shards):
    def draw(seed, epoch, order=range(6)):
        source = AugmentedSource(ShardSource(shards), 0.3, seed, 32)
        assert source.epoch == 0
        source.epoch = epoch
        return {i: [(pair.left.text, pair.right.text, pair.right.image if pair.right.image is None else pair.right.image.numpy().tobytes()) for pair in source[i]] for i in order}
    reference = draw(0, 1)
    assert draw(0, 1, (3, 1, 5, 0, 4, 2)) == reference and draw(0, 2) != reference and draw(1, 1) != reference and draw(0, 0) != reference


def test_augmented_source_makes_the_groups_of_chapter_11(shards):
    plain = ShardSource(shards)
    source = AugmentedSource(plain, 0.5, 0, 32)
    assert source.groups == plain.groups and len(source) == 6
    seen = set()
    for source.epoch in range(60):
        for i in range(6):
            pairs = source[i]
            if pairs[0].right.text is not None:
                assert [(pair.left.image, pair.right.text) for pair in pairs] == [(plain[i][0].left.image, f"caption {i}, é")]  # raw: still a path
                continue
            rng = random.Random(f"0/{source.epoch}/{i}")
            rng.random()
            path, kind, seed = plain[i][0].left.image, sources.draw_kind(rng), rng.getrandbits(63)
            start = load_image(path, 32) if kind == "crop" else sources.random_resized_crop(path, 32, seed)  # only crops start from the whole picture
            expected = transform_pairs(start, kind, rng)
            assert [(pair.left.text, pair.right.text) for pair in pairs] == [(pair.left.text, None) for pair in expected]
            for ours, theirs in zip(pairs, expected):
                assert torch.equal(ours.left.image, theirs.left.image) and torch.equal(ours.right.image, theirs.right.image)
                assert ours.right.image.shape == (3, 32, 32) and ours.right.image.dtype == torch.uint8  # final
            seen.add((len(pairs), pairs[0].left.text.split()[0]))
    assert {count for count, _ in seen} == set(TRAIN_COUNT.values())


def test_shares_of_augmented_pairs(shards):
    source, plain, total = AugmentedSource(ShardSource(shards), 0.7, 3, 8), 0, 0
    for source.epoch in range(500):
        for pairs in source_groups(source):
            plain += sum(pair.right.image is None for pair in pairs)
            total += len(pairs)
    assert plain / total == pytest.approx(0.7, abs=0.03)
    assert all(pair.right.image is None for pairs in source_groups(AugmentedSource(ShardSource(shards), 1.0)) for pair in pairs)
    with pytest.raises(ValueError, match="must lie between 0 and 1, not 9"): AugmentedSource([], 9)


def test_an_empty_caption_is_a_broken_record_whatever_is_made_of_it(tmp_path):
    folder = write_tar(tmp_path / "x-train-0.tar", [("a.jpg", jpeg(0)), ("a.txt", b" ")]).parent
    source = AugmentedSource(ShardSource(folder), 0.0, 0, 8)
    with pytest.raises(ValueError, match="'a.jpg' is empty"): source[0]


def test_shards_that_are_missing_in_between_are_named(tmp_path, capsys):
    for number in (0, 1, 4): write_tar(tmp_path / f"x-train-{number:04}.tar", sample(number, "{:03}", "jpg"))
    assert len(ShardSource(tmp_path)) == 3 and "has no shard 2, 3, though it has later ones" in capsys.readouterr().err
    assert missing_numbers([Path("a-00001-of-00010.tar"), Path("a-00004-of-00010.tar")]) == [2, 3] and len(missing_numbers([Path("a-1.tar"), Path("a-90000000000.tar")])) == 9
    assert missing_numbers([Path("a.tar"), Path("a-4.tar")]) == []
    (tmp_path / "x-train-0004.tar").unlink()
    assert len(ShardSource(tmp_path)) == 2 and not capsys.readouterr().err


# HQ-Edit

def edit_rows(n):
    return [{"input": f"in {i}", "input_image": picture(2 * i), "edit": f"edit {i}", "inverse_edit": f"inverse {i}", "output": f"out {i}", "output_image": picture(2 * i + 1)} for i in range(n)]


def write_edits(path, rows):
    import datasets
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({name: datasets.Image() if name.endswith("image") else datasets.Value("string") for name in rows[0]})
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    import datasets
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def edits(tmp_path, hub_cache):
    rows = edit_rows(3)
    write_edits(tmp_path / "hq" / "data" / "train-00000-of-00002.parquet", rows[:2])
    write_edits(tmp_path / "hq" / "data" / "train-00001-of-00002.parquet", rows[2:])
    return tmp_path / "hq"


def test_hq_edit(edits):
    source = open_source(f"hq-edit:{edits}")
    assert isinstance(source, HQEditSource) and len(source) == 9 and source.groups == [[0, 3], [1, 4], [2, 5], [6], [7], [8]]
    form = lambda pair: (number(pair.left), pair.left.text, number(pair.right), pair.right.text)
    assert [form(source[i][0]) for i in range(9)] == ([(2 * i, f"edit {i}", 2 * i + 1, None) for i in range(3)] + [(2 * i + 1, f"inverse {i}", 2 * i, None) for i in range(3)]
                                                      + [(2 * i, f"edit {i}", 2 * i + 1, f"out {i}") for i in range(3)])
    first, inverse = next(source_groups(source))
    assert first.left.image is inverse.right.image and first.right.image is inverse.left.image and isinstance(first.left.image, Image.Image)
    with pytest.raises(IndexError): source[9]


def test_hq_edit_leaves_out_what_is_missing(tmp_path, hub_cache):
    rows = edit_rows(3)
    rows[0]["inverse_edit"], rows[1]["output"], rows[2]["input_image"] = "", None, None
    write_edits(tmp_path / "hq" / "a.parquet", rows)
    source = HQEditSource(tmp_path / "hq")
    assert [len(source[i]) for i in range(9)] == [1, 1, 0, 0, 1, 0, 1, 0, 0]
    assert texts(source) == [("edit 0", None), ("edit 1", None), ("inverse 1", None), ("edit 0", "out 0")]


def test_hq_edit_errors(edits, tmp_path):
    import datasets
    bomb = bytearray(jpeg(0, "PNG"))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)  # its header claims as many pixels
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    broken = [edit_rows(1)[0] | {"input_image": {"bytes": data, "path": None}} for data in (b"not a picture", bytes(bomb))]
    write_edits(edits / "data" / "train-00002-of-00003.parquet", [*edit_rows(2), *broken])
    source = HQEditSource(edits)
    assert source[3][0].left.text == "edit 0"
    for index in (5, 6):
        with pytest.raises(ValueError, match=f"train-00002-of-00003.parquet' row {index - 2}: no readable image"): source[index]
    (edits / "data" / "z.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="data/z.parquet' is not a whole Parquet file .*; download it again"): HQEditSource(edits)
    datasets.Dataset.from_list([{"edit": "a", "input": "b"}]).to_parquet(edits / "data" / "z.parquet")
    with pytest.raises(ValueError, match="data/z.parquet' has the columns edit, input; expected input_image"): HQEditSource(edits)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \*.parquet in '.*empty'"): HQEditSource(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no folder '/nowhere'; give a folder, or a hub id"): HQEditSource("/nowhere")


# Visual Genome

def region(image, number, phrase, box):
    return dict(zip(("x", "y", "width", "height"), box)) | {"region_id": number, "image_id": image, "phrase": phrase}


@pytest.fixture
def genome(tmp_path):
    root = tmp_path / "vg"
    for folder, image in (("VG_100K", 1), ("VG_100K_2", 2), ("images", 3)):
        (root / folder).mkdir(parents=True)
        pixels = np.zeros((40, 60, 3), np.uint8)
        pixels[..., 0], pixels[..., 1] = np.arange(60) * 4, np.arange(40)[:, None] * 6
        pixels[..., 2] = image * 60
        Image.fromarray(pixels).save(root / folder / f"{image}.jpg", quality=95)
    regions = [{"id": 1, "regions": [region(1, 10 + i, f" phrase {i} ", (10 * i, 5, 10, 20)) for i in range(3)]},
               {"id": 2, "regions": [region(2, 20, "phrase 3", (0, 0, 60, 40)), region(2, 21, "", (0, 0, 5, 5)), region(2, 22, "flat", (0, 0, 5, 0)), region(2, 23, "beyond", (50, 30, 20, 20))]},
               {"id": 3, "regions": [region(3, 30, "phrase 7", (0, 0, 1, 1)), region(3, 31, "phrase 8", (0, 0, 9, 9))]}]
    (root / "region_descriptions.json").write_text(json.dumps(regions))
    qas = [{"id": image, "qas": [{"qa_id": 10 * image + i, "image_id": image, "question": f"question {image}{i}?", "answer": answer, "a_objects": [], "q_objects": []} for i, answer in enumerate(answers)]}
           for image, answers in ((1, ("A table.", "Two")), (2, ("Mr. Smith...", ".", "In the U.S.")))]
    (root / "question_answers.json").write_text(json.dumps(qas))
    return root


def test_regions(genome):
    source = open_source(f"vg-crop:{genome}")
    assert isinstance(source, RegionSource) and len(source) == 9 and source.groups == [[0, 1, 2, 3], [4, 5, 6, 7]]  # the last one is left out
    assert [[pair.left.text for pair in source[i]] for i in range(9)] == [["phrase 0"], ["phrase 1"], ["phrase 2"], ["phrase 3"], [], [], ["beyond"], ["phrase 7"], ["phrase 8"]]
    for i in range(3):
        pair, = source[i]
        whole = load_image(genome / "VG_100K" / "1.jpg")
        assert torch.equal(load_image(pair.left.image), whole) and torch.equal(load_image(pair.right.image), whole[:, 5:25, 10 * i:10 * i + 10]) and pair.right.text is None
    beyond = load_image(source[6][0].right.image)
    assert beyond.shape == (3, 20, 20) and not beyond[:, 10:].any() and beyond[2, :10, :10].float().mean() > 100  # black where there is no picture
    assert source[0][0].left.image is source[2][0].left.image  # decoded once
    assert texts(pickle.loads(pickle.dumps(source))) == texts(source)


def test_the_training_part_of_the_regions_comes_first(genome):
    (genome / "region_descriptions_train.json").write_text(json.dumps([{"image_id": 3, "regions": [{"x": 0, "y": 0, "width": 5, "height": 5, "phrase": "of the training part"}]}]))
    source = RegionSource(genome)
    assert [source[0][0].left.text] == ["of the training part"] and len(source) == 1 and source.groups == []


def test_questions(genome):
    source = open_source(f"vg-vqa:{genome}")
    assert isinstance(source, QuestionSource) and source.groups == [[0, 1, 2, 3]]
    assert [[pair.right.text for pair in source[i]] for i in range(5)] == [["A table"], ["Two"], ["Mr. Smith"], [], ["In the U.S"]]
    assert source[2][0].left.text == "question 20?" and source[2][0].left.image == str(genome / "VG_100K_2" / "2.jpg")


@pytest.mark.parametrize("content, message", [
    ('[{"id": 1, "qas": [', "question_answers.json' is not JSON"),
    ('{"id": 1}', "question_answers.json' holds no list"),
    ("[]", "question_answers.json' has no questions"),
    ('[{"id": 1, "qas": []}, {"id": 2, "regions": []}]', "question_answers.json' entry 2 has no list 'qas'"),
    ('[{"id": 1, "qas": [{"question": "a", "answer": "b"}, {"question": "a"}]}]', "question_answers.json' entry 1, qas 2: no valid 'answer'; expected image_id, question, answer"),
    ('[{"id": 1, "qas": ["a"]}]', "question_answers.json' entry 1, qas 1: no valid 'question'"),
    ('[{"id": "../../x", "qas": [{"question": "a", "answer": "b"}]}]', "entry 1, qas 1: no valid 'image_id'")])
def test_wrong_genome_files(genome, content, message):
    (genome / "question_answers.json").write_text(content)
    with pytest.raises(ValueError, match=message): QuestionSource(genome)


def test_missing_genome_files(genome):
    regions, questions = RegionSource(genome), QuestionSource(genome)
    (genome / "VG_100K" / "1.jpg").unlink()
    sources._decoded.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"region_descriptions.json' region 2 \('phrase 1'\): no 1.jpg in VG_100K, VG_100K_2 or images"): regions[1]
    with pytest.raises(FileNotFoundError, match=r"question_answers.json' question 1 \('question 10\?'\): no 1.jpg"): questions[0]
    (genome / "VG_100K_2" / "2.jpg").write_bytes(b"cut")
    with pytest.raises(ValueError, match="2.jpg' is not a readable image"): regions[3]
    (genome / "region_descriptions.json").unlink()
    with pytest.raises(FileNotFoundError, match="no file at .*region_descriptions.json'; check the folder"): RegionSource(genome)


# MMEB

ORDER = "<|image_1|>\nRepresent the given image with the following question: "
MMEB = {"ImageNet_1K": [("<|image_1|>\nRepresent the given image for classification\n", "images/ImageNet_1K/Train/0.jpg", "tench, Tinca tinca", "")],
        "HatefulMemes": [(f"<|image_1|>\n{sources.HATEFUL}\n", "images/HatefulMemes/Train/1.jpg", "No", "")],
        "OK-VQA": [(f"{ORDER}What is it?\n", "images/OK-VQA/Train/2.jpg", "a cat, a dog", ""), (f"{ORDER}Why?\n", "images/OK-VQA/Train/3.jpg", "because", "")],
        "MSCOCO": [('<|image_1|>\nSelect the portion of the image that isolates the object labeled as "dog"\n', "images/MSCOCO/Train/4.jpg", "<|image_1|>\nRepresent the given cropped image of the object\n", "images/MSCOCO/Train/5.jpg")],
        "MSCOCO_t2i": [("Find me an everyday image that matches the given caption: A dog runs.\n", "", "<|image_1|>\nRepresent the given image.\n", "images/MSCOCO_t2i/Train/6.jpg")],
        "WebQA": [("<|image_1|>\nFind a Wikipedia image that answers this question: Who?\n", "", "<|image_1|>\nRepresent the given Wikipedia image with related text information: A tower\n", "images/WebQA/Train/7.jpg")]}


def mmeb_rows(rows): return [dict(zip(MMEBSource.columns, row)) | {"neg_text": "wrong", "neg_image_path": None} for row in rows]


@pytest.fixture
def mmeb(tmp_path):
    import datasets
    root = tmp_path / "mmeb"
    for name, rows in MMEB.items():
        (root / name).mkdir(parents=True)
        if name == "OK-VQA": (root / name / "original.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mmeb_rows(rows)))
        else: datasets.Dataset.from_list(mmeb_rows(rows)).to_parquet(root / name / "original-00000-of-00001.parquet")
        datasets.Dataset.from_list(mmeb_rows([("another wording",) + rows[0][1:]])).to_parquet(root / name / "diverse_instruction-00000-of-00001.parquet")
        for path in {cell for row in rows for cell in (row[1], row[3]) if cell}:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(jpeg(int(path.split("/")[-1][0])))
    (root / "CIFAR_100").mkdir()
    (root / "CIFAR_100" / "original.jsonl").write_text("for evaluation, and not read\n")
    return root


def test_mmeb(mmeb):
    source = open_source(f"mmeb:{mmeb}")
    form = lambda item: (None if item.image is None else number(item), item.text)
    assert [(form(pair.left), form(pair.right)) for pairs in source_groups(source) for pair in pairs] == [
        ((0, None), (None, "a photo of a tench")), ((1, "Is this image hateful?"), (None, "No")), ((2, "What is it?"), (None, "a cat, a dog")), ((3, "Why?"), (None, "because")),
        ((None, "A dog runs."), (6, None)), ((None, "Who?"), (7, "A tower")), ((4, '"dog"'), (5, None))]  # in the order of MMEB_SETS
    assert source.groups == [[i] for i in range(7)] and len(MMEB_SETS) == len(set(MMEB_SETS)) == 20
    assert len(MMEBSource(mmeb, ("OK-VQA", "WebQA"), rows=1)) == 2
    assert texts(pickle.loads(pickle.dumps(source))) == texts(source)


@pytest.mark.parametrize("row, kind, message", [
    (("q", "images/OK-VQA/Train/9.jpg", "a", ""), FileNotFoundError, "original.jsonl' line 2: no image file at '.*9.jpg'"),
    (("q", "../x.jpg", "a", ""), ValueError, r"original.jsonl' line 2: the path '\.\./x.jpg' does not stay inside"),
    (("q", "", "a", "/etc/passwd"), ValueError, "original.jsonl' line 2: the path '/etc/passwd'")])
def test_wrong_mmeb_rows(mmeb, row, kind, message):
    (mmeb / "OK-VQA" / "original.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mmeb_rows([MMEB["OK-VQA"][0], row])))
    with pytest.raises(kind, match=message): MMEBSource(mmeb, ("OK-VQA",))[1]


def test_mmeb_errors(mmeb, tmp_path):
    path = mmeb / "OK-VQA" / "original.jsonl"
    path.write_text(path.read_text() + '{"qry": "cut')
    with pytest.raises(ValueError, match="OK-VQA/original.jsonl' line 3 is not JSON"): MMEBSource(mmeb)
    path.write_text('{"query": "a"}\n')
    with pytest.raises(ValueError, match="OK-VQA/original.jsonl' line 1 has the columns query; expected qry, qry_image_path, pos_text, pos_image_path"): MMEBSource(mmeb)
    with pytest.raises(FileNotFoundError, match="no rows of MMEB in .*expected files such as ImageNet_1K/original-00000-of-00001.parquet"): MMEBSource(tmp_path / "none")
    path.write_text(json.dumps(mmeb_rows([("", "", "a", "")])[0]) + "\n")
    assert MMEBSource(mmeb, ("OK-VQA",))[0] == []


def test_mmeb_texts():
    for prompt in PROMPTS:
        kept = "Is this image hateful?" if prompt == sources.HATEFUL else ""
        assert mmeb_text(f"<|image_1|>\n{prompt}\n") == kept and mmeb_text(f"{prompt} the rest\n") == f"{kept} the rest".strip()
    assert mmeb_text("Paris, France", "Country211", target=True) == "this is in the country of Paris, France"
    assert mmeb_text("sports", "N24News", target=True) == "a photo from the domain of sports" and mmeb_text("sports", "N24News") == "sports"
    assert mmeb_text("a plain, old text ", "OK-VQA", target=True) == "a plain, old text"
    assert mmeb_text(" , Felis catus", "ImageNet_1K", target=True) == mmeb_text("", "N24News", target=True) == ""  # no name, no phrase


# Streams

def files(folder): return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_streamed_captions(shards, hub_cache):
    before = files(shards.parent)
    groups = list(stream_groups(f"cc3m:{shards}"))
    assert files(shards.parent) == before and not hub_cache.exists()  # nothing is written
    assert [[(number(pair.left), pair.left.text, pair.right.text) for pair in pairs] for pairs in groups] == [[(i, None, f"caption {i}, é")] for i in range(6)]
    assert texts(ShardSource(shards)) == [(None, pairs[0].right.text) for pairs in groups]


def test_streamed_edits(edits, hub_cache):
    before = files(edits.parent)
    groups = [[(number(pair.left), pair.left.text, number(pair.right), pair.right.text) for pair in pairs] for pairs in stream_groups(f"hq-edit:{edits}")]
    assert files(edits.parent) == before and not hub_cache.exists()
    source = HQEditSource(edits)
    stored = [[(number(pair.left), pair.left.text, number(pair.right), pair.right.text) for pair in pairs] for pairs in source_groups(source)]
    assert sorted(groups, key=str) == sorted(stored, key=str) and [len(pairs) for pairs in groups] == [2, 1] * 3


def test_streams_from_the_hub_ask_for_the_right_rows(monkeypatch):
    import datasets
    asked = []
    row = {"jpg": picture(1), "txt": "a caption"} | edit_rows(1)[0]
    monkeypatch.setattr(datasets, "load_dataset", lambda *place, **named: asked.append((*place, named)) or [row])
    for name in ("cc3m", "cc12m", "hq-edit"): assert [len(pairs) for pairs in stream_groups(name)] == ([2, 1] if name == "hq-edit" else [1])
    caches = [named.pop("cache_dir") for *_, named in asked]
    assert not any(map(os.path.exists, caches))  # gone again
    assert asked == [(place, {"data_files": None, "split": "train", "streaming": True}) for place in ("pixparse/cc3m-wds", "pixparse/cc12m-wds", "UCSC-VLAA/HQ-Edit")]


def test_stream_errors(shards, hub_cache):
    with pytest.raises(ValueError, match="'vg-crop' cannot be streamed; give cc3m, cc12m, hq-edit"): next(stream_groups("vg-crop"))
    with pytest.raises(FileNotFoundError, match="no folder '/nowhere'"): next(stream_groups("cc3m:/nowhere"))
    shard = shards / "cc3m-train-0001.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(ValueError, match="cc3m' cannot be read after row 3"): list(stream_groups(f"cc3m:{shards}"))
    write_tar(shards / "cc3m-train-0000.tar", [("a.jpg", jpeg(0)), ("a.cls", b"1")])
    with pytest.raises(ValueError, match="cc3m' row 1 has the columns .*; expected jpg, txt"): list(stream_groups(f"cc3m:{shards}"))


def test_every_name_opens(shards, captions, edits, genome, mmeb):
    asked = write_csv(captions.parent / "vqa.csv", ["path", "question", "answer"], [["train/000000000.jpg", "q", "a"]])
    opened = {name: open_source(f"{name}:{place}", seed=5, size=24) for name, place in (("cc3m", captions), ("cc12m", shards), ("cc3m-aug", captions), ("cc12m-aug", shards), ("cc3m-vqa", asked),
                                                                                      ("hq-edit", edits), ("vg-crop", genome), ("vg-vqa", genome), ("mmeb", mmeb))}
    assert all(name in sources.NAMES for name in opened) and {name: len(source) for name, source in opened.items()} == {
        "cc3m": 3, "cc12m": 6, "cc3m-aug": 3, "cc12m-aug": 6, "cc3m-vqa": 1, "hq-edit": 9, "vg-crop": 9, "vg-vqa": 5, "mmeb": 7}
    assert (opened["cc3m-aug"].seed, opened["cc3m-aug"].size, opened["cc3m-aug"].chance) == (5, 24, plain_chance(0.9)) and opened["cc12m-aug"].chance == plain_chance(0.971)
    for source in opened.values():
        assert list(source_groups(source)) and max(index for group in source.groups for index in group) < len(source)


def test_random_crops_keep_to_their_share_and_seed():
    ramp = torch.stack([torch.arange(120).repeat(100, 1), torch.arange(100).repeat(120, 1).T, torch.zeros(100, 120)]).to(torch.uint8)  # (3, 100, 120): x, y, 0
    for seed in range(20):
        crop = sources.random_resized_crop(ramp, 64, seed).float()
        assert crop.shape == (3, 64, 64) and torch.equal(crop, sources.random_resized_crop(ramp, 64, seed).float())
        width, height = float(crop[0].max() - crop[0].min()), float(crop[1].max() - crop[1].min())
        assert 0.87 < (width + 1) * (height + 1) / 12_000 <= 1.01
    wide, windows = ramp[:, 10:70], {}  # 120 × 60
    for scale in ((0.9, 1.0), (0.3, 0.5)): windows[scale] = {sources.random_resized_crop(wide, 64, seed, scale).numpy().tobytes() for seed in range(20)}
    assert len(windows[0.9, 1.0]) == 1 and len(windows[0.3, 0.5]) > 15  # no window of nine tenths has sides of 3:4 to 4:3, so the middle is taken


def test_random_crops_leave_all_other_random_numbers_alone(monkeypatch):
    for place in (torch.cuda, torch.mps): monkeypatch.setattr(place, "manual_seed_all" if place is torch.cuda else "manual_seed", lambda seed: pytest.fail("the numbers of an accelerator began anew"))
    state = torch.get_rng_state()
    sources.random_resized_crop(torch.zeros(3, 100, 100, dtype=torch.uint8), 32, 0)
    assert torch.equal(state, torch.get_rng_state())


def test_a_scene_without_some_of_its_parts_keeps_the_others():
    whole, part = ShapesSource(3, tgit=2), ShapesSource(3, tgit=2, without="caption,edit")
    assert whole.parts == (*("caption",) * 4, "vqa", "edit", "region", "tgit", "tgit") and part.parts == ("vqa", "region", "tgit", "tgit")
    texts = lambda source, wanted: [pair.left.text for index in range(len(source)) if source.parts[index % len(source.parts)] in wanted for pair in source[index]]
    assert texts(whole, part.parts) == texts(part, part.parts) and len(texts(part, part.parts)) > 20
    with pytest.raises(ValueError, match="no part 'colour'"): ShapesSource(3, without="colour")
    with pytest.raises(ValueError, match="nothing is left"): ShapesSource(3, without="caption,vqa,edit,region,tgit")


def test_a_table_named_from_its_own_folder_cannot_reach_outside_either(folder, monkeypatch):
    (folder / "set").mkdir()
    (folder / "set" / "table.csv").write_text("image,text\n../red.png,one\n")
    (folder / "set" / "inside.csv").write_text("image,text\nred.png,one\n")
    (folder / "set" / "red.png").write_bytes((folder / "red.png").read_bytes())
    monkeypatch.chdir(folder / "set")
    for path in ("table.csv", "./table.csv", folder / "set" / "table.csv"):
        with pytest.raises(ValueError, match="line 2: the path '../red.png' does not stay inside"): CSVSource(path)
    for root in (None, ".", folder / "set", folder): assert colour_of(CSVSource("inside.csv", root)[0][0].left) == COLOURS["red"]


def test_an_archive_that_has_changed_is_read_again(folder):
    with pytest.raises(FileNotFoundError, match="has no member 'new.png'"): table(folder, "image,text\npictures.zip#new.png,one\n")
    with zipfile.ZipFile(folder / "pictures.zip", "a") as archive: archive.write(folder / "red.png", "new.png")
    for cell in ("pictures.zip#new.png", "deep\\..\\pictures.zip#new.png"): assert colour_of(table(folder, f"image,text\n{cell},one\n")[0][0].left) == COLOURS["red"]
    (folder / "no.zip").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no.zip' is not a ZIP archive"): table(folder, "image,text\nno.zip#a.png,one\n")


def test_there_is_no_item_before_the_first(folder):
    for source in (table(folder, "image,text\nred.png,one\n"), ShapesSource(3)):
        for index in (-1, len(source)):
            with pytest.raises(IndexError, match=f"item {index} of"): source[index]
    with pytest.raises(IndexError, match="item -1 of 2 texts"): Texts(["a", "b"])[-1]


def test_cells_that_are_numbers_or_spaces(folder):
    path = folder / "table.jsonl"
    rows = [{"path": "red.png", "caption": 3}, {"path": "red.png", "caption": "  "}, {"path": "red.png", "caption": None}, {"path": "red.png", "caption": " two "}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = TableSource(path)
    assert [[pair.right.text for pair in source[index]] for index in (0, 3)] == [["3"], ["two"]]
    for index in (1, 2):
        with pytest.raises(ValueError, match=f"line {index + 1} has no text"): source[index]
    path.write_text(json.dumps({"path": "red.png", "caption": ["a", "b"]}) + "\n")
    with pytest.raises(ValueError, match="table.jsonl' line 1: caption is list .*expected a text"): TableSource(path)


def test_decoded_pictures_are_squashed_as_they_are_found():
    class Decoded:
        groups = [[index] for index in range(6)]
        def __getitem__(self, index): return [sources.Pair(sources.Item(Image.new("RGB", (300, 200), (index % 3, 0, 0))), sources.Item(text="x"))]

    images = source_images(Decoded(), 10, 8)
    assert images.shape == (3, 3, 8, 8) and images[:, 0, 0, 0].tolist() == [0, 1, 2]  # equal pictures once


def test_one_colour_teaches_no_tokenizer():
    with pytest.raises(ValueError, match="all of one colour"): sources.fit_tokenizer(_White(), sources.TiTokConfig(), sources.TokenizerTrainConfig(device="cpu"))


class _White:
    groups = [[0]]
    def __getitem__(self, index): return [sources.Pair(sources.Item(torch.full((3, 32, 32), 255, dtype=torch.uint8)), sources.Item(text="x"))]


def test_a_negative_number_of_transformations_is_refused():
    with pytest.raises(ValueError, match="tgit is the number of transformations.*0 or more, not -1"): ShapesSource(3, tgit=-1)


def test_own_shards_and_tables_under_any_name(shards, captions, tmp_path):
    expected = len(ShardSource(shards)) + len(ShardSource(shards, "*-validation-*.tar"))
    for number, path in enumerate(sorted(shards.glob("*.tar"))): path.rename(shards / f"{number:05}.tar")  # as img2dataset calls them
    assert len(open_source(f"shards:{shards}")) == expected
    rows = list(read_rows(captions, ("path", "caption")))
    (captions.parent / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for _, row in rows))
    assert len(open_source(f"table:{captions.parent / 'mine.jsonl'}")) == len(rows) == 3


def test_brackets_in_the_names_of_folders_and_files(edits, shards, hub_cache):
    for name, path in (("hq [1]", edits), ("cc[1]", shards)): path.rename(path.parent / name)
    assert len(HQEditSource(edits.parent / "hq [1]")) == 9
    assert len(list(stream_groups(f"cc3m:{shards.parent / 'cc[1]'}"))) == 6


def test_of_a_parquet_file_only_the_needed_columns_are_read(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq
    pq.write_table(pa.table({"path": ["a.jpg"], "image": [b"many bytes"], "caption": ["a"]}), tmp_path / "t.parquet")
    asked, read = [], pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda self, columns=None: asked.append(columns) or read(self, columns=columns))
    assert list(read_rows(tmp_path / "t.parquet", ("path", "caption"))) == [(1, {"path": "a.jpg", "caption": "a"})] and asked == [["path", "caption"]]


def test_a_shard_whose_names_are_no_text_is_named(tmp_path):
    with tarfile.open(tmp_path / "cc3m-train-0000.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, data in (("café.jpg", jpeg(0)), ("café.txt", b"a")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(ValueError, match="the name in .*cc3m-train-0000.tar.* is not UTF-8"): ShardSource(tmp_path)


def test_pictures_are_told_apart_by_path_in_either_form(folder):
    class Twice:
        groups = [[0], [1], [2]]
        def __getitem__(self, index): return [sources.Pair(sources.Item((folder / "red.png", str(folder / "red.png"), folder / "green.png")[index]), sources.Item(text="a"))]

    assert len(source_images(Twice(), 10, 8)) == 2
