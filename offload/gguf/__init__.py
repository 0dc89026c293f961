"""GGUF files as models.

choice      which files are one model
files       what a model in such a file offers, as model_files.py asks for it
file        the header: what it says, where tensors lie
config      what it says, as fields of config.json; `mixtures`, `hybrids`: architectures with these,
            `fields`: what several say alike, `keys`: look-ups
names       which tensor is which of Ebbtide's
packings    how numbers lie in it
tokenizer   made of its vocabulary
"""
