"""Numbers only: page codecs, attention over pages, matrix products.

    layout           how a page of keys and values lies in bytes
    codec            the quantiser and the bit planes
    pages            seal and unpack pages
    attention        attention partials, their merging and finishing
    paged_attention  decode attention over sealed pages, without unpacking them
    layer_attention  a layer's decode attention in one call: compiled kernels alone
    score            every page's share of the softmax, from its near plane alone
    bounds           the greatest score that a key within a page's box could have
    effect           what a head can do to the residual stream
    selection        from pages' shares to the records that are read
    means            attention over pages as single tokens: share and mean value
    layer_selection  a layer's attention over selected records: compiled kernels alone
    rope_scores      what a key's bias adds to scores
    quantised        weights in groups of 8 or 4 bits, and rows of activations
    affine           weights of 4 bits with a minimum or zero for each group
    ggml_blocks      GGUF's blocks, put where `quantised` has them
    matmul           linear layers whose rows never depend on how many rows there are
    norm             RMS norm of rows, each on its own
    gate             the gate of an MLP
    turn             rotary position embedding, by angles that are given
    add              what joins the residual
    routing          which experts a token goes through
    recurrence       layers whose state is a matrix for each head, and short convolutions
    scan             Mamba's selective scan
    raw_rows         keys and values of the newest tokens, to and from float32
    step             a layer's decode step but for its attention: compiled kernels alone
    token_step       a token through all layers in one call: compiled kernels alone
    routed_step state_step altup_step    what token_step calls for models that have them
    checks           shapes that do not fit, named
    threads          how many threads compute
    dispatch         which implementation serves: compiled (cpu/), GPU (gpu/), torch reference

Knows torch and numpy, and nothing of models, tiers, files or options.
"""
