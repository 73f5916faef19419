"""Two small real data sets through the commands that any CSV goes through; `python tests/real_sets.py` writes data/results/real.json.

emoji4: names and pictures in two drawing styles are learned; asked are concepts never trained on, drawn in a third style.
grocery: photos of 81 products and their names are learned; asked is the name of new photos.
"""
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("image", "text", "instruction", "target_image", "group"))
        writer.writeheader()
        writer.writerows(rows)
    return path


def emoji4(data, folder, concepts=None):
    "train.csv and test.csv: of every seven concepts one is held out."
    rows = [json.loads(line) for line in open(data / "emoji4" / "concepts.jsonl", encoding="utf-8")][:concepts]
    picture = lambda style, row: f"{data / 'emoji4' / style}.zip#{row['id']}_1.png"
    train, test = [], []
    for number, row in enumerate(rows):
        styles = next(image["styles"] for image in row["images"] if image["tone"] == 1)
        if number % 7 == 3:
            if "openmoji" in styles: test.append({"image": picture("openmoji", row), "text": row["name"]})
            continue
        known = [style for style in ("noto", "twemoji") if style in styles]
        for style in known:
            train += [{"image": picture(style, row), "text": row["name"]},
                      {"image": picture(style, row), "text": ", ".join(row["keywords"][:6])}]
        if len(known) == 2: train.append({"image": picture(known[0], row), "instruction": "in the other style", "target_image": picture(known[1], row)})
    return write_csv(folder / "train.csv", train), write_csv(folder / "test.csv", test)


def grocery(data, folder, photos=None):
    "train.csv: photo to name, and photo to shop picture; test.csv: new photos to names."
    home = data / "grocery"
    classes = {row["id"]: row for row in json.load(open(home / "classes.json", encoding="utf-8"))}
    read = lambda split: [json.loads(line) for line in open(home / f"grocery_{split}.jsonl", encoding="utf-8")]
    photo = lambda split, row: f"{home / f'grocery_{split}.zip'}#{row['image']}"
    train = []
    for row in read("train")[:photos]:
        shop = f"{home / 'grocery_iconic.zip'}#{classes[row['cls']]['iconic']}"
        train += [{"image": photo("train", row), "text": row["name"]},
                  {"image": photo("train", row), "instruction": "the shop picture", "target_image": shop}]
    test = [{"image": photo("val", row), "text": row["name"]} for row in read("val")]
    return write_csv(folder / "train.csv", train), write_csv(folder / "test.csv", test)


def command(*words): subprocess.run([sys.executable, "-m", "fuselip_edu", *map(str, words)], check=True, cwd=ROOT)


def learn(train_csv, test_csv, folder, tokenizer_steps, steps, batch_size=128):
    "Tokenizer (the shipped one if `tokenizer_steps` is 0), model, evaluation; the commands of the README."
    tokenizer = "tiny"
    if tokenizer_steps:
        tokenizer = folder / "tokenizer"
        command("train-tokenizer", "--data", f"csv:{train_csv}", "--run", tokenizer, "--train.steps", tokenizer_steps, "--train.free-steps", tokenizer_steps // 4)
    command("train", "--preset", "tiny", "--data", f"csv:{train_csv}", "--tokenizer", tokenizer, "--run", folder / "run", "--train.steps", steps,
            "--train.batch-size", batch_size, "--text-vocab", 1024)
    command("evaluate", "--model", folder / "run", "--data", f"csv:{test_csv}", "--candidates", 100, "--out", folder / "results.json")
    return json.loads((folder / "results.json").read_text())["tasks"]


def main():
    import torch
    data = Path(os.environ.get("FUSELIP_DATA", ROOT.parent / "shared" / "data"))
    results = {"command": "python tests/real_sets.py", "date": time.strftime("%Y-%m-%d"), "hardware": f"{os.cpu_count()} CPU cores",
               "versions": {"python": platform.python_version(), "torch": torch.__version__.split("+")[0]}, "sets": {}}
    for make in (emoji4, grocery):
        with tempfile.TemporaryDirectory() as name:
            folder, started = Path(name), time.monotonic()
            tasks = learn(*make(data, folder), folder, tokenizer_steps=1500, steps=800)
            results["sets"][make.__name__] = {"tasks": tasks, "seconds": round(time.monotonic() - started)}
    (ROOT / "data" / "results" / "real.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__": main()
