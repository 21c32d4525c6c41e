"""The result of a run: save, apply, swap, merge, export.

format              the adapter folder
trained             the adapter of a model in training
start               training that starts from an adapter
apply               into a model's weights and out again
live                adapters on a resident model, swapped while it serves
arithmetic          add, scale, negate, intersect, prune, overlap
inspection          what an adapter holds (inspection_page shows it)
base_files          the base as files: find, read, rewrite
stored_names        what the weights are called in them, and how they are converted
merge               base + adapter, and back (merge_packed: a quantised base)
safetensors_writer  safetensors, one tensor at a time
export, peft        stock PEFT and transformers formats (verify checks them)
model_card          README.md of an adapter
"""
