"""The frozen base, and the deltas that live in it.

loading         find and load the base and its tokenizer
targets         the layers to train
quantization    a base in 4 or 8 bits
packed_weights  its packed weights, dequantised on demand
resident        deltas written into the weights
transient       deltas added to a dequantised weight for one product
fingerprints    hashes of the base
fused_step      update and write in one pass
group           the processes that train one model together
sparse_settings all settings of sparse training
method          the method of a sparse model, built from its settings
first_choice    the choice of entries before the first update
sparse_model    a model whose target weights carry deltas; shared by trainer, benchmarks and API
sparse_optimizer  the owner of an optimizer step
stepped         the interface between the two
exposure        the deltas among a model's parameters
dropout         dropout, off while deltas are trained
loss            cross entropy of the target tokens
output_layer    the output layer and the loss, formed together in chunks
cross_entropy   cross entropies of rows of logits
memory          memory of this process
"""
