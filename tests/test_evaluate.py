"Queries that have one right answer, and the sums that are made of the answers."
import math
import random

import pytest
import torch
import torch.nn.functional as F

from fuselip_edu import evaluate as e
from fuselip_edu import shapes
from fuselip_edu.pairs import Item, Query


@pytest.fixture(scope="module")
def tasks(): return e.shapes_tasks(20)


def same(one, other):
    if isinstance(one, tuple): return len(one) == len(other) and all(map(same, one, other))
    alike = one.image is other.image if one.image is None or other.image is None else torch.equal(one.image, other.image)
    return alike and one.text == other.text


# ---- what is asked

def test_one_seed_gives_one_set_of_queries_and_every_task_by_itself_the_same(tasks):
    for name, queries in tasks.items():
        again = e.shapes_tasks(20, names=(name,))[name]
        assert len(again) == len(queries) and all(same(a.item, b.item) and len(a.candidates) == len(b.candidates) and all(map(same, a.candidates, b.candidates)) for a, b in zip(queries, again)), name
    assert not all(same(a.item, b.item) for a, b in zip(tasks["vqa"], e.shapes_tasks(20, seed=1, names=("vqa",))["vqa"]))
    with pytest.raises(ValueError, match="19 test scenes are too few"): e.shapes_tasks(19)


@pytest.mark.parametrize("name", e._TASKS)
def test_no_candidate_is_the_right_one_once_more(name, tasks):
    assert len(tasks[name]) >= 10
    for query in tasks[name]:
        assert len(query.candidates) > 1 and not any(same(query.candidates[0], other) for other in query.candidates[1:])


@pytest.mark.parametrize("name", ["grounding", "region_crop", "object_crop"])
def test_of_the_crops_one_shows_what_is_asked_for(name, monkeypatch):
    shown, region = [], shapes.region

    def remembered(image, thing):
        shown.append((region(image, thing), thing.name))
        return shown[-1][0]

    monkeypatch.setattr(shapes, "region", remembered)
    queries = e.shapes_tasks(30, names=(name,))[name]
    named = {id(picture): thing for picture, thing in shown}
    for query in queries:
        names = [named[id(candidate.image)] for candidate in query.candidates]
        assert names.count(names[0]) == 1
        if name != "region_crop": assert names[0].endswith(query.item.text.removeprefix("the "))


def test_no_other_candidate_of_retrieval_is_true():
    scenes = [shapes.scene_at(i, 0, "test") for i in range(60)]
    names, images = [{thing.name for thing in scene.objects} for scene in scenes], [shapes.render(scene) for scene in scenes]
    said = lambda text: {part.removeprefix("a ") for part in text.replace(" and ", ", ").split(", ")}
    pictured = lambda picture: next(name for name, image in zip(names, images) if torch.equal(image, picture))
    queries = e.shapes_tasks(60, names=("retrieval",))["retrieval"]
    for query in queries:
        pairs = [(said(other.text), pictured(query.item.image)) if query.kind == "image to text" else (said(query.item.text), pictured(other.image)) for other in query.candidates]
        assert [wanted <= there for wanted, there in pairs] == [True] + [False] * (len(pairs) - 1)
    assert any(a < b for a in names for b in names)  # such captions exist


def test_strangers_of_a_position_have_another_name(monkeypatch):
    shown, region = {}, shapes.region

    def remembered(image, thing):
        picture = region(image, thing)
        shown[id(picture)] = picture, thing.name
        return picture

    monkeypatch.setattr(shapes, "region", remembered)
    for query in e.shapes_tasks(60, names=("position",))["position"]:
        names = [shown[id(candidate.image)][1] for candidate in query.candidates]
        assert len(names) == 4 and names.count(names[0]) == 1


def test_a_shade_less_than_a_level_apart_is_the_same_and_a_small_shape_is_not():
    image = shapes.render(shapes.scene_at(0))
    darker, spot = (image.int() - 1).clamp(min=0).to(torch.uint8), image.clone()
    spot[:, :6, :6] = 255 - spot[:, :6, :6]
    darker[0, 0, 0] = image[0, 0, 0]  # less than one level on average
    query = lambda *others: e._query(None, Item(text="?"), Item(image), [Item(other) for other in others])
    assert query(darker) == [] and len(query(darker, spot)[0].candidates) == 2


def test_queries_say_which_scene_they_are_about(tasks):
    for name, queries in tasks.items(): assert all(isinstance(query.about, shapes.Scene) for query in queries), name
    assert len({query.about for query in tasks["tgit"]}) == 20 < len(tasks["tgit"])
    for query in tasks["vqa"]: assert torch.equal(query.item.image, shapes.render(query.about))


def test_questions_have_the_answer_that_the_scene_gives(tasks):
    answers = {question: answer for i in range(20) for _, question, answer in shapes.questions(shapes.scene_at(i, 0, "test"), random.Random("0/vqa"))}
    assert len(answers) > 20
    for query in tasks["vqa"]: assert query.candidates[0].text in shapes.ANSWERS[query.kind] and {item.text for item in query.candidates} == set(shapes.ANSWERS[query.kind])


# ---- what is made of the answers

@pytest.mark.parametrize("accuracy,n", [(0.0, 10), (1.0, 10), (0.5, 40), (0.9, 300)])
def test_wilsons_interval_solves_its_equation(accuracy, n):
    for bound in e.wilson(accuracy, n):  # the shares from which the accuracy is 1.96 standard errors away
        assert abs(accuracy - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / n), abs=1e-7)


def test_accuracy_is_the_mean_over_kinds_however_many_each_has():
    item = Item(text="x")
    queries = [Query(item, (item, Item(text="y")), "a")] * 30 + [Query(item, (item, Item(text="y"), Item(text="z"), Item(text="w")), "b")] * 10
    right = torch.tensor([True] * 15 + [False] * 15 + [True] * 10)
    found = e.summarise(right, queries)
    assert found["accuracy"] == 0.75 and found["chance"] == (0.5 + 0.25) / 2 and found["n"] == 40
    assert {kind: (row["accuracy"], row["n"]) for kind, row in found["kinds"].items()} == {"a": (0.5, 30), "b": (1.0, 10)}
    (low, high), a, b = found["ci95"], e.wilson(0.5, 30), e.wilson(1.0, 10)
    assert low == pytest.approx(0.75 - math.hypot(a[0] - 0.5, b[0] - 1.0) / 2) and high == pytest.approx(0.75 + math.hypot(a[1] - 0.5, b[1] - 1.0) / 2)
    assert "kinds" not in e.summarise(right[:30], queries[:30])


def test_ranks_of_the_right_ones_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    candidates = F.normalize(torch.randn(40, 6, generator=generator), dim=1)
    candidates[7] = candidates[3]  # a tie
    queries, labels = candidates[torch.arange(30)], torch.arange(30) % 9
    owners = torch.arange(40) % 9
    found = e.ranks_of_right(queries, candidates, labels, owners, block=7)
    for i in range(30):
        scores = [float(queries[i] @ candidates[int((candidates == candidates[j]).all(1).nonzero()[0])]) for j in range(40)]
        best = max(score for score, owner in zip(scores, owners) if owner == labels[i])
        assert found[i] == sum(score >= best for score, owner in zip(scores, owners) if owner != labels[i])
    assert (e.ranks_of_right(queries[:1], candidates, torch.tensor([99]), owners) == 40).all()  # nothing is right for it
    assert e.recall_at(torch.tensor([0, 1, 4, 5]), 1) == 0.25 and e.recall_at(torch.tensor([0, 1, 4, 5]), 5) == 0.75


class Told:
    "A model whose vectors are what it is told."
    def __init__(self, **vectors): self.vectors, self.asked = vectors, []

    def embed_items(self, items, batch_size=256):
        self.asked += [item.text for item in items]
        return torch.stack([F.normalize(torch.tensor(self.vectors[item.text], dtype=torch.float32), dim=0) for item in items])


def test_prompts_count_as_the_direction_of_their_mean_and_a_tie_is_a_mistake():
    model, (a, b, c, d) = Told(a=(1, 0), b=(0, 1), c=(1, 1), d=(1, 1)), [Item(text=text) for text in "abcd"]
    queries = [Query(c, ((a, b), a)), Query(c, (d, c)), Query(a, (c, b)), Query(a, (b, c))]
    assert e.rank_queries(model, queries).tolist() == [True, False, True, False]
    assert sorted(model.asked) == ["a", "b", "c", "d"]  # each once
    assert [round(float(score), 4) for score in e.score_queries(model, queries)[0]] == [1.0, round(math.sqrt(0.5), 4)]


def test_tasks_that_are_unknown_or_empty_are_named():
    with pytest.raises(ValueError, match="unknown task 'colour'; the tasks are classification, vqa, .*unseen"): e.shapes_tasks(20, names=("vqa", "colour"))
    with pytest.raises(ValueError, match="there is no task to evaluate; give"): e.evaluate(Told(), {})
    with pytest.raises(ValueError, match="the task 'b' has no query; leave it out"): e.evaluate(Told(), {"a": [Query(Item(text="x"), (Item(text="y"), Item(text="z")))], "b": []})


def test_the_table_has_the_papers_columns():
    row = {"accuracy": 0.5, "ci95": [0.4, 0.6], "chance": 0.25, "n": 7}
    assert e.results_table({"object_crop": row, "unseen": row}).splitlines()[2:] == ["| object crop | OI-Crop | 50.0 | 40.0 – 60.0 | 25.0 | 7 |", "| unseen |  | 50.0 | 40.0 – 60.0 | 25.0 | 7 |"]


def test_rankings_are_drawn_with_the_right_one_in_green(tasks):
    queries = [tasks["position"][0], tasks["retrieval"][0], tasks["zero_shot"][0]]
    scores = [torch.arange(len(query.candidates), 0, -1.0) for query in queries]
    figure = e.show_rankings(queries, scores, best=3)
    titles = [[axis.get_title() for axis in figure.axes[row * 4:row * 4 + 4]] for row in range(3)]
    assert all(row[1].endswith("right") and not any("right" in title for title in row[2:]) for row in titles)
    figure = e.show_rankings(queries, [-score for score in scores], best=3)  # the right one is the worst of all
    last = [figure.axes[row * 4 + 3].get_title() for row in range(3)]
    assert [title.split("  ")[1] for title in last] == ["right" if len(query.candidates) <= 3 else f"right, no. {len(query.candidates)}" for query in queries]


def test_what_is_no_number_ranks_last_and_is_told():
    queries, labels = torch.eye(3), torch.arange(3)
    assert e.ranks_of_right(queries, torch.full((3, 3), float("nan")), labels, labels).min() > 0
    broken = torch.eye(3)
    broken[1] = float("nan")
    assert e.ranks_of_right(queries, broken, labels, labels)[1] > 0

    class Broken:
        def embed_items(self, items, batch_size): return torch.full((len(items), 4), float("nan"))

    with pytest.raises(ValueError, match="3 of 3 embeddings are not finite"): e.rank_queries(Broken(), [Query(Item(text="a"), (Item(text="b"), Item(text="c")))])


def test_an_interval_stays_a_share(): assert all(0 <= e.wilson(0.0, n)[0] and e.wilson(1.0, n)[1] <= 1 for n in range(1, 2000))
