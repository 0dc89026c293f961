"""Weights: how they are kept in memory, or streamed through it under the budget.

weights            resident, or streamed under the budget
skeleton           the module tree: which tensors there must be, by name and shape
packing            how numbers lie in a file
packed_weights     matrices that were quantised before they were written
head_rows          tensors with several rows of every head, as matrices
kept_tensors       how tensors are kept in memory
tensor_loader      loads them by several threads
weight_stream      groups that are read in turn
tensor_scratch     what was converted once, kept on disk
rereading          which parts of files come through the system's cache
expert_cache       routed experts of which not all fit
output_head        the product with the vocabulary
"""
