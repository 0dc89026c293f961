"""What guessing tokens saves: answers and running text with it and without it.

    python benchmarks/drafts.py NOVEL... --tokens 16000 --share 0 0.25 [--epsilon 0.02]
    python benchmarks/drafts.py NOVEL... --model MODEL --tokens 3000 --host-memory 4GiB

Facts are written into a novel, and asked for in chats over it (answers); then the model goes on
with the novel itself (text, greedily and at temperature 0.7), past any end of text. Each with
guesses off and on, with so large a share of the far planes in memory, in exact mode or bounded
(with an epsilon). For each: milliseconds per
token over all tokens, bytes from disk, guesses that were right, and whether the tokens are the
same. The last line is JSON. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch

from ebbtide import LLM, Budget
from ebbtide.offload.mode import Mode
from ebbtide.offload.options import Options
from ebbtide.offload.running.sampler import Sampler
from ebbtide.offload.sessions.generation import GenerationConfig

sys.path.insert(0, str(Path(__file__).parent / "train"))
import documents
from haystack import Prose, Setting

SEQUENCES = 4  # of a session
SAMPLING = {
    "text": GenerationConfig(),
    "text, sampled": GenerationConfig(do_sample=True, temperature=0.7, seed=1),
}


class Spent:
    """Tokens, what they took, and what of the store's counters they moved."""

    def __init__(self, session):
        self.tokens: list[int] = []
        self.seconds = 0.0
        self.accepted = self.rejected = 0
        self._session, self._stats = session, session._runtime.store.stats
        self._before = self._stats.bytes_read["disk"]
        self.disk_bytes = 0

    def end(self) -> None:
        self.disk_bytes = self._stats.bytes_read["disk"] - self._before

    def row(self) -> dict:
        count, guesses = max(1, len(self.tokens)), self.accepted + self.rejected
        return {
            "num_tokens": len(self.tokens),
            "ms_per_token": 1e3 * self.seconds / count,
            "disk_mb_per_token": self.disk_bytes / 1e6 / count,
            "guesses": guesses,
            "accepted_share": self.accepted / guesses if guesses else None,
        }


def answers(llm, session, drawn) -> Spent:
    """Every question about the document, as turns of one chat."""
    spent, messages = Spent(session), [{"role": "user", "content": drawn.document}]
    for number, (question, _) in enumerate(drawn.turns):
        if number == 0:
            messages[0]["content"] += f"\n\n{question}"
        else:
            messages.append({"role": "user", "content": question})
        before = spent._stats.bytes_read["disk"]
        for piece in (stream := session.stream(messages, temperature=0, max_new_tokens=80)):
            if len(stream.token_ids) == 1:  # the prompt was read
                spent._before += spent._stats.bytes_read["disk"] - before
            del piece
        output = stream.output
        messages.append({"role": "assistant", "content": output.text})
        spent.tokens += output.token_ids[1:]
        spent.seconds += output.timings["decode_s"]
        details = output.usage["completion_tokens_details"]
        spent.accepted += details["accepted_prediction_tokens"]
        spent.rejected += details["rejected_prediction_tokens"]
    spent.end()
    return spent


def text(session, ids: list[int], config: GenerationConfig, num_tokens: int) -> Spent:
    """What the model writes behind the ids."""
    session.truncate(0)
    session.append(ids)
    sampler, token = Sampler(config), None
    logits = session.last_logits()
    spent, guesses = Spent(session), session.guesses()
    began = time.perf_counter()
    for _ in range(num_tokens):
        token = sampler.choose(logits, session._sequence.tokens)
        logits = session.decode(token, sampler)
        spent.tokens.append(token)
    spent.seconds = time.perf_counter() - began
    made = zip(session.guesses(), guesses, strict=True)
    spent.accepted, spent.rejected = (now - before for now, before in made)
    spent.end()
    return spent


def measure(draft: bool, share: float, drawn, book: str, given) -> dict[str, Spent]:
    options = Options(
        model=given.model,
        budget=Budget(host_memory=given.host_memory, disk_memory="64GiB"),
        kv_bits=given.kv_bits,
        draft=draft,
        mode=given.mode.name,
    )
    with LLM(options, mode=given.mode) as llm:
        prompt = [{"role": "user", "content": drawn.document}]
        longest = llm.count_tokens(prompt)
        llm._context = longest + 100 * len(drawn.turns) + given.steps
        if share < 1:
            llm.admission.keep_in_memory(share, llm._context, SEQUENCES)
        with llm.session() as session:
            found = {"answers": answers(llm, session, drawn)}
            ids = llm.encode(book)[:longest]
            for name, config in SAMPLING.items():
                found[name] = text(session, ids, config, given.steps)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("novels", type=Path, nargs="+")
    parser.add_argument("--model", default=None)
    parser.add_argument("--tokens", type=int, default=16000)
    parser.add_argument("--share", type=float, nargs="+", default=[0.0, 0.25, 1.0])
    parser.add_argument("--turns", type=int, default=6, help="questions")
    parser.add_argument("--steps", type=int, default=96, help="tokens of running text")
    parser.add_argument("--epsilon", type=float, help="of bounded mode; without it, exact")
    parser.add_argument("--kv-bits", default="8")
    parser.add_argument("--host-memory", default="64GiB")
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    given = parser.parse_args()
    given.mode = Mode()
    if given.epsilon is not None:
        given.mode = Mode("bounded", selector_options={"epsilon": given.epsilon})
    if given.threads:
        torch.set_num_threads(given.threads)
    books = [path.read_text(encoding="utf-8") for path in given.novels]
    rng = random.Random("drafts")
    at = Setting(rng, Prose(books, rng), int(3.3 * given.tokens), given.turns, "prose")
    drawn = documents.needles(at)
    drawn = drawn._replace(turns=drawn.turns[: given.turns])
    rows = []
    for share in given.share:
        found = {draft: measure(draft, share, drawn, books[0], given) for draft in (False, True)}
        for kind, plain in found[False].items():
            guessed = found[True][kind]
            off, on = plain.row(), guessed.row()
            rows.append({"kind": kind, "share": share, "off": off, "on": on})
            right = "none" if on["accepted_share"] is None else f"{on['accepted_share']:.0%}"
            print(
                f"{kind:14s} {share:4.2f} in memory  off {off['ms_per_token']:6.1f} ms "
                f"{off['disk_mb_per_token']:6.1f} MB  on {on['ms_per_token']:6.1f} ms "
                f"{on['disk_mb_per_token']:6.1f} MB  guesses {on['guesses']:4d} right {right:4s}  "
                f"{'same tokens' if plain.tokens == guessed.tokens else 'OTHER TOKENS'}",
                flush=True,
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
