"""Memory and the runtime: a plan, pages and their tiers, weights, the decoder, sessions, text.

model      hub, checkpoint, model_config, layer_config, families, skeleton, weights, decoder, mlp,
           rope
memory     budget, footprint, planner, plan, admission, device, meter
pages      geometry, page_table, policy, pager, planes, tier, record_reader, hot_records
disk       scratch, spill_dir, disk, extent_file, reads, io_threads, staging, transfer
attention  attention, decode_attention, selected_attention, selection_steps, whole_token
running    engine, runtime, sequence, session, stream, sampler, drafts, scoring, calibration
text       text, template, sandbox, control_text, detokenizer, answer_reader, thinking, harmony,
           documents/
face       llm, options, mode, generation, output, errors
"""
