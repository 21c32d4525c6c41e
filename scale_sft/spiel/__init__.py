"""SpIEL: sparse fine-tuning by update, drop and grow (arXiv 2401.16405), on torch alone.

    algorithm   Algorithms 1 and 2 without their model
    settings    what the method does, and who computes it
    deltas      the sparse delta of one weight, and the store of all (section 3.1)
    digests     what tells ranks whether they hold the same state
    indices     which entries are active, in 2 bytes each
    tiles       columns, rows or blocks that are trained whole
    budgets     how many entries each weight gets
    seeding     seeded generators; random initial indices
    taps        a linear layer whose backward offers its weight gradient (Eq. 5, 7)
    grouped     the same for products of experts, fused into one parameter
    embedding_taps  an embedding whose backward offers the gradient of the rows it looked up
    row_gradients   the gradient of an embedding: rows of the tokens in a batch
    traced      the taps of compiled layers, as operators
    recorder    what backward passes record; candidates (Eq. 8)
    tile_recorder   the same for whole columns and rows, with sketches of all of a gradient
    optimizers  AdamW with one bias correction per cohort; SM3
    moments     how AdamW's moments are kept
    schedules   when and how many (Eq. 9); learning rates
    drop_grow   drop and grow: tensors in, tensors out
    topk        deterministic top-k; top-k of an outer product never formed
    joined_drop_grow  drop and grow in many weights at once, for devices
    joined_product    top-k of the outer products of many weights
    state_check       what is wrong with saved state

Nothing here knows files, ranks, configurations or models.
"""
