"""NLVR: human statements about three boxes of coloured shapes, and regions of a box.

Trained: picture and statement, where the statement is true (train and dev), in all six orders of the boxes; in dev, whose objects are known, a true picture shares
its batch with a false one of the same statement, which has a list of its objects as text; single boxes, also mirrored, with lists of their objects; regions as below.
Asked, on the test split:
  statement   which picture the statement is true of; the candidates are pictures that people called false (no picture has two statements, so this is the one way to ask);
  region      (box, "the yellow triangle") -> that object cut out; the candidates are the other objects of the box;
  place       (box, "the topmost shape") -> the same, but only the box tells what the shape looks like.
Boxes and objects are cut out as PNG files, objects without a margin: what stands beside one would tell its place. An object that looks like another of its box is never cut out; asked are boxes with three or more that do not.
"""
import itertools
import random
from collections import Counter, defaultdict
from pathlib import Path

from PIL import Image

from common import main, only_candidates, read_jsonl, spread, write_set
from fuselip_edu.core import read_image

SIDE, PITCH = 100, 150  # pixels: of a box, from box to box
ORDERS = list(itertools.permutations(range(3)))  # of the boxes, as the pictures of a row show them
MIRRORS = {"": None, "h": Image.Transpose.FLIP_LEFT_RIGHT, "v": Image.Transpose.FLIP_TOP_BOTTOM, "hv": Image.Transpose.ROTATE_180}
CLEARLY = 12  # pixels that an object must be further out than any other: four of the 32 that a model sees
PLACES = {"leftmost": lambda thing: thing["x"], "rightmost": lambda thing: -thing["x"] - thing["size"],
          "topmost": lambda thing: thing["y"], "lowest": lambda thing: -thing["y"] - thing["size"]}


def look(thing): return f"{thing['color']} {thing['shape']}"


def listed(box): return ", ".join(name if count == 1 else f"{count} {name}s" for name, count in sorted(Counter(map(look, box)).items()))


def placed(box): # {object's number: a phrase that only it fits, by its place}
    found = {}
    for place in random.Random(listed(box)).sample(list(PLACES), len(PLACES)):
        far = sorted((PLACES[place](thing), number) for number, thing in enumerate(box))
        if far[0][0] + CLEARLY <= far[1][0]: found[far[0][1]] = f"the {place} shape"
    return found


def split_rows(data, split, limit): # a list of rows for every statement
    groups = defaultdict(list)
    for row in read_jsonl(data / f"nlvr_{split}.jsonl"): groups[row["group"]].append(row)
    return [rows for _, rows in spread(sorted(groups.items()), limit)]


def cell(data, row, order=0): return f"{data / 'nlvr_'}{row['id'].partition('-')[0].replace('train', 'train1k')}.zip#{row['images'][order]}"


def mirrored(box, mirror): # its objects where they are then
    flip = lambda at, size, turn: SIDE - at - size if turn else at
    return [thing | {"x": flip(thing["x"], thing["size"], "h" in mirror), "y": flip(thing["y"], thing["size"], "v" in mirror)} for thing in box]


def cut(picture, box, name): # a box and its objects -> its file, and {object's number: file} of those that look like no other
    name.parent.mkdir(parents=True, exist_ok=True)

    def save(path, left, top, right, bottom):
        picture.crop((max(0, left), max(0, top), min(SIDE, right), min(SIDE, bottom))).save(path)
        return str(path)

    looks = Counter(map(look, box))
    crops = {at: save(f"{name}-{at}.png", thing["x"], thing["y"], thing["x"] + thing["size"], thing["y"] + thing["size"])
             for at, thing in enumerate(box) if looks[look(thing)] == 1}
    return save(f"{name}.png", 0, 0, SIDE, SIDE), crops


def region_rows(box, file, crops): # -> rows of "region", rows of "place"
    asked = {"region": {at: f"the {look(box[at])}" for at in crops}, "place": {at: phrase for at, phrase in placed(box).items() if at in crops}}
    return [[{"image": file, "instruction": phrase, "target_image": crops[at], "group": f"{task} {Path(file).stem}"} for at, phrase in phrases.items()] for task, phrases in asked.items()]


def boxes(data, groups, out, fewest, mirrors=("",)): # yields (objects, file of the box, files of the objects)
    for row in itertools.chain.from_iterable(groups):
        for number, box in enumerate(row["boxes"]):
            if list(Counter(map(look, box)).values()).count(1) < fewest: continue
            picture = read_image(cell(data, row)).crop((PITCH * number, 0, PITCH * number + SIDE, SIDE))
            for mirror in mirrors:
                here, seen = mirrored(box, mirror), picture.transpose(MIRRORS[mirror]) if mirror else picture
                yield here, *cut(seen, here, out / "pictures" / f"{row['id']}-{number}{mirror}")


def train_boxes(data, groups, out):
    rows = []
    for box, file, crops in boxes(data, groups, out, fewest=0, mirrors=MIRRORS):
        rows.append({"image": file, "text": listed(box)})
        if len(crops) > 1: rows += itertools.chain(*region_rows(box, file, crops))
    return rows


def train_statements(data, groups): # a true picture and a false one share a group
    rows = []
    for group in groups:
        true, false = ([row for row in group if row["label"] == label] for label in (True, False))
        for (number, (right, wrong)), (at, order) in itertools.product(enumerate(itertools.zip_longest(true, false)), enumerate(ORDERS)):
            name = f"{group[0]['group']} {number} {at}"
            if right: rows.append({"image": cell(data, right, at), "text": right["sentence"], "group": name})
            if wrong and "boxes" in wrong: rows.append({"image": cell(data, wrong, at), "text": "; ".join(listed(wrong["boxes"][box]) for box in order), "group": name})
    return rows


def asked_statements(data, groups):
    rows = []
    for group in groups:
        if {row["label"] for row in group} != {True, False}: continue
        rows += [{"instruction": row["sentence"], "target_image": cell(data, row), "group": row["group"]} for row in group if row["label"]]
        rows += only_candidates("three boxes", [cell(data, row) for row in group], group[0]["group"])
    return rows


def asked_boxes(data, groups, out): # -> {task: rows}
    regions, places = [], []
    for box, file, crops in boxes(data, groups, out, fewest=3):
        region, place = region_rows(box, file, crops)
        regions += region
        if place: places += place + only_candidates("a shape", crops.values(), place[0]["group"])
    return {"region": regions, "place": places}


def prepare(data, out, limit=None): # `limit`: statements of each split
    train, dev, test = (split_rows(data, split, limit) for split in ("train1k", "dev", "test"))
    write_set(out, train_boxes(data, dev, out) + train_statements(data, dev) + train_statements(data, train),
              {"statement": asked_statements(data, test), **asked_boxes(data, test, out)})


if __name__ == "__main__": main(__doc__, "nlvr", prepare, tokenizer_steps=2500, steps=2500)
