"""The frozen base, and the deltas that live in it.

loading         find and load the base and its tokenizer
empty           the base without its weights: its class and its shapes
attention       the choice of attention
targets         the layers to train
layer_names     how options name layers
tilings         how options cut weights into columns, rows or blocks
held            targets in a model, by name
experts         experts that are fused into one parameter: their slices, by name
routers         layers that choose experts
expert_taps     modules of experts and routers under taps
embeddings      the input embedding and the output layer as targets
reach           a probe of what text does with each layer
linear_kinds    layers that compute what nn.Linear does
coverage        the share of the blocks that is trained, and why not the rest
quantization    a base in 4 or 8 bits
packed_weights  its packed weights, dequantised on demand
resident        deltas written into the weights
transient       deltas added to a dequantised weight for one product
fingerprints    hashes of the base
compiled_blocks decoder blocks under torch.compile
fused_step      update and write in one pass
group           the processes that train one model together
sparse_settings all settings of sparse training
method          the method of a sparse model, built from its settings
first_choice    the choice of entries before the first update
sparse_model    a model whose target weights carry deltas; shared by trainer, benchmarks and API
sparse_optimizer  the owner of an optimizer step
stepped         the interface between the two
visibility      which deltas survive in a merged model
exposure        the deltas among a model's parameters
router_loss     the loss that balances experts
determinism     deterministic algorithms, while a run lasts
dropout         dropout and jitter, off while deltas are trained
loss            cross entropy of the target tokens
output_layer    the output layer and the loss, formed together in chunks
cross_entropy   cross entropies of rows of logits
memory          memory of this process
"""
