"""Rows, tokens, micro-batches.

sources   files, folders and hub data sets
jsonl     refuse JSON that crashes its reader
formats   rows of each format as tokens, and which of them count
chat      conversations through chat templates
cache     tokenise once, share between ranks and runs
turn_ends the token that ends an answer
examples  tokenised examples on disk
batches        the order of examples, and the micro-batches of a rank
micro_batches  cut a batch, pad it
packing   several examples per row
preview   `scale-sft data show`
"""
