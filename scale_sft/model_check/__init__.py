"""A check of types of models, each on a tiny random model that goes through the trainer's own code.

tiny      small configurations: of every type of transformers, or of a base of the user's
checks    what is checked of one type in one process
ranks     the same run on two ranks, its base in ZeRO-3 shards
walk      through one type after the other; processes: the silent ones that do it
findings  what was found, kept in a file that a later walk continues
page      the table of docs/models.md
"""
