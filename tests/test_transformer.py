"Attention against PyTorch's, padding, the block, counts, and the paper's initialisation."
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fuselip_edu import kernel
from fuselip_edu.transformer import MLP, Attention, Block, Muon, Transformer, attend_in_runs, init_transformer, key_mask, muon_groups, orthogonalised, pack


@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)


def randomised(module):
    "All parameters away from zero, so that no bias is tested by its absence."
    for p in module.parameters(): nn.init.normal_(p, std=0.2)
    return module


@pytest.mark.parametrize("width, heads", [(32, 1), (64, 4), (384, 6)])
def test_attention_is_pytorchs(width, heads):
    ours, theirs = randomised(Attention(width, heads)), nn.MultiheadAttention(width, heads, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x, lengths = torch.randn(3, 9, width), torch.tensor([9, 4, 1])
    with torch.no_grad():
        reference, shares = theirs(x, x, x, average_attn_weights=False)
        scale = reference.abs().max()
        assert (ours(x) - reference).abs().max() < 1e-5 * scale
        assert (ours.weights(x) - shares).abs().max() < 1e-5
        mask = key_mask(lengths, 9)
        reference, shares = theirs(x, x, x, key_padding_mask=~mask[:, 0, 0], average_attn_weights=False)
        assert (ours(x, mask) - reference).abs().max() < 1e-5 * scale
        assert (ours.weights(x, mask) - shares).abs().max() < 1e-5
        causal = torch.ones(9, 9, dtype=torch.bool).tril()
        reference = theirs(x, x, x, attn_mask=~causal)[0]
        assert (ours(x, causal[None, None]) - reference).abs().max() < 1e-5 * scale


def test_attention_gradients_are_pytorchs():
    ours, theirs = randomised(Attention(32, 4)), nn.MultiheadAttention(32, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x, mask = torch.randn(2, 7, 32), key_mask(torch.tensor([7, 3]), 7)
    left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours(left, mask).pow(2).sum().backward()
    theirs(right, right, right, key_padding_mask=~mask[:, 0, 0])[0].pow(2).sum().backward()
    for name, p in theirs.named_parameters():
        ours_grad = ours.get_parameter(name).grad
        assert (ours_grad - p.grad).norm() < 1e-4 * p.grad.norm() + 1e-5, name
    assert (left.grad - right.grad).norm() < 1e-4 * right.grad.norm()


def test_attention_written_out_in_loops():
    layer, x, width = randomised(Attention(8, 2)).double(), torch.randn(1, 3, 8).double(), 8
    qkv = x[0] @ layer.in_proj_weight.T + layer.in_proj_bias
    mixed = torch.zeros(3, width).double()
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        q, k, v = [qkv[:, i * width:(i + 1) * width][:, part] for i in range(3)]
        for i in range(3):
            shares = torch.stack([(q[i] * k[j]).sum() / 4**0.5 for j in range(3)]).exp()
            for j in range(3): mixed[i, part] += shares[j] / shares.sum() * v[j]
    expected = mixed @ layer.out_proj.weight.T + layer.out_proj.bias
    assert (layer(x)[0] - expected).abs().max() < 1e-10


def test_width_must_be_shared_out():
    with pytest.raises(ValueError, match="width 10 is not divisible by 4 heads"): Attention(10, 4)


def test_key_mask():
    mask = key_mask(torch.tensor([0, 2, 3]), 3)
    assert mask.shape == (3, 1, 1, 3) and mask.dtype == torch.bool
    assert mask[:, 0, 0].tolist() == [[False] * 3, [True, True, False], [True] * 3]


@pytest.mark.parametrize("padding", [0, 1, 6])
def test_padding_changes_nothing(padding):
    encoder = Transformer(64, 4, 4).eval()
    init_transformer(encoder)
    x, lengths = torch.randn(3, 10 + padding, 64), torch.tensor([4, 7, 10])
    with torch.no_grad():
        together = encoder(x, key_mask(lengths, 10 + padding))
        for i, length in enumerate(lengths.tolist()):
            alone = encoder(x[i:i + 1, :length])
            assert (together[i, :length] - alone[0]).abs().max() < 1e-5
        louder = x.clone()
        for i, length in enumerate(lengths.tolist()): louder[i, length:] = 1e3 * torch.randn_like(louder[i, length:])
        again = encoder(louder, key_mask(lengths, 10 + padding))
        for i, length in enumerate(lengths.tolist()): assert (again[i, :length] - together[i, :length]).abs().max() < 1e-6


def test_no_gradient_reaches_padding():
    encoder, x = Transformer(32, 2, 4), torch.randn(2, 6, 32, requires_grad=True)
    mask = key_mask(torch.tensor([6, 3]), 6)
    (encoder(x, mask) * mask[:, 0, 0, :, None]).pow(2).sum().backward()
    assert (x.grad[1, 3:] == 0).all() and (x.grad[1, :3] != 0).any()
    assert all(torch.isfinite(p.grad).all() and (p.grad != 0).any() for name, p in encoder.named_parameters())


def test_block_is_pre_norm_with_exact_gelu():
    block, x = randomised(Block(32, 4)), torch.randn(2, 5, 32)
    theirs = nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    names = {"ln_1": "norm1", "ln_2": "norm2", "attn": "self_attn", "mlp.c_fc": "linear1", "mlp.c_proj": "linear2"}
    state = {}
    for name, value in block.state_dict().items():
        old = next(old for old in names if name.startswith(old + "."))
        state[names[old] + name[len(old):]] = value
    theirs.load_state_dict(state)
    with torch.no_grad(): difference = (block(x) - theirs.train()(x)).abs().max() / block(x).abs().max()
    assert difference < 1e-5
    shortcut = block.mlp.c_proj(F.gelu(block.mlp.c_fc(x), approximate="tanh"))
    assert (block.mlp(x) - shortcut).abs().max() > 1e-6


@pytest.mark.parametrize("width, heads, count", [(384, 6, 21_293_568), (512, 8, 37_828_608)])
def test_the_papers_sizes(width, heads, count):
    with torch.device("meta"): encoder = Transformer(width, 12, heads)
    assert sum(p.numel() for p in encoder.parameters()) == count == 12 * (12 * width**2 + 13 * width)


def test_names_are_the_originals(golden):
    from safetensors.torch import load_file
    state = load_file(golden / "fuse_state_dict.safetensors")
    blocks = {name.removeprefix("transformer."): value for name, value in state.items() if name.startswith("transformer.")}
    Transformer(64, 2, 4).load_state_dict(blocks)  # strict


def test_mlp_ratio():
    assert MLP(16, 2.0).c_fc.weight.shape == (32, 16) and MLP(16)(torch.randn(2, 3, 16)).shape == (2, 3, 16)


@pytest.mark.parametrize("layers", [2, 12])
def test_initialisation(layers):
    encoder, width = Transformer(256, layers, 4), 256
    init_transformer(encoder)
    small = width**-0.5 * (2 * layers) ** -0.5
    for block in encoder.resblocks:
        for tensor, std in ((block.attn.in_proj_weight, width**-0.5), (block.attn.out_proj.weight, small),
                            (block.mlp.c_fc.weight, (2 * width) ** -0.5), (block.mlp.c_proj.weight, small)):
            assert tensor.std().item() == pytest.approx(std, rel=0.03) and abs(tensor.mean().item()) < 0.03 * std
        assert (block.attn.in_proj_bias == 0).all() and (block.attn.out_proj.bias == 0).all()
        for bias, inputs in ((block.mlp.c_fc.bias, width), (block.mlp.c_proj.bias, 4 * width)):  # torch's default
            assert (bias != 0).any() and bias.abs().max() <= inputs**-0.5
        for norm in (block.ln_1, block.ln_2): assert (norm.weight == 1).all() and (norm.bias == 0).all() and norm.eps == 1e-5


def test_attention_maps_come_from_every_layer():
    encoder, x, mask = Transformer(32, 3, 4), torch.randn(2, 6, 32), key_mask(torch.tensor([6, 4]), 6)
    maps = encoder.attention(x, mask)
    assert maps.shape == (3, 2, 4, 6, 6) and torch.allclose(maps.sum(-1), torch.ones(3, 2, 4, 6)) and (maps[:, 1, ..., 4:] == 0).all()
    x = encoder.resblocks[0](x, mask)
    second = encoder.resblocks[1]
    assert torch.allclose(maps[1], second.attn.weights(second.ln_1(x), mask))


SETS = [[1], [5, 5, 5], [3, 1, 3, 9, 1], [2, 40, 17, 17, 180, 2]]


@pytest.mark.parametrize("lengths", SETS, ids=str)
def test_packing_keeps_every_token_once_and_equal_lengths_together(lengths):
    packing = pack(torch.tensor(lengths))
    assert sorted(zip(packing.row.tolist(), packing.column.tolist())) == [(row, at) for row, n in enumerate(lengths) for at in range(n)]
    assert [(int(packing.row[end]), int(packing.column[end])) for end in packing.ends] == [(row, n - 1) for row, n in enumerate(lengths)]
    assert [n for count, n in packing.runs for _ in range(count)] == sorted(lengths) == packing.starts.diff().tolist()
    assert len(packing.runs) == len(set(lengths))


@pytest.mark.parametrize("lengths", SETS, ids=str)
def test_a_packed_transformer_gives_the_padded_ones_states_and_gradients(lengths):
    lengths = torch.tensor(lengths)
    encoder, n, packing = Transformer(32, 2, 4).double(), int(lengths.max()), pack(lengths)
    x, weights = torch.randn(len(lengths), n, 32, dtype=torch.float64), torch.randn(len(lengths), n, 32, dtype=torch.float64)
    at = packing.row, packing.column
    found = []
    for states in (lambda: encoder(x, key_mask(lengths, n))[at], lambda: encoder(x[at], packing=packing)):
        encoder.zero_grad()
        result = states()
        (result * weights[at]).sum().backward()
        found.append([result.detach(), *(p.grad.clone() for p in encoder.parameters())])
    for padded, packed in zip(*found): torch.testing.assert_close(packed, padded, atol=1e-9, rtol=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("lengths", [[2, 40, 17, 17, 180, 2], [1], [64, 128, 65, 256]], ids=str)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_kernels_give_what_the_runs_give(lengths, heads):
    lengths = torch.tensor(lengths, device="cuda")
    encoder, found = Transformer(128, 2, heads).cuda(), []
    x = torch.randn(int(lengths.sum()), 128, device="cuda")
    assert kernel.attend_on(x.device) is kernel.attend_in_tiles
    for attend in (attend_in_runs, kernel.attend_at_once, kernel.attend_in_tiles):
        encoder.zero_grad()
        with torch.autocast("cuda", torch.bfloat16): result = encoder(x, packing=pack(lengths, attend))
        result.square().mean().backward()
        found.append([result.detach(), *(p.grad.clone() for p in encoder.parameters())])
    for other in found[1:]:
        for ours, plain in zip(other, found[0]): torch.testing.assert_close(ours, plain, atol=2e-2 * float(plain.abs().max()), rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tiles_are_right_to_the_last_digits_of_their_precision():
    lengths, heads = torch.tensor([3, 154, 130, 64, 65, 1, 200], device="cuda"), 8
    attention, packing = Attention(512, heads).cuda(), pack(lengths)
    qkv, gradient = torch.randn(int(lengths.sum()), 1536, device="cuda", dtype=torch.bfloat16), torch.randn(int(lengths.sum()), 512, device="cuda", dtype=torch.bfloat16)
    exact = qkv.double().requires_grad_()
    wanted = attend_in_runs(exact, packing, attention)
    wanted.backward(gradient.double())
    errors = {}
    for attend in (kernel.attend_at_once, kernel.attend_in_tiles):
        given = qkv.clone().requires_grad_()
        out = attend(given, packing, attention)
        out.backward(gradient)
        errors[attend] = [float((found.double() - right).norm() / right.norm()) for found, right in ((out, wanted), (given.grad, exact.grad))]
    for tiles, pytorchs in zip(errors[kernel.attend_in_tiles], errors[kernel.attend_at_once]): assert tiles < 0.01 and tiles < 1.5 * pytorchs


def test_without_a_gpu_attention_goes_run_by_run():
    lengths = torch.tensor([3, 7, 3])
    attention, packing = Attention(32, 2), pack(lengths)
    qkv = torch.randn(13, 96, dtype=torch.bfloat16)
    assert packing.attend is kernel.attend_on(torch.device("cpu")) is attend_in_runs
    for attend in (kernel.attend_at_once, kernel.attend_in_tiles): assert torch.equal(attend(qkv, packing, attention), attend_in_runs(qkv, packing, attention))
    with torch.device("meta"): shapes = torch.ops.fuselip_edu.tiled_attention(torch.empty(13, 96), torch.empty(4, dtype=torch.int32), 2)
    assert [tuple(shape.shape) for shape in shapes] == [(13, 32), (2, 13)]
    with pytest.raises(ValueError, match="heads of 16 numbers were given, but tiles are for 32, 64, 128"): kernel.tiled_attention(qkv, packing.starts, 2)


def test_tiles_without_triton_say_what_is_missing(monkeypatch):
    monkeypatch.setattr(kernel, "triton", None)
    with pytest.raises(RuntimeError, match="needs Triton, which comes with PyTorch for GPUs"): kernel.tiled_attention(torch.randn(5, 192), torch.tensor([0, 5], dtype=torch.int32), 2)


@pytest.mark.parametrize("shape", [(6, 6), (4, 20), (20, 4)])
def test_orthogonalised_evens_out_the_strengths_and_keeps_the_directions(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    strengths = left.mT @ orthogonalised(matrix) @ right.mT
    assert (strengths - strengths.diag().diag()).abs().max() < 1e-6 and 0.6 < strengths.diag().min() <= strengths.diag().max() < 1.3


def test_muon_takes_the_matrices_inside_blocks_and_nothing_else():
    model = nn.ModuleDict({"table": nn.Embedding(5, 8), "transformer": Transformer(8, 2, 2), "head": nn.Linear(8, 3)})
    scalars, tables = [p for p in model.parameters() if p.ndim < 2], [p for p in model.parameters() if p.ndim == 2]
    groups = [{"params": tables, "weight_decay": 0.5}, {"params": scalars, "weight_decay": 0.0}]
    first, second, muon = muon_groups(groups, model)
    assert {name for name, p in model.named_parameters() if any(p is taken for taken in muon["params"])} == {f"transformer.resblocks.{block}.{name}" for block in (0, 1) for name in (
        "attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")}
    assert [id(p) for p in first["params"]] == [id(model["table"].weight), id(model["head"].weight)] and second["params"] is scalars
    assert (first["momentum"], second["momentum"], muon["momentum"]) == (0, 0, 0.95) and (first["weight_decay"], second["weight_decay"], muon["weight_decay"]) == (0.5, 0, 0.5)
    assert len(groups[0]["params"]) == 10  # the groups that were given are as they were
    (matrix, bias), before = (model["transformer"].resblocks[0].mlp.c_fc.weight, model["head"].bias), {}
    for p in model.parameters(): before[p], p.grad = p.detach().clone(), torch.randn_like(p)
    Muon([first, second, muon], lr=1e-3, eps=1e-8).step()
    direction = (before[matrix] * (1 - 0.01 * 0.5) - matrix) / (0.01 * 2)  # ten times the rate, and √(n/m) for 32 rows of 8
    assert ((torch.linalg.svdvals(direction) - 0.95).abs() < 0.3).all()
    torch.testing.assert_close(before[bias] - bias, 1e-3 * bias.grad.sign(), atol=1e-6, rtol=0)  # AdamW's first step


def test_muon_takes_groups_without_momentum_and_a_closure_and_keeps_its_groups_after_an_error():
    plain, matrix = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.randn(4, 4))
    muon = Muon([{"params": [plain]}, {"params": [matrix], "momentum": 0.95}], lr=1e-3)
    before = matrix.detach().clone()

    def closure():
        muon.zero_grad()
        loss = (plain.sum() + matrix.sum() - 1)**2
        loss.backward()
        return loss

    assert muon.step(closure) > 0 and not torch.equal(matrix, before) and plain.abs().min() > 0
    plain.grad = torch.zeros(3).to_sparse()  # which AdamW refuses
    with pytest.raises(RuntimeError): muon.step()
    assert [group["params"] for group in muon.param_groups] == [[plain], [matrix]]


def test_packing_takes_lengths_of_either_width():
    wide, narrow = pack(torch.tensor([3, 1, 2])), pack(torch.tensor([3, 1, 2], dtype=torch.int32))
    assert all(torch.equal(getattr(wide, name), getattr(narrow, name)) for name in ("row", "column", "ends"))
