"Agreement with the original: every golden file, from pixels and strings to the weights after one step of training."
import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fuselip_edu import fuselip, titok
from fuselip_edu.baselines import LateFusion, LateFusionConfig, image_features, text_features
from fuselip_edu.batches import grouped_batches
from fuselip_edu.contrastive import sigmoid_loss
from fuselip_edu.core import fit_weights, resize_image, write_json
from fuselip_edu.fuselip import FuseLIP, original_name
from fuselip_edu.masking import mask_tokens, masked_loss
from fuselip_edu.text import CLIPBPE
from fuselip_edu.titok import TiTok, TiTokConfig
from fuselip_edu.train import Batch, TrainConfig, backward, learning_rate, make_optimizer, parameter_groups, update
from fuselip_edu.transforms import EVAL_COUNT, KINDS, grayscale, transform_pairs
from fuselip_edu.vocab import Vocab
from test_transforms import FORMS, apply

USED = set()


def read(golden, name):
    "A golden file, and a note that it was used."
    USED.add(name)
    return load_file(golden / name) if name.endswith(".safetensors") else json.loads((golden / name).read_text())


def close(ours, theirs, atol=1e-4): return torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def metadata(golden): return read(golden, "metadata.json")


# ---- the image tokenizer

VARIANTS = ["titok_legacy_l2.safetensors", "titok_nonlegacy_l2.safetensors", "titok_nonlegacy_nol2.safetensors"]


def published(metadata, variant):
    "The configuration of a golden tokenizer as a published config.json; its sizes go by the name `golden`."
    c, flags = metadata["titok"]["config"], metadata["titok"]["variants"][variant]
    vq = {"codebook_size": c["codebook"], "token_size": c["token_size"], "use_l2_norm": flags["use_l2_norm"], "commitment_cost": 0.25, "is_legacy": flags["is_legacy"],
          "vit_enc_model_size": "golden", "vit_dec_model_size": "golden", "vit_enc_patch_size": c["patch"], "vit_dec_patch_size": c["patch"],
          "num_latent_tokens": c["latent_tokens"], "finetune_decoder": False}
    return {"model": {"vq_model": vq}, "dataset": {"preprocessing": {"crop_size": c["image"]}}}


@pytest.fixture(scope="module")
def sizes(metadata):
    "Golden sizes among the published ones."
    c = metadata["titok"]["config"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(titok.MODEL_SIZES, "golden", (c["width"], c["layers"], c["heads"]))
        yield


def published_state(golden, file):
    "The tensors of a golden tokenizer under their published names."
    stored = read(golden, file)
    if "model.latent_tokens" not in stored: stored = read(golden, "titok_nonlegacy_l2.safetensors")  # nol2 shares its weights
    return {name.removeprefix("model."): value for name, value in stored.items() if name.startswith(("model.", "decoder."))}


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda name: name[6:-12])
def tokenizer(request, golden, metadata, sizes, tmp_path_factory):
    "A golden tokenizer, through a folder in the published layout, with what the original made of its images."
    folder, variant = tmp_path_factory.mktemp("titok"), request.param[6:-12]
    write_json(folder / "config.json", published(metadata, variant))
    torch.save(published_state(golden, request.param), folder / "pytorch_model.bin")
    return TiTok.from_pretrained(folder), {name: value for name, value in read(golden, request.param).items() if name.startswith("io.")}, metadata["titok"]["variants"][variant]


def rows(z): return z[:, :, 0].mT  # (b, d, 1, n) -> (b, n, d)


@torch.no_grad()
def test_latents_and_codes(tokenizer):
    model, io, flags = tokenizer
    assert (model.config.legacy, model.config.l2_norm) == (flags["is_legacy"], flags["use_l2_norm"])
    close(model.latents(io["io.images_u8"] / 255), rows(io["io.z"]))
    indices = model.encode(io["io.images_u8"])
    assert torch.equal(indices, io["io.indices"][:, 0]) and len(indices.unique()) == flags["distinct_codes"]


@torch.no_grad()
def test_quantiser(tokenizer):
    model, io, _ = tokenizer
    codes, indices, loss = model.quantize(rows(io["io.z"]))
    assert torch.equal(indices, io["io.indices"][:, 0])
    close(codes, rows(io["io.z_quantized"]))
    if "io.z_from_codes" in io: close(model.quantize.decode(indices), rows(io["io.z_from_codes"]))
    assert loss.item() == pytest.approx(io["io.quantizer_loss"].item(), rel=1e-4)
    assert loss.item() == pytest.approx((io["io.commitment_loss"] + io["io.codebook_loss"]).item(), rel=1e-4)
    assert io["io.commitment_loss"].item() == pytest.approx(0.25 * io["io.codebook_loss"].item(), rel=1e-4)


@torch.no_grad()
def test_decoder(tokenizer):
    model, io, flags = tokenizer
    if "io.decoded" not in io:  # without l2 only codes are given, and the decoder is that of the other
        assert model.decode(io["io.indices"][:, 0]).shape == io["io.images_u8"].shape
        return
    decoded = model.decoder(rows(io["io.z_quantized"]))
    assert list(decoded.shape) == flags["decoded_shape_full"]
    n = len(io["io.decoded"])
    close(decoded[:n], io["io.decoded"])
    from_codes = model.decoder(model.quantize.decode(io["io.indices"][:, 0]))
    close(from_codes[:n], io["io.decoded_from_codes"])
    if flags["is_legacy"]:
        with pytest.raises(RuntimeError, match="no pixel decoder"): model.decode(io["io.indices"][:, 0])
    else: close(model.decode(io["io.indices"][:, 0]), io["io.decoded_from_codes"].clamp(0, 1))


@torch.no_grad()
def test_the_other_layout_gives_other_codes(tokenizer, golden, metadata, sizes):
    model, io, flags = tokenizer
    config = TiTokConfig(**vars(model.config) | {"legacy": not flags["is_legacy"], "has_decoder": False})
    other = TiTok(config).eval()
    fit_weights(other, {name: value for name, value in model.state_dict().items() if not name.startswith("decoder.")}, "golden")
    assert (other.encode(io["io.images_u8"]) != io["io.indices"][:, 0]).float().mean() > 0.2


@torch.no_grad()
def test_a_published_tokenizer_saved_as_ours_is_the_same(tokenizer, tmp_path):
    model, io, _ = tokenizer
    model.save_pretrained(tmp_path)
    again = TiTok.from_pretrained(tmp_path)
    assert again.config == model.config and torch.equal(again.encode(io["io.images_u8"]), io["io.indices"][:, 0])


# ---- the model

class Words:
    "Stands in for CLIP's vocabulary in the small golden model: a text is its ids, written out."
    name, pad = "clip", 0
    def __init__(self, n_vocab, sot, eot): self.n_vocab, self.sot, self.eot = n_vocab, sot, eot
    def encode(self, text): return [int(word) for word in text.split()]
    def save(self, folder): pass


@pytest.fixture(scope="module")
def io(golden): return read(golden, "fuse_io.safetensors")


@pytest.fixture(scope="module")
def checkpoint(golden, metadata, sizes, tmp_path_factory):
    "The golden model as a folder in the original's layout."
    folder, c = tmp_path_factory.mktemp("fuselip"), metadata["fuse"]["config"]
    write_json(folder / "tokenizer" / "config.json", published(metadata, "legacy_l2"))
    text = {"context_length": c["context"], "vocab_size": c["vocab"], "width": c["width"], "heads": c["heads"], "layers": c["layers"], "mlp_ratio": c["mlp_ratio"],
            "ls_init_value": None, "no_causal_mask": True, "pad_id": c["pad"], "proj_bias": False, "output_tokens": False, "pool_type": "eot"}
    write_json(folder / "config.json", {"model_name": "fuse-clip-titok", "text_config": text, "mask_pad": True, "image_tokenizer": "tokenizer", "use_eoi": False,
                                        "context_length": c["context"], "transformer_size": "small", "mlm_probability": 0.1, "rand_repl_probability": 0.0})
    encoder = {f"image_tokenizer.model.{name}": value for name, value in published_state(golden, "titok_legacy_l2.safetensors").items() if not name.startswith("decoder.")}
    torch.save(read(golden, "fuse_state_dict.safetensors") | encoder, folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def words(metadata):
    c = metadata["fuse"]["config"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuselip, "CLIPBPE", lambda original=False: Words(c["text_vocab"] - 1, c["sot"], c["eot"]))
        yield


@pytest.fixture
def model(checkpoint, words): return FuseLIP.from_pretrained(checkpoint)


def lengths_of(ids, vocab): return (ids == vocab.eot).int().argmax(1) + 1


def sides(has_image, image_index, images, text_ids, vocab):
    "Images and texts, or None, of a golden batch."
    texts = [" ".join(map(str, row[1:row.index(vocab.eot)])) or None for row in text_ids.tolist()]
    return [images[i] if has else None for has, i in zip(has_image.tolist(), image_index.tolist())], texts


def test_state_dict_names(model, metadata):
    names = {original_name(name) for name in model.state_dict()} | {"mask_prediction_head.decoder.weight"}
    assert names == set(metadata["fuse_state_dict_keys"])


def test_the_vocabulary(model, metadata):
    c, vocab = metadata["fuse"]["config"], model.vocab
    assert (vocab.size, vocab.mask, vocab.first_code, vocab.context) == (c["vocab"], c["mask"], c["image_offset"], c["context"]) and vocab.original
    every = torch.arange(vocab.size)[None]
    labels = mask_tokens(every, torch.tensor([vocab.size]), vocab, 1.0)[1]
    assert set(every[labels < 0].tolist()) == set(c["special_never_masked"])


@torch.no_grad()
def test_images_alone(model, io):
    n = len(io["image_only.ids"])
    batch = model.collate(fuselip.make_items(list(io["in.images_u8"][:n])))
    assert torch.equal(batch["ids"], io["image_only.ids"])
    close(model.encode_image(list(io["in.images_u8"][:n])), io["image_only.emb"])
    pooled = model.ln_final(model.hidden(**batch)[:, -1])
    close(pooled, io["image_only.emb_unnormalised"], atol=5e-4)  # of length √width


@torch.no_grad()
def test_texts_alone(model, io):
    ids = io["text_only.ids"]
    lengths = lengths_of(ids, model.vocab)
    hidden, real = model.hidden(ids, lengths), torch.arange(ids.shape[1]) < lengths[:, None]
    close(hidden[real], io["text_only.hidden"][real])
    close(model.ln_final(hidden[torch.arange(len(ids)), lengths - 1]), io["text_only.emb_unnormalised"], atol=5e-4)
    for packed in (False, True): close(model(ids, lengths, packed=packed), io["text_only.emb"])
    _, texts = sides(torch.zeros(len(ids)), torch.zeros(len(ids)).int(), None, ids, model.vocab)
    written = [i for i, text in enumerate(texts) if text]
    close(model.encode_text([texts[i] for i in written]), io["text_only.emb"][written])


@torch.no_grad()
def test_any_mix(model, io):
    has, ids = io["mixed.has_image"].bool(), io["mixed.merged_ids"]
    images, texts = sides(has, torch.arange(len(has)), io["in.images_u8"], io["mixed.text_ids"], model.vocab)
    model.item_tokenizer.warned = True  # texts on either side of the cut are meant
    batch = model.collate(fuselip.make_items(images, texts))
    assert torch.equal(F.pad(batch["ids"], (0, ids.shape[1] - batch["ids"].shape[1])), ids)
    close(model.encode(images, texts), io["mixed.emb"])
    for packed in (False, True): close(model(**batch, packed=packed), io["mixed.emb"])
    real = torch.arange(ids.shape[1]) < batch["lengths"][:, None]
    close(model.hidden(ids, batch["lengths"])[real], io["mixed.hidden"][real])


@torch.no_grad()
def test_zero_inside_a_text(model, io, checkpoint, words):
    ids = io["text_zero_inside.ids"]
    lengths = lengths_of(ids, model.vocab)
    assert any((row[:n] == 0).any() for row, n in zip(ids, lengths))
    for packed in (False, True): close(model(ids, lengths, packed=packed), io["text_zero_inside.emb"])
    model.vocab = Vocab(**vars(model.vocab) | {"original": False})
    assert (model(ids, lengths) - io["text_zero_inside.emb"]).abs().max() > 1e-2  # ours attends to it


def test_saving_keeps_model_and_quirks(model, io, tmp_path, words):
    model.save_pretrained(tmp_path)
    again = FuseLIP.from_pretrained(tmp_path)
    assert again.config == model.config and again.vocab.original
    assert torch.equal(again.encode_image(list(io["in.images_u8"])), model.encode_image(list(io["in.images_u8"])))


# ---- one step of training

@pytest.mark.parametrize("side", ["left", "right"])
def test_training_batch(model, io, side):
    part = {name.removeprefix(f"train.{side}."): value for name, value in io.items() if name.startswith(f"train.{side}.")}
    images, texts = sides(part["has_image"], part["image_index"], io["in.images_u8"], part["text_ids"], model.vocab)
    sequences = [model.vocab.sequence(model.item_tokenizer.codes([image])[0] if image is not None else (), model.item_tokenizer.text_tokenizer.encode(text or ""))
                 for image, text in zip(images, texts)]
    assert [row[:len(ids)] for row, ids in zip(part["ids"].tolist(), sequences)] == sequences and max(map(len, sequences)) == part["ids"].shape[1]
    labels, lengths = part["labels"], lengths_of(part["ids"], model.vocab)
    allowed = mask_tokens(part["ids"], lengths, model.vocab, 1.0)[1]
    assert ((labels < 0) | (allowed == labels)).all()
    assert torch.equal(part["masked_ids"], torch.where(labels >= 0, model.vocab.mask, part["ids"]))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_masked_forward(model, io, side, packed):
    ids, labels = io[f"train.{side}.masked_ids"], io[f"train.{side}.labels"]
    encoded = model(ids, lengths_of(ids, model.vocab), labels, packed=packed)
    order = encoded.rows.argsort(stable=True)  # ours come shortest sequence first, the original's row by row
    close(encoded.embeddings, io[f"train.{side}.emb"])
    assert torch.equal(encoded.targets[order], io[f"train.{side}.mlm_targets"])
    assert torch.equal(encoded.rows[order], (labels >= 0).nonzero()[:, 0])
    close(encoded.logits[order], io[f"train.{side}.mlm_logits"])


def test_one_step_of_training(model, io, metadata):
    "Losses, every gradient, its norm, and every weight after clipping and AdamW."
    model.train()
    encoded = [model(io[f"train.{side}.masked_ids"], lengths_of(io[f"train.{side}.masked_ids"], model.vocab), io[f"train.{side}.labels"]) for side in ("left", "right")]
    contrastive = sigmoid_loss(*(part.embeddings for part in encoded), model.logit_scale.exp(), model.logit_bias)
    masked = 0.25 * sum(masked_loss(part.logits, part.targets) for part in encoded)
    for ours, theirs in ((contrastive, "contrastive_loss"), (masked, "mlm"), (contrastive + masked, "total")): close(ours.detach(), io[f"train.loss.{theirs}"])
    (contrastive + masked).backward()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    theirs = {name.removeprefix("grad."): value for name, value in io.items() if name.startswith("grad.")}
    after = {name.removeprefix("after_step."): value for name, value in io.items() if name.startswith("after_step.")}
    assert parameters.keys() == theirs.keys() >= after.keys() and after
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    assert norm.item() == pytest.approx(metadata["fuse"]["grad_norm"], rel=1e-5)
    stored = math.sqrt(sum(float(value.pow(2).sum()) for value in theirs.values()))  # 1 if the file was written after clipping
    assert stored == pytest.approx(1.0, rel=1e-4) or stored == pytest.approx(norm.item(), rel=1e-4)
    for name, p in parameters.items(): torch.testing.assert_close(p.grad, theirs[name] / stored, atol=1e-6, rtol=1e-4, msg=lambda text: f"{name}: {text}")
    torch.optim.AdamW(parameter_groups(model, 1.0), lr=1e-3, betas=(0.9, 0.98), eps=1e-8).step()
    for name, value in after.items():
        p = parameters[name]
        difference, sure = (p.detach() - value).abs(), p.grad.abs() > 1e-6
        assert difference.max() < 2.1e-3, name  # AdamW's first step is lr × the gradient's sign, which rounding decides where it is all but 0
        assert not sure.any() or difference[sure].max() < 1e-5, (name, difference[sure].max())


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("chunk", [0, 3])
def test_one_step_of_the_training_loop(model, io, metadata, accumulation, chunk):
    "The same by the functions that `train` calls: `backward`, in parts and in chunks, the fused optimiser, and `update`."
    config = TrainConfig(optimizer="adamw", lr=1e-3, weight_decay=1.0, beta2=0.98, accumulation=accumulation, chunk=chunk, skip_twins=False, batch_size=2 * len(io["train.left.masked_ids"]), device="cpu")
    def stacked(name, fill): # both sides, the shorter one filled up
        rows = [io[f"train.{side}.{name}"] for side in ("left", "right")]
        return torch.cat([F.pad(side, (0, max(one.shape[1] for one in rows) - side.shape[1]), value=fill) for side in rows])

    ids = stacked("masked_ids", model.vocab.pad)
    optimizer = make_optimizer(model.train(), config)
    losses = backward(model, Batch({"ids": ids, "lengths": lengths_of(ids, model.vocab), "labels": stacked("labels", -100)}), config)
    close(losses["loss"], io["train.loss.total"])
    assert float(update(model, optimizer, config.lr, config.grad_norm, losses["loss"])) == pytest.approx(metadata["fuse"]["grad_norm"], rel=1e-5)
    parameters, checked = dict(model.named_parameters()), 0
    for name, value in ((name.removeprefix("after_step."), value) for name, value in io.items() if name.startswith("after_step.")):
        p = parameters[name]
        difference, sure = (p.detach() - value).abs(), p.grad.abs() > 1e-6
        assert difference.max() < 2.1e-3 and (not sure.any() or difference[sure].max() < 1e-5), name
        checked += 1
    assert checked > 5


def test_weight_decay_names(model, metadata):
    names, by_id = metadata["fuse"], {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ({by_id[id(p)] for p in group["params"]} for group in parameter_groups(model, 1.0))
    assert decayed == set(names["weight_decay"]) and kept == set(names["no_weight_decay"])


def test_learning_rate(golden):
    for case in read(golden, "lr_schedule.json").values():
        low = case.get("min_lr", 0.0)  # with a floor, the cosine runs over what lies above it
        for step, rate in ((int(step), rate) for step, rate in case["lr"].items()):
            ours = learning_rate(step, case["base"], case["warmup"], case["total"])
            if step >= case["warmup"]: ours = low + learning_rate(step, case["base"] - low, case["warmup"], case["total"])
            assert ours == pytest.approx(rate, rel=1e-9, abs=1e-18)


def test_batches_of_every_rank(golden):
    data = read(golden, "sampler.json")
    assert {(run["world"], run["epoch"]) for run in data["runs"]} == {(world, epoch) for world in (1, 2, 3) for epoch in (0, 1)}
    for run in data["runs"]:
        ours = grouped_batches(data["groups"], data["batch_size"], 0, run["epoch"], run["rank"], run["world"])
        assert ours == run["batches"] and len(ours) == run["len"], (run["world"], run["rank"], run["epoch"])


# ---- losses

@pytest.fixture(scope="module")
def losses(golden): return read(golden, "losses.safetensors")


def value_and_gradients(loss, *inputs, **options):
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = loss(*leaves, **options)
    return value.detach(), torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("case", ["a", "b", "c"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_sigmoid_loss(losses, case, chunk):
    names = ("left", "right", "logit_scale", "logit_bias")
    value, gradients = value_and_gradients(sigmoid_loss, *(losses[f"siglip.{case}.{name}"] for name in names), chunk=chunk)
    torch.testing.assert_close(value, losses[f"siglip.{case}.loss"], rtol=1e-5, atol=1e-5)
    for name, gradient in zip(names, gradients):
        torch.testing.assert_close(gradient, losses[f"siglip.{case}.grad_{name}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world", [2, 3, 4, 5])
def test_one_process_loss_is_the_mean_over_ranks(losses, world):
    case = {name: losses[f"siglip_world{world}.{name}"] for name in ("left", "right", "logit_scale", "logit_bias", "loss",
                                                                     "grad_left", "grad_right", "grad_logit_scale", "grad_logit_bias")}
    left, right = (case[side].flatten(0, 1) for side in ("left", "right"))
    value, gradients = value_and_gradients(sigmoid_loss, left, right, case["logit_scale"], case["logit_bias"])
    torch.testing.assert_close(value, case["loss"].mean(), rtol=1e-5, atol=1e-5)
    for side, gradient in zip(("left", "right"), gradients):
        torch.testing.assert_close(gradient, case[f"grad_{side}"].flatten(0, 1) / world, rtol=1e-5, atol=1e-5)
    for scalar, gradient in zip(("logit_scale", "logit_bias"), gradients[2:]):
        torch.testing.assert_close(gradient, case[f"grad_{scalar}"].mean(), rtol=1e-5, atol=1e-5)


def test_masked_loss(losses):
    total = 0.0
    for side in ("left", "right"):
        labels = losses[f"mlm.{side}_labels"]
        total += masked_loss(losses[f"mlm.{side}_logits"][labels >= 0], labels[labels >= 0])
    torch.testing.assert_close(total, losses["mlm.loss_unweighted"], rtol=1e-5, atol=1e-5)


def test_losses_of_the_step_from_its_own_embeddings(io):
    contrastive = sigmoid_loss(io["train.left.emb"], io["train.right.emb"], math.exp(math.log(10.0)), -10.0)
    masked = 0.25 * sum(masked_loss(io[f"train.{side}.mlm_logits"], io[f"train.{side}.mlm_targets"]) for side in ("left", "right"))
    torch.testing.assert_close(contrastive, io["train.loss.contrastive_loss"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(masked, io["train.loss.mlm"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(contrastive + masked, io["train.loss.total"], rtol=1e-5, atol=1e-4)


# ---- CLIP's tokenizer

@pytest.fixture(scope="module")
def clip(): return CLIPBPE(original=True)


@pytest.fixture(scope="module")
def strings(golden): return read(golden, "text_tokenizer.json")


def test_text_ids(clip, strings):
    assert (clip.n_vocab, clip.pad, clip.sot, clip.eot) == (strings["vocab_size"], strings["pad"], strings["sot"], strings["eot"])
    assert len(strings["rows"]) >= 200
    assert not [row["text"] for row in strings["rows"] if clip.encode(row["text"]) != row["encode"]]


@pytest.mark.parametrize("context", [77, 180])
def test_text_sequences(clip, strings, context):
    vocab = Vocab(clip.n_vocab, clip.sot, clip.eot, 4096, context, original=True)
    theirs = [row.get(f"ids{context}", row["ids77"]) for row in strings["rows"]]
    assert [vocab.sequence((), clip.encode(row["text"])) for row in strings["rows"]] == theirs
    assert max(map(len, theirs)) == context


def test_text_cleaning_and_decoding(clip, strings):
    for row in strings["rows"]:
        assert clip.clean(row["text"]) == row["clean"]
        assert clip.tokenizer.decode(row["encode"]) == row["decoded"]
        if not {clip.sot, clip.eot} & set(row["encode"]): assert clip.decode(row["encode"]) == row["decoded"].strip()


def test_only_literal_specials_are_encoded_otherwise_by_ours(strings):
    ours, specials = CLIPBPE(), {49406, 49407}
    differ = [row for row in strings["rows"] if ours.encode(row["text"]) != row["encode"]]
    assert differ == [row for row in strings["rows"] if specials & set(row["encode"])]
    assert not any(specials & set(ours.encode(row["text"])) for row in strings["rows"])


# ---- transformations

THEIRS = {"crop": "randomcrop", "rotate": "rotate", "jitter": "colorjitterv2", "flip": "flip", "colour": "colorize_grayscale"}


@pytest.fixture(scope="module")
def tgit(golden): return read(golden, "tgit.safetensors"), read(golden, "tgit.json")


def difference(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype == torch.uint8
    return int((a.int() - b.int()).abs().max())


def test_evaluation_resize(tgit):
    tensors, _ = tgit
    assert difference(resize_image(tensors["image_u8_chw"], tensors["resized_u8"].shape[-1]), tensors["resized_u8"]) <= 1


@pytest.mark.parametrize("kind", ["crop", "rotate", "jitter", "flip"])
def test_transformations(tgit, kind):
    tensors, texts = tgit
    name = THEIRS[kind]
    lefts, rights, instructions = tensors[f"{name}.left_u8"], tensors[f"{name}.right_u8"], texts[name]["left_text"]
    assert len(instructions) == len(rights) == EVAL_COUNT[kind]
    for i, (text, right) in enumerate(zip(instructions, rights)):
        assert difference(apply(lefts[i if len(lefts) > 1 else 0], text), right) <= (2 if kind == "jitter" else 1), text
    assert texts[name]["right_text"] == [""] * len(rights)


def test_grey_and_colour(tgit):
    tensors, texts = tgit
    pairs = dict(zip(texts["colorize_grayscale"]["left_text"], zip(tensors["colorize_grayscale.left_u8"], tensors["colorize_grayscale.right_u8"])))
    assert set(pairs) == {"grayscale", "colorize"}
    (coloured, grey), (grey_again, coloured_again) = pairs["grayscale"], pairs["colorize"]
    if torch.equal(coloured, grey): coloured = coloured_again  # the quirk: colorize came first
    for mine, theirs in ((grayscale(coloured), grey), (grayscale(coloured_again), grey_again)): assert difference(mine, theirs) <= 1


def test_the_other_order_is_not_ours(tgit):
    tensors, texts = tgit
    orders = ("colorize_grayscale", "colorize_grayscale_other_order")
    degenerate = []
    for order in orders:
        at = texts[order]["left_text"].index("grayscale")
        degenerate.append(torch.equal(tensors[f"{order}.left_u8"][at], tensors[f"{order}.right_u8"][at]))  # theirs: grey -> grey
    assert sorted(degenerate) == [False, True]
    image, drawn = tensors["resized_u8"], set()
    for seed in range(20):
        pairs = {pair.left.text: pair for pair in transform_pairs(image, "colour", random.Random(seed))}
        assert torch.equal(pairs["grayscale"].left.image, image) and torch.equal(pairs["colorize"].right.image, image)
        drawn.add(next(iter(pairs)))
    assert drawn == {"grayscale", "colorize"}  # both orders, and neither loses the colour


@pytest.mark.parametrize("kind", KINDS)
def test_instructions(tgit, kind):
    tensors, texts = tgit
    theirs = texts[THEIRS[kind]]["left_text"]
    ours = [pair.left.text for seed in range(30) for pair in transform_pairs(tensors["resized_u8"], kind, random.Random(seed), train=False)]
    for text in [*ours, *theirs]: assert re.fullmatch(FORMS[kind], text), text
    if kind != "jitter": assert set(ours) == set(theirs)


# ---- late fusion

@pytest.fixture(scope="module")
def late(golden): return read(golden, "late_fusion_io.safetensors")


@pytest.fixture(scope="module")
def late_lengths(metadata):
    eot = metadata["late_fusion"]["text"]["eot"]
    return lambda ids: (ids == eot).int().argmax(1) + 1


@pytest.fixture(scope="module")
def rivals(golden, metadata):
    "The original's SF and MLF models."
    weights, (vision, text, fusion) = read(golden, "late_fusion_state_dict.safetensors"), (metadata["late_fusion"][part] for part in ("vision", "text", "fusion"))
    tokenizer = SimpleNamespace(n_vocab=text["vocab"], sot=text["sot"], eot=text["eot"], pad=text["pad"], encode=lambda text: [])
    sizes = dict(image_size=vision["image"], patch_size=vision["patch"], image_width=vision["width"], image_layers=vision["layers"], image_heads=vision["heads"],
                 text_width=text["width"], text_layers=text["layers"], text_heads=text["heads"], context=text["context"],
                 width=fusion["width"], fusion_layers=fusion["layers"], fusion_heads=fusion["heads"])
    models = {}
    for fusion in ("sf", "mlf"):
        models[fusion] = LateFusion(LateFusionConfig(fusion, **sizes), tokenizer).eval()
        own = {name: value for name, value in weights.items() if fusion == "mlf" or name.startswith("model.")}
        models[fusion].load_state_dict(own)  # strict: the parameters have the original's names
        models[fusion].mean.fill_(0.5), models[fusion].std.fill_(0.25)
    return models


@torch.no_grad()
def test_late_towers(rivals, late, late_lengths):
    model, ids = rivals["mlf"], late["in.text_ids"]
    close(image_features(model.model.visual, late["in.images_u8"], model.mean, model.std), late["tower.image"])
    for buckets in (1, 2, 4): close(text_features(model.model.text, ids, late_lengths(ids), buckets), late["tower.text"])


@torch.no_grad()
def test_late_fusions(rivals, late):
    image, text, module = late["fusion.image_features"], late["fusion.text_features"], rivals["mlf"].fusion_module
    assert not image[3].any()
    close(module(image, text), late["fusion.mlf_out"])
    close(module(torch.zeros_like(image), text), late["fusion.mlf_out_no_image"])
    close(rivals["mlf"].fuse(image, text), late["fusion.mlf_normalised"])
    close(rivals["sf"].fuse(image, text), late["fusion.sf_out"])


@pytest.mark.parametrize("fusion", ["sf", "mlf"])
@pytest.mark.parametrize("case", ["multimodal", "all_images", "image_only", "text_only"])
@torch.no_grad()
def test_late_fusion_end_to_end(rivals, late, late_lengths, metadata, fusion, case):
    ids, n = late["in.text_ids"], len(late["in.text_ids"])
    if case == "image_only": ids = torch.tensor([[metadata["late_fusion"]["text"][name] for name in ("sot", "eot")]]).repeat(n, 1)
    has_image = {"multimodal": late["in.has_image"].bool(), "text_only": torch.zeros(n, dtype=bool)}.get(case, torch.ones(n, dtype=bool))
    close(rivals[fusion](late["in.images_u8"], has_image, ids, late_lengths(ids)), late[f"{fusion}.{case}"])


def test_every_late_fusion_tensor_is_used(late):
    used = {"in.images_u8", "in.text_ids", "in.has_image", "tower.image", "tower.text", *(f"fusion.{name}" for name in (
        "image_features", "text_features", "mlf_out", "mlf_out_no_image", "mlf_normalised", "sf_out"))}
    used |= {f"{fusion}.{case}" for fusion in ("sf", "mlf") for case in ("multimodal", "all_images", "image_only", "text_only")}
    assert set(late) == used


# ---- nothing left out

def test_every_golden_file_was_used(golden, request):
    here = {item.originalname for item in request.session.items if item.path == Path(__file__)}
    if here != {name for name in globals() if name.startswith("test_")}: pytest.skip("only a part of this file was run")
    files = {path.name for path in golden.iterdir() if path.suffix in (".safetensors", ".json")}
    assert files == USED
