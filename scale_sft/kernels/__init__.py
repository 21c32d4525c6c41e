"""Triton kernels for GPUs: the recorded entries of a weight gradient, and the updates in one pass (sections 3.2, 3.3;
appendix B).

`sampled`, `tiles` and `picked` compute the entries, `choice` measures which of them, or the dense product on plain
torch, is the fastest; `updates` moves deltas and writes one weight, `step` all of them. Triton is imported by these
modules alone, and only where there is a GPU to use it: `operands` and `choice` need torch only.
No figure of these kernels has been measured on a GPU yet. They are tested in Triton's interpreter and compiled for
A100 (sm_80) and H100 (sm_90); `choice` uses none that is not both right and faster on the device at hand.
"""
