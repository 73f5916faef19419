"The comparison of models: equal data, answers that survive an interruption, differences against every flip, fusion blocked, and what the committed run shows."
import dataclasses
import functools
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fuselip_edu import reproduce as r
from fuselip_edu.baselines import BASELINE_PRESETS, load_model
from fuselip_edu.cli import main
from fuselip_edu.evaluate import shapes_tasks
from fuselip_edu.pairs import Item, Query
from fuselip_edu.shapes import render, scene_at
from fuselip_edu.titok import TOKENIZER_PRESETS, TiTok
from fuselip_edu.train import PRESETS, tokenizer_place

NAMES = ("position", "tgit", "classification")
PAPERS = ("fuselip", "sf", "mlf")


def small(model, seed=0, **changes):
    config = r.trial_config(model, seed)
    config.scenes, config.train = 60, dataclasses.replace(config.train, steps=12, device="cpu", warmup_steps=2, checkpoint_every=4, **changes)
    return config


def ask(): return shapes_tasks(20, 0, 32, NAMES)


def probe(): return shapes_tasks(20, 0, 32, ("position",))


@pytest.fixture(scope="module")
def tasks(): return ask()


@pytest.fixture(scope="module")
def probes(tasks): return probe()


@pytest.fixture(scope="module")
def built(): return {name: r.build_model(small(name)) for name in PAPERS}


# ---- trials

def test_models_of_one_seed_learn_from_the_same_pairs_in_the_same_order(built):
    (fuselip, codes), (sf, pixels), (mlf, others) = built.values()
    assert codes.groups == pixels.groups == others.groups
    batches = [next(iter(pairs.batches([[list(range(40))]]))) for pairs in (codes, pixels, others)]
    assert torch.equal(batches[1]["ids"], batches[2]["ids"]) and torch.equal(batches[1]["pixels"], batches[2]["pixels"])
    words = lambda model, batch: [[i for i in ids[:length].tolist() if i < model.vocab.first_code and i not in (model.vocab.sot, model.vocab.eot)]
                                  for ids, length in zip(batch["ids"], batch["lengths"])]
    assert words(fuselip, batches[0]) == words(sf, batches[1]) and sum(map(bool, words(sf, batches[1]))) > 40
    shown = fuselip.image_tokenizer.encode(batches[1]["pixels"][batches[1]["has_image"]])
    rows = [ids[:16] for ids, image in zip(batches[0]["ids"], batches[1]["has_image"]) if image]
    assert torch.equal(torch.stack(rows) - fuselip.vocab.first_code, shown)


def test_a_seed_reaches_every_model():
    assert [r.trial_config(name, 7).train.seed for name in PAPERS] == [7, 7, 7]
    assert len({r.trial_config(name, 7).train.steps for name in PAPERS}) == 1


@pytest.mark.parametrize("size", [name for name, config in PRESETS.items() if f"{name}-sf" in BASELINE_PRESETS])
def test_models_of_one_size_have_as_many_parameters(size, tmp_path):
    counts = []
    TiTok(TOKENIZER_PRESETS[size]).save_pretrained(tmp_path)
    for name in PAPERS:
        config = r.trial_config(name, 0, r.Comparison(size))
        config.scenes = 20
        config.train.batch_size = 32
        if name == "fuselip": config.tokenizer = str(tmp_path)
        counts.append(sum(p.numel() for p in r.build_model(config)[0].parameters() if p.requires_grad))
    assert max(counts) / counts[0] < 1.05 and min(counts) / counts[0] > 0.95


def test_an_interrupted_trial_ends_as_if_it_had_not_been(tasks, probes, tmp_path, monkeypatch):
    whole = r.run_trial(small("fuselip"), tmp_path / "whole", tasks, probes, points=3)
    plain = r.Curve.__call__

    def broken(self, step, model):
        plain(self, step, model)
        if step >= 8: raise KeyboardInterrupt
    config = small("fuselip", log_every=4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(r.Curve, "__call__", broken)
        r.run_trial(config, tmp_path / "cut", tasks, probes, points=3)
    assert not (tmp_path / "cut" / "trial.json").exists()
    resumed = r.run_trial(config, tmp_path / "cut", tasks, probes, points=3)
    assert resumed["answers"] == whole["answers"] and [row["step"] for row in resumed["curve"]] == [4, 8, 12]
    again = r.run_trial(config, tmp_path / "cut", tasks, probes)
    assert again == json.loads(json.dumps(resumed))
    assert [row["pairs"] for row in again["curve"]] == [4 * 128, 8 * 128, 12 * 128] and again["pairs"] == 12 * 128
    assert {"position", "seconds"} <= again["curve"][0].keys()
    assert {name: len(text) for name, text in again["answers"].items()} == {name: len(queries) for name, queries in tasks.items()}


@pytest.mark.parametrize("change", [{"lr": 1e-3}, {"seed": 1}])
def test_a_trial_of_another_configuration_is_not_overwritten(change, tasks, tmp_path):
    (tmp_path / "trial.json").write_text(json.dumps({"config": dataclasses.asdict(small("sf")), "asked": r.fingerprint(tasks)}))
    with pytest.raises(ValueError, match="another configuration.*--run"): r.run_trial(small("sf", **change), tmp_path, tasks, {})
    with pytest.raises(ValueError, match="another configuration"): r.run_trial(small("sf"), tmp_path, shapes_tasks(20, 0, 32, ("tgit",)), {})


def test_an_interrupted_trial_goes_on_as_what_it_is_or_not_at_all(tasks, tmp_path, monkeypatch):
    def broken(self, step, model): raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(r.Curve, "__call__", broken)
        r.run_trial(small("sf", log_every=4), tmp_path, tasks, {})
    assert (tmp_path / "checkpoints").is_dir() or (tmp_path / "metrics.jsonl").exists()
    for other in (small("sf", log_every=4, lr=1e-5), small("sf", log_every=4, weight_decay=0.3)):
        with pytest.raises(ValueError, match="another configuration.*--run"): r.run_trial(other, tmp_path, tasks, {})


def test_a_comparison_that_was_killed_before_its_first_trial_ended_goes_on(tmp_path):
    asked = r.Comparison(run=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt), r._counted(tmp_path / "run" / "minutes.json"):
        (tmp_path / "run" / "sf" / "seed-0" / "checkpoints").mkdir(parents=True)
        assert (tmp_path / "run" / "minutes.json").exists()  # already now, since a kill asks nobody
        raise KeyboardInterrupt
    r._check(asked)
    (tmp_path / "run" / "minutes.json").unlink()
    with pytest.raises(ValueError, match="holds no comparison"): r._check(asked)


def test_a_point_of_a_curve_that_is_asked_again_takes_the_place_of_the_old_one(built, tmp_path):
    curve = r.Curve(tmp_path, small("sf", log_every=4).train, 3, {})
    for step in (4, 8, 12, 8, 12): curve(step, built["sf"][0])
    assert [row["step"] for row in curve.rows] == [4, 8, 12]


def test_the_clock_of_a_curve_goes_on_from_the_checkpoint(tmp_path):
    row = lambda step, seconds, asking: json.dumps({"step": step, "pairs": step, "seconds": seconds, "asking": asking}) + "\n"
    (tmp_path / "curve.jsonl").write_text(row(4, 100.0, 10.0) + row(8, 200.0, 20.0) + row(12, 1000.0, 30.0))
    (tmp_path / "speed.json").write_text(json.dumps({"step": 10, "seconds_in_all": 270.0}))
    curve = r.Curve(tmp_path, small("sf").train, 3, {})
    assert [row["step"] for row in curve.rows] == [4, 8] and curve.seconds() == pytest.approx(250.0, abs=2)  # step 12 will be done again
    (tmp_path / "speed.json").unlink()
    assert not r.Curve(tmp_path, small("sf").train, 3, {}).rows  # nor is anything left of a run without a checkpoint


def hold(path): # for five minutes
    path.write_text(str(os.getpid()))
    time.sleep(300)


@pytest.mark.skipif(os.name == "nt", reason="looks at processes as they are on Linux and macOS")
def test_trainings_end_with_the_command_that_began_them(tmp_path):
    "Or they would go on writing while its next attempt writes to the same folder."
    path = tmp_path / "pid"
    code = f"import sys, functools, pathlib; sys.path.insert(0, {os.path.dirname(__file__)!r})\nif __name__ == '__main__':\n    import test_reproduce as t\n    t.r.side_by_side({{'held': functools.partial(t.hold, pathlib.Path({str(path)!r}))}}, 1, print)"
    (tmp_path / "main.py").write_text(code)
    process = subprocess.Popen([sys.executable, tmp_path / "main.py"])
    try:
        for _ in range(1800):
            if path.exists() and path.read_text() or process.poll() is not None: break
            time.sleep(0.1)
        pid = int(path.read_text())
    finally:
        process.kill()
        process.wait()
    for _ in range(100):
        try: os.kill(pid, 0)
        except ProcessLookupError: return
        state = Path(f"/proc/{pid}/stat")
        if state.exists() and "Z" in state.read_text().rpartition(")")[2][:3]: return  # ended, and nobody has asked for its status
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("the training outlived its command")


def test_trials_side_by_side_are_trials_one_by_one(tmp_path):
    trials = lambda folder: {name: (small(name), tmp_path / folder / name) for name in ("sf", "mlf")}
    alone, together = r.run_trials(trials("a"), ask, probe, processes=1), r.run_trials(trials("b"), ask, probe, processes=2)
    for name in alone: assert alone[name]["answers"] == together[name]["answers"]
    assert list(alone) == ["sf", "mlf"]


def fail(): raise FloatingPointError("the loss became nan")


def stop(results): raise KeyboardInterrupt


@pytest.mark.parametrize("prepare, watch, error", [({"sf": fail}, None, FloatingPointError), ({}, stop, KeyboardInterrupt)])
def test_after_an_error_or_an_interruption_no_other_trial_is_begun(prepare, watch, error, tmp_path):
    trials = {name: (small("sf", seed), tmp_path / name) for seed, name in enumerate(("sf", "second", "third"))}
    with pytest.raises(error): r.run_trials(trials, ask, dict, 1, prepare, watch)
    assert [path.name for path in tmp_path.iterdir()] == ["sf"]


def write(path, seconds=0.0):
    time.sleep(seconds)
    path.write_text(str(seconds))
    return path.name


def test_calls_that_run_come_to_their_end_and_are_waited_for(tmp_path, capsys):
    calls = {"quick": functools.partial(write, tmp_path / "quick"), "slow": functools.partial(write, tmp_path / "slow", 6.0), "never": functools.partial(write, tmp_path / "never")}
    with pytest.raises(KeyboardInterrupt): r.side_by_side(calls, 2, lambda name, result: stop({name: result}))
    assert {path.name for path in tmp_path.iterdir()} == {"quick", "slow"}
    assert "stopped by KeyboardInterrupt; waiting for slow to end" in capsys.readouterr().err
    found = {}
    del calls["slow"]
    r.side_by_side(calls, 1, found.__setitem__)
    assert found == {"quick": "quick", "never": "never"}


@pytest.mark.parametrize("text, step", [(None, 0), ("", 0), ('{"step": 1', 0), ('{"step": 10}\n{"step": 20}\n', 20), ('{"step": 10}\n{"st', 10), ('{"step": 10}\n{"step": 2', 10)])
def test_the_step_of_a_trial_is_that_of_its_last_whole_line(text, step, tmp_path):
    if text is not None: (tmp_path / "metrics.jsonl").write_text(text)
    assert r._last_step(tmp_path) == step
    if text is not None: assert (tmp_path / "metrics.jsonl").read_text() == text  # the trial itself writes there


def test_what_takes_longest_begins_first():
    names = [f"{model}, seed {seed}" for seed in (0, 1) for model in ("mlf", "fuselip", "sf", "ett")]
    in_turn = sorted([*names, "64 codes"], key=lambda name: r._turn(name, {"64 codes": print}))
    assert in_turn == ["64 codes", *(f"{model}, seed {seed}" for model in ("ett", "fuselip", "sf", "mlf") for seed in (0, 1))]


def test_unknown_models_and_seeds_are_refused_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    assert main(["reproduce", "--models", "fuselip,clip", "--run", str(tmp_path / "run")]) == 1
    assert "unknown model 'clip'; the models are fuselip, sf, mlf" in capsys.readouterr().err
    assert main(["reproduce", "--preset", "huge", "--run", str(tmp_path / "run")]) == 1
    assert "there is no fuselip of the size 'huge'" in capsys.readouterr().err
    assert main(["reproduce", "--seeds", "0", "--run", str(tmp_path / "run")]) == 1
    assert "seeds must be at least 1" in capsys.readouterr().err
    assert main(["reproduce", "--data", "csv:x.csv", "--run", str(tmp_path / "run")]) == 1
    assert "--data and --tests together" in capsys.readouterr().err and not (tmp_path / "run").exists()
    (tmp_path / "tests").mkdir()
    for words, told in ((["--steps", "-3"], "steps must not be negative, and is -3"), (["--processes", "-2"], "processes must not be negative"), (["--tokenizer", str(tmp_path / "no" / "where")], "there is no folder"),
                        (["--preset", "small", "--models", "fuselip,filip"], "there is no filip of the size 'small' (preset 'small-filip'); it has fuselip, sf, mlf"), (["--ablations", "--tokenizer-steps", "-1"], "tokenizer_steps must not"),
                        (["--data", "csv:nowhere.csv", "--tests", str(tmp_path / "tests")], "no CSV file at 'nowhere.csv'")):
        assert main(["reproduce", *words, "--run", str(tmp_path / "run")]) == 1 and told in capsys.readouterr().err and not (tmp_path / "run").exists()
    monkeypatch.chdir(tmp_path)  # where nobody has trained the tokenizer of small
    for more in ([], ["--ablations"]):
        assert main(["reproduce", "--preset", "small", *more, "--run", "run"]) == 1 and "train-tokenizer --preset small" in capsys.readouterr().err and not (tmp_path / "run").exists()


# ---- differences

def every_flip(ours, theirs, weights, cluster): # the share of all sign flips that give as large a difference
    parts = [float(((ours - theirs).mean(0) * weights)[cluster == one].sum()) for one in range(int(cluster.max()) + 1)]
    flips = [abs(sum(sign * part for sign, part in zip(signs, parts))) for signs in itertools.product((1, -1), repeat=len(parts))]
    return sum(flip >= abs(sum(parts)) - 1e-12 for flip in flips) / len(flips)


@pytest.mark.parametrize("clustered", [False, True])
def test_p_is_the_share_of_flips(clustered):
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        ours, theirs = ((torch.rand(2, 12, generator=generator) < strength).double() for strength in (0.8, 0.4))
        weights, cluster = torch.rand(12, generator=generator).double(), torch.arange(12) // (3 if clustered else 1)
        weights /= weights.sum()
        found = r.paired_difference(ours, theirs, weights, cluster)
        assert found["p"] == pytest.approx(every_flip(ours, theirs, weights, cluster), abs=0.02)
        assert found["difference"] == pytest.approx(float(((ours - theirs).mean(0) * weights).sum()))
        assert found["seeds"] == pytest.approx(((ours - theirs) @ weights).tolist())
        assert found["ci95"][0] <= found["difference"] <= found["ci95"][1]


def test_equal_models_do_not_differ():
    right = (torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    found = r.paired_difference(right, right, torch.full((50,), 0.02, dtype=torch.float64), torch.arange(50))
    assert found["p"] == 1 and found["difference"] == 0 and found["ci95"] == [0, 0]


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator, weights, hits = torch.Generator().manual_seed(1), torch.full((150,), 1 / 150, dtype=torch.float64), 0
    for seed in range(60):
        ours, theirs = ((torch.rand(1, 150, generator=generator) < strength).double() for strength in (0.7, 0.5))
        low, high = r.paired_difference(ours, theirs, weights, torch.arange(150), 10, seed)["ci95"]
        hits += low <= 0.2 <= high
    assert 51 <= hits <= 60


def test_queries_about_one_picture_are_one_cluster():
    pictures = [render(scene_at(index)) for index in range(2)]
    queries = [Query(Item(pictures[0], "a"), (Item(text="x"), Item(text="y"))), Query(Item(pictures[1], "a"), (Item(text="x"), Item(text="y"))),
               Query(Item(pictures[0].clone(), "b"), (Item(text="x"), Item(text="y"))), *[Query(Item(text="t"), (Item(text="x"), Item(text="y")))] * 2]
    assert r._clusters(queries).tolist() == [0, 1, 0, 2, 3]
    about = [dataclasses.replace(query, about=scene) for query, scene in zip(queries, ("a", "b", "b", "a", None))]
    assert r._clusters(about).tolist() == [0, 1, 1, 0, 2]  # what a query says that it is about comes first


def test_pictures_are_read_once_a_task_however_many_rivals_there_are(monkeypatch):
    queries, read, load = [Query(Item(render(scene_at(index))), (Item(text="x"), Item(text="y"))) for index in range(3)], [], r.load_image
    monkeypatch.setattr(r, "load_image", lambda image: read.append(image) or load(image))
    claims = r.summarise_trials({name: [trial({"t": "110"})] for name in PAPERS}, {"t": queries})["claims"]
    assert len(read) == 3 and [claim["rival"] for claim in claims] == ["sf", "mlf"]


def trial(answers): return {"parameters": 10, "flops_per_pair": 5.0, "seconds": 2.0, "pairs": 100, "curve": [], "answers": answers}


def test_results_are_means_over_kinds_and_seeds():
    item = lambda index: Item(render(scene_at(index)))
    queries = [Query(item(index), (Item(text="x"), Item(text="y")), kind) for index, kind in enumerate("aaab")]
    found = {"fuselip": [trial({"t": "1101"}), trial({"t": "1110"})], "sf": [trial({"t": "0000"}), trial({"t": "1000"})]}
    results = r.summarise_trials(found, {"t": queries})
    row = results["models"]["fuselip"]["tasks"]["t"]
    assert row["seeds"] == pytest.approx([(2 / 3 + 1) / 2, 0.5]) and row["mean"] == pytest.approx(sum(row["seeds"]) / 2)
    assert row["std"] == pytest.approx(abs(row["seeds"][0] - row["seeds"][1]) / math.sqrt(2)) and row["chance"] == 0.5 and row["n"] == 4
    assert row["kinds"]["a"] == {"mean": pytest.approx(5 / 6), "chance": 0.5, "n": 3}
    claim, = results["claims"]
    assert (claim["task"], claim["rival"]) == ("t", "sf") and claim["difference"] == pytest.approx(row["mean"] - results["models"]["sf"]["tasks"]["t"]["mean"])
    assert r.only(results, "fuselip", "t") == [1] and r.only(results, "sf", "t") == []
    table = r.reproduction_table(results)
    assert f"{100 * row['mean']:.1f} ± {100 * row['std']:.1f}" in table and f"{100 * claim['difference']:+.1f}" in r.claims_table(results)


def test_one_seed_has_no_deviation():
    queries = [Query(Item(render(scene_at(index))), (Item(text="x"), Item(text="y"))) for index in range(4)]
    row = r.summarise_trials({"sf": [trial({"t": "1100"})]}, {"t": queries})["models"]["sf"]["tasks"]["t"]
    assert row["std"] == 0 and row["mean"] == 0.5


# ---- fusion

ITEMS = [Item(render(scene_at(index)), text) for index, text in enumerate(("the circle", "what colour is the shape in the upper left?", "horizontal flip"))]


def test_the_mask_written_out(built):
    model = built["fuselip"][0]
    inputs = model.collate(ITEMS)
    found = r.modality_mask(inputs["ids"], inputs["lengths"], model.vocab)[:, 0]
    for row, (ids, length) in enumerate(zip(inputs["ids"].tolist(), inputs["lengths"].tolist())):
        for i, j in itertools.product(range(len(ids)), repeat=2):
            is_code = lambda k: ids[k] >= model.vocab.first_code
            if j >= length: expected = False
            elif i == length - 1: expected = True
            else: expected = j != length - 1 and is_code(i) == is_code(j)
            if i < length: assert bool(found[row, i, j]) == expected, (row, i, j)


def test_nothing_blocked_is_the_model_and_words_alone_ignore_the_picture(built):
    model = built["fuselip"][0].eval()
    torch.testing.assert_close(r.BlockedFusion(model, 0).embed_items(ITEMS), model.embed_items(ITEMS), atol=1e-5, rtol=0)
    unimodal = [Item(ITEMS[0].image), Item(text="a red circle")]
    torch.testing.assert_close(r.BlockedFusion(model, 4).embed_items(unimodal), model.embed_items(unimodal), atol=0, rtol=0)
    states = []
    for picture in (0, 1):  # the same words after another picture: with all layers blocked, no word's state changes
        item = Item(ITEMS[picture].image, "the circle")
        inputs = model.collate([item])
        x = model.token_embedding(inputs["ids"]) + model.positional_embedding[:inputs["ids"].shape[1]]
        mask = r.modality_mask(inputs["ids"], inputs["lengths"], model.vocab)
        for block in model.transformer.resblocks: x = block(x, mask)
        states.append((x[0, 16:-1], x[0, -1]))
    torch.testing.assert_close(states[0][0], states[1][0], atol=0, rtol=0)
    assert (states[0][1] - states[1][1]).abs().max() > 1e-4


def test_attention_to_the_image_is_a_share(built):
    model = built["fuselip"][0].eval()
    found = r.image_attention(model, ITEMS)
    assert found.shape == (model.config.layers, 3, 16) and bool((found > 0).all()) and bool((found.sum(-1) < 1).all())
    alone = r.image_attention(model, ITEMS[1:2])
    torch.testing.assert_close(found[:, 1:2], alone, atol=1e-5, rtol=0)


def test_the_space_of_a_model(built):
    found = r.modality_space(built["sf"][0].eval(), 12)
    assert 0 <= found["gap"] <= 2 and 0 <= found["alignment"] <= 4 and all(value <= 0 for value in found["uniformity"].values())
    assert {name: len(points) for name, points in found["points"].items()} == {"image": 12, "text": 12, "both": 12}


# ---- other data

def write_set(folder): # pictures of one object, their names, and an instruction that leads from one to another
    from torchvision.transforms.functional import to_pil_image
    from fuselip_edu.evaluate import _lone_objects
    scenes = _lone_objects("train")[:300:5]
    folder.mkdir(parents=True, exist_ok=True)
    for at, scene in enumerate(scenes): to_pil_image(render(scene)).save(folder / f"{at}.png")
    rows = [f"{at}.png,a {scene.objects[0].name}," for at, scene in enumerate(scenes)]
    edits = [f"{at}.png,,the next,{at + 1}.png,g{at // 6}" for at in range(0, 60, 2)]
    (folder / "train.csv").write_text("\n".join(["image,text,instruction,target_image,group", *(f"{row}," + "," for row in rows), *edits]) + "\n")
    (folder / "tests").mkdir(exist_ok=True)
    (folder / "tests" / "names.csv").write_text("\n".join(["image,text", *(f"../{row[:-1]}" for row in rows[::2])]) + "\n")
    (folder / "tests" / "next.csv").write_text("\n".join(["image,text,instruction,target_image,group", *(f"../{edit.replace('the next,', 'the next,../')}" for edit in edits)]) + "\n")
    return folder


def test_a_folder_of_tables_is_a_set_of_tasks(tmp_path):
    tasks = r.csv_tasks(write_set(tmp_path) / "tests")
    assert list(tasks) == ["names", "next"] and {query.kind for query in tasks["names"]} == {"left to right", "right to left"}
    assert {query.kind for query in tasks["next"]} == {""} and all(query.item.text == "the next" and len(query.candidates) == 3 for query in tasks["next"])
    assert all(len({name for query in found for name in [query.item.text]}) for found in tasks.values())


def test_a_folder_without_tables_or_queries_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no CSV in"): r.csv_tasks(tmp_path)
    (tmp_path / "alone.csv").write_text("image,text\n,a word\n")
    with pytest.raises(ValueError): r.csv_tasks(tmp_path)


def test_own_data_through_the_command(tmp_path, monkeypatch, capsys):
    for presets, name in ((PRESETS, "tiny"), (BASELINE_PRESETS, "tiny-sf")): monkeypatch.setitem(presets, name, small({"tiny": "fuselip", "tiny-sf": "sf"}[name]))
    place = write_set(tmp_path / "set")
    words = ["reproduce", "--data", f"csv:{place / 'train.csv'}", "--tests", str(place / "tests"), "--tokenizer-steps", "8", "--steps", "3", "--seeds", "1",
             "--models", "fuselip,sf", "--text-vocab", "300", "--run", str(tmp_path / "run")]
    for config in (PRESETS["tiny"], BASELINE_PRESETS["tiny-sf"]): config.train.batch_size = 16
    assert main(words) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["models"]["sf"]["tasks"]) == ["names", "next"] and results["models"]["fuselip"]["pairs"] == 3 * 16
    assert (tmp_path / "run" / "tokenizer" / "config.json").exists() and "| names | next |" in capsys.readouterr().out


# ---- one thing changed at a time

def test_a_change_leaves_everything_else():
    base = small("fuselip")
    for name, changes in r.ABLATIONS.items():
        other = r.changed(base, changes)
        different = {field for field in ("data", "scenes", "tgit", "without", "tokenizer", "text_vocab") if getattr(base, field) != getattr(other, field)}
        different |= {f"{part}.{field.name}" for part in ("train", "encoder") for field in dataclasses.fields(getattr(base, part))
                      if getattr(getattr(base, part), field.name) != getattr(getattr(other, part), field.name)}
        assert different == set(changes), name
    with pytest.raises(ValueError, match="no field 'train.rate'"): r.changed(base, {"train.rate": 1})
    assert set(r.CODEBOOKS) == {changes["tokenizer"] for changes in r.ABLATIONS.values() if "tokenizer" in changes}


@pytest.mark.parametrize("name", [name for name in r.ABLATIONS if "encoder.width" in r.ABLATIONS[name]])
def test_depth_and_width_are_exchanged_at_equal_cost(name):
    cost = lambda config: config.encoder.layers * config.encoder.width ** 2
    assert cost(r.changed(small("fuselip"), r.ABLATIONS[name])) == pytest.approx(cost(small("fuselip")), rel=0.05)


def test_ablations_through_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "tiny", small("fuselip"))
    monkeypatch.setattr(r, "ABLATIONS", {name: r.ABLATIONS[name] for name in ("nothing", "no captions", "a tokenizer of its own", "9 tokens an image", "seed 1")})
    monkeypatch.setattr(r, "CODEBOOKS", {name: r.CODEBOOKS[name] for name in ("a tokenizer of its own", "9 tokens an image")})
    words = ["reproduce", "--ablations", "--queries", "20", "--steps", "3", "--tokenizer-steps", "8", "--processes", "1", "--run", str(tmp_path / "run")]
    assert main(words) == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(found["models"]) == ["nothing", "no captions", "a tokenizer of its own", "9 tokens an image", "seed 1"]
    assert {claim["rival"] for claim in found["claims"]} == {"no captions", "seed 1", "9 tokens an image"}
    said = capsys.readouterr().out
    assert "| nothing |" in said and "| 9 tokens an image |" in said and found["models"]["nothing"]["pairs"] == 3 * 128
    written = (tmp_path / "run" / "nothing" / "trial.json").stat().st_mtime_ns
    assert main(words) == 0 and (tmp_path / "run" / "nothing" / "trial.json").stat().st_mtime_ns == written
    assert json.loads((tmp_path / "run" / "results.json").read_text())["claims"] == found["claims"]
    done = {name: json.loads((tmp_path / "run" / folder / "trial.json").read_text()) for name, folder in (("nothing", "nothing"), ("seed 1", "seed-1"), ("9 tokens an image", "9-tokens-an-image"))}
    part = r.summarise_ablations(done, shapes_tasks(20, 0, 32))  # rows without the one that they are compared to have to wait
    assert list(part["models"]) == ["nothing", "seed 1"] and {claim["rival"] for claim in part["claims"]} == {"seed 1"} and part["models"]["seed 1"] == found["models"]["seed 1"]
    assert main(["reproduce", "--ablations", "--data", "csv:x.csv", "--tests", "y"]) == 1 and "leave out --data or --ablations" in capsys.readouterr().err


# ---- the command and the committed run

def test_the_command_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    for presets, name in ((PRESETS, "tiny"), (BASELINE_PRESETS, "tiny-sf"), (BASELINE_PRESETS, "tiny-mlf")):
        monkeypatch.setitem(presets, name, small({"tiny": "fuselip", "tiny-sf": "sf", "tiny-mlf": "mlf"}[name]))
    words = ["reproduce", "--queries", "20", "--run", str(tmp_path / "run"), "--seeds"]
    assert main([*words, "1", "--models", "fuselip,sf"]) == 0
    first = json.loads((tmp_path / "run" / "results.json").read_text())
    written = (tmp_path / "run" / "sf" / "seed-0" / "model" / "model.safetensors").stat().st_mtime_ns
    assert main([*words, "2"]) == 0
    second, said = json.loads((tmp_path / "run" / "results.json").read_text()), capsys.readouterr().out
    assert (tmp_path / "run" / "sf" / "seed-0" / "model" / "model.safetensors").stat().st_mtime_ns == written
    assert list(first["models"]) == ["fuselip", "sf"] and list(second["models"]) == ["fuselip", "sf", "mlf"]
    assert "| FuseLIP |" in said and "paper: fuselip-s-cc3m" in said and second["command"] == " ".join(["fuselip-edu", *words, "2"])
    assert len(second["models"]["mlf"]["tasks"]) == 11 and second["models"]["fuselip"]["tasks"]["tgit"]["seeds"][0] == first["models"]["fuselip"]["tasks"]["tgit"]["seeds"][0]
    assert len(second["fusion"]["blocked"]["position"]) == 5 and second["spaces"].keys() == second["models"].keys()
    for figure in (r.tasks_figure, r.curves_figure, r.kinds_figure): assert figure(second).axes


@pytest.fixture(scope="module")
def committed(root): return json.loads((root / "data" / "results" / "reproduce.json").read_text())


def test_the_committed_run_is_three_seeds_of_three_models(committed):
    assert committed["command"].startswith("fuselip-edu reproduce --preset tiny --seeds 3")
    assert set(committed["models"]) == set(PAPERS) and all(len(found["curves"]) == 3 for found in committed["models"].values())
    counts = [found["parameters"] for found in committed["models"].values()]
    assert max(counts) / counts[0] < 1.05 and min(counts) / counts[0] > 0.95


@pytest.mark.parametrize("task, points", [("tgit", 0.15), ("position", 0.25), ("vqa", 0.10), ("region_crop", 0.10)])
def test_early_fusion_is_ahead_where_both_are_needed(task, points, committed):
    claims = [claim for claim in committed["claims"] if claim["task"] == task]
    assert len(claims) == 2 and all(claim["p"] < 0.01 and claim["difference"] > points and min(claim["seeds"]) > 0 for claim in claims)


@pytest.mark.parametrize("task", ["retrieval", "zero_shot", "grounding"])
def test_and_keeps_up_elsewhere(task, committed):
    rows = {model: found["tasks"][task]["mean"] for model, found in committed["models"].items()}
    assert rows["fuselip"] > max(rows.values()) - 0.05


def test_flips_are_learned_inside_the_committed_run(committed):
    "From every seed to two in three at least, and from one in a jump, by a fifth of all queries from one point of the curve to the next, to nine in ten; no late-fusion model comes to half."
    curves = {model: [[row["tgit: flip"] for row in curve] for curve in found["curves"]] for model, found in committed["models"].items()}
    assert sum(max(after - before for before, after in zip(curve, curve[1:])) > 0.19 and curve[-1] > 0.9 for curve in curves["fuselip"]) >= 1
    assert min(curve[-1] for curve in curves["fuselip"]) > 0.66
    assert max(max(curve) for model in ("sf", "mlf") for curve in curves[model]) < 0.5


def test_the_committed_run_took_an_hour_at_most(committed): assert committed["minutes"] <= 60


def test_fusion_happens_in_the_first_layer(committed):
    for name, (whole, first, *_, last) in committed["fusion"]["blocked"].items(): assert whole - first > 0.8 * (whole - last) > 0.05, name


# ---- what codes are worth

class Recalled: # a tokenizer that gives back what it was told to
    config = type("config", (), {"image_size": 32})
    def __init__(self, back): self.back = back
    def encode(self, pixels): return torch.arange(len(pixels))
    def decode(self, codes): return self.back[codes]


def test_codes_tell_a_picture_if_it_is_nearest_to_what_they_give_back():
    pictures = [render(scene_at(index), 32) for index in range(4)]
    query = lambda right, *wrong: Query(Item(text="which?"), tuple(Item(pictures[at]) for at in (right, *wrong)))
    queries = [query(0, 1, 2), query(1, 0), query(2, 3), Query(Item(pictures[0]), (Item(text="a"), Item(text="b"))), Query(Item(pictures[0]), (Item(pictures[1], "and words"), Item(pictures[2], "too")))]
    back = torch.stack(pictures).float() / 255
    assert r.told_apart(Recalled(back), queries) == 1.0
    assert r.told_apart(Recalled(back[[1, 1, 3, 3]]), queries) == pytest.approx(1 / 3)  # the first and the third give back another
    assert r.told_apart(Recalled(back), queries[3:]) is None
    assert r.told_apart(Recalled(back), [query(0, 0, 1)]) == 0.0  # a tie tells nothing


def test_the_table_of_rivals_says_what_codes_could_tell():
    row = lambda mean: {"mean": mean, "n": 10, "chance": 0.1}
    results = {"models": {"fuselip": {"tasks": {"edit": row(0.5), "name": row(0.4)}}, "sf": {"tasks": {"edit": row(0.25), "name": row(0.5)}}},
               "claims": [{"task": "edit", "rival": "sf", "difference": 0.25, "p": 0.01}, {"task": "name", "rival": "sf", "difference": -0.1, "p": 0.5}]}
    plain = r.rivals_table(results).splitlines()
    told = r.rivals_table(results | {"told_apart": {"edit": 0.13, "name": None}}).splitlines()
    assert told[0] == plain[0] + " codes tell |" and told[1] == plain[1] + "---|"
    assert told[2] == plain[2] + " 13 |" and told[3] == plain[3] + " |"


# ---- what was asked, and of what

def test_the_fingerprint_is_of_every_word_picture_and_candidate(tasks):
    assert r.fingerprint(tasks) == r.fingerprint(ask()) != r.fingerprint(shapes_tasks(20, 1, 32, NAMES))
    name = "position"
    first, *rest = tasks[name]
    image = first.candidates[1].image.clone()
    image[0, 0, 0] += 1
    for query in (dataclasses.replace(first, kind="x"), dataclasses.replace(first, item=Item(first.item.image, "other words")), dataclasses.replace(first, candidates=first.candidates[:-1]),
                  dataclasses.replace(first, candidates=(first.candidates[0], Item(image), *first.candidates[2:]))):
        assert r.fingerprint(tasks | {name: [query, *rest]}) != r.fingerprint(tasks)


def test_a_tokenizer_of_another_recipe_is_not_taken_for_this_one(tmp_path):
    make = lambda steps: r.train_shared_tokenizer(tmp_path / "tokenizer", "shapes", steps, TOKENIZER_PRESETS["tiny"], scenes=20)
    make(4)
    written = (tmp_path / "tokenizer" / "model.safetensors").stat().st_mtime_ns
    make(4)
    assert (tmp_path / "tokenizer" / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="trained in another way; give another --run"): make(5)


def test_operations_are_those_of_shuffled_batches(built):
    model, pairs = built["sf"]
    config = small("sf").train
    found = r.flops_per_pair(model, pairs, config)
    in_order = [[list(range(config.batch_size))]]
    def counted(batches): # the towers see an image or a text of a batch once
        distinct = lambda batch: len({tuple(pixels.flatten().tolist()) for pixels, shown in zip(batch["pixels"], batch["has_image"]) if shown})
        return [distinct(batch) for batch in pairs.batches(batches)]
    assert min(counted(r.epoch_batches(pairs.groups, config, 0)[:2])) > 1.2 * counted(in_order)[0] and found == r.flops_per_pair(model, pairs, config)


def test_a_trial_of_ett_tunes_the_tokenizer(tmp_path, tasks):
    "Operations are counted in all of its stages before it is trained; the last has the tokenizer frozen."
    config = small("ett")
    r.run_trial(config, tmp_path, {"position": tasks["position"]}, {})
    before, after = TiTok.from_pretrained(tokenizer_place(config.tokenizer)).state_dict(), load_model(tmp_path).image_tokenizer.state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert {"encoder", "decoder", "quantize"} <= moved


def test_minutes_of_all_attempts_are_counted_and_kept_while_a_run_goes_on(tmp_path, monkeypatch):
    clock = iter([0.0, 120.0, 180.0, 1000.0, 1060.0, 1120.0])
    monkeypatch.setattr(r.time, "monotonic", lambda: next(clock))
    path = tmp_path / "minutes.json"
    with pytest.raises(RuntimeError), r._counted(path) as minutes:
        assert minutes() == 2.0 == json.loads(path.read_text())  # what a kill would leave
        raise RuntimeError
    assert json.loads(path.read_text()) == 3.0
    with r._counted(path) as minutes: assert minutes() == 4.0
    assert json.loads(path.read_text()) == 5.0


@pytest.mark.parametrize("name, task, points", [("nlvr", "place", 0.15), ("grocery", "crop", 0.15), ("grocery", "rotate", 0.3), ("grocery", "flip", 0.3)])
def test_early_fusion_is_ahead_on_real_pictures_too(name, task, points, root):
    claims = [claim for claim in json.loads((root / "data" / "results" / f"{name}.json").read_text())["claims"] if claim["task"] == task]
    assert {claim["rival"] for claim in claims} == {"sf", "mlf"} and all(claim["difference"] > points and claim["p"] < 0.01 for claim in claims)


def test_a_difference_counts_if_neither_pictures_nor_seeds_explain_it():
    row = lambda vqa, tgit: {"parameters": 5, "flops_per_pair": 2e6, "tasks": {"vqa": {"mean": vqa}, "tgit": {"mean": tgit}}}
    claim = lambda rival, task, p=0.001: {"rival": rival, "task": task, "p": p}
    models = {"nothing": row(0.4, 0.6), "no masked loss": row(0.7, 0.4), "no captions": row(0.1, 0.7), "a tokenizer of its own": row(0.7, 0.6), "64 codes": row(0.4, 0.5), "9 tokens an image": row(0.1, 0.6),
              "seed 1": row(0.6, 0.6), "seed 2": row(0.5, 0.61)}
    claims = [claim("no masked loss", "vqa"), claim("no masked loss", "tgit"), claim("no captions", "vqa"), claim("no captions", "tgit", 0.02), claim("64 codes", "vqa"), claim("64 codes", "tgit"),
              claim("9 tokens an image", "vqa"), claim("seed 1", "vqa")]
    found = {"models": models, "claims": claims}
    assert r.luck_range(found)["vqa"] == (pytest.approx(0.5 - 4.303 * 0.1 * (4 / 3) ** 0.5), 0.5 + 4.303 * 0.1 * (4 / 3) ** 0.5)
    assert r.luck_range(found, "a tokenizer of its own")["vqa"] == (pytest.approx(0.7 - 4.303 * 0.1 * 2 ** 0.5), 1.0)
    assert r.sure_differences(found) == {("no masked loss", "tgit"), ("64 codes", "tgit")}  # of answers to questions a seed in twenty is further off
    models["seed 1"], models["seed 2"] = row(0.41, 0.6), row(0.42, 0.61)
    assert r.sure_differences(found) == {("no masked loss", "tgit"), ("64 codes", "tgit"), *((name, "vqa") for name in ("no masked loss", "no captions", "64 codes", "9 tokens an image"))}
    lines = r.ablation_table(found).splitlines()
    assert lines[4].endswith("| **10.0** | 70.0 |") and lines[6].endswith("| **40.0** | **50.0** |") and lines[-1].endswith("| *36 to 46* | *57 to 63* |")
    for name in ("seed 1", "seed 2"): models.pop(name)  # before two seeds are finished nobody knows
    assert not r.sure_differences(found | {"claims": claims[:-1]}) and len(r.ablation_table(found | {"claims": claims[:-1]}).splitlines()) == 2 + len(models)
