"""How often a model answers rightly, to the letter, by task and by length of the document.

    python benchmarks/train/evaluate.py --novels NOVEL... [--model FOLDER] [--tokens 2000 4000]

Documents are prose that training never saw (or tales: --haystacks), with fresh facts among it; one
question is asked about each. An answer counts when greedy decoding gives every token of it and the
end token (it is fed the right answer so far, which comes to the same). With --natural TEXT..., the
loss on natural text as well. Each line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
from pathlib import Path

import documents
import facts
import torch
import torch.nn.functional as F
from corpus import Corpus
from documents import Conversation
from export import load
from haystack import HAYSTACKS, Prose, Setting
from model import Model
from tokenizer import ASSISTANT_ID, BOS_ID, END_ID, USER_ID
from tokenizers import Tokenizer

BUILTIN_MODEL = Path(__file__).resolve().parents[2] / "offload" / "builtin" / "model"

QUICK_TASKS = ("needles", "multi_key", "numbered", "variables", "quoting")


def encoded(
    tokenizer: Tokenizer, drawn: Conversation, turn: int = 0
) -> tuple[list[int], list[int]]:
    """Prompt and answer of one turn, asked as the first after the document."""
    question, answer = drawn.turns[turn]
    prompt = tokenizer.encode(f"{drawn.document}\n\n{question}", add_special_tokens=False).ids
    said = tokenizer.encode(answer, add_special_tokens=False).ids
    return [BOS_ID, USER_ID, *prompt, ASSISTANT_ID], [*said, END_ID]


@torch.no_grad()
def found(model: Model, prompt: list[int], answer: list[int]) -> list[int]:
    """The token that the model prefers at each place of the answer."""
    device = model.embed_tokens.weight.device
    ids = torch.tensor([prompt + answer[:-1]], device=device)
    hidden = _hidden(model, ids)
    return model.logits(hidden[0, len(prompt) - 1 :]).argmax(-1).tolist()


def _hidden(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """(batch, tokens, hidden) of ids (batch, tokens). A GPU multiplies in bfloat16, in which it is
    ten times as fast."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda"):
        return model.hidden(ids, positions)


def quick(
    model: Model,
    tokenizer: Tokenizer,
    corpus: Corpus,
    lengths: tuple[int, ...] = (500, 2000),
    count: int = 12,
) -> dict[str, str]:
    """Right answers of `count` by task and length, in books that are held out."""
    counts = {}
    for num_tokens in lengths:
        for task in QUICK_TASKS:
            rng = random.Random(f"{task} {num_tokens}")
            prose = Prose(corpus.held_out_books, rng)
            right = 0
            for _ in range(count):
                at = Setting(rng, prose, int(num_tokens * 2.9), 1)
                prompt, answer = encoded(tokenizer, documents.conversation(at, task))
                right += found(model, prompt, answer) == answer
            counts[f"{task} {num_tokens}"] = f"{right}/{count}"
    return counts


def single_needle(at: Setting) -> Conversation:
    """One fact in the whole document."""
    fact = facts.draw(at.rng, set())
    return Conversation(at.document([fact.sentence]), [(fact.question, fact.answer)])


def alike(at: Setting) -> Conversation:
    """Twelve facts of one kind in the document, most of them sharing names; one is asked for."""
    used: set[str] = set()
    kind = at.rng.choice(facts.RELATIONS).kind
    told = [facts.draw(at.rng, used, kind)]
    while len(told) < 12:
        told.append(facts.neighbour(at.rng, at.rng.choice(told), used))
    asked = told[0]
    at.rng.shuffle(told)
    return Conversation(
        at.document([fact.sentence for fact in told]), [(asked.question, asked.answer)]
    )


def unsaid(at: Setting) -> Conversation:
    """Eight facts, and a question for one that is not there."""
    used: set[str] = set()
    told = [facts.draw(at.rng, used) for _ in range(8)]
    absent = facts.neighbour(at.rng, told[0], used)
    return Conversation(
        at.document([fact.sentence for fact in told]), [(absent.question, absent.unsaid)]
    )


def five_points(at: Setting) -> Conversation:
    """Five numbered key points among as many other facts, to be summarised."""
    used: set[str] = set()
    points = [facts.draw(at.rng, used).sentence for _ in range(5)]
    sentences = [documents.key_point(n, point) for n, point in enumerate(points, 1)]
    for _ in range(5):
        place = at.rng.randrange(len(sentences) + 1)
        sentences.insert(place, facts.draw(at.rng, used).sentence)
    turn = (documents.SUMMARY_REQUEST, documents.summary(points))
    return Conversation(at.document(sentences), [turn])


def four_at_once(at: Setting) -> Conversation:
    """Eight facts, four of them asked for in one turn."""
    used: set[str] = set()
    told = [facts.draw(at.rng, used) for _ in range(8)]
    asked = at.rng.sample(told, 4)
    turn = (" ".join(f.question for f in asked), " ".join(f.answer for f in asked))
    return Conversation(at.document([fact.sentence for fact in told]), [turn])


def dense(at: Setting) -> Conversation:
    """As many facts as fit in a third of the document, one of them asked for."""
    used: set[str] = set()
    told = [facts.draw(at.rng, used) for _ in range(at.num_chars // 150)]
    asked = at.rng.choice(told)
    return Conversation(
        at.document([fact.sentence for fact in told]), [(asked.question, asked.answer)]
    )


TASKS = {
    "one needle": single_needle,
    "12 alike": alike,
    "4 of 8 at once": four_at_once,
    "dense facts": dense,
    "not said": unsaid,
    "5 key points": five_points,
    "two hops": documents.hops,
    "variables": documents.variables,
    "12 records or fewer": documents.numbered,
    "list of one kind": documents.every,
    "end of a sentence": documents.quoting,
}


def measure(
    model: Model,
    tokenizer: Tokenizer,
    prose: Prose,
    task: str,
    num_tokens: int,
    count: int,
    haystack: str = "prose",
) -> dict:
    """Right answers out of `count` to `task` in documents of about `num_tokens`."""
    rng = prose.rng = random.Random(f"{task} {num_tokens}")
    chars_per_token = _chars_per_token(tokenizer, prose.books[0])
    right = length = right_tokens = tokens = 0
    for _ in range(count):
        at = Setting(rng, prose, int(num_tokens * chars_per_token), 1, haystack)
        drawn = TASKS[task](at)
        prompt, answer = encoded(tokenizer, drawn)
        said = found(model, prompt, answer)
        right += said == answer
        right_tokens += sum(a == b for a, b in zip(said, answer, strict=True))
        tokens += len(answer)
        length += len(prompt)
    return {
        "task": task,
        "haystack": haystack,
        "tokens": length // count,
        "asked": count,
        "right": right,
        "right_tokens": round(right_tokens / tokens, 4),
    }


def _chars_per_token(tokenizer: Tokenizer, text: str) -> float:
    text = text[20000:60000]
    return len(text) / len(tokenizer.encode(text, add_special_tokens=False).ids)


@torch.no_grad()
def natural_loss(model: Model, tokenizer: Tokenizer, text: str, window: int = 2048) -> dict:
    """Loss on the first 400,000 characters, in windows that know nothing of each other."""
    text = text[:400_000]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    total = 0.0
    device = model.embed_tokens.weight.device
    for begin in range(0, len(ids), window):
        part = torch.tensor([[BOS_ID, *ids[begin : begin + window]]], device=device)
        hidden = _hidden(model, part[:, :-1])
        total += F.cross_entropy(
            model.logits(hidden[0]).float(), part[0, 1:], reduction="sum"
        ).item()
    return {
        "tokens": len(ids),
        "loss_per_token": round(total / len(ids), 3),
        "perplexity": round(math.exp(total / len(ids)), 1),
        "bits_per_byte": round(total / math.log(2) / len(text.encode()), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUILTIN_MODEL)
    parser.add_argument("--novels", type=Path, nargs="+", required=True)
    parser.add_argument("--natural", type=Path, nargs="*", default=[])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000, 4000, 8000, 16000])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--haystacks", nargs="+", choices=HAYSTACKS, default=["prose"])
    parser.add_argument("--count", type=int, default=40, help="questions per task and length")
    parser.add_argument("--query-scale", type=float, default=1.0, help="of the model's queries")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="a file for the lines as well")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = load(given.model).to(given.device)
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.q_proj.weight *= given.query_scale
    tokenizer = Tokenizer.from_file(str(given.model / "tokenizer.json"))
    prose = Prose([path.read_text(encoding="utf-8") for path in given.novels], random.Random(0))
    rows = []
    for num_tokens in given.tokens:
        for task, haystack in itertools.product(given.tasks, given.haystacks):
            rows.append(measure(model, tokenizer, prose, task, num_tokens, given.count, haystack))
            print(json.dumps(rows[-1]), flush=True)
    for path in given.natural:
        loss = natural_loss(model, tokenizer, path.read_text(encoding="utf-8"))
        rows.append({"text": path.name, **loss})
        print(json.dumps(rows[-1]), flush=True)
    if given.out:
        given.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
