"""Memory and the runtime: a plan, pages and their tiers, weights, the decoder, sessions, text.

model      hub, opened_model, checkpoint, open_file, known_file, model_config, layer_config,
           skeleton, weights, decoder, mlp, rope;
           families/ (architectures), gguf/ (a format)
memory     budget, footprint, operations, planner, plan, admission, device, meter
pages      geometry, page_table, policy, pager, planes, tier, record_reader, hot_records
disk       scratch, spill_dir, disk, extent_file, reads, io_threads, staging, transfer;
           prefixes/ (pages that are kept)
attention  attention, decode_attention, selected_attention, selection_steps, whole_token
running    engine, runtime, sequence, session, stream, async_stream, sampler, logits_processors,
           drafts, scoring, calibration
text       text, template, sandbox, control_text, detokenizer; answers/, documents/
face       llm, options, mode, generation, setting_checks, output, errors
"""
