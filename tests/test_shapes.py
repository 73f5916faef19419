"""The shapes world against a second reading of its own sentences.

A small interpreter, written without the generators' helpers, reads every sentence back and checks it against the objects:
answers, referring phrases, edits with their inverses, and the falseness of false captions.
"""
import itertools
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from fuselip_edu import shapes
from fuselip_edu.shapes import Object, Scene

N = 400  # scenes a check
TRAIN = [shapes.scene_at(index, seed=11) for index in range(N)]
TEST = [shapes.scene_at(index, seed=11, split="test") for index in range(N)]
SCENES = TRAIN + TEST
HELD_OUT_NAMES = [f"{colour} {shape}" for colour, shape in shapes.HELD_OUT]
NUMBERS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4}


# ---- the second reading

def middle(thing):  # (x, y) in cells, from the corners
    side = {"small": 1, "large": 2}[thing.size]
    return (thing.column + thing.column + side) / 2, (thing.row + thing.row + side) / 2


def third(at, names):
    return names[0] if at < 4 / 3 else names[1] if at < 8 / 3 else names[2]


def where(thing):
    x, y = middle(thing)
    row, column = third(y, ("upper", "center", "lower")), third(x, ("left", "center", "right"))
    return "center" if (row, column) == ("center", "center") else f"{row} {column}"


def side_of(how, a, b):  # True: clearly, False: not at all, None: neither
    (ax, ay), (bx, by) = middle(a), middle(b)
    along, across = {"left of": (bx - ax, by - ay), "right of": (ax - bx, by - ay), "above": (by - ay, bx - ax), "below": (ay - by, bx - ax)}[how]
    if along <= 0: return False
    return True if along >= 1 and along > abs(across) else None


def meant(scene, phrase):  # the objects that a phrase with "a" or "the" can mean
    words = re.sub("^(a|the) ", "", phrase)
    if found := re.fullmatch(r"shape in the (.+)", words): return [thing for thing in scene.objects if where(thing) == found[1]]
    if found := re.fullmatch(r"(\w+) on the (left|right)", words):
        alike = [thing for thing in scene.objects if thing.shape == found[1]]
        assert len(alike) > 1, phrase
        end = (min if found[2] == "left" else max)(middle(thing)[0] for thing in alike)
        return [thing for thing in alike if abs(middle(thing)[0] - end) < 1]
    if found := re.fullmatch(r"(.+) in the (.+)", words): return [thing for thing in meant(scene, found[1]) if where(thing) == found[2]]
    return [thing for thing in scene.objects
            if all(word in (thing.size, thing.colour, thing.shape) or word in ("object", "shape") for word in words.split())]


def holds(scene, caption):  # True, False, or None where the picture does not decide
    if found := re.fullmatch(r"(.+) on a (?:(\w+) )?(\w+) background", caption):
        tone_or_texture = found[3] in (scene.tone, scene.texture)
        return bool(holds(scene, found[1]) and tone_or_texture and found[2] in (None, scene.texture))
    if found := re.fullmatch(r"(a \w+ \w+) (left of|right of|above|below) (a \w+ \w+)(?:, elsewhere (.+))?", caption):
        (a,), (b,) = meant(scene, found[1]), meant(scene, found[3])
        rest = re.split(", | and ", found[4]) if found[4] else []
        others = [thing for phrase in rest for thing in meant(scene, phrase)]
        assert len(others) == len(set(others)) and not {a, b} & set(others)
        return side_of(found[2], a, b)
    named = [meant(scene, phrase) for phrase in re.split(", | and ", caption)]
    return all(len(found) == 1 for found in named) and len({found[0] for found in named}) == len(named)


def answer(scene, question):
    def the(phrase):
        (thing,) = meant(scene, phrase)
        return thing
    if found := re.fullmatch(r"what colour is (.+)\?", question): return the(found[1]).colour
    if found := re.fullmatch(r"what shape is in (.+)\?", question): return the(f"the shape in {found[1]}").shape
    if found := re.fullmatch(r"what shape is (.+)\?", question): return the(found[1]).shape
    if found := re.fullmatch(r"how many (\w+?)(es|s) are there\?", question):
        shape = next(shape for shape in shapes.SHAPES if f"{shape}{'es' if shape == 'cross' else 's'}" == found[1] + found[2])
        return next(word for word, number in NUMBERS.items() if number == len(meant(scene, f"a {shape}")))
    if found := re.fullmatch(r"is there (.+)\?", question): return "yes" if meant(scene, found[1]) else "no"
    if found := re.fullmatch(r"is (.+) larger than (.+)\?", question):
        a, b = the(found[1]), the(found[2])
        assert a.size != b.size
        return "yes" if a.size == "large" else "no"
    found = re.fullmatch(r"what is (left of|right of|above|below) (.+)\?", question)
    b = the(found[2])
    (a,) = [thing for thing in scene.objects if thing is not b and side_of(found[1], thing, b) is not False]  # nothing else even partly
    assert side_of(found[1], a, b)
    return f"a {a.colour} {a.shape}"


def follows(before, text, after):  # whether `after` is what the instruction makes of `before`
    old, new = set(before.objects), set(after.objects)
    gone, came = old - new, new - old
    if (before.tone, before.texture) != (after.tone, after.texture): return False
    one = lambda phrase: meant(before, phrase)
    facts = lambda thing, *names: tuple(getattr(thing, name) for name in names)
    if found := re.fullmatch(r"make (the \w+ \w+) (\w+)", text):
        (thing,), (changed,) = gone, came
        return one(found[1]) == [thing] and changed.colour == found[2] != thing.colour and \
            facts(thing, "shape", "size", "row", "column") == facts(changed, "shape", "size", "row", "column")
    if found := re.fullmatch(r"move (the \w+ \w+) to the (.+)", text):
        (thing,), (changed,) = gone, came
        return one(found[1]) == [thing] and where(changed) == found[2] != where(thing) and \
            facts(thing, "shape", "size", "colour") == facts(changed, "shape", "size", "colour")
    if found := re.fullmatch(r"swap (the \w+ \w+) and (the \w+ \w+)", text):
        (a,), (b,) = one(found[1]), one(found[2])
        (a_now,), (b_now,) = meant(after, found[1]), meant(after, found[2])
        return {a, b} == gone and {a_now, b_now} == came and a.size == a_now.size and b.size == b_now.size and \
            middle(a) == middle(b_now) and middle(b) == middle(a_now)
    if found := re.fullmatch(r"add (a \w+ \w+ \w+ in the .+)", text): return not gone and meant(after, found[1]) == list(came) and len(came) == 1
    found = re.fullmatch(r"remove (the \w+ \w+)", text)
    return not came and one(found[1]) == list(gone) and len(gone) == 1


# ---- scenes

@pytest.mark.parametrize("scene", SCENES[::40], ids=str)
def test_the_painting_shows_the_objects_and_nothing_else(scene):
    for size in (32, 48):
        image, cell = shapes.render(scene, size).permute(1, 2, 0).numpy().astype(int), size // 4
        bare = shapes.background(scene.tone, scene.texture, size).astype(np.uint8)
        covered = np.zeros((size, size), dtype=bool)
        for thing in scene.objects:
            side = cell * {"small": 1, "large": 2}[thing.size]
            box = slice(thing.row * cell, thing.row * cell + side), slice(thing.column * cell, thing.column * cell + side)
            assert not covered[box].any(), "two objects overlap"
            covered[box] = True
            far = lambda colour: np.abs(image[box] - colour).sum(-1)
            painted = far(shapes.COLOURS[thing.colour]) < far(bare[box].astype(int))  # the arms of a small cross cover no pixel wholly
            assert painted.mean() > 0.2 and (far(shapes.COLOURS[thing.colour]) == 0).mean() < 0.97 and painted[side // 2, side // 2]
            assert min(shapes.COLOURS, key=lambda name: far(shapes.COLOURS[name])[side // 2, side // 2]) == thing.colour
        assert (image[~covered] == bare[~covered]).all()


def test_shapes_and_colours_can_be_told_apart():
    pictures = {name: shapes.render(Scene((Object(name.split()[1], name.split()[0], "small", 1, 2),)), 32) for name in shapes.NAMES}
    names = list(pictures)
    far = [(pictures[a].float() - pictures[b].float()).abs().sum(0).max() for i, a in enumerate(names) for b in names[:i]]
    assert min(far) > 80


def test_scenes_are_a_function_of_seed_split_and_index():
    assert [shapes.scene_at(index, 11) for index in range(N)] == TRAIN
    assert len(set(TRAIN) | set(TEST)) > 1.95 * N  # one object may be drawn twice
    assert shapes.scene_at(0, 11) != shapes.scene_at(0, 12)
    assert torch.equal(shapes.render(TRAIN[0]), shapes.render(TRAIN[0]))


def test_scenes_vary():
    assert Counter(len(scene.objects) for scene in TRAIN).keys() == {1, 2, 3, 4}
    things = [thing for scene in TEST for thing in scene.objects]
    assert {thing.name for thing in things} == set(shapes.FAMILIAR)
    assert len({(thing.row, thing.column, thing.size) for thing in things}) == 16 + 9
    for count in (1, 2, 3, 4): assert len(shapes.scene_at(0, count=count).objects) == count


def test_the_splits_never_meet():
    content = lambda scene: (frozenset(scene.objects), scene.tone, scene.texture)
    train = [shapes.scene_at(index, seed) for seed in (0, 1) for index in range(1000)]
    test, unseen = ([shapes.scene_at(index, seed, split) for seed in (0, 1) for index in range(1000)] for split in ("test", "unseen"))
    rng = random.Random(0)
    for scenes in (train, test, unseen):
        edited = [shapes.edit(scene, kind, rng) for scene in scenes for kind in shapes.EDITS]
        assert sum(map(bool, edited)) > len(scenes)
        scenes += [found[0] for found in edited if found]
    for one, other in itertools.combinations((train, test, unseen), 2): assert not {content(scene) for scene in one} & {content(scene) for scene in other}
    assert not [thing for scene in train + test for thing in scene.objects if thing.name in HELD_OUT_NAMES]
    assert all(any(thing.name in HELD_OUT_NAMES for thing in scene.objects) for scene in unseen)
    reordered = Scene(TRAIN[3].objects[::-1], TRAIN[3].tone, TRAIN[3].texture)
    assert shapes.split_of(reordered) == "train"


def mirrored(scene): return replace(scene, objects=tuple(replace(thing, column=shapes.GRID - shapes.SIZES[thing.size] - thing.column) for thing in scene.objects))


def quarter_turn(scene): return replace(scene, objects=tuple(replace(thing, row=thing.column, column=shapes.GRID - shapes.SIZES[thing.size] - thing.row) for thing in scene.objects))


def test_a_scene_stays_in_its_split_however_it_is_turned_and_mirrored():
    for scene in TRAIN[:200] + TEST[:200]:
        views = [scene, mirrored(scene)]
        for _ in range(3): views += map(quarter_turn, views[-2:])
        assert len(views) == 8 and {*map(shapes.split_of, views)} == {shapes.split_of(scene)}
        assert quarter_turn(views[-2]) == scene == mirrored(mirrored(scene))
    lone = [Scene((shapes.Object(*reversed(name.split()), "small", row, column),)) for name in shapes.FAMILIAR for row in range(4) for column in range(4)]
    assert {shapes.split_of(scene) for scene in lone} == {"train", "test"}  # other scenes still part


def test_training_never_names_a_held_out_combination():
    rng, words = random.Random(0), set()
    for scene in TRAIN:
        for groups in shapes.scene_pairs(scene, rng).values():
            words |= {item.text for group in groups for pair in group for item in (pair.left, pair.right) if item.text}
    assert len(words) > 1000
    assert not [text for text in words for name in HELD_OUT_NAMES if name in text]


# ---- sentences

@pytest.mark.parametrize("scenes", (TRAIN, TEST), ids=("train", "test"))
def test_captions_are_true(scenes):
    rng, kinds = random.Random(0), Counter()
    for scene in scenes:
        for caption in shapes.captions(scene, rng):
            assert holds(scene, caption) is True, (scene, caption)
            for word in ("left of", "right of", "above", "below", "elsewhere", "background", " in the "): kinds[word] += word in caption
    assert min(kinds.values()) > 20


@pytest.mark.parametrize("scenes", (TRAIN, TEST), ids=("train", "test"))
def test_answers_are_right_and_the_only_ones(scenes):
    rng, kinds, answers = random.Random(1), Counter(), Counter()
    for scene in scenes:
        asked = shapes.questions(scene, rng)
        assert len({question for _, question, _ in asked}) == len(asked)
        for kind, question, given in asked:
            assert answer(scene, question) == given, (scene, question, given)
            assert given in shapes.ANSWERS[kind]
            kinds[kind] += 1
            answers[kind, given] += 1
    assert kinds.keys() == shapes.ANSWERS.keys() and min(kinds.values()) > N / 4
    for kind in ("is there", "comparison"): assert 0.38 < answers[kind, "yes"] / kinds[kind] < 0.62


def test_referring_phrases_mean_one_object():
    kinds = Counter()
    for scene in SCENES:
        for thing in scene.objects:
            for phrase in shapes.phrases(scene, thing):
                assert meant(scene, phrase) == [thing], (scene, thing, phrase)
                kinds["on the left" if phrase.endswith("on the left") else "on the right" if phrase.endswith("on the right")
                      else "place" if "shape in the" in phrase else len(phrase.split())] += 1
    assert kinds.keys() == {"on the left", "on the right", "place", 2, 3} and min(kinds.values()) > 20


def test_a_place_shared_by_two_objects_is_neither_asked_about_nor_pointed_at():
    apart = Scene((Object("circle", "red", "small", 0, 0), Object("circle", "blue", "small", 2, 2)))
    shared = Scene((Object("circle", "red", "small", 1, 1), Object("circle", "blue", "small", 2, 2)))
    asked = [[question for _, question, _ in shapes.questions(scene, random.Random(0))] for scene in (apart, shared)]
    assert "what colour is the shape in the center?" in asked[0]
    assert not [question for question in asked[1] if "in the center" in question]
    assert "the shape in the center" in shapes.phrases(apart, apart.objects[1])
    assert not [phrase for thing in shared.objects for phrase in shapes.phrases(shared, thing) if "in the center" in phrase]


def test_a_neighbour_on_the_diagonal_keeps_a_relation_from_being_asked():
    one, other = Object("circle", "red", "small", 3, 0), Object("square", "blue", "small", 3, 2)
    diagonal = Object("cross", "cyan", "small", 1, 0)
    asked = lambda scene: {question for seed in range(30) for kind, question, _ in shapes.questions(scene, random.Random(seed)) if kind == "relation"}
    assert asked(Scene((one, other))) == {"what is left of the blue square?", "what is right of the red circle?"}
    assert not asked(Scene((one, other, diagonal))) & {"what is left of the blue square?"}


@pytest.mark.parametrize("kind", shapes.EDITS)
def test_edits_do_what_they_say_and_inverses_lead_back(kind):
    rng, done = random.Random(2), 0
    for scene in SCENES:
        if not (found := shapes.edit(scene, kind, rng)): continue
        edited, text, inverse = found
        assert follows(scene, text, edited), (scene, text, edited)
        assert follows(edited, inverse, scene), (edited, inverse, scene)
        assert not torch.equal(shapes.render(scene), shapes.render(edited))
        assert shapes.split_of(edited) == shapes.split_of(scene)
        done += 1
    assert done > N / 4


def test_the_second_reading_of_instructions_can_say_no():
    rng = random.Random(3)
    for scene in SCENES[:100]:
        for edited, text, inverse in filter(None, (shapes.edit(scene, kind, rng) for kind in shapes.EDITS)):
            wrong_tone = Scene(edited.objects, next(tone for tone in shapes.TONES if tone != edited.tone), edited.texture)
            assert not follows(scene, text, wrong_tone)
            if text != inverse: assert not follows(edited, text, scene)


def test_false_captions_are_false_and_their_true_ones_true():
    rng, kinds = random.Random(4), Counter()
    for scene in SCENES:
        for kind, true, false in shapes.false_captions(scene, rng):
            assert holds(scene, true) is True, (scene, kind, true)
            assert holds(scene, false) is False, (scene, kind, false)
            kinds[kind] += 1
    assert kinds.keys() == {f"{how}-{what}" for how, what in (("replace", "object"), ("replace", "attribute"), ("replace", "relation"),
                            ("swap", "object"), ("swap", "attribute"), ("add", "object"), ("add", "attribute"))}
    assert min(kinds.values()) > N / 2


# ---- pairs

def test_scene_pairs_hold_what_they_promise():
    rng = random.Random(5)
    for scene in SCENES[::4]:
        image, groups = shapes.render(scene), shapes.scene_pairs(scene, rng)
        assert list(groups) == ["caption", "vqa", "region", "edit"]
        for group in groups["caption"]:
            (pair,) = group
            assert torch.equal(pair.left.image, image) and holds(scene, pair.right.text)
        for pair in groups["vqa"][0]: assert answer(scene, pair.left.text) == pair.right.text
        for thing, pair in zip(scene.objects, groups["region"][0], strict=True):
            assert meant(scene, pair.left.text) == [thing]
            assert torch.equal(pair.right.image, shapes.region(image, thing))
        for there, back in groups["edit"]:
            assert there.left.image is back.right.image and there.right.image is back.left.image


def test_a_region_is_the_objects_box():
    thing = Object("square", "blue", "large", 1, 2)
    image = shapes.render(Scene((thing,)), 32)
    inside = shapes.region(image, thing)
    assert inside.shape == (3, 32, 32) and (inside[:, 8:24, 8:24].permute(1, 2, 0) == torch.tensor(shapes.COLOURS["blue"])).all()


# ---- wrong use

@pytest.mark.parametrize("wrong, message", (
    (lambda: Object("hexagon", "red", "small", 0, 0), "'hexagon'.*circle"),
    (lambda: Object("circle", "pink", "small", 0, 0), "'pink'.*red"),
    (lambda: Object("circle", "red", "large", 3, 0), "does not fit"),
    (lambda: Scene(()), "one to four"),
    (lambda: Scene((Object("circle", "red", "small", 0, 0),), tone="mauve"), "mauve"),
    (lambda: Scene((Object("circle", "red", "small", 0, 0), Object("circle", "red", "small", 1, 0))), "share a name"),
    (lambda: Scene((Object("circle", "red", "large", 0, 0), Object("circle", "blue", "small", 1, 1))), "overlap"),
    (lambda: shapes.render(TRAIN[0], 33), "33 is not a multiple of 4"),
    (lambda: shapes.render(TRAIN[0], 0), "try 4"),
    (lambda: shapes.sample_scene(random.Random(0), "valid"), "'valid'"),
    (lambda: shapes.sample_scene(random.Random(0), count=5), "not 5"),
    (lambda: shapes.edit(TRAIN[0], "paint", random.Random(0)), "'paint'.*recolour"),
))
def test_wrong_use_is_named(wrong, message):
    with pytest.raises(ValueError, match=message): wrong()
