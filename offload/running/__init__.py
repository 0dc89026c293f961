"""Running: prompts and tokens through all layers, and from logits to a token.

engine             prefill and decode
sweep              cells that go through layers together
whole_token        a token through all layers in one call
runtime            a page store and an engine, sized by a plan
sequence           one token sequence
sequences          those of one store
drafts             guesses, several of which are verified at once
logits_processors  what changes logits before a token is chosen
sampler            from logits to a token
logprobs           log-probabilities beside it
scoring            logits of given tokens
calibration        what bounded mode loses and saves
"""
