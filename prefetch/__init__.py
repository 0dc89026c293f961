"""What is wanted, and when: predictions, wishes and their measures. Does no I/O and owns no memory.

source      the protocol through which wishes reach whoever owns the pages
queue       the queue of wishes: ordered, without duplicates, dropped when their time has passed
in_order    predictor: every span, first to last
history     predictor: what the layer used last time, in that order
registry    predictors by name
walk        which pass is under way, and what it used
stats       hits, late, misses, waste, stall, bytes per tier
"""
