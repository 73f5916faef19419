"Whole runs: the paper's presets at full size on made data in the real formats, fine-tuning a published checkpoint, several processes."
import json
import os
import subprocess
import sys

import pytest
import torch

from fuselip_edu.baselines import BASELINE_PRESETS, load_model
from fuselip_edu.batches import open_data
from fuselip_edu.core import write_json
from fuselip_edu.sources import source_groups
from test_checkpoints import S128, TITOK_CONFIG, fuselip_config, fuselip_encoder, small, small_titok, tensors, titok_decoder, titok_encoder  # noqa: F401
from test_data import jpeg, make_cc3m, make_cc3m_vqa, make_hq_edit, write

THREADS = os.environ | {"OMP_NUM_THREADS": "2"}


def command(*words, launcher=(), root):
    return subprocess.run([sys.executable, *launcher, "-m", *(["--"] if launcher else []), "fuselip_edu", *map(str, words)], capture_output=True, text=True, cwd=root, env=THREADS)


def make_vg(folder):
    "Two pictures, and of each four regions and four questions: groups are of four."
    for i in (1, 2): write(folder / f"VG_100K/{i}.jpg", jpeg(i))
    regions = [{"id": i, "regions": [{"region_id": j, "image_id": i, "phrase": "a red wall", "x": j, "y": 1, "width": 30, "height": 36} for j in range(4)]} for i in (1, 2)]
    write(folder / "region_descriptions.json", regions)
    write(folder / "question_answers.json", [{"id": i, "qas": [{"qa_id": j, "image_id": i, "question": "What colour?", "answer": "Red."} for j in range(4)]} for i in (1, 2)])


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    "The five sets of the paper's mixture in one folder."
    folder = tmp_path_factory.mktemp("data")
    for make, place in ((make_cc3m, "cc3m"), (make_cc3m_vqa, "cc3m"), (make_hq_edit, "hq-edit"), (make_vg, "vg")): make(folder / place)
    return folder


@pytest.fixture(scope="module")
def full_titok(tmp_path_factory):
    "TiTok-S-128 with random weights, in the published layout."
    folder = tmp_path_factory.mktemp("titok")
    config = TITOK_CONFIG[S128]
    config = config | {"model": config["model"] | {"vq_model": config["model"]["vq_model"] | {"finetune_decoder": False, "is_legacy": False}}}
    write_json(folder / "config.json", config)
    torch.save(tensors(titok_encoder(512, 8, 4096, 12) | titok_decoder(512, 8, 12, legacy=False), scale=0.05), folder / "pytorch_model.bin")
    return folder


def test_the_mixture_holds_all_five_sets(mixture):
    source = open_data(f"cc3m-mm:{mixture}", size=64)
    assert list(source.sources) == ["cc3m-aug", "hq-edit", "cc3m-vqa", "vg-crop", "vg-vqa"]
    assert [len(part) for part in source.sources.values()] == [4, 6, 2, 8, 8]
    assert len(source.groups) == 4 + 4 + 2 + 2 + 1  # a row of hq-edit makes two groups; half of the two groups of questions on Visual Genome are kept
    texts = {pair.left.text for pairs in source_groups(source) for pair in pairs}
    assert {None, "fill it", "Where is it?", "a red wall", "What colour?"} <= texts


@pytest.mark.parametrize("preset, trained", [("fuselip-s-cc3m", 42_111_491), ("siglip-s-mlf-cc3m", 70_010_498)])
def test_a_full_size_run(preset, trained, mixture, full_titok, root, tmp_path):
    own = ["--tokenizer", full_titok] if preset.startswith("fuselip") else []
    done = command("train", "--preset", preset, "--data", f"cc3m-mm:{mixture}", *own, "--workers", 1, "--train.epochs", 0, "--train.steps", 2, "--train.batch-size", 8, "--train.shards", 2,
                   "--train.accumulation", 2, "--train.log-every", 1, "--train.device", "cpu", "--run", tmp_path / "run", root=root)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert rows[0]["lr"] == pytest.approx(1e-3 / 12_000) and (rows[0]["masked"] > 5) == preset.startswith("fuselip")
    model = load_model(tmp_path / "run")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained and model.image_size == 256
    assert model.encode([torch.zeros(3, 30, 40), None], ["what is it?", "a cat"]).shape == (2, 384)


def test_every_preset_of_a_baseline_is_the_papers():
    assert {f"siglip-{size}-{fusion}-{data}" for size in "sb" for fusion in ("sf", "mlf") for data in ("cc3m", "cc12m")} < set(BASELINE_PRESETS)
    for name, config in BASELINE_PRESETS.items():
        if not name.startswith("siglip"): continue  # tiny and small are the book's
        assert (config.train.epochs, config.train.weight_decay) == ((16, 0.5) if "cc12m" in name else (8, 1.0)) and config.data == f"{name.split('-')[-1]}-mm:data/cache"
        assert (config.train.batch_size, config.train.shards, config.train.lr, config.train.mask_probability, config.towers.fusion) == (2048, 8, 1e-3, 0.0, name.split("-")[2])


def test_missing_data_of_a_preset_is_one_line(root, tmp_path):
    done = command("train", "--preset", "siglip-s-sf-cc3m", "--data", f"cc3m-mm:{tmp_path}", "--run", tmp_path / "run", root=root)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("fuselip-edu: error: no shards and no table in") and not (tmp_path / "run").exists()


TINY = ("--scenes", 30, "--train.steps", 4, "--train.batch-size", 32, "--train.device", "cpu", "--train.log-every", 1,
        "--train.mask-probability", 0.1, "--train.warmup-steps", 1, "--encoder.width", 32, "--encoder.layers", 2)


@pytest.mark.parametrize("preset", ["tiny", "tiny-ett"])
def test_two_processes_train_what_one_does(root, tmp_path, preset):
    for name, launcher in (("one", ()), ("two", ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"))):
        done = command("train", "--preset", preset, *TINY, "--run", tmp_path / name, "--resume", launcher=launcher, root=root)
        assert done.returncode == 0 and "it begins" in done.stderr, done.stderr
    one, two = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for ours, theirs in zip(one, two):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4) and ours.get("own", 0.0) == pytest.approx(theirs.get("own", 0.0), rel=1e-3) and ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    first, second = (load_model(tmp_path / name).encode_text(["a red circle", "horizontal flip"]) for name in ("one", "two"))
    torch.testing.assert_close(first, second, atol=1e-2, rtol=0)  # Adam's first steps amplify the rounding of biases that have no gradient


def test_a_published_checkpoint_is_fine_tuned(small, mixture, tmp_path):  # noqa: F811
    "From a small folder in the original's layout; the quirks stay with the model, its own sizes override the preset's."
    from fuselip_edu.fuselip import FuseLIP
    from fuselip_edu.train import build, preset, train
    small_titok(tmp_path / "tokenizer", legacy=True)
    folder = tmp_path / "published"
    write_json(folder / "config.json", fuselip_config(32, 2, 1, 49_409 + 64, "../tokenizer", context=64))
    state = fuselip_encoder(32, 1, 49_409 + 64, 64) | {f"image_tokenizer.model.{name}": shape for name, shape in titok_encoder(32, 1, 64, 12, 16, 16).items()}
    torch.save(tensors(state, scale=0.1), folder / "pytorch_model.bin")
    config = preset("fuselip-s-cc3m")
    config.data, config.init, config.workers = f"cc3m-mm:{mixture}", str(folder), 0
    config.train.epochs, config.train.steps, config.train.batch_size, config.train.shards, config.train.device, config.train.log_every = 0, 3, 8, 1, "cpu", 1
    model, pairs = build(config)
    before = FuseLIP.from_pretrained(folder)
    assert model.vocab.original and torch.equal(model.token_embedding.weight, before.token_embedding.weight)
    rows = train(model, pairs, config.train)
    assert len(rows) == 3 and not torch.equal(model.token_embedding.weight, before.token_embedding.weight)
    assert torch.equal(model.image_tokenizer.latent_tokens, before.image_tokenizer.latent_tokens)
    model.save_pretrained(tmp_path / "ours")
    again = FuseLIP.from_pretrained(tmp_path / "ours")
    assert again.vocab.original and torch.equal(again.encode_text(["a cat"]), model.encode_text(["a cat"]))
