"""The commands, on the public face of Ebbtide alone.

    main            the door: exit codes
    app             the commands, gathered
    ask, chat, serve, summarize, plan, demo, bench, calibrate, doctor, config, cache    commands
    options         the shared options, in one table; schema_option: --json-schema
    values          texts into sizes, numbers and choices
    shared_options  gives a command the shared options
    settings_file   the user's TOML; variables: EBBTIDE_... that are none of ours
    run             one run: the model it opens, the answer it streams
    answer          an answer as it is heard, and as it is told
    documents       documents into a prompt
    summary, map_reduce, job    a summary, whole or in parts, and what is kept of it
    summary_plan, summary_task, summary_text    what it will take, is asked and reads like
    dialogue        a conversation at the terminal
    conversation    its messages, and the file that keeps them
    server          HTTP, for serve
    chat_commands, memory_view, background    parts of a chat
    line_editor, line_history, completion     what a user types
    markdown        how an answer looks at a terminal
    terminal        answers to standard output, all else to standard error
    progress        how far loading and prefill are
    recorder, chart, report, report_file      the page that --report writes
    cache_items, planted, speeds    what lies on disk; a demonstration's facts; earlier speeds
    output_file     a file that appears whole or not at all
    signals         Ctrl-C and SIGTERM
    failure         what went wrong, told

`--help`, `--version` and usage errors import no torch.
"""
