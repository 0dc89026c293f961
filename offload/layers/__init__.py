"""Layers: their arithmetic, over pages or a state.

decoder            a layer's arithmetic
layer_steps        what is prepared once for it
rope               positions
rowwise            products of a cell's rows
mlp                MLPs and routed experts
attention          exact attention over pages
decode_attention   that of one token
latent             multi-head latent attention
layer_pages        pages sealed, asked for and attended, layer by layer
selected_attention attention over a selection
selection_steps    its steps
state_layer        layers that keep a state
recurrent          those whose state is a matrix for each head, or a convolution's
scan_layer         those that scan
states             what they keep
per_layer          inputs that each layer has of its own
residual_streams   several residuals beside each other
altup              what a layer does with them
"""
