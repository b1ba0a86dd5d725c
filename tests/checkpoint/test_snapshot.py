"""The copy of a state: independent of the state, with the same sharing of memory, in memory that is used again."""

import io
from collections import OrderedDict

import torch

from fasttrain.checkpoint.snapshot import HostCopy


def _saved_bytes(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.tell()


def test_copy_holds_its_values_while_the_state_changes():
    flat = torch.arange(6.0)
    weight = torch.nn.Parameter(torch.ones(2, 3).t())
    state = {"module": OrderedDict(a=flat[:2], b=flat[2:]), "rest": [weight, (3, None, "x")], "sizes": torch.Size([2])}
    copied = HostCopy().fill(state)
    size = _saved_bytes(state)
    with torch.no_grad():
        flat.zero_()
        weight.zero_()
    assert copied["module"]["b"].tolist() == [2, 3, 4, 5]
    assert torch.equal(copied["rest"][0], torch.ones(3, 2))
    assert isinstance(copied["rest"][0], torch.nn.Parameter)
    assert isinstance(copied["module"], OrderedDict)
    assert copied["rest"][1] == (3, None, "x")
    assert _saved_bytes(copied) == size  # a and b share their memory in the copy as well


def test_memory_is_allocated_once():
    copies, states = HostCopy(), [{"a": torch.full((1000,), float(k)), "b": torch.zeros(7)} for k in range(3)]
    assert copies.bytes_to_allocate(states[0]) == 4028
    places = set()
    for k, state in enumerate(states):
        copied = copies.fill(state)
        assert torch.equal(copied["a"], state["a"]), k
        assert copies.bytes_to_allocate(state) == 0
        places.add(copied["a"].data_ptr())
    assert len(places) == 1


def test_memory_of_tensors_of_other_sizes_is_freed():
    copies = HostCopy()
    copies.fill([torch.zeros(1000)])
    copies.fill([torch.zeros(10)])
    assert copies.bytes_to_allocate([torch.zeros(1000)]) == 3960
