"Checkpoints in the published layouts, at full size and small: names, shapes, sizes, what is refused, and the hub (never reached here)."
import json
import math
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from fuselip_edu import titok
from fuselip_edu.core import read_weights, write_json
from fuselip_edu.fuselip import FuseLIP, FuseLIPConfig, model_card
from fuselip_edu.text import BPE
from fuselip_edu.titok import PUBLISHED, PixelDecoder, TiTok, TiTokConfig, encoder_config, published_config

S128, BL128 = PUBLISHED


# What is published, listed from the paper's facts and not from our classes: {name: shape}

def blocks(prefix, width, layers):
    shapes = {}
    for i in range(layers):
        for name, out, into in (("attn.in_proj_", 3, 1), ("attn.out_proj.", 1, 1), ("mlp.c_fc.", 4, 1), ("mlp.c_proj.", 1, 4)):
            shapes |= {f"{prefix}.{i}.{name}weight": (out * width, into * width), f"{prefix}.{i}.{name}bias": (out * width,)}
        for name in ("ln_1", "ln_2"): shapes |= {f"{prefix}.{i}.{name}.weight": (width,), f"{prefix}.{i}.{name}.bias": (width,)}
    return shapes


def titok_encoder(width, layers, n_codes, code_dim, latents=128, patches=256):
    shapes = {"latent_tokens": (latents, width), "encoder.class_embedding": (1, width), "encoder.positional_embedding": (patches + 1, width),
              "encoder.latent_token_positional_embedding": (latents, width), "encoder.patch_embed.weight": (width, 3, 16, 16), "encoder.patch_embed.bias": (width,),
              "encoder.conv_out.weight": (code_dim, width, 1, 1), "encoder.conv_out.bias": (code_dim,), "quantize.embedding.weight": (n_codes, code_dim)}
    for name in ("ln_pre", "ln_post"): shapes |= {f"encoder.{name}.weight": (width,), f"encoder.{name}.bias": (width,)}
    return shapes | blocks("encoder.transformer", width, layers)


def titok_decoder(width, layers, code_dim, legacy, latents=128, patches=256):
    shapes = {"decoder.class_embedding": (1, width), "decoder.positional_embedding": (patches + 1, width), "decoder.latent_token_positional_embedding": (latents, width),
              "decoder.mask_token": (1, 1, width), "decoder.decoder_embed.weight": (width, code_dim), "decoder.decoder_embed.bias": (width,)}
    for name in ("ln_pre", "ln_post"): shapes |= {f"decoder.{name}.weight": (width,), f"decoder.{name}.bias": (width,)}
    if legacy: shapes |= {"decoder.ffn.0.weight": (2 * width, width, 1, 1), "decoder.ffn.0.bias": (2 * width,), "decoder.ffn.2.weight": (1024, 2 * width, 1, 1), "decoder.ffn.2.bias": (1024,)}
    else: shapes |= {"decoder.ffn.0.weight": (768, width, 1, 1), "decoder.ffn.0.bias": (768,), "decoder.conv_out.weight": (3, 3, 3, 3), "decoder.conv_out.bias": (3,)}
    return shapes | blocks("decoder.transformer", width, layers)


def pixel_decoder(channels=128):
    shapes, widths = {"pixel_quantize.embedding.weight": (1024, 256)}, [channels * times for times in (1, 1, 2, 2, 4)]
    def norm(name, width): shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})
    def block(name, before, after):
        norm(f"{name}.norm1", before), norm(f"{name}.norm2", after)
        shapes.update({f"{name}.conv1.weight": (after, before, 3, 3), f"{name}.conv2.weight": (after, after, 3, 3)})
        if before != after: shapes[f"{name}.nin_shortcut.weight"] = (after, after, 1, 1)
    def conv(name, before, after): shapes.update({f"{name}.weight": (after, before, 3, 3), f"{name}.bias": (after,)})
    conv("pixel_decoder.conv_in", 256, widths[4]), conv("pixel_decoder.conv_out", widths[0], 3), norm("pixel_decoder.norm_out", widths[0])
    for i in range(2): block(f"pixel_decoder.mid.{i}", widths[4], widths[4])
    for i in range(5):
        block(f"pixel_decoder.up.{i}.block.0", widths[min(i + 1, 4)], widths[i]), block(f"pixel_decoder.up.{i}.block.1", widths[i], widths[i])
        if i: conv(f"pixel_decoder.up.{i}.upsample_conv", widths[i], widths[i])
    return shapes


def fuselip_encoder(width, layers, vocabulary, context=180):
    shapes = {"positional_embedding": (context, width), "token_embedding.weight": (vocabulary, width), "logit_scale": (), "logit_bias": (),
              "mask_prediction_head.dense.weight": (width, width), "mask_prediction_head.dense.bias": (width,), "mask_prediction_head.bias": (vocabulary,),
              "mask_prediction_head.decoder.weight": (vocabulary, width)}
    for name in ("ln_final", "mask_prediction_head.layer_norm"): shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes | blocks("transformer.resblocks", width, layers)


def tensors(shapes, scale=0.0):
    "Tensors of these shapes; with scale 0 constant, and so of almost no size on the disk."
    generator = torch.Generator().manual_seed(0)
    def make(shape): return scale * torch.randn(shape, generator=generator) if scale else torch.full((), 0.01).expand(shape)
    state = {name: make(shape) for name, shape in shapes.items()}
    if "mask_prediction_head.decoder.weight" in state: state["mask_prediction_head.decoder.weight"] = state["token_embedding.weight"]
    return state


def shapes_of(module): return {name: tuple(value.shape) for name, value in module.state_dict().items()}


TITOK_CONFIG = {
    S128: {"experiment": {"tokenizer_checkpoint": "tokenizer_titok_s128.bin", "output_dir": "titok_s_128"}, "model": {
        "vq_model": {"codebook_size": 4096, "token_size": 12, "use_l2_norm": True, "commitment_cost": 0.25, "vit_enc_model_size": "small", "vit_dec_model_size": "small",
                     "vit_enc_patch_size": 16, "vit_dec_patch_size": 16, "num_latent_tokens": 128, "finetune_decoder": True},
        "generator": {"model_type": "UViT"}}, "dataset": {"preprocessing": {"crop_size": 256}}},
    BL128: {"experiment": {"tokenizer_checkpoint": "tokenizer_titok_bl128_vq8k.bin"}, "model": {
        "vq_model": {"codebook_size": 8192, "token_size": 64, "use_l2_norm": False, "commitment_cost": 0.25, "vit_enc_model_size": "base", "vit_dec_model_size": "large",
                     "vit_enc_patch_size": 16, "vit_dec_patch_size": 16, "num_latent_tokens": 128, "finetune_decoder": False, "is_legacy": False}},
        "dataset": {"preprocessing": {"crop_size": 256}}}}


def fuselip_config(width, heads, layers, vocabulary, tokenizer, size="small", context=180):
    return {"model_name": "fuse-clip-titok", "text_config": {"context_length": context, "vocab_size": vocabulary, "width": width, "heads": heads, "layers": layers, "mlp_ratio": 4.0,
            "ls_init_value": None, "no_causal_mask": True, "pad_id": 0, "proj_bias": False, "output_tokens": False, "pool_type": "eot"}, "mask_pad": True,
            "image_tokenizer": tokenizer, "use_eoi": False, "context_length": context, "transformer_size": size, "mlm_probability": 0.1, "rand_repl_probability": 0.0}


@pytest.fixture
def hub(monkeypatch):
    "A hub of local folders; notes what is asked for."
    known, asked = {}, []
    def snapshot_download(repo_id, allow_patterns=None):
        asked.append((repo_id, allow_patterns))
        if repo_id not in known: raise known.get("error", LocalEntryNotFoundError("cannot reach huggingface.co\nmore lines"))
        return str(known[repo_id])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return SimpleNamespace(known=known, asked=asked)


# ---- sizes and names

@pytest.mark.parametrize("name, n_frozen", [(S128, 25_933_324), (BL128, 86_616_384)])
def test_published_tokenizers_have_the_published_names_and_sizes(name, n_frozen):
    config = published_config(TITOK_CONFIG[name], "config.json")
    assert config == PUBLISHED[name]
    vq = TITOK_CONFIG[name]["model"]["vq_model"]
    (width, layers, _), (decoder_width, decoder_layers, _) = (titok.MODEL_SIZES[vq[f"vit_{part}_model_size"]] for part in ("enc", "dec"))
    encoder = titok_encoder(width, layers, vq["codebook_size"], vq["token_size"])
    expected = encoder | titok_decoder(decoder_width, decoder_layers, vq["token_size"], config.legacy) | (pixel_decoder() if config.legacy else {})
    with torch.device("meta"): tokenizer, frozen = TiTok(config), TiTok(encoder_config(name))
    assert shapes_of(tokenizer) == expected and shapes_of(frozen) == encoder
    assert sum(math.prod(shape) for shape in encoder.values()) == n_frozen


@pytest.mark.parametrize("width, heads, vocabulary, tokenizer", [(384, 6, 53_505, S128), (512, 8, 57_601, BL128)])
def test_published_models_have_the_published_names(width, heads, vocabulary, tokenizer):
    sizes = encoder_config(tokenizer)
    with torch.device("meta"):
        model = FuseLIP(FuseLIPConfig(width, 12, heads, 4.0, 180, True), TiTok(sizes), SimpleNamespace(n_vocab=49408, pad=0, sot=49406, eot=49407))
    expected = fuselip_encoder(width, 12, vocabulary)
    del expected["mask_prediction_head.decoder.weight"]
    expected |= {f"image_tokenizer.{name}": shape for name, shape in titok_encoder(sizes.width, sizes.layers, sizes.n_codes, sizes.code_dim).items()}
    assert shapes_of(model) == expected


@torch.no_grad()
def test_a_full_size_model_from_the_hub(hub, tmp_path):
    "FuseLIP-S: the checkpoint alone is fetched, since the tokenizer's sizes are known."
    write_json(tmp_path / "config.json", fuselip_config(384, 6, 12, 53_505, S128))
    state = fuselip_encoder(384, 12, 53_505) | {f"image_tokenizer.model.{name}": shape for name, shape in titok_encoder(512, 8, 4096, 12).items()}
    torch.save(tensors(state), tmp_path / "pytorch_model.bin")
    hub.known["chs20/FuseLIP-S-CC3M-MM"] = tmp_path
    model = FuseLIP.from_pretrained("chs20/FuseLIP-S-CC3M-MM")
    assert [name for name, _ in hub.asked] == ["chs20/FuseLIP-S-CC3M-MM"] and "*.bin" in hub.asked[0][1]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 42_111_491
    assert sum(p.numel() for p in model.image_tokenizer.parameters()) == 25_933_324 and model.image_size == 256
    assert (model.token_embedding.weight == 0.01).all() and (model.image_tokenizer.encoder.transformer[7].mlp.c_fc.weight == 0.01).all()
    assert model.encode([torch.zeros(3, 300, 200), None], ["what is it?", "a cat"]).shape == (2, 384)
    with pytest.raises(RuntimeError, match="encoder and codebook only"): model.image_tokenizer.decode(torch.zeros(1, 128, dtype=torch.int64))


# ---- a small tokenizer in the published layout

@pytest.fixture
def small(monkeypatch): monkeypatch.setitem(titok.MODEL_SIZES, "small", (32, 1, 2)), monkeypatch.setattr(titok, "PIXEL_CHANNELS", 32)


def small_titok(folder, legacy=True, file="pytorch_model.bin", **changes):
    "Random weights; 64 pixels, 16 codes an image."
    vq = TITOK_CONFIG[S128]["model"]["vq_model"] | {"num_latent_tokens": 16, "codebook_size": 64, "vit_enc_model_size": "small", "vit_dec_model_size": "small"} | changes
    if not legacy: vq |= {"is_legacy": False, "finetune_decoder": False}
    write_json(folder / "config.json", {"model": {"vq_model": vq}, "dataset": {"preprocessing": {"crop_size": 64}}})
    shapes = titok_encoder(32, 1, 64, 12, 16, 16) | titok_decoder(32, 1, 12, legacy, 16, 16) | (pixel_decoder(32) if legacy else {})
    state = tensors(shapes, scale=0.3)
    if file.endswith(".bin"): torch.save(state, folder / file)
    else:
        from safetensors.torch import save_file
        save_file(state, folder / file)
    return state


IMAGES = torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize("legacy, file", [(True, "pytorch_model.bin"), (True, "model.safetensors"), (False, "model.safetensors")])
@torch.no_grad()
def test_a_published_tokenizer_comes_from_hub_or_folder(small, hub, tmp_path, legacy, file):
    small_titok(tmp_path, legacy, file)
    hub.known["owner/tokenizer"] = tmp_path
    here, there = TiTok.from_pretrained(tmp_path), TiTok.from_pretrained("owner/tokenizer")
    codes = here.encode(IMAGES)
    assert torch.equal(there.encode(IMAGES), codes) and codes.shape == (3, 16) and len(codes.unique()) > 1
    pixels = here.decode(codes)
    assert pixels.shape == (3, 3, 64, 64) and pixels.min() >= 0 and pixels.max() <= 1 and pixels.std() > 0.01
    assert not any(p.requires_grad for p in here.parameters()) and not here.training
    here.save_pretrained(tmp_path / "ours")
    assert torch.equal(TiTok.from_pretrained(tmp_path / "ours").decode(codes), pixels)


def written_out_pixel_decoder(state, x):
    "The MaskGIT-VQGAN decoder from its weights, with nothing but functions."
    def norm(name, x): return F.silu(F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], 1e-6))
    def conv(name, x): return F.conv2d(F.pad(x, (1, 1, 1, 1)), state[f"{name}.weight"], state.get(f"{name}.bias"))
    def block(name, x):
        y = conv(f"{name}.conv2", norm(f"{name}.norm2", conv(f"{name}.conv1", norm(f"{name}.norm1", x))))
        shortcut = state.get(f"{name}.nin_shortcut.weight")
        return y + (x if shortcut is None else F.conv2d(y, shortcut))
    x = conv("conv_in", x)
    for i in (0, 1): x = block(f"mid.{i}", x)
    for i in (4, 3, 2, 1, 0):
        for j in (0, 1): x = block(f"up.{i}.block.{j}", x)
        if i: x = conv(f"up.{i}.upsample_conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return conv("conv_out", norm("norm_out", x))


@torch.no_grad()
def test_the_pixel_decoder_written_out(small, tmp_path):
    state = small_titok(tmp_path)
    tokenizer = TiTok.from_pretrained(tmp_path)
    assert isinstance(tokenizer.pixel_decoder, PixelDecoder)
    codes = tokenizer.encode(IMAGES[:1])
    scores = tokenizer.decoder(tokenizer.quantize.decode(codes))  # (1, 1024, 4, 4)
    shares = scores[0].flatten(1).softmax(0)  # (1024, 16)
    vectors = (shares.T @ state["pixel_quantize.embedding.weight"]).T.reshape(1, 256, 4, 4)
    expected = written_out_pixel_decoder({name.removeprefix("pixel_decoder."): value for name, value in state.items()}, vectors)
    torch.testing.assert_close(titok.paint(tokenizer, scores), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tokenizer.decode(codes), expected.clamp(0, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("latent_tokens"), "latent_tokens is missing"),
    (lambda state: state.pop("pixel_decoder.up.3.block.0.nin_shortcut.weight"), "pixel_decoder.up.3.block.0.nin_shortcut.weight is missing"),
    (lambda state: state.update({"pixel_encoder.x": torch.zeros(1)}), "pixel_encoder.x is not expected"),
    (lambda state: state.update({"quantize.embedding.weight": torch.zeros(65, 12)}), r"quantize.embedding.weight has shape \(65, 12\) instead of \(64, 12\)")])
def test_a_tokenizer_that_does_not_fit_is_named(small, tmp_path, change, message):
    state = small_titok(tmp_path)
    change(state)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"pytorch_model.bin' does not fit the model: {message}"): TiTok.from_pretrained(tmp_path)


@pytest.mark.parametrize("changes, message", [
    ({"vit_enc_model_size": "huge"}, "vit_enc_model_size 'huge'.*'small' or 'base' or 'large'"),
    ({"quantize_mode": "vae"}, "quantize_mode 'vae'"),
    ({"vit_dec_patch_size": 8}, "vit_dec_patch_size 8")])
def test_a_configuration_with_something_else_is_refused(small, tmp_path, changes, message):
    small_titok(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"config.json' has model.vq_model.{message}"): TiTok.from_pretrained(tmp_path)


def test_broken_tokenizer_folders(small, tmp_path):
    small_titok(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model"]["vq_model"]["token_size"]
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match="config.json' has no field model.vq_model.token_size"): TiTok.from_pretrained(tmp_path)
    write_json(tmp_path / "config.json", {"model": "titok", "wdith": 3})
    with pytest.raises(ValueError, match="config.json' does not fit this version .*wdith"): TiTok.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json' is not JSON"): TiTok.from_pretrained(tmp_path)
    small_titok(tmp_path)
    data = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(data[:len(data) // 2])
    with pytest.raises(ValueError, match="pytorch_model.bin' is not a whole torch file"): TiTok.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor pytorch_model.bin"): TiTok.from_pretrained(tmp_path)


def test_nothing_in_a_bin_file_is_run(tmp_path):
    class Trap:
        def __reduce__(self): return (open, (str(tmp_path / "sprung"), "w"))
    torch.save({"weight": Trap()}, tmp_path / "trap.bin")
    torch.save([torch.zeros(1)], tmp_path / "list.bin")
    for name in ("trap.bin", "list.bin"):
        with pytest.raises(ValueError, match=f"{name}' holds something other than named tensors"): read_weights(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_a_legacy_tokenizer_is_not_trained():
    for changes in ({"legacy": True}, {"has_decoder": False}):
        with pytest.raises(ValueError, match="decoder gives pixels"):
            titok.train_tokenizer(TiTok(TiTokConfig(width=16, layers=1, heads=2, decoder_width=16, decoder_layers=1, decoder_heads=2, **changes)), None, None)


def test_the_tokenizer_that_ships_is_as_it_was():
    config = TiTok.from_pretrained(titok.TINY_TOKENIZER).config
    assert (config.legacy, config.has_decoder, config.pixel_channels) == (False, True, 0)


# ---- a small FuseLIP in the original's layout

def small_fuselip(folder, tokenizer="tokenizer"):
    small_titok(folder / "tokenizer")
    shapes = fuselip_encoder(32, 1, 49409 + 64) | {f"image_tokenizer.model.{name}": shape for name, shape in titok_encoder(32, 1, 64, 12, 16, 16).items()}
    state, config = tensors(shapes, scale=0.3), fuselip_config(32, 2, 1, 49409 + 64, tokenizer)
    torch.save(state, folder / "pytorch_model.bin")
    write_json(folder / "config.json", config)
    return state, config


@pytest.fixture
def checkpoint(small, tmp_path):
    folder = tmp_path / "checkpoint"
    state, config = small_fuselip(folder)
    return SimpleNamespace(folder=folder, state=state, config=config)


def test_the_image_tokenizer_is_found_by_folder_or_hub_id(checkpoint, hub):
    items = [IMAGES[0], None], ["what is it?", "a cat"]
    beside = FuseLIP.from_pretrained(checkpoint.folder).encode(*items)
    hub.known["owner/tokenizer"] = checkpoint.folder / "tokenizer"
    for place in ("owner/tokenizer", str(checkpoint.folder / "tokenizer")):
        write_json(checkpoint.folder / "config.json", checkpoint.config | {"image_tokenizer": place})
        assert torch.equal(FuseLIP.from_pretrained(checkpoint.folder).encode(*items), beside)
    assert hub.asked == [("owner/tokenizer", ["config.json"])]  # its sizes, not its weights


@pytest.mark.parametrize("error, kind", [(UnicodeDecodeError("utf-8", b"x", 0, 1, "no text"), ValueError), (PermissionError(13, "Permission denied"), OSError)])
def test_an_image_tokenizer_that_cannot_be_read_is_named_whatever_the_error(error, kind, checkpoint, monkeypatch):
    def fails(place): raise error
    monkeypatch.setattr("fuselip_edu.fuselip.encoder_config", fails)
    with pytest.raises(kind, match="config.json' names the image tokenizer .*, and .*"): FuseLIP.from_pretrained(checkpoint.folder)


def test_quirks_come_with_the_checkpoint_and_stay(checkpoint, tmp_path):
    model = FuseLIP.from_pretrained(checkpoint.folder)
    assert model.config.original and model.vocab.original and model.item_tokenizer.text_tokenizer.encode("<end_of_text>") == [49407]
    model.save_pretrained(tmp_path / "copy")
    copy = FuseLIP.from_pretrained(tmp_path / "copy")
    texts = ["a red circle", "wow!—a circle", "a red <end_of_text> circle"]
    assert copy.config == model.config and torch.equal(copy.encode_text(texts), model.encode_text(texts))
    assert shapes_of(copy) == shapes_of(model) and not any(".model." in name for name in copy.state_dict())
    assert "quirks" in (tmp_path / "copy" / "README.md").read_text()


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("ln_final.weight"), "ln_final.weight is missing"),
    (lambda state: state.pop("image_tokenizer.model.encoder.ln_pre.bias"), "image_tokenizer.model.encoder.ln_pre.bias is missing"),
    (lambda state: state.pop("mask_prediction_head.decoder.weight"), "mask_prediction_head.decoder.weight is missing"),
    (lambda state: state.update({"mask_prediction_head.decoder.weight": state["token_embedding.weight"] + 1}), "mask_prediction_head.decoder.weight is not token_embedding.weight"),
    (lambda state: state.update({"text_projection": torch.zeros(2)}), "text_projection is not expected"),
    (lambda state: state.update({"image_tokenizer.encoder.ln_pre.bias": torch.zeros(32)}), "image_tokenizer.encoder.ln_pre.bias is not expected"),
    (lambda state: state.update({"positional_embedding": torch.zeros(77, 32)}), r"positional_embedding has shape \(77, 32\) instead of \(180, 32\)")])
def test_a_model_that_does_not_fit_is_named(checkpoint, change, message):
    change(checkpoint.state)
    torch.save(checkpoint.state, checkpoint.folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"pytorch_model.bin' does not fit the model: {message}"): FuseLIP.from_pretrained(checkpoint.folder)


@pytest.mark.parametrize("changes, message", [
    ({"use_eoi": True}, "use_eoi = True"), ({"mask_pad": False}, "mask_pad = False"), ({"mlm_probability": 0.0}, "mlm_probability = 0.0, but only checkpoints with a number above 0"),
    ({"rand_repl_probability": 0.1}, "rand_repl_probability = 0.1"), ({"text_config": {}}, "not the configuration of an original.*width"),
    ({"mlm_probability": None}, "not the configuration of an original"), ({"image_tokenizer": None}, "image_tokenizer None")])
def test_settings_that_mean_another_model_are_refused(checkpoint, changes, message):
    write_json(checkpoint.folder / "config.json", checkpoint.config | changes)
    with pytest.raises(ValueError, match=f"config.json'.*{message}"): FuseLIP.from_pretrained(checkpoint.folder)


def test_another_tokenizer_is_noticed(checkpoint):
    write_json(checkpoint.folder / "config.json", checkpoint.config | {"image_tokenizer": BL128})
    with pytest.raises(ValueError, match="vocab_size 49473, but text, .MASK. and the codes of 'yucornetto.*' make 57601"): FuseLIP.from_pretrained(checkpoint.folder)


# ---- the hub

@pytest.fixture
def ours(): # a model of ours, with random weights
    torch.manual_seed(0)
    image_tokenizer = TiTok(TiTokConfig(image_size=16, patch_size=8, n_latents=4, n_codes=32, width=16, layers=1, heads=2, decoder_width=16, decoder_layers=1, decoder_heads=2))
    return FuseLIP(FuseLIPConfig(16, 1, 2, 4.0, 32), image_tokenizer, BPE.train(["a red circle"], 300)).eval()


def test_ours_from_the_hub(ours, hub, tmp_path):
    ours.save_pretrained(tmp_path)
    hub.known["someone/shapes"] = tmp_path
    assert torch.equal(FuseLIP.from_pretrained("someone/shapes").encode_text(["a red circle"]), ours.encode_text(["a red circle"]))
    assert set(hub.asked[0][1]) == {"config.json", "*.safetensors", "*.bin", "tokenizer.json"}


@pytest.mark.parametrize("load", [FuseLIP.from_pretrained, TiTok.from_pretrained])
def test_without_a_connection(load, hub):
    with pytest.raises(ConnectionError, match=r"no folder 'someone/model' here, and the hub could not be reached for it \(cannot reach huggingface.co\); check the connection"): load("someone/model")


def test_a_name_that_the_hub_does_not_know(hub):
    import httpx
    answer = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))
    hub.known["error"] = RepositoryNotFoundError("404", response=answer)
    with pytest.raises(FileNotFoundError, match="no folder 'someone/model' here and no such model on the hub; check the name"): FuseLIP.from_pretrained("someone/model")


@pytest.mark.parametrize("name", ["no-such-folder", "no/such/folder", "./model", "/no/model", "runs/typo"])
def test_a_wrong_path_does_not_ask_the_hub(hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match=f"no folder '{name}'; check the path, or give a hub id of the form owner/name"): FuseLIP.from_pretrained(name)
    assert not hub.asked


@pytest.mark.parametrize("load", [FuseLIP.from_pretrained, TiTok.from_pretrained])
def test_a_file_or_an_address_is_no_folder(load, hub, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NotADirectoryError, match="config.json' is a file; give the folder that holds it"): load(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match="no folder 'https://huggingface.co/someone/model'; .*hub id of the form owner/name"): load("https://huggingface.co/someone/model")
    assert not hub.asked


@pytest.mark.parametrize("part, field", [("encoder", "heads"), ("image_tokenizer", "heads"), ("image_tokenizer", "pixel_mean")])
def test_a_missing_size_is_not_filled_in(ours, tmp_path, part, field):  # the weights would fit another number of heads, and give other vectors
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config[part][field]
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match=rf"config.json' does not fit this version \({part}.{field} is missing\)"): FuseLIP.from_pretrained(tmp_path)


@pytest.mark.parametrize("changes, message", [
    ({"encoder": {"heads": 5}}, "sizes that do not go together .*not divisible by 5 heads"), ({"encoder": {"layers": "two"}}, "sizes that do not go together"),
    ({"encoder": {"context": 4}}, "sizes that do not go together .*context of 4"), ({"image_tokenizer": {"heads": 0}}, "sizes that do not go together"),
    ({"image_tokenizer": {"patch_size": 7}}, "sizes that do not go together .*patches of 7 pixels"), ({"image_tokenizer": {"image_size": "16"}}, "sizes that do not go together"),
    ({"encoder": {"widht": 3}}, "encoder.widht is not known"), ({"text_tokenizer": "word"}, "text_tokenizer 'word', but only bpe and clip are known"),
    ({"model": "late_fusion"}, "does not describe a FuseLIP model but 'late_fusion'")])
def test_a_configuration_that_cannot_be_is_named(ours, tmp_path, changes, message):
    ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", config | {name: config[name] | value if isinstance(value, dict) else value for name, value in changes.items()})
    with pytest.raises(ValueError, match=f"config.json'.*{message}"): FuseLIP.from_pretrained(tmp_path)


def test_push_to_hub(ours, monkeypatch, tmp_path):
    calls = {}
    class Api:
        def __init__(self, token=None): calls["token"] = token
        def create_repo(self, repo_id, **options):
            calls["create"] = (repo_id, options)
            return SimpleNamespace(repo_id=repo_id)
        def upload_folder(self, repo_id, folder_path, **options):
            calls["upload"] = repo_id
            for path in sorted(__import__("pathlib").Path(folder_path).iterdir()): (tmp_path / path.name).write_bytes(path.read_bytes())
            return f"https://huggingface.co/{repo_id}/commit/1"
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert ours.push_to_hub("someone/shapes", private=True, licence="mit", token="t").endswith("/commit/1")
    assert calls == {"token": "t", "create": ("someone/shapes", {"private": True, "exist_ok": True}), "upload": "someone/shapes"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert torch.equal(FuseLIP.from_pretrained(tmp_path).encode_text(["a red circle"]), ours.encode_text(["a red circle"]))
    assert (tmp_path / "README.md").read_text() == model_card(ours, "someone/shapes", "mit")


def test_the_card_can_be_read_by_the_hub(ours):
    card = huggingface_hub.ModelCard(model_card(ours, "someone/shapes", "mit"))
    assert card.data.license == "mit" and card.data.library_name == "fuselip_edu" and "embeddings" in card.data.tags
    trainable = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    for part in (f"{trainable:,} parameters", 'FuseLIP.from_pretrained("someone/shapes")', "16 × 16 pixels to 4 codes of 32", "bpe, "): assert part in card.content
    assert "quirks" not in card.content
