"""Sessions and answers: tokens that stay, and what is generated after them.

session            tokens that stay
open_sessions      all that are open
forked             in which process
session_file       a named session on disk
session_reading    how its tokens come to be processed
session_usage      what that took
stream             one answer, piece by piece
async_stream       the same for asyncio
generation         how an answer is made
setting_checks     what each setting may be
"""
