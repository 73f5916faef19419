"Batches: groups and ranks; mixtures; ragged sequences; pairs to ids; random crops."
import json

import pytest
import torch

from fuselip_edu.batches import RECIPES, BadItems, Unreadable, MixedSource, Sequences, SourcePairs, grouped_batches, kept_groups, open_data, tokenize_pairs
from fuselip_edu.pairs import Item, Pair


def make_groups(count=60, seed=0):
    sizes = [(1, 2, 4)[i] for i in torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed)).tolist()]
    starts = [sum(sizes[:i]) for i in range(count)]
    return [list(range(start, start + size)) for start, size in zip(starts, sizes)]


def test_an_epoch_repeats_nothing_and_covers_all_but_the_rest():
    groups = make_groups()
    total = sum(map(len, groups))
    for epoch in range(5):
        used = [index for batch in grouped_batches(groups, 16, epoch=epoch) for index in batch]
        assert len(used) == len(set(used)) == total // 16 * 16


def test_groups_stay_together():
    groups = make_groups()
    row = [index for batch in grouped_batches(groups, 16) for index in batch]
    place = {index: i for i, index in enumerate(row)}
    for group in groups:
        found = [place[index] for index in group if index in place]
        assert found == list(range(found[0], found[0] + len(found))) if found else True
    assert sum(len({place[index] // 16 for index in group if index in place}) > 1 for group in groups) < len(row) // 16  # at most one a border


def test_the_order_is_a_function_of_seed_plus_epoch():
    groups = make_groups()
    state = torch.get_rng_state()
    assert grouped_batches(groups, 8, 3, 2) == grouped_batches(groups, 8, 3, 2) == grouped_batches(groups, 8, 5, 0) != grouped_batches(groups, 8, 3, 3)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_take_different_groups_and_step_together(world):
    groups = make_groups(200)
    ranks = [grouped_batches(groups, 8, rank=rank, world=world) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {sum(map(len, groups)) // world // 8}
    group_of = {index: g for g, group in enumerate(groups) for index in group}
    dealt = [{group_of[index] for batch in batches for index in batch} for batches in ranks]
    assert sum(map(len, dealt)) == len(set().union(*dealt))


def test_a_rank_with_small_groups_begins_again():
    groups = [[0, 1, 2, 3], [4], [5, 6, 7, 8], [9], [10, 11, 12, 13], [14]]
    for epoch in range(20):
        ranks = [grouped_batches(groups, 2, epoch=epoch, rank=rank, world=2) for rank in range(2)]
        assert [len(batches) for batches in ranks] == [3, 3] and all(len(batch) == 2 for batches in ranks for batch in batches)


def test_refused_requests():
    groups = [[0, 1], [2], [3, 4, 5]]
    with pytest.raises(ValueError, match="6 pairs do not fill one batch of 7; give more data"): grouped_batches(groups, 7)
    with pytest.raises(ValueError, match="6 pairs do not fill one batch of 4 in each of 2 processes"): grouped_batches(groups, 4, world=2)
    with pytest.raises(ValueError, match="0 pairs do not fill"): grouped_batches([], 1)
    with pytest.raises(ValueError, match="no rank 2 among 2"): grouped_batches(groups, 1, rank=2, world=2)
    with pytest.raises(ValueError, match="3 groups cannot be dealt to 4 processes"): grouped_batches(groups, 1, rank=3, world=4)
    assert len(grouped_batches(groups, 6)) == 1


def test_sequences_give_back_what_they_hold():
    generator = torch.Generator().manual_seed(0)
    lists = [torch.randint(1, 50_000, (int(n),), generator=generator).tolist() for n in torch.randint(1, 20, (50,), generator=generator)]
    sequences = Sequences(lists)
    assert len(sequences) == 50 and sequences.values.dtype == torch.int32 and len(sequences.values) == sum(map(len, lists))
    for indices in ([0], [49, 3, 3, 17], list(range(50))):
        ids, lengths = sequences.pad(torch.tensor(indices), pad=-1)
        assert ids.dtype == lengths.dtype == torch.int64 and ids.shape == (len(indices), max(len(lists[i]) for i in indices))
        for row, length, i in zip(ids.tolist(), lengths.tolist(), indices):
            assert row[:length] == lists[i] and set(row[length:]) <= {-1}


def test_no_sequences():
    empty = Sequences([])
    assert len(empty) == 0 and empty.lengths.dtype == torch.int64


class Spy:
    "Stands in for an item tokenizer: the ids of an item are its text's letters; notes how many items each call gets."
    def __init__(self): self.calls = []

    def __call__(self, items):
        self.calls.append(len(items))
        return [[ord(letter) for letter in item.text] for item in items]


def test_tokenized_pairs_keep_order_and_groups():
    groups = [[Pair(Item(text=f"left {g}.{i}"), Item(text=f"right {'x' * (g + i)}")) for i in range(size)] for g, size in enumerate((1, 3, 2, 4, 1))]
    flat = [pair for group in groups for pair in group]
    for block, calls in ((512, [22]), (2, [8, 12, 2]), (5, [22])):
        spy = Spy()
        tokens = tokenize_pairs(iter(groups), spy, block)
        assert spy.calls == calls and len(tokens) == 11 and tokens.groups == [[0], [1, 2, 3], [4, 5], [6, 7, 8, 9], [10]]
        for side, name in ((tokens.left, "left"), (tokens.right, "right")):
            ids, lengths = side.pad(torch.arange(11))
            assert ["".join(map(chr, row[:n])) for row, n in zip(ids.tolist(), lengths.tolist())] == [getattr(pair, name).text for pair in flat]


def test_a_shared_picture_is_encoded_once():
    from fuselip_edu.text import BPE
    from fuselip_edu.titok import TiTok, TiTokConfig
    from fuselip_edu.sources import ShapesSource, source_groups
    from fuselip_edu.vocab import ItemTokenizer
    groups = list(source_groups(ShapesSource(3)))
    items = [item for group in groups for pair in group for item in (pair.left, pair.right)]
    torch.manual_seed(0)
    image_tokenizer = TiTok(TiTokConfig(width=16, layers=1, heads=2, decoder_width=16, decoder_layers=1, decoder_heads=2)).eval()
    encode, seen = image_tokenizer.encode, []
    image_tokenizer.encode = lambda pixels: seen.append(len(pixels)) or encode(pixels)
    tokenizer = ItemTokenizer(image_tokenizer, BPE.train([item.text for item in items if item.text], 300), 128)
    tokens = tokenize_pairs(groups, tokenizer)
    assert sum(seen) == len({id(item.image) for item in items if item.image is not None})
    ids, lengths = tokens.left.pad(torch.arange(len(tokens)))
    expected = tokenizer(items[0::2])
    assert [row[:n] for row, n in zip(ids.tolist(), lengths.tolist())] == [list(sequence) for sequence in expected]


class Numbers:
    "A source of names, with an epoch."
    epoch = 0
    def __init__(self, name, groups): self.name, self.groups = name, groups
    def __len__(self): return sum(map(len, self.groups))
    def __getitem__(self, index): return f"{self.name}{index}"


def test_a_mixture_holds_every_source():
    a, b = Numbers("a", [[0], [1], [2]]), Numbers("b", [[0, 1], [2, 3]])
    mixture = MixedSource({"a": a, "b": b})
    assert [mixture[i] for i in range(len(mixture))] == ["a0", "a1", "a2", "b0", "b1", "b2", "b3"]
    assert mixture.groups == [[0], [1], [2], [3, 4], [5, 6]]
    mixture.epoch = 4
    assert a.epoch == b.epoch == mixture.epoch == 4
    for index in (-1, 7):
        with pytest.raises(IndexError, match=f"item {index} of a mixture of 7"): mixture[index]


def test_shares_keep_whole_groups_and_always_the_same():
    groups = [[2 * i, 2 * i + 1] for i in range(10)]
    kept = kept_groups(groups, 0.5)
    assert len(kept) == 5 and all(group in groups for group in kept) and kept == kept_groups(groups, 0.5) and len({tuple(group) for group in kept}) == 5
    assert len(kept_groups(groups, 0.39)) == 3 and kept_groups(groups, 1.0) == groups
    assert len(kept_groups(groups, 2.5)) == 25 and kept_groups(groups, 2.0) == groups * 2
    with pytest.raises(ValueError, match="above 0"): kept_groups(groups, 0.0)
    with pytest.raises(ValueError, match="shares name c; the sources are a"): MixedSource({"a": Numbers("a", [[0]])}, {"c": 1.0})


def test_the_papers_mixtures():
    assert RECIPES["cc3m-mm"] == {"cc3m-aug": 1.0, "hq-edit": 1.0, "cc3m-vqa": 1.0, "vg-crop": 1.0, "vg-vqa": 0.5}
    assert RECIPES["cc12m-mm"] == {"cc12m-aug": 1.0, "hq-edit": 1.0, "cc3m-vqa": 1.0, "vg-crop": 1.0, "vg-vqa": 1.0}
    with pytest.raises(ValueError, match="shapes"): open_data("cc3m-mm")
    with pytest.raises(ValueError, match="unknown data 'cc3m-mm:'; give shapes, .*, cc3m-mm:ROOT, cc12m-mm:ROOT"): open_data("cc3m-mm:")


class Uneven:
    "A source whose item i has as many pairs as `counts[i]`."
    groups = [[i] for i in range(6)]
    counts = (1, 0, 3, 1, 0, 0)
    def __getitem__(self, index): return [Pair(Item(text=f"{index}.{i}"), Item(text="right")) for i in range(self.counts[index])]


class Reader:
    image_size = 8
    def collate(self, items): return [item.text for item in items[:len(items) // 2]]


def test_every_shard_has_its_size():
    "Too many pairs are cut off, and where records are empty the first pairs come again, so that all processes see batches of one size."
    fresh = SourcePairs(Uneven(), Reader())
    assert list(fresh.batches([[[0, 1, 3]], [[2, 0], [3, 1]]])) == [["0.0", "3.0", "0.0"], ["2.0", "2.1", "3.0", "3.0"]]
    with pytest.raises(ValueError, match="items 1, 4, 5 of the data have no pairs"): list(fresh.batches([[[1, 4, 5]]]))


def test_a_share_is_not_cut_by_rounding_and_never_empty():
    groups = [[index] for index in range(100)]
    assert len(kept_groups(groups, 0.29)) == 29 and len(kept_groups(groups[:10], 2.3)) == 23
    with pytest.raises(ValueError, match="a share of 0.001 keeps none of 100 groups; give at least 0.01"): kept_groups(groups, 0.001)
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, not {size}"): grouped_batches(groups, size)


def test_bad_items_are_counted_over_all_processes(tmp_path):
    bad = [BadItems(1000, 0.002) for _ in range(3)]
    for rank, one in enumerate(bad): assert one.passed_over(rank, Unreadable(f"broken {rank}")) == []
    bad[1].join([bad[0].reasons, bad[1].reasons])  # two of a thousand are allowed
    with pytest.raises(ValueError, match="3 of 1000 items cannot be read, more than 0.2 %.*--max-bad"): bad[0].join([one.reasons for one in bad])
    (tmp_path / "bad.jsonl").write_text('{"item": 3, "reason": "x"}\n{"item": 4, "rea')
    bad[2].write_to(tmp_path / "bad.jsonl")
    assert [json.loads(line)["item"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()] == [3, 2]
