"""Torch works with the calling thread alone while a model is run, and has all of its own then."""

import threading

import pytest
import torch
from small_llm import open_small

from ebbtide.kernels import dispatch, threads
from ebbtide.offload.running.sampler import Sampler

pytestmark = pytest.mark.skipif(
    dispatch.backend() != "compiled" or threads._setter() is None,
    reason="needs compiled kernels, and a torch whose OpenMP is found",
)


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def counts() -> tuple[int, int]:
    return torch.get_num_threads(), threads.num_threads()


def test_torch_works_alone_and_kernels_do_not():
    assert counts() == (3, 3)
    assert threads.torch_alone(counts)() == (1, 3)
    assert counts() == (3, 3)


def test_what_is_called_from_another_such_function_changes_nothing():
    def outer():
        return threads.torch_alone(counts)(), counts()

    assert threads.torch_alone(outer)() == ((1, 3), (1, 3))
    assert counts() == (3, 3)


def test_threads_are_given_back_after_an_error():
    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        threads.torch_alone(fails)()
    assert counts() == (3, 3)


def test_other_threads_keep_theirs():
    found = []

    def looks():  # its first operation of torch, which is when torch says how many threads it has
        torch.ones(1 << 17).add_(1)
        found.append(counts())

    def meanwhile():
        other = threading.Thread(target=looks)
        other.start()
        other.join()

    threads.torch_alone(meanwhile)()
    assert found == [(3, 3)]


def test_without_compiled_kernels_torch_keeps_its_threads(monkeypatch):
    monkeypatch.setenv("EBBTIDE_KERNELS", "reference")
    assert threads.torch_alone(counts)() == (3, 3)


def test_a_model_is_run_and_a_token_chosen_so(checkpoint, tmp_path, monkeypatch):
    seen, chosen, native, choose = set(), set(), dispatch.compiled_for, Sampler._chosen

    def looking(*tensors):
        seen.add(counts())
        return native(*tensors)

    def choosing(*given):
        chosen.add(counts())
        return choose(*given)

    with open_small(checkpoint("llama2"), tmp_path) as llm, llm.session() as session:
        session.append([1, 2, 3, 4])  # loads the weights, with torch's threads
        monkeypatch.setattr(dispatch, "compiled_for", looking)
        monkeypatch.setattr(Sampler, "_chosen", choosing)
        session.append([5, 6, 7])
        session.generate(max_new_tokens=3, do_sample=True, seed=1)
    assert seen == chosen == {(1, 3)}
