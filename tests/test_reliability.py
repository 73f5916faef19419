"Broken on purpose: runs that are killed, ranks that come and go, damaged checkpoints, unreadable data, a cache that is killed."
import dataclasses
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import tarfile
import time
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fuselip_edu.batches import BadItems, SourcePairs, Unreadable, Reader, parse_share, readable_groups, tokenize_pairs
from fuselip_edu.distributed import World, init_distributed
from fuselip_edu.fuselip import FuseLIP, FuseLIPConfig
from fuselip_edu.scaling import MixedShapes
from fuselip_edu.sources import CSVSource, ShapesSource, ShardSource, TableSource, source_groups
from fuselip_edu.text import BPE
from fuselip_edu.titok import TINY_TOKENIZER, TiTok
from fuselip_edu.token_cache import CachedPairs, cache_plan, tokenize_source
from fuselip_edu.train import TrainConfig, load_checkpoint, locked, make_optimizer, save_checkpoint, train

SERVER = multiprocessing.get_context("forkserver")  # children begin with everything imported, so that a kill costs no start
SERVER.set_forkserver_preload(["fuselip_edu.train", "fuselip_edu.token_cache"])


# ---- what the killed processes do

def small_model(seed=0):
    torch.manual_seed(seed)
    return FuseLIP(FuseLIPConfig(width=32, layers=2, heads=4), TiTok.from_pretrained(TINY_TOKENIZER), BPE.train(["a red circle", "flip"], 300))


def settings(**changes):
    return TrainConfig(**dict(steps=150, batch_size=24, shards=2, warmup_steps=5, log_every=1, checkpoint_every=7, device="cpu", mask_probability=0.1) | changes)


def run_rank(folder, config, rank, world, port):
    "One process of a run that goes on where it stopped."
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if world > 1 else {})
    with open(os.devnull, "w") as nowhere: os.dup2(nowhere.fileno(), 2)
    model = small_model()
    pairs = torch.load(folder.parent / "pairs.pt", weights_only=False)  # made by this test
    with init_distributed("cpu", timeout=20) as world:
        train(model, pairs, config, folder, resume=(folder / "checkpoints").is_dir(), world=world)
        if world.is_main: model.save_pretrained(folder / "model")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(folder, config, world):
    port = free_port()
    processes = [SERVER.Process(target=run_rank, args=(folder, config, rank, world, port)) for rank in range(world)]
    for process in processes: process.start()
    return processes


def finish(folder, config, world=1):
    processes = start(folder, config, world)
    for process in processes: process.join(120)
    assert [process.exitcode for process in processes] == [0] * world


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with pairs that every process reads."
    folder = tmp_path_factory.mktemp("reliability")
    torch.save(tokenize_pairs(source_groups(ShapesSource(60)), small_model().item_tokenizer), folder / "pairs.pt")
    return folder


def written(folder): return (folder / "metrics.jsonl").read_bytes(), (folder / "model" / "model.safetensors").read_bytes()


# ---- kill -9

@pytest.mark.parametrize("world, kills", [(1, 14), (2, 6)], ids=["one process", "two ranks"])
def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(place, world, kills):
    config, whole, torn = settings(steps=250), place / f"whole-{world}", place / f"torn-{world}"
    finish(whole, config, world)
    rng, reached = random.Random(world), []
    for _ in range(kills):
        processes, target = start(torn, config, world), _steps(torn) + rng.randrange(1, 7)
        while _steps(torn) < target and all(process.is_alive() for process in processes): time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))  # anywhere in a step, or while a checkpoint is written
        os.kill(rng.choice(processes).pid, signal.SIGKILL)
        for process in processes: process.join(40)
        assert not any(process.is_alive() for process in processes), "a rank waits for one that is gone"
        assert -signal.SIGKILL in [process.exitcode for process in processes], "the run was over before it was killed"
        reached.append(_steps(torn))
    finish(torn, config, world)
    assert len(set(reached)) > kills // 2 and reached[-1] < config.steps
    assert not list(torn.rglob("*.tmp"))  # what was half written is gone
    assert written(torn) == written(whole)
    steps = [json.loads(line)["step"] for line in (torn / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, config.steps + 1))


def test_an_interrupt_of_one_rank_stops_both_and_finishes_nothing(place):
    config, folder = settings(), place / "pressed"
    processes = start(folder, config, 2)
    while _steps(folder) < 5 and all(process.is_alive() for process in processes): time.sleep(0.002)
    os.kill(processes[1].pid, signal.SIGINT)
    for process in processes: process.join(40)
    for process in processes: process.kill()
    assert all(process.exitcode for process in processes) and not (folder / "model").exists() and 5 <= _steps(folder) < config.steps


def test_ranks_are_refused_together_where_another_run_goes_on(place):
    folder = place / "taken"
    with locked(folder, World()):
        processes = start(folder, settings(), 2)
        for process in processes: process.join(40)
        left = [process for process in processes if process.is_alive()]
        for process in left: process.kill()
    assert not left and all(process.exitcode == 1 for process in processes) and _steps(folder) == 0


def _steps(folder): # done, by what is written
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


# ---- any number of ranks

def apart(ours, one): # how far from each other two runs end, as a share of the way that they went; rounding grows where an optimiser evens out strengths
    trained = [name for name in one if not name.startswith("image_tokenizer")]
    length = lambda a, b: torch.cat([(a[name] - b[name]).flatten() for name in trained]).norm()
    return length(ours, one) / length(one, small_model().state_dict())


def test_one_to_four_ranks_train_the_same_model(place):
    "The same samples in the same order, the same hidden tokens and twins, the same losses, and in the end the same weights; of two shards three ranks and four have parts, and two ranks go in parts themselves."
    config, found = settings(steps=8), {}
    for world in (1, 2, 3, 4):
        finish(place / f"ranks-{world}", dataclasses.replace(config, accumulation=2 if world in (2, 3) else 1), world)
        rows = [json.loads(line) for line in (place / f"ranks-{world}" / "metrics.jsonl").read_text().splitlines()]
        found[world] = rows, load_file(place / f"ranks-{world}" / "model" / "model.safetensors")
    for world in (2, 3, 4):
        for ours, one in zip(found[world][0], found[1][0], strict=True): assert ours["loss"] == pytest.approx(one["loss"], rel=1e-5) and ours["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert apart(found[world][1], found[1][1]) < 5e-3
    assert found[1][0][-1]["loss"] < found[1][0][0]["loss"]


def test_ranks_that_keep_pieces_train_what_ranks_with_copies_do(place):
    "And a run in pieces is resumed by one in pieces, and by one in copies; the pieces also go through a batch in parts."
    config = settings(steps=14, optimizer="adamw")
    finish(place / "copies", config, 2)
    finish(place / "pieces", dataclasses.replace(config, sharded=True, accumulation=2), 2)
    for name, changes in (("again", {"sharded": True, "accumulation": 2}), ("copied", {})):
        shutil.copytree(place / "pieces", place / name)
        for path in (place / name / "checkpoints").glob("step-00000014.*"): path.unlink()
        finish(place / name, dataclasses.replace(config, **changes), 2)
    copies, pieces, again, copied = ([json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()] for name in ("copies", "pieces", "again", "copied"))
    for ours in (pieces, copied):
        for row, one in zip(ours, copies, strict=True): assert row["loss"] == pytest.approx(one["loss"], rel=1e-5) and row["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert again == pieces and written(place / "again") == written(place / "pieces")
    assert copied[:7] == pieces[:7] and copied[7:] != pieces[7:]  # it has begun at the checkpoint of the pieces
    assert apart(*(load_file(place / name / "model" / "model.safetensors") for name in ("pieces", "copies"))) < 5e-3
    assert type(FuseLIP.from_pretrained(place / "pieces" / "model")) is FuseLIP
    with pytest.raises(ValueError, match="train.sharded goes with --train.optimizer adamw"): settings(sharded=True, optimizer="muon")


def test_a_run_goes_on_with_another_number_of_ranks(place):
    config = settings(steps=20)
    finish(place / "steady", config)
    for world, steps in ((3, 7), (1, 14), (2, 20)):  # each leaves its checkpoint to the next
        processes = start(place / "moved", config if steps == 20 else dataclasses.replace(config, checkpoint_every=7), world)
        if steps < 20:
            while not (place / "moved" / "checkpoints" / f"step-{steps:08d}.json").exists(): time.sleep(0.003)
            for process in processes: process.kill()
        for process in processes: process.join(60)
    steady, moved = ([json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()] for name in ("steady", "moved"))
    assert [row["step"] for row in moved] == list(range(1, 21))
    for ours, one in zip(moved, steady, strict=True): assert ours["loss"] == pytest.approx(one["loss"], rel=1e-4)


# ---- checkpoints

DAMAGES = {"cut short": lambda data, rng: data[:rng.randrange(len(data))], "empty": lambda data, rng: b"",
           "a bit flipped": lambda data, rng: _flipped(data, rng.randrange(len(data))), "a header flipped": lambda data, rng: _flipped(data, rng.randrange(60))}


def _flipped(data, at): return data[:at] + bytes([data[at] ^ 16]) + data[at + 1:]


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys, damage, suffix):
    model, rng = small_model(), random.Random(0)
    optimizer = make_optimizer(model, settings())
    for step in (5, 10): save_checkpoint(tmp_path, model, optimizer, step)
    victim = tmp_path / f"step-00000010.{suffix}"
    good, refused = victim.read_bytes(), 0
    for _ in range(5):
        victim.write_bytes(DAMAGES[damage](good, rng))
        refused += load_checkpoint(tmp_path, model, optimizer) == 5
        assert refused and "step-00000010" in capsys.readouterr().err or suffix == "json"
    assert refused == 5 or suffix == "json" and refused >= 1  # a flipped blank in a note does no harm
    victim.write_bytes(good)
    assert load_checkpoint(tmp_path, model, optimizer) == 10


# ---- bad data

def png(mode="RGB", size=(12, 12), **how):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG", **how)
    return file.getvalue()


def jpeg(mode="RGB", size=(40, 40)):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, {"RGB": 3, "CMYK": 4}[mode]), dtype=np.uint8), mode).save(file, "JPEG")
    return file.getvalue()


def animated():
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "GIF", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")])
    return file.getvalue()


def bomb(): # a PNG whose header claims 60,000 × 60,000 pixels
    data = bytearray(png())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def ill_chunk(): # a PNG with a colour profile that is too short, behind its pixels: Pillow stumbles over it with an IndexError
    data, end = png(), png().rindex(b"IEND") - 4
    profile = b"iCCP" + b"p\0"
    return data[:end] + struct.pack(">I", 2) + profile + struct.pack(">I", zlib.crc32(profile)) + data[end:]


READABLE = {"palette.png": png("P"), "cmyk.jpg": jpeg("CMYK"), "alpha.png": png("RGBA"), "deep.png": png("I;16"), "moves.gif": animated(), "dot.png": png(size=(1, 1)), "strip.png": png(size=(20_000, 10))}
BROKEN = {"cut.jpg": jpeg()[:200], "zero.jpg": b"", "bomb.png": bomb(), "words.png": b"not a picture", "profile.png": ill_chunk()}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name, data in (READABLE | BROKEN).items(): (folder / name).write_bytes(data)
    return folder


def table(folder, names, name="pairs.csv", text="a thing"):
    path = folder / name
    path.write_text("path,caption\n" + "".join(f"{picture},{text} {index}\n" for index, picture in enumerate(names)), encoding="utf-8")
    return path


class Small: # what SourcePairs needs of a model
    image_size = 16
    def collate(self, items): return [(item.text, None if item.image is None else tuple(item.image.shape)) for item in items]


@pytest.mark.parametrize("workers", [0, 2])
def test_odd_pictures_are_read_and_broken_ones_are_passed_over(pictures, tmp_path, capfd, workers):
    names = [*READABLE, *BROKEN] * 2
    source = TableSource(table(pictures, names, f"pairs-{workers}.csv"))
    bad = BadItems(len(names), 0.5)
    bad.write_to(tmp_path / "bad.jsonl")
    pairs = SourcePairs(source, Small(), workers=workers, bad=bad)
    batches = list(pairs.batches([[list(range(12))], [list(range(12, 24))]]))
    assert [len(batch) for batch in batches] == [24, 24]  # filled up with the pairs of neighbours
    assert all(shape == (3, 16, 16) for batch in batches for text, shape in batch[:12])
    assert sorted(bad.reasons) == [index for index, name in enumerate(names) if name in BROKEN]
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    for row in rows: assert names[row["item"]] in row["reason"] and f"item {row['item']} is passed over" in capfd.readouterr().err + "".join(f"item {r['item']} is passed over" for r in rows)
    again = BadItems(len(names), 0.5)
    again.write_to(tmp_path / "bad.jsonl")
    list(SourcePairs(source, Small(), bad=again).batches([[list(range(24))]]))
    assert again.reasons == bad.reasons and (tmp_path / "bad.jsonl").read_text().count("\n") == len(rows)  # a resumed run writes none down twice, and one that was mended is forgotten


def test_a_large_batch_needs_few_open_files():
    limit, source = resource.getrlimit(resource.RLIMIT_NOFILE), MixedShapes(600, 32)
    pairs = SourcePairs(source, Small(), workers=2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit[0], len(os.listdir("/proc/self/fd")) + 100), limit[1]))
    try: found = list(pairs.batches([[list(range(300))], [list(range(300, 600))]]))
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert len(found) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_pictures_stop_the_run(pictures, workers):
    source = TableSource(table(pictures, [*["dot.png"] * 18, "cut.jpg", "zero.jpg"], f"many-{workers}.csv"))
    fresh = lambda share: SourcePairs(source, Small(), workers=workers, bad=BadItems(20, parse_share(share)))
    assert len(list(fresh("10%").batches([[list(range(20))]]))) == 1
    with pytest.raises(ValueError, match=r"2 of 20 items cannot be read, more than 5 %; the last is item 19: .*zero.jpg.*--max-bad"): list(fresh("5%").batches([[list(range(20))]]))


def test_shares():
    assert parse_share("0.1%") == pytest.approx(0.001) and parse_share("0.25") == 0.25 and parse_share("0") == 0
    for wrong in ("many", "2", "-1%", "", "%", "nan"):
        with pytest.raises(ValueError, match="is not a share"): parse_share(wrong)


def read_in_rank(folder, share, rank, world, port):
    "One process of a run that reads as it goes, from data of which one picture is broken."
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    source, model = TableSource(folder.parent / "ranks.csv"), small_model()
    with open(folder.parent / f"{folder.name}-{rank}.txt", "w") as said: os.dup2(said.fileno(), 2)
    with init_distributed("cpu", timeout=20) as world: train(model, SourcePairs(source, model, bad=BadItems(48, share)), settings(steps=4), folder, world=world)


@pytest.mark.parametrize("share", [0.03, 0.01])
def test_ranks_agree_on_bad_data(pictures, tmp_path, share):
    "A picture that one of two ranks reads is broken: both go on, or both stop; nobody waits for the other."
    for name in ("dot.png", "cut.jpg"): shutil.copy(pictures / name, tmp_path)
    table(tmp_path, ["dot.png"] * 20 + ["cut.jpg"] + ["dot.png"] * 27, "ranks.csv")
    port, folder = free_port(), tmp_path / "run"
    processes = [SERVER.Process(target=read_in_rank, args=(folder, share, rank, 2, port)) for rank in range(2)]
    for process in processes: process.start()
    for process in processes: process.join(40)
    said = "".join(path.read_text() for path in tmp_path.glob("run-*.txt"))
    kept = [json.loads(line) for path in folder.glob("bad*.jsonl") for line in path.read_text().splitlines()]
    assert [row["item"] for row in kept] == [20] and "cut.jpg" in kept[0]["reason"]
    if share == 0.03: assert [process.exitcode for process in processes] == [0, 0] and len((folder / "metrics.jsonl").read_text().splitlines()) == 4
    else: assert all(process.exitcode for process in processes) and "1 of 48 items cannot be read, more than 1 %; the last is item 20" in said


def test_data_that_is_tokenized_ahead_keeps_to_the_same_budget(pictures):
    source = TableSource(table(pictures, ["dot.png", "cut.jpg", "strip.png"], "ahead.csv"))
    bad, item_tokenizer = BadItems(3, 0.4), small_model().item_tokenizer
    assert len(tokenize_pairs(readable_groups(source, bad), item_tokenizer)) == 2 and list(bad.reasons) == [1]
    with pytest.raises(ValueError, match="1 of 3 items cannot be read, more than 0 %"): list(readable_groups(source, BadItems(3)))


def test_captions_that_are_empty_endless_or_no_text(tmp_path):
    folder = tmp_path
    with tarfile.open(folder / "set-train-0000.tar", "w") as tar:
        for key, caption in (("a", b""), ("b", b"\xff\xfe not text"), ("c", b"word " * 20_000), ("d", b"a dot")):
            for name, data in ((f"{key}.png", png()), (f"{key}.txt", caption)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    source = ShardSource(folder)
    reader, model = Reader(source), small_model()
    assert isinstance(reader[0], Unreadable) and "is empty" in reader[0] and isinstance(reader[1], Unreadable) and "not UTF-8" in reader[1]
    started = time.monotonic()
    with pytest.warns(UserWarning, match="does not fit the context"): sequences = model.item_tokenizer([reader[2][0].right])
    assert len(sequences[0]) == model.vocab.context and time.monotonic() - started < 5
    bad = BadItems(4, 0.5)
    assert len(tokenize_pairs(readable_groups(source, bad), model.item_tokenizer)) == 2 and list(bad.reasons) == [0, 1]


def test_a_broken_shard_is_named_and_a_missing_one_is_passed_over_item_by_item(tmp_path):
    def shard(number, keys):
        with tarfile.open(tmp_path / f"set-train-{number:04}.tar", "w") as tar:
            for key in keys:
                for name, data in ((f"{key}.png", png()), (f"{key}.txt", b"a dot")):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    shard(0, "abcdefgh")
    shard(1, "ij")
    source = ShardSource(tmp_path)
    (tmp_path / "set-train-0001.tar").unlink()
    bad = BadItems(len(source), 0.2)
    assert len(list(readable_groups(source, bad))) == 8 and sorted(bad.reasons) == [8, 9] and "set-train-0001.tar" in bad.reasons[8]
    with pytest.raises(ValueError, match="more than 10 %"): list(readable_groups(source, BadItems(len(source), 0.1)))
    whole = (tmp_path / "set-train-0000.tar").read_bytes()
    (tmp_path / "set-train-0000.tar").write_bytes(whole[:3000])
    with pytest.raises(ValueError, match="set-train-0000.tar.*broken shard"): ShardSource(tmp_path)


# ---- the cache

def tokenize(folder, scenes, plan):
    torch.set_num_threads(1)
    source = ShapesSource(scenes)
    with open(os.devnull, "w") as nowhere: os.dup2(nowhere.fileno(), 2)
    tokenize_source(source, small_model().item_tokenizer, folder, plan)


LONG = pytest.mark.skipif(not os.environ.get("FUSELIP_LONG"), reason="100,000 pictures, twice, take a quarter of an hour; FUSELIP_LONG=1 runs it")


@pytest.mark.parametrize("scenes, block", [(200, 100), pytest.param(21_500, 4000, marks=LONG)])
def test_a_cache_that_is_killed_is_the_cache_of_an_uninterrupted_run(tmp_path, scenes, block):
    source = ShapesSource(scenes)
    plan = cache_plan(source, small_model().item_tokenizer, "shapes", block=block)
    torn, whole, rng, counts = tmp_path / "torn", tmp_path / "whole", random.Random(0), []
    for _ in range(3):
        process, done = SERVER.Process(target=tokenize, args=(torn, scenes, plan)), len(list(torn.glob("*/*.json")))
        process.start()
        while len(list(torn.glob("*/*.json"))) == done: time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.join()
        counts.append(len(list(torn.glob("*/*.json"))))
    assert not (torn / "manifest.json").exists() and counts == sorted(set(counts))
    tokenize_source(source, small_model().item_tokenizer, torn, plan)
    manifest = tokenize_source(source, small_model().item_tokenizer, whole, plan)
    assert scenes == 200 or manifest["images"] > 100_000
    names = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(torn) for path in torn.rglob("*") if path.is_file())  # what was half written is gone
    assert len(names) > 30 and all((torn / name).read_bytes() == (whole / name).read_bytes() for name in names)


def test_a_run_from_the_cache_is_the_run_without_it(tmp_path):
    source, found = ShapesSource(40), []
    item_tokenizer = small_model().item_tokenizer
    tokenize_source(source, item_tokenizer, tmp_path / "cache", cache_plan(source, item_tokenizer, "shapes", block=64))
    for pairs in (tokenize_pairs(source_groups(source), item_tokenizer), CachedPairs(tmp_path / "cache", item_tokenizer)):
        found.append(train(small_model(), pairs, settings(steps=40, batch_size=32, shards=1)))  # into the second epoch
    assert found[0] == found[1]
    live = SourcePairs(source, small_model())
    for pairs in (live, CachedPairs(tmp_path / "cache", item_tokenizer, by_pair=False)): found.append(train(small_model(), pairs, settings(steps=8, batch_size=32, shards=2)))
    assert found[2] == found[3]


# ---- what is never done

def test_nothing_that_is_loaded_is_unpickled_or_run(root):
    code = {path: path.read_text(encoding="utf-8") for path in (root / "fuselip_edu").glob("*.py")}
    for path, text in code.items():
        for call in re.findall(r"torch\.load\([^\n]*", text): assert "weights_only=True" in call, path
        assert not re.search(r"pickle\.loads?\(|allow_pickle=True|trust_remote_code=True|yaml\.load\(|(?<![.\w])(eval|exec)\(|shell=True|extractall\(", text), path


@pytest.mark.parametrize("cell", ["../secret.png", "/etc/hostname", "inner/../../secret.png", "..\\secret.png", "../pictures.zip#a.png"])
def test_a_table_cannot_reach_outside_its_folder(tmp_path, cell):
    (tmp_path / "secret.png").write_bytes(png())
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive: archive.writestr("a.png", png())
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / "pairs.csv"
    path.write_text(f"image,text\n{cell},words\n")
    with pytest.raises(ValueError, match="does not stay inside"): CSVSource(path)
