"""The device side of inference: the policy behind JetStream's contract, its programs, sampling and weights."""
