"""The operations of the method, faster: in C for CPUs, in Triton for GPUs (sections 3.2, 3.3; appendix B).

cpu/      compiled on first use
gpu/      imported only where there is a GPU
backends  chooses kernels or plain torch
operands  arguments common to all kernels, checked
moments   AdamW's moments in 1 byte each (bitsandbytes' dynamic map)
"""
