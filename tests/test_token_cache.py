"The token cache: what it holds, whose it is, views, texts at the edge, and batches that nobody can tell from those without it."
import dataclasses
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from fuselip_edu.batches import MixedSource, SourcePairs, grouped_batches, tokenize_pairs
from fuselip_edu.cli import main
from fuselip_edu.pairs import Item, Pair
from fuselip_edu.sources import CSVSource, ShapesSource, source_groups
from fuselip_edu.text import BPE
from fuselip_edu.titok import TINY_TOKENIZER, TiTok
from fuselip_edu.token_cache import (CachedPairs, ahead_of_time, cache_cost, cache_plan, cost_table, image_tokenizer_digest, open_cache, read_note, text_tokenizer_digest,
                                     tokenize_source)
from fuselip_edu.vocab import ItemTokenizer, pad_sequences


@pytest.fixture(scope="module")
def tokenizer(): return ItemTokenizer(TiTok.from_pretrained(TINY_TOKENIZER), BPE.train(["a red circle", "make it blue and turn it"], 300), context=30)


def made(source, tokenizer, folder, **plan):
    tokenize_source(source, tokenizer, folder, cache_plan(source, tokenizer, "test", **plan))
    return folder


class Mixture: # every form of item, texts that are empty, exact, too long, and items with no pairs
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    items = [[Pair(Item(image), Item(text="a red circle"))], [], [Pair(Item(image, "turn it"), Item(image.flip(1))), Pair(Item(image, "blue"), Item(image.flip(2)))],
             [Pair(Item(image, "make it blue and turn it " * 9), Item(text="it " * 40))], [Pair(Item(text="a"), Item(image.flip(1), "a red circle"))], []]
    groups = [[0], [2, 3], [1, 4], [5]]

    def __len__(self): return len(self.items)
    def __getitem__(self, index): return self.items[index]


@pytest.mark.filterwarnings("ignore:a text of")
@pytest.mark.parametrize("block", [1, 2, 100])
def test_every_sequence_is_the_tokenizers(tokenizer, tmp_path, block):
    source = Mixture()
    cached, expected = CachedPairs(made(source, tokenizer, tmp_path / "c", block=block), tokenizer), tokenize_pairs(source_groups(source), tokenizer)
    pairs = [pair for group in cached.groups for pair in group]
    assert len(cached) == len(expected) == len(pairs) == 5 and [len(group) for group in cached.groups] == [len(group) for group in expected.groups]
    ours, theirs = cached.inputs(pairs), expected.inputs(range(5))
    assert torch.equal(ours["ids"], theirs["ids"]) and torch.equal(ours["lengths"], theirs["lengths"]) and int(ours["lengths"].max()) == 30


def test_a_picture_is_kept_once_with_what_was_done_to_it(tokenizer, tmp_path):
    folder = made(Mixture(), tokenizer, tmp_path / "c")
    images = Dataset.from_file(str(folder / "view-00" / "part-00000.images.arrow"))
    assert images["operation"][:] == ["", "turn it", "blue"] and images["item"][:] == [0, 2, 2]
    codes = tokenizer.image_tokenizer.encode(torch.stack([Mixture.image, Mixture.image.flip(1), Mixture.image.flip(2)]))
    assert torch.equal(torch.tensor(images["codes"][:]), codes)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["pairs"], manifest["images"], manifest["bad"]) == (5, 3, {}) and manifest["plan"]["image_tokenizer"] == image_tokenizer_digest(tokenizer.image_tokenizer)


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abcdefgh": Image.fromarray(rng.integers(0, 255, (50, 60, 3), dtype=np.uint8)).resize((200, 180)).save(tmp_path / f"{name}.png")
    (tmp_path / "pairs.csv").write_text("image,text\n" + "".join(f"{name}.png,photo {name}\n" for name in "abcdefgh"))
    return CSVSource(tmp_path / "pairs.csv")


def test_view_v_is_epoch_v_and_views_come_again(tokenizer, photos, tmp_path):
    cached = CachedPairs(made(photos, tokenizer, tmp_path / "c", views=3, seed=5), tokenizer, by_pair=False)

    class Model:
        image_size = 32
        def collate(self, items): return dict(zip(("ids", "lengths"), pad_sequences(tokenizer(items))))

    live, seen = SourcePairs(photos, Model(), seed=5), []
    for epoch in range(4):
        live.epoch, cached.epoch = epoch % 3, epoch
        batches = [[batch] for batch in grouped_batches(cached.groups, 4, 0, epoch)]
        for ours, theirs in zip(cached.batches(batches), live.batches(batches), strict=True): assert torch.equal(ours["ids"], theirs["ids"])
        seen.append(cached.inputs(range(8))["ids"])
    assert torch.equal(seen[0], seen[3]) and not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_a_damaged_part_is_made_again_and_no_other(tokenizer, tmp_path):
    source, folder = ShapesSource(8), tmp_path / "c"
    made(source, tokenizer, folder, block=16)
    files = {path: path.read_bytes() for path in folder.rglob("*.arrow")}
    victim = folder / "view-00" / "part-00002.images.arrow"
    victim.write_bytes(files[victim][:-4] + b"abcd")
    assert read_note(folder, 0, 2) is None and read_note(folder, 0, 1)["pairs"] > 0
    before = {path: path.stat().st_mtime_ns for path in files}
    made(source, tokenizer, folder, block=16)
    assert {path: path.read_bytes() for path in folder.rglob("*.arrow")} == files
    assert {path.name for path in files if path.stat().st_mtime_ns != before[path]} == {victim.name, victim.name.replace("images", "pairs"), "groups.arrow"}


def test_another_tokenizer_is_refused_by_name(tokenizer, tmp_path):
    folder = made(Mixture(), tokenizer, tmp_path / "c")
    torch.manual_seed(0)
    other = ItemTokenizer(TiTok(tokenizer.image_tokenizer.config), tokenizer.text_tokenizer, 30)
    with pytest.raises(ValueError, match=f"made with the image tokenizer {image_tokenizer_digest(tokenizer.image_tokenizer)[:12]}, but the model has {image_tokenizer_digest(other.image_tokenizer)[:12]}"): open_cache(folder, other)
    other = ItemTokenizer(tokenizer.image_tokenizer, BPE.train(["other words"], 280), 30)
    with pytest.raises(ValueError, match=f"made with the text tokenizer {text_tokenizer_digest(tokenizer.text_tokenizer)[:12]}"): open_cache(folder, other)
    with pytest.raises(ValueError, match="another plan: image_tokenizer is"): tokenize_source(Mixture(), ItemTokenizer(TiTok(tokenizer.image_tokenizer.config), tokenizer.text_tokenizer, 30), folder,
                                                                                             cache_plan(Mixture(), ItemTokenizer(TiTok(tokenizer.image_tokenizer.config), tokenizer.text_tokenizer, 30), "test"))
    with pytest.raises(FileNotFoundError, match="no token cache in"): open_cache(tmp_path / "nowhere", tokenizer)


def test_unreadable_items_are_in_the_manifest_or_stop_the_work(tokenizer, photos, tmp_path):
    (tmp_path / "c.png").write_bytes(b"")
    plan = cache_plan(photos, tokenizer, "photos")
    with pytest.raises(ValueError, match="1 of 8 items cannot be read, more than 0 %.*c.png"): tokenize_source(photos, tokenizer, tmp_path / "none", plan)
    manifest = tokenize_source(photos, tokenizer, tmp_path / "some", plan, max_bad=0.2)
    assert list(manifest["bad"]) == ["2"] and "c.png" in manifest["bad"]["2"] and manifest["pairs"] == 7
    assert len(CachedPairs(tmp_path / "some", tokenizer)) == 7


def test_of_a_mixture_only_what_a_group_holds_is_made_and_dealt(tokenizer, tmp_path):
    class Half(Mixture): groups = [[0], [4]]
    folder = made(Half(), tokenizer, tmp_path / "c", block=2)
    cached, expected = CachedPairs(folder, tokenizer), tokenize_pairs(source_groups(Half()), tokenizer)
    assert len(cached) == len(expected) == 2 == sum(map(len, cached.groups)) and json.loads((folder / "manifest.json").read_text())["pairs"] == 2
    assert torch.equal(cached.inputs(cached.groups[0] + cached.groups[1])["ids"], expected.inputs([0, 1])["ids"])


def test_sizes_that_change_codes_change_the_digest(tokenizer):
    one = tokenizer.image_tokenizer
    other = TiTok(dataclasses.replace(one.config, pixel_mean=0.4))
    other.load_state_dict(one.state_dict())
    assert image_tokenizer_digest(other) != image_tokenizer_digest(one)


def test_damaged_groups_are_refused(tokenizer, tmp_path):
    folder = made(Mixture(), tokenizer, tmp_path / "c")
    (folder / "groups.arrow").write_bytes((folder / "groups.arrow").read_bytes()[:-20])
    with pytest.raises(ValueError, match="groups.arrow' is missing or damaged"): open_cache(folder, tokenizer)


def test_an_error_of_the_thread_reaches_the_reader():
    def broken():
        yield 1
        raise OSError("the disk is gone")
    reader = ahead_of_time(broken())
    assert next(reader) == 1
    with pytest.raises(OSError, match="the disk is gone"): next(reader)
    endless = ahead_of_time(iter(int, 1))
    assert next(endless) == 0
    endless.close()  # and its thread ends


def test_costs_are_multiplied_out(tokenizer):
    source = ShapesSource(20)
    cost = cache_cost(source, tokenizer, cache_plan(source, tokenizer, "shapes", views=3), sample=10)
    assert cost["items"] == len(source) and cost["seconds"] > 0 and 33 <= cost["image_bytes"] < 2000
    lines = cost_table(cost, "shapes", 3, 2).splitlines()
    assert [line.split()[0] for line in lines] == ["shapes", "CC3M", "CC12M"] and "8,717,862 images" in lines[1] and "2 processes, 3 views" in lines[2]


def test_the_commands(tmp_path, capsys):
    words = ["tokenize", "--scenes", "30", "--out", str(tmp_path / "c"), "--block", "64", "--device", "cpu"]
    assert main([*words, "--rank", "1", "--world", "2"]) == 0 and "the parts of rank 1 are done" in capsys.readouterr().out
    assert main([*words, "--rank", "0", "--world", "2"]) == 0
    said = capsys.readouterr()
    assert "images" in said.out and "CC12M" in said.err
    assert main(["train", "--data", f"cache:{tmp_path / 'c'}", "--run", str(tmp_path / "run"), "--train.steps", "4", "--train.batch-size", "32", "--train.device", "cpu"]) == 0
    assert json.loads((tmp_path / "run" / "speed.json").read_text())["data_wait"] < 1
    trained, fine = str(tmp_path / "run" / "model"), ["train", "--init", str(tmp_path / "run"), "--train.steps", "2", "--train.batch-size", "32", "--train.device", "cpu"]
    assert main([*words[:3], "--init", trained, "--out", str(tmp_path / "own"), "--device", "cpu"]) == 0  # for fine-tuning, by the tokenizers of the model
    assert main([*fine, "--data", f"cache:{tmp_path / 'own'}", "--run", str(tmp_path / "fine")]) == 0
    assert not {"encoder", "tokenizer", "text_vocab"} & json.loads((tmp_path / "fine" / "config.json").read_text()).keys()  # which the model decides
    assert main(["tokenize", "--scenes", "30", "--text-vocab", "300", "--out", str(tmp_path / "other"), "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main([*fine, "--data", f"cache:{tmp_path / 'other'}", "--run", str(tmp_path / "never")]) == 1 and "tokenize --init MODEL" in capsys.readouterr().err
    for wrong, message in ((["--views", "0"], "views must be at least 1"), (["--rank", "3", "--world", "2"], "there is no rank 3 among 2"), (["--max-bad", "half"], "'half' is not a share"), (["--seed", "4"], "another plan: seed is 0 there and 4 here"), (["--world", "4"], "--world 4 needs a --rank")):
        assert main([*words, *wrong]) == 1 and message in capsys.readouterr().err
    assert main(["train", "--data", f"cache:{tmp_path / 'nothing'}", "--run", str(tmp_path / "no")]) == 1 and "no token cache in" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_half_a_note_is_no_note(tokenizer, tmp_path):
    made(ShapesSource(4), tokenizer, tmp_path, block=16)
    note = next(tmp_path.glob("view-00/part-*.json"))
    note.write_text(note.read_text()[:40])
    assert read_note(tmp_path, 0, 0) is None
    made(ShapesSource(4), tokenizer, tmp_path, block=16)
    assert read_note(tmp_path, 0, 0)["pairs"] > 0


def test_nothing_to_tokenize_is_said(tokenizer):
    class Nothing(ShapesSource): groups = []
    source = Nothing(2)
    with pytest.raises(ValueError, match="no items to tokenize"): cache_cost(source, tokenizer, cache_plan(source, tokenizer, "test"))


def test_a_table_that_has_changed_is_not_continued(tokenizer, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    path = tmp_path / "pairs.csv"
    path.write_text("image,text\na.png,a red circle\na.png,red\n")
    plan = lambda: cache_plan(CSVSource(path), tokenizer, f"csv:{path}")
    tokenize_source(CSVSource(path), tokenizer, tmp_path / "cache", plan())
    tokenize_source(CSVSource(path), tokenizer, tmp_path / "cache", plan())
    path.write_text("image,text\na.png,a red square\na.png,red\n")
    with pytest.raises(ValueError, match="a cache of another plan: tables is"): tokenize_source(CSVSource(path), tokenizer, tmp_path / "cache", plan())
    with pytest.raises(ValueError, match="block must be at least 1 item, or 0 to choose, not -1"): cache_plan(ShapesSource(2), tokenizer, "shapes", block=-1)
    class Shards(ShapesSource): shards = [tmp_path / "a-train-0000.tar"]
    digests = set()
    for size in (100, 200):
        Shards.shards[0].write_bytes(bytes(size))
        digests.add(cache_plan(Shards(2), tokenizer, "cc3m")["tables"])
    assert len(digests) == 2 and "" not in digests
    class Tables(ShapesSource): tables = [path]
    before = cache_plan(Tables(2), tokenizer, "mmeb")["tables"]
    path.write_text("image,text\na.png,a red disc!!\na.png,red\n")
    assert "" != cache_plan(Tables(2), tokenizer, "mmeb")["tables"] != before
    assert cache_plan(ShapesSource(2), tokenizer, "shapes")["tables"] == "" != plan()["tables"] == cache_plan(MixedSource({"a": CSVSource(path)}), tokenizer, "x")["tables"]
