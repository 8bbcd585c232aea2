"""The check that finds tensors made on the default device, see helpers/devices.py."""

import numpy as np
import pytest
import torch

from .helpers.devices import CONVERSIONS, FACTORIES, no_default_device


SOME = torch.ones(2, 3)
WITHOUT = {
    "arange": lambda **o: torch.arange(3, **o),
    "zeros": lambda **o: torch.zeros(2, 3, **o),
    "ones": lambda **o: torch.ones((2, 3), **o),
    "full": lambda **o: torch.full((2,), 3.0, **o),
    "empty": lambda **o: torch.empty(2, **o),
    "eye": lambda **o: torch.eye(3, **o),
    "linspace": lambda **o: torch.linspace(0, 1, 3, **o),
    "logspace": lambda **o: torch.logspace(0, 1, 3, **o),
    "rand": lambda **o: torch.rand(2, **o),
    "randn": lambda **o: torch.randn(2, **o),
    "randint": lambda **o: torch.randint(0, 4, (2,), **o),
    "randperm": lambda **o: torch.randperm(4, **o),
    "tril_indices": lambda **o: torch.tril_indices(3, 3, **o),
    "triu_indices": lambda **o: torch.triu_indices(3, 3, **o),
    "tensor": lambda **o: torch.tensor([1, 2], **o),
    "as_tensor": lambda **o: torch.as_tensor(np.ones(2), **o),
    "asarray": lambda **o: torch.asarray([1.0], **o),
    "scalar_tensor": lambda **o: torch.scalar_tensor(1.0, **o),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_a_factory_without_a_device_is_named(name):
    call = WITHOUT[name]
    expected = call().shape
    with no_default_device():
        for options in ({}, {"device": None}, {"dtype": torch.int64}):
            with pytest.raises(
                RuntimeError, match=rf"torch\.{name} was called without a device in .*test_devices\.py"
            ):
                call(**options)
        for device in ("cpu", torch.device("cpu"), SOME.device):
            assert call(device=device).shape == expected
        assert call(device="meta").device.type == "meta"
    assert call().shape == expected  # outside nothing has changed


def test_all_that_is_asked_for_is_watched():
    assert set(WITHOUT) <= {*FACTORIES.values(), *CONVERSIONS.values()}


def test_what_takes_a_tensors_device_passes():
    with no_default_device():
        for made in (
            torch.zeros_like(SOME),
            torch.randn_like(SOME),
            SOME.new_zeros(2),
            SOME.new_tensor([1.0]),
            torch.as_tensor(SOME),
            torch.asarray(SOME),
            torch.cat([SOME, SOME]).cumsum(0)[SOME[:, 0].long()],
            torch.nn.functional.dropout(SOME, 0.5, training=True),
            torch.nn.functional.one_hot(SOME.long(), 3),
        ):
            assert made.device == SOME.device
        with pytest.warns(UserWarning, match="copy construct"):
            assert torch.tensor(SOME).device == SOME.device


def test_it_sees_into_modules_and_their_gradients():
    class Careless(torch.nn.Module):
        def forward(self, states):
            return states + torch.arange(states.shape[-1])

    class Careful(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 3)

        def forward(self, states):
            return self.linear(states) + torch.arange(states.shape[-1], device=states.device)

    careful = Careful()
    with no_default_device():
        with pytest.raises(RuntimeError, match=r"torch\.arange"):
            Careless()(SOME)
        careful(SOME).sum().backward()
    assert careful.linear.weight.grad is not None


@pytest.mark.parametrize(
    "module, passes", [("torch.nn", True), ("transformers.generation", True), ("transformers_modules.x", False)]
)
def test_other_packages_code_is_not_watched(module, passes):
    module = {"__name__": module, "torch": torch}
    exec("def make(): return torch.ones(2)", module)
    with no_default_device():
        if passes:
            assert module["make"]().shape == (2,)
        else:
            with pytest.raises(RuntimeError, match=r"torch\.ones"):
                module["make"]()
