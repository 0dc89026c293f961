"""Chat templates as models are published with them: what they write is read as their format."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from tokenizers_under_test import DATA, USER
from tool_templates import ARGUMENTS, OFFERED, TOOLS, read, tokenizer_of

from ebbtide import errors
from ebbtide.offload.answers.call_reader import CallReader
from ebbtide.offload.answers.tool_formats import format_of, with_calls_written
from ebbtide.offload.answers.tools import Calls, checked_tools
from ebbtide.offload.text.template import ChatTemplate, check_messages

TEMPLATES = DATA / "templates"


@pytest.mark.skipif(not TEMPLATES.exists(), reason="the shared templates are not here")
@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("Qwen-Qwen2.5-7B-Instruct", "hermes"),
        ("Qwen-Qwen3-0.6B", "hermes"),
        ("NousResearch-Hermes-3-Llama-3.1-8B-tool_use", "hermes"),
        ("Qwen3-Coder", "tagged"),
        ("Qwen3.5-4B", "tagged"),
        ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "tagged"),
        ("GLM-4.6", "keyed"),
        ("GLM-4.7-Flash", "keyed"),
        ("meta-llama-Llama-3.1-8B-Instruct", "llama"),
        ("meta-llama-Llama-3.2-3B-Instruct", "llama"),
        ("Mistral-Small-3.2-24B-Instruct-2506", "mistral"),
        ("mistralai-Ministral-3-14B-Reasoning-2512", "mistral"),
        ("mistralai-Mistral-Nemo-Instruct-2407", "mistral"),
        ("unsloth-Apriel-1.5", "apriel"),
        ("google-gemma-4-31B-it", "gemma"),
        ("openai-gpt-oss-120b", None),
        ("LFM2-8B-A1B", "python"),
        ("LFM2.5-Instruct", "python"),
        ("ibm-granite-granite-3.3-2B-Instruct", "granite"),
        ("CohereForAI-c4ai-command-r7b-12-2024-tool_use", "cohere"),
        ("Cohere2MoE", "cohere"),
        ("moonshotai-Kimi-K2", "kimi"),
        ("ByteDance-Seed-OSS", "seed"),
    ],
)
def test_real_templates_write_what_their_format_reads(name, format):
    source = (TEMPLATES / f"{name}.jinja").read_text()
    template = ChatTemplate(source, name)
    known = {"template": template, "template_source": source, "name": name}
    known["mark_parts"] = lambda mark: [7]  # a control token
    model = SimpleNamespace(**known, harmony_marks="<|channel|>analysis" in source)
    found = format_of(model)
    assert (found and found.name) == format
    function = {"name": "weather", "arguments": json.dumps(ARGUMENTS)}
    call = {"role": "assistant", "tool_calls": [{"id": "abcdefghi", "function": function}]}
    result = {"role": "tool", "tool_call_id": "abcdefghi", "content": "It rains."}
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "tools": list(checked_tools("", TOOLS))}
    several = [{"id": f"abcdefgh{i}", "function": function} for i in "ij"]
    results = [{**result, "tool_call_id": each["id"]} for each in several]
    asked = check_messages([USER, {**call, "tool_calls": several}, *results])
    if found is not None and found.takes_one:
        with pytest.raises(errors.InputError, match="single tool-call"):
            template.render(asked, **tokens)
    else:
        rendered = template.render(with_calls_written(model, asked), **tokens)
        assert rendered.count("It rains.") == 2
    asked = with_calls_written(model, check_messages([USER, call, result]))
    rendered = template.render(asked, **tokens)
    assert "It rains." in rendered and "weather" in rendered
    if found is not None:
        begins = rendered.rindex(found.opening if format != "llama" else '{"name": "weather"')
        ends = ("<|im_end|>", "</s>", "<|eot_id|>", "<|observation|>", "<|tool_response>")
        ends += ("[TOOL_RESULTS]", "<|end|>", "<|im_start|>", "<|end_of_text|>", "<seed:eos>")
        ends += ("<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>")
        block = rendered[begins:]
        block = block[: min(block.index(end) for end in ends if end in block)]
        calls = Calls(OFFERED)
        assert CallReader(found, calls).push(block) == ""
        reader = CallReader(found, calls)
        assert (reader.push(block) + reader.finish()).strip() == ""
        assert json.loads(calls.take()[-1].arguments) == ARGUMENTS


@pytest.mark.skipif(not TEMPLATES.exists(), reason="the shared templates are not here")
@pytest.mark.parametrize("name", ["DeepSeek-V3.1", "DeepSeek-R1-Distill-Qwen-32B"])
def test_what_deepseek_templates_write_is_read_though_they_are_told_of_no_tools(tmp_path, name):
    """Those that are told of them write the same."""
    template = ChatTemplate((TEMPLATES / f"deepseek-ai-{name}.jinja").read_text(), name)
    function = {"name": "weather", "arguments": json.dumps(ARGUMENTS)}
    calls = [{"id": f"abcdefgh{i}", "function": function} for i in "ij"]
    asked = check_messages([USER, {"role": "assistant", "tool_calls": calls}])
    rendered = template.render(asked, bos_token="<s>")
    block = rendered[rendered.index(section := "<｜tool▁calls▁begin｜>") :]
    block = block[: block.index(end := "<｜tool▁calls▁end｜>") + len(end)]
    assert block.startswith(section)
    tokenizer = tokenizer_of("deepseek" if "V3" in name else "deepseek r1", tmp_path)
    assert read(tokenizer, [block]) == read(tokenizer, block) == ("", [("weather", ARGUMENTS)] * 2)
