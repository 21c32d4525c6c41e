"""SpIEL: sparse fine-tuning by update, drop and grow (arXiv 2401.16405), on torch alone.

Read it with the paper beside it: `schedule` (Eq. 9), `linear` (Eq. 5 and 7), `sampling` (Eq. 8), `optimizer`
(Adam with one age per delta, SM3), `reallocate` (drop and grow of Algorithms 1 and 2), `topk`, and `delta`, which holds
the state that all of them act upon. Nothing here knows of files, ranks, configurations or models.
"""
