"""Calibration: the same tokens decoded in exact mode and at each epsilon, and what differs."""

from __future__ import annotations

import json

import pytest
import torch
from small_llm import open_small
from test_cli_builtin import MATERIAL, opening_of_the_story, run

import ebbtide
from ebbtide.offload.builtin import HERE
from ebbtide.offload.errors import ContextOverflow, InputError
from ebbtide.offload.mode import Mode
from ebbtide.offload.running.scoring import output_bytes

BOUNDED = Mode("bounded", selector_options={"epsilon": 0.02})
NUM_TOKENS = 20
FACT = MATERIAL["questions"][0]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    text, questions = opening_of_the_story()
    assert questions[0] == FACT
    folder = HERE / "model"
    with open_small(folder, tmp_path_factory.mktemp("spill"), mode=BOUNDED) as llm:
        llm._context = llm.count_tokens(text) + 100
        needs = {"output_bytes": output_bytes(llm.config.vocab_size, 2 * NUM_TOKENS)}
        llm.admission.keep_in_memory(0.0, llm._context, 4, **needs)
        epsilons = (0.0, 0.05, 0.5)
        yield ebbtide.calibrate(
            llm, text, [FACT["question"]], epsilons=epsilons, num_tokens=NUM_TOKENS
        )


def test_exact_mode_comes_first_and_differs_from_itself_in_nothing(measured):
    for kind in ("text", "answers"):
        exact = next(trial for trial in measured.trials if trial.kind == kind)
        assert exact.epsilon is None
        assert (exact.kl_mean, exact.kl_max, exact.same_top1) == (0, 0, 1)
        assert exact.selected_share == 1 and exact.ms_per_token > 0
        assert exact.disk_bytes_per_token > 0  # everything lies there


def test_a_larger_epsilon_reads_less_and_differs_more(measured):
    for kind in ("text", "answers"):
        trials = [t for t in measured.trials if t.kind == kind and t.epsilon is not None]
        assert [trial.epsilon for trial in trials] == [0.0, 0.05, 0.5]
        shares = [trial.selected_share for trial in trials]
        assert shares[0] > shares[1] > shares[2]
        # With nothing allowed to be wrong only what has no effect at all may be left out, and the
        # kernels differ in how they round: far below what the codes cost (3e-5).
        assert trials[0].kl_mean < 1e-5 and trials[0].same_top1 == 1
        assert trials[0].kl_mean < trials[1].kl_mean < trials[2].kl_mean


def test_the_models_own_answer_is_what_is_decoded(measured, tmp_path):
    with ebbtide.LLM.open(HERE / "model") as llm:
        num_tokens = len(llm.tokenizer.encode(FACT["answer"]))
    answers = [trial for trial in measured.trials if trial.kind == "answers"]
    assert {trial.num_tokens for trial in answers} == {num_tokens}
    assert {trial.num_tokens for trial in measured.trials if trial.kind == "text"} == {NUM_TOKENS}


def test_what_is_recommended_holds_for_all_that_was_measured(measured):
    assert measured.largest_epsilon(1e-5) == 0.0
    assert measured.largest_epsilon(1e9) == 0.5
    assert measured.largest_epsilon(-1.0) is None
    text, answers = (
        [t for t in measured.trials if t.kind == kind and t.epsilon == 0.05]
        for kind in ("text", "answers")
    )
    between = (text[0].kl_mean + answers[0].kl_mean) / 2
    assert measured.largest_epsilon(between) == 0.0
    assert measured.largest_epsilon(between, "answers") >= 0.05


def test_the_runtime_stays_as_it_was(tmp_path):
    ids = torch.randint(0, 256, (400,), generator=torch.Generator().manual_seed(3)).tolist()
    with open_small(HERE / "model", tmp_path, mode=BOUNDED) as llm:
        before = llm.logits(ids, prefill_tokens=390)
        text, _ = opening_of_the_story()
        ebbtide.calibrate(llm, text, epsilons=[0.3], num_tokens=4)
        assert torch.equal(llm.logits(ids, prefill_tokens=390), before)


def test_what_cannot_be_measured_is_said(tmp_path):
    with open_small(HERE / "model", tmp_path) as llm:
        with pytest.raises(InputError, match="mode='bounded'"):
            ebbtide.calibrate(llm, "text")
    with open_small(HERE / "model", tmp_path, mode=BOUNDED) as llm:
        with pytest.raises(InputError, match=r"the document has 3 tokens.* give a longer one"):
            ebbtide.calibrate(llm, "a")
        for epsilons in ([], [1.5], [-0.1], [float("nan")]):
            with pytest.raises(InputError, match="epsilons are"):
                ebbtide.calibrate(llm, "a", epsilons=epsilons)
        with pytest.raises(InputError, match="num_tokens is 0"):
            ebbtide.calibrate(llm, "a", num_tokens=0)
        with pytest.raises(ContextOverflow):
            ebbtide.calibrate(llm, "a b c d e f " * 20000)


def test_the_command_prints_a_table_and_advice(tmp_path):
    (tmp_path / "story.md").write_text(opening_of_the_story(4)[0])
    args = ("calibrate", "story.md", "-Q", FACT["question"], "--epsilons", "0.5,0.02", "-n", "8")
    code, out, err = run(tmp_path, *args)
    assert code == 0, err
    assert [line.split()[:2] for line in out.splitlines() if "bounded" in line] == [
        ["bounded", "0.02"],
        ["bounded", "0.5"],
    ] * 2
    assert "--mode bounded --epsilon" in err or "--mode exact" in err


def test_json_holds_every_trial(tmp_path):
    text = opening_of_the_story(4)[0]
    args = ("calibrate", "--epsilons", "0.02", "--most-kl", "100", "-n", "4", "--json")
    code, out, err = run(tmp_path, *args, given=text)
    assert (code, out.count("\n")) == (0, 1), err
    found = json.loads(out)
    assert found["schema"] == 1 and found["recommended_epsilon"] == 0.02
    assert found["recommended_epsilon_for_answers"] is None
    assert [trial["epsilon"] for trial in found["trials"]] == [None, 0.02]
    assert {trial["kind"] for trial in found["trials"]} == {"text"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--epsilons", "2"), "--epsilons"),
        (("--epsilons", ""), "--epsilons"),
        (("--epsilons", ",".join(f"0.{i}" for i in range(1, 30))), "at most 16"),
        (("--most-kl", "0"), "--most-kl"),
        (("-Q", " "), "--question"),
    ],
)
def test_wrong_options_are_named(tmp_path, args, said):
    code, out, err = run(tmp_path, "calibrate", "none.txt", *args)
    assert (code, out) == (2, "") and said in err


def test_a_short_document_is_refused(tmp_path):
    code, out, err = run(tmp_path, "calibrate", "-", given="Too short.")
    assert (code, out) == (2, "") and "give a longer one" in err
