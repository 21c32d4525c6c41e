"""Which entries of a weight to train: a score, a draw, a quota and a share of the budget, each on its own.

    scores     how much an entry promises, from its gradient and its weight; and how to add a score
    draws      scores to keys: the best, or a random sample that prefers the better
    rule       a score and a draw, applied to a weight
    evidence   what a score may look at, and the sums over rows and columns that this takes
    parts      the processes that choose together
    pool       a random sample of a weight's entries, for a survey in little memory
    survey     gradients of several batches before the first update, and the choice made from them
    proposals  candidates for growth by any rule, in the paper's loop
    tile_keys  columns, rows or blocks chosen by the norm of their scores
    quotas     caps for each row and column
    spread     how evenly entries are spread over rows and columns
    shares     one ranking across weights, with floors

A choice always ends the same way: the entries with the K largest keys, ties to the smaller index. That composes with
weights cut into parts over several processes. Nothing here knows files, ranks, configurations or models.
"""
