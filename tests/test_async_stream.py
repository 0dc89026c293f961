"""Asynchronous answers: those of the plain calls, in turn, and stopped at once by whoever does not
want them any more.
"""

from __future__ import annotations

import asyncio
import threading

import pytest
from sessions_under_test import IDS, LONG, assert_nothing_is_held

from ebbtide.offload.errors import ContextOverflow, InputError

WAY = {"temperature": 0, "max_new_tokens": 12, "min_new_tokens": 12}
LONGER = {"temperature": 0, "max_new_tokens": 1000, "min_new_tokens": 1000}


@pytest.fixture
def expected(llm):
    return llm.generate(LONG, **WAY)


async def pieces_of(stream) -> list[int]:
    return [token async for piece in stream for token in piece.token_ids]


def test_pieces_are_those_of_the_plain_stream(llm, expected):
    threads = set()

    async def ask():
        llm.on_progress = lambda progress: threads.add(threading.get_ident())
        stream = llm.astream(LONG, **WAY)
        assert stream.output is None
        found = await pieces_of(stream)
        assert found == stream.output.token_ids
        assert [piece async for piece in stream] == []  # it is over
        return stream.output, await llm.agenerate(LONG, **WAY)

    for output in asyncio.run(ask()):
        assert output.token_ids == expected.token_ids and output.finish_reason == "length"
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert_nothing_is_held(llm)


def test_the_loop_goes_on_while_an_answer_is_made(llm, expected):
    async def ask():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticker = asyncio.create_task(tick())
        output = await llm.agenerate(LONG, **WAY)
        ticker.cancel()
        return ticks, output

    ticks, output = asyncio.run(ask())
    assert output.token_ids == expected.token_ids
    assert ticks > 10  # one for each step of the loop; a blocked loop has a handful


def test_sessions_are_opened_and_read_while_the_loop_goes_on(llm, expected):
    threads = set()

    async def ask():
        llm.on_progress = lambda progress: threads.add(threading.get_ident())
        opened, output = await asyncio.gather(llm.asession(), llm.agenerate(LONG, **WAY))
        with opened as session:
            await session.aappend(LONG)
            assert session.num_processed > 0 and session.tokens == LONG
            found = await session.agenerate(**WAY)
            with pytest.raises(InputError, match="to an empty session"):
                await session.aappend([{"role": "user", "content": "hi"}])
        with pytest.raises(InputError, match="the session is closed"):
            await session.aappend(LONG)
        with pytest.raises(InputError, match="is not a name for a session"):
            await llm.asession("a/b")
        return found, output

    for output in asyncio.run(ask()):
        assert output.token_ids == expected.token_ids
    assert len(threads) == 1 and threading.get_ident() not in threads
    assert_nothing_is_held(llm)


def test_reading_that_is_cancelled_or_closed_stops(llm, expected):
    async def ask():
        layers = 0
        session = await llm.asession()

        def cancel():
            nonlocal layers
            layers += 1
            if layers == 2:
                loop.call_soon_threadsafe(task.cancel)
                asked.wait()

        loop, asked = asyncio.get_running_loop(), threading.Event()
        task = asyncio.create_task(session.aappend(LONG))
        loop.call_later(0.2, asked.set)  # the task waits for the layer, and the layer for the task
        llm.check = cancel
        with pytest.raises(asyncio.CancelledError):
            await task
        llm.check = None
        assert layers == 2 and session.tokens == LONG
        output = await session.agenerate(**WAY)

        llm.check = lambda: loop.call_soon_threadsafe(session.close) and threading.Event().wait(0.2)
        session.truncate(0)
        with pytest.raises(InputError, match="the session was closed before the answer's end"):
            await session.aappend(LONG)
        llm.check = None
        waits = asyncio.create_task(llm.asession())
        await asyncio.sleep(0)
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
        assert len(llm.sessions) == 0
        llm.close()
        with pytest.raises(InputError, match="the LLM is closed"):
            await llm.asession()
        return output

    assert asyncio.run(ask()).token_ids == expected.token_ids


def test_several_at_once_are_answered_in_turn(llm, expected):
    """In each other's middle too, and whoever asks first may read last."""

    async def ask():
        first, second = llm.astream(LONG, **WAY), llm.astream(LONG[:50], **WAY)
        outer = []
        async for piece in first:
            outer += piece.token_ids
            if len(outer) == 2:
                inner = await pieces_of(second)
        more = await asyncio.gather(*(llm.agenerate(LONG, **WAY) for _ in range(3)))
        return outer, inner, more

    outer, inner, more = asyncio.run(ask())
    assert outer == expected.token_ids
    assert inner == llm.generate(LONG[:50], **WAY).token_ids
    assert [output.token_ids for output in more] == [expected.token_ids] * 3


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_task_that_is_cancelled_stops_the_work(llm, expected, phase):
    reached, may_go_on, checks = threading.Event(), threading.Event(), []

    def check():  # before each layer that reads
        checks.append(phase)
        if phase == "prefill":
            reached.set()
            assert may_go_on.wait(30)

    async def ask():
        async for _ in llm.astream(LONG, **LONGER):
            reached.set()
        pytest.fail("it was not cancelled")

    async def cancel():
        llm.check = check
        task = asyncio.create_task(ask())
        while not reached.is_set():
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert phase == "decode" or len(checks) == 1  # the layer under way was the last
        assert llm.check is check  # as it was
        llm.check = None
        # Nothing runs any more, so that any thread may ask.
        assert_nothing_is_held(llm)
        assert llm.generate(LONG, **WAY).token_ids == expected.token_ids
        return await llm.agenerate(LONG, **WAY)

    assert asyncio.run(cancel()).token_ids == expected.token_ids
    assert_nothing_is_held(llm)


def test_a_time_limit_and_a_closed_stream_end_it_as_cancelled(llm, expected):
    async def ask():
        slow = llm.astream(LONG, **LONGER)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await pieces_of(slow)
        async with llm.astream(LONG, **LONGER) as stream:
            first = await anext(stream)
        assert stream.output.finish_reason == "cancelled"
        assert stream.output.token_ids[0] == first.token_ids[0] == expected.token_ids[0]
        assert len(stream.output.token_ids) < 1000
        assert [piece async for piece in stream] == []
        await stream.aclose()
        waiting = llm.astream(LONG, **WAY)
        await waiting.aclose()  # perhaps before its turn

    asyncio.run(ask())
    assert_nothing_is_held(llm)


def test_a_stream_that_is_dropped_is_stopped(llm, expected):
    chosen = []

    def count(ids, logits):
        chosen.append(ids.shape)
        return logits

    async def ask():
        async for _ in llm.astream(LONG, **LONGER, logits_processors=count):
            break
        return await llm.agenerate(LONG, **WAY)  # behind it

    assert asyncio.run(ask()).token_ids == expected.token_ids
    assert 0 < len(chosen) < 1000
    assert_nothing_is_held(llm)


def test_what_goes_wrong_is_raised_where_it_is_awaited(llm, expected):
    async def ask():
        with pytest.raises(InputError, match="temprature is not a generation setting"):
            await llm.agenerate(LONG, temprature=1)
        with pytest.raises(ContextOverflow):
            await pieces_of(llm.astream(LONG * 9, **WAY))

        def fails():
            raise ZeroDivisionError("a caller's own")

        llm.check = fails
        with pytest.raises(ZeroDivisionError, match="a caller's own"):
            await llm.agenerate(LONG, **WAY)
        assert llm.check is fails
        llm.check = None
        return await llm.agenerate(LONG, **WAY)

    assert asyncio.run(ask()).token_ids == expected.token_ids
    assert_nothing_is_held(llm)


def test_a_session_answers_too(llm):
    async def ask(session):
        first = await session.agenerate(LONG, **WAY)
        return first.token_ids, await pieces_of(session.astream([5, 6], **WAY))

    def plainly(session):
        first = session.generate(LONG, **WAY)
        return first.token_ids, session.generate([5, 6], **WAY).token_ids

    with llm.session() as session:
        found = asyncio.run(ask(session))
    with llm.session() as session:
        assert found == plainly(session)


def test_closing_ends_what_is_asked(llm):
    async def ask():
        running = llm.astream(LONG, **LONGER)
        waiting = llm.astream(LONG, **WAY)
        await anext(running)
        llm.close()
        for stream in (running, waiting):
            with pytest.raises(InputError, match="closed before the answer's end"):
                await pieces_of(stream)
        with pytest.raises(InputError, match="the LLM is closed"):
            llm.astream(LONG)

    asyncio.run(ask())


def test_a_stream_that_several_wait_for_ends_for_all(llm, expected):
    async def ask():
        ahead, closed = llm.astream(LONG, **LONGER), llm.astream(LONG, **WAY)
        waiting = asyncio.gather(pieces_of(closed), pieces_of(closed))
        await anext(ahead)
        await closed.aclose()  # before its turn
        assert await asyncio.wait_for(waiting, 30) == [[], []]
        await ahead.aclose()
        stream = llm.astream(LONG, **WAY)
        both = asyncio.gather(pieces_of(stream), pieces_of(stream))
        first, second = await asyncio.wait_for(both, 30)
        return first + second

    assert sorted(asyncio.run(ask())) == sorted(expected.token_ids)
    assert_nothing_is_held(llm)


def test_a_stream_is_of_the_loop_that_it_was_made_in(llm, expected):
    reached, may_go_on, checks = threading.Event(), threading.Event(), []

    def check():
        checks.append(1)
        reached.set()
        assert may_go_on.wait(30)

    async def ask():
        stream = llm.astream(LONG, **LONGER)
        while not reached.is_set():
            await asyncio.sleep(0)
        return stream

    async def ask_elsewhere(stream):
        with pytest.raises(InputError, match="another asyncio loop"):
            await anext(stream)
        may_go_on.set()
        output = await llm.agenerate(LONG, **WAY)  # behind it
        await stream.aclose()  # which may be done anywhere
        return output

    with pytest.raises(InputError, match="no asyncio loop runs here"):
        llm.astream(LONG)
    llm.check = check
    stream = asyncio.run(ask())
    llm.check = None
    # Nobody can read it any more: it ends by itself, while its prompt is read.
    assert asyncio.run(ask_elsewhere(stream)).token_ids == expected.token_ids
    assert len(checks) == 1 and not stream.output.token_ids
    assert_nothing_is_held(llm)


@pytest.mark.parametrize("phase", ["queued", "prefill", "decode"])
def test_a_session_that_is_closed_ends_its_answers(llm, expected, phase):
    """Pages must not go while they are read."""
    reached = threading.Event()

    async def ask():
        session = llm.session()
        ahead = llm.astream(LONG, **LONGER) if phase == "queued" else None
        if phase == "prefill":
            llm.check = reached.set
        stream = session.astream(LONG, **LONGER)
        if phase == "decode":
            await anext(stream)
        while phase == "prefill" and not reached.is_set():
            await asyncio.sleep(0)
        session.close()
        with pytest.raises(InputError, match="the session was closed before the answer's end"):
            await pieces_of(stream)
        if ahead is not None:
            assert (await anext(ahead)).token_ids[0] == expected.token_ids[0]  # it goes on
            await ahead.aclose()
        llm.check = None
        return await llm.agenerate(LONG, **WAY)

    assert asyncio.run(ask()).token_ids == expected.token_ids
    assert_nothing_is_held(llm)


def test_closing_a_fork_waits_for_what_is_running(llm):
    """Its pages lie in the store that is read."""
    reached, may_go_on = threading.Event(), threading.Event()

    def check():
        reached.set()
        assert may_go_on.wait(30)

    async def ask(session, fork):
        llm.check = check
        answer = asyncio.create_task(session.agenerate(IDS[400:], **WAY))
        while not reached.is_set():
            await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(fork.close))
        await asyncio.sleep(0.05)
        assert fork in llm.sessions and fork.is_open
        may_go_on.set()
        await closing
        llm.check = None
        return await answer

    with llm.session() as session:
        session.append(LONG)
        found = asyncio.run(ask(session, session.fork())).token_ids
    with llm.session() as session:
        session.append(LONG)
        assert found == session.generate(IDS[400:], **WAY).token_ids
    assert_nothing_is_held(llm)


def test_an_answer_waits_for_another_thread(llm, expected):
    async def ask():
        with llm.sessions.running():
            task = asyncio.create_task(llm.agenerate(LONG, **WAY))
            done, _ = await asyncio.wait({task}, timeout=0.05)
            assert not done
            with pytest.raises(InputError, match="running in another thread"):
                await asyncio.to_thread(llm.generate, LONG, **WAY)
        return await task

    assert asyncio.run(ask()).token_ids == expected.token_ids


def test_hooks_that_are_set_during_an_answer_stay(llm):
    async def ask():
        stream = llm.astream(LONG, **WAY)
        await anext(stream)
        llm.on_progress = llm.check = hook
        await pieces_of(stream)
        assert llm.on_progress is llm.check is hook

    def hook(*_):
        pass

    asyncio.run(ask())


def test_an_llm_is_not_closed_by_what_it_calls(llm, expected):
    async def ask():
        with pytest.raises(InputError, match="cannot be closed by what is called"):
            await llm.agenerate(LONG, **WAY, logits_processors=lambda ids, logits: llm.close())
        return await llm.agenerate(LONG, **WAY)

    assert asyncio.run(ask()).token_ids == expected.token_ids
