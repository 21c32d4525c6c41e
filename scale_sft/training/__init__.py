"""One run: inputs, session, checkpoints.

inputs              read and check everything but the weights
starting            the adapter to start from, or what a checkpoint knows of it
reference_adapter   the adapter that is part of the reference of preference tuning
objectives          the objective of a run, from its options, data and model
assemble            from inputs to a session
session             a run that is ready for its first step
checkpoints         save and resume, bit for bit
checkpoint_files    the files: complete or absent
checkpoint_listing  `scale-sft checkpoint`
run_folder          the output folder, claimed by one process at a time
best                the best adapter, early stopping
lifecycle           what a run says at its start and leaves at its end
result              what a run hands to whoever started it from Python
"""
