"""The HTTP server behind `ebbtide serve`.

    fields                what a body may hold, and what each field may be
    messages              a conversation as a chat sends it
    documents             documents and files in messages, as text
    conversation          one that is told in parts, as messages
    request               a chat or a text to be continued, in Ebbtide's own words
    responses_request     the same, of OpenAI's Responses API
    anthropic_request     the same, of Anthropic's Messages API
    bad_request           what is wrong with one
    text_query            what the tokenizer alone answers
    estimate              what a request would take
    answer                an answer as a client is told of it
    response              chats and texts
    runs                  answers that are told as runs of thought, text and calls
    responses_answer      OpenAI's items
    anthropic_answer      Anthropic's blocks
    logprobs              how likely its tokens were
    error_object          what went wrong, in either protocol
    job                   a request on its way between two threads
    worker                the queue, and the one thread that answers
    exchange              a job and the connection that waits for it
    bodies                how much of what clients send is held
    guard                 who may ask: Host, Origin, key
    app                   the routes
    listener              the socket, and the thread that talks HTTP

The last five need starlette and uvicorn (the extra `server`).
"""
