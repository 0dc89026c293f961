"""Answers: what they are kept to, and what they are made of.

rules         from settings of an answer to its Constraint
constraint    which tokens may come next; made from `grammar` and `json_schema`
reader        from sampled tokens to what is thought, answered and called
thinking harmony stop_strings     parts of an answer, told apart as text comes
text_trace    which tokens a text is made of
tools         functions that are offered and called
tool_formats  how models write calls; each read by `json_calls`, `tagged_calls`, `python_calls`,
              `section_calls` or `gemma_calls`
call_reader   tells calls from text as it comes
"""
