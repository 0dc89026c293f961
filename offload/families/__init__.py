"""Model families: what each architecture is made of, from config.json.

architectures   all of them by the names that config.json gives, and those that are refused
dense           Llama and what differs from it in small things; what a Family is
granite gemma cohere layer_norm gateless llama4     dense ones with something of their own
routed mixture latent                               with routed experts, latent attention
hybrid conv mamba                                   of which most layers keep states
muse text_part                                      language models that are parts of others
"""
