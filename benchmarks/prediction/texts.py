"""Long texts with questions whose answers stand in them, as token ids with the answers marked.

Kinds: "story" (the packaged story and its questions), "filler" (drawn sentences) and "prose" (a
novel), both with drawn facts spread through them.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "benchmarks" / "train"))
import facts  # noqa: E402
import haystack  # noqa: E402

NUM_FACTS = 6
NUM_RUNS, RUN_TOKENS = 24, 4  # positions besides those of answers: runs of consecutive ones


@dataclass
class Text:
    """answers: for each, (first, last + 1) of the positions whose next token is the answer's."""

    name: str
    ids: torch.Tensor
    answers: list[tuple[int, int]]
    samples: torch.Tensor

    @property
    def positions(self) -> torch.Tensor:
        """Those of answers first, then the sampled ones."""
        spans = [torch.arange(*span) for span in self.answers]
        return torch.cat([*spans, self.samples])

    @property
    def num_answer_positions(self) -> int:
        return sum(end - start for start, end in self.answers)

    def num_right(self, logits: torch.Tensor) -> int:
        """How many answers are right to the last token; logits (num_positions, vocab)."""
        right, row = 0, 0
        for start, end in self.answers:
            found = logits[row : row + end - start].argmax(-1)
            right += torch.equal(found, self.ids[start + 1 : end + 1])
            row += end - start
        return right


def make(kind: str, num_tokens: int, tokenizer: Tokenizer, seed: int = 99) -> Text:
    """kind: story, filler or the path of a book."""
    rng = random.Random(seed)
    if kind == "story":
        folder = REPO / "offload" / "builtin"
        demo = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
        body = (folder / demo["story"]).read_text(encoding="utf-8").strip()
        turns = [(entry["question"], entry["answer"]) for entry in demo["questions"]]
    else:
        used: set[str] = set()
        told = [facts.draw(rng, used) for _ in range(NUM_FACTS)]
        if kind == "filler":
            sentences = haystack.filler_sentences(rng, num_tokens * 5)
        else:
            book = Path(kind).read_text(encoding="utf-8").replace("\n", " ")
            start = rng.randrange(len(book) - num_tokens * 5)
            sentences = [s + "." for s in book[start : start + num_tokens * 5].split(". ")]
        lengths = [len(e.ids) for e in tokenizer.encode_batch([" " + s for s in sentences])]
        total, count = 0, 0
        while count < len(sentences) and total < num_tokens - 350:
            total += lengths[count]
            count += 1
        sentences = sentences[:count]
        for fact in told:
            sentences.insert(rng.randrange(len(sentences) + 1), fact.sentence)
        body = " ".join(sentences)
        turns = [(f.question, f.answer) for f in told]
    ids, answers = tokenizer.encode("<|bos|><|user|>" + body).ids, []
    document_tokens = len(ids)
    for i, (question, answer) in enumerate(turns):
        asked = ("<|user|>" if i else "\n\n") + question + "<|assistant|>"
        ids += tokenizer.encode(asked).ids
        start = len(ids) - 1
        ids += tokenizer.encode(answer + "<|end|>").ids
        answers.append((start, len(ids) - 1))
    starts = range(document_tokens // 4, document_tokens - RUN_TOKENS, RUN_TOKENS)
    runs = sorted(rng.sample(starts, NUM_RUNS))
    drawn = [start + i for start in runs for i in range(RUN_TOKENS)]
    name = Path(kind).stem if "." in kind else kind
    return Text(f"{name} {len(ids)}", torch.tensor(ids), answers, torch.tensor(drawn))
