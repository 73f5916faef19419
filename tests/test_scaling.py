"The ladder of speed: its load, the operations that it counts, rungs that compute the same, and the committed run."
import functools
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fuselip_edu import scaling as s
from fuselip_edu.cli import main
from fuselip_edu.train import TrainConfig, backward, make_batch


@pytest.fixture(scope="module")
def model(): return s.benchmark_model("tiny", torch.device("cpu"))


def test_the_load_is_mixed_as_the_recipe_and_depends_on_the_seed_alone():
    one, same, other = s.MixedShapes(3000, 32), s.MixedShapes(3000, 32), s.MixedShapes(3000, 32, seed=1)
    for kind, millions in s.PAIRS.items(): assert one.kinds.count(kind) / 3000 == pytest.approx(millions / sum(s.PAIRS.values()), abs=0.03)
    texts = lambda source: [(pair.left.text, pair.right.text) for index in range(40) for pair in source[index]]
    assert texts(one) == texts(same) != texts(other) and len(texts(one)) == 40
    with pytest.raises(IndexError): one[3000]


def test_operations_are_those_that_pytorch_counts(model):
    ids, config = torch.randint(3, 200, (16, 30), generator=torch.Generator().manual_seed(0)), TrainConfig(batch_size=8, mask_probability=0.2, skip_twins=False)
    for length in (30, 11):
        batch = make_batch({"ids": ids[:, :length], "lengths": torch.full((16,), length)}, model, config, 0)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter: backward(model, batch, config)
        assert s.model_flops(model, batch.inputs["lengths"], int((batch.inputs["labels"] >= 0).sum())) == pytest.approx(counter.get_total_flops(), rel=0.03)
    model.zero_grad()


def test_every_rung_changes_one_thing_and_computes_the_same(monkeypatch):
    for device in ("cpu", "cuda"):
        rungs = s.ladder(torch.device(device))
        for below, rung in zip(rungs, rungs[1:]): assert sum(getattr(rung, name) != getattr(below, name) for name in vars(rung)) == 2  # the name, and one more
    kept, memory, climb = [], [None], s.Climber.climb
    monkeypatch.setattr(s, "keep_memory", lambda keep: memory.append(keep))
    monkeypatch.setattr(s.Climber, "climb", lambda self, number: (kept.append((self.rung.kept, memory[-1])), climb(self, number))[1])
    found = s.benchmark("tiny", "cpu", steps=1, batch_size=8)
    assert {one for one, _ in kept} == {False, True} and all(one == other for one, other in kept)
    assert [rung["name"] for rung in found["rungs"]] == [rung.name for rung in s.ladder(torch.device("cpu"))]
    for rung in found["rungs"]: assert rung["pairs_per_second"] > 0 and 0 < rung["utilisation"] < 1 and 0 <= rung["data_wait"] < 1
    assert found["rates"].keys() == found["usual_rates"].keys() == {"fp32"}
    assert found["rungs"][0]["data_wait"] > found["rungs"][1]["data_wait"] and len({round(rung["tokens_per_second"] / rung["pairs_per_second"], 6) for rung in found["rungs"]}) == 1
    assert s.ladder_table(found).count("\n") == 1 + len(found["rungs"]) and s.projection_table(found).count("\n") == 3


def test_climbing_leaves_the_model_as_it_was(model):
    source, forward = s.MixedShapes(16, 32), model.forward.__func__
    live = s.SourcePairs(source, model)
    climber = s.Climber(s.Rung("padded"), model, {"live": live}, [[list(range(8))], [list(range(8, 16))]], TrainConfig(batch_size=8, mask_probability=0.1, skip_twins=False))
    climber.climb(0)
    assert model.forward.__func__ is forward and not isinstance(model.forward, functools.partial) and climber.rows[0]["pairs"] == 8


def test_the_command(tmp_path, capsys):
    assert main(["benchmark", "--preset", "tiny", "--device", "cpu", "--steps", "1", "--batch-size", "4", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["command"].startswith("fuselip-edu benchmark --preset tiny") and s.ladder_table(found) in capsys.readouterr().out
    assert main(["benchmark", "--preset", "huge"]) == 1 and "unknown preset 'huge'; the presets are fuselip-s, fuselip-b, tiny" in capsys.readouterr().err
    assert main(["benchmark", "--steps", "0"]) == 1 and "steps must be at least 1, not 0" in capsys.readouterr().err


def test_the_committed_ladder_shows_what_the_chapter_says(root):
    found = json.loads((root / "data" / "results" / "scaling.json").read_text())
    rungs = {rung["name"]: rung for rung in found["rungs"]}
    assert found["preset"] == "fuselip-s" and found["batch_size"] == 32
    speeds = [rung["pairs_per_second"] for rung in found["rungs"]]
    assert max(speeds) >= 2.5 * speeds[0] and speeds[1] > 1.5 * speeds[0] and rungs["packed"]["pairs_per_second"] > 2 * speeds[0] and rungs["packed"]["pairs_per_second"] > 1.1 * speeds[1]
    assert found["rungs"][0]["data_wait"] > 0.3 and all(rung["data_wait"] < 0.02 for rung in found["rungs"][1:])
