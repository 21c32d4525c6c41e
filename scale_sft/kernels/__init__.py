"""Kernels: the recorded entries of a weight gradient, updates in one pass, selection (sections 3.2, 3.3; appendix B).

For CPUs, in C: `columns` computes entries, `updates_cpu` moves deltas and writes one weight, `select` finds the largest
of a vector, `exchange` drops and grows entries; `native` compiles them. For GPUs, in Triton: `sampled`, `tiles` and
`picked` compute entries, `choice` measures which of them, or the dense product on plain torch, is the fastest;
`updates` moves deltas and writes one weight. `step` does so for all weights of a run, on either. Triton is imported by
its own modules alone, and only where there is a GPU to use it.
No figure of the Triton kernels has been measured on a GPU yet. They are tested in Triton's interpreter and compiled for
A100 (sm_80) and H100 (sm_90); `choice` uses none that is not both right and faster on the device at hand.
"""
