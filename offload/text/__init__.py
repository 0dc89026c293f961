"""Text to tokens and back: tokenizers, templates and prompts.

text               one model's tokenizer, with its chat template
tokenizer_files    the files that describe it
vocabulary         those without a tokenizer.json
encoder            text to ids
detokenizer        ids to text
prompt             text, ids or messages, as what is asked
long_texts         texts that are too long, counted in parts
template           chat templates
sandbox            what they may do
meter              and what that may cost
control_text       what users write is no control token
"""
