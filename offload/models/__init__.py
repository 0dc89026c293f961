"""A model and its files: from what a user calls a model to checked tensors.

hub                from what a user calls a model to a folder or a GGUF file
opened_model       what its files described when they were looked at
model_files        a model's files, whatever their format; ../gguf/ is one format
safetensors_files  which tensors a folder holds, and where
packed_modules     which of them make one quantised matrix, and how it is packed
checkpoint         the tensors a model needs, checked and read
open_file          a file that several threads read
known_file         whether a file is still the same
past_cache         reads past the system's cache where the file does not lie in it
fingerprint        whether two models are the same
model_config       what a model is made of, from config.json
config_fields      typed look-ups in config.json
layer_config       what one layer may be made of
rope_config        its positions
quantisation       what config.json says about quantised weights
"""
