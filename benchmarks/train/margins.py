"""By how much the built-in model prefers the right answers of the demonstration, and with what it
still does.

    python benchmarks/train/margins.py [--builtin offload/builtin] [--threads N]

The margin of an answer is the least difference, over its tokens and the end token, between the
right token's logit and the best other one. Above 0, greedy decoding gives exactly that answer.
transformers computes it in float32 with full attention: of the model as it is, with keys and
values rounded to 8, 4 and 3 bits as a codec would, with the weights rounded to 8 and 4 bits, and
in bfloat16. Rounding happens cell by cell while the document is read, so a cell reads rounded
neighbours, as in the runtime; the codec here is a plain one and not the runtime's own.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer

CELL_TOKENS = 256
KEY_GROUP_TOKENS = 64  # keys share a scale per channel over these
WEIGHT_GROUP = 32  # neighbouring inputs of one output that share a scale


@dataclass(frozen=True)
class Setting:
    """How the model computes."""

    name: str
    kv_bits: int | None = None
    weight_bits: int | None = None
    dtype: torch.dtype = torch.float32
    must_hold: bool = True  # whether every answer has to be right


SETTINGS = (
    Setting("as it is"),
    Setting("8-bit KV", kv_bits=8),
    Setting("4-bit KV", kv_bits=4),
    Setting("3-bit KV", kv_bits=3, must_hold=False),
    Setting("8-bit weights", weight_bits=8),
    Setting("4-bit weights", weight_bits=4),
    Setting("bfloat16", dtype=torch.bfloat16),
)


def rounded(x: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """x on a grid of 2^bits steps between its least and largest value along `dim`."""
    low = x.amin(dim, keepdim=True)
    step = ((x.amax(dim, keepdim=True) - low) / (2**bits - 1)).clamp_min(1e-8)
    return ((x - low) / step).round() * step + low


class Reader:
    """A model that reads one document and is then asked about it."""

    def __init__(self, folder: Path, setting: Setting):
        self.setting = setting
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=setting.dtype)
        self.model.eval()
        if setting.weight_bits:
            with torch.no_grad():
                for name, weight in self.model.named_parameters():
                    if name.endswith("proj.weight"):
                        groups = weight.view(weight.shape[0], -1, WEIGHT_GROUP)
                        groups.copy_(rounded(groups, setting.weight_bits, 2))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    @torch.no_grad()
    def read(self, document: str) -> None:
        """Prefill "<|bos|><|user|>document" and the empty line after it."""
        self.start = f"<|bos|><|user|>{document}\n\n"
        # The last line feed belongs to what follows: a letter stands in for a question.
        self.ids = self.encode(self.start + "W")[:-1]
        self.cache = transformers.DynamicCache()
        for begin in range(0, len(self.ids), CELL_TOKENS):
            if self.setting.kv_bits and begin >= 2 * CELL_TOKENS:
                self._round_cell(begin - 2 * CELL_TOKENS)
            ids = torch.tensor([self.ids[begin : begin + CELL_TOKENS]])
            self.model.model(ids, past_key_values=self.cache, use_cache=True)

    def _round_cell(self, begin: int) -> None:
        cell = slice(begin, begin + CELL_TOKENS)
        for layer in self.cache.layers:
            keys, values = layer.keys[0, :, cell], layer.values[0, :, cell]
            heads, num_tokens, head_dim = keys.shape
            groups = keys.view(heads, num_tokens // KEY_GROUP_TOKENS, KEY_GROUP_TOKENS, head_dim)
            layer.keys[0, :, cell] = rounded(groups, self.setting.kv_bits, 2).view(keys.shape)
            layer.values[0, :, cell] = rounded(values, self.setting.kv_bits, 2)

    @torch.no_grad()
    def margin(self, question: str, answer: str, earlier: str = "") -> float:
        """The margin of `answer`; `earlier` holds the turns before the question, written out."""
        asked = self.encode(f"{self.start}{earlier}{question}<|assistant|>")
        assert asked[: len(self.ids)] == self.ids
        right = self.encode(answer + "<|end|>")
        new = asked[len(self.ids) :] + right
        logits = self.model(torch.tensor([new]), past_key_values=self.cache, use_cache=True).logits
        self.cache.crop(-len(new))
        logits = logits[0, -len(right) - 1 : -1].float()
        rows = torch.arange(len(right))
        chosen = logits[rows, right].clone()
        logits[rows, right] = -torch.inf
        return (chosen - logits.max(-1).values).min().item()

    def conversation(self, turns: list[tuple[str, str]]) -> list[float]:
        """Margins of the answers when the questions are turns of one conversation."""
        margins, earlier = [], ""
        for question, answer in turns:
            margins.append(self.margin(question, answer, earlier))
            earlier += f"{question}<|assistant|>{answer}<|end|><|user|>"
        return margins


def measure(builtin: Path) -> bool:
    """Print the margins of every setting; whether all are above 0 where they must be.

    "alone": each question first after the story; "in one talk": one after the other; "reversed":
    the same from the last to the first; "line feed": alone, after a story that ends with one, as a
    file does.
    """
    demo = json.loads((builtin / "demo.json").read_text(encoding="utf-8"))
    texts = {
        name: (builtin / demo[name]).read_text(encoding="utf-8").strip()
        for name in ("story", "report")
    }
    turns = [(entry["question"], entry["answer"]) for entry in demo["questions"]]
    summary = (demo["summary"]["question"], demo["summary"]["answer"])
    results, all_right = [], True
    for setting in SETTINGS:
        reader = Reader(builtin / "model", setting)
        margins = {}
        reader.read(texts["story"])
        margins["alone"] = [reader.margin(*turn) for turn in turns]
        margins["in one talk"] = reader.conversation(turns)
        margins["reversed"] = reader.conversation(turns[::-1])[::-1]
        num_tokens = len(reader.ids)
        reader.read(texts["report"])
        margins["summary"] = [reader.margin(*summary)]
        print(f"{setting.name}: story of {num_tokens:,}, report of {len(reader.ids):,} tokens")
        reader.read(texts["story"] + "\n")
        margins["line feed"] = [reader.margin(*turn) for turn in turns]
        for name, values in margins.items():
            print(f"   {name:12}", *(f"{value:6.2f}" for value in values), flush=True)
        if setting.must_hold:
            all_right = all_right and min(min(values) for values in margins.values()) > 0
        results.append({"setting": setting.name, **margins})
    print(json.dumps(results))
    return all_right


def main() -> int:
    here = Path(__file__).resolve().parents[2] / "offload" / "builtin"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--builtin", type=Path, default=here)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    transformers.utils.logging.disable_progress_bar()
    return 0 if measure(given.builtin) else 1


if __name__ == "__main__":
    raise SystemExit(main())
