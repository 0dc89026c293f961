"""The built-in documents: what demo.json says stands in them, and the model knows it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ebbtide.offload import builtin

MATERIAL = builtin.demo_material()
STORY_SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "train" / "story.py"


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(builtin.model_folder() / "tokenizer.json"))


def test_every_fact_stands_once_in_its_chapter():
    story = MATERIAL["story"].read_text(encoding="utf-8")
    chapters = re.split(r"^## Chapter ", story, flags=re.MULTILINE)[1:]
    assert len(MATERIAL["questions"]) == 8
    for entry in MATERIAL["questions"]:
        assert story.count(entry["sentence"]) == 1
        chapter = chapters[entry["chapter"] - 1]
        assert chapter.startswith(f"{entry['chapter']}.") and entry["sentence"] in chapter
    told_in = [entry["chapter"] for entry in MATERIAL["questions"]]
    assert told_in == sorted(told_in)
    assert told_in[0] == 1 and told_in[-1] == len(chapters)


def test_the_summary_lists_the_key_points():
    report = MATERIAL["report"].read_text(encoding="utf-8")
    points = re.findall(r"Key point (\d+): ([^.]+\.)", report)
    assert len(points) == 5
    assert MATERIAL["summary"]["answer"] == "\n".join(f"{n}. {text}" for n, text in points)


def test_documents_are_as_long_as_they_are_said_to_be(tokenizer):
    for name, num_tokens in (("story", 13000), ("report", 4500)):
        found = len(tokenizer.encode(MATERIAL[name].read_text(encoding="utf-8")).ids)
        assert abs(found - num_tokens) < 0.02 * num_tokens


@pytest.mark.skipif(not STORY_SCRIPT.exists(), reason="this is not a checkout")
def test_the_documents_can_be_made_again(tmp_path):
    command = [sys.executable, str(STORY_SCRIPT), "--out", str(tmp_path)]
    # The script finds its neighbours by their folder, which a safe path would leave out.
    subprocess.run(command, check=True, capture_output=True, env={"PYTHONSAFEPATH": ""})
    for name in ("story.md", "report.md", "demo.json"):
        assert (tmp_path / name).read_bytes() == (builtin.HERE / name).read_bytes()


def test_transformers_reads_the_same_summary(tokenizer):
    from random_checkpoints import reference_model

    report = MATERIAL["report"].read_text(encoding="utf-8").strip()
    asked = f"<|bos|><|user|>{report}\n\n{MATERIAL['summary']['question']}<|assistant|>"
    prompt = tokenizer.encode(asked).ids
    answer = tokenizer.encode(MATERIAL["summary"]["answer"] + "<|end|>").ids
    model = reference_model(builtin.model_folder(), attention="sdpa")
    with torch.no_grad():
        hidden = model.model(torch.tensor([prompt + answer])).last_hidden_state
        logits = model.lm_head(hidden[0, -len(answer) - 1 : -1])
    assert logits.argmax(-1).tolist() == answer
    # Wide enough to be rounded: keys and values of 8 and 4 bits, weights of 8 and 4, and bfloat16
    # move it by 0.08 at most (benchmarks/train/margins.py), a twelfth of this.
    best = logits.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1.0
