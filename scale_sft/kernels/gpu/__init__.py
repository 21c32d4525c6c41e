"""Kernels in Triton for GPUs.

usable   whether they run on a device: tried once
picked   the library's product, entries picked by one kernel
updates  AdamW and SM3, fused with the write
"""
