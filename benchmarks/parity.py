"""A checkpoint's logits beside those of transformers in float32, at its real size.

    python benchmarks/parity.py FOLDER [--tokens 300] [--prefill 280]

Some tokens are prefilled and the rest decoded, with weights as they lie in the files. Prints the
mean KL divergence, the greatest difference and how often the most likely token is the same. With
random weights (checkpoints.py) distributions are flat, and rounding is magnified.
"""

from __future__ import annotations

import argparse

from ebbtide import LLM  # isort: skip  before torch, whose threads would spin

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--prefill", type=int, default=280)
    given = parser.parse_args()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.float32).eval()
    ids = [(i * 7919 + 1) % min(40000, model.config.vocab_size) for i in range(given.tokens)]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    del model  # memory for one of both
    with LLM.open(given.folder, weight_bits="full") as llm:
        got = llm.logits(ids, prefill_tokens=given.prefill)
    ours, theirs = got.log_softmax(-1), expected.log_softmax(-1)
    print(f"KL divergence      {(theirs.exp() * (theirs - ours)).sum(-1).mean():.2e}, mean")
    print(f"greatest difference {(got - expected).abs().max():.2e} of {expected.abs().max():.1f}")
    print(f"same first choice  {(got.argmax(-1) == expected.argmax(-1)).float().mean():.1%}")


if __name__ == "__main__":
    main()
