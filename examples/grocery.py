"""Groceries: photos of 81 products, their names, the pictures a shop shows of them, and the photos transformed.

Trained: photo and name; (photo, "the shop picture") -> the shop's picture of that product; and, as the paper does with
captioned photos, (photo, "crop to upper left" or another instruction) -> the photo transformed, `DRAWS` times a photo.
Asked, of photos that training does not see:
  names   the name of a photo, and the photo of a name;
  shop    the shop picture of a photo;
  crop, rotate, jitter, flip, colour   which of all pictures that one kind of transformation makes of a photo is the one that
          the instruction asks for, of `ASKED` photos.
The new photos show 60 of the 81 products; the candidates of names and shop are drawn from these.
"""
import io
import json
import random
import zipfile

from PIL import Image

from common import main, read_jsonl, spread, write_set
from fuselip_edu.core import atomic_path, load_image
from fuselip_edu.transforms import KINDS, draw_kind, transform_pairs

SIZE = 32  # pixels of a transformed photo: what the preset `tiny` looks at
DRAWS, ASKED = 4, 100


def split_rows(data, split, limit): # -> rows of "names", rows of "shop"
    iconic = {row["id"]: row["iconic"] for row in json.loads((data / "classes.json").read_text(encoding="utf-8"))}
    photos = [(f"{data / f'grocery_{split}.zip'}#{row['image']}", row) for row in spread(read_jsonl(data / f"grocery_{split}.jsonl"), limit)]
    return ([{"image": photo, "text": row["name"]} for photo, row in photos],
            [{"image": photo, "instruction": "the shop picture", "target_image": f"{data / 'grocery_iconic.zip'}#{iconic[row['cls']]}"} for photo, row in photos])


def transformed_rows(photos, archive, train): # -> {kind: rows}, and writes the pictures that they name into a ZIP beside the table
    rows = {kind: [] for kind in KINDS}
    archive.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(archive) as path, zipfile.ZipFile(path, "w") as file:
        for number, photo in enumerate(photos):
            rng, image, cells = random.Random(f"{archive.stem}/{number}"), load_image(photo, SIZE), {}

            def cell(picture): # where it lies in the archive, written there once
                pixels = picture.numpy().tobytes()
                if pixels not in cells:
                    member, packed = f"{number:04}-{len(cells):02}.png", io.BytesIO()
                    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(packed, "png")
                    file.writestr(zipfile.ZipInfo(member), packed.getvalue())
                    cells[pixels] = f"{archive.name}#{member}"
                return cells[pixels]

            for draw, kind in enumerate([draw_kind(rng) for _ in range(DRAWS)] if train else KINDS):
                rows[kind] += [{"image": cell(pair.left.image), "instruction": pair.left.text, "target_image": cell(pair.right.image), "group": f"{number}-{draw}"}
                               for pair in transform_pairs(image, kind, rng, train)]
    return rows


def prepare(data, out, limit=None): # `limit`: photos of each split
    (train_names, train_shop), (names, shop) = (split_rows(data, split, limit) for split in ("train", "val"))
    learned = transformed_rows([row["image"] for row in train_names], out / "transformed.zip", True)
    asked = transformed_rows([row["image"] for row in spread(names, ASKED)], out / "tests" / "transformed.zip", False)
    write_set(out, train_names + train_shop + [row for rows in learned.values() for row in rows], {"names": names, "shop": shop} | asked)


if __name__ == "__main__": main(__doc__, "grocery", prepare, tokenizer_steps=4000, steps=2400)
