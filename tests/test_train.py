"The loop: schedule, parameter groups, resume, checkpoints, accumulation, a full disk."
import json
import os
import resource
import subprocess
import sys

import pytest
import torch

from fuselip_edu.fuselip import FuseLIP, FuseLIPConfig
from fuselip_edu.sources import ShapesSource, source_groups
from fuselip_edu.batches import tokenize_pairs
from fuselip_edu.text import BPE
from fuselip_edu.titok import TINY_TOKENIZER, TiTok
from fuselip_edu.train import TrainConfig, backward, learning_rate, load_checkpoint, make_batch, parameter_groups, save_checkpoint, train


def small_model(seed=0, width=32):
    torch.manual_seed(seed)
    return FuseLIP(FuseLIPConfig(width=width, layers=2, heads=4), TiTok.from_pretrained(TINY_TOKENIZER), BPE.train(["a red circle", "flip"], 300))


@pytest.fixture(scope="module")
def pairs(): return tokenize_pairs(source_groups(ShapesSource(40)), small_model().item_tokenizer)


def settings(**changes): return TrainConfig(**{"steps": 12, "batch_size": 16, "log_every": 1, "warmup_steps": 4, "checkpoint_every": 4, "device": "cpu"} | changes)


def weights(model): return torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])


def test_learning_rate_equals_the_original(golden):
    for case in json.loads((golden / "lr_schedule.json").read_text()).values():
        if "min_lr" in case: continue
        for step, rate in case["lr"].items():
            assert learning_rate(int(step), case["base"], case["warmup"], case["total"]) == pytest.approx(rate, rel=1e-9, abs=1e-18)


def test_weight_decay_names_equal_the_original(golden):
    names = json.loads((golden / "metadata.json").read_text())["fuse"]
    model = small_model()
    by_id = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ({by_id[id(p)] for p in group["params"]} for group in parameter_groups(model, 1.0))
    assert decayed == set(names["weight_decay"]) and kept == set(names["no_weight_decay"])


def test_one_seed_gives_one_run(pairs):
    one, two, other = (train(small_model(), pairs, settings(seed=seed)) for seed in (0, 0, 1))
    assert one == two and one != other


@pytest.mark.parametrize("accumulation", [1, 4])
def test_resume_is_exact(pairs, tmp_path, accumulation):
    config = settings(accumulation=accumulation)
    whole, parts = small_model(), small_model()
    rows = train(whole, pairs, config, tmp_path / "whole")

    def stop(step, model):
        if step == 6: raise RuntimeError("killed")  # two steps after the last checkpoint

    with pytest.raises(RuntimeError, match="killed"): train(parts, pairs, config, tmp_path / "parts", watch=stop)
    resumed = small_model(seed=5)
    assert train(resumed, pairs, config, tmp_path / "parts", resume=True) == rows
    assert torch.equal(weights(resumed), weights(whole))
    assert (tmp_path / "parts" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_accumulation_gives_the_same_gradient(pairs, loss):
    found = []
    for accumulation in (1, 2, 8):
        model, config = small_model(), settings(loss=loss, accumulation=accumulation, mask_probability=0.2)
        values = backward(model, make_batch(pairs, range(16), model, config, 3), config)
        found.append((values["loss"], torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for value, gradient in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-5)
        assert torch.allclose(gradient, found[0][1], atol=1e-5)


def test_length_buckets_do_not_change_the_gradient(pairs):
    model, config = small_model(), settings()
    batch = make_batch(pairs, range(16), model, config, 0)
    one, four = (model(batch.ids, batch.lengths, buckets=buckets) for buckets in (1, 4))
    assert torch.allclose(one, four, atol=1e-5)


def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, capsys):
    model = small_model()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1))
    for step in (4, 8): save_checkpoint(tmp_path, model, optimizer, step)
    newest = tmp_path / "step-00000008.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    assert load_checkpoint(tmp_path, model, optimizer) == 4
    assert "step-00000008" in capsys.readouterr().err


def test_a_checkpoint_of_another_shape_is_an_error(tmp_path):
    model = small_model()
    save_checkpoint(tmp_path, model, torch.optim.AdamW(parameter_groups(model, 0.1)), 4)
    other = small_model(width=64)
    with pytest.raises(ValueError, match="another shape"): load_checkpoint(tmp_path, other, torch.optim.AdamW(parameter_groups(other, 0.1)))


def test_old_checkpoints_go(pairs, tmp_path):
    train(small_model(), pairs, settings(keep=2), tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        f"step-{step:08d}.{end}" for step in (8, 12) for end in ("json", "safetensors")]


def test_a_loss_that_is_not_finite_stops_the_run(pairs):
    model = small_model()
    model.logit_bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 0"): train(model, pairs, settings())


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    "Files may not grow beyond 100 kB in the child process, as if the disk were full."
    model = small_model()
    save_checkpoint(tmp_path, model, torch.optim.AdamW(parameter_groups(model, 0.1)), 4)
    code = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_train import *
model = small_model()
try: save_checkpoint(Path({str(tmp_path)!r}), model, torch.optim.AdamW(parameter_groups(model, 0.1)), 8)
except OSError as error: print("OSError", error)
""".replace("from test_train import *", "from test_train import *; from pathlib import Path")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=limit, cwd=os.path.dirname(os.path.dirname(__file__)))
    assert done.stdout.startswith("OSError") and "step-00000008" in done.stdout, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004.json", "step-00000004.safetensors"]


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(tmp_path):
    model = small_model()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1))
    save_checkpoint(tmp_path, model, optimizer, 4)
    (tmp_path / "step-00000004.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="damaged"): load_checkpoint(tmp_path, model, optimizer)


def test_a_run_cut_by_the_clock_keeps_its_last_step(pairs):
    rows = train(small_model(), pairs, settings(steps=100, log_every=50, seconds=0.01))
    assert len(rows) == 1 and 1 <= rows[0]["step"] < 50


@pytest.mark.parametrize("name", ["steps", "batch_size", "accumulation", "log_every", "keep"])
def test_nonsense_is_refused(name):
    with pytest.raises(ValueError, match=name): TrainConfig(**{name: 0})
