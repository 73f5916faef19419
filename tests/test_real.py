"Real pictures through the same commands, with a small budget; data/results/real.json holds what a larger one reached."
import pytest

import real_sets


@pytest.mark.parametrize("make, size, steps", [(real_sets.emoji4, 210, 150), (real_sets.grocery, 1200, 150)])
def test_a_small_real_set_is_learned(make, size, steps, data, tmp_path):
    train, tests = make(data, tmp_path, size)
    if make is real_sets.emoji4: tests = {"the names it saw": train}  # so short a run learns those; a third style needs the full one
    for tasks in real_sets.learn(train, tests, tmp_path, tokenizer_steps=0, steps=steps, batch_size=64).values():
        for row in tasks.values(): assert row["ci95"][0] > row["chance"], tasks
