"""Model families: what each architecture is made of, from config.json.

architectures   all of them by the names that config.json gives, and those that are refused
family          what one architecture is to these tables
dense           Llama and what differs from it in small things
granite gemma cohere layer_norm gateless llama4     dense ones with something of their own
routed mixture latent                               with routed experts, latent attention
hybrid conv mamba kimi                              of which most layers keep states
muse text_part                                      language models that are parts of others
"""
