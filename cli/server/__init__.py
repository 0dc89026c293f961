"""The HTTP server behind `ebbtide serve`.

    request     a client's JSON, checked, in Ebbtide's own words
    text_query  the same, of what the tokenizer alone answers
    response    answers and errors, in OpenAI's
    job         a request on its way between two threads
    worker      the queue, and the one thread that answers
    exchange    a job and the connection that waits for it
    bodies      how much of what clients send is held
    guard       who may ask: Host, Origin, key
    app         the routes
    listener    the socket, and the thread that talks HTTP

All but the first five need starlette and uvicorn (the extra `server`).
"""
