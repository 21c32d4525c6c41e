"""Rows, tokens, micro-batches.

sources        what an option says of where examples come from; formats by their columns
folders        the files of a folder, what is passed over, compressed files
jsonl, tables  rows of JSON files; of CSV, text, parquet, saved and hub data
opening        the rows that a run uses: slices, weights, limits
formats        rows of each format as tokens, and which of them count
turns, chat    conversations as data write them, and as chat templates do
tokens         texts as tokens that know their characters; the tokenizer's own special tokens
preference_formats  rows of pairs and of marked answers as tokens; what is left out, and why
preferences    such examples, of two sequences each
preference_batches  micro-batches of them; both sides of a pair behind one prompt
fit            whether tokenizer and model fit
new_tokens     a base with new tokens, and rows of the embeddings for them
notes          what a user should know, said once
cache          tokenise once, share between ranks and runs
turn_ends      the token that ends an answer
examples       tokenised examples on disk
batches        the order of examples, and the micro-batches of a rank
micro_batches  cut a batch, pad it
packing        several examples per row
preview        `scale-sft data show`
"""
