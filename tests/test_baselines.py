"Late fusion: the paper's sizes, and the promises of the interface."
import random, warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fuselip_edu.baselines import BASELINES, BaselineConfig, FusionModule, LateFusion, LateFusionConfig, build_baseline, distinct_rows, image_features, pixel_pairs, rows_by_sum, score_fusion, text_features, text_states
from fuselip_edu.contrastive import sigmoid_loss
from fuselip_edu.fuselip import FuseLIP, FuseLIPConfig, SequenceEncoder
from fuselip_edu.pairs import Item, Pair
from fuselip_edu.shapes import render, scene_at, scene_pairs
from fuselip_edu.text import BPE, CLIPBPE
from fuselip_edu.train import TrainConfig
from fuselip_edu.vocab import Vocab

TEXTS = ["a red circle above a blue square", "what colour is the circle?", "a small red square", "blue", "is there a circle?"]
SMALL = dict(image_layers=1, text_layers=1, image_width=16, text_width=16, image_heads=2, text_heads=2, width=16, fusion_layers=2, fusion_heads=2, context=160)


def n_parameters(module): return sum(p.numel() for p in module.parameters() if p.requires_grad)


def seen(model, pixels): return image_features(model.model.visual, pixels, model.mean, model.std)


def said(model, ids, lengths, buckets=4): return text_features(model.model.text, ids, lengths, buckets)


def small(fusion, tokenizer=None, **changes):
    torch.manual_seed(0)
    return LateFusion(LateFusionConfig(fusion, **SMALL | changes), tokenizer or BPE.train(TEXTS, 300)).eval()


@pytest.fixture(scope="module")
def images(): return [render(scene_at(i)) for i in range(6)]


@pytest.fixture(params=["sf", "mlf"])
def model(request): return small(request.param)


def lengths_of(ids): return (ids == 302).int().argmax(1) + 1


def close(ours, theirs): return torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


# The paper's sizes

@pytest.mark.parametrize("name, exact, millions", [("siglip-s-sf", 62_320_130, 62.3), ("siglip-b-sf", 149_719_554, 149.7)])
def test_towers_have_the_papers_size(name, exact, millions):
    with torch.device("meta"): model = LateFusion(BASELINES[name], CLIPBPE())
    assert n_parameters(model) == exact and round(exact / 1e6, 1) == millions
    assert model.image_size == 256 and model.model.visual.patch_size == (16, 16) and model.model.visual.grid_size == (16, 16)


@pytest.mark.parametrize("name, exact, millions", [("siglip-s-mlf", 7_690_368, 7.7), ("siglip-b-mlf", 13_661_696, 13.7)])
def test_the_fusion_module_has_the_papers_size(name, exact, millions):
    config = BASELINES[name]
    with torch.device("meta"): module = FusionModule(config.width, config.fusion_layers, config.fusion_heads)
    assert n_parameters(module) == exact and round(exact / 1e6, 1) == millions


@pytest.mark.parametrize("name", ["tiny-sf", "tiny-mlf"])
def test_tiny_rivals_are_as_large_as_tiny_fuselip(name):
    tokenizer = SimpleNamespace(n_vocab=512, sot=1, eot=2, pad=0)
    rival, fuselip = LateFusion(BASELINES[name], tokenizer), SequenceEncoder(FuseLIPConfig(), Vocab(512, 1, 2, 1024, 64))
    assert abs(n_parameters(rival) / n_parameters(fuselip) - 1) < 0.05


@torch.no_grad()
def test_a_full_size_model_embeds():
    torch.manual_seed(0)
    model = LateFusion(BASELINES["siglip-s-mlf"], CLIPBPE()).eval()
    image = Image.new("RGB", (40, 30), "red")
    vectors = model.encode([image, None], ["what colour is it?", "red"])
    assert vectors.shape == (2, 384) and torch.isfinite(vectors).all()


# What goes in

def test_an_image_alone_has_the_empty_text(model, images):
    inputs = model.collate([Item(images[0]), Item(images[0], "blue"), Item(text="blue")])
    assert inputs["ids"].tolist()[0][:2] == [1, 2] and inputs["lengths"][0] == 2
    assert inputs["has_image"].tolist() == [True, True, False] and not inputs["pixels"][2].any()
    image, text = seen(model, inputs["pixels"][:1]), said(model, torch.tensor([[1, 2]]), torch.tensor([2]))
    close(model(**inputs)[:1], model.fuse(image, text))


def test_a_missing_image_is_a_zero_vector(model):
    inputs = model.collate([Item(text=text) for text in TEXTS])
    text = said(model, inputs["ids"], inputs["lengths"])
    close(model(**inputs), model.fuse(torch.zeros_like(text), text))
    if model.config.fusion == "sf": close(model(**inputs), F.normalize(text, dim=-1))


def test_pixels_of_a_missing_image_do_not_matter(model, images):
    inputs = model.collate([Item(images[0], "blue"), Item(text="blue")])
    noisy = inputs | {"pixels": inputs["pixels"].clone()}
    noisy["pixels"][1] = 200
    assert torch.equal(model(**noisy), model(**inputs))


def test_text_alone_does_not_run_the_image_tower(model):
    model.model.visual.forward = lambda pixels: pytest.fail("the image tower ran")
    model.encode_text(TEXTS)
    model(**model.collate([Item(text=text) for text in TEXTS]))


def test_what_repeats_passes_its_tower_once(model, images):
    passed = {"image": 0, "text": 0}
    def count(tower, forward):
        def counted(x, *args, **kwargs):
            passed[tower] += len(x)
            return forward(x, *args, **kwargs)
        return counted
    model.model.visual.forward = count("image", model.model.visual.forward)
    model.model.text.transformer.forward = count("text", model.model.text.transformer.forward)
    items = [Item(images[i % 2], TEXTS[i % 3]) for i in range(12)] + [Item(images[i % 2].clone()) for i in range(4)]
    together = model(**model.collate(items))
    assert passed == {"image": 2, "text": 4}  # equal copies are one image, and the empty text is one
    passed.update(image=0, text=0)
    close(model.embed_items(items[:12] + [Item(images[0]), Item(images[1])] * 2, batch_size=3), together)
    assert passed == {"image": 2, "text": 4}


def test_a_path_is_read_once(model, images, tmp_path, monkeypatch):
    from fuselip_edu import baselines
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    read = []
    monkeypatch.setattr(baselines, "load_image", lambda image, size, load=baselines.load_image: read.append(image) or load(image, size))
    vectors = model.encode_image([str(tmp_path / "a.png")] * 3 + [images[0]])
    assert len(read) == 2
    close(vectors, vectors[:1].expand(4, -1))


def test_an_item_does_not_depend_on_its_batch(model, images):
    items = [Item(image, text) for image in images for text in (*TEXTS, None)] + [Item(text=text) for text in TEXTS]
    whole, order = model.embed_items(items), torch.randperm(len(items), generator=torch.Generator().manual_seed(0)).tolist()
    close(model.embed_items([items[i] for i in order], batch_size=4), whole[order])
    close(model(**model.collate(items)), whole)
    close(model(**model.collate(items[:1])), whole[:1])


def test_padding_is_hidden_by_length_not_by_id():
    model = small("sf", CLIPBPE())
    ids = [49406, *CLIPBPE().encode("wait!\u2014no"), 49407]
    assert 0 in ids
    ids, lengths = torch.tensor([ids]), torch.tensor([len(ids)])
    padded = F.pad(ids, (0, 5))
    close(said(model, padded, lengths), said(model, ids, lengths))
    other = ids.clone()
    other[ids == 0] = 5
    assert (said(model, other, lengths) - said(model, ids, lengths)).abs().max() > 1e-4  # a real zero is read


def test_the_end_is_read_off_for_either_tokenizer(images):
    for tokenizer in (BPE.train(TEXTS, 300), CLIPBPE()):
        model = small("sf", tokenizer)
        texts = torch.tensor([model.vocab.sequence((), tokenizer.encode("a red circle"))])
        state = text_states(model.model.text, texts, torch.tensor([texts.shape[1]]))
        tower = model.model.text
        x = tower.transformer(tower.token_embedding(texts) + tower.positional_embedding[:texts.shape[1]])
        close(state, tower.ln_final(x[:, -1]) @ tower.text_projection)


def test_a_long_text_is_cut_with_its_end_kept(model):
    with warnings.catch_warnings(record=True) as said_once:
        warnings.simplefilter("always")
        inputs = model.collate([Item(text="red " * 200)])
        assert model.encode_text(["red " * 300]).shape == (1, 16)
    told = f"a text of {len(model.text_tokenizer.encode('red ' * 200))} tokens does not fit the context of 160 and was cut; it begins {('red ' * 15)!r}; further cuts are not reported"
    assert [str(warning.message) for warning in said_once] == [told]
    assert inputs["ids"].shape == (1, 160) and inputs["ids"][0, -1] == model.vocab.eot and inputs["lengths"][0] == 160


def test_no_items_give_no_rows(model): assert model.embed_items([]).shape == (0, 16)


def test_embedding_leaves_the_mode(model):
    for mode in (True, False):
        model.train(mode).encode_text(["red"])
        assert model.training == mode


# What score fusion cannot do

def test_score_fusion_is_the_sum_of_two_scores():
    generator = torch.Generator().manual_seed(0)
    a, b, c = F.normalize(torch.randn(3, 50, 8, generator=generator), dim=-1)
    close((score_fusion(a, b) * c).sum(1), ((a + b) * c).sum(1) / (a + b).norm(dim=1))
    assert torch.isfinite(score_fusion(torch.zeros(2, 8), torch.randn(2, 8, generator=generator))).all()


# Saving

def test_a_saved_model_is_the_same_to_the_last_bit(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    again = LateFusion.from_pretrained(tmp_path)
    items = [Item(images[0], "blue"), Item(images[1]), Item(text="a red circle")]
    assert again.config == model.config and torch.equal(again.embed_items(items), model.embed_items(items))
    (tmp_path / "run").mkdir()
    model.save_pretrained(tmp_path / "run" / "model")
    assert torch.equal(LateFusion.from_pretrained(tmp_path / "run").embed_items(items), model.embed_items(items))
    assert not any(name in model.state_dict() for name in ("mean", "std"))


def test_other_folders_are_refused(tmp_path, images):
    with pytest.raises(FileNotFoundError, match="no folder .*none"): LateFusion.from_pretrained(tmp_path / "none")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"): LateFusion.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model": "fuselip"}')
    with pytest.raises(ValueError, match="does not describe a LateFusion model but 'fuselip'; give a folder written by LateFusion.save_pretrained"): LateFusion.from_pretrained(tmp_path)
    small("sf").save_pretrained(tmp_path)
    with pytest.raises(ValueError): FuseLIP.from_pretrained(tmp_path)
    small("mlf").save_pretrained(tmp_path / "mlf")
    (tmp_path / "mlf" / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="fusion_module.* is missing"): LateFusion.from_pretrained(tmp_path / "mlf")


# Errors

@pytest.mark.parametrize("wrong, message", [
    ({"fusion": "sum"}, "fusion must be 'sf' .* or 'mlf' .* not 'sum'"),
    ({"image_size": 30}, "image_size 30 is not divisible by patch_size 8"),
    ({"text_heads": 3}, "text_heads 3 does not divide the width of 64"),
    ({"image_heads": 5}, "image_heads 5 does not divide the width of 64"),
    ({"fusion": "mlf", "fusion_heads": 7}, "fusion_heads 7 does not divide the width of 96")])
def test_sizes_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message): LateFusionConfig(**wrong)


# Pairs

@pytest.fixture(scope="module")
def groups():
    return [group for i in range(12) for kind in scene_pairs(scene_at(i), random.Random(i)).values() for group in kind]


def test_pixel_pairs_give_what_collate_gives(model, groups):
    pairs, flat = pixel_pairs(groups, model), [pair for group in groups for pair in group]
    assert len(pairs) == len(flat) and [i for group in pairs.groups for i in group] == list(range(len(flat)))
    assert [len(group) for group in pairs.groups] == [len(group) for group in groups]
    at = [5, 0, len(flat) - 1, 5]
    inputs, expected = pairs.inputs(at), model.collate([flat[i].left for i in at] + [flat[i].right for i in at])
    assert inputs.keys() == expected.keys() and all(torch.equal(inputs[name], expected[name]) for name in inputs)
    assert torch.equal(next(pairs.batches([[at[:1], at[1:]]]))["ids"], inputs["ids"])


def test_pixel_pairs_keep_each_image_once(model, groups):
    pairs = pixel_pairs(groups, model)
    shown = {item.image.numpy().tobytes() for group in groups for pair in group for item in (pair.left, pair.right) if item.image is not None}
    assert len(pairs.images) == len(shown) == len({image.numpy().tobytes() for image in pairs.images})
    assert pairs.images.dtype == torch.uint8 and pairs.rows.shape == (2 * len(pairs),)


def test_images_made_on_the_fly_are_told_apart(model):
    def fresh(): # each tensor is freed before the next one is made, so that addresses repeat
        for value in range(20): yield [Pair(Item(torch.full((3, 32, 32), value, dtype=torch.uint8)), Item(text="x"))]
    pairs = pixel_pairs(fresh(), model)
    assert pairs.images[:, 0, 0, 0].tolist() == list(range(20)) and pairs.rows[:20].tolist() == list(range(20))


def test_pixel_pairs_of_texts_and_paths(model, images, tmp_path):
    texts = pixel_pairs([[Pair(Item(text="a"), Item(text="b"))]], model)
    assert not texts.inputs([0])["has_image"].any() and model(**texts.inputs([0])).shape == (2, 16)
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).resize((50, 40)).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")
    pairs = pixel_pairs([[Pair(Item(path, "what?"), Item(text="b")), Pair(Item(images[0]), Item(path))]], model)
    assert pairs.images.shape == (2, 3, 32, 32) and pairs.rows.tolist() == [0, 1, -1, 0]


def test_gradients_reach_every_parameter(model, groups):
    pairs = pixel_pairs(groups, model.train())
    left, right = model(**pairs.inputs(range(24))).chunk(2)
    sigmoid_loss(left, right, model.logit_scale.exp(), model.logit_bias).backward()
    for name, p in model.named_parameters():
        if name == "model.text.token_embedding.weight": assert p.grad.any()
        else: assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any(), name


def test_gradients_are_those_of_every_row_by_itself(groups):
    model = small("mlf")
    inputs = pixel_pairs(groups, model).inputs(range(10))
    weight = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    names, parameters = zip(*model.named_parameters())
    together = torch.autograd.grad((model(**inputs) * weight).sum(), parameters, allow_unused=True)
    apart = [torch.autograd.grad((model(**{k: v[i:i + 1] for k, v in inputs.items()}) * weight[i:i + 1]).sum(), parameters, allow_unused=True) for i in range(20)]
    for name, whole, *parts in zip(names, together, *apart):
        if whole is not None: torch.testing.assert_close(whole, sum(part for part in parts if part is not None), atol=1e-4, rtol=1e-4)


# ---- what is there once

@pytest.mark.parametrize("k", [7, 16, 3072])
def test_rows_told_apart_by_their_sums_are_those_that_differ(k):
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(0, 2, (40, k), generator=generator, dtype=torch.uint8)[torch.randint(0, 40, (100,), generator=generator)]
    table[7], table[8] = table[3], table[3]
    table[8, -1] += 1  # one byte
    distinct, row = rows_by_sum(table)
    expected, where = distinct_rows(table)
    assert torch.equal(distinct[row], table) and torch.equal(distinct.unique(dim=0), expected)
    assert torch.equal(row[:, None] == row, where[:, None] == where)


def test_rows_of_one_sum_are_compared(monkeypatch):
    monkeypatch.setattr(torch, "randint", lambda low, high, size, generator: torch.zeros(size, dtype=torch.int64))  # every factor is 1
    table = torch.zeros(3, 16, dtype=torch.uint8)
    table[0, 0], table[1, 8], table[2, 0] = 1, 1, 1
    distinct, row = rows_by_sum(table)
    assert len(distinct) == 2 and torch.equal(distinct[row], table)


def test_what_a_rival_cannot_do_is_refused_before_its_data_is_read(monkeypatch):
    def read(groups, model): raise AssertionError("data was read")
    monkeypatch.setattr("fuselip_edu.baselines.pixel_pairs", read)
    config = BaselineConfig(scenes=20, towers=LateFusionConfig("sf", **SMALL), train=TrainConfig(mask_probability=0.0, device="cpu", precision="bf16-stream"))
    with pytest.raises(ValueError, match="train.precision bf16-stream is for FuseLIP, not for LateFusion; leave it out"): build_baseline(config)
