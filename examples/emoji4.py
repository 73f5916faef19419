"""Emoji: names and edits learned in two drawing styles, asked in a third.

Trained, in the styles noto and twemoji: picture and name, picture and keywords, and (picture, instruction) -> edited picture; edits of one picture share a batch.
Asked, in openmoji, which is never trained on:
  captions        the name of a picture, and the picture of a name;
  edit-KIND       an edit, for every kind of the data: skin-tone, gender, hair, colour, size, clock, moon;
  captions-new, edit-skin-tone-new, edit-gender-new: the same of concepts that training sees in no style.

New is every seventh family, that is, concepts that edits turn into each other. A family with other edits than of skin tone and gender is always trained:
nothing else would teach its instructions ("change the time to five o'clock").
The candidates of an edit are all pictures of several families: the unchanged picture and results of its other edits (the instruction decides), and results of the
same instruction on others (the picture decides). Clocks and moons are one family each, and pink, purple, brown … are only of hearts: there the instruction alone decides.
Pictures between which the data has no edit in openmoji look alike there; of two families with such pictures only one is asked.
"""
import random
from collections import defaultdict

from common import main, read_jsonl, spread, write_set

TRAINED, ASKED = ("noto", "twemoji"), "openmoji"
TRAINED_EDITS = 1500  # at most, of a kind in a style: skin tones would outnumber everything else
CANDIDATES = 40  # about, in a group
QUERIES = 600  # about, of a kind, or one from every picture


def concept(picture): return picture.partition("_")[0]


def families(edges, items=()): # lists of items that edges connect, directly or not
    home = {item: [item] for item in items}
    for a, b in edges:
        one, other = home.setdefault(a, [a]), home.setdefault(b, [b])
        if one is other: continue
        one += other
        home |= dict.fromkeys(other, one)
    return list({id(family): family for family in home.values()}.values())


def split(concepts, edits, limit): # ids of known and of new concepts
    kinds, known, new = defaultdict(set), set(), set()
    for edit in edits: kinds[concept(edit["src"])].add(edit["kind"])
    found = families(((concept(edit["src"]), concept(edit["dst"])) for edit in edits), [row["id"] for row in concepts])
    for number, family in spread(list(enumerate(found)), limit):
        (new if number % 7 == 3 and set().union(*(kinds[one] for one in family)) <= {"skin_tone", "gender"} else known).update(family)
    return known, new


def styles(row): return next(image["styles"] for image in row["images"] if image["tone"] == 1)


def edit_row(cell, text, src, dst, group): return {"image": cell(src), "instruction": text, "target_image": cell(dst), "group": group}


def train_captions(concepts, style, cell):
    rows = [row for row in concepts if style in styles(row)]
    return [{"image": cell(f"{row['id']}_1"), "text": text} for row in rows for text in (row["name"], ", ".join(row["keywords"][:6]))]


def train_edits(edits, style, cell): # all edits of a picture, or none
    by_source, kept = defaultdict(list), defaultdict(list)
    for edit in edits:
        if style in edit["styles"]: by_source[edit["kind"], edit["src"]].append(edit)
    for kind, src in random.Random(0).sample(list(by_source), len(by_source)):
        if len(kept[kind]) < TRAINED_EDITS: kept[kind] += by_source[kind, src]
    return [edit_row(cell, edit["text"], edit["src"], edit["dst"], f"{style} {edit['src']}") for rows in kept.values() for edit in rows]


def look_alikes(edits, style): # {picture: those that the style draws the same, or nearly}
    alike = defaultdict(set)
    for edit in edits:
        if style not in edit["styles"]: alike[edit["src"]].add(edit["dst"])
    return alike


def distinct(found, alike): # the families whose pictures look different from each other and from those before
    kept, seen = [], set()
    for family in found:
        if all(alike[picture].isdisjoint(seen.union(family)) for picture in family if picture in alike):
            kept.append(family)
            seen.update(family)
    return kept


def asked_edits(found, text, cell): # `found`: families in which every picture can become every other, `text`: {(src, dst): instruction}
    rng, rows, pictures = random.Random(0), [], sum(map(len, found))
    groups, turns = -(-pictures // CANDIDATES), max(1, QUERIES // pictures)
    for number, family in enumerate(found):
        order = rng.sample(family, len(family))
        for turn in range(1, min(turns + 1, len(order))):  # every picture is as often a source as a result
            rows += [edit_row(cell, text[src, dst], src, dst, number % groups) for src, dst in zip(order, order[turn:] + order[:turn])]
    return rows


def prepare(data, out, limit=None): # `limit`: families
    concepts, edits = read_jsonl(data / "concepts.jsonl"), read_jsonl(data / "edits.jsonl")
    known, new = split(concepts, edits, limit)
    alike, asked = look_alikes(edits, ASKED), lambda picture: f"{data / ASKED}.zip#{picture}.png"
    seen = [row for row in concepts if row["id"] in known]
    train, tests = [], {}
    for style in TRAINED:
        cell = lambda picture: f"{data / style}.zip#{picture}.png"
        train += train_captions(seen, style, cell) + train_edits([edit for edit in edits if concept(edit["src"]) in known], style, cell)

    names = {f"{row['id']}_1": row["name"] for row in concepts if ASKED in styles(row)}
    text = {kind: {(edit["src"], edit["dst"]): edit["text"] for edit in edits if edit["kind"] == kind and ASKED in edit["styles"]} for kind in dict.fromkeys(edit["kind"] for edit in edits)}
    for ending, part in (("", known), ("-new", new)):
        of_part = lambda found: [family for family in distinct(found, alike) if concept(family[0]) in part]
        tests[f"captions{ending}"] = [{"image": asked(picture), "text": names[picture]} for picture, in of_part([[picture] for picture in names])]
        for kind in text:
            if found := of_part(families(text[kind])): tests[f"edit-{kind.replace('_', '-')}{ending}"] = asked_edits(found, text[kind], asked)
    write_set(out, train, tests)


if __name__ == "__main__": main(__doc__, "emoji4", prepare, tokenizer_steps=2500, steps=2500)
