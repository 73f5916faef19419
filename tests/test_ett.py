"ETT: code vectors in place of ids, a gradient into the tokenizer, its stages, and captions."
import copy
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fuselip_edu import ett as e
from fuselip_edu.baselines import load_model
from fuselip_edu.batches import open_data, tokenize_pairs
from fuselip_edu.core import seed_everything
from fuselip_edu.fuselip import FuseLIP, FuseLIPConfig
from fuselip_edu.masking import mask_tokens
from fuselip_edu.pairs import Item
from fuselip_edu.shapes import render, scene_at
from fuselip_edu.sources import source_groups
from fuselip_edu.text import BPE
from fuselip_edu.titok import TINY_TOKENIZER, TiTok, TiTokConfig, TokenizerTrainConfig
from fuselip_edu.train import TrainConfig, backward, make_batch, preset, train

TEXT = BPE.train(["a red circle above a blue square"], 270)


def fresh(**changes):
    seed_everything(0)
    return e.ETT(e.ETTConfig(**({"width": 32, "layers": 2, "heads": 2} | changes)), TiTok.from_pretrained(TINY_TOKENIZER), TEXT)


def settings(**changes):
    return TrainConfig(**({"steps": 6, "batch_size": 16, "warmup_steps": 1, "mask_probability": 0.2, "log_every": 1, "checkpoint_every": 3, "device": "cpu"} | changes))


@pytest.fixture(scope="module")
def pairs(): return e.picture_sequences(source_groups(open_data("shapes", scenes=8, seed=0, size=32)), fresh())


@pytest.fixture(scope="module")
def coded(): return tokenize_pairs(source_groups(open_data("shapes", scenes=8, seed=0, size=32)), fresh().item_tokenizer)


def in_stage(model, stage):
    model.start_step({"projector": 0, "joint": 5, "frozen": 9}[stage], 10)
    assert model.stage == stage
    return model


# ---- the table

def test_words_keep_their_rows_and_codes_get_those_of_their_vectors():
    model = fresh()
    table, first = model.token_embedding.weight, model.vocab.first_code
    assert table.shape == (model.vocab.size, 32) and torch.equal(table[:first], model.token_embedding.words.weight)
    torch.testing.assert_close(table[first + 7], model.token_embedding.projector(model.image_tokenizer.quantize.codebook[7]))
    ids = torch.tensor([[3, first, first + 255]])
    assert torch.equal(model.token_embedding(ids), table[ids])
    assert "token_embedding.codebook" not in " ".join(model.state_dict()) and sum("quantize" in name for name in model.state_dict()) == 1  # held once


def test_the_gradient_goes_to_code_and_encoder():
    codes, z = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    quantized = z + (codes - z).detach()
    result, weights = e.both_ways(codes, quantized), torch.randn(3, 4)
    torch.testing.assert_close(result, codes)
    (result * weights).sum().backward()
    assert torch.equal(codes.grad, weights) and torch.equal(z.grad, weights)


# ---- the model

@pytest.mark.parametrize("packed", [False, True])
def test_pictures_give_what_their_codes_give(pairs, coded, packed):
    model, chosen = fresh().eval(), list(range(0, len(pairs), 3))
    seen, known = pairs.inputs(chosen), coded.inputs(chosen)
    assert pairs.groups == coded.groups and torch.equal(seen["lengths"], known["lengths"]) and len(seen["image"].unique()) < (seen["image"] >= 0).sum()
    with torch.no_grad(): torch.testing.assert_close(model(**seen, packed=packed), model(**known, packed=packed), atol=1e-5, rtol=0)
    masks = [mask_tokens(inputs["ids"], inputs["lengths"], model.vocab, 0.3, torch.rand(inputs["ids"].shape, generator=torch.Generator().manual_seed(1))) for inputs in (seen, known)]
    with torch.no_grad(): ours, theirs = (model(**inputs | {"ids": ids, "labels": labels}, packed=packed) for inputs, (ids, labels) in zip((seen, known), masks))
    for name in ("embeddings", "states", "logits"): torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-5, rtol=0)
    assert torch.equal(ours.targets, theirs.targets) and ours.own_loss is None and (ours.targets >= model.vocab.first_code).any()


def test_codes_are_those_of_fp32_in_half_precision_too():
    model, pixels = in_stage(fresh(projector_share=0.1, joint_share=0.7), "joint"), torch.stack([render(scene_at(index)) for index in range(200)])
    tokenizer, codes = model.image_tokenizer, model.image_tokenizer.encode(pixels)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert not torch.equal(tokenizer.quantize(tokenizer.latents(pixels.float() / 255))[1], codes)  # what would happen otherwise
        assert torch.equal(tokenizer.encode(pixels), codes) and torch.equal(model.look(pixels, torch.arange(200))[1], codes)


def test_pairs_that_are_read_as_training_goes_are_those_that_were_kept(pairs):
    model, groups = fresh().train(), list(source_groups(open_data("shapes", scenes=8, seed=0, size=32)))[:4]
    flat = [pair for group in groups for pair in group]
    live, kept = model.collate([pair.left for pair in flat] + [pair.right for pair in flat]), e.picture_sequences(groups, model).inputs(range(len(flat)))
    for name in ("ids", "lengths", "pixels"): assert torch.equal(live[name], kept[name]), name
    assert torch.equal(live["image"][:, None] == live["image"], kept["image"][:, None] == kept["image"])
    assert "pixels" not in model.eval().collate([pair.left for pair in flat]) and "pixels" not in fresh(tuned=False).train().collate([pair.left for pair in flat])


def test_each_picture_is_looked_at_once(pairs, monkeypatch):
    model, seen = in_stage(fresh(projector_share=0.1, joint_share=0.7), "joint"), []
    latents = model.image_tokenizer.latents
    monkeypatch.setattr(model.image_tokenizer, "latents", lambda pixels: seen.append(pixels) or latents(pixels))
    inputs = pairs.inputs(range(40))
    model(**inputs)
    assert len(seen) == 1 and len(seen[0]) == len(inputs["image"][inputs["image"] >= 0].unique()) < int((inputs["image"] >= 0).sum())
    row = torch.tensor([2, 0, 2, 1, 0])
    assert e.first_places(row, 3).tolist() == [1, 3, 0]


def test_the_tokenizers_loss_is_the_sum_that_the_paper_names(pairs):
    model = in_stage(fresh(alpha=0.5, projector_share=0.1, joint_share=0.7), "joint")
    inputs = pairs.inputs(range(20))
    encoded, shown, tokenizer = model(**inputs), inputs["image"] >= 0, model.image_tokenizer
    pixels = inputs["pixels"][shown].float() / 255
    z = F.normalize(tokenizer.latents(pixels), dim=-1)
    codes = tokenizer.quantize.decode(tokenizer.encode(pixels))
    reconstruction = (tokenizer.decoder(codes) - (pixels - tokenizer.config.pixel_mean) / tokenizer.config.pixel_std).square().mean()
    expected = 0.5 * (reconstruction + (codes - z).square().mean() * (1 + tokenizer.quantize.commitment)) * shown.float().mean()
    torch.testing.assert_close(encoded.own_loss, expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad(): assert isinstance(model(**inputs), torch.Tensor)  # nobody learns, so there is no loss


def test_the_task_reaches_encoder_and_codebook(pairs):
    model = in_stage(fresh(alpha=0.0, projector_share=0.1, joint_share=0.7), "joint")
    backward(model, make_batch(pairs.inputs(range(16)), model, settings(), 0), settings())
    for name in ("image_tokenizer.encoder.patch_embed.weight", "image_tokenizer.quantize.embedding.weight", "image_tokenizer.latent_tokens", "token_embedding.projector.0.weight"):
        assert model.get_parameter(name).grad.abs().sum() > 0, name


@pytest.mark.parametrize("stage", ["joint", "frozen"])
def test_parts_give_the_gradient_of_the_whole(pairs, stage):
    found = []
    for accumulation in (1, 2, 4):
        model, config = in_stage(fresh(projector_share=0.1, joint_share=0.7), stage), settings(batch_size=16, accumulation=accumulation)
        losses = backward(model, make_batch(pairs.inputs(range(16)), model, config, 0), config)
        found.append(({name: float(loss) for name, loss in losses.items()}, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    for losses, gradients in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-4) and gradients.keys() == found[0][1].keys()
        for name, gradient in gradients.items(): torch.testing.assert_close(gradient, found[0][1][name], rtol=1e-3, atol=1e-5 * float(found[0][1][name].abs().max() + 1), msg=lambda text: f"{name}: {text}")
    assert any(name.startswith("image_tokenizer.") for name in found[0][1]) == (stage == "joint")


# ---- stages and training

def moved(model, before): return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("stage,shares", [("projector", (1.0, 0.0)), ("joint", (0.0, 1.0)), ("frozen", (0.0, 0.0))])
def test_every_stage_moves_its_parts(pairs, stage, shares):
    model = fresh(projector_share=shares[0], joint_share=shares[1])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = train(model, pairs, settings(steps=3))
    found = moved(model, before)
    tokenizer, projector = ({name for name in before if part in name} for part in ("image_tokenizer.", "projector"))
    assert projector <= found and model.stage == stage and [("own" in row) for row in rows] == [stage == "joint"] * 3
    if stage == "projector": assert found == projector | {"logit_scale"} or found == projector
    if stage == "joint": assert "image_tokenizer.decoder.conv_out.weight" in found and len(found & tokenizer) > len(tokenizer) / 2
    if stage == "frozen": assert not found & tokenizer and any("resblocks" in name for name in found)


def test_the_tokenizer_learns_more_slowly(pairs):
    found = {}
    for rate in (0.0, 0.1):
        model = fresh(joint_share=1.0, tokenizer_rate=rate)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(model, pairs, settings(steps=2))
        found[rate] = {name for name in moved(model, before) if name.startswith("image_tokenizer.")}
    assert not found[0.0] and found[0.1]


@pytest.mark.parametrize("at", [2, 3, 4])
def test_resume_is_exact_in_every_stage(pairs, tmp_path, at):
    config, make = settings(checkpoint_every=1, keep=10), lambda: fresh(projector_share=0.34, joint_share=0.34)
    whole = make()
    train(whole, pairs, config, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if int(path.stem.removeprefix("step-")) > at: path.unlink()
    again = make()
    train(again, pairs, config, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines
    for name, p in whole.named_parameters(): assert torch.equal(p, again.get_parameter(name)), name


def test_frozen_vectors_learn_from_codes(coded):
    model = fresh(tuned=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, coded, settings(steps=2))
    assert not any(name.startswith("image_tokenizer.") for name in moved(model, before)) and "token_embedding.projector.0.weight" in moved(model, before)


def test_the_presets_build_and_a_trained_model_may_begin(tmp_path):
    small = lambda name, **changes: dataclasses.replace(preset(name, e.ALL_PRESETS), scenes=6, encoder=dataclasses.replace(preset(name, e.ALL_PRESETS).encoder, **changes))
    assert isinstance(e.build_model(small("tiny-ett"))[1], e.PictureSequences) and not hasattr(e.build_model(small("tiny-vectors"))[1], "images")
    trained, _ = e.build_model(dataclasses.replace(preset("tiny"), scenes=6))
    trained.save_pretrained(tmp_path / "fuselip")
    model, _ = e.build_model(small("tiny-ett", start=str(tmp_path / "fuselip")))
    assert torch.equal(model.transformer.resblocks[1].mlp.c_fc.weight, trained.transformer.resblocks[1].mlp.c_fc.weight)
    assert torch.equal(model.token_embedding.words.weight, trained.token_embedding.weight[:model.vocab.first_code])
    with pytest.raises(ValueError, match="encoder.start has layers 4, but 2 is asked for"): e.build_model(small("tiny-ett", start=str(tmp_path / "fuselip"), layers=2))
    with pytest.raises(ValueError, match="encoder.start has heads 4, but 2 is asked for"): e.build_model(small("tiny-ett", start=str(tmp_path / "fuselip"), heads=2))
    with pytest.raises(ValueError, match="encoder.start has context 64, but 80"): e.build_model(small("tiny-ett", start=str(tmp_path / "fuselip"), context=80))


@pytest.mark.parametrize("changes,said", [({"init": "x"}, "starts from a FuseLIP"), ({"data": "cache:x"}, "not a token cache")])
def test_what_it_cannot_start_from(changes, said):
    with pytest.raises(ValueError, match=said): e.build_model(dataclasses.replace(preset("tiny-ett", e.ALL_PRESETS), **changes))


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="joint_share is a share of the steps, between 0 and 1, not 1.5"): e.ETTConfig(joint_share=1.5)
    with pytest.raises(ValueError, match="more than all steps"): e.ETTConfig(projector_share=0.6, joint_share=0.6)
    blind = TiTok(dataclasses.replace(TiTokConfig(), has_decoder=False))
    with pytest.raises(ValueError, match="without decoder cannot be tuned"): e.ETT(e.ETTConfig(), blind, TEXT)
    e.ETT(e.ETTConfig(tuned=False), blind, TEXT)


def test_save_load_and_encode(pairs, tmp_path):
    model, items = fresh(joint_share=1.0), [e_item for group in source_groups(open_data("shapes", scenes=3, seed=3, size=32)) for pair in group for e_item in (pair.left, pair.right)][:30]
    train(model, pairs, settings(steps=2))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model"] == "ett" and "ETT.from_pretrained" in (tmp_path / "README.md").read_text()
    for loaded in (e.ETT.from_pretrained(tmp_path), load_model(tmp_path)):
        assert isinstance(loaded, e.ETT) and loaded.config == model.config
        torch.testing.assert_close(loaded.embed_items(items), model.embed_items(items))
        assert torch.equal(loaded.image_tokenizer.quantize.embedding.weight, model.image_tokenizer.quantize.embedding.weight)
    asked = f"from fuselip_edu import load_model; print(type(load_model({str(tmp_path)!r})).__name__)"  # where nobody has imported the chapter
    assert subprocess.run([sys.executable, "-c", asked], check=True, capture_output=True, text=True).stdout.strip() == "ETT"
    with pytest.raises(ValueError, match="does not describe a FuseLIP model but 'ett'"): FuseLIP.from_pretrained(tmp_path)


# ---- the tokenizer

def test_a_published_kind_of_tokenizer_lets_the_gradient_through():
    seed_everything(0)
    tokenizer = TiTok(TiTokConfig(image_size=32, patch_size=16, n_latents=16, width=64, layers=1, heads=2, decoder_width=64, decoder_layers=1, decoder_heads=2, legacy=True, pixel_channels=32))
    pixels = torch.rand(2, 3, 32, 32)
    quantized = tokenizer.quantize(tokenizer.latents(pixels))[0]
    errors = e.reconstruction_errors(tokenizer, quantized, pixels)
    errors.sum().backward()
    assert errors.shape == (2,) and tokenizer.encoder.patch_embed.weight.grad.abs().sum() > 0


def test_while_the_tokenizer_learns_items_come_in_pairs():
    model = fresh()
    with pytest.raises(ValueError, match="an even number of items, not 1"): model.train().collate([Item(text="a red circle")])
    assert len(model.eval().collate([Item(text="a red circle")])["ids"]) == 1


def test_a_starved_tokenizer_is_worse_and_is_the_same_otherwise():
    whole, pictures = TiTok.from_pretrained(TINY_TOKENIZER), torch.stack([render(scene_at(index)) for index in range(64)])
    starved = e.starve(whole, 4, pictures, TokenizerTrainConfig(steps=5, free_steps=3, lr=1e-4, device="cpu"))
    reports = [e.tokenizer_report(tokenizer, pictures) for tokenizer in (whole, starved)]
    assert starved.config.n_codes == 4 and reports[1]["used"] <= 4 and reports[1]["error"] > 2 * reports[0]["error"]
    assert reports[0]["perplexity"] > reports[1]["perplexity"] and not any(p.requires_grad for p in starved.parameters())


# ---- captions

def head_and_ids():
    model = fresh()
    seed_everything(1)
    ids = torch.tensor([model.vocab.sequence((), TEXT.encode("a red circle")), model.vocab.sequence((), TEXT.encode("a red circle"))])
    return model, e.CaptionHead(32, model.vocab, 16, longest=20, layers=2, heads=2), ids


def test_a_word_sees_the_picture_and_what_was_said():
    model, head, ids = head_and_ids()
    picture = torch.randn(2, 16, 32)
    with torch.no_grad():
        plain, changed = head(picture, ids), ids.clone()
        changed[:, 3:] = 5
        torch.testing.assert_close(head(picture, changed)[:, :3], plain[:, :3])
        assert not torch.allclose(head(picture, changed)[:, 3:], plain[:, 3:])
        other = picture.clone()
        other[:, -1] += 1
        assert (head(other, ids) - plain).abs().amax(-1).min() > 0  # every word sees the whole picture


def test_the_loss_asks_for_the_next_word_only():
    model, head, ids = head_and_ids()
    picture, lengths = torch.randn(2, 16, 32), torch.tensor([ids.shape[1], 3])
    scores = head(picture, ids[:, :-1]).log_softmax(-1)
    expected = [scores[row, at, ids[row, at + 1]] for row in (0, 1) for at in range(int(lengths[row]) - 1)]
    torch.testing.assert_close(head.loss(picture, ids, lengths), -torch.stack(expected).mean())


def test_it_learns_to_say_what_it_was_told():
    model, head, ids = head_and_ids()
    picture, lengths = torch.randn(2, 16, 32), torch.full((2,), ids.shape[1])
    ids[1, 2] = 7
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        head.loss(picture, ids, lengths).backward()
        optimizer.step()
    assert head.write(picture) == [row[1:-1] for row in ids.tolist()]  # without <sot> and <eot>


def test_vectors_of_pictures_for_both_kinds_of_model():
    model, pixels = fresh(), torch.stack([render(scene_at(index)) for index in range(3)])
    plain = FuseLIP(FuseLIPConfig(width=32, layers=1, heads=2), copy.deepcopy(model.image_tokenizer), TEXT)
    for one in (model, plain):
        vectors, own = e.picture_vectors(one, pixels)
        torch.testing.assert_close(vectors, one.token_embedding(one.image_tokenizer.encode(pixels) + one.vocab.first_code))
        assert vectors.shape == (3, 16, 32) and own is None
    assert e.picture_vectors(in_stage(fresh(projector_share=0.1, joint_share=0.7), "joint"), pixels)[1] > 0
