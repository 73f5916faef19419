"The example scripts, on a part of the real sets: what they train and ask is what they say."
import csv
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fuselip_edu.cli import main
from fuselip_edu.core import load_image, read_image
from fuselip_edu.sources import CSVSource
from fuselip_edu.titok import TINY_TOKENIZER, TiTok, TokenizerTrainConfig
from fuselip_edu.transforms import KINDS, crop, grayscale, jitter, rotate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import common
import emoji4
import grocery
import nlvr
import starved

SETS = {"emoji4": (emoji4, None), "nlvr": (nlvr, 25), "grocery": (grocery, 200)}
TASKS = {"emoji4": {"captions", "captions-new", "edit-skin-tone", "edit-skin-tone-new", "edit-gender", "edit-gender-new", "edit-hair", "edit-colour", "edit-size", "edit-clock", "edit-moon"},
         "nlvr": {"statement", "region", "place"}, "grocery": {"names", "shop", *KINDS}}
COLOURS = {(255, 255, 0): "yellow", (0, 153, 255): "blue", (0, 0, 0): "black"}
BACKGROUND = (211, 211, 211)


def forwards(source): return next(iter(source.queries().values()))


def member(path): return str(path).partition("#")[2]


def real(path): return path and os.path.realpath(path.partition("#")[0]) + path.partition("#")[2]  # a set is reached through a link beside each table


def sides(source): return {(real(pair.left.image), pair.left.text, real(pair.right.image), pair.right.text) for index in range(len(source)) for pair in source[index]}


@pytest.fixture(scope="module")
def prepared(data, tmp_path_factory): # function: name -> (training source, {task: source})
    done = {}

    def get(name):
        if name not in done:
            module, limit = SETS[name]
            out = tmp_path_factory.mktemp(name)
            module.prepare(common.data_folder(name, data), out, limit)
            done[name] = CSVSource(out / "train.csv"), {path.stem: CSVSource(path) for path in (out / "tests").glob("*.csv")}
        return done[name]

    return get


@pytest.mark.parametrize("name", SETS)
def test_every_task_has_queries_that_training_does_not_answer(name, prepared):
    train, tests = prepared(name)
    assert set(tests) == TASKS[name]
    known, rng = sides(train), random.Random(0)
    for task, source in tests.items():
        assert known.isdisjoint(sides(source)), task
        queries = forwards(source)
        assert len(queries) >= 15 and all(2 <= len(query.candidates) <= 50 for query in queries), task
        for path in rng.sample(source.images, 5): read_image(path)
    for path in rng.sample(train.images, 20): read_image(path)


@pytest.mark.parametrize("name", SETS)
def test_preparing_again_changes_nothing(name, prepared, data, tmp_path):
    module, limit = SETS[name]
    train, tests = prepared(name)
    module.prepare(common.data_folder(name, data), tmp_path, limit)
    for source in (train, *tests.values()):
        assert (tmp_path / source.path.relative_to(train.path.parent)).read_text() == source.path.read_text().replace(str(train.path.parent), str(tmp_path))


@pytest.mark.parametrize("name", SETS)
def test_a_limit_makes_a_set_smaller(name, prepared, data, tmp_path):
    SETS[name][0].prepare(common.data_folder(name, data), tmp_path, 10)
    train, tests = prepared(name)
    assert len(CSVSource(tmp_path / "train.csv")) < len(train)
    for path in (tmp_path / "tests").glob("*.csv"): assert len(CSVSource(path)) < len(tests[path.stem])


def test_emoji_of_a_new_style_and_of_new_concepts_are_not_trained(prepared):
    train, tests = prepared("emoji4")
    concepts = lambda paths: {emoji4.concept(member(path)) for path in paths}
    assert {Path(path.partition("#")[0]).stem for path in train.images} == {"noto", "twemoji"}
    for task, source in tests.items():
        assert {Path(path.partition("#")[0]).stem for path in source.images} == {"openmoji"}
        asked = concepts(source.images)
        if task.endswith("-new"): assert asked.isdisjoint(concepts(train.images)), task
        else: assert asked <= concepts(train.images), task


def test_emoji_edits_need_picture_and_instruction(prepared):
    _, tests = prepared("emoji4")
    pixels = {}
    for task, source in tests.items():
        if not task.startswith("edit"): continue
        for path in source.images: pixels.setdefault(path, read_image(path).tobytes())
        for query in forwards(source):
            candidates = [candidate.image for candidate in query.candidates]
            assert query.item.image in candidates[1:], f"{task}: the unchanged picture must be a candidate"
            assert len({pixels[path] for path in candidates}) == len(candidates), f"{task}: two candidates look the same"
        if task in ("edit-clock", "edit-moon"): continue
        result = {(pair.left.text, pair.right.image) for index in range(len(source)) for pair in source[index]}
        rivals = [sum((query.item.text, candidate.image) in result for candidate in query.candidates[1:]) for query in forwards(source)]
        most = 0.5 if task == "edit-colour" else 0.9  # some colours are only of hearts
        assert sum(count > 0 for count in rivals) >= most * len(rivals), f"{task}: the same instruction on another picture must lead to a candidate"


def test_emoji_edits_are_those_of_the_data(prepared, data):
    train, tests = prepared("emoji4")
    edits = {(edit["src"], edit["text"], edit["dst"]) for edit in common.read_jsonl(data / "emoji4" / "edits.jsonl")}
    for source in (train, *tests.values()):
        for pair in (source[index][0] for index in range(len(source)) if source.rows[index]["instruction"]):
            assert (member(pair.left.image)[:-4], pair.left.text, member(pair.right.image)[:-4]) in edits
    for group in train.groups:
        assert len({train.rows[index]["image"] for index in group}) == 1


def test_a_statement_is_asked_with_pictures_it_is_false_of(prepared, data):
    rows = common.read_jsonl(data / "nlvr" / "nlvr_test.jsonl")
    by_picture = {row["images"][0]: row for row in rows}
    queries = forwards(prepared("nlvr")[1]["statement"])
    for query in queries:
        right, *wrong = (by_picture[member(candidate.image)] for candidate in query.candidates)
        assert query.item.image is None and right["label"] and not any(row["label"] for row in wrong)
        assert {row["sentence"].strip() for row in (right, *wrong)} == {query.item.text}


def test_a_trained_statement_is_true_and_its_hard_negative_false(prepared, data):
    train, _ = prepared("nlvr")
    rows = {image: row for split in ("train1k", "dev") for row in common.read_jsonl(data / "nlvr" / f"nlvr_{split}.jsonl") for image in row["images"]}
    seen = Counter()
    for group in train.groups:
        described = [(rows[member(train.rows[index]["image"])], train.rows[index]["text"]) for index in group if "#" in train.rows[index]["image"]]
        for row, text in described: assert row["label"] == (text == row["sentence"].strip())
        seen[tuple(row["label"] for row, _ in described)] += 1
    assert seen[True, False] > 50 and not any(sum(labels) > 1 for labels in seen)


def shown(path): # the colour that most pixels of a crop have, the background aside
    pixels = np.asarray(read_image(path)).reshape(-1, 3)
    values, counts = np.unique(pixels[(pixels != BACKGROUND).any(1)], axis=0, return_counts=True)
    return COLOURS.get(tuple(map(int, values[counts.argmax()])))


def place_of(path, rows): # its top, left, bottom and right in the box, by the data
    *name, number, at = Path(path).stem.split("-")
    thing = rows["-".join(name)]["boxes"][int(number)][int(at)]
    return thing["y"], thing["x"], min(100, thing["y"] + thing["size"]), min(100, thing["x"] + thing["size"])


def test_a_crop_shows_what_the_phrase_says(prepared):
    train, tests = prepared("nlvr")
    phrases = [(row["instruction"].split(), str(source.path.parent / row["target_image"])) for source in (train, tests["region"]) for row in source.rows
               if row["instruction"].endswith(("square", "circle", "triangle"))]
    assert len(phrases) > 100
    for (_, colour, _), path in phrases: assert shown(path) == colour
    for query in forwards(tests["region"]):
        looks = [next(phrase for phrase, path in phrases if path == candidate.image) for candidate in query.candidates]
        assert "the " + " ".join(looks[0][1:]) == query.item.text and looks[0] not in looks[1:]


def test_the_place_is_where_the_phrase_says(prepared, data):
    queries, rows = forwards(prepared("nlvr")[1]["place"]), {row["id"]: row for row in common.read_jsonl(data / "nlvr" / "nlvr_test.jsonl")}
    for query in queries:
        box = np.array(read_image(query.item.image))
        top, left, bottom, right = place_of(query.candidates[0].image, rows)
        assert np.array_equal(box[top:bottom, left:right], np.asarray(read_image(query.candidates[0].image)))
        box[top:bottom, left:right] = BACKGROUND  # what is left are the other objects
        beyond = {"topmost": box[:top + 12], "lowest": box[bottom - 12:], "leftmost": box[:, :left + 12], "rightmost": box[:, right - 12:]}
        assert (beyond[query.item.text.split()[1]] == BACKGROUND).all(), query.item.text
    assert len({query.item.text for query in queries}) == 4


def test_a_photo_has_its_own_name_and_shop_picture(prepared, data):
    train, tests = prepared("grocery")
    photos = {row["image"]: row for split in ("train", "val") for row in common.read_jsonl(data / "grocery" / f"grocery_{split}.jsonl")}
    classes = {row["id"]: row for row in json.loads((data / "grocery" / "classes.json").read_text())}
    for row in (*(row for row in train.rows if not row["group"]), *tests["names"].rows, *tests["shop"].rows):
        product = classes[photos[member(row["image"])]["cls"]]
        assert row["text"] == product["name"] if row["text"] else member(row["target_image"]) == product["iconic"]
    assert all("grocery_val" in row["image"] for task in ("names", "shop") for row in tests[task].rows) and not any("grocery_val" in row["image"] for row in train.rows)


def transformed(picture, words): # by the instruction, where it says all
    if words.startswith("crop to"): return crop(picture, *(names.index(name) for names, name in zip((("upper", "center", "lower"), ("left", "center", "right")), words.split()[2:])))
    if words.startswith("rotate"): return rotate(picture, int(words.split()[1]) * (1 if words.endswith("counter-clockwise") else -1))
    if words.endswith("flip"): return picture.flip({"horizontal": 2, "vertical": 1}[words.split()[0]])
    if words == "grayscale": return grayscale(picture)
    if words.startswith(("increase", "decrease")): return jitter(picture, *map(float, re.findall("by factor ([0-9.]+)", words)))


def test_a_transformed_photo_is_what_the_instruction_says(prepared, data):
    train, tests = prepared("grocery")
    photos = {split: [f"{data / 'grocery' / f'grocery_{split}.zip'}#{row['image']}" for row in common.spread(common.read_jsonl(data / "grocery" / f"grocery_{split}.jsonl"), 200)] for split in ("train", "val")}
    photos["val"], checked = common.spread(photos["val"], grocery.ASKED), Counter()
    for source, split in ((train, "train"), *((tests[kind], "val") for kind in KINDS)):
        rows = [row for row in source.rows if row["group"]]
        for row in random.Random(0).sample(rows, 40):
            photo = load_image(photos[split][int(row["group"].partition("-")[0])], grocery.SIZE)
            before, after = (load_image(str(source.path.parent / row[name])) for name in ("image", "target_image"))
            expected = transformed(before, row["instruction"])
            assert torch.equal(photo, before) or torch.equal(photo, after)
            assert torch.equal(after, photo if expected is None else expected), row["instruction"]
            checked[row["instruction"].split()[0], split] += 1
    assert {word for word, split in checked if split == "train"} == {word for word, split in checked if split == "val"} == {"crop", "rotate", "horizontal", "vertical", "grayscale", "colorize", "increase", "decrease"}


def test_a_mirrored_box_is_the_picture_mirrored(prepared):
    train, _ = prepared("nlvr")
    files = {Path(row["image"]).stem: row for row in train.rows if row["image"].endswith(".png") and row["text"] and "#" not in row["image"]}
    twins = [(row, files[f"{name}v"]) for name, row in files.items() if f"{name}v" in files]
    assert len(twins) > 50
    for row, twin in twins[:20]:
        assert row["text"] == twin["text"] and np.array_equal(*(np.asarray(read_image(train.path.parent / one["image"]))[::way] for one, way in ((row, -1), (twin, 1))))
    phrases = {(row["image"], row["target_image"]): row["instruction"] for row in train.rows if "most shape" in row["instruction"] or "lowest" in row["instruction"]}
    assert {phrase for (image, _), phrase in phrases.items() if Path(image).stem.endswith("v")} == {f"the {place} shape" for place in nlvr.PLACES}


@pytest.mark.parametrize("name", ["grocery", "emoji4"])
def test_a_small_part_is_learned(name, data, tmp_path, monkeypatch):
    "Names, after half a minute with the shipped tokenizer: of new photos, or of emoji that were seen."
    monkeypatch.setattr(grocery, "DRAWS", 0)  # names and shop pictures alone
    SETS[name][0].prepare(common.data_folder(name, data), tmp_path, {"grocery": 1200, "emoji4": 210}[name])
    asked, run = tmp_path / ("tests/names.csv" if name == "grocery" else "seen.csv"), tmp_path / "run"
    if name == "emoji4":
        with open(tmp_path / "train.csv", newline="", encoding="utf-8") as file: rows = [row for row in csv.DictReader(file) if row["text"] and "," not in row["text"]]
        common.write_csv(asked, rows)
    assert main(["train", "--preset", "tiny", "--data", f"csv:{tmp_path / 'train.csv'}", "--run", str(run), "--train.steps", "150", "--train.batch-size", "64"]) == 0
    assert main(["evaluate", "--model", str(run), "--data", f"csv:{asked}", "--candidates", "100", "--out", str(tmp_path / "found.json")]) == 0
    for task, row in json.loads((tmp_path / "found.json").read_text())["tasks"].items(): assert row["ci95"][0] > row["chance"], task


@pytest.mark.parametrize("name", SETS)
def test_missing_data_is_one_clear_line(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSELIP_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=f"no folder '.*nowhere/{name}'; .*FUSELIP_DATA"): common.main("What it is.", name, SETS[name][0].prepare, 1, 1, ["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_one_command_trains_and_compares(data, tmp_path, monkeypatch):
    ran = []

    def runs(code): monkeypatch.setattr(subprocess, "run", lambda command, **_: ran.append(command) or subprocess.CompletedProcess(command, code))
    runs(3)
    start = lambda *words: common.main("What it is.", "grocery", lambda data, out: grocery.prepare(data, out, 5), 20, 30, ["--data", str(data), "--out", str(tmp_path), *words])
    start("--prepare-only")
    assert not ran and (tmp_path / "tests" / "shop.csv").exists()
    with pytest.raises(SystemExit) as left: start("--seeds", "2")
    assert left.value.code == 3
    assert ran == [[sys.executable, "-m", "fuselip_edu", "reproduce", "--data", f"csv:{tmp_path}/train.csv", "--tests", f"{tmp_path}/tests", "--tokenizer-steps", "20", "--steps", "30",
                    "--seeds", "2", "--run", f"{tmp_path}/run"]]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text(json.dumps({"command": "reproduce", "models": {"sf": {"tasks": {"shop": {"mean": 0.5}}, "curves": [], "answers": {"shop": ["01"]}}}}))
    runs(0)
    start("--seeds", "2")
    assert json.loads((tmp_path / "results.json").read_text()) == {"command": "python examples/grocery.py --seeds 2", "models": {"sf": {"tasks": {"shop": {"mean": 0.5}}}}}


@pytest.mark.parametrize("kind", starved.PRESET)
def test_captions_over_a_starved_tokenizer(kind, monkeypatch):
    monkeypatch.setattr(starved, "TRAINED", 60)
    monkeypatch.setattr(starved, "ASKED", 20)
    tokenizer = starved.starve(TiTok.from_pretrained(TINY_TOKENIZER), 16, starved.pictures(starved.scene(index) for index in range(40)), TokenizerTrainConfig(steps=2, free_steps=0, device="cpu"))
    found = starved.write_captions(kind, tokenizer, 3)
    assert found["loss"] > 0 and 0 <= found["right"] <= 1 and found["before"]["used"] <= 16
    assert (found["before"] != found["after"]) == (kind in starved.ALPHAS)  # only there the tokenizer learns
    assert found == starved.write_captions(kind, tokenizer, 3)  # and leaves the tokenizer that it was given as it was


def test_too_few_queries_are_an_error_before_anything_is_learned(tmp_path, capsys):
    with pytest.raises(SystemExit): starved.main(["--queries", "3", "--out", str(tmp_path / "run")])
    assert "3 test scenes are too few" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_rate_rises_and_falls():
    rates = [starved.rate_at(step, 200) for step in range(200)]
    assert rates[0] < rates[20] < rates[49] == max(rates) == 2e-3 == rates[100] and rates[-1] < 1e-4
