"On a GPU: the same numbers as on a CPU, compiled or not, in parts or at once, and runs that go on."
import dataclasses
import json

import pytest
import torch

from fuselip_edu.baselines import BASELINE_PRESETS, build_baseline
from fuselip_edu.batches import open_data, tokenize_pairs
from fuselip_edu.core import seed_everything
from fuselip_edu.filip import FILIP_PRESETS, build_filip
from fuselip_edu.fuselip import FuseLIP, FuseLIPConfig
from fuselip_edu.reproduce import flops_per_pair
from fuselip_edu.scaling import benchmark, ladder
from fuselip_edu.shapes import render, scene_at
from fuselip_edu.sources import source_groups
from fuselip_edu.text import BPE
from fuselip_edu.titok import TINY_TOKENIZER, TiTok
from fuselip_edu.train import TrainConfig, backward, build, make_batch, preset, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def fresh(**sizes):
    seed_everything(0)
    return FuseLIP(FuseLIPConfig(**({"width": 128, "layers": 2, "heads": 2} | sizes)), TiTok.from_pretrained(TINY_TOKENIZER), BPE.train(["a red circle above a blue square"], 270))


@pytest.fixture(scope="module")
def pairs(): return tokenize_pairs(source_groups(open_data("shapes", scenes=40, seed=0, size=32)), fresh().item_tokenizer)


def settings(**changes):
    return TrainConfig(**({"steps": 8, "batch_size": 32, "warmup_steps": 2, "mask_probability": 0.1, "log_every": 1, "checkpoint_every": 4, "device": "cuda"} | changes))


def losses(rows): return torch.tensor([row["loss"] for row in rows])


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_training_is_that_of_a_cpu(pairs, optimizer):
    plain = losses(train(fresh(), pairs, settings(device="cpu", optimizer=optimizer)))
    torch.testing.assert_close(losses(train(fresh(), pairs, settings(precision="fp32", optimizer=optimizer))), plain, rtol=1e-3, atol=1e-3)
    for changes in ({"precision": "tf32"}, {"precision": "bf16"}, {"compiled": True}, {"chunk": 16}, {"accumulation": 4}):
        torch.testing.assert_close(losses(train(fresh(), pairs, settings(optimizer=optimizer, **changes))), plain, rtol=0.03, atol=0.03, msg=lambda text: f"{changes}: {text}")


@pytest.mark.parametrize("compiled", [False, True])
def test_parts_give_the_gradient_of_the_whole(pairs, compiled):
    found = []
    for accumulation in (1, 2, 8):
        model, config = fresh().cuda(), settings(accumulation=accumulation, precision="fp32" if not compiled else "bf16")
        if compiled:
            for block in model.transformer.resblocks: block.compile(dynamic=True)
        backward(model, make_batch(pairs.inputs(range(32)), model, config, 0), config)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for other in found[1:]: assert float((other - found[0]).norm() / found[0].norm()) < (0.02 if compiled else 1e-4)


def test_a_run_goes_on_where_it_was(pairs, tmp_path):
    whole = train(fresh(), pairs, settings(precision="fp32"), tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    train(fresh(), pairs, settings(precision="fp32"), tmp_path / "cut")
    for suffix in ("safetensors", "json"): (tmp_path / "cut" / "checkpoints" / f"step-00000008.{suffix}").unlink()
    again = train(fresh(), pairs, settings(precision="fp32"), tmp_path / "cut", resume=True)
    torch.testing.assert_close(losses(again), losses(whole), rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "cut" / "speed.json").read_text())["steps"] == 4


def test_embeddings_and_codes_are_those_of_a_cpu():
    model, source = fresh().eval(), open_data("shapes", scenes=10, seed=1, size=32)
    items = [item for group in source_groups(source) for pair in group for item in (pair.left, pair.right)][:120]
    pixels, plain = torch.stack([render(scene_at(index), 32) for index in range(200)]), model.embed_items(items)
    codes = model.image_tokenizer.encode(pixels)
    model.cuda()
    for allowed in (False, True):  # TF32 is for training, not for codes
        torch.backends.cuda.matmul.allow_tf32 = allowed
        assert float((model.image_tokenizer.encode(pixels.cuda()).cpu() == codes).float().mean()) > 0.999
    torch.backends.cuda.matmul.allow_tf32 = False
    same = (model.embed_items(items) - plain).abs().max(1).values < 1e-4
    assert float(same.float().mean()) > 0.98  # a code between two entries may fall to either


def test_data_is_tokenized_and_work_is_counted_there_as_on_a_cpu():
    built = {}
    for device in ("cpu", "cuda"):
        config = preset("tiny")
        config.scenes, config.train = 20, dataclasses.replace(config.train, batch_size=32, device=device)
        model, pairs = build(config)
        assert model.device.type == model.image_tokenizer.latent_tokens.device.type == device
        built[device] = pairs, flops_per_pair(model, pairs, config.train)
    ids = [pairs.inputs(range(100))["ids"] for pairs, _ in built.values()]
    assert float((ids[0] == ids[1]).float().mean()) > 0.999 and abs(built["cuda"][1] / built["cpu"][1] - 1) < 1e-3


@pytest.mark.parametrize("name", ["tiny-sf", "tiny-mlf", "tiny-filip", "tiny-filip-patches"])
def test_the_rivals_train_there(name):
    presets, make = (FILIP_PRESETS, build_filip) if "filip" in name else (BASELINE_PRESETS, build_baseline)
    found = []
    for device in ("cpu", "cuda"):
        config = preset(name, presets)
        config.scenes, config.train = 20, dataclasses.replace(config.train, steps=4, batch_size=16, warmup_steps=1, log_every=1, device=device, precision="fp32")
        model, pairs = make(config)
        found.append(losses(train(model, pairs, config.train)))
    torch.testing.assert_close(found[1], found[0], rtol=2e-3, atol=2e-3)


def test_the_ladder_is_climbed():
    found = benchmark("tiny", "cuda", steps=1, batch_size=32)
    assert [rung["name"] for rung in found["rungs"]] == [rung.name for rung in ladder(torch.device("cuda"))]
    assert found["rungs"][-1]["parts"] == 1 and all(rung["memory"] > 0 for rung in found["rungs"]) and {"fp32", "tf32", "bf16"} == set(found["rates"])
