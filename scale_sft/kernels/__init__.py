"""The operations of the method, faster: in C for CPUs, in Triton for GPUs (sections 3.2, 3.3; appendix B).

cpu/      compiled on first use
gpu/      imported only where there is a GPU
autotune  which path to a gradient's entries is the fastest on this GPU
backends who computes what, kernels or plain torch
operands  what all kernels take, checked
moments   AdamW's moments in 1 byte each (bitsandbytes' dynamic map)
"""
