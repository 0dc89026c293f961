"""What is wanted, and when: predictions, wishes and their measures. Does no I/O and owns no memory.

lookup      guesses of the next tokens
source      the protocols: where wishes reach whoever owns the pages, predictors, selectors
queue       the queue of wishes: ordered, without duplicates, dropped when their time has passed
in_order    predictor: every span, first to last
history     predictor: what the layer used last time, in that order
registry    predictors and selectors by name
evidence    what a query step knows about a layer's pages before any is read
top_p       selector: the fewest records that keep what attention gets wrong within epsilon
everything  selector: all records; window: the newest; random: any
quest       selector: by box bounds; freekv: by last step's; infinigen: by a rehearsed query
kvswap      selector: by a rehearsed query's score in a basis of all heads' keys
foresight   which records a layer will select: by a rehearsed query, by history, by both
issue_point when a layer is rehearsed: before the attention of the one before it, or after
mean_change what is usually added to the residual by then
trail       what a sequence's layers selected: a step ago, and ever
fidelity    what was left out, by the runtime's own estimate
audit       how true that is: a few records that were left out, read all the same
budget      the best records of a budget, for selectors that have one
walk        which pass is under way, and what it used
stats       hits, late, misses, waste, stall, bytes per tier
"""
