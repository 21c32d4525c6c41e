"""Kernels in Triton for GPUs.

sampled  recorded entries of a gradient by dot products
tiled    a tiled product that keeps recorded entries only
picked   the library's product, entries picked by one kernel
updates  AdamW and SM3, fused with the write
"""
