"""Memory and the runtime: models, plans, pages and their tiers, decoding, sessions, text.

A model and its files
    hub                from what a user calls a model to a folder or a GGUF file
    opened_model       what its files described when they were looked at
    model_files        a model's files, whatever their format; gguf/ is one format
    safetensors_files  which tensors a folder holds, and where
    packed_modules     which of them make one quantised matrix, and how it is packed
    checkpoint         the tensors a model needs, checked and read
    open_file          a file that several threads read; known_file: whether it is still the same
    past_cache         reads past the system's cache where the file does not lie in it
    fingerprint        whether two models are the same
    model_config       what a model is made of, from config.json; config_fields: typed look-ups
    layer_config       what one layer may be made of; rope_config: its positions
    quantisation       what config.json says about quantised weights
    families/          the architectures
    builtin/           the built-in model

Weights
    weights            resident, or streamed under the budget
    skeleton           the module tree: which tensors there must be, by name and shape
    packing            how numbers lie in a file; packed_weights, head_rows: kinds of packing
    kept_tensors       how they are kept in memory
    tensor_loader      loads them by several threads
    weight_stream      groups that are read in turn; tensor_scratch: what was converted once
    rereading          which parts of files come through the system's cache
    expert_cache       routed experts of which not all fit
    output_head        the product with the vocabulary

The budget and the plan
    budget             what the user allows; memory_at_hand, device: what there is
    planner            a plan for a request; filling: one way to lay it out
    plan               where everything will lie, as users see it
    footprint          what parts weigh; page_spans: how many spans of pages there will be
    operations         how long reading takes at least; bandwidth: how fast memory and disk are
    admission          which requests may run, and the weights for them
    page_room          room for the pages of a session and its forks

Pages and tiers
    geometry           cells, spans, pages and bits
    page_table         which frames hold which records: bookkeeping alone
    policy             where a new extent gets its home; eviction: what a full cache gives up
    pager              the page store; store_options: how it moves what it holds
    tier               an arena of frames; planes: near and far planes of extents in them
    hot_records        single records of the disk that are worth keeping in memory
    span_reader        all spans of a layer for attention; span_addresses: where they start
    record_reader      selected records for attention; record_map, selected: where they lie
    windows            what layers with a sliding window keep
    prefixes/          pages that are kept on disk for later runs

The disk
    scratch            how a scratch file begins and is swept; disk: reads and writes it
    spill_dir          where it lies; private_dir: folders for the user alone
    extent_file        records in it, with checksums
    io_threads         the traffic with it; reads: the threads that read
    transfer           wishes, demands and writes; staging: slots for what is on its way

Layers
    decoder            a layer's arithmetic; layer_steps: what is prepared once for it
    rope               positions; rowwise: products of a cell's rows
    mlp                MLPs and routed experts
    attention          exact attention over pages; decode_attention: that of one token
    latent             multi-head latent attention
    layer_pages        pages sealed, asked for and attended, layer by layer
    selected_attention attention over a selection; selection_steps: its steps
    state_layer        layers that keep a state: recurrent, scan_layer; states: what they keep
    per_layer          inputs that each layer has of its own
    residual_streams   several residuals beside each other; altup: what a layer does with them

Running
    engine             prefill and decode; sweep: cells that go through layers together
    whole_token        a token through all layers in one call
    runtime            a page store and an engine, sized by a plan
    sequence           one token sequence; sequences: those of one store
    drafts             guesses, several of which are verified at once
    sampler            from logits to a token; logits_processors: before it; logprobs: beside it
    scoring            logits of given tokens
    calibration        what bounded mode loses and saves

Answers
    llm                the Python API; options: what opening takes; mode: exact, bounded, deadline
    session            tokens that stay; open_sessions: all that are open; forked: in which process
    session_file       a named session on disk
    session_reading    how its tokens come to be processed; session_usage: what that took
    stream             one answer, piece by piece; async_stream: for asyncio
    generation         how an answer is made; setting_checks: what each setting may be
    output             what a run gives back
    errors             the tree of errors

Text
    text               one model's tokenizer, with its chat template
    tokenizer_files    the files that describe it; vocabulary: those without a tokenizer.json
    encoder            text to ids; detokenizer: ids to text
    prompt             text, ids or messages, as what is asked; long_texts: such as are too long
    template           chat templates; sandbox: what they may do; meter: and what that may cost
    control_text       what users write is no control token
    answers/           thoughts, calls, schemas and stops
    documents/         files to text
"""
