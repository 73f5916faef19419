"On another device, in disguise (elsewhere.py): the numbers of a CPU, and nothing that mixes the two. On a real one: test_cuda.py."
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing

import pytest
import torch
from elsewhere import READY, install

from fuselip_edu.batches import open_data, tokenize_pairs
from fuselip_edu.core import seed_everything
from fuselip_edu.ett import ALL_PRESETS, CaptionHead, build_model, picture_vectors, starve, tokenizer_report
from fuselip_edu.evaluate import evaluate, shapes_tasks
from fuselip_edu.filip import FILIP, FILIPConfig, TokenIndex, select_tokens, word_map
from fuselip_edu.fuselip import FuseLIP, FuseLIPConfig
from fuselip_edu.pairs import Item
from fuselip_edu.reproduce import fusion, image_attention, modality_space, run_trial
from fuselip_edu.scaling import benchmark
from fuselip_edu.shapes import render, scene_at
from fuselip_edu.sources import source_groups
from fuselip_edu.text import BPE
from fuselip_edu.titok import TINY_TOKENIZER, TiTok, TokenizerTrainConfig, train_tokenizer
from fuselip_edu.train import TrainConfig, preset, train

pytestmark = pytest.mark.skipif(not READY, reason="needs a PyTorch in which Python can stand in for a device (2.9)")
PLACES = ("cpu", "elsewhere")


@pytest.fixture(scope="module")
def apart():
    "A process that has the device, as a function: what to do there, and with what."
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), install) as pool: yield lambda work, *args: pool.submit(work, *args).result()


def fresh(kind=FuseLIP, config=FuseLIPConfig(width=64, layers=2, heads=2)):
    seed_everything(0)
    return kind(config, TiTok.from_pretrained(TINY_TOKENIZER), BPE.train(["a red circle above a blue square"], 270))


def pictures(n): return torch.stack([render(scene_at(index), 32) for index in range(n)])


def close(one, other, tolerance=1e-4): torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=tolerance, atol=tolerance)


@functools.cache
def exam(): return {name: queries[:12] for name, queries in shapes_tasks(20, 0, 32).items() if name in ("tgit", "vqa", "position")}


def mixed(place):
    "What each attempt says."
    said, far, near = [], torch.ones(3).to(place), torch.ones(3)
    for attempt in (lambda: far + near, lambda: far * 2, lambda: torch.nn.Linear(3, 2)(far), lambda: far.numpy(), lambda: far.double(), lambda: far[torch.tensor([0, 2])], lambda: far.cpu().numpy(),
                    lambda: torch.zeros(()).add_(far.sum()), lambda: far + torch.ones(()), lambda: torch.stack([far.sum(), torch.ones(())])):
        try: said.append(float(attempt().sum()))
        except (RuntimeError, TypeError) as error: said.append(type(error).__name__)
    return said


def test_the_device_refuses_what_a_gpu_refuses(apart):
    assert apart(mixed, "elsewhere") == ["RuntimeError", 6, "RuntimeError", "TypeError", "TypeError", 2, 3, "RuntimeError", 6, "RuntimeError"]


def losses(changes, folder):
    "Of a run on either device, and the one elsewhere once more from its checkpoint in the middle."
    pairs, found = tokenize_pairs(source_groups(open_data("shapes", scenes=20, seed=0, size=32)), fresh().item_tokenizer), []
    for place in PLACES:
        config = TrainConfig(**({"steps": 4, "batch_size": 16, "warmup_steps": 1, "mask_probability": 0.1, "log_every": 1, "checkpoint_every": 2, "precision": "fp32", "device": place} | changes))
        found.append([row["loss"] for row in train(fresh(), pairs, config, folder / place)])
    last = list((folder / "elsewhere" / "checkpoints").glob("step-00000004.*"))
    assert len(last) == 2
    for path in last: path.unlink()
    found.append([row["loss"] for row in train(fresh(), pairs, config, folder / "elsewhere", resume=True)])
    return found


@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw", "chunk": 8}, {"accumulation": 4}, {"loss": "softmax", "chunk": 0}, {"skip_twins": False, "mask_probability": 0.0}], ids=str)
def test_training_is_that_of_a_cpu(apart, tmp_path, changes):
    plain, there, again = apart(losses, changes, tmp_path)
    close(there, plain)
    close(again, plain)


def trial(name, folder):
    "Losses and answers of a model from its data to its exam, on either device."
    found, answers = [], []
    for place in PLACES:
        config = preset(name, ALL_PRESETS)
        config.scenes, config.train = 12, dataclasses.replace(config.train, steps=3, batch_size=8, warmup_steps=1, log_every=1, device=place, precision="fp32")
        result = run_trial(config, folder / place, exam(), {"tgit": exam()["tgit"]}, 1)
        found.append([json.loads(line)["loss"] for line in (folder / place / "metrics.jsonl").read_text().splitlines()] + [result["flops_per_pair"] / 1e8])
        answers.append("".join(result["answers"].values()))
    return found, answers, result


@pytest.mark.parametrize("name", ["tiny", "tiny-sf", "tiny-mlf", "tiny-filip", "tiny-filip-patches", "tiny-ett", "tiny-vectors"])
def test_every_model_goes_its_whole_way(apart, tmp_path, name):
    (plain, there), answers, result = apart(trial, name, tmp_path)
    close(there, plain, 0.02)  # its pictures were tokenized there, and a code that is nearly another may be the other
    assert result["answers"].keys() == exam().keys() and result["curve"]
    assert sum(one == other for one, other in zip(*answers)) > 0.7 * len(answers[0])


def looks(place):
    "At a trained FuseLIP, in every way that the book has."
    model = fresh().to(place).eval()
    images, texts = list(pictures(6)), ["a red circle"] * 6
    items = [Item(image, text) for image, text in zip(images, texts)]
    return {"image": model.encode_image(images), "text": model.encode_text(texts), "both": model.encode_multimodal(images, texts),
            "attention": image_attention(model, items), "accuracies": torch.tensor([row["accuracy"] for row in evaluate(model, exam()).values()]),
            "blocked": torch.tensor(fusion(model, exam(), ("tgit",), 2)["blocked"]["tgit"]), "points": torch.tensor(len(modality_space(model, 3)["points"]["both"]))}


def tokens(place):
    "Of a FILIP, searched, mapped, and chosen from."
    model = fresh(FILIP, FILIPConfig(layers=2, patch_size=8)).to(place).eval()
    items = [Item(image) for image in pictures(6)]
    sides = [torch.nn.utils.rnn.pad_sequence(model.embed_items(some), batch_first=True).to(place) for some in (items, [Item(text="red"), Item(text="a blue square")])]
    return {"map": word_map(model, items[0].image, ["red", "circle"]), "found": TokenIndex(model, items).search(Item(text="red circle"), 3)[0], "chosen": select_tokens(*sides).cpu()}


@pytest.mark.parametrize("work", [looks, tokens])
def test_what_is_done_with_a_model(apart, work):
    here, there = work("cpu"), apart(work, "elsewhere")
    for name, value in here.items():  # a code may be another there, and so a picture's row, and the answer to one of twelve queries
        assert float(((there[name] - value).abs() < (0.2 if name in ("accuracies", "blocked") else 1e-3)).float().mean()) > 0.7, name


def tokenizers(place, folder):
    "Trained with a pause, starved, reported on."
    recipe = TokenizerTrainConfig(steps=8, batch_size=4, free_steps=3, warmup_steps=1, log_every=1)
    tokenizer = fresh().image_tokenizer.to(place)
    rows = train_tokenizer(tokenizer, pictures(20), recipe, keep=folder / "half")  # as it was after five steps of the eight
    again = train_tokenizer(fresh().image_tokenizer.to(place), pictures(20), recipe, keep=folder / "half")
    starved = starve(tokenizer, 8, pictures(20), dataclasses.replace(recipe, steps=2, free_steps=1))
    assert (folder / "half").exists() and again == rows
    return [row["error"] for row in rows], [tokenizer_report(one, pictures(10))["error"] for one in (tokenizer, starved)]


def test_a_tokenizer_is_trained(apart, tmp_path):
    for name in PLACES: (tmp_path / name).mkdir()
    for here, there in zip(tokenizers("cpu", tmp_path / "cpu"), apart(tokenizers, "elsewhere", tmp_path / "elsewhere")): close(there, here, 0.01)


def captions(place):
    "What a head says of pictures before it has learned anything, and what that costs."
    config = preset("tiny-ett", ALL_PRESETS)
    config.scenes, config.train = 20, dataclasses.replace(config.train, batch_size=16, device=place)
    model, _ = build_model(config)
    vectors, _ = picture_vectors(model, pictures(4).to(place))
    seed_everything(0)
    head, ids = CaptionHead(vectors.shape[-1], model.vocab, vectors.shape[1]).to(place), torch.tensor([[model.vocab.sot, 5, 6, model.vocab.eot]] * 4).to(place)
    loss = head.loss(vectors, ids, torch.full((4,), 4).to(place))
    loss.backward()
    return float(loss.detach()), head.write(vectors.detach())


def test_captions_are_written(apart):
    here, there = captions("cpu"), apart(captions, "elsewhere")
    close(there[0], here[0])
    assert there[1] == here[1] and len(here[1]) == 4


def test_the_ladder_is_climbed(apart): assert all(rung["pairs_per_second"] > 0 for rung in apart(benchmark, "tiny", "elsewhere", 1, 16)["rungs"])
