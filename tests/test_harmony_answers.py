"""Whole answers in channels, from a model whose tokens are scripted: what callers and commands get
of them, and what a conversation keeps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from scripted_harmony import FINAL, THINKS, ids_of
from tokenizers_under_test import HARMONY_TOKENS, USER

from ebbtide.cli.chat_commands import COMMANDS
from ebbtide.cli.conversation import Conversation, session_path
from ebbtide.cli.dialogue import Dialogue
from ebbtide.cli.options import Settings
from ebbtide.cli.run import Run
from ebbtide.cli.signals import Signals

TOLD = (
    f"{THINKS}<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{FINAL}Yes.<|return|>"
)
ONLY_THOUGHT = "<|channel|>analysis<|message|>hm"


def answered(answer):
    """A conversation of a question, its answer and another question."""
    more = {"role": "user", "content": "and now?"}
    return [USER, {"role": "assistant", "content": answer}, more]


@pytest.mark.parametrize(
    ("sampled", "thought", "answer", "reason"),
    [
        (f"{THINKS}{FINAL}Yes.<|return|>", "hm", "Yes.", "stop"),
        (f"{THINKS}{FINAL}Yes.<|endoftext|>", "hm", "Yes.", "stop"),
        (f"{THINKS}{FINAL}Yes", "hm", "Yes", "length"),
        ("<|channel|>analysis<|message|>hm", "hm", "", "length"),
        ("<|channel|>ana", "", "", "length"),
        (
            f"{THINKS}<|channel|>commentary to=functions.f json<|message|>{{}}<|call|>",
            "hm",
            "{}",
            "stop",
        ),
    ],
)
def test_answers_are_split(scripted_llm, script, sampled, thought, answer, reason):
    script += ids_of(scripted_llm.tokenizer, sampled)
    num_tokens = len(script)
    stream = scripted_llm.stream([USER], max_new_tokens=num_tokens)
    pieces = list(stream)
    output = stream.output
    assert (output.thought, output.text, output.finish_reason) == (thought, answer, reason)
    assert len(output.token_ids) == num_tokens
    assert "".join(piece.text for piece in pieces) == answer
    assert "".join(piece.thought for piece in pieces) == thought
    assert not any(token in piece.text for piece in pieces for token in HARMONY_TOKENS)
    assert ("functions.f" in " ".join(output.warnings)) == ("to=" in sampled)


def test_what_was_read_ahead_serves_an_answer_that_thinks_as_much(scripted_llm, script):
    document = {"role": "user", "content": "x" * 300}
    for read in (
        lambda session: session.prepare([document], think="high"),
        lambda session: session.append([document], think="high"),
    ):
        with scripted_llm.session() as session:
            read(session)
            processed = session.num_processed
            assert processed >= 256
            script += ids_of(scripted_llm.tokenizer, f"{FINAL}Yes.<|return|>")
            output = session.generate([document], think="high")
            assert output.text == "Yes."
            assert output.usage["prompt_tokens_details"]["cached_tokens"] >= processed
            assert output.usage["recomputed_tokens"] == 0


def test_stop_strings_are_looked_for_in_the_answer(scripted_llm, script):
    script += ids_of(
        scripted_llm.tokenizer, f"<|channel|>analysis<|message|>END<|end|>{FINAL}Yes END no"
    )
    output = scripted_llm.chat([USER], stop="END", max_new_tokens=100)
    assert (output.thought, output.text, output.finish_reason) == ("END", "Yes ", "stop")
    assert output.stop_string == "END"


def test_no_stop_string_is_found_between_messages(scripted_llm, script):
    """Nobody has said what stands there; what a message said is its own."""
    for stop in ("\n", "\n\n", ".\n\nY", ".\n"):
        script += ids_of(scripted_llm.tokenizer, TOLD)
        output = scripted_llm.chat([USER], stop=stop, max_new_tokens=100)
        assert (output.text, output.finish_reason, script) == ("I look.\n\nYes.", "stop", [])
        assert output.stop_string is None
    script += ids_of(scripted_llm.tokenizer, TOLD)
    output = scripted_llm.chat([USER], stop="es", max_new_tokens=100)
    assert (output.text, output.finish_reason) == ("I look.\n\nY", "stop")


def test_a_stop_string_at_the_last_token_ends_an_answer(scripted_llm, script):
    script += ids_of(scripted_llm.tokenizer, "<|channel|>final one END two")
    output = scripted_llm.chat([USER], stop="END", max_new_tokens=len(script))
    assert (output.text, output.finish_reason, script) == ("one ", "stop", [])


def test_what_a_header_held_is_there_after_an_interruption(scripted_llm, script):
    script += ids_of(scripted_llm.tokenizer, "<|channel|>final the words EN")
    with scripted_llm.session() as session:
        stream = session.stream([USER], stop="END", max_new_tokens=100)
        shown = [next(stream).text for _ in range(len(script))]
        stream.close()
        assert "".join(shown) == ""
        assert (stream.output.text, stream.output.finish_reason) == ("the words EN", "cancelled")
        stream.close()
        assert stream.output.text == "the words EN"


def test_an_answer_ends_where_somebody_else_would_speak(scripted_llm, script):
    sampled = f"{FINAL}Yes.<|end|><|start|>user<|message|>"
    script += ids_of(scripted_llm.tokenizer, sampled + "and then?<|end|>")
    num_sampled = len(ids_of(scripted_llm.tokenizer, sampled))
    with scripted_llm.session() as session:
        output = session.generate([USER], max_new_tokens=100)
        assert (output.text, output.finish_reason) == ("Yes.", "stop")
        assert len(output.token_ids) == num_sampled
        held = session.tokens
        script[:] = ids_of(scripted_llm.tokenizer, f"{FINAL}No.<|return|>")
        output = session.generate(answered("Yes."), max_new_tokens=100)
        assert session.tokens[: len(held)] == held
        fresh = scripted_llm.tokenizer.chat_ids(answered("Yes."))
        assert session.tokens == [*fresh, *output.token_ids]


def test_messages_that_were_appended_are_answered_in_channels(scripted_llm, script):
    def answer(session):
        script.extend(ids_of(scripted_llm.tokenizer, f"{THINKS}{FINAL}Yes.<|return|>"))
        output = session.generate(max_new_tokens=100)
        return output.thought, output.text

    with scripted_llm.session() as session:
        session.append([USER])
        with session.fork() as branch:
            assert answer(branch) == ("hm", "Yes.")
        assert answer(session) == ("hm", "Yes.")
        session.append("raw")
        assert answer(session) == ("", "analysishmassistantfinalYes.")


def test_undo_leaves_the_answer_before_as_the_template_kept_it(scripted_llm, script):
    with scripted_llm.session() as session:
        for messages in ([USER], answered("Yes.")):
            script += ids_of(scripted_llm.tokenizer, f"{THINKS}{FINAL}Yes.<|return|>")
            session.generate(messages)
        session.undo()
        kept = answered("Yes.")[:2]
        ids = scripted_llm.tokenizer.chat_ids(kept, add_generation_prompt=False)
        assert session.tokens == ids[:-1]  # what ends it depends on what follows
        session.undo()
        assert session.tokens == []


def test_raw_text_has_no_channels(scripted_llm, script):
    script += ids_of(scripted_llm.tokenizer, f"{THINKS}{FINAL}Yes.<|return|>")
    output = scripted_llm.generate("raw", max_new_tokens=100)
    assert (output.thought, output.text) == ("", "analysishmassistantfinalYes.")


def test_a_conversation_goes_on_without_its_thoughts(scripted_llm, script):
    """Its tokens are those of a fresh one; of what both have nothing is processed again."""
    messages, prompts, cached = [USER], [], []
    with scripted_llm.session() as session:
        for think, sampled in ((None, f"{THINKS}{FINAL}Yes."), (False, "No."), (None, f"{FINAL}x")):
            prompts.append(scripted_llm.tokenizer.chat_ids(messages, think=think))
            script += ids_of(scripted_llm.tokenizer, sampled + "<|return|>")
            output = session.generate(messages, think=think)
            assert session.tokens == [*prompts[-1], *output.token_ids]
            cached.append(output.usage["prompt_tokens_details"]["cached_tokens"])
            assert output.usage["recomputed_tokens"] == 0
            messages += answered(output.text)[1:]
    assert [m["content"] for m in messages[1::2]] == ["Yes.", "No.", "x"]
    # The first answer is read again behind <|channel|>, the second stays.
    assert cached == [0, len(prompts[0]) + 1, len(prompts[1]) + len("No.")]


# At the terminal


@pytest.mark.parametrize("words", [["chat", "-p", "hi"], ["ask", "hi", "a.txt"]])
def test_commands_print_the_answer_alone(capfd, scripted_tokenizer, script, scripted, words):
    Path("a.txt").write_text("the text")
    script += ids_of(scripted_tokenizer, TOLD)
    assert scripted(*words) == 0
    out, err = capfd.readouterr()
    assert out == "I look.\n\nYes.\n" and "hm" not in err
    script += ids_of(scripted_tokenizer, TOLD)
    assert scripted(*words, "-v") == 0
    out, err = capfd.readouterr()
    assert out == "I look.\n\nYes.\n" and "hm\n" in err
    script += ids_of(scripted_tokenizer, TOLD)
    assert scripted(*words, "--json") == 0
    fields = json.loads(capfd.readouterr().out)
    assert (fields["thought"], fields["text"]) == ("hm", "I look.\n\nYes.")


def test_without_thoughts_there_are_none_to_show(capfd, scripted_tokenizer, script, scripted):
    script += ids_of(scripted_tokenizer, "Yes.<|return|>")
    assert scripted("chat", "-p", "hi", "--think", "off", "--json") == 0
    fields = json.loads(capfd.readouterr().out)
    assert fields["text"] == "Yes." and "thought" not in fields


def test_tokens_that_went_into_thoughts_are_told(capfd, scripted_tokenizer, script, scripted):
    script += ids_of(scripted_tokenizer, ONLY_THOUGHT)
    num_tokens = len(script)
    assert scripted("chat", "-p", "hi", "-n", str(num_tokens)) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert f"still thinking after {num_tokens} tokens; -n allows more" in " ".join(err.split())


def test_a_call_is_told_of(capfd, scripted_tokenizer, script, scripted):
    call = f"{THINKS}<|channel|>commentary to=functions.f <|constrain|>json<|message|>{{}}<|call|>"
    script += ids_of(scripted_tokenizer, call)
    assert scripted("chat", "-p", "hi") == 0
    out, err = capfd.readouterr()
    assert out == "{}\n" and "The model called functions.f" in " ".join(err.split())


def test_a_chat_keeps_answers_and_shows_thoughts_when_asked(
    capfd, scripted_tokenizer, script, scripted_llm
):
    run = Run(Settings(), Signals())
    talk = Dialogue(run, scripted_llm, Conversation(), remember=False)
    for question in ("hi", "and now?"):
        script += ids_of(scripted_tokenizer, TOLD)
        talk.ask(question)
    assert [m["content"] for m in talk.conversation.messages[1::2]] == ["I look.\n\nYes."] * 2
    assert capfd.readouterr().out == "I look.\n\nYes.\n" * 2
    COMMANDS["thought"].do(talk, "")
    assert "hm" in capfd.readouterr().err


def test_thoughts_without_an_answer_are_told(
    capfd, monkeypatch, tmp_path, scripted_tokenizer, script, scripted
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    script += ids_of(scripted_tokenizer, f"{ONLY_THOUGHT}<|return|>")
    num_tokens = len(script)
    assert scripted("chat", "-p", "hi", "--session", "trip") == 0
    out, err = capfd.readouterr()
    told = f"gave no answer: all of its {num_tokens} tokens went into thoughts. --think off"
    assert out == "" and told in " ".join(err.split())
    assert not session_path("trip").exists()
    script += ids_of(scripted_tokenizer, f"{FINAL}Yes.<|return|>")
    assert scripted("chat", "-p", "hi", "--session", "trip") == 0
    assert Conversation.load("trip").messages == answered("Yes.")[:2]


def test_several_questions_have_their_thoughts_together(
    capfd, scripted_tokenizer, script, scripted
):
    Path("a.txt").write_text("the text")
    script += ids_of(scripted_tokenizer, TOLD + f"{FINAL}No.<|return|>")
    assert scripted("ask", "-Q", "Is it?", "-Q", "Is it not?", "a.txt", "--json") == 0
    fields = json.loads(capfd.readouterr().out)
    assert (fields["thought"], fields["text"]) == ("hm", "I look.\n\nYes.\nNo.")
    assert ["thought" in answer for answer in fields["answers"]] == [True, False]


@pytest.mark.parametrize("ends", ["", "<|return|>"])
def test_a_chat_keeps_no_thoughts_in_place_of_an_answer(
    capfd, scripted_tokenizer, script, scripted_llm, ends
):
    thinking = ids_of(scripted_tokenizer, ONLY_THOUGHT + ends)
    run = Run(Settings(max_new_tokens=len(thinking)), Signals())
    talk = Dialogue(run, scripted_llm, Conversation(), remember=False)

    def told():
        return " ".join(capfd.readouterr().err.split())

    script += thinking
    talk.ask("hi")
    assert (talk.conversation.messages, talk.dropped) == ([], "hi")
    reason = "gave no answer" if ends else "still thinking"
    assert re.search(f"{reason}.*/set think=off.*/retry asks it again", told())
    script += ids_of(scripted_tokenizer, f"{FINAL}Yes.<|return|>")
    COMMANDS["retry"].do(talk, "")
    kept = answered("Yes.")[:2]
    assert talk.conversation.messages == kept
    for name in ("compact", "regen"):
        script += thinking
        told()
        COMMANDS[name].do(talk, "")
        assert talk.conversation.messages == kept
        assert reason in told()


def test_what_an_interrupted_answer_held_is_shown(capfd, scripted_tokenizer, script, scripted_llm):
    talk = Dialogue(Run(Settings(), Signals()), scripted_llm, Conversation(), remember=False)
    script += [*ids_of(scripted_tokenizer, "<|channel|>final the words"), KeyboardInterrupt()]
    talk.ask("hi")
    assert talk.conversation.messages == answered("the words")[:2]
    assert capfd.readouterr().out == "the words\n"


def test_a_summary_that_was_only_thought_replaces_no_file(
    capfd, scripted_tokenizer, script, scripted
):
    Path("a.txt").write_text("the text")
    Path("out.md").write_text("the old one")
    script += ids_of(scripted_tokenizer, ONLY_THOUGHT)
    num_tokens = len(script)
    assert scripted("summarize", "a.txt", "-o", "out.md", "-n", str(num_tokens)) == 2
    out, err = capfd.readouterr()
    told = f"still thinking after {num_tokens} tokens; -n allows more. --think off"
    assert out == "" and told in " ".join(err.split())
    assert Path("out.md").read_text() == "the old one"


def test_a_part_that_was_only_thought_about_is_asked_again(
    capfd, monkeypatch, tmp_path, scripted_tokenizer, script, scripted
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    Path("a.txt").write_text("One sentence of many. " * 70)
    words = ["summarize", "a.txt", "-o", "out.md", "--overflow", "map-reduce", "--context", "2000"]
    script += ids_of(scripted_tokenizer, f"{FINAL}One.<|return|>{ONLY_THOUGHT}<|return|>")
    assert scripted(*words) == 2
    err = " ".join(capfd.readouterr().err.split())
    assert "part 2 of 2" in err and "gave no answer" in err
    assert not Path("out.md").exists()
    script += ids_of(scripted_tokenizer, f"{FINAL}Two.<|return|>{FINAL}Both.<|return|>")
    assert (scripted(*words), script) == (0, [])
    assert Path("out.md").read_text() == "Both.\n"
