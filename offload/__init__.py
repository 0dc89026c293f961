"""Memory and the runtime: models, plans, pages and their tiers, decoding, sessions, text.

llm          the Python API
options      what opening a model takes
mode         how much of the context is read: exact, bounded, deadline
output       what a run gives back
errors       the tree of errors

models/      a model and its files; families/: the architectures; gguf/: one format of files;
             builtin/: the built-in model
weights/     how weights are kept in memory, or streamed through it
planning/    the budget, and where everything will lie under it
pages/       pages of keys and values, and their tiers; prefixes/: those kept for later runs
disk/        the disk tier: scratch files, and the traffic with them
layers/      a layer's arithmetic, over pages or a state
running/     prompts and tokens through all layers, and from logits to a token
sessions/    tokens that stay, and the answers generated after them
text/        tokenizers, chat templates and prompts
answers/     what is found in an answer: thoughts, calls, schemas and stops
documents/   files to text
"""
