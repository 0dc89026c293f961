"""How often a model finds a fact in a long document: in plain filler, and in the prose of a book.

    python benchmarks/train/needles.py [--model FOLDER] [--book TEXT] [--tokens 500 2000 6000]

Each document holds six facts, and the first three are asked for, each as the first question. An
answer counts when greedy decoding, fed with the right answer so far, gives every token of it and
the end token. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import documents
import torch
from model import Model, Shape
from safetensors.torch import load_file
from tokenizers import Tokenizer

BUILTIN_MODEL = Path(__file__).resolve().parents[2] / "offload" / "builtin" / "model"
NUM_FACTS, NUM_ASKED = 6, 3


def load(folder: Path) -> Model:
    """The network of an exported folder, computing in float32."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = Shape(
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        intermediate=config["intermediate_size"],
        rope_theta=config["rope_theta"],
        max_positions=config["max_position_embeddings"],
    )
    model = Model(shape)
    tensors = load_file(str(folder / "model.safetensors"))
    state = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    model.load_state_dict(state)
    return model.float().eval()


def sentences(rng: random.Random, num_tokens: int, book: str | None) -> list[str]:
    """Filler of about num_tokens, or a piece of the book."""
    if book is None:
        return documents.filler_sentences(rng, num_tokens * 4)
    start = rng.randrange(len(book) - num_tokens * 4)
    piece = book[start : start + int(num_tokens * 2.75)]
    return [sentence + "." for sentence in piece.split(". ")]


@torch.no_grad()
def measure(
    model: Model, tokenizer: Tokenizer, num_tokens: int, num_documents: int, book: str | None
) -> dict:
    rng = random.Random(99)
    right = asked = right_tokens = all_tokens = 0
    length = 0
    for _ in range(num_documents):
        used: set[tuple] = set()
        facts = [documents.fact(rng, used) for _ in range(NUM_FACTS)]
        document = sentences(rng, num_tokens, book)
        for fact in facts:
            document.insert(rng.randrange(len(document) + 1), fact.sentence)
        start = "<|bos|><|user|>" + " ".join(document) + "\n\n"
        for fact in facts[:NUM_ASKED]:
            prompt = tokenizer.encode(start + fact.question + "<|assistant|>").ids
            answer = tokenizer.encode(fact.answer + "<|end|>").ids
            length = len(prompt)
            ids = torch.tensor([prompt + answer])
            hidden = model.hidden(ids, torch.arange(ids.shape[1])[None])
            found = model.logits(hidden[0, -len(answer) - 1 : -1]).argmax(-1).tolist()
            asked += 1
            right += found == answer
            right_tokens += sum(a == b for a, b in zip(found, answer, strict=True))
            all_tokens += len(answer)
    return {
        "document": "filler" if book is None else "book",
        "tokens": length,
        "asked": asked,
        "right": right,
        "right_tokens": round(right_tokens / all_tokens, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUILTIN_MODEL)
    parser.add_argument("--book", type=Path, help="a text whose prose hides facts as well")
    parser.add_argument("--tokens", type=int, nargs="+", default=[500, 2000, 6000])
    parser.add_argument("--documents", type=int, default=8, help="per length and kind")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = load(given.model)
    tokenizer = Tokenizer.from_file(str(given.model / "tokenizer.json"))
    books: list[str | None] = [None]
    if given.book:
        books.append(given.book.read_text(encoding="utf-8").replace("\n", " "))
    rows = []
    for book in books:
        for num_tokens in given.tokens:
            row = measure(model, tokenizer, num_tokens, given.documents, book)
            rows.append(row)
            print("{document}, {tokens} tokens: {right} of {asked} right".format(**row), flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
