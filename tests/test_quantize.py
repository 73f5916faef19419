"Vector quantisation against brute force, its gradients and its cures."
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fuselip_edu.quantize import FiniteScalarQuantizer, VectorQuantizer, nearest_code, perplexity, straight_through
from fuselip_edu.titok import TiTok, TiTokConfig, TokenizerTrainConfig, TokenizerTraining, outline_error, train_tokenizer


@pytest.mark.parametrize("n, k, d", [(1, 1, 1), (500, 64, 2), (300, 256, 12), (200, 1000, 64)])
def test_nearest_code_is_the_nearest(n, k, d):
    torch.manual_seed(n + k + d)
    vectors, codebook = torch.randn(n, d), torch.randn(k, d)
    distance = (vectors.double()[:, None] - codebook.double()[None]).pow(2).sum(-1)
    two = distance.topk(min(2, k), largest=False).values
    clear = two[:, -1] - two[:, 0] > 1e-4 if k > 1 else torch.ones(n, dtype=torch.bool)
    assert clear.float().mean() > 0.95
    found = nearest_code(vectors, codebook)
    assert found.dtype == torch.int64 and torch.equal(found[clear], distance.argmin(1)[clear])
    chosen = distance.gather(1, found[:, None])[:, 0]
    assert torch.allclose(chosen, two[:, 0], atol=1e-4)


def test_nearest_code_takes_low_precision_and_stays_in_fp32_under_autocast():
    torch.manual_seed(0)
    codebook = 10 + torch.arange(50.0)[:, None] * torch.ones(1, 8) * 1e-2  # bf16 cannot tell these apart
    with torch.autocast("cpu", torch.bfloat16): found = nearest_code(codebook, codebook)
    assert torch.equal(found, torch.arange(50))
    assert nearest_code(torch.randn(3, 8).half(), codebook).shape == (3,)


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other():
    vectors, quantized = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    arriving = torch.randn(5, 3)
    out = straight_through(vectors, quantized)
    out.backward(arriving)
    assert torch.allclose(out, quantized, atol=1e-6) and torch.equal(vectors.grad, arriving) and quantized.grad is None


def test_perplexity():
    assert perplexity(torch.arange(64).repeat(3), 64) == pytest.approx(64, rel=1e-5)
    assert perplexity(torch.full((2, 9), 5), 64) == pytest.approx(1)
    p = torch.tensor([0.5, 0.25, 0.25])
    assert perplexity(torch.tensor([[0, 0], [1, 2]]), 3) == pytest.approx(float(torch.exp(-(p * p.log()).sum())))
    with pytest.raises(ValueError, match="at least one"): perplexity(torch.zeros(0, dtype=torch.long), 4)


@pytest.mark.parametrize("l2_norm", [True, False])
def test_losses_pull_one_side_each(l2_norm):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 4, l2_norm, commitment=0.25)
    quantizer.embedding.weight.data = torch.randn(16, 4)
    z = torch.randn(3, 5, 4, requires_grad=True)
    quantized, indices, loss = quantizer(z)
    vectors = F.normalize(z, dim=-1) if l2_norm else z
    codes = quantizer.codebook[indices]
    expected = 0.0
    for i in range(3):
        for j in range(5): expected += (codes[i, j] - vectors[i, j]).pow(2).sum() * 1.25 / (3 * 5 * 4)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(quantized, codes, atol=1e-6)
    loss.backward()
    reference = torch.autograd.grad(0.25 * F.mse_loss(vectors, codes.detach()), z)[0]
    assert torch.allclose(z.grad, reference, atol=1e-7)
    dead = torch.ones(16, dtype=torch.bool).index_fill(0, indices.unique(), False)
    assert dead.any() and (quantizer.embedding.weight.grad[dead] == 0).all()
    assert (quantizer.embedding.weight.grad[~dead].norm(dim=1) > 0).all()


def test_the_decoder_gradient_reaches_the_encoder_and_not_the_codes():
    quantizer = VectorQuantizer(16, 4, l2_norm=False)
    z = torch.randn(6, 4, requires_grad=True)
    quantizer(z)[0].sum().backward()
    assert torch.equal(z.grad, torch.ones(6, 4)) and quantizer.embedding.weight.grad is None


def test_l2_codebook_lies_on_the_unit_sphere():
    quantizer = VectorQuantizer(32, 6)
    quantizer.embedding.weight.data = torch.randn(32, 6) * torch.logspace(-2, 2, 32)[:, None]
    assert torch.allclose(quantizer.codebook.norm(dim=-1), torch.ones(32), atol=1e-6)
    z = torch.randn(4, 7, 6)
    codes, indices, _ = quantizer(z)
    assert torch.allclose(codes.norm(dim=-1), torch.ones(4, 7), atol=1e-5)
    assert torch.equal(quantizer(100 * z)[1], indices)  # directions only
    cosine = F.normalize(z.double(), dim=-1) @ F.normalize(quantizer.embedding.weight.double(), dim=-1).T
    assert torch.equal(indices, cosine.argmax(-1))


@pytest.mark.parametrize("l2_norm", [True, False])
def test_fill_from_replaces_exactly_the_unused(l2_norm):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(64, 4, l2_norm)
    quantizer.embedding.weight.data = torch.randn(64, 4)
    used = quantizer(torch.randn(40, 4))[1].unique()
    before, vectors = quantizer.codebook.detach().clone(), torch.randn(200, 4)
    assert quantizer.fill_from(vectors, torch.Generator().manual_seed(1), dead_only=True) == 64 - len(used)
    after, changed = quantizer.codebook.detach(), (quantizer.codebook != before).any(1)
    assert torch.equal((~changed).nonzero()[:, 0], used)
    source = F.normalize(vectors, dim=-1) if l2_norm else vectors
    assert (torch.cdist(after[changed], source).min(1).values < 1e-3).all()
    assert (quantizer.usage == 0).all()
    assert quantizer.fill_from(vectors) == 64 and (torch.cdist(quantizer.codebook, source).min(1).values < 1e-3).all()


def test_usage_counts_only_in_training_and_is_not_saved():
    quantizer = VectorQuantizer(8, 3)
    quantizer(torch.randn(5, 2, 3))
    assert quantizer.usage.sum() == 10
    quantizer.eval()(torch.randn(5, 2, 3))
    assert quantizer.usage.sum() == 10 and set(quantizer.state_dict()) == {"embedding.weight"}


def test_fill_from_repeats_with_its_seed():
    tables = []
    for _ in range(2):
        torch.manual_seed(3)
        quantizer, vectors = VectorQuantizer(32, 4), torch.randn(100, 4)
        quantizer.fill_from(vectors, torch.Generator().manual_seed(7))
        tables.append(quantizer.codebook.detach().clone())
    assert torch.equal(*tables)


@pytest.mark.parametrize("quantizer", [VectorQuantizer(64, 3), FiniteScalarQuantizer((4, 4, 4))])
def test_one_interface(quantizer):
    torch.manual_seed(0)
    for shape in ((3,), (5, 3), (2, 5, 3), (2, 2, 5, 3)):
        z = torch.randn(shape, requires_grad=True)
        codes, indices, loss = quantizer(z)
        assert codes.shape == shape and indices.shape == shape[:-1] and loss.shape == () and indices.dtype == torch.int64
        assert torch.allclose(codes, quantizer.decode(indices), atol=1e-5)
        (codes.pow(2).sum() + codes.sum() + loss).backward()
        assert torch.isfinite(z.grad).all() and (z.grad != 0).any()
    with pytest.raises(ValueError, match="3.* 5"): quantizer(torch.randn(2, 5))
    with pytest.raises(IndexError, match="0 to 63"): quantizer.decode(torch.tensor([0, 64]))
    with pytest.raises(IndexError, match="-1"): quantizer.decode(torch.tensor([-1, 3]))


@pytest.mark.parametrize("levels", [(2,), (8, 6, 5), (3, 3), (7, 2, 4, 2)])
def test_finite_scalar_codes(levels):
    quantizer = FiniteScalarQuantizer(levels)
    every = quantizer.decode(torch.arange(quantizer.n_codes))
    assert len(every.unique(dim=0)) == quantizer.n_codes and every.min() == -1 and every.max() == 1
    assert [len(every[:, i].unique()) for i in range(len(levels))] == list(levels)
    logits = torch.special.logit((every + 1) / 2, eps=1e-4)  # what squashes to the code
    assert torch.equal(quantizer(logits)[1], torch.arange(quantizer.n_codes))
    assert not list(quantizer.parameters()) and not quantizer.state_dict()


def test_finite_scalar_gradient_is_that_of_the_squashing():
    quantizer, z = FiniteScalarQuantizer((8, 5)), torch.randn(10, 2, dtype=torch.float32, requires_grad=True)
    quantizer(z)[0].sum().backward()
    s = z.detach().sigmoid()
    assert torch.allclose(z.grad, 2 * s * (1 - s), atol=1e-6)
    with pytest.raises(ValueError, match="2 levels"): FiniteScalarQuantizer((8, 1))


# Training an image tokenizer

SIZES = TiTokConfig(image_size=16, patch_size=8, n_latents=4, n_codes=16, width=16, layers=1, heads=2, decoder_width=16, decoder_layers=1, decoder_heads=2)


@pytest.mark.parametrize("name,value,message", [("steps", 0, "at least 1"), ("log_every", 0, "at least 1"), ("reset_every", 0, "at least 1"), ("batch_size", 0, "at least 1"), ("lr", -1, "not be negative"), ("warmup_steps", -1, "not be negative"), ("outlines", -1, "not be negative")])
def test_recipes_that_cannot_be_meant(name, value, message):
    with pytest.raises(ValueError, match=f"train.{name} must {'be' if message[0] == 'a' else ''}.*{message}.*{value}"): TokenizerTrainConfig(**{name: value})


def test_steps_that_leave_none_for_the_codebook_are_refused():
    for changes in ({"steps": 100}, {"steps": 40, "free_steps": 40}):
        with pytest.raises(ValueError, match=rf"leaves none of train.steps {changes['steps']} .*give fewer, as in --train.free-steps {changes['steps'] // 4}, or more"): TokenizerTrainConfig(**changes)
    assert TokenizerTrainConfig(steps=1, free_steps=0).steps == 1


@pytest.mark.parametrize("patch_size", [7, 0, 64])
def test_patches_that_do_not_divide_the_image_are_refused(patch_size):
    with pytest.raises(ValueError, match=f"patches of {patch_size} pixels do not divide an image of 32; give a patch_size that does"): TiTokConfig(patch_size=patch_size)


def test_an_error_that_is_no_number_stops_the_training():
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    with pytest.raises(FloatingPointError, match="the error became .* at step .*--train.lr"):
        train_tokenizer(TiTok(SIZES), images, TokenizerTrainConfig(steps=30, free_steps=10, lr=1e30, warmup_steps=0, batch_size=4))
    rows = train_tokenizer(TiTok(SIZES), images, TokenizerTrainConfig(steps=4, free_steps=2, warmup_steps=0, batch_size=4, log_every=2))
    assert [row["step"] for row in rows] == [2, 4]


def test_matrices_inside_the_blocks_of_a_tokenizer_take_steps_of_muon():
    tokenizer = TiTok(SIZES)
    groups = TokenizerTraining(tokenizer, kept_images(), KEPT).optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(tokenizer.parameters()))
    taken = {name for name, p in tokenizer.named_parameters() if any(p is one for group in groups if group["momentum"] for one in group["params"])}
    assert taken == {f"{half}.transformer.0.{name}" for half in ("encoder", "decoder") for name in ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")}


def test_the_commitment_of_a_recipe_is_that_of_the_training_alone():
    z, losses = torch.randn(2, 4, 12), []
    for weight in (0.0, 0.25, 4.0):
        torch.manual_seed(0)
        training = TokenizerTraining(TiTok(SIZES), kept_images(), dataclasses.replace(KEPT, free_steps=0, commitment=weight))
        training.quantise(z)  # draws the codebook
        training.step = 1
        losses.append(training.quantise(z + 0.1)[2])
        assert training.tokenizer.quantize.commitment == 0.25  # ETT goes on with it
    assert losses[0] > 0
    torch.testing.assert_close(torch.stack(losses), losses[0] * torch.tensor([1.0, 1.25, 5.0]))


def test_outlines_count_and_an_even_shift_has_none():
    wanted, spot = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 1, 2, 2)
    spot[0, 0, 0, 1] = 2.0  # one of two differences across, and one of two down
    assert outline_error(spot, torch.zeros(1, 1, 2, 2)) == 4.0
    torch.testing.assert_close(outline_error(wanted + 0.3, wanted), torch.tensor(0.0), atol=1e-12, rtol=0)
    found = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        training = TokenizerTraining(TiTok(SIZES), kept_images(), dataclasses.replace(KEPT, outlines=weight))
        found.append((float(training.advance()), training.tokenizer.decoder.mask_token.grad.norm()))
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]  # the error that is reported is that of the pixels


class Pulled(Exception): "The plug."


KEPT = TokenizerTrainConfig(steps=60, free_steps=20, batch_size=4, log_every=2, reset_every=6, warmup_steps=3, device="cpu")


def kept_images(): return torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def trained(recipe, path="", until=10**9):
    torch.manual_seed(0)
    tokenizer, shown = TiTok(SIZES), []

    def watch(row):
        shown.append(row["step"])
        if row["step"] == until: raise Pulled

    try: return tokenizer, train_tokenizer(tokenizer, kept_images(), recipe, watch, path), shown
    except Pulled: return None, None, shown


def test_a_training_of_a_tokenizer_that_was_cut_off_ends_like_one_that_was_not(tmp_path):
    whole, rows, _ = trained(KEPT)
    assert sum(row["replaced"] for row in rows) > 0  # dead codes are part of what must be kept
    path, starts = tmp_path / "unfinished.safetensors", []
    for until in (8, 14, 24, 38, 44):  # before the first file, before the quantiser, and with it
        starts.append(trained(KEPT, path, until)[2][0])
        assert not list(tmp_path.glob(".*"))  # nothing half-written
    tokenizer, found, shown = trained(KEPT, path)
    assert starts == [2, 2, 12, 22, 32] and shown[0] == 42
    assert found == rows
    for name, value in whole.state_dict().items(): assert torch.equal(value, tokenizer.state_dict()[name]), name


def test_the_beginning_of_another_training_is_refused(tmp_path):
    path = tmp_path / "unfinished.safetensors"
    trained(KEPT, path, 24)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="beginning of a training of other sizes, settings or pictures"): trained(dataclasses.replace(KEPT, lr=3e-3), path)
    with pytest.raises(ValueError, match="beginning of a training"): train_tokenizer(TiTok(SIZES), kept_images()[:11], KEPT, keep=path)
    with pytest.raises(ValueError, match="beginning of a training"): train_tokenizer(TiTok(dataclasses.replace(SIZES, n_codes=8)), kept_images(), KEPT, keep=path)
    assert path.read_bytes() == before
    path.write_bytes(before[:-9])
    with pytest.raises(ValueError, match="unfinished.safetensors' is not a whole safetensors file .*, or remove it to train from the start"): trained(KEPT, path)
    for place in (len(before) // 3, len(before) - 5): # a flipped bit, anywhere
        path.write_bytes(before[:place] + bytes([before[place] ^ 4]) + before[place + 1:])
        with pytest.raises(ValueError, match="unfinished.safetensors' is damaged .*; remove it to train from the start"): trained(KEPT, path)
    path.write_bytes(before)
    assert trained(dataclasses.replace(KEPT, device="auto"), path)[2][0] == 22  # where it is trained may change


@pytest.mark.parametrize("pictures, message", [(torch.rand(4, 3, 32, 32), "tensor of uint8"), (torch.zeros(0, 3, 32, 32, dtype=torch.uint8), "at least one"), (torch.zeros(4, 3, 16, 16, dtype=torch.uint8), r"\(b, 3, 32, 32\)")])
def test_pictures_that_no_tokenizer_learns_from_are_refused(pictures, message):
    with pytest.raises(ValueError, match=message): train_tokenizer(TiTok(TiTokConfig()), pictures, TokenizerTrainConfig(steps=4, free_steps=1, device="cpu"))


def test_to_look_at_a_tokenizer_or_to_take_every_second_picture_changes_nothing(tmp_path):
    pictures = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    recipe, ends = TokenizerTrainConfig(steps=12, free_steps=2, reset_every=3, batch_size=4, log_every=1, device="cpu"), []
    looks = []
    for watch, given in ((None, pictures[::2].contiguous()), (lambda *row: looks.append(tokenizer.encode(pictures)), pictures[::2])):
        torch.manual_seed(0)
        tokenizer = TiTok(TiTokConfig(n_codes=64))
        train_tokenizer(tokenizer, given, recipe, watch, keep=tmp_path / "kept.safetensors" if watch else None)
        ends.append(torch.cat([p.flatten() for p in tokenizer.parameters()]))
    assert looks and torch.equal(*ends)
