"""Two small real data sets through the commands that any CSV goes through; `python tests/real_sets.py [emoji4] [grocery]` writes data/results/real.json.

emoji4: names and pictures in two drawing styles are learned; asked are known concepts and concepts never trained on, both drawn in a third style.
grocery: photos of 81 products and their names are learned; asked is the name of new photos of 60 of them.
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
    "train.csv, and two tests in a third style: of every seven concepts one is held out for `new`; `known` asks for the others."
    rows = [json.loads(line) for line in open(data / "emoji4" / "concepts.jsonl", encoding="utf-8")][:concepts]
    picture = lambda style, row: f"{data / 'emoji4' / style}.zip#{row['id']}_1.png"
    train, new, known_concepts = [], [], []
    for number, row in enumerate(rows):
        styles = next(image["styles"] for image in row["images"] if image["tone"] == 1)
        if "openmoji" in styles: (new if number % 7 == 3 else known_concepts).append({"image": picture("openmoji", row), "text": row["name"]})
        if number % 7 == 3: continue
        known = [style for style in ("noto", "twemoji") if style in styles]
        for style in known:
            train += [{"image": picture(style, row), "text": row["name"]},
                      {"image": picture(style, row), "text": ", ".join(row["keywords"][:6])}]
        if len(known) == 2: train.append({"image": picture(known[0], row), "instruction": "in the other style", "target_image": picture(known[1], row)})
    return write_csv(folder / "train.csv", train), {"emoji4, new concepts": write_csv(folder / "new.csv", new),
                                                    "emoji4, known concepts": write_csv(folder / "known.csv", known_concepts)}


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
    return write_csv(folder / "train.csv", train), {"grocery": write_csv(folder / "test.csv", test)}


def command(*words): subprocess.run([sys.executable, "-m", "fuselip_edu", *map(str, words)], check=True, cwd=ROOT)


def learn(train_csv, tests, folder, tokenizer_steps, steps, batch_size=128): # -> {name of a test: its tasks}
    "Tokenizer (the shipped one if `tokenizer_steps` is 0), model, evaluation; the commands of the README."
    tokenizer = "tiny"
    if tokenizer_steps:
        tokenizer = folder / "tokenizer"
        command("train-tokenizer", "--data", f"csv:{train_csv}", "--run", tokenizer, "--train.steps", tokenizer_steps, "--train.free-steps", tokenizer_steps // 4)
    command("train", "--preset", "tiny", "--data", f"csv:{train_csv}", "--tokenizer", tokenizer, "--run", folder / "run", "--train.steps", steps,
            "--train.batch-size", batch_size, "--text-vocab", 1024)
    for name, path in tests.items():
        command("evaluate", "--model", folder / "run", "--data", f"csv:{path}", "--candidates", 100, "--out", folder / f"{name}.json")
    return {name: json.loads((folder / f"{name}.json").read_text())["tasks"] for name in tests}


def main(names):
    import torch
    data, out = Path(os.environ.get("FUSELIP_DATA", ROOT.parent / "shared" / "data")).resolve(), ROOT / "data" / "results" / "real.json"
    results = json.loads(out.read_text()) if out.exists() else {"sets": {}}
    results |= {"command": "python tests/real_sets.py", "date": time.strftime("%Y-%m-%d"), "hardware": f"{os.cpu_count()} CPU cores",
                "versions": {"python": platform.python_version(), "torch": torch.__version__.split("+")[0]}}
    for name in names or SETS:
        with tempfile.TemporaryDirectory() as folder:
            learned = learn(*SETS[name][0](data, Path(folder)), Path(folder), **SETS[name][1])
        results["sets"] |= {test: {"tasks": tasks} for test, tasks in learned.items()}
        out.write_text(json.dumps(results, indent=2) + "\n")


SETS = {"emoji4": (emoji4, {"tokenizer_steps": 2500, "steps": 1000}), "grocery": (grocery, {"tokenizer_steps": 1500, "steps": 800})}

if __name__ == "__main__": main(sys.argv[1:])
