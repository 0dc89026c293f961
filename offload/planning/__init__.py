"""The budget and the plan: what is allowed, what there is, what goes where.

budget             what the user allows
memory_at_hand     how much memory there is
device             which device computes
planner            a plan for a request
filling            one way to lay it out
plan               where everything will lie, as users see it
footprint          what parts weigh
page_spans         how many spans of pages there will be
operations         how long reading takes at least
bandwidth          how fast memory and disk are
admission          which requests may run, and the weights for them
page_room          room for the pages of a session and its forks
"""
