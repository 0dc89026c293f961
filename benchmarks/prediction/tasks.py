"""Bounded mode beside exact mode in the runtime, by tasks: its answers, and what it reads.

    python benchmarks/prediction/tasks.py NOVEL... --tokens 8192 16384 30000 --epsilon 0.02 0.1

For each task documents are drawn whose facts lie in prose. Each of their questions is asked as
the first after its document, and again as a later turn behind the others and their answers. Exact
mode answers, then the same tokens are decoded at each epsilon. KL and same-top-1 are over all
tokens of answers; right is counted of whole answers, to the letter. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from texts import REPO  # puts the training scripts where they are found

from ebbtide import LLM, Budget
from ebbtide.offload.mode import Mode
from ebbtide.offload.running.calibration import Run, decode_run

# isort: split
import documents
import facts
from haystack import Prose, Setting


def few_needles(at: Setting) -> documents.Conversation:
    """Four facts in the whole document: what a small model still finds in its longest ones."""
    used: set[str] = set()
    told = [facts.draw(at.rng, used) for _ in range(4)]
    turns = [(fact.question, fact.answer) for fact in told]
    return documents.Conversation(at.document([fact.sentence for fact in told]), turns)


TASKS = {
    "four needles": few_needles,
    "needles": documents.needles,
    "many at once": documents.several,
    "multi-key": documents.multi_key,
    "variables": documents.variables,
    "records": documents.numbered,
    "all of a kind": documents.every,
}
LINE = (
    "{task:14} {tokens:6} {turn} {epsilon:5} right {right:3} (exact {right_exact:3}) of {asked:3}"
    "  KL {kl:.5f}  same {same_top1:7.2%}  read {read:6.1%}"
)
MOST_TOKENS = 200  # of an answer


@dataclass
class Sums:
    """Over the answers of one task, length, turn and epsilon."""

    asked: int = 0
    right_exact: int = 0
    right: int = 0
    tokens: int = 0
    kl: float = 0.0
    same: int = 0
    read: float = 0.0  # share of sealed records, times tokens

    def add(self, is_right_exactly: bool, is_right: bool, run: Run) -> None:
        self.asked += 1
        self.right_exact += is_right_exactly
        self.right += is_right
        self.tokens += len(run.tokens)
        self.kl += sum(run.kl)
        self.same += sum(run.same_top1)
        self.read += run.selected_share * len(run.tokens)

    def row(self) -> dict:
        count = max(1, self.tokens)
        return {
            "asked": self.asked,
            "right_exact": self.right_exact,
            "right": self.right,
            "kl": self.kl / count,
            "same_top1": self.same / count,
            "read": self.read / count,
        }


@contextmanager
def asked_in(llm, session, messages: list[dict]):
    """A branch that has been asked, and its last logits. A new one for each answer: going back in
    one behind a long answer would read all of the document again, into pages of its own."""
    with session.fork() as branch:
        ids, common = llm.tokenizer.continue_chat(branch.tokens, messages)
        branch._replace_from(common, ids)
        yield branch, branch.last_logits()


def measure_answer(llm, session, messages: list[dict], wanted: str, epsilons, sums: dict) -> None:
    """One question in exact mode and at each epsilon; `sums` by epsilon."""
    eos = llm.generation.eos_token_ids
    with asked_in(llm, session, messages) as asked:
        exact = decode_run(*asked, None, MOST_TOKENS, Mode(), eos_token_ids=eos)
    goal = llm.tokenizer.encode(wanted, add_bos=False)
    is_right_exactly = exact.tokens == goal
    for epsilon in epsilons:
        mode = Mode("bounded", selector_options={"epsilon": epsilon})
        with asked_in(llm, session, messages) as asked:
            run = decode_run(*asked, exact.tokens, MOST_TOKENS, mode, exact.log_probs)
        is_right = is_right_exactly
        if not all(run.same_top1):  # it would have gone another way
            with asked_in(llm, session, messages) as asked:
                own = decode_run(*asked, None, MOST_TOKENS, mode, eos_token_ids=eos)
            is_right = own.tokens == goal
        sums[epsilon].add(is_right_exactly, is_right, run)


def measure_document(llm, drawn, epsilons, firsts: dict, laters: dict) -> None:
    opening = [{"role": "user", "content": drawn.document}]
    with llm.session() as session:
        session.append(opening)
        earlier: list[dict] = []
        for question, answer in drawn.turns:
            asked = {"role": "user", "content": f"{drawn.document}\n\n{question}"}
            measure_answer(llm, session, [asked], answer, epsilons, firsts)
            if earlier:
                later = [*earlier, {"role": "user", "content": question}]
                measure_answer(llm, session, later, answer, epsilons, laters)
                earlier = later
            else:
                earlier = [asked]
            earlier.append({"role": "assistant", "content": answer})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("novels", type=Path, nargs="+")
    parser.add_argument("--model", type=Path, default=REPO / "offload" / "builtin" / "model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 30000])
    parser.add_argument("--epsilon", type=float, nargs="+", default=[0.02, 0.1])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--documents", type=int, default=3, help="of each task and length")
    parser.add_argument("--turns", type=int, default=5, help="questions to each document")
    parser.add_argument("--kv-bits", default="8")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    bits = given.kv_bits if given.kv_bits == "full" else int(given.kv_bits)
    rows = []
    options = {"mode": "bounded", "kv_bits": bits, "budget": Budget(host_memory="16GiB")}
    with LLM.open(given.model, **options) as llm:
        books = [path.read_text(encoding="utf-8") for path in given.novels]
        sample = books[0][20000:60000]
        chars_per_token = len(sample) / len(llm.tokenizer.encode(sample))
        for num_tokens in given.tokens:
            for task in given.tasks:
                firsts, laters = defaultdict(Sums), defaultdict(Sums)
                for number in range(given.documents):
                    rng = random.Random(f"{task} {num_tokens} {number}")
                    prose = Prose(books, rng)
                    num_chars = int(num_tokens * chars_per_token)
                    at = Setting(rng, prose, num_chars, given.turns, "prose")
                    drawn = TASKS[task](at)
                    drawn = drawn._replace(turns=drawn.turns[: given.turns])
                    measure_document(llm, drawn, given.epsilon, firsts, laters)
                for turn, sums in (("first", firsts), ("later", laters)):
                    for epsilon, found in sorted(sums.items()):
                        row = {"task": task, "tokens": num_tokens, "turn": turn}
                        row |= {"epsilon": epsilon} | found.row()
                        rows.append(row)
                        print(LINE.format(**row), flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
