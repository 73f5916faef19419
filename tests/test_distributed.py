"Many processes: the original's per-rank losses and gradients, one process equal to several, what ranks exchange, and how a rank's failure ends."
import dataclasses
import math
import multiprocessing
import os
import socket
import time
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from fuselip_edu.batches import Sequences, grouped_batches
from fuselip_edu.contrastive import sigmoid_loss
from fuselip_edu.distributed import (World, average_gradients, barrier, broadcast_parameters, gather_values, init_distributed, read_world,
                                     sharded_sigmoid_loss)
from fuselip_edu.fuselip import FuseLIPConfig, SequenceEncoder
from fuselip_edu.masking import masked_loss
from fuselip_edu.train import parameter_groups
from fuselip_edu.vocab import Vocab

VOCAB = Vocab(n_text=60, sot=58, eot=59, n_codes=30, context=24)
SEEDS = {"left": 0, "right": 1}
CHUNKS, TYPES = (None, 1, 3, 4, 9), (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# ---- what every process runs; five are started once and do everything

def value_and_gradients(left, right, scale, bias, world, chunk=None, autocast=False, factor=1.0, same=None):
    leaves = [x.clone().requires_grad_() for x in (left, right, scale, bias)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast): loss = sharded_sigmoid_loss(*leaves, world, chunk, same)
    (loss * factor).backward()
    return {"loss": loss.detach(), **{f"grad_{name}": leaf.grad for name, leaf in zip(("left", "right", "logit_scale", "logit_bias"), leaves)}}


def features(side, dtype=torch.float64): # of 25 pairs, five a rank
    return F.normalize(torch.randn(25, 12, generator=torch.Generator().manual_seed(SEEDS[side]), dtype=torch.float64), dim=-1).to(dtype)


def twins_of_25(): # some within a rank, some on two
    same = torch.zeros(25, 25, dtype=torch.bool)
    for one, other in ((0, 3), (2, 19), (7, 24), (11, 12), (20, 1)): same[one, other] = same[other, one] = True
    return same


def losses_of_five(world, golden):
    found = {}
    for size in range(2, 6) if golden else ():
        if world.rank >= size: continue
        case = {name.split(".")[1]: value for name, value in load_file(golden).items() if name.startswith(f"siglip_world{size}.")}
        inputs = (case["left"][world.rank], case["right"][world.rank], case["logit_scale"], case["logit_bias"])
        found |= {f"golden{size}.{name}": value for name, value in value_and_gradients(*inputs, dataclasses.replace(world, size=size)).items()}
    scalars = torch.tensor(12.0), torch.tensor(-7.0)
    for dtype in TYPES:
        left, right = (features(side, dtype).chunk(5)[world.rank] for side in ("left", "right"))
        found |= {f"{dtype}.{name}": value for name, value in value_and_gradients(left, right, *scalars, world).items()}
    left, right = (features(side).chunk(5)[world.rank] for side in ("left", "right"))
    for chunk in CHUNKS:
        found |= {f"chunk{chunk}.{name}": value for name, value in value_and_gradients(left, right, *scalars, world, chunk).items()}
        same = twins_of_25().chunk(5)[world.rank]
        found |= {f"twins{chunk}.{name}": value for name, value in value_and_gradients(left, right, *scalars, world, chunk, same=same).items()}
    found |= {f"autocast.{name}": value for name, value in value_and_gradients(left.float(), right.float(), *scalars, world, autocast=True).items()}
    found |= {f"factor.{name}": value for name, value in value_and_gradients(left, right, *scalars, world, factor=1024.0).items()}
    with torch.no_grad(): found["no_grad.loss"] = sharded_sigmoid_loss(left, right, *scalars, world)
    found["floats.loss"] = sharded_sigmoid_loss(left, right, 12.0, -7.0, world)
    return found


class Odd(torch.nn.Module): # two types, a frozen tensor, a buffer, and one parameter that not every rank uses
    def __init__(self, rank):
        super().__init__()
        torch.manual_seed(rank)
        self.first, self.second = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2, dtype=torch.float64)
        self.frozen, self.sometimes = torch.nn.Linear(2, 2).requires_grad_(False), torch.nn.Parameter(torch.randn(4))
        self.register_buffer("steps", torch.tensor(rank + 7))


def exchange(world):
    model = Odd(world.rank)
    broadcast_parameters(model, world)
    found = {f"broadcast.{name}": value.clone() for name, value in model.state_dict().items()}
    for p in (*model.first.parameters(), *model.second.parameters()): p.grad = torch.full_like(p, world.rank + 1.0)
    if world.rank == 2: model.sometimes.grad = torch.ones(4)
    average_gradients(model, world)
    found |= {f"average.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    values = gather_values({"rank": world.rank, "broken": math.nan if world.rank == 3 else 0.0, "stop": float(world.rank == 1)}, world)
    barrier(world)
    return found | {f"gather.{name}": torch.tensor(value) for name, value in values.items()}


def sequences(side):
    generator = torch.Generator().manual_seed(SEEDS[side])
    lengths = torch.randint(4, 20, (60,), generator=generator).tolist()
    return Sequences([torch.randint(1, 57, (n - 1,), generator=generator).tolist() + [VOCAB.eot] for n in lengths])


GROUPS = [[4 * i] for i in range(15)] + [[4 * i + j for j in (1, 2, 3)] for i in range(15)]  # singles and triples
STEPS, SHARE = 3, 6  # batches of `SHARE` pairs a rank


def parts(indices, sides, count): # ids, lengths and labels of a batch's parts, left over right; the second id of each sequence is hidden
    for rows in torch.as_tensor(indices).chunk(count):
        padded = [side.pad(rows) for side in sides]
        width = max(ids.shape[1] for ids, _ in padded)
        ids, lengths = torch.cat([F.pad(ids, (0, width - ids.shape[1])) for ids, _ in padded]), torch.cat([n for _, n in padded])
        labels = torch.full_like(ids, -100)
        labels[:, 1], ids[:, 1] = ids[:, 1], VOCAB.mask
        yield ids, lengths, labels


def masked(encoded, rows): # mean cross-entropy of each side, added
    return sum(masked_loss(encoded.logits[encoded.rows // rows == side], encoded.targets[encoded.rows // rows == side]) for side in (0, 1))


def add_gradients(model, indices, sides, world, accumulation): # -> the rank's loss
    scalars = model.logit_scale.exp(), model.logit_bias
    batch = list(parts(indices, sides, accumulation))
    if accumulation == 1:
        encoded = model(*batch[0])
        loss = sharded_sigmoid_loss(*encoded.embeddings.chunk(2), *scalars, world) + 0.25 * masked(encoded, len(indices))
        loss.backward()
        return loss.detach()
    with torch.no_grad(): embedded = [model(ids, lengths).chunk(2) for ids, lengths, _ in batch]
    leaves = [torch.cat(side).requires_grad_() for side in zip(*embedded)]
    total = sharded_sigmoid_loss(*leaves, *scalars, world, chunk=4)
    total.backward()
    for part, *gradients in zip(batch, *(leaf.grad.chunk(accumulation) for leaf in leaves)):
        encoded = model(*part)
        loss = 0.25 * masked(encoded, len(part[0]) // 2) / accumulation
        ((encoded.embeddings * torch.cat(gradients)).sum() + loss).backward()
        total = total + loss
    return total.detach()


def training(world, batches, accumulation=1):
    torch.manual_seed(world.rank)
    model = SequenceEncoder(FuseLIPConfig(width=32, layers=2, heads=4, context=24), VOCAB)
    broadcast_parameters(model, world)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.5), lr=1e-3, betas=(0.9, 0.98), fused=True)
    sides, found = [sequences(side) for side in SEEDS], {}
    for step, indices in enumerate(batches):
        optimizer.zero_grad()
        loss = add_gradients(model, indices, sides, world, accumulation)
        average_gradients(model, world)
        if step == 0: found |= {f"gradient.{name}": p.grad.clone() for name, p in model.named_parameters()}
        found[f"loss{step}"] = torch.tensor(gather_values({"loss": float(loss)}, world)["loss"])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for name, p in model.named_parameters(): # of a key's bias softmax sees nothing: its gradient is rounding, which Adam would blow up
        found[f"after.{name}"] = torch.cat([p[:32], p[64:]]).detach() if name.endswith("in_proj_bias") else p.detach()
    return found


def dealt(rank, size): return grouped_batches(GROUPS, SHARE, 0, 0, rank, size)[:STEPS]


def process(number, ports, golden, folder):
    torch.set_num_threads(1)

    def join(rank, size, port): # as torchrun would say it
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        return init_distributed("cpu", timeout=30)

    with join(number, 5, ports[0]) as world: found = losses_of_five(world, golden) | exchange(world)
    size, rank, port = (3, number, ports[1]) if number < 3 else (2, number - 3, ports[2])
    with join(rank, size, port) as world:
        group = weakref.ref(dist.group.WORLD)
        for accumulation in (1, 2):
            found |= {f"train{accumulation}.{name}": value for name, value in training(world, dealt(rank, size), accumulation).items()}
    found["group_kept"] = group() is not None
    save_file({name: torch.as_tensor(value).detach().contiguous().clone() for name, value in found.items()}, f"{folder}/{number}.safetensors")
    if number < 3: return
    with join(rank, 2, ports[3]) as world:
        barrier(world)
        if rank == 0: raise FloatingPointError("the loss became nan")
        started = time.monotonic()
        try: sharded_sigmoid_loss(torch.eye(4), torch.eye(4), 10.0, -10.0, world)
        finally:
            with open(f"{folder}/waited", "w") as file: file.write(str(time.monotonic() - started))


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets: one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets: one.close()
    return ports


@pytest.fixture(scope="module")
def ended(request, tmp_path_factory):
    "The folder of results and the exit codes of five processes that ran everything above."
    try: golden = str(request.getfixturevalue("golden") / "losses.safetensors")
    except pytest.skip.Exception: golden = None
    folder, context = tmp_path_factory.mktemp("ranks"), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once, not five times
    ports = free_ports(4)
    processes = [context.Process(target=process, args=(number, ports, golden, str(folder)), daemon=True) for number in range(5)]
    for one in processes: one.start()
    until = time.monotonic() + 120
    for one in processes: one.join(max(0.0, until - time.monotonic()))
    codes = [one.exitcode for one in processes]
    for one in processes: one.kill()
    return folder, codes


@pytest.fixture(scope="module")
def found(ended):
    folder, codes = ended
    assert codes[:3] == [0, 0, 0], f"exit codes {codes}; the processes' own messages are above"
    return [load_file(folder / f"{number}.safetensors") for number in range(5)]


def of(found, prefix, name): return torch.stack([result[f"{prefix}.{name}"] for result in found])


# ---- the loss

@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_rank_has_the_originals_loss_and_gradients(golden, found, size):
    case = load_file(golden / "losses.safetensors")
    for name in ("loss", "grad_left", "grad_right", "grad_logit_scale", "grad_logit_bias"):
        torch.testing.assert_close(of(found[:size], f"golden{size}", name), case[f"siglip_world{size}.{name}"], rtol=1e-5, atol=1e-5)


def in_one_process(dtype=torch.float64, same=None):
    leaves = [features(side, dtype).requires_grad_() for side in SEEDS] + [torch.tensor(x, requires_grad=True) for x in (12.0, -7.0)]
    loss = sigmoid_loss(*leaves, same=same)
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


def check_five(found, prefix, dtype=torch.float64, factor=1.0, same=None, **tolerance):
    loss, gradients = in_one_process(dtype, same)
    torch.testing.assert_close(of(found, prefix, "loss").mean(), loss, rtol=1e-5, atol=1e-5)
    assert found[0][f"{prefix}.loss"].dtype == loss.dtype and found[0][f"{prefix}.grad_right"].dtype == dtype
    for name, expected in zip(("left", "right"), gradients):
        torch.testing.assert_close(of(found, prefix, f"grad_{name}").flatten(0, 1) / 5 / factor, expected, **tolerance)
    for name, expected in zip(("logit_scale", "logit_bias"), gradients[2:]):
        torch.testing.assert_close(of(found, prefix, f"grad_{name}").mean() / factor, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_five_ranks_are_one_process_whatever_the_chunk(found, chunk): check_five(found, f"chunk{chunk}", rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_twins_on_other_ranks_are_left_out_too(found, chunk):
    check_five(found, f"twins{chunk}", same=twins_of_25(), rtol=1e-10, atol=1e-10)
    assert of(found, f"twins{chunk}", "loss").mean() < of(found, f"chunk{chunk}", "loss").mean()


@pytest.mark.parametrize("dtype, tolerance", list(zip(TYPES, (1e-10, 1e-5, 2e-2, 2e-3))))
def test_five_ranks_are_one_process_in_every_type(found, dtype, tolerance): check_five(found, str(dtype), dtype, rtol=tolerance, atol=tolerance)


def test_autocast_does_not_lower_the_ring(found): check_five(found, "autocast", torch.float32, rtol=1e-5, atol=1e-5)


def test_a_scaled_loss_scales_the_gradients(found): check_five(found, "factor", factor=1024.0, rtol=1e-10, atol=1e-10)


def test_the_loss_needs_neither_gradients_nor_tensors(found):
    for rank in found: assert rank["no_grad.loss"] == rank["floats.loss"] == rank["chunkNone.loss"]


def test_alone_it_is_the_loss_of_chapter_9():
    left, right = features("left"), features("right")
    for chunk in (None, 4): assert sharded_sigmoid_loss(left, right, 12.0, -7.0, World(), chunk) == sigmoid_loss(left, right, 12.0, -7.0, chunk)


def test_wrong_input_is_refused_before_anything_is_sent():
    with pytest.raises(ValueError, match=r"both be \(b, d\)"): sharded_sigmoid_loss(torch.eye(4), torch.eye(3), 10.0, -10.0, World(0, 2))
    with pytest.raises(ValueError, match="chunk must be at least 1"): sharded_sigmoid_loss(torch.eye(4), torch.eye(4), 10.0, -10.0, World(0, 2), chunk=0)


# ---- what ranks exchange

def test_all_ranks_begin_as_rank_0(found):
    for name, value in Odd(0).state_dict().items():
        for rank in found: assert torch.equal(rank[f"broadcast.{name}"], value), name


def test_gradients_are_averaged_and_a_missing_one_counts_as_0(found):
    for rank in found:
        averaged = {name: value for name, value in rank.items() if name.startswith("average.")}
        assert {name.split(".")[1] for name in averaged} == {"first", "second", "sometimes"}
        for name, value in averaged.items():
            assert value.dtype == (torch.float64 if "second" in name else torch.float32)
            torch.testing.assert_close(value, torch.full_like(value, 0.2 if "sometimes" in name else 3.0))


def test_values_are_averaged_and_one_nan_or_stop_is_seen_by_all(found):
    for rank in found: assert rank["gather.rank"] == 2 and rank["gather.broken"].isnan() and rank["gather.stop"] > 0


def test_nothing_of_the_group_outlives_it(found):
    "Its threads would run on into the exit of Python, where one that frees a tensor aborts the process."
    assert [bool(result["group_kept"]) for result in found] == [False] * 5


def test_in_one_process_nothing_happens():
    model = Odd(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with init_distributed("cpu") as world:
        assert world == World() and world.is_main and not torch.distributed.is_initialized()
        broadcast_parameters(model, world)
        average_gradients(model, world)
        barrier(world)
        assert gather_values({"loss": 1.5}, world) == {"loss": 1.5}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# ---- training

@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("size", [2, 3])
def test_three_steps_of_several_ranks_are_three_steps_of_one_process(found, size, accumulation):
    batches = [sum((dealt(rank, size)[step] for rank in range(size)), []) for step in range(STEPS)]  # what the ranks see, together
    assert all(len(set(batch)) == size * SHARE for batch in batches)
    one = training(World(), batches)
    for rank in found[:3] if size == 3 else found[3:]:
        for name, expected in one.items():
            torch.testing.assert_close(rank[f"train{accumulation}.{name}"], expected, rtol=1e-5, atol=1e-5, msg=lambda text: f"{name}: {text}")
    assert one["loss2"] < one["loss0"]
    for name in one: # ranks of one world stay equal to the last bit
        assert len({rank[f"train{accumulation}.{name}"].numpy().tobytes() for rank in (found[:3] if size == 3 else found[3:])}) == 1, name


def test_a_rank_that_fails_does_not_leave_the_other_waiting(ended):
    folder, codes = ended
    assert codes[3] == 1 and codes[4] == 1  # its own error, and the other's that its neighbour is gone
    assert float((folder / "waited").read_text()) < 20  # below the timeout of 30 s


# ---- the environment

FULL = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_the_environment_of_torchrun_is_read():
    assert read_world("cpu", FULL) == World(1, 4, 1) and not read_world("cpu", FULL).is_main
    assert read_world("cpu", {"MASTER_ADDR": "127.0.0.1"}) == World()  # left over from something else
    assert read_world("cpu", FULL | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}) == World()


@pytest.mark.parametrize("missing", FULL)
def test_half_an_environment_is_refused(missing):
    with pytest.raises(ValueError, match=f"not {missing}; start with torchrun"): read_world("cpu", {name: value for name, value in FULL.items() if name != missing})


@pytest.mark.parametrize("changes, message", [({"RANK": "4"}, "are 4, 4, 1"), ({"RANK": "-1"}, "are -1, 4, 1"),
                                              ({"WORLD_SIZE": "four"}, "are 1, four, 1"), ({"LOCAL_RANK": ""}, "whole numbers")])
def test_a_nonsensical_environment_is_refused(changes, message):
    with pytest.raises(ValueError, match=message): read_world("cpu", FULL | changes)


def test_each_process_of_a_machine_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert read_world("cuda", FULL).device == read_world("auto", FULL).device == torch.device("cuda:1")
    with pytest.raises(RuntimeError, match="LOCAL_RANK is 2, but this machine has 2 GPUs"): read_world("auto", FULL | {"LOCAL_RANK": "2"})
    for device in ("cuda:0", "mps", "gpu"):
        with pytest.raises(ValueError, match=f"each takes its own, or cpu; it is '{device}'"): read_world(device, FULL)


def test_without_gpus_cuda_is_refused_and_auto_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert read_world("auto", FULL).device == torch.device("cpu")
    with pytest.raises(RuntimeError, match="has 0 GPUs"): read_world("cuda", FULL)
