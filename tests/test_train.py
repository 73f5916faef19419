"The loop: resume, checkpoints, accumulation, shards, a full disk; pairs that are read when needed; the paper's presets."
import copy
import dataclasses
import functools
import json
import os
import pickle
import resource
import signal
import subprocess
import sys

import pytest
import torch

import fuselip_edu.batches
import fuselip_edu.train
from fuselip_edu.fuselip import FuseLIP, FuseLIPConfig
from fuselip_edu.sources import ShapesSource, source_groups
from fuselip_edu.batches import BadItems, SourcePairs, grouped_batches, origins, tokenize_pairs
from fuselip_edu.distributed import World
from fuselip_edu.pairs import Item, Pair
from fuselip_edu.text import BPE
from fuselip_edu.titok import TINY_TOKENIZER, TiTok
from fuselip_edu.train import (PRESETS, TrainConfig, backward, batches_from, build, epoch_batches, item_keys, load_checkpoint, make_batch, make_optimizer,
                               open_run, parameter_groups, preset, save_checkpoint, seconds_trained, share_of, steps_an_epoch, suspects, train, twins, update,
                               data_digest, digests, locked)
from fuselip_edu.ett import ALL_PRESETS, build_model


def small_model(seed=0, width=32):
    torch.manual_seed(seed)
    return FuseLIP(FuseLIPConfig(width=width, layers=2, heads=4), TiTok.from_pretrained(TINY_TOKENIZER), BPE.train(["a red circle", "flip"], 300))


@pytest.fixture(scope="module")
def pairs(): return tokenize_pairs(source_groups(ShapesSource(40)), small_model().item_tokenizer)


def settings(**changes): return TrainConfig(**{"steps": 12, "batch_size": 16, "log_every": 1, "warmup_steps": 4, "checkpoint_every": 4, "device": "cpu"} | changes)


def weights(model): return torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])


def test_one_seed_gives_one_run(pairs):
    one, two, other = (train(small_model(), pairs, settings(seed=seed)) for seed in (0, 0, 1))
    assert one == two and one != other


def test_a_cpu_keeps_the_memory_of_its_steps(pairs, monkeypatch):
    told = []
    monkeypatch.setattr(fuselip_edu.train, "keep_memory", lambda: told.append(True))
    train(small_model(), pairs, settings(steps=1, warmup_steps=0))
    assert told


@pytest.mark.parametrize("name", ["tiny-filip", "tiny-filip-patches", "tiny-sf", "tiny-mlf"])
def test_resume_is_exact_for_the_rivals_too(name, tmp_path):
    config = preset(name, ALL_PRESETS)
    config.scenes, config.train = 20, dataclasses.replace(config.train, steps=6, batch_size=16, log_every=1, checkpoint_every=2, device="cpu")
    (whole, pairs), (parts, _), (resumed, _) = (build_model(config) for _ in range(3))

    def stop(step, model):
        if step == 3: raise RuntimeError("killed")

    rows = train(whole, pairs, config.train, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"): train(parts, pairs, config.train, tmp_path / "parts", watch=stop)
    with torch.no_grad():
        for p in resumed.parameters(): p.add_(0.1 * p.requires_grad)  # the checkpoint decides, not the beginning
    assert train(resumed, pairs, config.train, tmp_path / "parts", resume=True) == rows and torch.equal(weights(resumed), weights(whole))


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
        values = backward(model, make_batch(pairs.inputs(range(16)), model, config, 3), config)
        found.append((float(values["loss"]), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for value, gradient in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-5)
        assert torch.allclose(gradient, found[0][1], atol=1e-5)


def test_packing_changes_neither_losses_nor_gradients(pairs):
    config, found = settings(mask_probability=0.2), []
    for packed in (False, True):
        model = small_model()
        model.forward = functools.partial(model.forward, packed=packed)
        values = backward(model, make_batch(pairs.inputs(range(16)), model, config, 0), config)
        found.append(({name: float(value) for name, value in values.items()}, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    largest = float(found[0][1].abs().max())
    torch.testing.assert_close(*(gradient for _, gradient in found), atol=1e-6 * largest, rtol=0)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_losses_in_chunks_are_the_losses(pairs, chunk):
    found = []
    for rows in (0, chunk):
        model, config = small_model(), settings(mask_probability=0.3, chunk=rows)
        values = backward(model, make_batch(pairs.inputs(range(16)), model, config, 0), config)
        found.append(({name: float(value) for name, value in values.items()}, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(*(gradient for _, gradient in found), atol=1e-6 * float(found[0][1].abs().max()), rtol=0)


def test_half_precision_trains_as_full_precision_does(pairs):
    found = {precision: [row["loss"] for row in train(small_model(), pairs, settings(precision=precision))] for precision in ("fp32", "bf16", "bf16-stream")}
    assert found["bf16"] != found["bf16-stream"] != found["fp32"]
    for precision in ("bf16", "bf16-stream"): torch.testing.assert_close(torch.tensor(found[precision]), torch.tensor(found["fp32"]), rtol=0.02, atol=0.02)
    model, kinds = small_model(), set()
    model.transformer.resblocks[1].register_forward_pre_hook(lambda block, inputs: kinds.add(inputs[0].dtype))
    train(model, pairs, settings(precision="bf16-stream", steps=1))
    assert kinds == {torch.bfloat16}
    with torch.no_grad(): assert model(**pairs.inputs(range(4))).dtype is torch.float32 and torch.float32 in kinds  # who only embeds is not concerned
    kinds.clear()
    train(model, pairs, settings(steps=1))  # and goes back to fp32
    assert kinds == {torch.float32}


def test_muon_is_pytorchs_for_matrices_and_adamw_for_the_rest():
    ours, theirs, config = small_model(), small_model(), settings(optimizer="muon")
    optimizer = make_optimizer(ours, config)
    own = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    inside = {name for name, p in own.items() if "resblocks" in name and p.ndim == 2}
    assert len(inside) == 4 * 2 and sum(len(group["params"]) for group in optimizer.param_groups) == len(own)
    muon = torch.optim.Muon([own[name] for name in inside], lr=10 * config.lr, weight_decay=config.weight_decay, momentum=0.95, adjust_lr_fn="original")
    rest = [{**group, "params": [p for p in group["params"] if not any(p is own[name] for name in inside)]} for group in parameter_groups(theirs, config.weight_decay)]
    adamw = torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.98), fused=True)
    for seed in range(3):
        torch.manual_seed(seed)
        before = {name: p.detach().clone() for name, p in own.items()}
        for name, p in ours.named_parameters():
            if p.requires_grad: p.grad = own[name].grad = torch.randn_like(p)
        for each in (optimizer, muon, adamw): each.step()
    for name, p in ours.named_parameters():
        if not p.requires_grad: continue
        step = (own[name] - before[name]).abs().max()
        close = 0.05 * step if name in inside else 1e-7  # theirs orthogonalises in bfloat16
        assert (p - own[name]).abs().max() <= close and step > 0, name


def test_the_papers_optimiser_is_adamw():
    optimizer = make_optimizer(small_model(), settings(optimizer="adamw"))
    assert type(optimizer) is torch.optim.AdamW and len(optimizer.param_groups) == 2
    assert {PRESETS[name].train.optimizer for name in PRESETS if name.startswith("fuselip")} == {"adamw"}
    with pytest.raises(ValueError, match="train.optimizer must be 'muon' or 'adamw', not 'sgd'"): TrainConfig(optimizer="sgd")


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


def test_compiling_on_a_cpu_is_refused(pairs):
    with pytest.raises(ValueError, match="train.compiled is for cuda, and the device is cpu"): train(small_model(), pairs, settings(compiled=True))
    with pytest.raises(ValueError, match="train.compiled goes with --train.precision bf16 or bf16-stream, not tf32"): settings(compiled=True, precision="tf32")


def test_old_checkpoints_go(pairs, tmp_path):
    train(small_model(), pairs, settings(keep=2), tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        f"step-{step:08d}.{end}" for step in (8, 12) for end in ("json", "safetensors")]


def test_a_loss_that_is_not_finite_stops_the_run(pairs):
    model = small_model()
    model.logit_bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss became nan at step 0; the embeddings of all its items .* are finite"): train(model, pairs, settings())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_pairs_whose_embeddings_are_not_finite_are_named(pairs, tmp_path, accumulation):
    model, config = small_model(), settings(batch_size=32, accumulation=accumulation, mask_probability=0.0)
    shards = epoch_batches(pairs.groups, config, 0)[0]
    batch = shards[0]
    ids = [set(pairs.left.pad([i])[0][0].tolist()) | set(pairs.right.pad([i])[0][0].tolist()) for i in batch]
    poison = next(token for token in range(model.vocab.n_text) if 0 < sum(token in row for row in ids) < 5 and token not in (0, model.vocab.sot, model.vocab.eot))
    model.token_embedding.weight.data[poison] = float("inf")
    with pytest.raises(FloatingPointError, match="at step 0; the embeddings of items") as caught: train(model, pairs, config, tmp_path / "run")
    note = json.loads((tmp_path / "run" / "not-finite.json").read_text())
    expected = [index for index, row in zip(batch, ids) if poison in row]
    assert [row["item"] for row in note["pairs"]] == expected and note["step"] == 0 and str(expected[0]) in str(caught.value)
    assert all(row["left"] + row["right"] for row in note["pairs"])
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    clean = small_model()
    batch = make_batch(pairs.inputs(range(32)), clean, dataclasses.replace(config, mask_probability=0.5), 0)
    assert (batch.inputs["labels"] >= 0).sum() > 100
    told = suspects(clean, batch, range(32), config)
    plain = suspects(clean, make_batch(pairs.inputs(range(32)), clean, config, 0), range(32), config)
    assert told == plain and all(row["finite"] for row in told)  # hidden words are named, too


def test_of_items_with_several_pairs_the_right_one_is_named():
    model = small_model()
    class Mixed(ShapesSource): # the first item is broken, the second has three pairs, the others one
        groups = property(lambda self: [[index] for index in range(6)])
        def __getitem__(self, index):
            if index == 1: raise ValueError("broken")
            return [Pair(Item(text=f"left {index}"), Item(text=f"right {index}"))] * (3 if index == 2 else 1)
    pairs = SourcePairs(Mixed(1), model, bad=BadItems(6, 0.5))
    shards = [[1, 2, 5], [3, 0, 4]]
    inputs = next(iter(pairs.batches([shards])))
    texts = [row["left"] for row in suspects(model, make_batch(inputs, model, settings(mask_probability=0.0), 0), origins(pairs, shards), settings())]
    assert origins(pairs, shards) == [2, 2, 2, 3, 0, 4] and texts == [f"left {item}" for item in origins(pairs, shards)]


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


@pytest.mark.parametrize("name", ["steps", "batch_size", "shards", "accumulation", "log_every", "keep"])
def test_nonsense_is_refused(name):
    with pytest.raises(ValueError, match=name): TrainConfig(**{name: 0})


@pytest.mark.parametrize("changes", [{"grad_norm": 0.0}, {"grad_norm": -1.0}, {"shards": 3}, {"accumulation": 3}, {"precision": "fp8"}, {"loss": "hinge"}, {"chunk": -1}])
def test_what_does_not_fit_is_refused(changes):
    with pytest.raises(ValueError, match=f"train.{[*changes][0]}"): TrainConfig(**changes)


def test_shards_are_the_papers_ranks(pairs):
    "One process with four shards, or two with two each, see what four processes of the original would."
    config = settings(batch_size=16, shards=4)
    whole = epoch_batches(pairs.groups, config, 1)
    ranks = [grouped_batches(pairs.groups, 4, config.seed, 1, rank, 4) for rank in range(4)]
    assert whole == list(zip(*ranks))
    halves = [epoch_batches(pairs.groups, config, 1, World(rank, 2)) for rank in range(2)]
    assert [a + b for a, b in zip(*halves)] == whole


def test_scattered_pairs_are_the_same_pairs(pairs):
    together, scattered = (epoch_batches(pairs.groups, settings(batch_size=32, grouped=grouped), 0) for grouped in (True, False))
    shared = lambda batches: sum(len({*group} & {*batch}) == len(group) for (batch,) in batches for group in pairs.groups if len(group) > 2)
    assert len(together) == len(scattered) and shared(together) > 10 * shared(scattered)
    assert {i for (batch,) in scattered for i in batch} <= set(range(len(pairs)))


def test_a_run_that_was_killed_while_it_wrote_leaves_nothing_behind(pairs, tmp_path):
    train(small_model(), pairs, settings(steps=4), tmp_path)
    (tmp_path / "model").mkdir()
    for place in ("checkpoints/.step-00000008.safetensors", ".speed.json", "model/.model.safetensors"): (tmp_path / f"{place}.123-0123abcd.tmp").write_bytes(b"half")
    train(small_model(), pairs, settings(steps=8), tmp_path, resume=True)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_run_is_trained_by_one_at_a_time(pairs, tmp_path):
    with locked(tmp_path / "run", World()), pytest.raises(RuntimeError, match="is being trained by another process"): train(small_model(), pairs, settings(steps=1), tmp_path / "run")
    assert len(train(small_model(), pairs, settings(steps=1), tmp_path / "run")) == 1  # the lock goes with its holder


def test_pieces_are_for_a_model_whose_layers_all_have_their_turn_in_every_batch(pairs):
    config = preset("tiny-sf", ALL_PRESETS)
    config.scenes, config.train = 20, dataclasses.replace(config.train, sharded=True, optimizer="adamw", device="cpu")
    with pytest.raises(ValueError, match="train.sharded is for FuseLIP, not for LateFusion"): build_model(config)


@pytest.mark.parametrize("changes, message", [({"beta1": 1.5}, "beta1 must be from 0 to below 1"), ({"beta2": 1.0}, "beta2"), ({"seed": 2**60}, "seed must lie between"), ({"seed": -2**60}, "seed")])
def test_what_no_optimiser_or_generator_takes_is_refused(changes, message):
    with pytest.raises(ValueError, match=message): settings(**changes)


def test_groups_that_cannot_be_dealt_are_refused_before_a_run_has_a_folder(tmp_path):
    rows = "".join(f"word {i},answer {i},one\n" for i in range(64))
    (tmp_path / "one.csv").write_text(f"instruction,text,group\n{rows}")
    config = preset("tiny")
    config.data, config.text_vocab, config.train = f"csv:{tmp_path / 'one.csv'}", 300, dataclasses.replace(config.train, batch_size=16, shards=2, device="cpu")
    with pytest.raises(ValueError, match="1 groups cannot be dealt to 2"): build(config)


def test_a_digest_tells_other_words_and_pictures_but_not_other_codes(pairs):
    model = small_model()
    first = model.vocab.first_code
    changed = copy.deepcopy(pairs)
    codes, words = ((changed.left.values >= first).nonzero()[0], (changed.left.values < first).nonzero()[0])
    changed.left.values[codes] = first + (changed.left.values[codes] + 1 - first) % 1024
    assert data_digest(changed, first) == data_digest(pairs, first)
    changed.left.values[words] += 1
    assert data_digest(changed, first) != data_digest(pairs, first)
    assert set(digests(model, pairs)) == {"data", "text tokenizer", "image tokenizer"}
    (rival, pixels), other = build_model(small_rival()), build_model(small_rival(seed=1))[1]
    assert set(digests(rival, pixels)) == {"data", "text tokenizer"} and data_digest(pixels, rival.vocab.first_code) != data_digest(other, rival.vocab.first_code)
    assert digests(rival, pixels) == digests(*build_model(small_rival()))


def small_rival(seed=0):
    config = preset("tiny-sf", ALL_PRESETS)
    config.scenes, config.train = 20, dataclasses.replace(config.train, seed=seed, device="cpu")
    return config


def test_resuming_what_is_not_there_yet_begins_it(tmp_path):
    assert open_run(tmp_path / "new", {"a": 1}, resume=True) == tmp_path / "new" and not (tmp_path / "new").exists()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".config.json.7-abc.tmp").write_text("{")  # of a run that was killed before it had begun
    open_run(tmp_path / "killed", {"a": 1}, resume=True)


def test_a_run_may_have_bad_items_before_it_has_a_folder(pairs, tmp_path):
    pairs = dataclasses.replace(pairs)
    pairs.bad = BadItems(1000, 0.01)
    pairs.bad.reasons[7] = "broken"
    train(small_model(), pairs, settings(steps=1), tmp_path / "new" / "run")
    assert json.loads((tmp_path / "new" / "run" / "bad.jsonl").read_text()) == {"item": 7, "reason": "broken"}


def test_the_last_step_is_watched_too(pairs):
    seen = []
    train(small_model(), pairs, settings(steps=7, log_every=5), watch=lambda step, model: seen.append(step))
    assert seen == [5, 7]


def test_what_several_processes_cannot_do_is_an_error(pairs):
    with pytest.raises(ValueError, match="batch_size 16 cannot be shared out evenly to 3 processes"): train(small_model(), pairs, settings(batch_size=16), world=World(0, 3))
    with pytest.raises(ValueError, match="accumulation 8 does not divide the 12 pairs"):
        train(small_model(), pairs, settings(batch_size=24, accumulation=8), world=World(0, 2))
    with pytest.raises(ValueError, match="loss sigmoid"): train(small_model(), pairs, settings(loss="softmax"), world=World(0, 2))


@pytest.mark.parametrize("shards", [1, 2, 3, 12])
@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_any_number_of_processes_shares_out_the_same_batches_and_hides_the_same_tokens(pairs, shards, size):
    model, config = small_model(), settings(batch_size=24, shards=shards, mask_probability=0.3, skip_twins=False)
    def first(world):
        step, shards, inputs = next(batches_from(1, pairs, config, world))
        indices = origins(pairs, shards)[share_of(config, world)[1]]
        hidden = make_batch(inputs, model, config, step, world).inputs["labels"]
        return indices, [[row[row >= 0].tolist() for row in side] for side in hidden.chunk(2)]
    indices, hidden = first(World())
    parts = [first(World(rank, size)) for rank in range(size)]
    assert sum((part[0] for part in parts), []) == indices and len(set(map(len, (part[0] for part in parts)))) == 1
    for side in (0, 1): assert sum((part[1][side] for part in parts), []) == hidden[side]
    assert sum(map(len, hidden[0])) > 24


def test_epochs_decide_the_steps(pairs):
    rows = train(small_model(), pairs, settings(epochs=1, batch_size=64))
    assert rows[-1]["step"] == len(pairs) // 64


def test_twins_are_pairs_that_share_a_side(pairs):
    inputs = pairs.inputs(range(60))
    left, right = (side.tolist() for side in inputs["ids"].chunk(2))
    expected = [[i != j and (left[i] == left[j] or right[i] == right[j]) for j in range(60)] for i in range(60)]
    assert twins(inputs).tolist() == expected and any(map(any, expected))
    wider = {"ids": torch.nn.functional.pad(inputs["ids"], (0, 7), value=3), "lengths": inputs["lengths"]}  # another process may pad further
    assert torch.equal(item_keys(wider), item_keys(inputs))


def test_a_source_that_is_read_when_needed_gives_the_same_batches(pairs):
    "Shapes are tensors, so they are final and tokenizing ahead or as needed is the same."
    model = small_model()
    fresh = SourcePairs(ShapesSource(40), model)
    batch = [[0, 1, 2], [7, 8, 3]]
    found = next(fresh.batches([batch]))
    expected = model.collate([item for side in ("left", "right") for shard in batch
                              for item in [getattr(pair, side) for index in shard for pair in fresh.source[index]][:len(shard)]])
    assert found["ids"].tolist() == expected["ids"].tolist() and len(found["ids"]) == 12


def test_background_readers_change_nothing():
    found = []
    for workers in (0, 2):
        fresh = SourcePairs(ShapesSource(12), small_model(), workers=workers)
        found.append([inputs["ids"].tolist() for inputs in fresh.batches([[batch] for batch in grouped_batches(fresh.groups, 8)])])
    assert found[0] == found[1]


def test_readers_that_are_started_anew_get_no_model(monkeypatch):
    "As on a Mac, where what a process needs is sent to it."
    fresh, sent = SourcePairs(ShapesSource(12), small_model()), []
    batches = [[batch] for batch in grouped_batches(fresh.groups, 8)]
    expected, plain = [inputs["ids"].tolist() for inputs in fresh.batches(batches)], fuselip_edu.batches.read_batches
    def sending(reader, *rest):
        sent.append(pickle.dumps(reader))
        return plain(pickle.loads(sent[0]), *rest)
    monkeypatch.setattr(fuselip_edu.batches, "read_batches", sending)
    assert [inputs["ids"].tolist() for inputs in fresh.batches(batches)] == expected and len(sent[0]) < 5000


def test_resuming_a_run_that_reads_as_it_goes_is_exact(tmp_path):
    def fresh(): return SourcePairs(ShapesSource(12), small_model())
    config = settings(steps=20, batch_size=16, checkpoint_every=5)
    rows = train(small_model(), fresh(), config, tmp_path / "whole")
    def stop(step, model):
        if step == 13: raise RuntimeError("killed")
    with pytest.raises(RuntimeError, match="killed"): train(small_model(), fresh(), config, tmp_path / "parts", watch=stop)
    assert train(small_model(seed=5), fresh(), config, tmp_path / "parts", resume=True) == rows


def test_the_papers_presets():
    for name, epochs, decay in (("cc3m", 8, 1.0), ("cc12m", 16, 0.5)):
        for size, width, heads in (("s", 384, 6), ("b", 512, 8)):
            config = preset(f"fuselip-{size}-{name}")
            assert (config.encoder.width, config.encoder.heads, config.encoder.layers, config.encoder.context) == (width, heads, 12, 180)
            wanted = {"epochs": epochs, "weight_decay": decay, "batch_size": 2048, "shards": 8, "lr": 1e-3, "warmup_steps": 12_000, "beta1": 0.9, "beta2": 0.98,
                      "grad_norm": 1.0, "mask_probability": 0.1, "mask_weight": 0.25, "skip_twins": False, "loss": "sigmoid"}
            assert {key: getattr(config.train, key) for key in wanted} == wanted
    changed = preset("tiny")
    changed.train.lr = 1.0
    assert PRESETS["tiny"].train.lr != 1.0


def test_the_steps_run_on_from_any_place(pairs):
    config = settings(batch_size=64, shards=2)
    config.steps = 2 * steps_an_epoch(pairs, config) + 1  # the last epoch is cut short
    steps = [(step, indices) for step, indices, _ in batches_from(0, pairs, config, World())]
    assert [step for step, _ in steps] == list(range(config.steps))
    for first in (1, steps_an_epoch(pairs, config), config.steps - 1, config.steps):
        assert [(step, indices) for step, indices, _ in batches_from(first, pairs, config, World())] == steps[first:]


def test_too_little_data_is_an_error_of_build():
    config = preset("tiny")
    config.scenes = 1
    for config.ahead in (True, False):
        with pytest.raises(ValueError, match="pairs do not fill one batch of 128; give more data or a smaller --train.batch-size"): build(config)


def test_too_little_data_writes_nothing(pairs, tmp_path):
    with pytest.raises(ValueError, match="do not fill one batch of 4096"): train(small_model(), pairs, settings(batch_size=4096), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- what is left of a run, and what may change when it goes on

def test_a_checkpoint_that_was_never_finished_does_not_count(pairs, tmp_path):
    model = small_model()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1))
    save_checkpoint(tmp_path, model, optimizer, 4)
    (tmp_path / "step-00000004.json").unlink()  # killed between the two
    assert load_checkpoint(tmp_path, model, optimizer) == 0
    save_checkpoint(tmp_path, model, optimizer, 2)
    assert load_checkpoint(tmp_path, model, optimizer) == 2


def test_what_was_just_saved_is_never_taken_away(tmp_path):
    model = small_model()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1))
    for step in (8, 12, 4): save_checkpoint(tmp_path, model, optimizer, step, keep=1)
    assert {path.stem for path in tmp_path.glob("*.safetensors")} == {"step-00000004", "step-00000012"}


def test_a_folder_with_checkpoints_is_resumed_or_refused(pairs, tmp_path):
    rows = train(small_model(), pairs, settings(), tmp_path)
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run; resume it, or give another folder"): train(small_model(), pairs, settings(), tmp_path)
    assert train(small_model(), pairs, settings(steps=16), tmp_path, resume=True)[:12] == rows


def test_half_a_line_in_the_log_does_not_stop_a_resume(pairs, tmp_path):
    train(small_model(), pairs, settings(), tmp_path)
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 13, "pai')
    train(small_model(), pairs, settings(steps=13), tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text().startswith(whole) and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 13


def test_the_clock_of_a_run_goes_on_when_it_is_resumed(pairs, tmp_path):
    train(small_model(), pairs, settings(steps=4), tmp_path)
    first = seconds_trained(tmp_path)
    assert first > 0 == seconds_trained(tmp_path / "nowhere")
    train(small_model(), pairs, settings(steps=8), tmp_path, resume=True)
    assert seconds_trained(tmp_path) > first
    spent = json.loads((tmp_path / "speed.json").read_text()) | {"seconds_in_all": 100.0}
    (tmp_path / "speed.json").write_text(json.dumps(spent))
    assert [row["step"] for row in train(small_model(), pairs, settings(steps=12, seconds=50), tmp_path, resume=True)][8:] == [9]  # its time was over


def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_goes_on_exactly(pairs, tmp_path):
    whole, resumed = small_model(), small_model(seed=3)
    rows = train(whole, pairs, settings(checkpoint_every=100), tmp_path / "whole")

    def press(step, model):
        if step == 6: signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt): train(small_model(), pairs, settings(checkpoint_every=100), tmp_path / "cut", watch=press)
    assert [path.stem for path in (tmp_path / "cut" / "checkpoints").glob("*.json")] == ["step-00000007"]
    assert train(resumed, pairs, settings(checkpoint_every=100), tmp_path / "cut", resume=True) == rows and torch.equal(weights(resumed), weights(whole))


def test_ctrl_c_in_the_last_step_is_not_lost(pairs, tmp_path):
    def press(step, model):
        if step == 2: signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt): train(small_model(), pairs, settings(steps=2), tmp_path, watch=press)
    assert [path.stem for path in (tmp_path / "checkpoints").glob("*.json")] == ["step-00000002"]


def test_infinite_gradients_do_not_reach_the_weights(pairs):
    model = small_model()
    optimizer, before = make_optimizer(model, settings()), weights(model).clone()
    for p in model.parameters(): p.grad = torch.zeros_like(p) if p.requires_grad else None
    model.token_embedding.weight.grad[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="the gradient's norm became inf"): update(model, optimizer, 1e-3, 1.0)
    assert torch.equal(weights(model), before)


def test_a_gradient_that_no_optimiser_would_use_stops_the_run(pairs):
    model = small_model()
    model.token_embedding.requires_grad_(False)
    optimizer = make_optimizer(model, settings())
    model.token_embedding.requires_grad_(True)
    backward(model, make_batch(next(iter(pairs.batches([[list(range(8))]]))), model, settings(), 0), settings())
    with pytest.raises(RuntimeError, match="the optimiser was not given token_embedding.weight, which have gradients"): update(model, optimizer, 1e-3, 1.0)


def test_what_a_run_is_may_not_change_and_how_it_is_done_may(tmp_path):
    config = dataclasses.asdict(preset("tiny"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = lambda **changes: config | {name: value for name, value in changes.items() if "_" != name[0]} | {"train": config["train"] | changes.get("train", {})}
    for changes in ({"max_bad": "1%"}, {"workers": 3}, {"train": {"accumulation": 8}}, {"train": {"device": "cpu", "chunk": 64, "keep": 5}}):
        assert open_run(tmp_path, other(**changes), resume=True) == tmp_path
    for changes, name in (({"scenes": 3}, "scenes"), ({"train": {"lr": 1.0}}, "train.lr"), ({"train": {"steps": 3}}, "train.steps")):
        with pytest.raises(ValueError, match=f"another configuration \\({name} is"): open_run(tmp_path, other(**changes), resume=True)


@pytest.mark.parametrize("name,value", [("seconds", -1), ("epochs", -1), ("lr", -0.1), ("warmup_steps", -3), ("weight_decay", -1), ("mask_weight", -1), ("mask_probability", 3)])
def test_what_is_less_than_nothing_is_refused(name, value):
    with pytest.raises(ValueError, match=f"train.{name} .*{value}"): TrainConfig(**{name: value})
