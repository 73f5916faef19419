"FILIP: similarity against a quadruple loop, gradients, padding, both directions, chunks, ranks, selection, prompts, the index, save and load."
import dataclasses
import math
import multiprocessing
import os
import socket

import pytest
import torch
import torch.nn.functional as F

from fuselip_edu import filip as f
from fuselip_edu.baselines import load_model
from fuselip_edu.cli import main
from fuselip_edu.distributed import init_distributed
from fuselip_edu.evaluate import rank_queries, score_queries
from fuselip_edu.pairs import Item, Query
from fuselip_edu.shapes import render, scene_at
from fuselip_edu.sources import ShapesSource, source_groups
from fuselip_edu.batches import tokenize_pairs
from fuselip_edu.text import BPE
from fuselip_edu.titok import TINY_TOKENIZER, TiTok, TiTokConfig
from fuselip_edu.train import TrainConfig, backward, make_batch, train

TEXTS = ["a red circle and a blue square", "turn it", "what colour is the circle?"]


def tokens(counts, d=6, seed=0, dtype=torch.float64): # items of so many tokens, zero vectors behind them
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.utils.rnn.pad_sequence([F.normalize(torch.randn(n, d, generator=generator, dtype=dtype), dim=-1) for n in counts], batch_first=True)


LEFT, RIGHT = (3, 1, 5, 2), (2, 4, 1, 3)


def by_loops(left, right): # item, item, token, token
    found = torch.zeros(len(left), len(right), dtype=left.dtype)
    for i, one in enumerate(left):
        for j, other in enumerate(right):
            best = []
            for token in one:
                if not token.any(): continue
                matches = [sum(a * b for a, b in zip(token.tolist(), partner.tolist())) for partner in other if partner.any()]
                best.append(max(matches))
            found[i, j] = sum(best) / len(best)
    return found


@pytest.mark.parametrize("chunk", [0, 1, 3, 100])
def test_similarity_is_that_of_the_loops(chunk):
    left, right = tokens(LEFT), tokens(RIGHT, seed=1)
    torch.testing.assert_close(f.token_similarity(left, right, chunk), torch.stack([by_loops(left, right), by_loops(right, left).T]), atol=1e-12, rtol=0)
    assert (f.token_similarity(left, right)[0] - f.token_similarity(left, right)[1]).abs().max() > 0.05  # each side has its own view


def test_padding_changes_nothing():
    left, right = tokens(LEFT), tokens(RIGHT, seed=1)
    wide = F.pad(left, (0, 0, 0, 4)), F.pad(right, (0, 0, 0, 7))
    torch.testing.assert_close(f.token_similarity(*wide), f.token_similarity(left, right))
    negative = -right.abs(), left.abs()  # all products are below zero, the padding's is not
    torch.testing.assert_close(f.token_similarity(*negative)[0], by_loops(*negative))
    with pytest.raises(ValueError, match="without a single token"): f.token_similarity(left, torch.zeros(2, 3, 6, dtype=torch.float64))


@pytest.mark.parametrize("chunk", [0, 2])
def test_losses_and_gradients_are_those_written_out(chunk):
    left, right, scale, bias = tokens(LEFT).requires_grad_(), tokens(RIGHT, seed=1).requires_grad_(), torch.tensor(7.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    views = by_loops(left.detach(), right.detach()), by_loops(right.detach(), left.detach())
    written = sum(-(scale * view[i, i] - (scale * view[i]).logsumexp(0)) for view in views for i in range(4)) / 8
    assert f.filip_loss(left, right, scale, None, chunk).detach().item() == pytest.approx(float(written), abs=1e-12)
    yes_no = sum(math.log1p(math.exp(-(1 if i == j else -1) * float(scale * view[i, j] + bias))) for view in views for i in range(4) for j in range(4)) / 8
    assert f.filip_loss(left, right, scale, None, chunk, bias).detach().item() == pytest.approx(yes_no, abs=1e-12)
    real = [(side.detach() != 0).any(-1, keepdim=True) for side in (left, right)]
    def on_real(loss): return lambda a, b: loss(a * real[0], b * real[1])
    assert torch.autograd.gradcheck(on_real(lambda a, b: f.filip_loss(a, b, scale, None, chunk)), (left, right))
    assert torch.autograd.gradcheck(on_real(lambda a, b: f.filip_loss(a, b, scale, None, chunk, bias)), (left, right))


def test_twins_are_no_negatives():
    left, right, scale = tokens(LEFT), tokens(RIGHT, seed=1), 7.0
    same = torch.zeros(4, 4, dtype=torch.bool)
    same[0, 2] = True
    views = f.token_similarity(left, right)
    written = 0.0
    for view, dim in zip(views, (1, 0)): written += sum(-(scale * view.masked_fill(same, -torch.inf)).log_softmax(dim)[i, i] for i in range(4)) / 8
    assert float(f.filip_loss(left, right, scale, same)) == pytest.approx(float(written))
    assert f.filip_loss(left, right, scale, same, bias=-3.0) < f.filip_loss(left, right, scale, bias=-3.0)


def test_padding_is_no_partner_of_what_is_sent():
    left, right = -tokens((3,)).abs(), tokens((1, 4), seed=1).abs()  # every match is below zero, the padding's is not
    best = (left[0] @ right[(right != 0).any(-1)].T).amax(-1)
    assert torch.equal(f.select_tokens(left, right, 0.3)[0, 0], left[0, best.argmax()])


def test_the_tokens_that_are_sent_are_those_with_the_best_match():
    left, right = tokens((4, 2, 7)), tokens((3, 3, 3), seed=1)
    sent = f.select_tokens(left, right, 0.5)
    assert [(item != 0).any(-1).sum().item() for item in sent] == [2, 1, 4]
    for item, kept in zip(left, sent):
        best = torch.stack([(token @ right.flatten(0, 1).T).max() for token in item if token.any()])
        wanted = item[best.topk(int((kept != 0).any(-1).sum())).indices]
        assert {tuple(row) for row in kept.tolist() if any(row)} == {tuple(row) for row in wanted.tolist()}


# ---- ranks

TWINS = torch.zeros(6, 6, dtype=torch.bool)
for one, other in ((0, 4), (1, 2), (3, 5)): TWINS[one, other] = TWINS[other, one] = True


def on_rank(rank, world, port, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with init_distributed("cpu", timeout=30) as here:
        left, right = tokens((3, 1, 5, 2, 4, 2)).requires_grad_(), tokens((2, 4, 1, 3, 1, 1), seed=1).requires_grad_()
        share = slice(6 // world * rank, 6 // world * (rank + 1))
        mine = [side[share][:, :int((side[share] != 0).any(-1).sum(1).max())] for side in (left, right)]  # ranks differ in their longest item
        found = {}
        for bias in (None, -3.0):
            for fraction, same in ((1.0, None), (0.5, None), ("twins", TWINS[share])):
                left.grad = right.grad = None
                loss = f.sharded_filip_loss(*mine, torch.tensor(7.0, dtype=torch.float64), here, 1.0 if fraction == "twins" else fraction, bias=bias, same=same)
                loss.backward(retain_graph=True)
                for name, value in (("loss", loss.detach()), ("left", left.grad), ("right", right.grad)): found[f"{name} {bias} {fraction}"] = value.clone()
        torch.save(found, folder / f"{rank}.pt")


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_have_the_loss_of_one_process(world, tmp_path):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    processes = [multiprocessing.get_context("spawn").Process(target=on_rank, args=(rank, world, port, tmp_path)) for rank in range(world)]
    for process in processes: process.start()
    for process in processes: process.join(100)
    assert [process.exitcode for process in processes] == [0] * world
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    for bias, way, same in ((None, 1.0, None), (-3.0, 1.0, None), (None, "twins", TWINS), (-3.0, "twins", TWINS)):
        left, right = tokens((3, 1, 5, 2, 4, 2)).requires_grad_(), tokens((2, 4, 1, 3, 1, 1), seed=1).requires_grad_()
        whole = f.filip_loss(left, right, torch.tensor(7.0, dtype=torch.float64), same, bias=bias)
        whole.backward()
        of = lambda name, fraction: [rank[f"{name} {bias} {fraction}"] for rank in found]
        assert float(sum(of("loss", way))) / world == pytest.approx(float(whole.detach()), abs=1e-12)
        for name, side in (("left", left), ("right", right)): torch.testing.assert_close(sum(of(name, way)) / world, side.grad, atol=1e-12, rtol=0)
        assert all(abs(float(some - all_)) > 1e-6 for some, all_ in zip(of("loss", 0.5), of("loss", 1.0))) and all(gradient.isfinite().all() for gradient in of("left", 0.5))


# ---- the model

@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    make = lambda **changes: f.FILIP(f.FILIPConfig(width=32, layers=2, features=16, **changes), TiTok.from_pretrained(TINY_TOKENIZER), BPE.train(TEXTS, 300)).eval()
    return {"codes": make(), "patches": make(patch_size=8)}


ITEMS = [Item(render(scene_at(0))), Item(text=TEXTS[0]), Item(render(scene_at(1)), TEXTS[2]), Item(text="turn it"), Item(render(scene_at(2)), "turn it")]


@pytest.mark.parametrize("kind", ["codes", "patches"])
def test_an_items_tokens_do_not_depend_on_its_batch(models, kind):
    model, words = models[kind], models[kind].item_tokenizer.text_tokenizer
    together = model.embed_items(ITEMS)
    for item, found in zip(ITEMS, together):
        torch.testing.assert_close(model.embed_items([item])[0], found, atol=1e-5, rtol=0)
        assert len(found) == 16 * (item.image is not None) + (len(words.encode(item.text)) if item.text else 0)
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(len(found)))
    image, both = together[0], model.embed_items([Item(ITEMS[0].image, "turn it")])[0]
    torch.testing.assert_close(both[:16], image, atol=1e-5, rtol=0)  # the towers do not see each other


def test_sizes_are_those_of_the_others():
    from fuselip_edu.train import PRESETS, build
    trained = lambda model: sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = f.FILIP_PRESETS["tiny-filip"]
    ours, theirs = (dataclasses.replace(one, scenes=60) for one in (config, PRESETS["tiny"]))
    assert trained(f.build_filip(ours)[0]) == pytest.approx(trained(build(theirs)[0]), rel=0.05)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_it_trains_in_the_common_loop_with_accumulation_and_chunks(loss):
    torch.manual_seed(0)
    make = lambda: (torch.manual_seed(0), f.FILIP(f.FILIPConfig(width=32, layers=1, features=16, loss=loss), TiTok.from_pretrained(TINY_TOKENIZER), BPE.train(TEXTS, 300)))[1]
    pairs, found = tokenize_pairs(source_groups(ShapesSource(30)), make().item_tokenizer), []
    for changes in ({}, {"accumulation": 2}, {"chunk": 3}):
        model, config = make(), TrainConfig(batch_size=16, mask_probability=0.0, device="cpu", **changes)
        values = backward(model, make_batch(pairs.inputs(range(16)), model, config, 0), config)
        found.append((float(values["loss"]), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for value, gradient in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-5 * float(found[0][1].abs().max()), rtol=0)
    rows = train(make(), pairs, TrainConfig(steps=30, batch_size=32, mask_probability=0.0, device="cpu", warmup_steps=5))
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_patches_train_too(tmp_path):
    config = dataclasses.replace(f.FILIP_PRESETS["tiny-filip-patches"], scenes=20, train=TrainConfig(steps=2, batch_size=16, accumulation=2, mask_probability=0.0, device="cpu"))
    config.encoder = f.FILIPConfig(width=32, layers=1, features=16, patch_size=8)
    model, pairs = f.build_filip(config)
    rows = train(model, pairs, config.train)
    assert math.isfinite(rows[-1]["loss"])
    with pytest.raises(ValueError, match="patches of 7 pixels do not divide an image of 32"): f.FILIP(f.FILIPConfig(patch_size=7), model.image_tokenizer, model.item_tokenizer.text_tokenizer)


def test_words_that_are_no_words_of_the_text_are_refused(models):
    with pytest.raises(ValueError, match="too long, or its tokens are not"): f.word_map(models["codes"], ITEMS[0].image, ["red"] * 80)


def test_tokens_that_form_no_square_have_no_places():
    tokenizer = TiTok(TiTokConfig(n_latents=12))
    model = f.FILIP(f.FILIPConfig(layers=1), tokenizer, BPE.train(["a red circle"], 300)).eval()
    with pytest.raises(ValueError, match="12 tokens here, which form no square"): f.localisation(model, [scene_at(0, count=2)])


def test_prompts_are_averaged_after_comparing(models):
    model, prompts = models["codes"], (Item(text=TEXTS[0]), Item(text="turn it"))
    query = Query(ITEMS[0], (prompts, Item(text=TEXTS[2])))
    scores = score_queries(model, [query])[0]
    singles = score_queries(model, [Query(ITEMS[0], prompts)])[0]
    assert float(scores[0]) == pytest.approx(float(singles.mean()), abs=1e-6)
    a, b = model.embed_items([ITEMS[0], Item(text=TEXTS[2])])
    table = a @ b.T
    assert float(scores[1]) == pytest.approx(float(table.amax(1).mean() + table.amax(0).mean()) / 2, abs=1e-5)
    assert rank_queries(model, [query]).shape == (1,)


def test_the_index_finds_what_comparing_finds_and_says_what_it_costs(models):
    model = models["codes"]
    index = f.TokenIndex(model, ITEMS)
    values, numbers = index.search(ITEMS[1], 2)
    assert int(numbers[0]) == 1 and float(values[0]) == pytest.approx(1.0, abs=2e-3)
    assert index.bytes_per_item == 2 * 16 * sum(map(len, model.embed_items(ITEMS))) / len(ITEMS)


def test_a_text_that_is_cut_beside_patches_is_reported_like_one_beside_codes(models):
    long, told = Item(render(scene_at(0)), "red " * 200), []
    for model in models.values():
        model.item_tokenizer.warned = False
        with pytest.warns(UserWarning, match=r"a text of \d+ tokens does not fit the context of \d+ and was cut; it begins 'red red") as caught:
            inputs = model.collate([long, long])
        assert len(caught) == 1 and inputs["ids"].shape == (2, model.vocab.context)
        told.append(str(caught[0].message))
    assert told[0] == told[1]


@pytest.mark.parametrize("kind", ["codes", "patches"])
def test_a_saved_model_is_the_same(models, kind, tmp_path):
    models[kind].save_pretrained(tmp_path)
    for loaded in (f.FILIP.from_pretrained(tmp_path), load_model(tmp_path)):
        assert all(torch.equal(a, b) for a, b in zip(loaded.embed_items(ITEMS), models[kind].embed_items(ITEMS)))
    with pytest.raises(ValueError, match="does not describe a LateFusion model but 'filip'"): load_model.__globals__["LateFusion"].from_pretrained(tmp_path)


def test_the_commands(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "--preset", "tiny-filip", "--scenes", "40", "--train.steps", "4", "--train.device", "cpu", "--run", str(run)]) == 0
    assert main(["evaluate", "--model", str(run), "--queries", "20"]) == 0 and "tgit" in capsys.readouterr().out
    assert main(["embed", "--model", str(run), "--texts", "a", "b"]) == 1 and "a FILIP model has a vector for every token" in capsys.readouterr().err
    assert main(["evaluate", "--model", str(run), "--suite", "paper", "--out", str(tmp_path / "suite")]) == 1 and "compare items with" in capsys.readouterr().err
    assert main(["train", "--preset", "tiny-filip", "--encoder.patch-size", "8", "--run", str(tmp_path / "other")]) == 1 and "patches are pixels, which are not kept; give --no-ahead" in capsys.readouterr().err
    for wrong in ({"loss": "hinge"}, {"fraction": 0.0}, {"heads": 5}):
        with pytest.raises(ValueError): f.FILIPConfig(**wrong)
