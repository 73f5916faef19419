"""Groceries: photos of 81 products, their names, and the pictures a shop shows of them.

Trained: photo and name, and (photo, "the shop picture") -> the shop's picture of that product.
Asked, of photos that training does not see:
  names   the name of a photo, and the photo of a name;
  shop    the shop picture of a photo.
The new photos show 60 of the 81 products; the candidates are drawn from these.
"""
import json

from common import main, read_jsonl, spread, write_set


def split_rows(data, split, limit): # -> rows of "names", rows of "shop"
    iconic = {row["id"]: row["iconic"] for row in json.loads((data / "classes.json").read_text(encoding="utf-8"))}
    photos = [(f"{data / f'grocery_{split}.zip'}#{row['image']}", row) for row in spread(read_jsonl(data / f"grocery_{split}.jsonl"), limit)]
    return ([{"image": photo, "text": row["name"]} for photo, row in photos],
            [{"image": photo, "instruction": "the shop picture", "target_image": f"{data / 'grocery_iconic.zip'}#{iconic[row['cls']]}"} for photo, row in photos])


def prepare(data, out, limit=None): # `limit`: photos of each split
    (train_names, train_shop), (names, shop) = (split_rows(data, split, limit) for split in ("train", "val"))
    write_set(out, train_names + train_shop, {"names": names, "shop": shop})


if __name__ == "__main__": main(__doc__, "grocery", prepare, tokenizer_steps=1500, steps=1500)
