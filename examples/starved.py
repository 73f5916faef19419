"""A starved tokenizer: sixteen codes in place of 1,024. Does it help to tune it with the task (ETT, chapter 20)?

Models on the shapes of chapter 2, alike but for how they read a picture, with equal pairs:
  fuselip         the codes' numbers, looked up in a table; the tokenizer is frozen
  vectors         the codes' vectors, projected; the tokenizer is frozen
  ett, ett-40     the same, and the tokenizer learns during the first 40 % of the steps; its own loss has the paper's weight, alpha = 0.25, or 160 times that
  again           vectors once more, but of the tokenizer that ett-40 tuned, frozen from the first step
and, with as many pairs once more, models that begin with the encoder of `fuselip`, as the paper begins with one that was trained:
  on-fuselip      numbers
  on-vectors      vectors; for a fifth of the steps the projector learns alone
  on-ett          the same, then for two fifths the tokenizer learns, too, with alpha = 40
They are asked the nine tasks, and models like the first four are trained to write captions. Of every tokenizer: the error of the pictures that it rebuilds, and the codes that it uses.
"""
import argparse
import copy
import functools
import json
from pathlib import Path

import torch

from common import summary
from fuselip_edu.baselines import load_model
from fuselip_edu.core import provenance, seed_everything, write_json
from fuselip_edu.ett import ALL_PRESETS, ETT, CaptionHead, ETTConfig, picture_vectors, starve, tokenizer_report
from fuselip_edu.evaluate import shapes_tasks
from fuselip_edu.fuselip import FuseLIP, FuseLIPConfig
from fuselip_edu.reproduce import changed, claims_table, reproduction_table, run_trials, side_by_side, summarise_trials
from fuselip_edu.shapes import listed, render, scene_at
from fuselip_edu.text import BPE
from fuselip_edu.titok import TINY_TOKENIZER, TiTok, TokenizerTrainConfig
from fuselip_edu.train import preset
from fuselip_edu.vocab import pad_sequences

ALPHAS = {"ett": 0.25, "ett-40": 40.0}  # {row: weight of the tokenizer's own loss}
PRESET = {"fuselip": "tiny", "vectors": "tiny-vectors"} | dict.fromkeys(ALPHAS, "tiny-ett")
LATER = {  # {row: (preset, changes)}, which begins with a model of a row above
    "on-ett": ("tiny-ett", {"encoder.start": "fuselip", "encoder.alpha": ALPHAS["ett-40"], "encoder.projector_share": 0.2}),
    "on-fuselip": ("tiny", {"init": "fuselip"}),
    "on-vectors": ("tiny-vectors", {"encoder.start": "fuselip", "encoder.projector_share": 0.2}),
    "again": ("tiny-vectors", {"tokenizer": "ett-40"}),
}
CODES, BATCH = 16, 24
TRAINED, ASKED = 4000, 500  # scenes with captions


def scene(index, split="train"): return scene_at(index, 9, split, count=2)


def caption(one): return listed([f"a {thing.name}" for thing in one.objects])


def pictures(scenes): return torch.stack([render(one) for one in scenes])


def sentences(model, text, scenes): return pad_sequences([model.vocab.sequence((), text.encode(caption(one))) for one in scenes])


def write_captions(kind, tokenizer, steps, seed=0): # -> how well a model of this row, with a head of its own, says what is in pictures
    torch.set_num_threads(1)
    seed_everything(seed)
    tokenizer = copy.deepcopy(tokenizer)  # processes share the memory of tensors that are sent to them, and some of the rows tune it
    scenes, asked = [scene(index) for index in range(TRAINED)], [scene(index, "test") for index in range(ASKED)]
    seen, shown, text = pictures(scenes), pictures(asked), BPE.train([caption(one) for one in scenes], 320)
    model = FuseLIP(FuseLIPConfig(layers=1), tokenizer, text) if kind == "fuselip" else ETT(ETTConfig(layers=1, tuned=kind in ALPHAS, alpha=ALPHAS.get(kind, 0.25)), tokenizer, text)
    before, head = tokenizer_report(tokenizer, shown), CaptionHead(model.config.width, model.vocab, tokenizer.config.n_latents)
    reading = [p for name, p in model.named_parameters() if name.startswith("token_embedding.")]
    optimizer = torch.optim.AdamW([{"params": [*head.parameters(), *reading]}, {"params": list(tokenizer.parameters()), "rate": 0.1}], lr=2e-3, weight_decay=0.0)
    schedule, generator = functools.partial(rate_at, steps=steps), torch.Generator().manual_seed(seed)
    for step in range(steps):
        if kind in ALPHAS: model.start_step(step, steps)
        for group in optimizer.param_groups: group["lr"] = schedule(step) * group.get("rate", 1.0)
        chosen = torch.randint(len(scenes), (BATCH,), generator=generator).tolist()
        vectors, own = picture_vectors(model, seen[chosen])
        loss = head.loss(vectors, *sentences(model, text, [scenes[at] for at in chosen]))
        optimizer.zero_grad()
        (loss if own is None else loss + own).backward()
        optimizer.step()
    with torch.no_grad():
        vectors, _ = picture_vectors(model, shown)
        ids, lengths = sentences(model, text, asked)
        said, wanted = head.write(vectors), [text.encode(caption(one)) for one in asked]
        right = sum(text.decode(a).split() == text.decode(b).split() for a, b in zip(said, wanted)) / len(asked)
        return {"loss": float(head.loss(vectors, ids, lengths)), "right": right, "before": before, "after": tokenizer_report(tokenizer, shown)}


def rate_at(step, steps): # peak 2e-3, a short warm-up, then down to 0
    return 2e-3 * min(1.0, (step + 1) / 50, (steps - step) / (0.5 * steps))


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/starved", help="folder of the run (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of every model (default: %(default)s)")
    parser.add_argument("--tokenizer-steps", type=int, default=1500, help="in which the starved tokenizer learns its codes (default: %(default)s)")
    parser.add_argument("--caption-steps", type=int, default=1000, help="of every head (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=300, help="test scenes (default: %(default)s)")
    asked = parser.parse_args(words)
    ask = functools.partial(shapes_tasks, asked.queries)
    try: tasks = ask()
    except ValueError as error: parser.error(str(error))
    out = Path(asked.out).resolve()
    place = out / f"tokenizer-{asked.tokenizer_steps}"
    if not (place / "config.json").exists():
        learned = starve(TiTok.from_pretrained(TINY_TOKENIZER), CODES, pictures(scene_at(index, 7) for index in range(6000)), TokenizerTrainConfig(steps=asked.tokenizer_steps, free_steps=0, lr=5e-4, device="cpu"))
        learned.save_pretrained(place)
    starved, shown = TiTok.from_pretrained(place), pictures(scene_at(index, 0, "test") for index in range(ASKED))

    def trained(rows): # {row: (preset, changes)} -> {row: results of its one trial}
        trials = {kind: (changed(preset(name, ALL_PRESETS), {"train.steps": asked.steps, "tokenizer": str(place)} | changes), out / "run" / kind) for kind, (name, changes) in rows.items()}
        return {kind: [trial] for kind, trial in run_trials(trials, ask, dict).items()}

    done = trained({kind: (name, {"encoder.alpha": ALPHAS[kind]} if kind in ALPHAS else {}) for kind, name in PRESET.items()})
    at = {"fuselip": str(out / "run" / "fuselip"), "ett-40": str(out / "tokenizer-tuned")}
    load_model(out / "run" / "ett-40").image_tokenizer.save_pretrained(at["ett-40"])
    done |= trained({kind: (name, {field: at.get(value, value) for field, value in changes.items()}) for kind, (name, changes) in LATER.items()})
    groups = [summarise_trials({kind: trial for kind, trial in done.items() if kind.startswith("on-") == after}, tasks, base) for after, base in ((False, "fuselip"), (True, "on-fuselip"))]
    found = {"models": groups[0]["models"] | groups[1]["models"], "claims": groups[0]["claims"] + groups[1]["claims"]}
    captions = {kind: out / "captions" / f"{kind}-{asked.caption_steps}.json" for kind in PRESET}
    calls = {kind: functools.partial(write_captions, kind, starved, asked.caption_steps) for kind, path in captions.items() if not path.exists()}
    side_by_side(calls, 2, lambda kind, found: write_json(captions[kind], found))
    for kind, row in found["models"].items():
        row["tokenizer"] = tokenizer_report(load_model(out / "run" / kind).image_tokenizer, shown)
        if kind in captions: row["captions"] = json.loads(captions[kind].read_text(encoding="utf-8"))
    given = {name: value for name, value in vars(asked).items() if name != "out" and value != parser.get_default(name)}
    said = " ".join(["python examples/starved.py", *(f"--{name.replace('_', '-')} {value}" for name, value in given.items())])
    found = {"queries": asked.queries, "codes": CODES, "alphas": ALPHAS, "starved": tokenizer_report(starved, shown)} | provenance() | summary(found, said)
    write_json(out / "results.json", found)
    print(f"{reproduction_table(found)}\n\n{claims_table(found)}\n\nsummary: {out / 'results.json'}")


if __name__ == "__main__": main()
