"The demo at a fraction of its size: the same numbers twice, resumed after an interruption, a report in one file; and what the full one reached."
import dataclasses
import json
import re

import pytest

from fuselip_edu import FuseLIP, demo
from fuselip_edu.cli import demo_command
from fuselip_edu.shapes import render, scene_at
from fuselip_edu.train import preset


def small(**changes):
    config = preset("tiny")
    config.scenes, config.encoder.width, config.encoder.layers = 60, 32, 1
    config.train = dataclasses.replace(config.train, **{"steps": 8, "batch_size": 32, "log_every": 1, "checkpoint_every": 4, "device": "cpu"} | changes)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("demo") / "run"
    return run, demo.demo(small(), run, n=40)


def test_a_run_leaves_everything(finished):
    run, results = finished
    for name in ("config.json", "metrics.jsonl", "results.json", "report.md", "report.html", "model/model.safetensors", "figures/loss.png",
                 "figures/reconstructions.png", "figures/similarity.png"): assert (run / name).is_file(), name
    assert json.loads((run / "results.json").read_text()) == results
    assert {"model", "tasks", "seconds", "pairs"} <= results.keys() and len(results["tasks"]) == 11
    for row in results["tasks"].values(): assert {"accuracy", "chance", "n", "ci95"} <= row.keys()
    assert len(results["tasks"]["tgit"]["kinds"]) == 5


def test_one_seed_gives_one_table(finished, tmp_path): assert demo.demo(small(), tmp_path / "again", n=40)["tasks"] == finished[1]["tasks"]


def test_an_interrupted_demo_goes_on(finished, tmp_path, monkeypatch):
    def interrupted(model, pairs, config, run, resume):
        original(model, pairs, config, run, resume, watch=lambda step, model: 1 / 0 if step == 6 else None)

    original = demo.train
    monkeypatch.setattr(demo, "train", interrupted)
    with pytest.raises(ZeroDivisionError): demo.demo(small(), tmp_path / "run", n=40)
    monkeypatch.setattr(demo, "train", original)
    assert demo.demo(small(), tmp_path / "run", n=40)["tasks"] == finished[1]["tasks"]


def test_a_finished_demo_is_shown_again(finished, capsys):
    run, results = finished
    assert demo.demo(small(), run, n=40) == results
    assert "has run before" in capsys.readouterr().err


def test_too_few_queries_are_refused_before_a_scene_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "build", lambda config: pytest.fail("the scenes were read"))
    with pytest.raises(ValueError, match="19 test scenes are too few .*give at least 20"): demo.demo(small(), tmp_path / "run", n=19)
    assert not (tmp_path / "run").exists()


def test_a_caption_in_the_report_is_text_and_nothing_else(finished, tmp_path):
    script, results = "<script>alert(1)</script>", finished[1]
    (tmp_path / "a.png").write_bytes(b"x")
    demo.write_report(tmp_path, results | {"model": script}, [(tmp_path / "a.png", script)], {"data": script})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 5  # title, heading, alt, caption and configuration


def test_the_report_is_one_file(finished):
    page = (finished[0] / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 4
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


def test_a_thousand_mixed_items(finished):
    model = FuseLIP.from_pretrained(finished[0])
    images = [render(scene_at(index)) if index % 3 else None for index in range(1000)]
    texts = [f"a red circle {index}" if index % 2 or index % 3 == 0 else None for index in range(1000)]
    vectors = model.encode(images, texts)
    assert vectors.shape == (1000, 32) and (vectors.norm(dim=1) - 1).abs().max() < 1e-5
    some = [0, 1, 2, 3, 500, 999]
    alone = model.encode([images[index] for index in some], [texts[index] for index in some], batch_size=1)
    assert (alone - vectors[some]).abs().max() < 1e-5


def test_what_the_full_demo_reached(root):
    "The committed results keep what the project promises."
    tasks = json.loads((root / "data" / "results" / "demo.json").read_text())["tasks"]
    for name, row in tasks.items(): assert row["ci95"][0] > row["chance"] or name == "unseen", name  # which it is never taught
    halfway = [name for name, row in tasks.items() if row["accuracy"] > (1 + row["chance"]) / 2]
    assert len(halfway) >= 6 and "tgit" in halfway, halfway


@pytest.mark.parametrize("words, scenes", [([], preset("tiny").scenes), (["--seconds", "1"], 200), (["--seconds", "40"], 800), (["--seconds", "3600"], preset("tiny").scenes)])
def test_a_short_demo_draws_no_more_scenes_than_it_can_use(words, scenes, monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "demo", lambda config, run, queries: asked.append(config.scenes))
    demo_command(words)
    assert asked == [scenes]
