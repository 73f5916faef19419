"Sequences and the encoder against their own promises; the original's numbers are in test_parity.py."
import random, subprocess, sys, threading, time, warnings
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fuselip_edu.fuselip import FuseLIP, FuseLIPConfig, SequenceEncoder, embed_sequences, make_items
from fuselip_edu.pairs import Item
from fuselip_edu.text import BPE, CLIPBPE
from fuselip_edu.titok import TiTok, TiTokConfig
from fuselip_edu.vocab import ItemTokenizer, Vocab, pad_sequences

VOCAB = Vocab(n_text=303, sot=301, eot=302, n_codes=256, context=48)
TITOK = TiTokConfig(image_size=16, patch_size=8, n_latents=4, n_codes=32, width=16, layers=1, heads=2, decoder_width=16, decoder_layers=1, decoder_heads=2)
TEXTS = ["a red circle above a blue square", "what colour is the circle?", "a small red square", "blue", "is there a circle?"]


# Sequences

def in_two_steps(vocab, codes, text_ids):
    "The rule as the paper has it: the text is cut first, then the whole."
    text = [vocab.sot, *text_ids, vocab.eot]
    if len(text) > vocab.context: text = text[:vocab.context - 1] + [vocab.eot]
    ids = [vocab.first_code + code for code in codes] + text
    if len(ids) > vocab.context:
        ids = ids[:vocab.context]
        if vocab.eot not in ids: ids[-1] = vocab.eot
    return ids


def test_one_cut_equals_the_papers_two():
    vocab, rng = Vocab(50, 48, 49, 9, context=12), random.Random(0)
    for n_codes in range(16):
        for n_words in range(30):
            codes, words = [rng.randrange(9) for _ in range(n_codes)], [rng.randrange(48) for _ in range(n_words)]
            sequence = vocab.sequence(codes, words)
            assert sequence == in_two_steps(vocab, codes, words)
            assert sequence[-1] == vocab.eot and len(sequence) <= vocab.context


def test_item_tokenizer(titok, bpe, tmp_path, monkeypatch):
    tokenizer = ItemTokenizer(titok, bpe, context=12)
    images = [torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8) for _ in range(3)]
    Image.fromarray(images[2].permute(1, 2, 0).numpy()).save(tmp_path / "image.png")
    reached, encode = [], titok.encode
    monkeypatch.setattr(titok, "encode", lambda pixels: reached.append(len(pixels)) or encode(pixels))
    items = [Item(images[0], "blue"), Item(text="red"), Item(images[1]), Item(images[0]), Item(tmp_path / "image.png"), Item(str(tmp_path / "image.png"))]
    sequences = tokenizer(items)
    assert reached == [3]  # each image once, and one file is one image however its path is written
    codes = encode(torch.stack(images)).tolist()
    expected = [(codes[0], "blue"), ((), "red"), (codes[1], ""), (codes[0], ""), (codes[2], ""), (codes[2], "")]
    assert sequences == [tokenizer.vocab.sequence(found, bpe.encode(text)) for found, text in expected]
    assert tokenizer.codes(images, batch_size=2) == codes and tokenizer([]) == []
    with pytest.raises(ValueError, match="context of 5 .* 4 image codes.*at least 6"): ItemTokenizer(titok, bpe, context=5)


def test_a_cut_is_said_once(titok, bpe):
    tokenizer = ItemTokenizer(titok, bpe, context=12)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokenizer([Item(text="blue " * 10)])  # fits exactly
        assert not caught
        assert [len(sequence) for sequence in tokenizer([Item(text="blue " * 11), Item(text="blue " * 50)])] == [12, 12]
    assert len(caught) == 1 and "a text of 11 tokens does not fit the context of 12" in str(caught[0].message)


def test_the_originals_cut_leaves_a_literal_end():
    ours, theirs = (Vocab(50, 48, 49, 9, context=12, original=original) for original in (False, True))
    rng = random.Random(0)
    for n_codes in range(12):
        for n_words in range(30):
            codes, words = [rng.randrange(9) for _ in range(n_codes)], [rng.choice([*range(48), 49, 49]) for _ in range(n_words)]
            assert theirs.sequence(codes, words) == in_two_steps(theirs, codes, words)
            assert ours.sequence(codes, words)[-1] == 49


# The model

@pytest.fixture(scope="module")
def titok():
    torch.manual_seed(0)
    return TiTok(TITOK).eval()


@pytest.fixture(scope="module")
def bpe(): return BPE.train(TEXTS * 20, 320)


@pytest.fixture(scope="module")
def model(titok, bpe):
    torch.manual_seed(1)
    return FuseLIP(FuseLIPConfig(width=32, layers=2, heads=2, context=32), titok, bpe).eval()


@pytest.fixture(scope="module")
def batch():
    "Images and texts, some missing."
    generator = torch.Generator().manual_seed(2)
    images = [torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=generator) for _ in range(5)]
    return [images[0], None, images[1], images[2], images[3], None, images[4]], [TEXTS[0], TEXTS[1], None, TEXTS[2], TEXTS[3], TEXTS[3], None]


def test_padding_and_packing_do_not_matter(model, batch):
    sequences = model.item_tokenizer(make_items(*batch))
    ids, lengths = pad_sequences(sequences)
    wide = torch.nn.functional.pad(ids, (0, 32 - ids.shape[1]), value=7)  # padding of any id is padding
    with torch.no_grad():
        one = model(ids, lengths, packed=False)
        for packed in (False, True): torch.testing.assert_close(model(wide, lengths, packed=packed), one, atol=1e-5, rtol=0)
        for row, sequence in enumerate(sequences):
            torch.testing.assert_close(model(*pad_sequences([sequence]))[0], one[row], atol=1e-5, rtol=0)
    assert (one[0] - one[1]).abs().max() > 0.01


def the_original_written_out(encoder, ids):
    "Cut at the last of the first ends, hide every id 0, pool at the first end; no lengths, no packing."
    ends = torch.tensor([row.index(encoder.vocab.eot) for row in ids.tolist()])
    ids = ids[:, :int(ends.max()) + 1]
    x = encoder.token_embedding(ids) + encoder.positional_embedding[:ids.shape[1]]
    for block in encoder.transformer.resblocks:
        scores = block.attn.split_heads(block.attn.project(block.ln_1(x)))
        attention = (scores[0] @ scores[1].mT / scores[0].shape[-1] ** 0.5).masked_fill((ids == 0)[:, None, None], -torch.inf).softmax(-1) @ scores[2]
        x = x + block.attn.out_proj(attention.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.ln_2(x))
    return torch.nn.functional.normalize(encoder.ln_final(x[torch.arange(len(ids)), ends]), dim=-1)


@pytest.mark.parametrize("packed", [False, True])
@torch.no_grad()
def test_quirks_of_the_original(packed):
    "Zeros inside and ends inside, in a batch of any lengths."
    torch.manual_seed(0)
    quirky = SequenceEncoder(FuseLIPConfig(64, 2, 4, 4.0, 48), Vocab(**vars(VOCAB) | {"original": True})).eval()
    plain = SequenceEncoder(FuseLIPConfig(64, 2, 4, 4.0, 48), VOCAB).eval()
    for table in (quirky.token_embedding.weight, quirky.positional_embedding): table.normal_()
    plain.load_state_dict(quirky.state_dict())
    rng = random.Random(1)
    for _ in range(5):
        texts = [[rng.choice([0, 0, 302, *range(1, 60)]) for _ in range(rng.randrange(1, 40))] for _ in range(9)]
        ids, lengths = pad_sequences([quirky.vocab.sequence((), text) for text in texts])
        torch.testing.assert_close(quirky(ids, lengths, packed=packed), the_original_written_out(quirky, ids), atol=1e-5, rtol=0)
        ordinary, lengths = pad_sequences([VOCAB.sequence((), [word or 1 for word in text if word != 302]) for text in texts])
        torch.testing.assert_close(quirky(ordinary, lengths, packed=packed), plain(ordinary, lengths, packed=packed), atol=1e-5, rtol=0)


def test_masked_positions_do_not_depend_on_packing(model, batch):
    ids, lengths = pad_sequences(model.item_tokenizer(make_items(*batch)))
    chosen = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.4) & (torch.arange(ids.shape[1]) < lengths[:, None] - 1)
    labels, hidden = ids.masked_fill(~chosen, -100), ids.masked_fill(chosen, model.vocab.mask)
    with torch.no_grad(): one, other = (model(hidden, lengths, labels, packed=packed) for packed in (False, True))
    assert len(one.targets) == int(chosen.sum()) > 0
    for encoded in (one, other):
        order = encoded.rows.argsort(stable=True)
        assert torch.equal(encoded.targets[order], ids[chosen]) and torch.equal(encoded.rows[order], chosen.nonzero()[:, 0])
    torch.testing.assert_close(one.logits[one.rows.argsort(stable=True)], other.logits[other.rows.argsort(stable=True)], atol=1e-5, rtol=0)


def test_nothing_masked_gives_no_logits(model):
    ids, lengths = pad_sequences(model.item_tokenizer([Item(text="blue"), Item(text=TEXTS[0])]))
    encoded = model(ids, lengths, torch.full_like(ids, -100))
    assert encoded.logits.shape == (0, model.vocab.size) and len(encoded.targets) == len(encoded.rows) == 0
    assert torch.equal(encoded.embeddings, model(ids, lengths))


def test_encode_keeps_order_whatever_the_batch(model, batch):
    images, texts = batch
    together = model.encode(images, texts)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(images)))
    order = [5, 2, 0, 6, 3, 1, 4]
    torch.testing.assert_close(model.encode([images[i] for i in order], [texts[i] for i in order], batch_size=2), together[order], atol=1e-5, rtol=0)
    for row, (image, text) in enumerate(zip(images, texts)):
        if text is None: alone = model.encode_image([image])
        elif image is None: alone = model.encode_text([text])
        else: alone = model.encode_multimodal([image], [text])
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=0)
    assert model.encode_text([]).shape == (0, 32)


def test_the_interface_of_every_embedding_model(model, batch):
    items = make_items(*batch)
    inputs = model.collate(items)
    assert set(inputs) == {"ids", "lengths"} and all(len(value) == len(items) and value.dtype == torch.int64 for value in inputs.values())
    with torch.no_grad(): torch.testing.assert_close(model(**inputs), model.embed_items(items), atol=1e-5, rtol=0)
    assert model.image_size == TITOK.image_size and model.embed_items([]).shape == (0, 32)


def test_what_is_the_same_sequence_is_embedded_once(model, batch, monkeypatch):
    items, embedded, forward = make_items(*batch), [], SequenceEncoder.forward
    monkeypatch.setattr(SequenceEncoder, "forward", lambda self, ids, *rest, **more: embedded.append(len(ids)) or forward(self, ids, *rest, **more))
    expected = model.embed_items(items)
    assert sum(embedded) == len(items)
    embedded.clear()
    copies = [Item(item.image.clone() if item.image is not None else None, item.text) for item in items]
    order = [3, 0, 3, 6, 1, 1, 5]
    torch.testing.assert_close(model.embed_items([copies[i] for i in order] + [items[3]]), expected[[*order, 3]], atol=1e-5, rtol=0)
    assert sum(embedded) == len(set(order))


def test_encode_leaves_the_mode_and_the_tokenizer_alone(model):
    model.train()
    model.encode_text(["blue"])
    assert model.training and model.transformer.training and not model.image_tokenizer.training
    assert not any(parameter.requires_grad for parameter in model.image_tokenizer.parameters())
    model.eval()


@pytest.mark.parametrize("arguments, error, message", [
    ({}, ValueError, "images, texts or both"),
    ({"texts": "blue"}, TypeError, r"texts must be a list, not str; wrap .* in \[ \]"),
    ({"images": torch.zeros(3, 16, 16)}, TypeError, "images must be a list, not Tensor"),
    ({"images": [torch.zeros(3, 16, 16)], "texts": ["a", "b"]}, ValueError, "same length.*1 and 2"),
    ({"texts": ["a", None]}, ValueError, "row 1: .*needs an image"),
    ({"texts": ["a", 5]}, TypeError, "row 1: text must be a string"),
    ({"images": [torch.zeros(16, 16)]}, TypeError, r"not Tensor of shape \(16, 16\)"),
    ({"images": ["no-such.png"]}, FileNotFoundError, "no-such.png")])
def test_what_cannot_be_encoded_is_refused(model, arguments, error, message):
    with pytest.raises(error, match=message): model.encode(**arguments)


# Saving and loading

def test_save_and_load_are_bit_for_bit(model, batch, tmp_path):
    model.save_pretrained(tmp_path / "run" / "model")
    assert sorted(path.name for path in (tmp_path / "run" / "model").iterdir()) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    for folder in (tmp_path / "run" / "model", tmp_path / "run"):
        again = FuseLIP.from_pretrained(folder)
        assert again.config == model.config and again.vocab == model.vocab and not again.training
        assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
        assert torch.equal(again.encode(*batch), model.encode(*batch))


def test_a_model_with_clips_vocabulary_comes_back_with_it(titok, tmp_path):
    model = FuseLIP(FuseLIPConfig(width=8, layers=1, heads=1, context=16), titok, CLIPBPE())
    model.save_pretrained(tmp_path)
    again = FuseLIP.from_pretrained(tmp_path)
    assert isinstance(again.item_tokenizer.text_tokenizer, CLIPBPE) and again.vocab == model.vocab and again.vocab.n_text == 49408
    assert torch.equal(again.encode_text(["a dog"]), model.encode_text(["a dog"]))


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("ln_final.weight"), "ln_final.weight is missing"),
    (lambda state: state.update(extra=torch.zeros(1)), "extra is not expected"),
    (lambda state: state.update({"token_embedding.weight": torch.zeros(3, 4)}), r"token_embedding.weight has shape \(3, 4\) instead of")])
def test_load_errors_name_the_key(model, tmp_path, change, message):
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message): FuseLIP.from_pretrained(tmp_path)


def test_folders_that_hold_no_model_are_refused(model, titok, tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"): FuseLIP.from_pretrained(tmp_path)
    titok.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not describe a FuseLIP model"): FuseLIP.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="no text tokenizer"): FuseLIP.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json.*is not JSON"): FuseLIP.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole safetensors file"): FuseLIP.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"): FuseLIP.from_pretrained(tmp_path)


# Sizes and starting values

@pytest.mark.parametrize("width, heads, n_codes, vocabulary, trainable, blocks, head", [
    (384, 6, 4096, 53_505, 42_111_491, 21_293_568, 202_113), (512, 8, 8192, 57_601, 67_734_787, 37_828_608, 321_281)])
def test_parameter_counts_are_the_papers(width, heads, n_codes, vocabulary, trainable, blocks, head):
    text = SimpleNamespace(n_vocab=49408, pad=0, sot=49406, eot=49407)
    count = lambda module: sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    with torch.device("meta"):
        model = FuseLIP(FuseLIPConfig(width=width, layers=12, heads=heads, context=180), TiTok(TiTokConfig(image_size=256, patch_size=16, n_latents=128, n_codes=n_codes)), text)
    assert model.vocab.size == vocabulary and count(model) == trainable
    assert count(model.transformer) == blocks and count(model.mask_prediction_head) == head


def test_starting_values_are_the_papers():
    torch.manual_seed(0)
    encoder = SequenceEncoder(FuseLIPConfig(width=64, layers=3, heads=4, context=180), VOCAB)
    state, depth = encoder.state_dict(), (2 * 3) ** -0.5
    assert state["logit_scale"].item() == pytest.approx(2.302585) and state["logit_bias"].item() == -10
    for name, value in state.items():
        if name.endswith(("attn.in_proj_bias", "out_proj.bias", "head.bias")) or ("ln_" in name or "layer_norm" in name) and name.endswith("bias"): assert not value.any(), name
        elif "ln_" in name or "layer_norm" in name: assert (value == 1).all(), name
        elif value.ndim == 2 and "dense" not in name:
            rule = {"token_embedding.weight": 0.02, "positional_embedding": 0.01}.get(name) or next(
                std for part, std in {"in_proj": 64**-0.5, "out_proj": 64**-0.5 * depth, "c_proj": 64**-0.5 * depth, "c_fc": 128**-0.5}.items() if part in name)
            assert value.std().item() == pytest.approx(rule, rel=0.05), name


def test_embed_sequences_of_none(model): assert embed_sequences(model, []).shape == (0, 32)


# What cannot be meant

def test_a_batch_size_below_one_and_one_that_reaches_the_image_tokenizer(model, monkeypatch):
    images = [torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8) for _ in range(5)]
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, not {size}"): model.encode(texts=["a"], batch_size=size)
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, not {size}"): model.encode(images=images, batch_size=size)
    seen, encode = [], model.image_tokenizer.encode
    monkeypatch.setattr(model.image_tokenizer, "encode", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    small = model.encode(images=images, batch_size=2)
    assert seen == [2, 2, 1] and torch.allclose(small, model.encode(images=images), atol=1e-6)


@pytest.mark.parametrize("pixels,error,message", [
    (torch.zeros(2, 3, 16, 16, dtype=torch.int64), TypeError, "uint8, or floats in .*not torch.int64"),
    (torch.full((2, 3, 16, 16), 200.0), ValueError, r"must lie in \[0, 1\], not in \[200, 200\]; divide by 255"),
    (torch.full((2, 3, 16, 16), float("nan")), ValueError, "must lie in"),
    (torch.zeros(3, 16, 16), ValueError, r"shape \(b, 3, 16, 16\), not \(3, 16, 16\)"),
    (torch.zeros(2, 3, 32, 32), ValueError, r"shape \(b, 3, 16, 16\), not \(2, 3, 32, 32\)")])
def test_pixels_that_cannot_be_meant(titok, pixels, error, message):
    with pytest.raises(error, match=message): titok.encode(pixels)


def test_codes_that_cannot_be_meant_and_pixels_in_half_precision(titok):
    with pytest.raises(ValueError, match=r"shape \(b, 4\), not \(2, 1\)"): titok.decode(torch.zeros(2, 1, dtype=torch.int64))
    pixels = torch.rand(2, 3, 16, 16).half()
    assert torch.equal(titok.encode(pixels), titok.encode(pixels.float()))


@pytest.mark.parametrize("code", ["torch.backends.fp32_precision = 'tf32'", "torch.set_float32_matmul_precision('medium')", "torch.backends.cuda.matmul.allow_tf32 = True", "torch.backends.cuda.matmul.fp32_precision = 'tf32'"])
def test_products_are_whole_whatever_the_user_has_set_and_it_stays_so(code):
    if "fp32_precision" in code and not hasattr(torch.backends, "fp32_precision"): pytest.skip("of a later PyTorch")
    asked = "torch.get_float32_matmul_precision()" if "medium" in code else "torch.backends.cuda.matmul.fp32_precision" if "fp32" in code else "torch.backends.cuda.matmul.allow_tf32"
    lines = ["import torch", "from fuselip_edu.titok import whole_products", code, f"before = {asked}", "with whole_products(torch.device('cpu')): torch.ones(2, 2) @ torch.ones(2, 2)", f"assert {asked} == before, (before, {asked})"]
    subprocess.run([sys.executable, "-c", "; ".join(lines[:4]) + "\n" + "\n".join(lines[4:])], check=True)


def test_products_stay_whole_while_another_thread_is_done_with_its_own():
    from fuselip_edu.titok import whole_products
    matmul, name = torch.backends.cuda.matmul, "fp32_precision" if hasattr(torch.backends.cuda.matmul, "fp32_precision") else "allow_tf32"
    before, first, tries, left, seen = getattr(matmul, name), threading.Event(), threading.Event(), threading.Event(), []

    class Cuda: type = "cuda"  # only the settings are looked at

    def work():
        first.wait()
        tries.set()
        with whole_products(Cuda):
            left.wait()  # without a lock this one is inside while the other puts everything back
            seen.append(getattr(matmul, name))

    thread = threading.Thread(target=work)
    thread.start()
    with whole_products(Cuda):
        first.set()
        tries.wait()
        time.sleep(0.1)
        with whole_products(Cuda): whole = getattr(matmul, name)  # one inside the other, as where an encoder calls an encoder
    left.set()
    thread.join()
    assert seen == [whole] and getattr(matmul, name) == before


def test_texts_that_are_no_unicode_are_refused_where_they_are_made():
    with pytest.raises(ValueError, match="text must be valid Unicode, not 'smile .ud83d'"): Item(text="smile \ud83d")


def test_a_hub_that_cannot_be_reached_is_told_in_a_line_whatever_its_client_raises(monkeypatch):
    import huggingface_hub
    class Refused(Exception): pass
    for error, told in ((Refused("403 Forbidden\nmore"), "403 Forbidden"), (Refused(), "Refused")):
        def download(*given, error=error, **more): raise error
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(ConnectionError, match=rf"the hub could not be reached for it \({told}\)"): FuseLIP.from_pretrained("owner/name")


def test_a_model_that_fails_in_the_middle_goes_on_training(model):
    model.train()
    with pytest.raises(Exception): embed_sequences(model, [[1] * 4000])
    assert model.training
    model.eval()


def test_a_card_is_named_after_the_folder_however_it_is_given(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(".")
    assert (tmp_path / "README.md").read_text().count(tmp_path.name)


def test_a_model_built_on_another_loads_as_what_it_is(model, tmp_path):
    class Mine(FuseLIP): pass
    model.save_pretrained(tmp_path)
    assert isinstance(Mine.from_pretrained(tmp_path), Mine)
