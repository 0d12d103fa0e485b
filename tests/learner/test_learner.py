"""The learner on steps that were recorded: whatever is redrawn around the arithmetic, the arithmetic stays."""

import numpy as np

from tests.learner.recorded_steps import fresh_learner, quickstart, read_groups, read_recording, this_machine, train_on


def test_the_first_steps_of_a_recorded_quickstart_are_the_same_to_the_last_bit() -> None:
    recording, config = read_recording(), quickstart()
    found = train_on(fresh_learner(config), config, read_groups())

    assert [step.packed for step in found] == [step.packed for step in recording.steps]
    if this_machine() == recording.machine:
        assert found == recording.steps
    else:  # another processor or compiler rounds otherwise, and the difference grows from step to step
        for name in ("loss", "grad_norm"):
            ours, theirs = (
                np.array([float.fromhex(getattr(step, name)) for step in steps]) for steps in (found, recording.steps)
            )
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
